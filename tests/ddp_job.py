"""What two DDP processes find out for ``test_powersgd_hook.py``: ``ddp_job.py RANK WORLD STORE OUT``.

Every scenario returns what it measured; nothing is asserted here. Rank 0 writes it all to OUT.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torchs
from torch.nn.parallel import DistributedDataParallel

from descentlab.comm.dense import Dense
from descentlab.comm.half import HalfPrecision
from descentlab.comm.hook import BucketHook, CompressorHook
from descentlab.comm.powersgd import PowerSGD
from descentlab.comm.powersgd_hook import PowerSGDHook
from descentlab.comm.sign import SignSgd
from descentlab.comm.topk import TopK

ONE_BUCKET, MANY_BUCKETS = 1000.0, 0.004  # MB


def model(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A convolution, two linear maps of one shape and a head: 4 matrices of 3 shapes, biases."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(216, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 10)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Sixteen noisy images of ten fixed patterns, this process's own of this step."""
    patterns = torch.from_numpy(np.random.default_rng(1).normal(size=(10, 1, 8, 8)))
    rng = np.random.default_rng([2, dist.get_rank(), step])
    y = torch.from_numpy(rng.integers(10, size=16))
    return (patterns[y] + noise * torch.from_numpy(rng.normal(size=(16, 1, 8, 8)))).to(dtype), y


def train(
    ddp: DistributedDataParallel, steps: range, lr: float = 0.1, before: Callable[[int], None] = lambda step: None
) -> list[float]:
    """Plain SGD; this process's losses."""
    losses = []
    dtype = next(ddp.parameters()).dtype
    for step in steps:
        before(step)
        x, y = batch(step, dtype)
        loss = nn.functional.cross_entropy(ddp(x), y)
        ddp.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in ddp.parameters():
                p.sub_(lr * p.grad)
        losses.append(loss.item())
    return losses


def wrapped(cap: float, dtype: torch.dtype = torch.float64) -> DistributedDataParallel:
    return DistributedDataParallel(model(dtype=dtype), bucket_cap_mb=cap)


def weights(ddp: DistributedDataParallel) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in ddp.parameters()]).clone()


def as_torchs_hook(rank: int, steps: int = 50) -> dict[str, Any]:
    """Both hooks from the same weights; ours gets the Q that torch drew for its first compressed iteration."""
    theirs, ours = wrapped(ONE_BUCKET), wrapped(ONE_BUCKET)
    state = torchs.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
    names = {id(p): name for name, p in theirs.module.named_parameters()}
    drawn: dict[str, Tensor] = {}

    def spy(state: Any, bucket: Any) -> Any:
        if state.iter == 2:
            drawn.update(first_q(state, [names[id(p)] for p in bucket.parameters()], bucket.gradients(), rank))
        return torchs.powerSGD_hook(state, bucket)

    del spy.__annotations__["state"], spy.__annotations__["bucket"], spy.__annotations__["return"]
    theirs.register_comm_hook(state, spy)
    train(theirs, range(steps))
    hook = PowerSGDHook(rank=rank, start_iteration=2).attach(ours)
    hook.load_state_dict({**hook.state_dict(), "q": drawn})
    train(ours, range(steps))
    distance = (weights(ours) - weights(theirs)).abs().max().item()
    moved = (weights(ours) - weights(wrapped(ONE_BUCKET))).abs().max().item()
    return {
        "distance": distance,
        "moved": moved,
        "compressed": len(drawn),
        "saved": state.total_numel_after_compression,
    }


def first_q(state: Any, names: list[str], grads: list[Tensor], rank: int) -> dict[str, Tensor]:
    """What torch is about to draw: one seed for all, a normal matrix each, in the order of shapes, orthogonalised."""
    rng = copy.deepcopy(state.rng)
    shapes: dict[Any, list[str]] = {}
    for name, g in zip(names, grads, strict=True):
        n, m = g.shape[0], g[0].numel()
        if (n + m) * min(n, m, rank) * state.min_compression_rate < n * m:
            shapes.setdefault((n, m), []).append(name)
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.randint(1_000_000_000))
        for (n, m), group in shapes.items():
            for name in group:
                q = torch.randn(1, m, min(n, m, rank), dtype=grads[0].dtype)
                torchs._orthogonalize(q, 0)
                found[name] = q[0]
    return found


def many_buckets(rounds: int = int(os.environ.get("BUCKET_ROUNDS", "10")), steps: int = 200) -> dict[str, Any]:
    """Ten models, each for 200 iterations; the process group's time-out is what a hang would end in."""
    done, spread, buckets = 0, 0.0, 0
    for _ in range(rounds):
        ddp = wrapped(MANY_BUCKETS, torch.float32)
        hook = PowerSGDHook(rank=2, overlap=True).attach(ddp)
        train(ddp, range(steps), lr=0.05)
        buckets = len(hook._layouts)
        done += hook.iteration == steps
        spread = max(spread, apart(weights(ddp)))
        hook.close()
    return {"done": done, "spread": spread, "buckets": buckets}


def apart(tensor: Tensor) -> float:
    """The largest difference between the processes."""
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor)
    return max((other - tensor).abs().max().item() for other in found)


def buckets_do_not_matter() -> float:
    """The same training with one bucket and with many, with the thread and without."""
    found = []
    for cap, overlap in ((ONE_BUCKET, True), (MANY_BUCKETS, True), (MANY_BUCKETS, False)):
        ddp = wrapped(cap)
        PowerSGDHook(rank=2, overlap=overlap).attach(ddp)
        train(ddp, range(20))
        found.append(weights(ddp))
    return max((found[0] - other).abs().max().item() for other in found[1:])


