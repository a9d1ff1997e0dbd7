"""``distrain ckpt convert`` as it is typed."""

import json
from pathlib import Path

import pytest
import torch

from distrain.checkpoint.torch_memory import array_of
from distrain.cli import main
from distrain.core.config import ModelConfig
from distrain.train.model import Decoder
from helpers.checkpoints import whole, write_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A checkpoint of the model of a config beside it."""
    torch.manual_seed(0)
    (tmp_path / "run.toml").write_text(
        '[model]\npreset = "tiny"\nd_model = 32\nd_ffn = 48\nvocab_size = 40\n'
    )
    model = Decoder(ModelConfig(preset="tiny", d_model=32, d_ffn=48, vocab_size=40).shape())
    shards = [whole(f"train.model.{name}", "float32", array_of(t)) for name, t in model.state_dict().items()]
    write_checkpoint(tmp_path / "run", [shards], step=20, objects={"train": {"step": 20}})
    return tmp_path / "run"


def test_the_newest_checkpoint_of_a_run_becomes_a_model_for_transformers(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = run.parent / "hf"
    assert (
        main(
            ["ckpt", "convert", str(run), str(target), "--to", "hf", "--config", str(run.parent / "run.toml")]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert f"{target}: 21 tensors, " in printed and "left out: train" in printed
    assert {path.name for path in target.iterdir()} == {"config.json", "model.safetensors"}


def test_what_was_done_is_printed_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = run.parent / "st"
    arguments = [
        "ckpt",
        "convert",
        str(run),
        str(target),
        "--to",
        "safetensors",
        "--shard-gb",
        "0.001",
        "--json",
    ]
    assert main(arguments) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["path"] == str(target) and done["source_format"] == "distrain" and done["num_tensors"] == 21


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--to", "hf"], 3, "--config run.toml"),
        (["--to", "onnx"], 3, "safetensors, hf, dcp"),
        ([], 2, "--to"),
    ],
)
def test_mistakes_end_with_their_exit_code(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    assert main(["ckpt", "convert", str(run), str(run.parent / "there"), *arguments]) == code
    assert words in capsys.readouterr().err
    assert not (run.parent / "there").exists()
