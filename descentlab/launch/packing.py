"""Which runs train side by side. The rule reads settings only (docs/decisions/0007-many-settings-in-one-ensemble.md).

Cells that differ only in their fault form a *group*: a perturbed run and its twin share a prefix. On the ``vmap`` route
groups that differ only in numbers the update takes per member, and in the learning-rate schedule, form an *ensemble*;
elsewhere an ensemble is one group. Small ensembles that differ in their optimizer alone are :func:`merged`. Ensembles
are cut into blocks of whole (group, replicate) units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..config.identity import canonical
from ..config.tree import StudySpec
from ..core.opmode import MATRIX_OPS, OpRecord
from ..core.specs import Option
from ..engine.program import Route, RunPlan
from ..optim.specs import TorchOption

Update = Literal["slices", "vectorised", "rescaled"]
SLICES = 16  # up to this many distinct settings of a block are torch's own parameter groups, one slice each
SPLIT_FROM = 64  # members from which an ensemble makes two blocks, so that two processes share it
WORTH_A_PROCESS = 2**22  # multiplications of a forward pass; below, an update costs much the same without its members


def group_text(cell: StudySpec) -> str:
    """Cells that differ in their fault only may share a prefix, and so may those whose optimizer takes over from the
    same baseline after it: canonical text of everything else."""
    return canonical(_without(cell, "fault", *(("optimizer", "carry_state") if led(cell) else ())))


def settings_text(cell: StudySpec) -> str:
    """Cells that do the same but for their fault: canonical text."""
    return canonical(_without(cell, "fault"))


def led(cell: Any) -> bool:
    """Whether the cell's optimizer takes over from another one after the fault."""
    return getattr(cell, "protocol", "scratch") != "scratch"


def ensemble_text(cell: StudySpec, route: Route) -> str:
    """What the cells of one ensemble have in common."""
    if route != "vmap" or led(cell):  # members run one after the other, or many optimizers share a block already
        return group_text(cell)
    return canonical({**_without(cell, "fault", "schedule"), "optimizer": _form(cell.optimizer)})


def _without(cell: StudySpec, *keys: str) -> dict[str, Any]:
    extents = [k for k, f in type(cell).model_fields.items() if _is_extent(f)]
    return {k: v for k, v in cell.model_dump(mode="json").items() if k not in (*keys, *extents)}


def _is_extent(f: Any) -> bool:
    extra = f.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("extent"))


def _form(optimizer: Option) -> dict[str, Any]:
    """An optimizer without what may differ between members: of a shipped rule every number, of which only remains
    whether it is zero (that switches a part of the rule, and its slot, off); of a third party's the learning rate."""
    settings = optimizer.model_dump(mode="json")
    if isinstance(optimizer, TorchOption):
        return {key: _blank(value) for key, value in settings.items()}
    return {key: value for key, value in settings.items() if key != "lr"}


def _blank(value: Any) -> Any:
    if isinstance(value, list):
        return [_blank(v) for v in value]
    return value if isinstance(value, str | bool) or value is None else {"number": value != 0}


def variant_of(cell: StudySpec, key: str = "optimizer") -> dict[str, Any]:
    """The settings that members of one ensemble may have for themselves, the learning rate apart; ``key``: where the
    cell has the optimizer (its baseline's are those of a prefix)."""
    optimizer = getattr(cell, key).model_dump(mode="json")
    return {
        "optimizer": {k: v for k, v in optimizer.items() if k != "lr"},
        "schedule": cell.schedule.model_dump(mode="json"),
    }


def choose_update(runs: Sequence[RunPlan], optimizer: Option) -> Update:
    """The stated rule: at most 16 settings (rates included) are torch's parameter groups; more are the vectorised form
    of a shipped rule, or rescaled displacements of a third party's, whose rates alone can differ. Optimizers that take
    over from another are always torch's parameter groups."""
    if any(run.prefix for run in runs) or len({(run.variant, run.lr) for run in runs}) <= SLICES:
        return "slices"
    return "vectorised" if isinstance(optimizer, TorchOption) else "rescaled"


