"""Which plan each step follows: the same on all ranks, there before it is needed, and never waited for in vain.

Rank 0 decides. Its planner process is asked some steps ahead; when the share of a step is prepared, one step before
it is computed, rank 0 publishes in the job's store what it has got, and all others read that::

    planner process     plan s+2 | plan s+3 |
    rank 0              publish s+1 (prefetch)      compute s
    other ranks            read s+1 (prefetch)      compute s

A plan that is late, missing or wrong is replaced by the best one of a single degree, which rank 0 makes in place; all
ranks get to know why. It waits for a plan half as long as the step before took, so that the step after is not held
up. A planner process that dies is started again a few times.
"""

import itertools
import json
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from queue import PriorityQueue
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from distrain.core.errors import DistrainError
from distrain.planners.sequence.homogeneous import dealt, homogeneous
from distrain.planners.sequence.plan import Wanted
from distrain.planners.sequence.step_plan import StepPlan
from distrain.train.data.batches import GlobalBatch
from distrain.train.data.corpus import Split

from .planner_process import PlannerDied, PlannerProcess
from .settings import SequenceSettings

AHEAD = 3
"""steps whose plans are asked for before they are needed"""
FIRST_S = 20.0
"""patience with the first plan, for which a process has to start"""
MOST_STARTS = 4
"""of the planner process in one run"""


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan of a step."""

    plan: StepPlan
    note: str = ""
    """why it is not the planner's, if it is not"""

    def groups(self) -> str:
        """Sizes of the groups of each micro-batch: ``4+2x2 | 8x1`` is one of 4 and two of 2, then eight of 1."""
        return " | ".join(
            "+".join(
                f"{count}x{degree}" if count > 1 else f"{degree}"
                for degree, count in sorted(Counter(group.degree for group in groups).items(), reverse=True)
            )
            for groups in self.plan.microbatches
        )

    def predicted_ms(self, *, pp: int) -> float:
        """What the step is estimated to take; 0 without a cost model.

        A pipeline's stages each take 1 / pp of a micro-batch, and the longest passes through the others at the ends.
        """
        if pp == 1:
            return self.plan.estimated_ms
        longest = [
            max((group.estimated_ms for group in groups), default=0.0) for groups in self.plan.microbatches
        ]
        return (sum(longest) + (pp - 1) * max(longest, default=0.0)) / pp


class Plans(Protocol):
    """Where plans come from."""

    def expect(self, part: Split, batches: Sequence[GlobalBatch]) -> None:
        """Say which batches will need plans, the next one first."""

    def plan(self, part: Split, batch: GlobalBatch) -> Planned:
        """The plan of ``batch``; all ranks ask for the same batches, in any thread of their own."""
        ...

    def close(self) -> None:
        """Wait for nothing any more."""


class StaticPlans:
    """Groups of one size, as ``[parallel]`` says."""

    def __init__(self, settings: SequenceSettings, *, micro_batches: int) -> None:
        self._settings, self._micro_batches = settings, micro_batches

    def expect(self, part: Split, batches: Sequence[GlobalBatch]) -> None:
        """Nothing to do; see Plans."""

    def plan(self, part: Split, batch: GlobalBatch) -> Planned:
        """See Plans."""
        settings = self._settings
        return Planned(
            dealt(
                batch.lengths.tolist(),
                num_slots=settings.num_slots,
                degree=settings.degree,
                num_micro_batches=self._micro_batches,
            )
        )

    def close(self) -> None:
        """Nothing to do; see Plans."""


class PlansAhead:
    """Plans of the planner process, through the job's store."""

    def __init__(self, settings: SequenceSettings, *, device: torch.device, schedule: Wanted) -> None:
        """All ranks make one at the same time."""
        # Of this object alone: a store outlives runs that were broken off.
        number = torch.tensor(time.time_ns(), device=device)
        dist.broadcast(number, src=0)
        # A line of its own: calls that wait hold up no other thread's.
        store = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._store = dist.PrefixStore(f"sequence plans {number.item()}", store)
        self._settings = settings
        self._desk = _Desk(settings, schedule=schedule) if dist.get_rank() == 0 else None
        self._kept: dict[str, Planned] = {}  # of validation batches, which come again
        self._published: list[str] = []

    def expect(self, part: Split, batches: Sequence[GlobalBatch]) -> None:
        """See Plans."""
        if self._desk is not None:
            for batch in batches:
                self._desk.order(_key(part, batch), batch.lengths.tolist(), urgent=part == "train")

    def plan(self, part: Split, batch: GlobalBatch) -> Planned:
        """See Plans."""
        key = _key(part, batch)
        if key in self._kept:
            return self._kept[key]
        if self._desk is not None:
            planned = self._decide(key, batch.lengths.tolist(), is_paced=part == "train")
            self._publish(key, planned, forget=part == "train")
        else:
            note, text = json.loads(zlib.decompress(self._store.get(key)))
            planned = Planned(StepPlan.from_json(text), note)
        if part != "train":
            self._kept[key] = planned
        return planned

    def close(self) -> None:
        """End the planner process; plans are then of a single degree."""
        if self._desk is not None:
            self._desk.close()

    def _decide(self, key: str, lengths: list[int], *, is_paced: bool) -> Planned:
        """What the planner found, or the best plan of one degree."""
        assert self._desk is not None
        self._desk.order(key, lengths, urgent=True)
        found = self._desk.take(key, is_paced=is_paced)
        if isinstance(found, StepPlan):
            problems = found.check(lengths)
            if not problems:
                return Planned(found)
            found = problems[0].error
        plan = homogeneous(lengths, num_slots=self._settings.num_slots, cost=self._settings.cost_model)
        return Planned(plan, found)

    def _publish(self, key: str, planned: Planned, *, forget: bool) -> None:
        text = json.dumps([planned.note, planned.plan.to_json()])
        self._store.set(key, zlib.compress(text.encode(), 1))  # type: ignore[arg-type]
        if forget:
            # The share of this step is prepared while the one before is computed: all have read the one before that.
            self._published.append(key)
            while len(self._published) > 3:
                self._store.delete_key(self._published.pop(0))


