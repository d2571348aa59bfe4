"""Product grids."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import UserError

LIMIT = 10_000


def product(axes: Mapping[tuple[str, ...], Sequence[Any]], limit: int = LIMIT) -> list[dict[tuple[str, ...], Any]]:
    """Every combination of the axes' values, the first axis changing slowest; without axes one empty combination.

    Raises:
        UserError: when there are more than ``limit`` of them; none is made then.
    """
    count = math.prod(len(values) for values in axes.values())
    if count > limit:
        sizes = " x ".join(f"{len(values)} {'.'.join(path)}" for path, values in axes.items())
        raise UserError("grid", count, f"at most {limit} cells", hint=f"it is {sizes}")
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]