@dataclass
class Ensemble:
    """Groups that train side by side, as they are found. ``cells``: run id -> its cell."""

    route: Route
    engine: str
    share_prefix: bool
    most: int  # members of a block
    alone: bool = False  # whether a member's numbers do not depend on its neighbours to the bit
    memory: dict[str, int] | None = None  # how an accelerator's memory decided that
    inferred: dict[str, Any] = field(default_factory=dict)  # sizes that settings leave to the data
    split_from: int = SPLIT_FROM
    cells: dict[str, StudySpec] = field(default_factory=dict)
    stages: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # run id -> what is done to it
    faulted: StudySpec | None = None  # a cell with a fault, for what blocks build from it
    units: list[list[RunPlan]] = field(default_factory=list)  # the runs of one group and replicate

    def add(
        self, plans: Sequence[RunPlan], cells: Mapping[str, StudySpec], stages: Mapping[str, list[dict[str, Any]]]
    ) -> None:
        """One group: its runs still to be packed, the cell of each, and what is done to it."""
        by_replicate: dict[int, list[RunPlan]] = {}
        for plan in plans:
            by_replicate.setdefault(plan.replicate, []).append(plan)
        self.units += by_replicate.values()
        self.cells.update(cells)
        self.stages.update(stages)

    def rivals(self) -> str | None:
        """What ensembles have in common that may train side by side though their optimizers are of several classes;
        None where this one trains by itself.

        It does where its numbers would depend on its neighbours in the last bits, and where something looks at all
        slots of the state, those of its neighbours' optimizers among them.
        """
        cells = {id(cell): cell for cell in self.cells.values()}.values()
        if not self.alone or self.memory or any(led(cell) or not _remembers(cell.optimizer) for cell in cells):
            return None
        if any(_slots_looked_at(cell) for cell in cells):
            return None
        shared = canonical(_without(next(iter(cells)), "fault", "schedule", "optimizer"))
        return canonical([shared, self.engine, self.share_prefix, self.most])

    def settings_count(self) -> int:
        """Distinct settings of its cells, rates included."""
        cells = {id(cell): cell for cell in self.cells.values()}.values()
        return len({canonical([variant_of(cell), cell.optimizer.lr]) for cell in cells})

    def absorb(self, other: Ensemble) -> None:
        """Train the groups of ``other`` too."""
        self.cells.update(other.cells)
        self.stages.update(other.stages)
        self.units += other.units
        self.faulted = self.faulted or other.faulted

    def blocks(self) -> list[list[RunPlan]]:
        """The runs of each block, members of equal settings side by side, with their variant and group in it."""
        cells = {id(cell): cell for cell in self.cells.values()}
        texts = {i: canonical(variant_of(cell)) for i, cell in cells.items()}
        text = {run: texts[id(cell)] for run, cell in self.cells.items()}
        rank = {t: i for i, t in enumerate(dict.fromkeys(text[u[0].id] for u in self.units))}
        units = sorted(self.units, key=lambda unit: (rank[text[unit[0].id]], unit[0].lr))
        return [self._numbered(block, text) for block in pack(units, self.most, self.split_from)]

    def _numbered(self, runs: Sequence[RunPlan], text: Mapping[str, str]) -> list[RunPlan]:
        if any(run.prefix for run in runs):  # after the prefix, members of equal settings side by side
            rank = {t: i for i, t in enumerate(dict.fromkeys(text[run.id] for run in runs))}
            runs = sorted(runs, key=lambda run: (rank[text[run.id]], run.lr))
        variants = {t: i for i, t in enumerate(dict.fromkeys(text[run.id] for run in runs))}
        cells = {id(cell): cell for cell in (self.cells[run.id] for run in runs)}
        identity = {i: canonical(cell.identity()) for i, cell in cells.items()}
        names = [(identity[id(self.cells[run.id])], run.perturbed) for run in runs]
        groups = {name: i for i, name in enumerate(dict.fromkeys(names))}
        numbered = [
            replace(run, variant=variants[text[run.id]], group=groups[name])
            for run, name in zip(runs, names, strict=True)
        ]
        return [
            run if run.prefix is None else replace(run, prefix=replace(run.prefix, variant=len(variants)))
            for run in numbered
        ]

    def variants(self, runs: Sequence[RunPlan]) -> list[dict[str, Any]]:
        """The settings behind the variant numbers of a block's runs."""
        first = {run.variant: run.id for run in reversed(runs)}
        own = [variant_of(self.cells[first[v]]) for v in sorted(first)]
        return [*own, variant_of(self.cells[runs[0].id], "baseline")] if runs[0].prefix else own

    def settings(self, runs: Sequence[RunPlan]) -> dict[str, Any]:
        """What a block's parts are built from: a cell with a fault where there is one, the block's first optimizer."""
        own = self.cells[runs[0].id].model_dump(mode="json")
        if self.faulted is None:
            return own
        return {**self.faulted.model_dump(mode="json"), "optimizer": own["optimizer"], "schedule": own["schedule"]}


