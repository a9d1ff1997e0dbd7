"""What each kind of fault needs: the engine that does it, whom it can hit, its parameters, how long it lasts.

One table, read by ``checks`` before a run and by the engines during it. A kind whose target does not exist yet stands
in it too, with the reason for which it is refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from distrain.core.vocabulary import FaultKind


class Engine(StrEnum):
    """Who carries a fault out; ``engines.ENGINES`` says where its code is."""

    PROCESS = "process"
    """in the trainer: what becomes of the process itself"""
    NUMERICS = "numerics"
    """in the trainer: its gradients"""
    DATA = "data"
    """in the trainer: its input"""
    COLLECTIVES = "collectives"
    """in the trainer: what it says to the others"""
    STORAGE = "storage"
    """in whatever process reads or writes checkpoints"""
    CLOCK = "clock"
    """in the trainer: what it is told of the time of day"""
    OUTSIDE = "outside"
    """the injector, a process that is none of the victims"""
    NONE = "none"
    """nobody yet"""


class Victim(StrEnum):
    """What a kind hits."""

    RANK = "rank"
    WRITER = "writer"
    """a process that reads or writes checkpoints: a node's keeper, or a rank's trainer"""
    NODE = "node"
    """something that there is once a node"""
    JOB = "job"
    LINK = "link"


class Lasting(StrEnum):
    """What ``duration_s`` means."""

    NOT = "not"
    """the fault is over at once: no duration"""
    MAY = "may"
    """until the duration is over; 0 is for good"""
    MUST = "must"
    """a duration is needed"""


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter: its default also gives its type."""

    default: Any
    allowed: str
    holds: Callable[[Any], bool] = lambda value: True


@dataclass(frozen=True, slots=True, kw_only=True)
class KindSpec:
    """One kind."""

    engine: Engine
    victim: Victim
    params: Mapping[str, Param] = field(default_factory=lambda: MappingProxyType({}))
    lasting: Lasting = Lasting.NOT
    phases: tuple[str, ...] = ()
    """phases of a step at which it can happen, its own first; empty where it does not happen in steps"""
    in_collective: bool = False
    """whether it can happen inside a collective"""
    exclusive: str = ""
    """kinds of the same word cannot be at work on one victim at the same time"""
    needs: tuple[str, ...] = ()
    """capabilities of the machine (``capabilities``)"""
    refused: str = ""
    """why it cannot be injected yet"""

    def param(self, params: Mapping[str, Any], name: str) -> Any:
        """The value of a parameter, or its default."""
        return params.get(name, self.params[name].default)


PHASES: Mapping[str, str] = MappingProxyType(
    {"start": "train.step", "data": "train.data", "gradients": "train.gradients"}
)
"""Phases of a step, and the failpoints that trainers pass in them (see ``engines.process``)."""

OPERATIONS: Mapping[str, str] = MappingProxyType(
    {
        "pwrite": "checkpoint.pwrite",
        "fsync": "checkpoint.fsync",
        "write": "checkpoint.write",
        "rename": "checkpoint.rename",
        "read": "checkpoint.pread",
    }
)
"""What storage is asked to do, and the failpoints passed before it: extents, their fsync, small files, names."""

COLLECTIVES = (
    "any",
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "barrier",
    "send",
    "recv",
)
"""Names by which faults choose collectives; those of ``core.protocols.CollectiveCall``."""

_ANY_PHASE = ("start", "data", "gradients")


def _choice(*words: str) -> Param:
    return Param(words[0], ", ".join(words), lambda value: value in words)


def _at_least(default: float, least: float) -> Param:
    return Param(default, f"{least} or more", lambda value: value >= least)


def _between(default: float, least: float, most: float) -> Param:
    return Param(default, f"{least} to {most}", lambda value: least <= value <= most)


_TIMES = _at_least(1, 0)  # 0: every one while the fault lasts
_ANY = -1  # one that the seed chooses


def _params(**params: Param) -> Mapping[str, Param]:
    return MappingProxyType(params)


def _process(engine: Engine, *, params: Mapping[str, Param] = MappingProxyType({}), **more: Any) -> KindSpec:
    """A kind that hits the process of a rank at any point of a step."""
    return KindSpec(
        engine=engine, victim=Victim.RANK, params=params, phases=_ANY_PHASE, in_collective=True, **more
    )


def _gradient(**params: Param) -> KindSpec:
    return KindSpec(
        engine=Engine.NUMERICS,
        victim=Victim.RANK,
        params=_params(tensor=_at_least(_ANY, _ANY), times=_TIMES, **params),
        phases=("gradients",),
    )


def _collective(**params: Param) -> KindSpec:
    return KindSpec(
        engine=Engine.COLLECTIVES,
        victim=Victim.RANK,
        params=_params(collective=_choice(*COLLECTIVES), times=_TIMES, **params),
        in_collective=True,
        exclusive="collective",
    )


def _storage(lasting: Lasting = Lasting.MAY, **params: Param) -> KindSpec:
    return KindSpec(
        engine=Engine.STORAGE, victim=Victim.WRITER, lasting=lasting, params=_params(times=_TIMES, **params)
    )


def _refused(victim: Victim, reason: str) -> KindSpec:
    return KindSpec(engine=Engine.NONE, victim=victim, refused=reason)