def _key(part: Split, batch: GlobalBatch) -> str:
    """The lengths count too: a restored run may take the same step on another batch."""
    return f"{part}/{batch.step}/{zlib.crc32(batch.lengths.tobytes())}"


class _Desk:
    """Rank 0's dealings with the planner process, in a thread that waits for it."""

    def __init__(self, settings: SequenceSettings, *, schedule: Wanted) -> None:
        self._settings, self._schedule = settings, schedule
        self._orders: PriorityQueue[tuple[int, int, str, list[int]]] = PriorityQueue()
        self._number = itertools.count()
        self._open: set[str] = set()  # ordered and not taken
        self._taken: deque[str] = deque(maxlen=2 * AHEAD)
        self._answers: dict[str, StepPlan | str] = {}
        self._news = threading.Condition()
        self._is_closed = False
        self._process: PlannerProcess | None = None
        self._num_starts = 0
        self._death = ""  # of the process, until another one has answered
        self._last_s: float | None = None
        self._patience_s = FIRST_S
        self._thread = threading.Thread(target=self._serve, name="distrain-sequence-plans", daemon=True)
        self._thread.start()

    def order(self, key: str, lengths: list[int], *, urgent: bool) -> None:
        """Ask for a plan, unless that has been done."""
        with self._news:
            if key not in self._open and key not in self._taken and not self._is_closed:
                self._open.add(key)
                self._orders.put((0 if urgent else 1, next(self._number), key, lengths))

    def take(self, key: str, *, is_paced: bool) -> StepPlan | str:
        """The plan, or why there is none as yet. ``is_paced``: one is taken in each step, which says how long it is."""
        with self._news:
            now_s = time.monotonic()
            if is_paced:
                if self._last_s is not None:
                    self._patience_s = (now_s - self._last_s) / 2
                self._last_s = now_s
            self._news.wait_for(lambda: key in self._answers or self._is_closed, self._patience_s)
            self._open.discard(key)
            self._taken.append(key)
            return self._answers.pop(key, self._death or "the planner was late")

    def close(self) -> None:
        """End process and thread."""
        with self._news:
            self._is_closed = True
            self._news.notify_all()
            if self._process is not None:
                self._process.kill()  # wakes the thread, if it waits for an answer
        self._orders.put((-1, next(self._number), "", []))
        self._thread.join(FIRST_S)

    def _serve(self) -> None:
        while not self._is_closed:
            _, _, key, lengths = self._orders.get()
            if key in self._open:  # what was taken too early needs no plan any more
                answer = self._ask(lengths)
                with self._news:
                    if key in self._open:
                        self._answers[key] = answer
                        self._news.notify_all()
        if self._process is not None:
            self._process.close()

    def _ask(self, lengths: list[int]) -> StepPlan | str:
        """The planner's answer, of a new process if need be."""
        try:
            process = self._started()
            if process is None:
                return f"the planner process died {self._num_starts} times"
            answer = process.plan(lengths)
        except (PlannerDied, OSError, DistrainError) as error:
            why = "" if isinstance(error, PlannerDied) else f": {error}"
            answer = f"the planner process died{why}"
            with self._news:
                process, self._process = self._process, None
                self._death = answer
            if process is not None:
                process.close()
            return answer
        self._death = ""
        return answer

    def _started(self) -> PlannerProcess | None:
        """The process, a new one if need be; None if it has died too often or is not wanted any more."""
        with self._news:
            if self._process is None and not self._is_closed and self._num_starts < MOST_STARTS:
                self._num_starts += 1
                settings = self._settings
                self._process = PlannerProcess(
                    settings.cost_model, num_slots=settings.num_slots, schedule=self._schedule
                )
            return self._process
