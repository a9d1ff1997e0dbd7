"""The checkpointer in a loop of one's own: what comes back is what was there."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import distrain
from distrain.checkpoint.cadence import Auto
from distrain.checkpoint.checkpointer import Checkpointer
from distrain.checkpoint.keeper_config import TierConfig
from distrain.checkpoint.locate import locate
from distrain.core.errors import ConfigError, DataError
from distrain.core.events import read_events
from helpers.keeper_processes import kill_keepers

pytestmark = pytest.mark.processes


@pytest.fixture(autouse=True)
def own_runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keepers of this test live, and end, in a folder of their own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    yield
    kill_keepers(tmp_path)


class Loop:
    """A small model with running statistics, trained on random numbers."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Dropout(0.2), nn.Linear(32, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        self.notes: dict[str, Any] = {"seen": 0, "history": torch.zeros(3)}

    def step(self) -> float:
        x = torch.randn(16, 8) + np.random.rand() + random.random()
        loss = self.model(x).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.notes["seen"] += 16
        self.notes["history"][self.notes["seen"] % 3] = loss.item()
        return float(loss.detach())

    def track(self, checkpoints: Checkpointer) -> Checkpointer:
        checkpoints.track(
            model=self.model, optimizer=self.optimizer, schedule=self.schedule, notes=self.notes
        )
        return checkpoints


def seeded() -> None:
    random.seed(1)
    np.random.seed(1)


@pytest.mark.parametrize("lazy", [True, False])
def test_a_restored_loop_goes_on_to_the_bit(tmp_path: Path, lazy: bool) -> None:
    seeded()
    whole = Loop()
    expected = [whole.step() for _ in range(8)]
    seeded()
    first = Loop()
    with first.track(Checkpointer(tmp_path / "run", every=2, lazy=lazy, device="cpu")) as checkpoints:
        losses = []
        for step in range(5):  # the fifth step is lost
            losses.append(first.step())
            checkpoints.step(step + 1)
        assert checkpoints.wait(4).reached
    assert losses == expected[:5]
    second = Loop(seed=9)
    with second.track(Checkpointer(tmp_path / "run", every=2, lazy=lazy, device="cpu")) as checkpoints:
        assert checkpoints.restore() == 4
        assert [second.step() for _ in range(4)] == expected[4:]
        params = [param for group in second.optimizer.param_groups for param in group["params"]]
        assert list(map(id, second.optimizer.state)) == list(map(id, params))
        assert second.notes["seen"] == whole.notes["seen"]
        assert torch.equal(second.notes["history"], whole.notes["history"])
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_nothing_saved_restores_nothing(tmp_path: Path) -> None:
    loop = Loop()
    before = {name: value.clone() for name, value in loop.model.state_dict().items()}
    with loop.track(Checkpointer(tmp_path / "run", device="cpu")) as checkpoints:
        assert checkpoints.restore() == 0
    for name, value in loop.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    loop = Loop()
    with loop.track(Checkpointer(tmp_path / "run", device="cpu")) as checkpoints:
        for step in (1, 2):
            loop.step()
            checkpoints.step(step)
            assert checkpoints.wait(step).reached
    newest = locate(tmp_path / "run")
    assert newest.manifest.step == 2
    blob = tmp_path / "run" / newest.folder / "data" / "0" / "0"
    with blob.open("r+b") as file:
        file.seek(64)
        byte = file.read(1)
        file.seek(64)
        file.write(bytes([byte[0] ^ 1]))
    kill_keepers(tmp_path)  # whose memory would still have step 2
    with Loop(seed=3).track(Checkpointer(tmp_path / "run", device="cpu")) as checkpoints:
        assert checkpoints.restore() == 1


def test_memory_restores_what_never_reached_the_disk(tmp_path: Path) -> None:
    tiers = [TierConfig(url=str(tmp_path / "run"), every=100)]
    loop = Loop()
    checkpoints = loop.track(Checkpointer(tmp_path / "run", tiers=tiers, device="cpu"))
    for step in (1, 2, 3):
        loop.step()
        checkpoints.step(step)
    assert checkpoints.wait(3, level="protected").reached
    expected = {name: value.clone() for name, value in loop.model.state_dict().items()}
    other = Loop(seed=3)
    assert other.track(checkpoints).restore() == 3
    for name, value in other.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    checkpoints.close(flush=False)


