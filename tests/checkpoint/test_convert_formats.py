"""What others wrote we read, what we wrote others read, and what is dangerous is refused."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from distrain.checkpoint.convert import convert
from distrain.checkpoint.convert.run import open_source
from distrain.checkpoint.convert.safetensors import INDEX
from distrain.checkpoint.errors import DamageError
from distrain.checkpoint.safe_state import decode
from distrain.checkpoint.torch_memory import array_of, dtype_name
from distrain.core.errors import ConfigError
from helpers.checkpoints import whole, write_checkpoint
from helpers.ranks import run_ranks

TENSORS = {
    "model.w": torch.arange(35.0).reshape(5, 7),
    "model.half": torch.arange(8.0).to(torch.bfloat16),
    "model.eighth": torch.arange(5.0).to(torch.float8_e5m2),
    "model.flag": torch.tensor(True),
    "model.empty": torch.zeros(0, 2),
    "optimizer.state.w.exp_avg": torch.full((5, 7), 0.5),
}


def save(root: Path, tensors: dict[str, Tensor], **kwargs: Any) -> Path:
    shards = [whole(name, dtype_name(tensor.dtype), array_of(tensor)) for name, tensor in tensors.items()]
    return write_checkpoint(root, [shards], **kwargs)


def read(path: Path) -> dict[str, Tensor]:
    return dict(open_source(path)[1].read())


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert array_of(got[name]).tobytes() == array_of(tensor).tobytes(), name


class Trap:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


# safetensors


def test_the_safetensors_library_reads_our_files_and_we_read_its(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    save(tmp_path / "run", TENSORS)
    convert(tmp_path / "run", tmp_path / "ours", to="safetensors")
    assert_same(library.load_file(tmp_path / "ours" / "model.safetensors"), TENSORS)
    library.save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"note": "kept by nobody"})
    done = convert(tmp_path / "theirs.safetensors", tmp_path / "back", to="distrain")
    assert done.left_out == ("note",)
    assert_same(read(tmp_path / "back"), TENSORS)


def test_safetensors_are_cut_into_files_with_an_index(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    save(tmp_path / "run", TENSORS)
    convert(tmp_path / "run", tmp_path / "ours", to="safetensors", shard_bytes=150)
    names = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert names == [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    assert len(names) == 3
    index = json.loads((tmp_path / "ours" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    found = {
        name: tensor
        for file in names
        for name, tensor in library.load_file(tmp_path / "ours" / file).items()
        if index["weight_map"][name] == file
    }
    assert_same(found, TENSORS)
    assert_same(read(tmp_path / "ours"), TENSORS)


def header(**entries: Any) -> bytes:
    document = json.dumps(entries).encode()
    return len(document).to_bytes(8, "little") + document


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        (10**12).to_bytes(8, "little") + b"{}",
        header(w={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}) + bytes(7),
        header(w={"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}) + bytes(8),
        header(w={"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}) + bytes(8),
        header(w={"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}) + bytes(8),
        header(w={"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}) + bytes(8),
        header(w={"dtype": "F32", "shape": [2]}) + bytes(8),
        header(w=[1]) + bytes(8),
        header(__metadata__={"distrain.objects": 5}) + bytes(8),
        header(__metadata__={"distrain.objects": "{"}),
        header()[:-1],
    ],
)
def test_forged_safetensors_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(DamageError):
        convert(tmp_path / "bad.safetensors", tmp_path / "there", to="distrain")
    assert not (tmp_path / "there").exists()


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    save(tmp_path / "run", TENSORS)
    convert(tmp_path / "run", tmp_path / "ours", to="safetensors")
    (tmp_path / "ours" / INDEX).write_text(json.dumps({"weight_map": {"w": "../ours/model.safetensors"}}))
    with pytest.raises(DamageError, match="without folders"):
        convert(tmp_path / "ours", tmp_path / "there", to="distrain")


def test_what_safetensors_cannot_hold_is_listed(tmp_path: Path) -> None:
    save(tmp_path / "run", {"a": torch.zeros(1, dtype=torch.complex128), "b": torch.zeros(1)})
    with pytest.raises(ConfigError, match="no dtype for a") as caught:
        convert(tmp_path / "run", tmp_path / "there", to="safetensors")
    assert len(caught.value.problems) == 1 and not (tmp_path / "there").exists()


# torch's DCP


def save_with_torch(rank: int, world_size: int, path: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    state = {
        "model": {
            "w": distribute_tensor(TENSORS["model.w"], mesh, [Shard(0)]),
            "half": distribute_tensor(TENSORS["model.half"], mesh, [Shard(0)]),
            "flag": TENSORS["model.flag"],
        },
        "step": 5,
        "optimizer": {"lr": 0.5, "betas": (0.9, 0.99)},
    }
    dcp.save(state, checkpoint_id=path)


@pytest.mark.ranks
def test_what_torch_saved_from_several_ranks_becomes_ours(tmp_path: Path) -> None:
    run_ranks(save_with_torch, 2, str(tmp_path / "theirs"))
    done = convert(tmp_path / "theirs", tmp_path / "ours", to="distrain")
    assert (done.source_format, done.path.name) == ("dcp", "step-00000005")
    assert_same(
        read(tmp_path / "ours"), {name: TENSORS[name] for name in ("model.w", "model.half", "model.flag")}
    )
    objects = open_source(tmp_path / "ours")[1].objects
    assert {name: decode(value) for name, value in objects.items()} == {
        "step": 5,
        "optimizer.lr": 0.5,
        "optimizer.betas": (0.9, 0.99),
    }


def load_with_torch(rank: int, world_size: int, path: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    state: dict[str, Any] = {
        "model": {
            "w": distribute_tensor(torch.zeros(5, 7), mesh, [Shard(1)]),
            "half": torch.zeros(8, dtype=torch.bfloat16),
        },
        "optimizer.state.w.exp_avg": torch.zeros(5, 7),
        "seed": 0,
    }
    dcp.load(state, storage_reader=FileSystemReader(path))
    assert torch.equal(state["model"]["w"].full_tensor(), TENSORS["model.w"])
    assert torch.equal(state["model"]["half"], TENSORS["model.half"])
    assert torch.equal(state["optimizer.state.w.exp_avg"], TENSORS["optimizer.state.w.exp_avg"])
    assert state["seed"] == 2**70


@pytest.mark.ranks
def test_torch_loads_what_we_made_for_it(tmp_path: Path) -> None:
    save(tmp_path / "run", TENSORS, objects={"seed": 2**70})
    convert(tmp_path / "run", tmp_path / "theirs", to="dcp")
    run_ranks(load_with_torch, 2, str(tmp_path / "theirs"))


def test_large_checkpoints_become_several_files_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distrain.checkpoint.convert.dcp.PART_BYTES", 150)
    save(tmp_path / "run", TENSORS, objects={"seed": 1})
    convert(tmp_path / "run", tmp_path / "theirs", to="dcp")
    assert len(list((tmp_path / "theirs").glob("*.distcp"))) == 3
    convert(tmp_path / "theirs", tmp_path / "ours", to="distrain")
    assert_same(read(tmp_path / "ours"), TENSORS)
    assert decode(open_source(tmp_path / "ours")[1].objects["seed"]) == 1


def metadata_of(path: Path) -> Any:
    return pickle.loads((path / ".metadata").read_bytes())


@pytest.mark.parametrize("where", ["metadata", "planner", "object", "path"])
def test_a_dcp_folder_that_would_run_code_or_read_elsewhere_is_refused(tmp_path: Path, where: str) -> None:
    save(tmp_path / "run", TENSORS, objects={"seed": 1})
    convert(tmp_path / "run", tmp_path / "theirs", to="dcp")
    metadata, mark = metadata_of(tmp_path / "theirs"), tmp_path / "ran"
    content: Any = metadata
    if where == "metadata":
        content = Trap(mark)
    elif where == "planner":
        metadata.planner_data = {"w": Trap(mark)}
    elif where == "path":
        next(iter(metadata.storage_data.values())).relative_path = "../theirs/__0_0.distcp"
    else:
        info = next(info for index, info in metadata.storage_data.items() if index.fqn == "seed")
        trap = pickle.dumps(Trap(mark), protocol=2)
        with (tmp_path / "theirs" / info.relative_path).open("r+b") as file:
            file.seek(info.offset)
            file.write(trap)
    (tmp_path / "theirs" / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(DamageError):
        convert(tmp_path / "theirs", tmp_path / "there", to="distrain")
    assert not mark.exists() and not (tmp_path / "there").exists()


# DeepSpeed universal

FLOATS = {
    "model.layers.0.w": torch.arange(35.0).reshape(5, 7),
    "model.norm": torch.arange(8.0).to(torch.bfloat16),
    "optimizer.state.layers.0.w.exp_avg": torch.full((5, 7), 0.5),
    "optimizer.state.layers.0.w.exp_avg_sq": torch.full((5, 7), 0.25),
}
STEPS = {
    "optimizer": {
        "values": {"layers.0.w": {"step": 9.0}},
        "param_groups": [{"lr": 0.1, "params": ["layers.0.w"]}],
    }
}


def test_each_state_of_each_parameter_lies_where_deepspeed_looks_for_it(tmp_path: Path) -> None:
    save(tmp_path / "run", FLOATS, step=9, objects=STEPS)
    convert(tmp_path / "run", tmp_path / "universal", to="deepspeed")
    zero = tmp_path / "universal" / "zero"

    def load(name: str) -> Any:
        return torch.load(zero / name, weights_only=True)

    assert torch.equal(load("layers.0.w/fp32.pt")["param"], FLOATS["model.layers.0.w"])
    assert torch.equal(load("norm/fp32.pt")["param"], FLOATS["model.norm"].float())
    assert torch.equal(load("layers.0.w/exp_avg_sq.pt")["param"], torch.full((5, 7), 0.25))
    assert load("layers.0.w/step.pt") == 9 and not (zero / "norm" / "step.pt").exists()
    assert load("optimizer_state.pt")["param_groups"] == [{"lr": 0.1}]
    assert (zero / "norm" / "fp32.pt").stat().st_size < 4096  # nothing of what shared its memory


def test_what_distrain_train_saved_lies_there_too(tmp_path: Path) -> None:
    tensors = {
        "train.model.layers.0.w": torch.ones(3, 2),
        "train.exp_avg.layers.0.w": torch.full((3, 2), 2.0),
        "train.exp_avg_sq.layers.0.w": torch.full((3, 2), 3.0),
    }
    save(tmp_path / "run", tensors, step=6, objects={"train": {"step": 6, "data": {}}})
    done = convert(tmp_path / "run", tmp_path / "universal", to="deepspeed")
    assert not done.left_out
    convert(tmp_path / "universal", tmp_path / "ours", to="distrain")
    assert_same(
        read(tmp_path / "ours"),
        {
            "model.layers.0.w": tensors["train.model.layers.0.w"],
            "optimizer.state.layers.0.w.exp_avg": tensors["train.exp_avg.layers.0.w"],
            "optimizer.state.layers.0.w.exp_avg_sq": tensors["train.exp_avg_sq.layers.0.w"],
        },
    )
    objects = open_source(tmp_path / "ours")[1].objects
    assert decode(objects["optimizer"])["values"] == {"layers.0.w": {"step": 6.0}}


def test_a_universal_folder_becomes_ours(tmp_path: Path) -> None:
    zero = tmp_path / "universal" / "zero"
    for name in ("fp32", "exp_avg"):
        (zero / "norm").mkdir(parents=True, exist_ok=True)
        torch.save({"param": torch.full((3,), float(len(name))), "cat_dim": 0}, zero / "norm" / f"{name}.pt")
    torch.save(torch.tensor(4.0), zero / "norm" / "step.pt")
    torch.save({"param_groups": []}, zero / "optimizer_state.pt")
    done = convert(tmp_path / "universal", tmp_path / "ours", to="distrain")
    assert done.path.name == "step-00000004" and done.left_out == ("zero/optimizer_state.pt",)
    assert_same(
        read(tmp_path / "ours"),
        {"model.norm": torch.full((3,), 4.0), "optimizer.state.norm.exp_avg": torch.full((3,), 7.0)},
    )


def test_a_universal_folder_that_would_run_code_is_refused(tmp_path: Path) -> None:
    zero, mark = tmp_path / "universal" / "zero", tmp_path / "ran"
    (zero / "w").mkdir(parents=True)
    torch.save({"param": torch.zeros(3), "more": Trap(mark)}, zero / "w" / "fp32.pt")
    with pytest.raises(DamageError, match="plain tensors"):
        convert(tmp_path / "universal", tmp_path / "there", to="distrain")
    assert not mark.exists()


def test_names_that_would_leave_the_universal_folder_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "run", {"model.../../x": torch.zeros(1)})
    with pytest.raises(ConfigError, match="name of a folder"):
        convert(tmp_path / "run", tmp_path / "there", to="deepspeed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
