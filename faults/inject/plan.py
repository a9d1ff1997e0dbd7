"""What is to be broken, where and when: a plan is data, so that a drill can be read, kept, repeated and scored.

As a file (TOML or JSON)::

    seed = 7
    [[faults]]
    kind = "proc.sigstop"
    target = { ranks = [1], where = "in_collective" }
    at = { step = 3 }
    duration_s = 2.0
    expect = { incident = "frozen", suspects = [1], within_s = 5.0 }

and the same in Python::

    FaultPlan(seed=7).inject("proc.sigstop", ranks=[1], where="in_collective").at(step=3).lasting(2.0).expect(
        "frozen", suspects=[1], within_s=5.0
    )

Chance is drawn from the seed, the number of the fault and its victim alone, so that it is known before the run which
faults will fire, and a drill can fail if one did not.
"""

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from distrain.core.errors import ConfigError, nearest
from distrain.core.vocabulary import FaultKind, IncidentClass

if TYPE_CHECKING:
    from .capabilities import Capabilities
    from .checks import JobShape

VERSION = 1
BETWEEN, IN_COLLECTIVE = "between", "in_collective"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Whom a fault hits. Which of the fields a kind needs stands in ``kinds.KINDS``."""

    ranks: tuple[int, ...] = ()
    """global ranks"""
    node: int | None = None
    """rank of a node: all of its ranks, its sidecar, or the node itself, as the kind says"""
    link: tuple[int, int] | None = None
    """from one node's rank to another's"""
    role: str = ""
    """which process: trainer or keeper"""
    where: str = BETWEEN
    """between collectives, or in_collective: when the rank has entered one and has not left it"""
    phase: str = ""
    """which part of a step: start, data or gradients; empty is the kind's own"""


