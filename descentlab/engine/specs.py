"""Settings of what drives the steps of a study with workers."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat

from ..core.errors import UserError
from ..core.specs import Option, Registry, extent


class VirtualEngine(Option):
    """Workers on a virtual clock, in one process: exact staleness, the same at every repetition."""

    name: Literal["virtual"] = "virtual"


class ProcessEngine(Option):
    """A parameter server and one process per worker: staleness is whatever happens, and is measured and logged.

    Only the name can change a result, so nothing else enters the ids of runs.
    """

    name: Literal["process"] = "process"
    transport: Literal["local", "ray"] = extent(
        "local", description="local: processes of this machine; ray: actors of a Ray cluster (extra `ray`)"
    )
    timeout_s: PositiveFloat = extent(60.0, description="seconds after which a silent worker is given up and replaced")
    start_timeout_s: PositiveFloat = extent(120.0, description="seconds in which a new worker must be ready")
    restarts: NonNegativeInt = extent(10, description="workers replaced before the run ends; 0: none is replaced")
    memory: Literal["auto", "shared", "socket"] = extent(
        "auto", description="how weights and gradients travel; auto: shared memory from 64 KiB of weights on"
    )
    interface: str | None = extent(None, description="network interface the server listens on; null: this machine only")
    port: int = extent(0, ge=0, le=65535, description="port the server listens on; 0: any free one")


class _Engines(Registry):
    """Engines are not named as ``module:Class``."""

    def lookup(self, name: str) -> type[Option]:
        if ":" in name:
            raise UserError(self.room, name, f"one of {', '.join(self.names())}")
        return super().lookup(name)


ENGINES = _Engines("engine", VirtualEngine, ProcessEngine)
EngineChoice = ENGINES.field()
