"""What the README and examples/ show works as shown."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.processes
def test_the_loop_of_ones_own_trains_under_the_launcher() -> None:
    launch = [sys.executable, "-m", "distrain", "launch", "--nproc-per-node", "4", "examples/own_loop.py"]
    done = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    losses = [float(value) for value in re.findall(r"step \d+  loss ([\d.]+)", done.stdout)]
    assert len(losses) == 5
    assert losses[-1] < losses[0] - 0.5


SCRIPT = """
from distrain.parallel import init
parallel = init()
print(parallel.rank, dict(parallel.coordinates), parallel.mesh.mesh_dim_names, parallel.groups.axis("tp").size())
"""


@pytest.mark.processes
def test_a_script_gets_the_layout_of_the_plan_it_was_launched_with(tmp_path: Path) -> None:
    from distrain.core.vocabulary import Degrees
    from distrain.planners.parallel_plan import ParallelPlan

    ParallelPlan(world_size=4, degrees=Degrees(tp=2, pp=2)).save(tmp_path / "plan.json")
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "distrain", "launch", "--nproc-per-node", "4"]
    words = ["--plan", str(tmp_path / "plan.json"), str(tmp_path / "script.py")]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    lines = sorted(line.split("] ", 1)[1] for line in done.stdout.splitlines())
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "3"]
    assert "'pp': 1" in lines[3]
    assert "'tp': 1" in lines[3]
    assert all(line.endswith(" 2") for line in lines)


def test_the_readmes_config_commands_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    verbs = set(re.findall(r"^distrain (\w+)", readme, flags=re.MULTILINE))
    command = [sys.executable, "-m", "distrain", "--help"]
    helped = subprocess.run(command, capture_output=True, text=True, timeout=150).stdout
    assert verbs
    assert all(re.search(rf"^\s+{verb}\s", helped, flags=re.MULTILINE) for verb in verbs)


def test_verbs_that_the_documents_show_exist() -> None:
    texts = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    shown = {words for text in texts for words in re.findall(r"distrain (ckpt|plan|config) (\w+)", text)}
    for group in {group for group, _ in shown}:
        command = [sys.executable, "-m", "distrain", group, "--help"]
        helped = subprocess.run(command, capture_output=True, text=True, timeout=150).stdout
        for verb in (verb for of, verb in shown if of == group):
            assert re.search(rf"^\s+{verb}\s", helped, flags=re.MULTILINE), f"distrain {group} {verb}"


def test_links_in_the_documents_lead_somewhere() -> None:
    documents = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if "://" not in target:
                assert os.path.exists(document.parent / target), f"{document.name}: {target}"