def _remembers(optimizer: Any) -> bool:
    """Whether a shipped optimizer keeps slots; a third party's is asked nothing and counts as one that does not."""
    return isinstance(optimizer, TorchOption) and not (optimizer.name == "sgd" and optimizer.momentum == 0)  # type: ignore[attr-defined]


def _slots_looked_at(cell: Any) -> bool:
    """Whether an arm, an event or a third party's observable looks at whatever slots there are."""
    arm, fault = getattr(cell, "arm", None), getattr(cell, "fault", None)
    return bool(cell.observe.extra) or getattr(arm, "name", "none") != "none" or getattr(fault, "target", "") == "slot"


def merged(ensembles: Iterable[Ensemble]) -> list[Ensemble]:
    """Ensembles that differ in their shipped optimizers alone as one, while it has at most :data:`SLICES` settings: of
    so many each is a slice of its own, whatever its class."""
    found: list[Ensemble] = []
    open_ones: dict[str, Ensemble] = {}
    for ensemble in ensembles:
        text, count = ensemble.rivals(), ensemble.settings_count()
        host = open_ones.get(text) if text is not None else None
        if host is not None and host.settings_count() + count <= SLICES:
            host.absorb(ensemble)
            continue
        found.append(ensemble)
        if text is not None:
            open_ones[text] = ensemble
    return found


def split_from(operations: Sequence[OpRecord], alone: bool) -> int:
    """Members from which an ensemble makes two blocks: more than :data:`SPLIT_FROM` for small networks in compiled
    code, whose updates would cost each of two processes almost what they cost one."""
    each = sum(math.prod(r.out) * math.prod(r.b[1:]) for r in operations if r.kind in MATRIX_OPS)
    return max(SPLIT_FROM, WORTH_A_PROCESS // max(each, 1)) if alone else SPLIT_FROM


def pack(units: Sequence[list[RunPlan]], most: int, split: int = SPLIT_FROM) -> list[list[RunPlan]]:
    """Units in their order as evenly filled blocks of at most ``most`` runs (a larger unit is a block of its own); two
    at least from ``split`` runs on. A unit joins the last block while at least half of it lies within an even share."""
    total = sum(len(unit) for unit in units)
    count = max(math.ceil(total / most), 2 if total >= split else 1)
    target = min(most, math.ceil(total / count))
    packed: list[list[RunPlan]] = []
    for unit in units:
        held = len(packed[-1]) if packed else 0
        whole = held + len(unit)
        if packed and held + len(unit) / 2 <= target and whole <= most and (whole < total or count == 1):
            packed[-1] += unit
        else:
            packed.append(list(unit))
    return packed
