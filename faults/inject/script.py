"""Runs somebody's script under a fault plan, unchanged: ``python -m distrain.faults.inject.script SCRIPT [ARGS]``.

The script needs to know nothing of faults. Torch's hooks around every optimizer's step tell where it is: a step
begins where the one before has ended, and its gradients are complete when the optimizer is called. A script with
several optimizers is followed by the first one that steps.
"""

import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distrain.core.errors import ConfigError
from distrain.core.failpoints import hit

from .arming import arm


@contextmanager
def followed() -> Iterator[None]:
    """Pass the points of a trainer's steps on behalf of whatever optimizer steps."""
    from torch.optim.optimizer import (
        Optimizer,
        register_optimizer_step_post_hook,
        register_optimizer_step_pre_hook,
    )

    step = 1
    leader: Optimizer | None = None

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal leader
        leader = leader or optimizer
        if optimizer is leader:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            hit("train.gradients", step=step, gradients=[p.grad for p in params if p.grad is not None])

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal step
        if optimizer is leader:
            step += 1
            hit("train.step", step=step)

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    hit("train.step", step=step)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def main(argv: Sequence[str]) -> None:
    """Arm this process, then be the script."""
    if not argv:
        raise ConfigError("no script given", allowed="python -m distrain.faults.inject.script SCRIPT [ARGS]")
    sys.argv = list(argv)
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    with arm(), followed():
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
