"""Makes a network of two workers, says so, and waits to be killed; or, in one that is there, sends and receives; for
``test_compression_links.py``."""

import socket
import sys
import time

from descentlab.cluster.namespaces import Shape, network


def receive() -> None:
    """Count the packets that arrive in the three seconds after the first."""
    box = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    box.bind(("10.77.0.2", 7701))
    server = socket.create_server(("10.77.0.2", 7700))
    print("up", flush=True)
    server.accept()
    box.settimeout(3)
    found = 0
    try:
        while box.recv(100) != b"end":
            found += 1
    except TimeoutError:
        pass
    print(found)


def send() -> None:
    """Say how long a connection took, and send 300 packets."""
    started = time.monotonic()
    socket.create_connection(("10.77.0.2", 7700), timeout=30)
    print(time.monotonic() - started)
    box = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for _ in range(300):
        box.sendto(b"x", ("10.77.0.2", 7701))
        time.sleep(0.002)
    for _ in range(20):
        box.sendto(b"end", ("10.77.0.2", 7701))


if "receive" in sys.argv:
    receive()
elif "send" in sys.argv:
    send()
else:
    with network(2, Shape(100.0, 50.0)) as names:
        print(*names, flush=True)
        if "fail" in sys.argv:
            raise RuntimeError("a failure inside")
        time.sleep(60)
