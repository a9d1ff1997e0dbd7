"""``distrain ckpt``: what it prints, as tables and as JSON, and what its exit code says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrain.checkpoint.commit import begin
from distrain.checkpoint.tiers.posix import PosixStorage
from distrain.cli import main
from helpers.checkpoints import whole, write_checkpoint


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Steps 1 to 3, of which 2 is cut off, and one that was never finished."""
    monkeypatch.setenv("COLUMNS", "200")
    for step in (1, 2, 3):
        state = [
            whole("layer.weight", "float32", np.full((4, 3), step, np.float32)),
            whole("n", "int64", np.array(step)),
        ]
        write_checkpoint(
            tmp_path, [state, [whole("other", "bool", np.ones(5, bool))]], step=step, objects={"lr": 0.5}
        )
    os.truncate(tmp_path / "step-00000002/data/1/0", 100)
    begin(PosixStorage(tmp_path), 4, "a0")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    """What the command prints."""
    assert main(["ckpt", *map(str, words)]) == code
    return capsys.readouterr().out


def run_json(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> Any:
    return json.loads(run(capsys, *words, "--json", code=code))


def spoil(root: Path, step: int) -> None:
    with (root / f"step-{step:08d}/data/0/0").open("r+b") as file:
        file.write(b"spoilt")


def test_ls_shows_all_newest_first_with_reasons(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "ls", root)
    assert [(c["step"], c["good"]) for c in found["checkpoints"]] == [(3, True), (2, False), (1, True)]
    assert "another size" in found["checkpoints"][1]["reason"]
    assert found["checkpoints"][0]["num_bytes"] == 48 + 8 + 5
    assert found["unfinished"] == [".tmp-step-00000004-a0"]
    lines = run(capsys, "ls", root).splitlines()
    assert [line.split()[1] for line in lines[1:4]] == ["step-00000003", "step-00000002", "step-00000001"]
    assert "another size" in lines[2] and "unfinished" in lines[4]


def test_ls_of_an_empty_folder_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no checkpoints" in run(capsys, "ls", tmp_path)
    assert run_json(capsys, "ls", tmp_path)["checkpoints"] == []


def test_an_address_is_as_good_as_a_path(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fsspec")
    found = run_json(capsys, "ls", f"local://{root}")
    assert [(c["step"], c["good"]) for c in found["checkpoints"]] == [(3, True), (2, False), (1, True)]
    assert run_json(capsys, "verify", f"local://{root}/step-00000001")[0]["good"]


def test_inspect_shows_head_tensors_and_objects(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "inspect", root / "step-00000001")
    assert (found["step"], found["world_size"], found["objects"], found["mesh"]) == (1, 2, ["lr"], {"tp": 1})
    assert found["tensors"]["layer.weight"]["global_shape"] == [4, 3]
    assert found["tensors"]["other"]["boxes"][0]["writer"] == 1
    printed = run(capsys, "inspect", root)
    assert "4 x 3" in printed and "scalar" in printed and "step-00000003" in printed
    assert list(run_json(capsys, "inspect", root, "layer.*")["tensors"]) == ["layer.weight"]


def test_verify_names_the_damage_and_exits_with_one(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "good" in run(capsys, "verify", root / "step-00000003")
    spoil(root, 3)
    (report,) = run_json(capsys, "verify", root / "step-00000003", code=1)
    assert report["good"] is False
    (damage,) = report["damages"]
    assert (damage["writer"], damage["extent"], damage["tensors"]) == (0, 0, ["layer.weight", "n"])
    printed = run(capsys, "verify", root / "step-00000003", code=1)
    assert "step-00000003 is damaged" in printed and "layer.weight, n" in printed


def test_verify_of_a_root_looks_at_every_checkpoint(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = run_json(capsys, "verify", root, code=1)
    assert [(r["folder"], r["good"]) for r in reports] == [
        ("step-00000003", True),
        ("step-00000002", False),
        ("step-00000001", True),
    ]


def test_many_tensors_are_cut_short_in_the_table_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = [whole(f"t{i}", "int32", np.ones(2, np.int32)) for i in range(9)]
    write_checkpoint(tmp_path, [state])
    spoil(tmp_path, 1)
    assert "and 4 more" in run(capsys, "verify", tmp_path, code=1)
    assert len(run_json(capsys, "verify", tmp_path, code=1)[0]["damages"][0]["tensors"]) == 9


def test_diff_exits_with_one_if_there_is_a_difference(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, third = root / "step-00000001", root / "step-00000003"
    found = run_json(capsys, "diff", first, third, code=1)
    assert [(d["name"], d["what"], d["max_abs"]) for d in found] == [
        ("layer.weight", "values", 2.0),
        ("n", "values", 2.0),
    ]
    assert "layer.weight" in run(capsys, "diff", first, third, code=1)
    assert "no difference" in run(capsys, "diff", first, first)


def test_repair_takes_what_is_lost_from_a_copy(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = root / "step-00000003"
    copy = shutil.copytree(broken, tmp_path / "elsewhere/step-00000003")
    spoil(root, 3)
    assert "nothing could be repaired" in run(capsys, "repair", broken, code=1)
    done = run_json(capsys, "repair", broken, "--from", copy)
    assert done["good"] and done["done"] == ["wrote step-00000003/data/0/0 again"]
    assert "nothing to repair" in run(capsys, "repair", broken)


def test_repair_commits_what_was_complete(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    temporary = (root / "step-00000003").rename(root / ".tmp-step-00000003-a0")
    (temporary / "manifest.json").unlink()
    assert "committed" in run(capsys, "repair", temporary)
    assert run_json(capsys, "ls", root)["checkpoints"][0]["step"] == 3


def test_gc_keeps_the_newest_that_are_good_through_and_through(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(root, 3)
    assert run_json(capsys, "gc", root, "--keep-last", 1, "--dry-run")["deleted"] == []
    assert run_json(capsys, "gc", root, "--keep-last", 1, "--quick", "--dry-run")["deleted"] == [
        "step-00000002",
        "step-00000001",
    ]
    assert "nothing to delete" in run(capsys, "gc", root, "--keep-last", 1)
    assert "deleted step-00000001" in run(capsys, "gc", root, "--keep-last", 1, "--quick")
    assert [c["step"] for c in run_json(capsys, "ls", root)["checkpoints"]] == [3]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["gc", ".", "--keep-last", "0"], 3),
        (["repair", "."], 3),
        (["verify", "."], 1),
        (["inspect", "."], 1),
        (["diff", ".", "."], 1),
        (["verify", "nowhere"], 2),
        (["verify", ".", "--threads", "0"], 2),
        (["very"], 2),
    ],
)
def test_mistakes_end_in_a_message_and_a_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ckpt", *words]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err
    assert "Traceback" not in captured.err


WITHOUT_TORCH = """
import sys
from distrain.cli import main
code = main(sys.argv[1:])
sys.exit("torch is loaded" if "torch" in sys.modules else code)
"""


@pytest.mark.processes
def test_the_command_needs_no_torch(root: Path) -> None:
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        WITHOUT_TORCH,
        "ckpt",
        "verify",
        str(root / "step-00000001"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)[0]["good"]
