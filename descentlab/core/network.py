"""Network interfaces of this machine by name, for whatever listens or connects. No torch."""

from __future__ import annotations

import socket
import struct

from .errors import UserError, nearest

LOOPBACK = "127.0.0.1"
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def interfaces() -> list[str]:
    """Names of this machine's network interfaces, for instance ``["lo", "eth0"]``."""
    return [name for _, name in socket.if_nameindex()]


def address_of(interface: str | None, key: str) -> str:
    """IPv4 address of ``interface``; None is the loopback of this machine. ``key``: the setting that names it.

    Raises:
        UserError: for an interface that does not exist, has no IPv4 address, or cannot be asked on this system.
    """
    if interface is None:
        return LOOPBACK
    if interface not in interfaces():
        expected = f"a network interface of this machine ({', '.join(interfaces())})"
        raise UserError(key, interface, expected, hint=nearest(interface, interfaces()))
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            found = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    except (ImportError, OSError):
        raise UserError(key, interface, "an interface that is up and has an IPv4 address") from None
    return socket.inet_ntoa(found[20:24])
