"""Whether a plan can be carried out on a job and a machine: all problems at once, before anything starts.

What is checked of one fault follows from its row in ``kinds.KINDS``. Two faults are at odds if one victim would be in
both at a time and each claims the same thing for itself: its life, its processor, what it says in a collective.
Times in steps and in seconds cannot be compared; such pairs pass, and the later one is laid over the earlier.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from distrain.core.errors import Problem, nearest
from distrain.core.vocabulary import FaultKind

from .capabilities import CLOCK, HINTS, NETWORK, Capabilities, probe
from .kinds import KINDS, KindSpec, Lasting, Victim
from .plan import BETWEEN, IN_COLLECTIVE, Fault, FaultPlan, Target

ROLES = ("trainer", "keeper")
KEEPERS = (FaultKind.SIDECAR_KILL, FaultKind.COORDINATOR_KILL)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobShape:
    """What a plan must know of the job that it is for."""

    world_size: int
    num_nodes: int = 1
    steps: int | None = None
    """of training, if known"""
    has_checkpoints: bool = True
    """whether there are keepers, and checkpoints on storage"""
    has_network: bool = False
    """whether each node has a network of its own, in which links can be broken"""

    def node_of(self, rank: int) -> int:
        """The node of a rank, where every node has as many."""
        return rank * self.num_nodes // self.world_size

    def ranks_on(self, node: int | None) -> tuple[int, ...]:
        """The ranks of a node."""
        return tuple(rank for rank in range(self.world_size) if self.node_of(rank) == node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A fault as far as it could be read."""

    number: int
    """in the plan"""
    fault: Fault | None
    """None if its kind is unknown"""
    target: Target
    unread: frozenset[str] = frozenset()
    """fields that could not be read, and must not be blamed for having their defaults"""

    @property
    def name(self) -> str:
        """What problems call it."""
        return f"faults[{self.number}]" + (f", {self.fault.kind}," if self.fault else "")


def check(plan: FaultPlan, job: JobShape, *, capabilities: Capabilities | None = None) -> list[Problem]:
    """Everything that keeps ``plan`` from being carried out on ``job``; the machine is probed if need be.

    It is read as its file would be: what Python lets somebody write need not be a number.
    """
    from .reading import read_tables  # which checks what it has read

    problems: list[Problem] = []
    _, entries = read_tables(plan.to_json(), problems)
    return [*problems, *check_entries(entries, job, capabilities=capabilities)]


def check_entries(
    entries: Sequence[Entry], job: JobShape, *, capabilities: Capabilities | None
) -> list[Problem]:
    """``check`` for a plan of which some could not be read."""
    faults = [entry.fault for entry in entries if entry.fault]
    if capabilities is None:  # control groups are only tried where somebody wants one
        wanted = {need for fault in faults for need in KINDS[fault.kind].needs}
        capabilities = probe(builds=CLOCK in wanted) if wanted else Capabilities()
    problems: list[Problem] = []
    for entry in entries:
        problems += _existence(entry.name, entry.target, job)
        if entry.fault:
            problems += _one(entry, entry.fault, job, capabilities)
    whole = [(entry, entry.fault) for entry in entries if entry.fault and not entry.unread & {"target", "at"}]
    return [*problems, *_overlaps(whole, job)]


def _one(entry: Entry, fault: Fault, job: JobShape, capabilities: Capabilities) -> Iterator[Problem]:
    """What is wrong with one fault."""
    spec, name = KINDS[fault.kind], entry.name
    if spec.refused:
        ready = ", ".join(kind for kind, each in KINDS.items() if not each.refused)
        yield Problem(f"{name} cannot be injected yet", spec.refused, ready)
        return
    parts = {
        "target": (_target, _place),
        "at": (_time,),
        "duration_s": (_lasting,),
        "params": (_params,),
        "expect": (_expectation,),
    }
    for field, checks in parts.items():
        for part in checks if field not in entry.unread else ():
            yield from part(name, fault, spec, job)
    yield from _privileges(name, spec, capabilities)


def victims(fault: Fault, job: JobShape) -> tuple[int, ...]:
    """Whom a fault hits: ranks, or nodes where no rank is hit."""
    victim, target = KINDS[fault.kind].victim, fault.target
    if victim is Victim.RANK:
        return tuple(sorted({*target.ranks, *job.ranks_on(target.node)}))
    if victim is Victim.LINK:
        return (target.link[0] if target.link else 0,)
    return (target.node or 0,)


def ranks_hit(fault: Fault, job: JobShape) -> tuple[int, ...]:
    """The ranks that a fault hits, or those of the nodes that it hits."""
    victim, target = KINDS[fault.kind].victim, fault.target
    if victim is Victim.RANK:
        return victims(fault, job)
    nodes = target.link or (target.node or 0,) if victim is Victim.LINK else (target.node or 0,)
    return tuple(rank for node in sorted(nodes) for rank in job.ranks_on(node))


