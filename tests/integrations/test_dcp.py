"""torch.distributed.checkpoint on Distrain's storage: what is saved by some ranks is loaded by others, unpickled."""

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from distrain.checkpoint.locate import locate
from distrain.core.failpoints import FAILPOINTS
from distrain.integrations.dcp import DistrainStager, DistrainStorageReader, DistrainStorageWriter
from helpers.ranks import run_ranks

pytestmark = pytest.mark.ranks

SHAPES = {"rows": (7, 3), "columns": (2, 5), "few": (1, 4), "copies": (3,), "number": ()}


def values(name: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(SHAPES[name], generator=generator).to(dtype)


def state_of(world_size: int, placements: dict[str, Any], *, fill: bool) -> dict[str, Any]:
    """Sharded and plain tensors and other things, nested; zeros unless ``fill``."""
    mesh = init_device_mesh("cpu", (world_size,))

    def tensor(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        full = values(name, dtype)
        return full if fill else torch.zeros_like(full)

    sharded = {name: distribute_tensor(tensor(name), mesh, [place]) for name, place in placements.items()}
    return {
        "model": {
            **sharded,
            "number": tensor("number"),
            "half": tensor("rows", torch.bfloat16).t(),
            "complex": torch.complex(tensor("copies"), tensor("copies")).conj()
            if fill
            else torch.zeros(3) * 1j,
            "empty": torch.zeros(0, 3),
        },
        "optimizer": [
            {
                "lr": 0.1 if fill else 0.0,
                "betas": (0.9, 0.95) if fill else None,
                "names": ["a", "b"] if fill else [],
            },
            {"moments": tensor("copies", torch.float64)},
        ],
        "step": 12 if fill else 0,
    }


def full(value: Any) -> Any:
    """Without sharding, to compare."""
    if isinstance(value, dict):
        return {key: full(each) for key, each in value.items()}
    if isinstance(value, list):
        return [full(each) for each in value]
    return value.full_tensor() if isinstance(value, DTensor) else value


def assert_equal(got: Any, want: Any, path: str = "state") -> None:
    if isinstance(want, Tensor):
        assert (got.dtype, got.shape) == (want.dtype, want.shape) and torch.equal(got, want), path
    elif isinstance(want, dict | list):
        assert type(got) is type(want) and len(got) == len(want), path
        for key in want if isinstance(want, dict) else range(len(want)):
            assert_equal(got[key], want[key], f"{path}[{key!r}]")
    else:
        assert (type(got), got) == (type(want), want), path


SAVED_AS = {"rows": Shard(0), "columns": Shard(1), "few": Shard(0), "copies": Replicate()}
LOADED_AS = {"rows": Shard(1), "columns": Replicate(), "few": Shard(1), "copies": Shard(0)}


def save_state(rank: int, world_size: int, path: str) -> None:
    state = state_of(world_size, SAVED_AS, fill=True)
    dcp.save(state, storage_writer=DistrainStorageWriter(path, job="a job"))


def load_state(rank: int, world_size: int, path: str) -> None:
    state = state_of(world_size, LOADED_AS, fill=False)
    dcp.load(state, storage_reader=DistrainStorageReader(path))
    assert_equal(full(state), full(state_of(world_size, SAVED_AS, fill=True)))


@pytest.mark.parametrize(("num_savers", "num_loaders"), [(2, 3), (3, 1)])
def test_dtensors_plain_tensors_and_objects_load_with_other_ranks_and_placements(
    tmp_path: Path, num_savers: int, num_loaders: int
) -> None:
    path = str(tmp_path / "step-12")
    run_ranks(save_state, num_savers, path)
    run_ranks(load_state, num_loaders, path)
    run_ranks(load_state, 1, str(tmp_path))  # the newest below the root


def test_nothing_on_disk_is_a_pickle(tmp_path: Path) -> None:
    run_ranks(save_state, 2, str(tmp_path / "step-12"))
    found = locate(tmp_path)
    assert found.folder == "step-00000012" and found.manifest.job == "a job"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"0", "zarr.json", "manifest.json", "latest"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        assert not path.read_bytes().startswith((b"\x80", b"PK"))
    assert found.manifest.object("step") == 12
    assert found.manifest.tensors["model.half"].dtype == "bfloat16"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.second = nn.Linear(7, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu())  # type: ignore[no-any-return]


def sharded_net(world_size: int, seed: int, num_steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in (model.first, model.second, model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
    for _ in range(num_steps):
        model(torch.randn(6, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def train_and_save(rank: int, world_size: int, path: str) -> Any:
    model, optimizer = sharded_net(world_size, seed=1, num_steps=3)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.save(state, storage_writer=DistrainStorageWriter(path))
    return full(state)


def load_and_return(rank: int, world_size: int, path: str) -> Any:
    model, optimizer = sharded_net(world_size, seed=2, num_steps=1)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, storage_reader=DistrainStorageReader(path))
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    return full(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)))


def test_models_under_fsdp2_and_their_optimizers_resume_with_another_number_of_ranks(tmp_path: Path) -> None:
    path = str(tmp_path / "7")
    (saved, _) = run_ranks(train_and_save, 2, path)
    for loaded in run_ranks(load_and_return, 3, path):
        assert_equal(loaded, saved)


def load_part(rank: int, world_size: int, path: str) -> None:
    state = state_of(world_size, LOADED_AS, fill=False)
    part: dict[str, Any] = {"model": {"rows": state["model"]["rows"]}, "step": 0}
    dcp.load(part, storage_reader=DistrainStorageReader(path))
    assert part["step"] == 12
    assert_equal(full(part["model"]["rows"]), values("rows", torch.float32))

    more = {"model": {"columns": state["model"]["columns"], "unknown": torch.full((2,), 5.0)}}
    dcp.load(
        more,
        storage_reader=DistrainStorageReader(path),
        planner=DefaultLoadPlanner(allow_partial_load=True),
    )
    assert_equal(full(more["model"]["columns"]), values("columns", torch.float32))
    assert more["model"]["unknown"].tolist() == [5.0, 5.0]
    with pytest.raises(CheckpointException, match="Missing key"):
        dcp.load(more, storage_reader=DistrainStorageReader(path))

    wider: dict[str, Any] = {"model": {"half": torch.zeros(3, 7)}}  # torch's own reader converts too
    dcp.load(wider, storage_reader=DistrainStorageReader(path))
    assert_equal(wider["model"]["half"], values("rows", torch.bfloat16).t().float())


def test_parts_of_a_checkpoint_load_into_what_is_asked_for(tmp_path: Path) -> None:
    path = str(tmp_path / "step_3")
    run_ranks(save_state, 2, path)
    run_ranks(load_part, 2, path)


def fill(state: dict[str, Any], value: int) -> None:
    state["sharded"].to_local().fill_(value)
    state["plain"].fill_(value)
    state["nested"][0]["list"][0] = value


def save_in_background(rank: int, world_size: int, root: str) -> None:
    stager = DistrainStager()
    mesh = init_device_mesh("cpu", (world_size,))
    state: dict[str, Any] = {
        "sharded": distribute_tensor(torch.zeros(6, 4), mesh, [Shard(0)]),
        "plain": torch.zeros(5),
        "nested": [{"list": [0]}],
    }
    for step in range(4):
        fill(state, step)
        writer = DistrainStorageWriter(f"{root}/step-{step}")
        saving = dcp.async_save(state, storage_writer=writer, async_stager=stager)
        fill(state, -1)
        assert isinstance(saving, Future)
        saving.result()
    stager.close()
    for step in range(4):
        dcp.load(state, storage_reader=DistrainStorageReader(f"{root}/step-{step}"))
        assert full(state["sharded"]).unique().tolist() == [step]
        assert state["plain"].unique().tolist() == [step]
        assert state["nested"] == [{"list": [step]}]


def test_a_background_save_keeps_the_values_of_its_call_whatever_changes_after_it(tmp_path: Path) -> None:
    run_ranks(save_in_background, 2, str(tmp_path))


def save_with_hook(rank: int, world_size: int, path: str) -> str:
    state: dict[str, Any] = {"good": torch.ones(3), "optimizer": {"hook": print}}
    with pytest.raises(CheckpointException) as caught:
        dcp.save(state, storage_writer=DistrainStorageWriter(path))
    return str(caught.value)


def test_what_has_no_safe_form_is_refused_by_name_and_nothing_is_committed(tmp_path: Path) -> None:
    texts = run_ranks(save_with_hook, 2, str(tmp_path / "step-1"))
    assert all("optimizer.hook cannot be saved without pickle" in text for text in texts)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".tmp-")]


def save_twice(rank: int, world_size: int, path: str) -> None:
    def save(value: float) -> None:
        state = {
            "w": torch.full((4,), value),
            "v": distribute_tensor(torch.full((4,), value), mesh, [Shard(0)]),
        }
        dcp.save(state, storage_writer=DistrainStorageWriter(path))

    def load() -> list[float]:
        state: dict[str, Any] = {
            "w": torch.zeros(4),
            "v": distribute_tensor(torch.zeros(4), mesh, [Shard(0)]),
        }
        dcp.load(state, storage_reader=DistrainStorageReader(path))
        return [*state["w"].unique().tolist(), *full(state["v"]).unique().tolist()]

    mesh = init_device_mesh("cpu", (world_size,))
    save(1.0)
    for point in ("checkpoint.extent", "checkpoint.prepared", "checkpoint.manifest", "checkpoint.publish"):
        with FAILPOINTS.armed(point, OSError("gone")), pytest.raises(CheckpointException, match="gone"):
            save(2.0)
        assert load() == [1.0, 1.0]
    save(3.0)
    assert load() == [3.0, 3.0]


def test_a_save_that_fails_leaves_the_older_one_of_the_same_name(tmp_path: Path) -> None:
    run_ranks(save_twice, 2, str(tmp_path / "my checkpoint"))
    assert locate(tmp_path / "my checkpoint").folder == "step-00000000"


def test_staged_memory_is_used_again_only_when_nothing_refers_to_its_copies() -> None:
    stager = DistrainStager(num_slots=2, timeout_s=0.0)
    state: dict[str, Any] = {
        "a": torch.arange(5.0),
        "b": torch.zeros(0),
        "c": [torch.ones((), dtype=torch.bfloat16)],
    }
    first = stager.stage(state)
    assert_equal(first, state)
    second = stager.stage(state)
    assert first["a"].data_ptr() != second["a"].data_ptr()
    with pytest.raises(Exception, match="all 2 slots"):
        stager.stage(state)
    memory, part = first["a"].data_ptr(), first["a"][2:]
    del first
    with pytest.raises(Exception, match="all 2 slots"):  # a view of a copy counts
        stager.stage(state)
    assert part.tolist() == [2.0, 3.0, 4.0]
    del part
    assert stager.stage(state)["a"].data_ptr() == memory