def _network(victim: Victim, **params: Param) -> KindSpec:
    """A kind that hits packets between emulated nodes, at the first rank of the node that its target names first."""
    ways = _params(one_way=Param(False, "true or false")) if victim is Victim.LINK else {}
    return KindSpec(
        engine=Engine.OUTSIDE,
        victim=victim,
        phases=("start",),
        lasting=Lasting.MAY,
        needs=("network",),
        params=_params(**params, **ways),
    )


KINDS: Mapping[FaultKind, KindSpec] = MappingProxyType(
    {
        FaultKind.PROC_KILL: _process(Engine.OUTSIDE, exclusive="life"),
        FaultKind.PROC_STOP: _process(Engine.OUTSIDE, lasting=Lasting.MAY, exclusive="processor"),
        FaultKind.PROC_CPU_THROTTLE: _process(
            Engine.OUTSIDE,
            lasting=Lasting.MAY,
            exclusive="processor",
            params=_params(quota=_between(0.1, 0.01, 0.95)),  # of one core
        ),
        FaultKind.CGROUP_FREEZE: _process(
            Engine.OUTSIDE, lasting=Lasting.MAY, exclusive="processor", needs=("freezer",)
        ),
        FaultKind.PROC_OOM: _process(
            Engine.OUTSIDE,
            exclusive="life",
            needs=("memory",),
            params=_params(headroom_mib=_between(64, 16, 4096)),
        ),
        FaultKind.PROC_EXIT: _process(
            Engine.PROCESS, exclusive="life", params=_params(code=_between(1, 0, 255))
        ),
        FaultKind.PROC_EXCEPTION: _process(
            Engine.PROCESS, exclusive="life", params=_params(message=Param("injected fault", "a text"))
        ),
        FaultKind.PROC_GIL_HOG: _process(Engine.PROCESS, lasting=Lasting.MUST),
        FaultKind.NUMERIC_BITFLIP: _gradient(bit=_between(_ANY, _ANY, 63), element=_at_least(_ANY, _ANY)),
        FaultKind.NUMERIC_NAN: _gradient(element=_at_least(_ANY, _ANY)),
        FaultKind.NUMERIC_ZERO: _gradient(),
        FaultKind.DATA_STALL: KindSpec(
            engine=Engine.DATA, victim=Victim.RANK, phases=("data",), lasting=Lasting.MUST
        ),
        FaultKind.DATA_CORRUPT: KindSpec(
            engine=Engine.DATA, victim=Victim.RANK, phases=("data",), params=_params(times=_TIMES)
        ),
        FaultKind.COMM_SKIP: _collective(),
        FaultKind.COMM_DELAY: _collective(delay_s=_between(0.1, 0.0, 3600.0)),
        FaultKind.COMM_MISMATCH: _collective(),
        FaultKind.COMM_REORDER: _collective(hold_s=_between(0.5, 0.01, 60.0)),
        FaultKind.CKPT_SLOW: _storage(operation=_choice(*OPERATIONS), delay_s=_between(0.1, 0.0, 3600.0)),
        FaultKind.CKPT_ENOSPC: _storage(operation=_choice(*OPERATIONS)),
        FaultKind.CKPT_EIO: _storage(operation=_choice(*OPERATIONS)),
        FaultKind.CKPT_TORN: _storage(Lasting.NOT, crash=Param(True, "true or false")),
        FaultKind.CKPT_CORRUPT: _storage(Lasting.NOT),
        FaultKind.SIDECAR_KILL: KindSpec(engine=Engine.OUTSIDE, victim=Victim.NODE, phases=("start",)),
        FaultKind.STORE_KILL: KindSpec(engine=Engine.OUTSIDE, victim=Victim.JOB, phases=("start",)),
        FaultKind.NODE_LOSS: KindSpec(
            engine=Engine.OUTSIDE, victim=Victim.NODE, phases=("start",), exclusive="life"
        ),
        FaultKind.COORDINATOR_KILL: KindSpec(engine=Engine.OUTSIDE, victim=Victim.JOB, phases=("start",)),
        FaultKind.NET_DROP: _network(Victim.LINK),
        FaultKind.NET_LOSS: _network(Victim.LINK, loss=_between(0.1, 0.0, 1.0)),
        FaultKind.NET_RATE: _network(Victim.LINK, mbit_s=_between(100.0, 0.01, 1e6)),
        FaultKind.NET_DELAY: _network(
            Victim.LINK, delay_ms=_between(10.0, 0.0, 60e3), jitter_ms=_between(0.0, 0.0, 60e3)
        ),
        FaultKind.NET_PARTITION: _network(Victim.NODE),
        FaultKind.NET_FLAP: _network(
            Victim.LINK, period_s=_between(2.0, 0.1, 3600.0), down=_between(0.5, 0.01, 0.99)
        ),
        FaultKind.CLOCK_SKEW: _process(
            Engine.CLOCK,
            lasting=Lasting.MAY,
            exclusive="clock",
            needs=("clock",),
            params=_params(offset_s=_between(60.0, -3e8, 3e8)),  # ten years
        ),
        FaultKind.GPU_XID: _refused(Victim.RANK, "nobody reads Xid messages yet"),
    }
)
