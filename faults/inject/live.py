"""A fault inside the process that it will hit: whether its moment has come, and that it is known when it has."""

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from distrain.core.clock import Clock, MonotonicClock
from distrain.core.vocabulary import FaultKind

from .control import Control
from .kinds import KINDS, Victim
from .plan import Fault, FaultPlan
from .truth import FAILED, FIRED, TruthLog


@dataclass(slots=True, kw_only=True)
class Here:
    """This process, as faults see it."""

    role: str
    """trainer or keeper"""
    rank: int
    """-1 where no rank is meant"""
    local_rank: int
    node: int
    plan: FaultPlan
    truth: TruthLog
    folder: Path
    """of the ground truth, where the injector listens too"""
    clock: Clock = field(default_factory=MonotonicClock)
    control: Control | None = None
    """the way to the injector, if there is one"""
    step: int | None = None
    """the training step that has begun"""

    def victim(self, kind: FaultKind) -> int:
        """What this process is to a kind of fault: its rank, or its node."""
        spec = KINDS[kind]
        is_rank = spec.victim is Victim.RANK or (spec.victim is Victim.WRITER and self.role == "trainer")
        return self.rank if is_rank else self.node


class Live:
    """One armed fault. Any thread may ask it."""

    def __init__(self, number: int, fault: Fault, here: Here) -> None:
        self.number, self.fault, self.here = number, fault, here
        self.spec = KINDS[fault.kind]
        self.victim = here.victim(fault.kind)
        self._lock = threading.Lock()
        self._armed_ns = here.clock.monotonic_ns()
        self._began_ns: int | None = None
        self._num_ops = 0
        self._num_acts = 0

    @property
    def dice(self) -> Random:
        """Chance that is the same in every run."""
        return self.here.plan.chance(self.number, self.victim)

    def param(self, name: str) -> Any:
        """A parameter, or its default."""
        return self.spec.param(self.fault.params, name)

    def due(self, *, step: int | None = None) -> bool:
        """Whether the fault acts on the operation that is about to happen, in ``step``; it counts as acted then.

        The first time that it does is written down.
        """
        with self._lock:
            now_ns = self.here.clock.monotonic_ns()
            is_first = self._began_ns is None
            if is_first and not self._has_come(step, now_ns):
                return False
            if self._began_ns is not None and self._is_over(now_ns, self._began_ns):
                return False
            self._began_ns = now_ns if self._began_ns is None else self._began_ns
            self._num_acts += 1
        return True

    def missed(self) -> None:
        """It could not act on that operation after all, and waits for the next."""
        with self._lock:
            self._num_acts -= 1

    def fired(self, *, step: int | None = None, **detail: Any) -> None:
        """Write down that the fault happens now; only the first time counts."""
        if self._num_acts <= 1:
            self._write(FIRED, step, detail)

    def failed(self, reason: str) -> None:
        """Write down why it did not happen."""
        self._write(FAILED, self.here.step, {"reason": reason})

    def _write(self, event: str, step: int | None, detail: Mapping[str, Any]) -> None:
        self.here.truth.write(
            event,
            fault=self.number,
            kind=self.fault.kind,
            victim=self.victim,
            pid=os.getpid(),
            step=step if step is not None else self.here.step,
            detail=detail,
        )

    def _has_come(self, step: int | None, now_ns: int) -> bool:
        at = self.fault.at
        if at.step is not None and (step is None or step < at.step):
            return False
        if at.after_s is not None and now_ns - self._armed_ns < at.after_s * 1e9:
            return False
        self._num_ops += 1
        return at.op is None or self._num_ops >= at.op

    def _is_over(self, now_ns: int, began_ns: int) -> bool:
        duration_s = self.fault.duration_s
        if duration_s and now_ns - began_ns >= duration_s * 1e9:
            return True
        times = self.param("times") if "times" in self.spec.params else 1
        return bool(times) and self._num_acts >= times
