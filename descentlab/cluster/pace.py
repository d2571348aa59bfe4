"""How long things take between workers and server: computing, and messages over a link.

The time of a gradient is ``compute_s`` plus what the delay law adds. A message of B bytes takes latency_s + B /
bytes_per_s. With a shared link the server sends and receives one message at a time, in the order in which they are
ready, each direction for itself; without, every worker has a line of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np

from ..core.errors import UserError
from ..core.protocols import Delay
from ..core.streams import Streams


@final
@dataclass
class Line:
    """One direction of the server's link; messages must be handed over in the order in which they are ready."""

    transfer_s: float = 0.0
    latency_s: float = 0.0
    shared: bool = False
    _free_s: float = 0.0

    def arrival(self, ready_s: float) -> float:
        """When a message that is ready at ``ready_s`` has arrived."""
        if not self.shared:
            return ready_s + self.transfer_s + self.latency_s
        self._free_s = max(self._free_s, ready_s) + self.transfer_s
        return self._free_s + self.latency_s


@final
@dataclass(frozen=True)
class Pace:
    """The delay law, the time computing takes by itself, and the link; ``message_bytes`` is one gradient or one copy
    of the weights."""

    delay: Delay
    compute_s: float = 0.0
    latency_s: float = 0.0
    bytes_per_s: float | None = None
    shared_link: bool = False
    message_bytes: int = 0

    def seconds(self, workers: int, steps: int, streams: Streams, replicate: int) -> np.ndarray:
        """Time of every gradient without messages, ``[T, W]``.

        Raises:
            UserError: for a delay law that gives another shape, negative or non-finite times.
        """
        times = np.asarray(self.delay.seconds(workers, steps, streams, replicate), dtype=np.float64)
        if times.shape != (steps, workers) or not np.isfinite(times).all() or (times < 0).any():
            what = f"{type(self.delay).__name__} with times of shape {times.shape}"
            raise UserError("delay", what, f"finite times of at least 0 of shape {(steps, workers)}")
        return self.compute_s + times

    def line(self) -> Line:
        """A fresh, idle direction of the link."""
        transfer_s = self.message_bytes / self.bytes_per_s if self.bytes_per_s else 0.0
        return Line(transfer_s, self.latency_s, self.shared_link)