def rank_change(old: int, new: int, reset: bool = False, at: int = 60, steps: int = 90) -> dict[str, Any]:
    """Ranks from ``old`` to ``new``; ``reset``: as if the hook was made anew, which forgets what is owed."""
    ddp = wrapped(ONE_BUCKET)
    hook = PowerSGDHook(rank=old).attach(ddp)
    kept: dict[str, Any] = {}

    def change(step: int) -> None:
        if step != at:
            return
        held = {name: hook.residual(name).clone() for name in hook.matrices()}
        columns = {name: hook.q(name).clone() for name in hook.matrices()}
        if reset:
            hook._residual, hook._q, hook._layouts = {}, {}, {}
        hook.set_rank(new)
        kept["owed"] = sum(e.norm().item() for e in held.values())
        kept["same"] = all(torch.equal(hook.residual(name), e) for name, e in held.items())
        both = min(old, new)
        kept["columns"] = all(torch.equal(hook.q(n)[:, :both], q[:, :both]) for n, q in columns.items())
        kept["apart"] = max(apart(hook.q(name)) for name in columns)
        kept["extended"] = (
            max((hook.q(n)[:, old:].T @ hook.q(n)[:, old:] - torch.eye(new - old)).abs().max().item() for n in columns)
            if new > old
            else 0.0
        )

    losses = train(ddp, range(steps), lr=0.3, before=change)
    return {**kept, "losses": losses, "at": at}


def resumed() -> dict[str, float]:
    """State taken out after 12 of 24 iterations and put into a new hook on a copy of the model: the same weights."""
    whole = wrapped(MANY_BUCKETS)
    hook = PowerSGDHook(rank={"3.weight": 2, "5.weight": 1}).attach(whole)
    train(whole, range(12))
    saved, middle = hook.state_dict(), copy.deepcopy(whole.module.state_dict())
    train(whole, range(12, 24))
    again = wrapped(MANY_BUCKETS)
    again.module.load_state_dict(middle)
    other = PowerSGDHook(rank=1).attach(again)
    other.load_state_dict(saved)
    train(again, range(12, 24))
    forgetful = wrapped(MANY_BUCKETS)
    forgetful.module.load_state_dict(middle)
    PowerSGDHook(rank={"3.weight": 2, "5.weight": 1}).attach(forgetful)
    train(forgetful, range(12, 24))
    return {
        "distance": (weights(again) - weights(whole)).abs().max().item(),
        "without": (weights(forgetful) - weights(whole)).abs().max().item(),
        "bytes": float(other.bytes_sent == hook.bytes_sent),
    }


def equals_the_coroutine(**options: Any) -> dict[str, Any]:
    """Our fast hook beside the lockstep compressor's own coroutine, driven by the same processes."""
    found = []
    for make in (
        lambda: PowerSGDHook(rank=2, seed=5, replicate=3, **options),
        lambda: CompressorHook(PowerSGD(2, min_compression_rate=2.0, **options), seed=5, replicate=3),
    ):
        ddp = wrapped(ONE_BUCKET)
        hook: BucketHook = make().attach(ddp)
        train(ddp, range(25))
        found.append((weights(ddp), hook.bytes_sent, hook.messages))
    distance = (found[0][0] - found[1][0]).abs().max().item()
    return {"distance": distance, "bytes": [f[1] for f in found], "messages": [f[2] for f in found]}


def compressors() -> dict[str, Any]:
    """Every compressor as a hook in float32: the gradients of three steps, with those every process had put in."""
    out = {}
    made = {"none": Dense(), "fp16": HalfPrecision("fp16"), "bf16": HalfPrecision("bf16")}
    for name, compressor in {**made, "topk": TopK(0.1), "sign": SignSgd()}.items():
        ddp = wrapped(MANY_BUCKETS, torch.float32)
        hook = CompressorHook(compressor, overlap=name != "sign").attach(ddp)
        plain = model(dtype=torch.float32)
        steps = []
        for step in range(3):
            x, y = batch(step, torch.float32)
            nn.functional.cross_entropy(plain(x), y).backward()
            nn.functional.cross_entropy(ddp(x), y).backward()
            own = {n: gathered(p.grad) for n, p in plain.named_parameters()}
            steps.append({"own": own, "mean": {n: p.grad.clone() for n, p in ddp.module.named_parameters()}})
            plain.zero_grad()
            ddp.zero_grad()
        out[name] = {"steps": steps, "bytes": hook.bytes_sent, "timings": hook.timings()}
    return out


def gathered(tensor: Tensor) -> Tensor:
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor)
    return torch.stack(found)


SCENARIOS: dict[str, Callable[[], Any]] = {
    **{f"torch_{r}": lambda r=r: as_torchs_hook(r) for r in (1, 2, 4)},
    "many_buckets": many_buckets,
    "buckets_do_not_matter": buckets_do_not_matter,
    "rank_4_1": lambda: rank_change(4, 1),
    "rank_1_3": lambda: rank_change(1, 3),
    "rank_reset": lambda: rank_change(4, 1, reset=True),
    "rank_kept": lambda: rank_change(4, 4),
    "resumed": resumed,
    "coroutine": equals_the_coroutine,
    "coroutine_plain_start": lambda: equals_the_coroutine(start_iteration=5),
    "coroutine_no_memory": lambda: equals_the_coroutine(error_feedback=False, warm_start=False),
    "compressors": compressors,
}


def main(rank: int, world: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    found = {}
    for name, scenario in SCENARIOS.items():
        started = time.perf_counter()
        found[name] = scenario()
        dist.barrier()
        if rank == 0:
            print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
    if rank == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
