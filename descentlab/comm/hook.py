"""Communication hooks for ``torch.nn.parallel.DistributedDataParallel``, safe with any number of buckets.

Every collective of a process is issued by one thread at a time and in the order of the buckets, which is the same on
every process. (torch's own PowerSGD hook lets each bucket's callbacks issue theirs when they are ready; with gloo and
two buckets the processes then disagree about the order and abort or hang.) On a CPU all buckets but the last are
worked on by a communication thread while the backward pass goes on, or, where no core is left for it, all together
after the backward pass, which takes fewer messages; on an accelerator everything is put on the stream
DDP calls the hook on, and nothing waits on the host.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.exchange import drive
from ..core.protocols import Collective, Compressor, Gather, Mean, Means
from ..core.streams import Streams
from ..core.tree import Tree

PARTS = ("compress_s", "collective_s", "decompress_s")
COUNTS = ("iteration", "bytes_sent", "messages", "gathered")


@dataclass(frozen=True)
class Bucket:
    """Gradients that are exchanged together: ``buffers`` hold all of ``grads`` (name -> view of one of them)."""

    buffers: tuple[Tensor, ...]
    grads: dict[str, Tensor]
    last: bool


@dataclass(frozen=True)
class BucketTimes:
    """Seconds of one exchange: compressing, each collective, decompressing; how much of it the backward pass hid (NaN
    on an accelerator); and the bytes this process put into its collectives."""

    compress_s: float
    collectives_s: tuple[float, ...]
    decompress_s: float
    hidden_s: float
    bytes_sent: int


class Marks:
    """Seconds between marks, summed by part: the host's clock on a CPU, events on a CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._found: list[tuple[str, Any, Any]] = []
        self._last = self._now()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, part: str) -> None:
        """What happened since the last mark was ``part``."""
        now = self._now()
        self._found.append((part, self._last, now))
        self._last = now

    def pieces(self) -> list[tuple[str, float]]:
        """(part, seconds) in their order; waits for the events."""
        out = []
        for part, a, b in self._found:
            if self._cuda:
                b.synchronize()
            out.append((part, a.elapsed_time(b) / 1e3 if self._cuda else b - a))
        return out

    def seconds(self) -> dict[str, float]:
        """Part -> seconds; waits for the events."""
        out = dict.fromkeys(PARTS, 0.0)
        for part, seconds in self.pieces():
            out[part] += seconds
        return out

    def before(self, moment: float) -> float:
        """Seconds from the first mark to the last that lie before ``moment`` of the host's clock; NaN on a GPU."""
        if self._cuda:
            return float("nan")
        return max(0.0, min(self._last, moment) - self._found[0][1]) if self._found else 0.0


