"""Hooks to compare with: a plain all-reduce, and torch's own PowerSGD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torchs

from .hook import Bucket, BucketHook, BucketTimes, Marks
from .powersgd import numbers_sent


@final
class AllReduceHook(BucketHook):
    """What DDP does without a hook, timed and counted."""

    overlaps = True  # as DDP's own: nothing is computed that could want the core

    def exchange(self, bucket: Bucket, marks: Marks) -> None:
        """See :class:`BucketHook`."""
        for buffer in bucket.buffers:
            self.reduce(buffer)
        marks.mark("collective_s")

    def _start(self, params: dict[str, Tensor]) -> None:
        pass

    def _state(self) -> dict[str, Any]:
        return {}

    def _load(self, state: Mapping[str, Any]) -> None:
        pass


@final
class TorchPowerSGDHook:
    """torch's hook behind the same few methods; it needs one bucket on gloo, and does not say what takes how long.

    Its first two iterations travel whole, the fewest it allows with error feedback.
    """

    START = 2

    def __init__(self, rank: int, *, min_compression_rate: float = 2.0, seed: int = 0) -> None:
        self.state = torchs.PowerSGDState(
            None,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=self.START,
            min_compression_rate=min_compression_rate,
            random_seed=seed,
        )
        self.iteration = self.bytes_sent = self.messages = self.gathered = 0
        self._sizes = (0, 0)
        self._whole = self._element = 0

    def attach(self, model: nn.parallel.DistributedDataParallel) -> TorchPowerSGDHook:
        """Register with a DDP model."""
        shapes = {name: tuple(p.shape) for name, p in model.module.named_parameters()}
        self._sizes = numbers_sent(shapes, self.state.matrix_approximation_rank, self.state.min_compression_rate)
        params = list(model.module.parameters())
        self._whole, self._element = sum(p.numel() for p in params), params[0].element_size()
        model.register_comm_hook(self, _on_bucket)
        return self

    def timings(self) -> dict[str, float]:
        """Nothing: its parts cannot be told apart."""
        return {}

    def buckets(self) -> list[BucketTimes]:
        """Nothing, likewise."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What it keeps, with the counts."""
        kept = {key: getattr(self.state, key) for key in ("error_dict", "p_memory_dict", "q_memory_dict", "iter")}
        return {"iteration": self.iteration, "bytes_sent": self.bytes_sent, "messages": self.messages, **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        for key in ("error_dict", "p_memory_dict", "q_memory_dict", "iter"):
            setattr(self.state, key, state[key])
        self.iteration, self.bytes_sent = state["iteration"], state["bytes_sent"]
        self.messages = state["messages"]

    def close(self) -> None:
        """Nothing to end."""

    def count(self) -> None:
        """One iteration has been sent."""
        plain = self.iteration < self.START
        self.bytes_sent += self._element * (self._whole if plain else sum(self._sizes))
        self.messages += 1 if plain else 3
        self.iteration += 1


def _on_bucket(hook, bucket):  # DDP reads the annotations, as types and not as text
    if bucket.is_last():
        hook.count()
    return torchs.powerSGD_hook(hook.state, bucket)
