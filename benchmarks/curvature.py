"""Hessians against a loop over rows, torch.func, curvlinops and hessian-eigenthings; all in float64, on one thread.

``dense_vs_*``: the whole matrix of MLP-386 on a batch of 64 (curvlinops and eigenthings, which have no dense Hessian,
multiply the identity). ``topk_vs_*``: its ten largest eigenvalues, all to a residual of 1e-6 of the largest, operator
construction included; hessian-eigenthings, which does not iterate to a tolerance, gets the smallest number of steps
(in tens) that reaches it. ``lanczos_vs_*``: the two largest of a network of 10^6 parameters (``--quick``: 10^5), each
contestant in a process of its own, with its peak resident memory above that of the data and the imported libraries. The
ratio of a library that is not installed is null.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from cloud_memory import resident_mb
from common import ONE_THREAD, alternate, emit, median_ratio, spread

os.environ.update(ONE_THREAD)

import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import descentlab as dl
from descentlab.workloads.models.mlp import MLP

LIBRARIES = ("curvlinops", "hessian_eigenthings")
NAMES = {"curvlinops": "curvlinops", "hessian_eigenthings": "eigenthings"}
TOLERANCE, K, BIG_K = 1e-6, 10, 2
BIG, BIG_QUICK = (784, 1000, 200, 10), (784, 120, 30, 10)  # 987,210 and 98,140 parameters


class Written(nn.Module):
    """SiLU as a product, which curvlinops 3.0.1 can differentiate."""

    def forward(self, z: Tensor) -> Tensor:
        return z * z.sigmoid()


def network(widths: tuple[int, ...], *, written: bool = False) -> nn.Module:
    """A SiLU network in float64, the same weights either way."""
    torch.manual_seed(0)
    model = MLP(widths).double()
    if written:
        for i, layer in enumerate(model.layers):
            model.layers[i] = Written() if isinstance(layer, nn.SiLU) else layer
    return model


def batch(inputs: int, samples: int) -> tuple[Tensor, Tensor]:
    """Points in [0, 1] and classes."""
    g = torch.Generator().manual_seed(0)
    return torch.rand(samples, inputs, dtype=torch.float64, generator=g), torch.randint(10, (samples,), generator=g)


def row_loop(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """One reverse pass per row through the gradient: the published program's way."""
    params = list(model.parameters())
    grads = torch.autograd.grad(F.cross_entropy(model(data[0]), data[1]), params, create_graph=True)
    flat = torch.cat([g.flatten() for g in grads])
    rows = [torch.cat([r.flatten() for r in torch.autograd.grad(g, params, retain_graph=True)]) for g in flat]
    return torch.stack(rows)


