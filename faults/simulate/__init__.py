"""Goodput of a job under failures: how much of its time is training, what eats the rest, and how often to save.

A failure process (``failures.py``, published rates in ``mixes.py``) or a recorded trace (``trace.py``) is a list of
failures; ``job.py`` replays it against the policy of a job; ``sweep.py`` does so for several seeds and intervals, and
``closed_forms.py`` says what must come out where mathematics knows. ``scenario.py`` is all of it in one TOML file.
"""

from .failures import FailureClass, FailureProcess, Failures, Shows, draw
from .job import Cause, Job, Outcome, Recovery, replay
from .levels import Level, Survives
from .read import load_scenario
from .scenario import Scenario
from .sweep import Curve, Estimate, num_runs, run_seeds, search

__all__ = [
    "Cause",
    "Curve",
    "Estimate",
    "FailureClass",
    "FailureProcess",
    "Failures",
    "Job",
    "Level",
    "Outcome",
    "Recovery",
    "Scenario",
    "Shows",
    "Survives",
    "draw",
    "load_scenario",
    "num_runs",
    "replay",
    "run_seeds",
    "search",
]
