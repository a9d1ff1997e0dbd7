"""Record what a training step asks for, plan it, and let the following steps live in one arena of the planned size.

    with PlannedAllocator.record() as recording:
        for _ in range(2):
            step()
            recording.new_step()
    plan = recording.plan()
    with PlannedAllocator(plan) as allocator:
        for _ in range(num_steps):
            step()
            allocator.new_step()
        print(allocator.report())

A step that leaves the plan is as right as any other: what the arena cannot serve at once comes from the allocator
beneath and is counted. Tensors may outlive the context; the arena goes with the last of them.
"""

import ctypes
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from distrain.core.errors import ConfigError

from . import bind
from .bind import Device
from .plan import MOST_PHASES, AllocationPlan, Request, one_step, plan_requests
from .report import AllocationReport

MIN_BYTES = 4096
"""Smaller requests are many, and together next to nothing: they pass by."""


class _Context(ABC):
    """What recording and replaying have in common: in place from ``__enter__`` to ``__exit__``."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._adapter: bind.Adapter | None = None

    def __enter__(self) -> Self:
        adapter = bind.adapter(self._device)
        if adapter.library.distrain_is_on():
            raise ConfigError("a plan or a recording is on already", hint="leave its `with` statement first")
        adapter.install()
        try:
            self._start(adapter)
        except BaseException:  # Ctrl-C too: it goes on once torch has its own allocator back
            adapter.uninstall()
            raise
        self._adapter = adapter
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        adapter, self._adapter = self._on, None
        adapter.library.distrain_stop()
        adapter.uninstall()
        self._stopped(adapter)

    def new_step(self) -> None:
        """A step ends: the next request is the first of the next one. Without requests in between, nothing happens."""
        self._on.library.distrain_new_step()

    def enter_phase(self, phase: int) -> None:
        """What follows belongs to ``phase``; a step begins in phase 0.

        Positions are kept for each phase, so that what goes astray in one does not touch the others. A phase that is
        entered again in the same step goes on where it was.
        """
        if not 0 <= phase < MOST_PHASES:
            raise ConfigError("a phase is out of range", got=str(phase), allowed=f"0 to {MOST_PHASES - 1}")
        self._on.library.distrain_enter(phase)

    @property
    def _on(self) -> bind.Adapter:
        if self._adapter is None:
            raise ConfigError("the planned allocator is not on", hint="use it in a `with` statement")
        return self._adapter

    @abstractmethod
    def _start(self, adapter: bind.Adapter) -> None:
        """Let the library record, or replay."""

    @abstractmethod
    def _stopped(self, adapter: bind.Adapter) -> None:
        """Keep what is asked for later."""


class Recording(_Context):
    """Writes down the requests of at least ``min_bytes`` that are made on this thread, or stream."""

    def __init__(self, *, min_bytes: int = MIN_BYTES, device: Device = "cpu") -> None:
        super().__init__(device)
        self._min_bytes = max(1, min_bytes)
        self._alignment = 1
        self._steps: list[list[Request]] = []
        self._counts: list[int] = []

    @property
    def steps(self) -> list[list[Request]]:
        """The requests, step by step; times are events since the start."""
        return self._steps if self._adapter is None else bind.recorded(self._adapter.library)

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once of what was asked for since the start, on any thread."""
        counted = self._counts if self._adapter is None else bind.counts(self._adapter.library)
        return AllocationReport.of(counted).peak_live_bytes if counted else 0

    def plan(self, *, time_limit_s: float = 10.0) -> AllocationPlan:
        """The plan of one recorded step; of two or more, of the last whose blocks are seen to their end."""
        return plan_requests(
            one_step(self.steps),
            min_bytes=self._min_bytes,
            alignment=self._alignment,
            time_limit_s=time_limit_s,
        )

    def _start(self, adapter: bind.Adapter) -> None:
        self._alignment = adapter.alignment
        adapter.library.distrain_record(ctypes.c_int64(self._min_bytes))

    def _stopped(self, adapter: bind.Adapter) -> None:
        self._steps, self._counts = bind.recorded(adapter.library), bind.counts(adapter.library)


class PlannedAllocator(_Context):
    """Serves the requests of this thread, or stream, as ``plan`` says; safely, whatever they are."""

    def __init__(self, plan: AllocationPlan, *, device: Device = "cpu") -> None:
        super().__init__(device)
        self.plan = plan
        self._counts = [0] * AllocationReport.num_counts()

    @staticmethod
    def record(*, min_bytes: int = MIN_BYTES, device: Device = "cpu") -> Recording:
        """A context in which requests are written down, and served as ever."""
        return Recording(min_bytes=min_bytes, device=device)

    def report(self) -> AllocationReport:
        """What has been counted so far; after the context, in all of it."""
        counted = self._counts if self._adapter is None else bind.counts(self._adapter.library)
        return AllocationReport.of(counted, arena_bytes=self.plan.arena_bytes)

    def _start(self, adapter: bind.Adapter) -> None:
        bind.replay(adapter.library, self.plan)

    def _stopped(self, adapter: bind.Adapter) -> None:
        self._counts = bind.counts(adapter.library)
