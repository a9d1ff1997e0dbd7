"""Fixtures for a test suite of one's own: real ranks on this machine, and faults to break them with.

::

    # conftest.py
    pytest_plugins = ["distrain.integrations.pytest_plugin"]

    def test_training_survives(local_cluster, fault_plan):
        cluster = local_cluster(ranks=4, nodes=2)
        broken = cluster.run("train.py", plan=fault_plan.kill(ranks=[3]).at(step=5))
        assert broken.first_failure["rank"] == 3
        assert cluster.run("train.py").code == 0      # resumes: the working folder is the same
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distrain.core.errors import Problem, raise_if
from distrain.core.netns import HINT, missing
from distrain.core.vocabulary import REPORT
from distrain.faults.command import end_all, first_failure, run_command, script_words
from distrain.faults.inject import FaultPlan, Injector, JobShape, Record, check, read_truth
from distrain.faults.watcher import Watcher


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one run ended."""

    code: int
    """the launcher's exit code"""
    output: str
    """of launcher and ranks"""
    truth: tuple[Record, ...]
    """what the faults did, and when"""
    first_failure: Mapping[str, Any] | None
    """rank, error and so on of the rank that failed first"""


class LocalCluster:
    """Ranks on this machine, spread over emulated nodes; runs follow each other in one working folder."""

    def __init__(self, folder: Path, *, ranks: int, nodes: int, netns: bool = False) -> None:
        """Raises ConfigError if there cannot be such a cluster here; lists all problems."""
        problems = []
        if ranks < 1 or nodes < 1 or ranks % nodes:
            got, allowed = f"{ranks} ranks, {nodes} nodes", "as many ranks on each node, 1 or more"
            problems.append(Problem("ranks cannot be spread over the nodes", got, allowed))
        if netns and nodes == 1:
            problems.append(Problem("netns is for emulated nodes", "1 node", hint="nodes=2"))
        elif netns and (what := missing()):
            problems.append(Problem("nodes cannot have networks of their own here", what, hint=HINT))
        raise_if(problems)
        self.folder = folder / "work"
        """working folder of the ranks"""
        self._logs, self._ranks, self._nodes, self._netns = folder, ranks, nodes, netns
        self._num_runs = 0
        self.folder.mkdir(parents=True)

    @property
    def _shape(self) -> JobShape:
        return JobShape(world_size=self._ranks, num_nodes=self._nodes, has_network=self._netns)

    def run(
        self, script: str | Path, *args: str, plan: FaultPlan | None = None, timeout_s: float = 120.0
    ) -> Outcome:
        """Run a training script on all ranks, under ``plan`` if there is one.

        Raises:
            ConfigError: there is no such script, or the plan cannot be carried out here; lists all problems.
        """
        plan = plan or FaultPlan()
        found = Path(script).is_file()
        missing_script = [] if found else [Problem("there is no such script", str(script), "a Python file")]
        raise_if([*missing_script, *check(plan, self._shape)])
        self._num_runs += 1
        run = self._logs / f"run-{self._num_runs}"
        run.mkdir()
        with Watcher() as watcher, Injector(plan, run / "truth") as injector:
            variables = {**injector.variables, **watcher.variables, REPORT: str(run / "report.json")}
            try:
                code = run_command(
                    script_words(Path(script), args, ranks=self._ranks, nodes=self._nodes, netns=self._netns),
                    environ={**os.environ, **variables},
                    log=run / "log",
                    timeout_s=timeout_s,
                    cwd=self.folder,
                )
            finally:
                end_all(injector.pids("keeper"))
        truth = tuple(read_truth(run / "truth"))
        output = (run / "log").read_text(errors="replace")
        return Outcome(code, output, truth, first_failure(run / "report.json"))


@pytest.fixture
def local_cluster(tmp_path: Path) -> Callable[..., LocalCluster]:
    """Makes clusters: ``local_cluster(ranks=4, nodes=2)``, with ``netns=True`` nodes that have networks to break."""
    made: list[LocalCluster] = []

    def make(*, ranks: int = 2, nodes: int = 1, netns: bool = False) -> LocalCluster:
        folder = tmp_path / f"cluster-{len(made)}"
        made.append(LocalCluster(folder, ranks=ranks, nodes=nodes, netns=netns))
        return made[-1]

    return make


@pytest.fixture
def fault_plan() -> FaultPlan:
    """An empty plan to build on: ``fault_plan.kill(ranks=[1]).at(step=3)``."""
    return FaultPlan(seed=0)
