"""A laboratory for one question: what does an optimizer do when training is not ideal?

The flat public namespace. Importing it imports no torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comm.powersgd_hook import PowerSGDHook as PowerSGDHook
    from .launch.generator import train as train
    from .launch.landscape import landscape_of as landscape
    from .observe.along import CurvatureLog as CurvatureLog
    from .observe.along import flat_directions as flat_directions
    from .observe.corruption import corruption as corruption
    from .observe.curvature import hessian as hessian
    from .observe.curvature import top_k as top_k
    from .observe.noise import gradient_covariance as gradient_covariance
    from .observe.spectrum import spectral_density as spectral_density
    from .observe.spectrum import trace as trace
    from .perturb.inject import inject as inject
    from .report.landscape import write as draw
    from .store.results import Results
    from .store.results import load as load

__version__ = "0.1.0"

_HOME = {  # public name -> module, imported on first use; module:name where they differ
    "CurvatureLog": "observe.along",
    "PowerSGDHook": "comm.powersgd_hook",
    "corruption": "observe.corruption",
    "draw": "report.landscape:write",
    "flat_directions": "observe.along",
    "gradient_covariance": "observe.noise",
    "hessian": "observe.curvature",
    "inject": "perturb.inject",
    "landscape": "launch.landscape:landscape_of",
    "load": "store.results",
    "spectral_density": "observe.spectrum",
    "top_k": "observe.curvature",
    "train": "launch.generator",
    "trace": "observe.spectrum",
}
__all__ = [
    "CurvatureLog",
    "PowerSGDHook",
    "__version__",
    "corruption",
    "draw",
    "flat_directions",
    "gradient_covariance",
    "hessian",
    "inject",
    "landscape",
    "load",
    "run",
    "spectral_density",
    "top_k",
    "trace",
    "train",
]


def run(
    study: str | Path, *settings: str, out: str | Path | None = None, launcher: str = "pool", overwrite: bool = False
) -> Results:
    """Run a study, or what is missing of it, and return its results: ``run("recovery", "optimizer=adam,sgd")``.

    ``study`` is a shipped name or a YAML file, ``settings`` are written as on the command line, ``out`` defaults to
    ``out/STUDY``. Runs that failed are in ``Results.status``. Raises :class:`~descentlab.core.errors.UserError` for a
    mistake in the settings, before anything runs.
    """
    from .config.resolve import resolve
    from .launch import api
    from .store.results import load

    resolved = resolve(study, settings, limit=None)
    name = Path(study).stem if Path(study).is_file() else resolved.study.name
    target = Path("out") / name if out is None else Path(out)
    api.run(resolved, target, yes=True, launcher=launcher, overwrite=overwrite)
    return load(target)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(importlib.import_module(f".{module}", __name__), attribute or name)


def __dir__() -> list[str]:
    return __all__
