"""Who carries faults out in an armed process: an engine a kind (``kinds.KINDS``), loaded when a plan has one.

An engine is a module with ``install(faults, here, points, stack)``: it hooks ``faults`` in where they happen, by
failpoints (``points``) or in its own way, and gives ``stack`` what undoes that. A new engine is a member of
``kinds.Engine`` and a line here.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from types import MappingProxyType

from ..kinds import Engine
from ..live import Here, Live
from ..points import Points

Install = Callable[[Sequence[Live], Here, Points, ExitStack], None]

ENGINES: Mapping[Engine, str] = MappingProxyType(
    {
        Engine.PROCESS: ".process",
        Engine.NUMERICS: ".numerics",
        Engine.DATA: ".data",
        Engine.COLLECTIVES: ".collectives",
        Engine.STORAGE: ".storage",
        Engine.CLOCK: ".clock",
        Engine.OUTSIDE: ".outside",
    }
)


def installer(engine: Engine) -> Install:
    """The function that hooks the faults of an engine in."""
    install: Install = import_module(ENGINES[engine], __name__).install
    return install
