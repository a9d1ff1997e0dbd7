"""Chooses a layout."""

from .parallel_plan import ParallelPlan as ParallelPlan