@dataclass(frozen=True, slots=True, kw_only=True)
class At:
    """When a fault begins: at the first moment at which all that is given holds; at once if nothing is."""

    step: int | None = None
    """in this training step or a later one, from 1; for storage, in a checkpoint of such a step"""
    after_s: float | None = None
    """seconds after the process was armed"""
    op: int | None = None
    """the n-th operation that the kind looks at, from 1; with ``step``, counted from its beginning"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expect:
    """What a detector should say, for the score."""

    incident: IncidentClass | None = None
    suspects: tuple[int, ...] = ()
    """global ranks"""
    within_s: float | None = None
    """longest time to detect"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong."""

    kind: FaultKind
    target: Target = Target()
    at: At = At()
    duration_s: float = 0.0
    """0: as long as the process lives, where a kind lasts"""
    probability: float = 1.0
    """that it happens to a victim at all"""
    params: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    expect: Expect = Expect()

    def to_json(self) -> dict[str, Any]:
        """Plain tables, without what has its default."""
        found: dict[str, Any] = {"kind": str(self.kind)}
        for name, value in (("target", self.target), ("at", self.at), ("expect", self.expect)):
            if table := _given(value):
                found[name] = table
        found |= {"params": dict(self.params)} if self.params else {}
        found |= {"duration_s": self.duration_s} if self.duration_s else {}
        found |= {"probability": self.probability} if self.probability != 1.0 else {}
        return found


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Faults in the order of the file; each is known by its number, from 0."""

    faults: tuple[Fault, ...] = ()
    seed: int = field(default=0, kw_only=True)

    def inject(
        self,
        kind: FaultKind | str,
        *,
        ranks: Iterable[int] = (),
        node: int | None = None,
        link: tuple[int, int] | None = None,
        role: str = "",
        where: str = BETWEEN,
        phase: str = "",
        **params: Any,
    ) -> "FaultPlan":
        """This plan and one more fault, to which the calls that follow apply.

        Raises:
            ConfigError: there is no such kind.
        """
        target = Target(ranks=tuple(ranks), node=node, link=link, role=role, where=where, phase=phase)
        fault = Fault(kind=kind_of(kind), target=target, params=MappingProxyType(params))
        return replace(self, faults=(*self.faults, fault))

    def kill(self, *, ranks: Iterable[int] = (), node: int | None = None, role: str = "") -> "FaultPlan":
        """Kill ranks, a whole node, or the keeper, coordinator or store of a job."""
        if role:
            roles = {
                "keeper": FaultKind.SIDECAR_KILL,
                "coordinator": FaultKind.COORDINATOR_KILL,
                "store": FaultKind.STORE_KILL,
            }
            if role not in roles:
                raise ConfigError("there is no such process", got=repr(role), allowed=", ".join(roles))
            return self.inject(roles[role], node=node)
        if node is not None:
            return self.inject(FaultKind.NODE_LOSS, node=node)
        return self.inject(FaultKind.PROC_KILL, ranks=ranks)

    def at(
        self, *, step: int | None = None, after_s: float | None = None, op: int | None = None
    ) -> "FaultPlan":
        """When the last fault begins."""
        return self._last(at=At(step=step, after_s=after_s, op=op))

    def lasting(self, duration_s: float) -> "FaultPlan":
        """How long the last fault lasts."""
        return self._last(duration_s=duration_s)

    def with_probability(self, probability: float) -> "FaultPlan":
        """How likely the last fault happens, for each victim."""
        return self._last(probability=probability)

    def expect(
        self,
        incident: IncidentClass | str,
        *,
        suspects: Iterable[int] = (),
        within_s: float | None = None,
    ) -> "FaultPlan":
        """What a detector should say of the last fault; raises ConfigError for an unknown class."""
        if incident not in list(IncidentClass):
            close = nearest(str(incident), list(IncidentClass))
            raise ConfigError(
                "there is no such incident", got=repr(incident), allowed=", ".join(IncidentClass), hint=close
            )
        expected = Expect(incident=IncidentClass(incident), suspects=tuple(suspects), within_s=within_s)
        return self._last(expect=expected)

    def is_drawn(self, number: int, victim: int) -> bool:
        """Whether fault ``number`` happens to ``victim``: a rank or, for what no rank is hit by, a node."""
        return self.chance(number, victim).random() < self.faults[number].probability

    def chance(self, number: int, victim: int) -> random.Random:
        """The dice of one fault and victim, the same in every run."""
        return random.Random(f"{self.seed}/{number}/{victim}")

    def to_json(self) -> dict[str, Any]:
        """Plain tables, as files have them."""
        return {
            "version": VERSION,
            "seed": self.seed,
            "faults": [fault.to_json() for fault in self.faults],
        }

    @classmethod
    def from_json(cls, tables: Any) -> "FaultPlan":
        """The plan of ``tables``; raises ConfigError that lists all problems."""
        from .reading import parse

        return parse(tables)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        job: "JobShape | None" = None,
        capabilities: "Capabilities | None" = None,
    ) -> "FaultPlan":
        """Read a .toml or .json file; with ``job``, check at once whether the plan can be carried out.

        Raises:
            ConfigError: lists all problems, of the file and of ``checks.check``.
        """
        from .reading import load

        return load(Path(path), job=job, capabilities=capabilities)

    def _last(self, **changes: Any) -> "FaultPlan":
        if not self.faults:
            raise ConfigError("the plan has no fault yet", hint="FaultPlan().inject(...) first")
        return replace(self, faults=(*self.faults[:-1], replace(self.faults[-1], **changes)))


def kind_of(word: FaultKind | str) -> FaultKind:
    """The kind of this name; raises ConfigError with the nearest one."""
    if word not in list(FaultKind):
        close = nearest(str(word), list(FaultKind))
        raise ConfigError(
            "there is no such kind of fault", got=repr(word), allowed=", ".join(FaultKind), hint=close
        )
    return FaultKind(word)


def _given(value: Target | At | Expect) -> dict[str, Any]:
    """The fields that differ from their defaults, as JSON has them."""
    default = type(value)()
    found = {name: getattr(value, name) for name in type(value).__slots__}
    return {
        name: list(item) if isinstance(item, tuple) else item
        for name, item in found.items()
        if item != getattr(default, name)
    }