def test_another_model_is_refused_with_all_that_does_not_fit(tmp_path: Path) -> None:
    loop = Loop()
    with loop.track(Checkpointer(tmp_path / "run", device="cpu")) as checkpoints:
        loop.step()
        checkpoints.step(1)
        assert checkpoints.wait(1).reached
    other = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 4))
    checkpoints = Checkpointer(tmp_path / "run", device="cpu")
    checkpoints.track(model=other)
    with checkpoints, pytest.raises(ConfigError) as refused:
        checkpoints.restore(strict=False)
    assert all(
        name in str(refused.value) for name in ("model.0.weight", "model.3.weight", "model.1.running_mean")
    )


def test_a_part_can_be_restored(tmp_path: Path) -> None:
    loop = Loop()
    with loop.track(Checkpointer(tmp_path / "run", device="cpu")) as checkpoints:
        loop.step()
        checkpoints.step(1)
        assert checkpoints.wait(1).reached
    other = Loop(seed=5)
    checkpoints = Checkpointer(tmp_path / "run", device="cpu")
    checkpoints.track(model=other.model)
    with checkpoints:
        with pytest.raises(ConfigError, match="nothing asks for it"):
            checkpoints.restore()
        assert checkpoints.restore(strict=False) == 1
    theirs, ours = (each.model.state_dict()["0.weight"] for each in (other, loop))
    assert torch.equal(theirs, ours)


def test_a_checkpoint_that_is_given_up_ends_a_strict_loop(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tiers = [TierConfig(url=str(tmp_path / "file" / "below"))]
    checkpoints = Loop().track(Checkpointer(tmp_path / "run", tiers=tiers, strict=True, device="cpu"))
    checkpoints.step(1)
    with pytest.raises(DataError, match="has failed") as caught:
        checkpoints.close()
    assert "step 1" in str(caught.value) and "is given up" in str(caught.value)


def test_what_ends_a_strict_loop_is_not_hidden_by_a_checkpoint_that_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tiers = [TierConfig(url=str(tmp_path / "file" / "below"))]
    checkpoints = Loop().track(Checkpointer(tmp_path / "run", tiers=tiers, strict=True, device="cpu"))
    with pytest.raises(KeyboardInterrupt), checkpoints:
        checkpoints.step(1)
        raise KeyboardInterrupt


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path / "run", device="cpu")
    checkpoints.track(thing=object())
    with pytest.raises(ConfigError, match="thing cannot be tracked"):
        checkpoints.restore()
    checkpoints.close()


def test_three_lines_attach_a_loop(tmp_path: Path) -> None:
    losses = []
    for until in (3, 5):
        loop = Loop(seed=until)
        with distrain.attach(
            tmp_path / "run", model=loop.model, optimizer=loop.optimizer, schedule=loop.schedule, device="cpu"
        ) as run:
            for step in range(run.restore(), until):
                losses.append(loop.step())
                run.step(step + 1, loss=losses[-1])
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert [(event.step, event.value) for event in events] == list(enumerate(losses, start=1))


def test_a_handle_tells_how_far_a_save_is_and_any_step_can_be_loaded(tmp_path: Path) -> None:
    loop = Loop()
    with loop.track(Checkpointer(tmp_path / "run", device="cpu")) as checkpoints:
        kept: dict[int, torch.Tensor] = {}
        for step in (1, 2, 3):
            loop.step()
            handle = checkpoints.save(step)
            assert handle and handle.step == step
            kept[step] = loop.model.state_dict()["0.weight"].detach().clone()
            handle.fence()
            assert handle.wait("sealed").reached
            assert handle.wait().committed
        for step in [2, 3, 1]:
            checkpoints.load(step)
            assert torch.equal(loop.model.state_dict()["0.weight"], kept[step])
        with pytest.raises(DataError, match="step 7 cannot be loaded"):
            checkpoints.load(7)


def test_the_automatic_interval_measures_and_then_saves_seldom(tmp_path: Path) -> None:
    loop = Loop()
    every = Auto(overhead=0.01, node_mtbf_h=1e6)
    with loop.track(Checkpointer(tmp_path / "run", every=every, device="cpu")) as checkpoints:
        saved = []
        for step in range(1, 30):
            loop.step()
            if checkpoints.step(step):
                saved.append(step)
    assert saved == [1, 2]
