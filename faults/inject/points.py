"""Failpoints that several faults share: one action a point, which asks each of them in the order of the plan."""

from collections.abc import Callable, Mapping
from typing import Any

from distrain.core.failpoints import FAILPOINTS

Passing = Callable[[Mapping[str, Any]], object]
"""called with the context of a hit; raises what the code that passes the point is to meet"""


class Points:
    """The failpoints that this process's faults have armed."""

    def __init__(self) -> None:
        self._actions: dict[str, list[Passing]] = {}

    def on(self, name: str, action: Passing) -> None:
        """Call ``action`` whenever the point is passed."""
        if name not in self._actions:
            FAILPOINTS.arm(name, self._all(self._actions.setdefault(name, [])), on_hit=None)
        self._actions[name].append(action)

    def close(self) -> None:
        """Disarm them all."""
        while self._actions:
            FAILPOINTS.disarm(self._actions.popitem()[0])

    @staticmethod
    def _all(actions: list[Passing]) -> Passing:
        def passed(context: Mapping[str, Any]) -> None:
            for action in actions:
                action(context)

        return passed
