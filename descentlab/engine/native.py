"""Builds ``plain_mlp.c`` on first use with the machine's own C compiler, and calls it.

The library is kept in the user's cache folder under a name that holds its source, the compiler and the processor, so it
is built once per machine. Without a compiler :func:`kernel` gives None after one notice, and the caller computes the
same with torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("plain_mlp.c")
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp-simd", "-fno-trapping-math", "-fno-math-errno")
TYPES = {torch.float32: ("-DREAL=float",), torch.float64: ("-DREAL=double", "-DDOUBLE")}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    found = {line for line in lines if line.startswith(("model name", "flags"))}
    return "\n".join(sorted(found)) or platform.processor()


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "descentlab"


def _build(compiler: str, dtype: torch.dtype) -> Path:
    """The library for ``dtype``, compiled unless it is there; several processes may do this at once."""
    arguments = [*FLAGS, *TYPES[dtype]]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    parts = (SOURCE.read_bytes(), " ".join(arguments).encode(), version, _processor().encode())
    target = _folder() / f"plain_mlp-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / "made.so"
            command = [compiler, *arguments, "-shared", "-fPIC", "-o", str(made), str(SOURCE), "-lm"]
            subprocess.run(command, capture_output=True, check=True, timeout=120)
            made.replace(target)
    return target


@functools.cache
def kernel(dtype: torch.dtype) -> Kernel | None:
    """The compiled step for ``dtype``; None (with a notice) where it cannot be built or loaded."""
    compiler = shutil.which(os.environ.get("CC") or "cc")
    try:
        if compiler is None:
            raise FileNotFoundError("no C compiler (cc, or the one named in CC)")
        return Kernel(_build(compiler, dtype))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None)
        reason = said.decode(errors="replace").strip() if said else str(error)
        warnings.warn(f"small networks train slower on this machine: {reason}", RuntimeWarning, stacklevel=2)
        return None


class Kernel:
    """The functions of one compiled library."""

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        self._step, self._scratch_vectors = loaded.step, loaded.scratch_vectors
        self._step.restype, self._scratch_vectors.restype = None, ctypes.c_int64
        self._scratch = torch.empty(0)

    def step(
        self,
        silu: bool,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        x: Tensor,
        y: Tensor,
        index: Tensor,
    ) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """Gradients of every layer's weight and bias, loss and accuracy ``[M]``.

        ``weights`` ``[M, out, in]`` and ``biases`` ``[M, out]`` in order; training set ``x`` ``[n, in]``, ``y`` ``[n]``
        int64; ``index`` ``[M, B]`` int64. All on the CPU, floating-point tensors of the library's dtype.
        """
        if int(index.min()) < 0 or int(index.max()) >= len(x):
            raise IndexError(f"sample indices must be in [0, {len(x)})")
        members, batch = index.shape
        weights, biases = [w.contiguous() for w in weights], [b.contiguous() for b in biases]
        x, y, index = x.contiguous(), y.contiguous(), index.contiguous()
        grad_w, grad_b = [torch.empty_like(w) for w in weights], [torch.empty_like(b) for b in biases]
        loss, accuracy = x.new_empty(members), x.new_empty(members)
        widths = (ctypes.c_int32 * (len(weights) + 1))(x.shape[1], *(w.shape[1] for w in weights))
        scratch = self._aligned(64 * self._scratch_vectors(batch, len(weights), widths))
        self._step(
            members,
            batch,
            len(weights),
            widths,
            int(silu),
            *(ctypes.c_void_p(t.data_ptr()) for t in (x, y, index)),
            *(_pointers(ts) for ts in (weights, biases, grad_w, grad_b)),
            *(ctypes.c_void_p(t.data_ptr()) for t in (loss, accuracy)),
            ctypes.c_void_p(scratch),
        )
        return grad_w, grad_b, loss, accuracy

    def _aligned(self, size: int) -> int:
        """Address of at least ``size`` bytes, a multiple of 64."""
        if self._scratch.numel() < size + 64:
            self._scratch = torch.empty(size + 64, dtype=torch.uint8)
        return -(-self._scratch.data_ptr() // 64) * 64


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