def torch_func(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """torch.func.hessian of the loss as a function of one vector."""
    named = [(k, p.shape, p.numel()) for k, p in model.named_parameters()]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([n for _, _, n in named])
        held = {k: part.view(shape) for (k, shape, _), part in zip(named, parts, strict=True)}
        return F.cross_entropy(functional_call(model, held, (data[0],)), data[1])

    return torch.func.hessian(loss)(torch.cat([p.detach().flatten() for p in model.parameters()]))


def curvlinops_operator(widths: tuple[int, ...], data: tuple[Tensor, Tensor]) -> object:
    """Their Hessian, without the determinism check."""
    from curvlinops import HessianLinearOperator

    model = network(widths, written=True)
    params = list(model.parameters())
    return HessianLinearOperator(model, nn.CrossEntropyLoss(), params, [data], check_deterministic=False)


def eigenthings_operator(widths: tuple[int, ...], data: tuple[Tensor, Tensor]) -> object:
    """Their Hessian."""
    from hessian_eigenthings import HessianOperator
    from hessian_eigenthings.loss_fns.standard import supervised_loss

    return HessianOperator(network(widths), [data], supervised_loss(F.cross_entropy))


def eigenthings_top(operator: object, k: int, steps: int) -> tuple[Tensor, bool]:
    """(eigenvalues, whether all residuals are below the tolerance)."""
    from hessian_eigenthings import lanczos

    found = lanczos(operator, k=k, max_iter=steps, reorthogonalize=True, which="LA", seed=0)
    return found.eigenvalues, bool((found.residuals < TOLERANCE * found.eigenvalues.abs().max()).all())


def curvlinops_top(operator: object, k: int) -> Tensor:
    """SciPy's eigsh on their operator, as their documentation does it."""
    found = eigsh(operator.to_scipy(), k=k, which="LA", tol=TOLERANCE, return_eigenvectors=True)  # type: ignore[attr-defined]
    return torch.from_numpy(found[0][::-1].copy())


def there(library: str) -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec(library) is not None


def seconds(work: Callable[[], object], at_least: float = 0.1) -> Callable[[], float]:
    """A contestant that repeats ``work`` for that long and gives the seconds of one time."""

    def measure() -> float:
        count, started = 0, time.perf_counter()
        while count == 0 or time.perf_counter() - started < at_least:
            work()
            count += 1
        return (time.perf_counter() - started) / count

    return measure


def small(repeats: int) -> tuple[dict[str, float | None], dict[str, object]]:
    """Ratios and milliseconds for MLP-386; every result is checked against the row loop first."""
    widths, data = (36, 8, 10), batch(36, 64)
    model = network(widths)
    exact = row_loop(model, data)
    eye = torch.eye(len(exact), dtype=torch.float64)
    top = torch.linalg.eigvalsh(exact).flip(0)[:K]
    dense: dict[str, Callable[[], Tensor]] = {
        "descentlab": lambda: dl.hessian(model, F.cross_entropy, data),
        "rowloop": lambda: row_loop(model, data),
        "torch_func": lambda: torch_func(model, data),
    }
    tops: dict[str, Callable[[], Tensor]] = {
        "descentlab": lambda: dl.top_k(model, F.cross_entropy, data, K, tolerance=TOLERANCE).values
    }
    if there("curvlinops"):
        dense["curvlinops"] = lambda: curvlinops_operator(widths, data) @ eye  # type: ignore[operator]
        tops["curvlinops"] = lambda: curvlinops_top(curvlinops_operator(widths, data), K)
    if there("hessian_eigenthings"):
        operator = eigenthings_operator(widths, data)
        steps = next(s for s in range(40, len(exact) + 1, 10) if eigenthings_top(operator, K, s)[1])
        tops["eigenthings"] = lambda: eigenthings_top(eigenthings_operator(widths, data), K, steps)[0]
    for name, made in dense.items():
        assert float((made() - exact).abs().max()) < 1e-10, name
    for name, made in tops.items():
        assert float((made() - top).abs().max()) < 1e-5 * float(top[0]), name
    ratios: dict[str, float | None] = {}
    details: dict[str, object] = {}
    for what, contestants in (("dense", dense), ("topk", tops)):
        measured = alternate({name: seconds(made) for name, made in contestants.items()}, repeats)
        for name in ("rowloop", "torch_func", "curvlinops") if what == "dense" else ("curvlinops", "eigenthings"):
            ratios[f"{what}_vs_{name}"] = (
                median_ratio(measured[name], measured["descentlab"]) if name in measured else None
            )
        details[f"{what}_ms"] = {name: spread([1e3 * s for s in times]) for name, times in measured.items()}
    return ratios, details


def eigenthings_big(widths: tuple[int, ...], data: tuple[Tensor, Tensor]) -> tuple[float, Tensor]:
    """(seconds of the run with the smallest number of steps that suffices, eigenvalues)."""
    for steps in range(10, 200, 10):
        started = time.perf_counter()
        values, done = eigenthings_top(eigenthings_operator(widths, data), BIG_K, steps)
        if done:
            return time.perf_counter() - started, values
    raise RuntimeError("200 steps do not suffice")


def big(contestant: str, quick: bool) -> dict[str, object]:
    """One contestant on the large network, in this process: seconds, peak memory, the largest eigenvalues."""
    widths, samples = BIG_QUICK if quick else BIG, 32
    data = batch(widths[0], samples)
    if there(contestant):
        importlib.import_module(contestant)
    once(contestant, (36, 8, 10), batch(36, 64))  # what is loaded or built at the first use
    before = resident_mb([os.getpid()])
    taken, values = once(contestant, widths, data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    return {"seconds": round(taken, 3), "peak_mb": round(peak), "values": values.tolist()}


def once(contestant: str, widths: tuple[int, ...], data: tuple[Tensor, Tensor]) -> tuple[float, Tensor]:
    """(seconds, the two largest eigenvalues)."""
    if contestant == "hessian_eigenthings":
        return eigenthings_big(widths, data)
    started = time.perf_counter()
    if contestant == "curvlinops":
        values = curvlinops_top(curvlinops_operator(widths, data), BIG_K)
    else:
        values = dl.top_k(network(widths), F.cross_entropy, data, BIG_K, tolerance=TOLERANCE).values
    return time.perf_counter() - started, values


def in_its_own_process(contestant: str, quick: bool) -> dict[str, Any]:
    """:func:`big` in a fresh interpreter."""
    command = [sys.executable, __file__, "--big", contestant, *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--big", metavar="CONTESTANT", help="measure one contestant on the large network, here")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if given.big:
        print(json.dumps(big(given.big, given.quick)))
        return
    ratios, details = small(2 if given.quick else 7)
    found = {name: in_its_own_process(name, given.quick) for name in ("descentlab", *filter(there, LIBRARIES))}
    ours = found["descentlab"]
    for name in LIBRARIES:
        key = f"lanczos_vs_{NAMES[name]}"
        ratios[key] = round(found[name]["seconds"] / ours["seconds"], 2) if name in found else None
        pairs = zip(found.get(name, ours)["values"], ours["values"], strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-5 * ours["values"][0], name
    lanczos = {name: {"seconds": f["seconds"], "peak_mb": f["peak_mb"]} for name, f in found.items()}
    count = sum(p.numel() for p in network(BIG_QUICK if given.quick else BIG).parameters())
    emit("curvature", ratios, 386, **details, lanczos={"parameters": count, **lanczos}, torch=torch.__version__)


if __name__ == "__main__":
    main()
