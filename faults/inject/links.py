"""What a fault of the network does to packets, and what becomes of each packet then. Pure: times are passed in.

The injector says it to whoever carries the packets between emulated nodes (``launch.switch``) in the form of an
``Impairment``; ``Links`` decides there about one packet after the other::

    packet ──► dropped?  cut, down just now, or chance ──► waits for the packets before it (rate) ──► travels (delay)

Packets of one direction never overtake each other. A queue that has grown longer than ``QUEUE_S`` drops what comes.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distrain.core.vocabulary import FaultKind

from .kinds import KINDS
from .plan import Fault

ANY = -1
"""any node"""
QUEUE_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Impairment:
    """What happens to packets that go one of some ways."""

    ways: tuple[tuple[int, int], ...]
    """from node to node"""
    loss: float = 0.0
    """probability that a packet is lost"""
    rate_bytes_s: float = 0.0
    """0: as fast as they come"""
    delay_s: float = 0.0
    jitter_s: float = 0.0
    """most that chance adds to the delay"""
    period_s: float = 0.0
    """more than 0: the other fields hold in the first ``share`` of each period only"""
    share: float = 1.0
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> "Impairment":
        """What ``to_json`` wrote; raises TypeError or ValueError for anything else."""
        return cls(**{**table, "ways": tuple((int(a), int(b)) for a, b in table["ways"])})

    def concerns(self, source: int, target: int) -> bool:
        """Whether packets from ``source`` to ``target`` are meant."""
        return any(a in (ANY, source) and b in (ANY, target) for a, b in self.ways)


def cut(node: int) -> Impairment:
    """A node that nobody reaches and that reaches nobody."""
    return Impairment(ways=((node, ANY), (ANY, node)), loss=1.0)


def impairment(fault: Fault, *, seed: int) -> Impairment:
    """What ``fault``, one of the ``net`` kinds, does."""
    spec = KINDS[fault.kind]
    if fault.kind is FaultKind.NET_PARTITION:
        return cut(fault.target.node or 0)
    a, b = fault.target.link or (0, 1)
    ways = ((a, b),) if spec.param(fault.params, "one_way") else ((a, b), (b, a))

    def param(name: str) -> float:
        return float(spec.param(fault.params, name))

    match fault.kind:
        case FaultKind.NET_LOSS:
            return Impairment(ways=ways, loss=param("loss"), seed=seed)
        case FaultKind.NET_RATE:
            return Impairment(ways=ways, rate_bytes_s=param("mbit_s") * 1e6 / 8)
        case FaultKind.NET_DELAY:
            delay_s, jitter_s = param("delay_ms") / 1e3, param("jitter_ms") / 1e3
            return Impairment(ways=ways, delay_s=delay_s, jitter_s=jitter_s, seed=seed)
        case FaultKind.NET_FLAP:
            return Impairment(ways=ways, loss=1.0, period_s=param("period_s"), share=param("down"))
        case _:
            return Impairment(ways=ways, loss=1.0)


class _Active:
    """An impairment at work."""

    def __init__(self, what: Impairment, *, now_ns: int) -> None:
        self.what = what
        self.dice = random.Random(what.seed)
        self._began_ns = now_ns
        self._free_ns: dict[tuple[int, int], int] = {}

    def holds(self, now_ns: int) -> bool:
        """Whether it does anything just now."""
        period_ns = self.what.period_s * 1e9
        return not period_ns or (now_ns - self._began_ns) % period_ns < self.what.share * period_ns

    def sent_ns(self, way: tuple[int, int], nbytes: int, *, now_ns: int) -> int | None:
        """When a packet has left, which has to wait for those before it; None if they are too many."""
        begins_ns = max(now_ns, self._free_ns.get(way, 0))
        if begins_ns - now_ns > QUEUE_S * 1e9:
            return None
        self._free_ns[way] = begins_ns + round(nbytes / self.what.rate_bytes_s * 1e9)
        return self._free_ns[way]


class Links:
    """All that is wrong between the nodes now."""

    def __init__(self) -> None:
        self._active: dict[str, _Active] = {}
        self._last_ns: dict[tuple[int, int], int] = {}

    def impair(self, name: str, what: Impairment, *, now_ns: int) -> None:
        """From now on, until ``lift``."""
        self._active[name] = _Active(what, now_ns=now_ns)

    def lift(self, name: str) -> None:
        """What has gone wrong under this name is over."""
        self._active.pop(name, None)

    def lift_all(self) -> None:
        """Everything is over."""
        self._active.clear()

    def arrives_ns(self, source: int, target: int, nbytes: int, *, now_ns: int) -> int | None:
        """When a packet arrives that is sent now; None if it is lost."""
        way = source, target
        due_ns = now_ns
        for active in self._at_work(source, target, now_ns):
            what = active.what
            if what.loss and active.dice.random() < what.loss:
                return None
            if what.rate_bytes_s:
                sent_ns = active.sent_ns(way, nbytes, now_ns=due_ns)
                if sent_ns is None:
                    return None
                due_ns = sent_ns
            if what.delay_s or what.jitter_s:
                due_ns += round((what.delay_s + what.jitter_s * active.dice.random()) * 1e9)
        if due_ns > now_ns or way in self._last_ns:
            due_ns = self._last_ns[way] = max(due_ns, self._last_ns.get(way, 0))
        return due_ns

    def _at_work(self, source: int, target: int, now_ns: int) -> Iterator[_Active]:
        for active in self._active.values():
            if active.what.concerns(source, target) and active.holds(now_ns):
                yield active