class BucketHook(ABC):
    """What hooks share: names of parameters, order of collectives, overlap, timing and the byte count.

    ``iteration``: backward passes done. ``bytes_sent``: payload this process put into collectives so far (times
    2 (W - 1) / W is what a ring all-reduce of W processes puts on its link). ``messages``: collectives so far;
    ``gathered``: those of them in which all processes got all messages.

    ``overlap``, on a CPU: exchange while the backward pass goes on; False: everything at its end, in as few messages as
    one bucket takes; None: overlap where the machine has two cores for every process on it.
    """

    overlaps: bool | None = None  # what None means; a class may know better

    def __init__(self, *, overlap: bool | None = None, process_group: Any = None) -> None:
        self.overlap, self.group = self.overlaps if overlap is None else overlap, process_group
        self.iteration = self.bytes_sent = self.messages = self.gathered = 0
        self._names: dict[int, str] = {}
        self._queue: queue.Queue[tuple[Bucket, torch.futures.Future] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._marks: list[tuple[Marks, int]] = []  # and bytes, of the buckets of the last backward pass
        self._held: list[tuple[Bucket, torch.futures.Future]] = []
        self._stood = self._exposed_s = 0.0  # since when the backward pass waits, and for how long
        self._times: dict[str, float] = {}

    def attach(self, model: nn.parallel.DistributedDataParallel) -> BucketHook:
        """Register with a DDP model, before its first backward pass; returns the hook. On every process."""
        self.group = model.process_group if self.group is None else self.group
        named = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        self._names = {id(p): name for name, p in named.items()}
        if self.overlap is None:
            self.overlap = _cores() >= 2 * int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self._start({name: p.detach() for name, p in named.items()})
        model.register_comm_hook(self, _on_bucket)
        return self

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self.group)

    def timings(self) -> dict[str, float]:
        """Of the last backward pass, in seconds: ``compress_s``, ``collective_s``, ``decompress_s`` (summed over
        buckets), and ``exposed_s``, the part of them during which the backward pass stood still."""
        found = [marks.seconds() for marks, _ in self._marks]
        busy = {part: sum(one[part] for one in found) for part in PARTS}
        return {
            **busy,
            "exposed_s": min(self._exposed_s, sum(busy.values())) if self._exposed_s else sum(busy.values()),
        }

    def buckets(self) -> list[BucketTimes]:
        """Every exchange of the last backward pass, in its order."""
        out = []
        for marks, sent in self._marks:
            whole, each = marks.seconds(), tuple(s for part, s in marks.pieces() if part == "collective_s")
            out.append(BucketTimes(whole["compress_s"], each, whole["decompress_s"], marks.before(self._stood), sent))
        return out

    def state_dict(self) -> dict[str, Any]:
        """What this process has to keep for the next backward pass; every process saves its own."""
        return {**{key: getattr(self, key) for key in COUNTS}, **self._state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave, after :meth:`attach`. ValueError where names or shapes differ."""
        for key in COUNTS:  # a checkpoint of an earlier version has no "gathered"
            setattr(self, key, int(state.get(key, 0) if key == "gathered" else state[key]))
        self._load(state)

    def close(self) -> None:
        """End the communication thread; the hook starts another when it is called again."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    @abstractmethod
    def exchange(self, bucket: Bucket, marks: Marks) -> None:
        """Put the averaged gradients into ``bucket``."""

    @abstractmethod
    def _start(self, params: dict[str, Tensor]) -> None: ...

    @abstractmethod
    def _state(self) -> dict[str, Any]: ...

    @abstractmethod
    def _load(self, state: Mapping[str, Any]) -> None: ...

    def reduce(self, tensor: Tensor) -> None:
        """The mean over processes, in place, in the tensor's own precision (divided first, so that sums stay small)."""
        if self.world_size == 1:  # nothing is sent
            return
        self.bytes_sent += tensor.numel() * tensor.element_size()
        self.messages += 1
        tensor.div_(self.world_size)
        if tensor.dtype == torch.bfloat16 and dist.get_backend(self.group) == "gloo":  # which has no sum for it
            plain = tensor.view(torch.uint8)
            words = [torch.empty_like(plain) for _ in range(self.world_size)]
            dist.all_gather(words, plain, group=self.group)
            tensor.copy_(torch.stack([word.view(torch.bfloat16).float() for word in words]).sum(0))
            return
        dist.all_reduce(tensor, group=self.group)

    def gather(self, tensor: Tensor) -> Tensor:
        """All processes' tensors ``[W, …]``."""
        if self.world_size == 1:
            return tensor.unsqueeze(0)
        self.bytes_sent += tensor.numel() * tensor.element_size()
        self.messages += 1
        self.gathered += 1
        found = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(found, tensor.contiguous(), group=self.group)
        return torch.stack(found)

    def _submit(self, bucket: Bucket) -> torch.futures.Future:
        device = bucket.buffers[0].device
        future: torch.futures.Future = torch.futures.Future(devices=[device] if device.type == "cuda" else None)
        if device.type != "cpu":
            self._work([(bucket, future)])
        elif self.overlap and not bucket.last:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="communication", daemon=True)
                self._thread.start()
            self._queue.put((bucket, future))
        elif self.overlap or bucket.last:
            self._stood = time.perf_counter()
            self._queue.join()
            held, self._held = self._held, []
            self._work([*held, (bucket, future)])
            self._exposed_s = time.perf_counter() - self._stood
        else:
            self._held.append((bucket, future))
        return future

    def _serve(self) -> None:
        while (task := self._queue.get()) is not None:
            self._work([task])
            self._queue.task_done()
        self._queue.task_done()

    def _work(self, tasks: Sequence[tuple[Bucket, torch.futures.Future]]) -> None:
        """Exchange these buckets as one, and say so to DDP."""
        bucket = tasks[-1][0]
        if len(tasks) > 1:
            grads = {name: g for one, _ in tasks for name, g in one.grads.items()}
            bucket = Bucket(tuple(one.buffers[0] for one, _ in tasks), grads, bucket.last)
        marks, sent = Marks(bucket.buffers[0].device), self.bytes_sent
        try:
            with torch.no_grad():
                self.exchange(bucket, marks)
        except Exception as error:  # for DDP to raise where the user waits
            for _, future in tasks:
                future.set_exception(error)
            return
        self._note(marks, self.bytes_sent - sent, bucket.last)
        for one, future in tasks:
            future.set_result(one.buffers[0])

    def _note(self, marks: Marks, sent: int, last: bool) -> None:
        if self._finished:
            self._marks = []
        self._marks.append((marks, sent))
        self._finished = last
        self.iteration += last

    _finished = True


