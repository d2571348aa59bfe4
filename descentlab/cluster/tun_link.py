"""A link in user space, for kernels without netem: packets between tun devices, with delay, jitter, loss and a rate.

A process of its own, ``python -m descentlab.cluster.tun_link SETTINGS NAMESPACE…``, with a device ``eth0`` in each
namespace (10.77.0.1, .2, …). It says ``up`` when they are there. Every line of its input is a new rate in Mbit/s
towards each worker (0 = no limit); when its input ends, so does it.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import json
import os
import random
import selectors
import struct
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path("/run/netns")
CLONE_NEWNET, TUNSETIFF, TUN_NO_PACKET_INFO = 0x40000000, 0x400454CA, 0x1001
BACKLOG_S = 0.05  # what waits longer for its turn is dropped, as by a token bucket with latency 50ms
SPIN_S = 0.0005  # shorter waits are not worth sleeping


def tun(namespace: str, address: str) -> int:
    """A tun device ``eth0`` in a network namespace; its descriptor, which works from everywhere."""
    libc = ctypes.CDLL(None, use_errno=True)
    home, away = (os.open(path, os.O_RDONLY) for path in ("/proc/self/ns/net", FOLDER / namespace))
    try:
        if libc.setns(away, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"namespace {namespace}")
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH14x", b"eth0", TUN_NO_PACKET_INFO))
        libc.setns(home, CLONE_NEWNET)
    finally:
        os.close(home)
        os.close(away)
    for words in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "txqueuelen", "1000", "up"]):
        subprocess.run(["ip", "-n", namespace, *words], check=True)
    return device


class Carrier:
    """What is on its way between the devices. Milliseconds one way, percent, Mbit/s."""

    def __init__(self, devices: list[int], latency_ms: float, jitter_ms: float, loss_pct: float, rate: float) -> None:
        self.devices, self.rate = devices, rate
        self._latency, self._jitter, self._loss = latency_ms / 1e3, jitter_ms / 1e3, loss_pct / 100
        self._free, self._last = [0.0] * len(devices), [0.0] * len(devices)
        self._waiting: list[tuple[float, int, int, bytes]] = []
        self._count, self._random = 0, random.Random(0)

    def take(self, device: int, most: int = 64) -> None:
        """Read what a worker sends, and note when it is to arrive."""
        for _ in range(most):
            try:
                packet = os.read(device, 65536)
            except BlockingIOError:
                return
            to = packet[19] - 1 if len(packet) >= 20 and packet[0] >> 4 == 4 else -1
            if not 0 <= to < len(self.devices) or self._random.random() < self._loss:
                continue
            at = time.monotonic()
            if self.rate:
                begins = max(at, self._free[to])
                if begins - at > BACKLOG_S:
                    continue
                self._free[to] = at = begins + 8 * len(packet) / (1e6 * self.rate)
            at += max(0.0, self._random.gauss(self._latency, self._jitter) if self._jitter else self._latency)
            self._last[to] = at = max(at, self._last[to])  # in order
            self._count += 1
            heapq.heappush(self._waiting, (at, self._count, to, packet))

    def give(self) -> float:
        """Deliver what has arrived; seconds until the next one."""
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            _, _, to, packet = heapq.heappop(self._waiting)
            try:
                os.write(self.devices[to], packet)
            except OSError:  # its queue is full, or the device is gone: lost, as on any link
                continue
        wait = self._waiting[0][0] - time.monotonic() if self._waiting else 0.2
        return wait if wait > SPIN_S else 0.0


def main(settings: str, *namespaces: str) -> None:
    """Carry packets until the input ends."""
    devices = [tun(name, f"10.77.0.{w + 1}") for w, name in enumerate(namespaces)]
    carrier = Carrier(devices, **json.loads(settings))
    selector = selectors.DefaultSelector()
    for source in (*devices, sys.stdin.fileno()):
        selector.register(source, selectors.EVENT_READ)
    print("up", flush=True)
    told = b""
    while True:
        for key, _ in selector.select(carrier.give()):
            if key.fd != sys.stdin.fileno():
                carrier.take(key.fd)
            elif found := os.read(key.fd, 4096):  # no readline: the selector does not see what a buffer holds
                *lines, told = (told + found).split(b"\n")
                carrier.rate = float(lines[-1]) if lines else carrier.rate
            else:
                return


if __name__ == "__main__":
    main(*sys.argv[1:])
