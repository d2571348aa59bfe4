"""The shipped studies by name, found without importing any of the others."""

from __future__ import annotations

import importlib

from ..config.tree import StudyDef
from ..core.errors import UserError, nearest

SHIPPED = {
    "recovery": "descentlab.studies.recovery.spec:STUDY",
    "crossed": "descentlab.studies.crossed.spec:STUDY",
    "training": "descentlab.studies.training.spec:STUDY",
    "diffusion": "descentlab.studies.diffusion.spec:STUDY",
    "asynchrony": "descentlab.studies.asynchrony.spec:STUDY",
    "compression": "descentlab.studies.compression.spec:STUDY",
}


def names() -> list[str]:
    """The names of the shipped studies."""
    return list(SHIPPED)


def find(name: str) -> StudyDef:
    """The study of that name, or a third party's given as ``module:Name``.

    Raises:
        UserError: with the nearest shipped name, or with the reason why ``module:Name`` gives no study.
    """
    target = SHIPPED.get(name, name)
    if ":" not in target:
        expected = f"one of {', '.join(SHIPPED)}, a YAML file or module:Name"
        raise UserError("study", name, expected, hint=nearest(name, SHIPPED))
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise UserError("study", name, f"an importable module ({error})") from None
    except AttributeError:
        raise UserError("study", name, f"a name defined in module '{module}'") from None
    if not isinstance(found, StudyDef):
        raise UserError("study", name, f"a StudyDef, not a {type(found).__name__}")
    return found
