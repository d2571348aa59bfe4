"""Optimizers of the ``pytorch_optimizer`` package (the ``zoo`` extra) by name."""

from __future__ import annotations

import importlib

import torch

from ..core.errors import UserError, nearest


def find(name: str) -> type[torch.optim.Optimizer]:
    """The class ``name`` of ``pytorch_optimizer``, whatever its case.

    Raises:
        UserError: without the package, and for a name it does not have (with the nearest one it has).
    """
    try:
        package = importlib.import_module("pytorch_optimizer")
    except ImportError as error:
        raise UserError("optimizer", f"zoo:{name}", f"the zoo extra: pip install 'descentlab[zoo]' ({error})") from None
    found = {
        key: value
        for key, value in vars(package).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    for key, cls in found.items():
        if key.lower() == name.lower():
            return cls
    raise UserError("optimizer", f"zoo:{name}", "a class of pytorch_optimizer", hint=nearest(name, found))
