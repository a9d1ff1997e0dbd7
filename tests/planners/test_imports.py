"""The room loads without torch: the launcher and the command line plan before they start anything."""

import subprocess
import sys

import distrain.planners as planners


def test_planning_a_run_does_not_load_torch() -> None:
    code = (
        "import sys, distrain.planners as planners;"
        "[getattr(planners, name) for name in planners.__all__];"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=150)


def test_every_lazy_name_is_there() -> None:
    assert all(callable(getattr(planners, name)) for name in planners.__all__)