# -- one fault -----------------------------------------------------------------------------------------------


def _existence(name: str, target: Target, job: JobShape) -> Iterator[Problem]:
    ranks = [rank for rank in target.ranks if not 0 <= rank < job.world_size]
    if ranks:
        yield Problem(f"{name} hits ranks that there are not", str(ranks), f"0 to {job.world_size - 1}")
    if target.node is not None and not 0 <= target.node < job.num_nodes:
        yield Problem(
            f"{name} hits a node that there is not",
            f"node {target.node}",
            f"0 to {job.num_nodes - 1}",
            "" if job.num_nodes > 1 else "--emulate-nodes N",
        )
    if target.link is not None and not all(0 <= node < job.num_nodes for node in target.link):
        yield Problem(
            f"{name} hits a link that there is not",
            f"link = {list(target.link)}",
            f"nodes from 0 to {job.num_nodes - 1}",
            "" if job.num_nodes > 1 else "--emulate-nodes N --netns",
        )


def _target(name: str, fault: Fault, spec: KindSpec, job: JobShape) -> Iterator[Problem]:
    target = fault.target
    if spec.victim is Victim.LINK:
        yield from _link(name, target)
    elif target.link is not None:
        yield Problem(f"{name} hits no link", f"link = {list(target.link)}", "no link")
    if target.role and target.role not in ROLES:
        close = nearest(target.role, ROLES)
        yield Problem(f"{name} hits a process that there is not", target.role, ", ".join(ROLES), close)
    elif target.role and spec.victim is not Victim.WRITER:
        yield Problem(f"{name} has no choice of process", f"role = {target.role}", "no role")
    if spec.victim is Victim.RANK and not target.ranks and target.node is None:
        yield Problem(f"{name} hits nobody", "no ranks", "ranks, or a node", "target = { ranks = [0] }")
    if spec.victim in (Victim.NODE, Victim.JOB) and target.ranks:
        yield Problem(f"{name} hits no ranks", f"ranks = {list(target.ranks)}", "a node")
    if spec.victim is Victim.JOB and target.node:
        yield Problem(f"{name} hits what node 0 has", f"node {target.node}", "node 0, or no node")
    if spec.victim is Victim.WRITER and target.ranks and target.role != "trainer":
        yield Problem(
            f"{name} hits keepers, which have no ranks",
            f"ranks = {list(target.ranks)}",
            "a node, or role = trainer",
        )
    if NETWORK in spec.needs and not job.has_network:
        got = "the nodes share this machine's network"
        yield Problem(f"{name} has nothing to hit", got, hint="--emulate-nodes 2 --netns")
    if fault.kind is FaultKind.NODE_LOSS and job.num_nodes == 1:
        yield Problem(f"{name} would leave nobody", "1 node", "2 nodes or more", "--emulate-nodes 2")
    if (spec.victim is Victim.WRITER or fault.kind in KEEPERS) and not job.has_checkpoints:
        yield Problem(f"{name} has nothing to hit", "the job saves no checkpoints", hint="checkpoint.every")


def _link(name: str, target: Target) -> Iterator[Problem]:
    if target.link is None:
        yield Problem(f"{name} hits nobody", "no link", "two nodes", "target = { link = [0, 1] }")
    elif target.link[0] == target.link[1]:
        yield Problem(f"{name} hits no link", f"link = {list(target.link)}", "two nodes")
    if target.node is not None or target.ranks:
        yield Problem(f"{name} hits a link, no node or rank", "a node or ranks", "link = [0, 1] alone")


def _place(name: str, fault: Fault, spec: KindSpec, job: JobShape) -> Iterator[Problem]:
    target = fault.target
    if target.phase and target.phase not in spec.phases:
        allowed = ", ".join(spec.phases) or "no phase"
        yield Problem(
            f"{name} does not happen in this phase", target.phase, allowed, nearest(target.phase, spec.phases)
        )
    places = (BETWEEN, IN_COLLECTIVE) if spec.in_collective else (BETWEEN,)
    if target.where not in places:
        close = nearest(target.where, places)
        yield Problem(f"{name} does not happen there", target.where, ", ".join(places), close)
    if target.where == IN_COLLECTIVE and target.phase:
        yield Problem(f"{name} is in two places", f"where = {IN_COLLECTIVE}, phase = {target.phase}", "one")


