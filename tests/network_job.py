"""Makes a network of two workers, says so, and waits to be killed; for ``test_compression_links.py``."""

import sys
import time

from descentlab.cluster.namespaces import Shape, network

with network(2, Shape(100.0, 50.0)) as names:
    print(*names, flush=True)
    if "fail" in sys.argv:
        raise RuntimeError("a failure inside")
    time.sleep(60)
