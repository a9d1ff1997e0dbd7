"""Named points at which tests and drills break things for real.

Code that can fail says so where it fails, ``hit("checkpoint.write", rank=rank)``, and goes on: one lookup in an
empty dict. A test arms the point with what should happen there::

    with FAILPOINTS.armed("checkpoint.write", OSError(errno.ENOSPC, "full"), on_hit=3, rank=1) as point:
        train()
    assert point.fired

``FAILPOINTS`` is the one mutable object of this package that lives in a module. It has to: a fault reaches the
depths of rooms that must not know the room which injects it, and no argument leads from one to the other. A leak
test asserts that ``FAILPOINTS.names()`` is empty.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any

Action = BaseException | Callable[[Mapping[str, Any]], object]
"""raised, or called with the context of the hit"""


class Armed:
    """One armed point: what happens, on which hit, and whether it has happened."""

    def __init__(self, action: Action, *, on_hit: int | None, only: Mapping[str, Any]) -> None:
        self.hits = 0
        """hits whose context matched"""
        self._action, self._on_hit, self._only = action, on_hit, dict(only)
        self._lock = Lock()

    @property
    def fired(self) -> bool:
        """Whether the action was taken."""
        return self.hits >= (self._on_hit or 1)

    def hit(self, context: Mapping[str, Any]) -> None:
        """Count the hit, and take the action if it is the one waited for."""
        if any(name not in context or context[name] != value for name, value in self._only.items()):
            return
        with self._lock:
            self.hits += 1
            due = self._on_hit in (None, self.hits)
        if not due:
            return
        if isinstance(self._action, BaseException):
            raise self._action
        self._action(context)


class Failpoints:
    """Points by name. Arming is for one thread; hits may come from any."""

    def __init__(self) -> None:
        self._armed: dict[str, Armed] = {}

    def hit(self, name: str, /, **context: Any) -> None:
        """Pass the point ``name``; nothing happens unless it is armed, otherwise whatever its action does."""
        if armed := self._armed.get(name):
            armed.hit(context)

    def arm(self, name: str, action: Action, /, *, on_hit: int | None = 1, **only: Any) -> Armed:
        """Take ``action`` once, on the ``on_hit``-th hit whose context contains ``only``; None is on every one.

        Raises:
            ValueError: the point is armed already, or ``on_hit`` is less than 1.
        """
        if name in self._armed:
            raise ValueError(f"failpoint {name} is armed already")
        if on_hit is not None and on_hit < 1:
            raise ValueError(f"failpoint {name}: on_hit counts from 1, got {on_hit}")
        armed = self._armed[name] = Armed(action, on_hit=on_hit, only=only)
        return armed

    def disarm(self, name: str) -> None:
        """Make the point harmless again; one that is not armed stays so."""
        self._armed.pop(name, None)

    @contextmanager
    def armed(self, name: str, action: Action, /, *, on_hit: int = 1, **only: Any) -> Iterator[Armed]:
        """``arm`` for the time of a ``with`` block."""
        armed = self.arm(name, action, on_hit=on_hit, **only)
        try:
            yield armed
        finally:
            self.disarm(name)

    def names(self) -> list[str]:
        """The armed points, sorted."""
        return sorted(self._armed)


FAILPOINTS = Failpoints()
hit = FAILPOINTS.hit
