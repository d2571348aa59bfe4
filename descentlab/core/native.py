"""Builds one of the package's C files on first use with the machine's own C compiler.

A library is kept in the user's cache folder under a name that holds its source, the compiler and the processor, so it
is built once per machine. Without a compiler :func:`library` gives None after one notice, and the caller computes the
same with torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp-simd", "-fno-trapping-math", "-fno-math-errno")
TYPES = {torch.float32: ("-DREAL=float",), torch.float64: ("-DREAL=double", "-DDOUBLE")}


@functools.cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    found = {line for line in lines if line.startswith(("model name", "flags"))}
    return "\n".join(sorted(found)) or platform.processor()


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "descentlab"


@functools.cache
def _version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout


def _build(source: Path, compiler: str, dtype: torch.dtype) -> Path:
    """The library for ``dtype``, compiled unless it is there; several processes may do this at once."""
    arguments = [*FLAGS, *TYPES[dtype]]
    included = [source.with_name(name.decode()) for name in re.findall(rb'^#include "(.+)"', source.read_bytes(), re.M)]
    code = b"".join(path.read_bytes() for path in (source, *included))
    parts = (code, " ".join(arguments).encode(), _version(compiler), _processor().encode())
    target = _folder() / f"{source.stem}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / "made.so"
            command = [compiler, *arguments, "-shared", "-fPIC", "-o", str(made), str(source), "-lm"]
            subprocess.run(command, capture_output=True, check=True, timeout=120)
            made.replace(target)
    return target


_enabled = True


def enabled() -> bool:
    """Whether this process takes compiled code where it can: off where a study was begun without."""
    return _enabled


def enable(use: bool) -> None:
    """From now on :func:`compiled_code`, for a process that does nothing else."""
    global _enabled
    _enabled = use


@contextmanager
def compiled_code(use: bool) -> Iterator[None]:
    """Within: compiled code is used where it can be (True) or nowhere in this process (False), as before afterwards."""
    global _enabled
    before, _enabled = _enabled, use
    try:
        yield
    finally:
        _enabled = before


def library(source: Path, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The C file built for ``dtype`` (a key of :data:`TYPES`); None, with a notice, where that or loading it fails."""
    name = os.environ.get("CC") or "cc"
    try:
        compiler = shutil.which(name)
        if compiler is None:
            raise FileNotFoundError("no C compiler (cc, or the one named in CC)")
        return ctypes.CDLL(str(_build(source, compiler, dtype)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None)
        reason = said.decode(errors="replace").strip() if said else str(error)
        warnings.warn(f"small networks train slower on this machine: {reason}", RuntimeWarning, stacklevel=3)
        return None


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    """The addresses of contiguous tensors as an argument of a C function."""
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


class Rows:
    """Stacked tensors ``[M, …]`` as arguments of a C function that steps from member to member by ``strides``.

    ``tensors`` keeps what the addresses point to alive: the tensors themselves where every member's part is contiguous,
    copies else.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [t if _rowwise(t) else t.contiguous() for t in tensors]
        self.addresses = pointers(self.tensors)
        self.strides = (ctypes.c_int64 * len(self.tensors))(*(t.stride(0) for t in self.tensors))

    @functools.cached_property
    def sizes(self) -> ctypes.Array:
        """Elements of one member of each."""
        return (ctypes.c_int64 * len(self.tensors))(*(math.prod(t.shape[1:]) for t in self.tensors))


KEPT_ELEMENTS = 2**20  # tensors of more elements are not kept alive for the next call: finding them is nothing there


class Held:
    """The :class:`Rows` of tensors that are mostly the same objects from call to call."""

    def __init__(self) -> None:
        self._given: list[Tensor] = []
        self._rows: Rows | None = None

    def rows(self, tensors: Sequence[Tensor]) -> Rows:
        """As ``Rows(tensors)``; copies are never kept, their originals may have changed."""
        same = len(tensors) == len(self._given) and all(a is b for a, b in zip(tensors, self._given, strict=True))
        if self._rows is None or not same:
            made = Rows(tensors)
            copied = any(a is not b for a, b in zip(tensors, made.tensors, strict=True))
            if copied or sum(t.numel() for t in tensors) > KEPT_ELEMENTS:
                self._given, self._rows = [], None
                return made
            self._given, self._rows = list(tensors), made
        return self._rows


def _rowwise(t: Tensor) -> bool:
    return t.stride()[1:] == _packed(t.shape[1:])


@functools.cache
def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor of this shape."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
