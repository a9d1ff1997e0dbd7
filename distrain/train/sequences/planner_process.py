"""The process that plans steps ahead of training, and the line to it.

Planning shares no interpreter with training, so that it costs no step any time. Requests and plans are lines of JSON::

    {"cost": ..., "num_slots": ..., "schedule": ...}      once
    {"lengths": [...]}          ->  {"plan": "..."}, or {"error": "..."} if there is none

The process ends when its input does, hence with whoever started it. It loads no torch.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from distrain.core.errors import DistrainError
from distrain.planners.sequence.cost import SequenceCost
from distrain.planners.sequence.plan import Wanted, plan_step
from distrain.planners.sequence.step_plan import StepPlan


class PlannerDied(Exception):
    """The process is gone, and with it the request."""


class PlannerProcess:
    """A process that plans one step after the other; not for several threads at once."""

    def __init__(self, cost: SequenceCost, *, num_slots: int, schedule: Wanted) -> None:
        """Start it; returns before it is ready."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "distrain.train.sequences.planner_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the ranks; with theirs, its input ends
        )
        self._setup: str | None = json.dumps(
            {"cost": asdict(cost), "num_slots": num_slots, "schedule": schedule}
        )

    def plan(self, lengths: Sequence[int]) -> StepPlan | str:
        """The plan for ``lengths``, or why there is none.

        Raises:
            PlannerDied: no answer will come.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            if self._setup is not None:
                self._process.stdin.write(self._setup + "\n")
                self._setup = None
            self._process.stdin.write(json.dumps({"lengths": list(lengths)}) + "\n")
            self._process.stdin.flush()
            reply = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:  # a broken pipe, no line or half of one
            raise PlannerDied from error
        if "error" in reply:
            return str(reply["error"])
        return StepPlan.from_json(reply["plan"])

    def kill(self) -> None:
        """End the process, whatever it does; any thread may."""
        self._process.kill()

    def close(self) -> None:
        """End the process and the line to it."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what could not be sent any more
                pipe.close()
        self._process.wait()


def serve() -> None:
    """Answer requests on standard input until it ends."""
    first = sys.stdin.readline()
    if not first:
        return
    setup = json.loads(first)
    cost = _cost(setup["cost"])
    for line in sys.stdin:
        try:
            plan = plan_step(
                json.loads(line)["lengths"],
                num_slots=setup["num_slots"],
                cost=cost,
                schedule=setup["schedule"],
                build=False,
            )
            reply = {"plan": plan.to_json()}
        except DistrainError as error:
            reply = {"error": str(error)}
        try:
            print(json.dumps(reply), flush=True)
        except BrokenPipeError:  # whoever asked is gone
            return


def _cost(values: dict[str, Any]) -> SequenceCost:
    """The cost model of JSON, whose keys are all text."""
    bandwidth = {int(degree): speed for degree, speed in values.pop("bandwidth_gb_s").items()}
    return SequenceCost(**values, bandwidth_gb_s=bandwidth)


if __name__ == "__main__":
    serve()
