"""Sequence-parallel groups of the right size for every sequence of a batch: cost model, planner, bound, plan.

A batch of documents has a few long sequences that need many devices and many short ones that lose time on every
device they do not need. Instead of one degree for all, each micro-batch splits the devices into groups of several
degrees (FlexSP, arXiv 2412.01523)::

    slots        0 1 2 3 4 5 6 7
    micro-batch  [   4   ][2 ][1][1]     one long sequence; a middling one; short ones, packed

``plan_step`` finds such a plan in milliseconds and says how far from the best it can be at most.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .check import check_plan as check_plan
    from .cost import SequenceCost as SequenceCost
    from .cost import load as load_cost
    from .plan import plan_step as plan_step
    from .step_plan import SequenceGroup as SequenceGroup
    from .step_plan import StepPlan as StepPlan

_HOMES = {
    "SequenceCost": (".cost", "SequenceCost"),
    "SequenceGroup": (".step_plan", "SequenceGroup"),
    "StepPlan": (".step_plan", "StepPlan"),
    "check_plan": (".check", "check_plan"),
    "load_cost": (".cost", "load"),
    "plan_step": (".plan", "plan_step"),
}

__all__ = ["SequenceCost", "SequenceGroup", "StepPlan", "check_plan", "load_cost", "plan_step"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, attribute = _HOMES[name]
    return getattr(import_module(home, __name__), attribute)