def _on_bucket(hook, bucket):  # DDP reads the annotations, as types and not as text
    names, grads = [hook._names[id(p)] for p in bucket.parameters()], bucket.gradients()
    own = dict(zip(names, grads, strict=True))
    if bucket.index() == 0:
        hook._held = []  # of a backward pass that did not end
    return hook._submit(Bucket((bucket.buffer(),), own, bucket.is_last()))


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@final
class CompressorHook(BucketHook):
    """Any :class:`~descentlab.core.protocols.Compressor` as a hook: its collectives are answered by the processes.

    ``seed`` and ``replicate`` are what its draws depend on; with those of a lockstep run of as many workers it sends
    the same numbers.
    """

    def __init__(
        self,
        compressor: Compressor,
        *,
        seed: int = 0,
        replicate: int = 0,
        overlap: bool | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__(overlap=overlap, process_group=process_group)
        self.compressor, self._streams, self._replicate = compressor, Streams(seed), replicate
        self.memory: Tree = {}
        self.shared: Tree = {}

    def _start(self, params: dict[str, Tensor]) -> None:
        stacked = {name: p.unsqueeze(0) for name, p in params.items()}
        self.memory, self.shared = self.compressor.start(stacked, 1, self._streams, np.array([self._replicate]))

    def exchange(self, bucket: Bucket, marks: Marks) -> None:
        """See :class:`BucketHook`."""
        grads = {name: g[None, None] for name, g in bucket.grads.items()}

        def answer(request: Collective) -> Any:
            marks.mark("compress_s")
            reply = self._answer(request)
            marks.mark("collective_s")
            return reply

        mean, memory, shared = drive(self.compressor.exchange(grads, self.memory, self.shared), answer)
        self.memory, self.shared = {**self.memory, **memory}, shared
        names = list(bucket.grads)
        torch._foreach_copy_([bucket.grads[name] for name in names], [mean[name][0] for name in names])
        marks.mark("decompress_s")

    def _answer(self, request: Collective) -> Any:
        if isinstance(request, Gather):
            return self.gather(request.tensor[0, 0])[None]
        if isinstance(request, Mean):
            return self._means([request.tensor])[0]
        assert isinstance(request, Means), request
        return tuple(self._means(request.tensors))

    def _means(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One all-reduce of all; ``[1, 1, …]`` each, the answers ``[1, …]``."""
        flat = torch.cat([t.reshape(-1) for t in tensors])
        self.reduce(flat)
        parts = flat.split([t.numel() for t in tensors])
        return [part.view(t.shape[1:]) for part, t in zip(parts, tensors, strict=True)]

    def _state(self) -> dict[str, Any]:
        return {"memory": self.memory, "shared": self.shared}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.memory, self.shared = state["memory"], state["shared"]
