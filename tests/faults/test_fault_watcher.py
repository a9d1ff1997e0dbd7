"""The watcher's end of a job: what has the mark ends, frozen or not, and what the dead have left is taken away."""

import os
import subprocess
import sys

import pytest

from distrain.core import netns
from distrain.faults import watcher
from distrain.faults.inject.cgroups import FAULT, Group, find_controller
from helpers.victims import left_groups

pytestmark = pytest.mark.processes

MARK = "a-job-of-nobody"


def test_the_end_of_a_job_lets_go_of_what_is_frozen_and_tries_out_no_networks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> str:
        raise AssertionError("that is a process and a namespace in every round")

    controller = find_controller("freezer")
    if controller is None:
        pytest.skip("no control group with the freezer controller can be made")
    monkeypatch.setattr(netns, "missing", missing)
    with subprocess.Popen([sys.executable, "-c", ""]) as owner:
        owner.wait()
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(1000)"], env={**os.environ, watcher.MARK: MARK}
    ) as child:
        path = controller.root / f"{FAULT}-{owner.pid}-0"
        path.mkdir()
        group = Group(controller, path=path)
        try:
            group.join(child.pid)
            group.freeze()
            watcher.end(MARK)
            assert left_groups(owner.pid) == []
            assert child.wait() < 0
        finally:
            if path.exists():
                group.close()
            child.kill()


def test_an_interrupted_drill_leaves_nothing_of_a_job_that_it_could_not_end_itself() -> None:
    """As when Ctrl-C is pressed once more while the first one is answered."""
    words = [sys.executable, "-c", "import time; time.sleep(1000)"]
    with pytest.raises(KeyboardInterrupt), watcher.Watcher() as watching:
        child = subprocess.Popen(words, env={**os.environ, **watching.variables}, start_new_session=True)
        raise KeyboardInterrupt
    try:
        assert (child.poll() or 0) < 0
    finally:
        child.kill()
        child.wait()
