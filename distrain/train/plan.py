"""Which layout a run has: the one of its config, the planner's if that says auto, or the file a launcher names."""

import os
from pathlib import Path

from distrain.core.config import RunConfig
from distrain.core.errors import raise_if
from distrain.core.layout import check_layout
from distrain.core.vocabulary import ClusterSpec
from distrain.planners.parallel_plan import ParallelPlan
from distrain.planners.parallelism import choose

from .machine import Machine
from .pretrained import check_pretrained
from .sequences.settings import check_sequences


def layout_of(config: RunConfig, world_size: int, *, cluster: ClusterSpec) -> ParallelPlan:
    """The layout of ``config`` on ``world_size`` ranks."""
    parallel, data = config.parallel, config.data
    if parallel.auto:
        return choose(
            config.model.shape(),
            cluster,
            global_batch=data.global_batch,
            seq_len=data.seq_len,
            dtype=config.train.dtype,
            optimizer=config.optimizer.name,
        )
    return ParallelPlan(
        world_size=world_size,
        degrees=parallel.degrees(world_size),
        schedule=parallel.schedule,
        data=parallel.data,
        micro_batches=parallel.drawn_micro_batches,
    )


def plan_of_job(config: RunConfig) -> ParallelPlan:
    """The layout in a started worker: of the file ``DISTRAIN_PLAN``, else of the config and ``WORLD_SIZE``.

    Raises:
        ConfigError: the layout cannot carry the model.
    """
    path = os.environ.get("DISTRAIN_PLAN")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if path:
        plan = ParallelPlan.load(Path(path))
    else:
        plan = layout_of(
            config, world_size, cluster=Machine.of(config, world_size=world_size, here=True).cluster
        )
    problems = check_layout(
        config.model.shape(),
        plan.degrees,
        schedule=plan.schedule,
        data=plan.data,
        micro_batches=plan.micro_batches,
        global_batch=config.data.global_batch,
        seq_len=config.data.seq_len,
        world_size=world_size,
        sequence_degree=config.parallel.group_degree,
    )
    raise_if([*problems, *check_sequences(config, world_size), *check_pretrained(config.model)])
    return plan
