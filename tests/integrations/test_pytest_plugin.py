"""The fixtures for other people's suites, used as they would."""

from pathlib import Path

import pytest

from distrain.core.errors import ConfigError
from distrain.integrations import pytest_plugin
from distrain.integrations.pytest_plugin import LocalCluster

pytest_plugins = ["pytester"]
pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

SCRIPT = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
weight = torch.zeros(2, requires_grad=True)
optimizer = torch.optim.SGD([weight], lr=1.0)
for step in range(4):
    weight.grad = torch.ones(2)
    dist.all_reduce(weight.grad)
    optimizer.step()
print("node", os.environ["GROUP_RANK"], "weight", weight[0].item())
dist.destroy_process_group()
"""

SUITE = """
import pytest
from distrain.core.errors import ConfigError

pytest_plugins = ["distrain.integrations.pytest_plugin"]

def test_a_sound_run_on_two_nodes(local_cluster):
    done = local_cluster(ranks=2, nodes=2).run("{script}")
    assert done.code == 0 and done.first_failure is None and done.truth == ()
    assert "node 0 weight -8.0" in done.output and "node 1 weight -8.0" in done.output

def test_a_killed_rank_is_named(local_cluster, fault_plan):
    done = local_cluster(ranks=2).run("{script}", plan=fault_plan.kill(ranks=[1]).at(step=3))
    assert done.code == 1 and done.first_failure["rank"] == 1
    assert [(record.victim, record.step) for record in done.truth] == [(1, 3)]

def test_what_cannot_be_is_refused(local_cluster, fault_plan):
    with pytest.raises(ConfigError, match="ranks that there are not"):
        local_cluster(ranks=2).run("{script}", plan=fault_plan.kill(ranks=[2]))
    with pytest.raises(ConfigError, match="no such script"):
        local_cluster(ranks=2).run("none.py")
    with pytest.raises(ConfigError, match="spread over the nodes"):
        local_cluster(ranks=3, nodes=2)
"""


def test_a_suite_of_somebody_else_breaks_its_own_job(pytester: pytest.Pytester, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    pytester.makepyfile(SUITE.replace("{script}", str(script)))
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=3)


def test_networks_that_there_cannot_be_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="netns is for emulated nodes") as alone:
        LocalCluster(tmp_path, ranks=0, nodes=1, netns=True)
    assert len(alone.value.problems) == 2
    monkeypatch.setattr(pytest_plugin, "missing", lambda: "no right to make one")
    with pytest.raises(ConfigError, match="no right to make one"):
        LocalCluster(tmp_path, ranks=2, nodes=2, netns=True)
    LocalCluster(tmp_path, ranks=2, nodes=2)
