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
from operator import is_
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


class Rows:
    """Stacked tensors ``[M, …]`` as arguments of a C function that steps from member to member by ``strides``.

    ``tensors`` keeps what the addresses point to alive: the tensors themselves where every member's part is contiguous,
    copies else.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [t if _rowwise(t) else t.contiguous() for t in tensors]
        self._at = [t.data_ptr() for t in self.tensors]
        self.addresses = (ctypes.c_void_p * len(self._at))(*self._at)
        self.strides = (ctypes.c_int64 * len(self.tensors))(*(t.stride(0) for t in self.tensors))

    def in_place(self) -> bool:
        """Whether the tensors are still where they were (``t.data = …`` moves one)."""
        return [t.data_ptr() for t in self.tensors] == self._at

    @functools.cached_property
    def sizes(self) -> ctypes.Array:
        """Elements of one member of each."""
        return (ctypes.c_int64 * len(self.tensors))(*(math.prod(t.shape[1:]) for t in self.tensors))


KEPT_LISTS = 7
KEPT_BYTES = 2**21  # larger tensors are not kept alive for the next call: finding them is nothing beside using them


class Held:
    """The :class:`Rows` of the last few lists of tensors: mostly the same objects come again."""

    def __init__(self) -> None:
        self._kept: list[tuple[list[Tensor], Rows]] = []

    def known(self, tensors: Sequence[Tensor]) -> Rows | None:
        """Those of the same tensors in the same places that were asked for before; None where there are none."""
        for i, (given, rows) in enumerate(self._kept):
            if len(given) == len(tensors) and all(map(is_, given, tensors)) and rows.in_place():
                if i > KEPT_LISTS // 2:  # before new ones push it out
                    self._kept.insert(0, self._kept.pop(i))
                return rows
        return None

    def rows(self, tensors: Sequence[Tensor]) -> Rows:
        """As ``Rows(tensors)``; copies are never kept, their originals may have changed."""
        if (known := self.known(tensors)) is not None:
            return known
        made = Rows(tensors)
        copied = any(a is not b for a, b in zip(tensors, made.tensors, strict=True))
        first = tensors[0] if tensors else None
        self._kept = [(g, r) for g, r in self._kept if g[0] is not first][:KEPT_LISTS]
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
        if tensors and not copied and sum(storages.values()) <= KEPT_BYTES:
            self._kept.insert(0, (list(tensors), made))
        return made


def _rowwise(t: Tensor) -> bool:
    return t.stride()[1:] == _packed(t.shape[1:])


@functools.cache
def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor of this shape."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
