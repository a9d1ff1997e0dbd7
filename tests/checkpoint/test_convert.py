"""Conversions: what goes to another format and comes back is the same, and a crash leaves all or nothing."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distrain.checkpoint.convert import convert
from distrain.checkpoint.convert.form import Source
from distrain.checkpoint.convert.run import open_source
from distrain.checkpoint.safe_state import decode
from distrain.checkpoint.torch_memory import array_of, dtype_name
from distrain.core.errors import ConfigError
from distrain.core.failpoints import FAILPOINTS
from helpers.checkpoints import Shard, whole, write_checkpoint
from helpers.ranks import RankFailure, run_ranks

OPTIMIZER = {
    "values": {"layers.0.w": {"step": 7.0}, "norm": {"step": 7.0}},
    "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": ["layers.0.w", "norm"]}],
}
OBJECTS = {"optimizer": OPTIMIZER, "scheduler": {"last": float("inf")}, "seed": 2**70}


def state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {"model.layers.0.w": torch.randn(5, 7, generator=generator), "model.norm": torch.ones(7)}
    moments = {
        f"optimizer.state.{name.removeprefix('model.')}.{key}": torch.randn(tensor.shape, generator=generator)
        for name, tensor in made.items()
        for key in ("exp_avg", "exp_avg_sq")
    }
    return {name: tensor.to(dtype) for name, tensor in (made | moments).items()}


def shards(tensors: dict[str, Tensor]) -> list[Shard]:
    return [whole(name, dtype_name(tensor.dtype), array_of(tensor)) for name, tensor in tensors.items()]


def save(root: Path, tensors: dict[str, Tensor], **kwargs: Any) -> Path:
    """By two ranks that each have half of the tensors, the last of them cut in two."""
    made = shards(tensors)
    box, array = made.pop()
    rows = box.shape[0] // 2
    parts = [
        (type(box)(**{**fields(box), "shape": (rows, *box.shape[1:])}), array[:rows]),
        (
            type(box)(
                **{
                    **fields(box),
                    "offset": (rows, *box.offset[1:]),
                    "shape": (box.shape[0] - rows, *box.shape[1:]),
                }
            ),
            array[rows:],
        ),
    ]
    half = len(made) // 2
    return write_checkpoint(root, [[*made[:half], parts[1]], [*made[half:], parts[0]]], **kwargs)


def fields(box: Any) -> dict[str, Any]:
    return {name: getattr(box, name) for name in ("fqn", "dtype", "global_shape", "offset", "shape")}


def content(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    _, source = open_source(path)
    return tensors_of(source), {name: decode(value) for name, value in source.objects.items()}


def tensors_of(source: Source) -> dict[str, Tensor]:
    found = dict(source.read())
    assert list(found) == list(source.tensors)
    return found


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert array_of(got[name]).tobytes() == array_of(tensor.contiguous()).tobytes(), name


@pytest.mark.parametrize("to", ["distrain", "safetensors", "dcp", "deepspeed"])
def test_there_and_back_again_changes_no_bit(tmp_path: Path, to: str) -> None:
    source = save(tmp_path / "run", state(), step=7, objects=OBJECTS)
    done = convert(source, tmp_path / "there", to=to)
    assert (done.source_format, done.num_tensors) == ("distrain", 6)
    assert done.num_bytes == sum(tensor.nbytes for tensor in state().values())
    back = convert(tmp_path / "there", tmp_path / "back", to="distrain")
    assert back.source_format == to and back.path.parent == tmp_path / "back"

    tensors, objects = content(tmp_path / "back")
    assert_same(tensors, state())
    if to == "deepspeed":
        assert done.left_out == ("scheduler", "seed")
        assert objects["optimizer"]["values"] == OPTIMIZER["values"]
    else:
        assert not done.left_out and objects == OBJECTS
    if to != "dcp":  # which has no place for it
        assert back.path.name == "step-00000007"


ODD = {
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.zeros(3, 0, 2),
    "half": torch.arange(6.0).reshape(2, 3).to(torch.bfloat16),
    "eighth": torch.arange(5.0).to(torch.float8_e4m3fn),
    "flags": torch.tensor([True, False, True]),
    "counts": torch.tensor([2**63 - 1, -1]),
    "nothing like utf-8 ascii: ä/$": torch.ones(1),
    "nans": torch.tensor([float("nan"), -0.0, float("inf")]),
}


@pytest.mark.parametrize("to", ["safetensors", "dcp", "distrain"])
def test_all_kinds_of_tensors_survive(tmp_path: Path, to: str) -> None:
    write_checkpoint(tmp_path / "run", [shards(ODD)])
    convert(tmp_path / "run", tmp_path / "there", to=to)
    assert_same(content(tmp_path / "there")[0], ODD)


def test_what_differs_between_ranks_is_left_out_and_said(tmp_path: Path) -> None:
    from distrain.checkpoint.commit import begin, commit
    from distrain.checkpoint.layout import pack
    from distrain.checkpoint.stream import BlobStream
    from distrain.checkpoint.tiers.posix import PosixStorage

    storage = PosixStorage(tmp_path / "run")
    folder = begin(storage, 3, "a0")
    for rank in range(2):
        with BlobStream(storage, folder, pack(rank, [])) as blob:
            blob.finish(job="j", step=3, attempt="a0", world_size=2, objects={"rng": rank, "seed": 1})
    commit(storage, 3, "a0", mesh={})
    done = convert(tmp_path / "run", tmp_path / "there", to="dcp")
    assert done.left_out == ("rng",)
    assert content(tmp_path / "there")[1] == {"seed": 1}


def test_progress_tells_every_byte(tmp_path: Path) -> None:
    save(tmp_path / "run", state())
    told: list[int] = []
    done = convert(tmp_path / "run", tmp_path / "there", to="safetensors", progress=told.append)
    assert sum(told) == done.num_bytes and len(told) == done.num_tensors


def test_mistakes_are_named(tmp_path: Path) -> None:
    save(tmp_path / "run", state())
    (tmp_path / "there").mkdir()
    for arguments, words in (
        ((tmp_path / "run", tmp_path / "new", "pickle"), "no such format"),
        ((tmp_path / "nothing", tmp_path / "new", "dcp"), "there is no checkpoint at"),
        ((tmp_path / "there", tmp_path / "new", "dcp"), "there is no checkpoint at"),
        ((tmp_path / "run", tmp_path / "there", "dcp"), "the target exists"),
        ((tmp_path / "run", tmp_path / "run", "distrain"), "the target exists"),
        ((tmp_path / "run", tmp_path / "new", "hf"), "how many heads"),
    ):
        with pytest.raises(ConfigError, match=words):
            convert(arguments[0], arguments[1], to=arguments[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]


def killed(rank: int, world_size: int, root: str, to: str, point: str, on_hit: int) -> None:
    with FAILPOINTS.armed(point, lambda _: os.kill(os.getpid(), signal.SIGKILL), on_hit=on_hit):
        convert(f"{root}/run", f"{root}/there", to=to)


@pytest.mark.ranks
@pytest.mark.parametrize("to", ["safetensors", "dcp", "deepspeed", "distrain"])
def test_a_conversion_that_is_killed_leaves_nothing_under_the_targets_name(tmp_path: Path, to: str) -> None:
    points = [("convert.tensor", 1), ("convert.tensor", 6)]
    if to == "distrain":
        points += [("checkpoint.extent", 1), ("checkpoint.manifest", 1), ("checkpoint.publish", 1)]
    else:
        points += [("convert.sync", 1), ("convert.publish", 1)]
    save(tmp_path / "run", state(), step=7)
    for point, on_hit in points:
        with pytest.raises(RankFailure, match="SIGKILL"):
            run_ranks(killed, 1, str(tmp_path), to, point, on_hit)
        visible = [path for path in tmp_path.glob("there*") if to != "distrain" or list(path.glob("[!.]*"))]
        assert not visible
    convert(tmp_path / "run", tmp_path / "there", to=to)
    assert_same(content(tmp_path / "there")[0], state())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]
    assert not list((tmp_path / "there").glob(".tmp-*"))


@pytest.mark.parametrize("to", ["safetensors", "dcp", "deepspeed", "distrain"])
def test_a_conversion_that_fails_cleans_up(tmp_path: Path, to: str) -> None:
    save(tmp_path / "run", state(), step=7)
    with (
        FAILPOINTS.armed("convert.tensor", OSError(28, "full"), on_hit=4),
        pytest.raises(Exception, match="full"),
    ):
        convert(tmp_path / "run", tmp_path / "there", to=to)
    assert not list(tmp_path.glob(".tmp-*")) and not list((tmp_path / "there").glob("*"))


def test_two_conversions_to_one_target_do_not_mix(tmp_path: Path) -> None:
    save(tmp_path / "run", state())

    def second(_: object) -> None:
        with pytest.raises(ConfigError, match="another conversion"):
            convert(tmp_path / "run", tmp_path / "there", to="safetensors")

    with FAILPOINTS.armed("convert.sync", second) as point:
        convert(tmp_path / "run", tmp_path / "there", to="safetensors")
    assert point.fired
    assert_same(content(tmp_path / "there")[0], state())


def test_extents_that_many_small_tensors_share_are_read_once_a_batch(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((4,), float(i)) for i in range(300)}
    write_checkpoint(tmp_path / "run", [shards(tensors)])
    again: Callable[[object], object] = lambda _: pytest.fail("an extent was read twice")  # noqa: E731
    with FAILPOINTS.armed("checkpoint.read", again, on_hit=2) as point:
        convert(tmp_path / "run", tmp_path / "there", to="safetensors")
    assert point.hits == 1
    assert_same(content(tmp_path / "there")[0], tensors)


def test_numpy_views_of_tensors_are_whole(tmp_path: Path) -> None:
    assert np.array_equal(array_of(torch.arange(6).reshape(2, 3).t()), np.arange(6).reshape(2, 3).T)
