"""One rank of a training job: ``python -m distrain.train CONFIG`` under `distrain launch` or torchrun."""

import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from distrain.core.config import RunConfig
from distrain.core.errors import ConfigError
from distrain.core.events import EventLog, JsonlSink
from distrain.core.load import load
from distrain.faults.inject import arm
from distrain.parallel import init

from .hooks import Hook, Narrate, SaveCheckpoints, WriteEvents
from .loop import Trainer
from .plan import plan_of_job
from .stop import StopRequest

STOPPED = 128 + signal.SIGTERM
"""exit code of a run that has saved its state and stopped because it was asked to"""


def train(config: RunConfig) -> int:
    """Join the job that this process was started for, and train; the exit code."""
    plan = plan_of_job(config)
    parallel = init(
        plan, device=config.launch.device, timeout=timedelta(seconds=config.timeouts.collective_s)
    )
    hooks: list[Hook] = [SaveCheckpoints(config)] if config.checkpoint.enabled else []
    sinks = []
    if parallel.rank == 0:
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
        sinks = [JsonlSink(Path(config.run_dir) / "events.jsonl")]
    with EventLog(sinks, rank=parallel.rank) as events, ExitStack() as stack:
        stack.enter_context(arm())
        # Without checkpoints there is nothing to wait for: the signal has its ordinary effect.
        request = stack.enter_context(StopRequest()) if config.checkpoint.enabled else None
        if parallel.rank == 0:
            hooks += [Narrate(log_every=config.train.log_every), WriteEvents(events)]
        trainer = Trainer(
            config, plan, parallel, hooks=hooks, should_stop=lambda: request is not None and request.is_made
        )
        trainer.run()
    dist.destroy_process_group()
    return STOPPED if trainer.is_stopped else 0


def main(argv: Sequence[str]) -> int:
    """Run one rank; arguments are a config and ``section.key=value`` overrides."""
    if not argv:
        raise ConfigError(
            "no config given", allowed="python -m distrain.train CONFIG [section.key=value ...]"
        )
    return train(load(argv[0], overrides=argv[1:]).config)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # the launcher says so once, for all ranks
        sys.exit(130)