def _time(name: str, fault: Fault, spec: KindSpec, job: JobShape) -> Iterator[Problem]:
    at = fault.at
    if at.step is not None and at.step < 1:
        yield Problem(f"{name} begins before the first step", f"step = {at.step}", "1 or more")
    if at.step is not None and job.steps is not None and at.step > job.steps:
        yield Problem(f"{name} begins after the last step", f"step = {at.step}", f"1 to {job.steps}")
    if at.op is not None and at.op < 1:
        yield Problem(f"{name} begins before the first operation", f"op = {at.op}", "1 or more")
    if at.after_s is not None and at.after_s < 0:
        yield Problem(f"{name} begins before the job", f"after_s = {at.after_s}", "0 or more")
    if not 0.0 <= fault.probability <= 1.0:
        yield Problem(f"{name} has no such probability", str(fault.probability), "0 to 1")


def _lasting(name: str, fault: Fault, spec: KindSpec, job: JobShape) -> Iterator[Problem]:
    duration_s = fault.duration_s
    if duration_s < 0:
        yield Problem(f"{name} lasts less than no time", f"duration_s = {duration_s}", "0 or more")
    elif duration_s and spec.lasting is Lasting.NOT:
        yield Problem(f"{name} is over at once", f"duration_s = {duration_s}", "no duration_s")
    elif not duration_s and spec.lasting is Lasting.MUST:
        yield Problem(f"{name} needs a duration", "none", "more than 0 seconds", "duration_s = 1.0")


def _params(name: str, fault: Fault, spec: KindSpec, job: JobShape) -> Iterator[Problem]:
    for key, value in fault.params.items():
        if key not in spec.params:
            allowed = ", ".join(spec.params) or "no parameters"
            yield Problem(f"{name} has no parameter {key}", repr(value), allowed, nearest(key, spec.params))
            continue
        param = spec.params[key]
        kind = type(param.default)
        is_number = kind is float and type(value) is int
        if (type(value) is not kind and not is_number) or not param.holds(value):
            close = nearest(str(value), param.allowed.split(", ")) if kind is str else ""
            yield Problem(f"{name} cannot have this {key}", repr(value), param.allowed, close)


def _expectation(name: str, fault: Fault, spec: KindSpec, job: JobShape) -> Iterator[Problem]:
    expect = fault.expect
    if strangers := [rank for rank in expect.suspects if not 0 <= rank < job.world_size]:
        yield Problem(
            f"{name} expects suspects that there are not", str(strangers), f"0 to {job.world_size - 1}"
        )
    if expect.within_s is not None and expect.within_s <= 0:
        yield Problem(f"{name} expects too much", f"within_s = {expect.within_s}", "more than 0")


def _privileges(name: str, spec: KindSpec, capabilities: Capabilities) -> Iterator[Problem]:
    for need in spec.needs:
        if missing := capabilities.lacks(need):
            yield Problem(f"{name} needs what this machine does not allow", missing, hint=HINTS[need])


# -- two faults ----------------------------------------------------------------------------------------------


def _overlaps(faults: Sequence[tuple[Entry, Fault]], job: JobShape) -> Iterator[Problem]:
    for (first, one), (second, other) in combinations(faults, 2):
        claim = KINDS[one.kind].exclusive
        if not claim or claim != KINDS[other.kind].exclusive or not _meet(one, other):
            continue
        if shared := sorted(set(_hit(one, job)) & set(_hit(other, job))):
            yield Problem(
                f"{first.name} and {second.name} claim the same {claim}",
                f"ranks {shared}, {_when(one)} and {_when(other)}",
                "one at a time",
            )


def _hit(fault: Fault, job: JobShape) -> tuple[int, ...]:
    """The ranks that feel it; of a job's one coordinator and the like, whoever asks for them."""
    return victims(fault, job) if KINDS[fault.kind].victim is Victim.JOB else ranks_hit(fault, job)


def _meet(one: Fault, other: Fault) -> bool:
    """Whether both are at work at some moment, as far as their times can be compared."""
    for begin_of in (_step, _second):
        begins = begin_of(one), begin_of(other)
        if None not in begins:
            early, late = sorted((one, other), key=lambda fault: begin_of(fault) or 0)
            gap = (begin_of(late) or 0) - (begin_of(early) or 0)
            if begin_of is _second:
                return gap <= 0 or _is_for_good(early) or gap < early.duration_s
            return (gap == 0 and one.at.op == other.at.op) or _is_for_good(early)
    return False


def _step(fault: Fault) -> float | None:
    return fault.at.step


def _second(fault: Fault) -> float | None:
    if fault.at.after_s is None and fault.at.step is None and fault.at.op is None:
        return 0.0
    return fault.at.after_s if fault.at.step is None else None


def _is_for_good(fault: Fault) -> bool:
    spec = KINDS[fault.kind]
    if "times" in spec.params:
        return fault.params.get("times") == 0
    return spec.lasting is Lasting.MAY and not fault.duration_s


def _when(fault: Fault) -> str:
    at = fault.at
    given = {"step": at.step, "op": at.op, "after_s": at.after_s}
    return ", ".join(f"{name} {value}" for name, value in given.items() if value is not None) or "at once"
