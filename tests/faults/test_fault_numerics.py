"""Wrong numbers and wrong data in a trainer: exactly what the plan says, in the step that it says, and nothing else."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distrain.core.failpoints import FAILPOINTS, hit
from distrain.faults.inject import FaultPlan, Injector, Record, arm, read_truth
from distrain.faults.inject.engines.numerics import flip_bit


@contextmanager
def armed(plan: FaultPlan, folder: Path, *, rank: int = 0) -> Iterator[None]:
    injector = Injector(plan, folder / "truth")
    with injector, arm(environ={**injector.variables, "RANK": str(rank)}):
        yield
    assert FAILPOINTS.names() == []


def records(folder: Path) -> list[Record]:
    return read_truth(folder / "truth")


def steps(gradients: Sequence[Tensor], *, num: int = 5) -> list[list[Tensor]]:
    """Gradients after the point of each step, which all begin with the same."""
    found = []
    for step in range(1, num + 1):
        mine = [gradient.clone() for gradient in gradients]
        hit("train.step", step=step)
        hit("train.gradients", step=step, gradients=mine)
        found.append(mine)
    return found


def changed(after: Sequence[Tensor], before: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Tensor and element of all bits that differ."""
    found = []
    for number, (one, other) in enumerate(zip(after, before, strict=True)):
        words = one.contiguous().view(torch.uint8) != other.contiguous().view(torch.uint8)
        differ = words.view(*one.shape, one.element_size()).any(-1).flatten()
        found += [(number, int(element)) for element in differ.nonzero()]
    return found


GRADIENTS = (torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(1, 2, 7))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bit", [0, 5, -1])
def test_a_flipped_bit_is_one_bit_whatever_the_strides(dtype: torch.dtype, bit: int) -> None:
    tensor = torch.linspace(1, 2, 12, dtype=dtype).view(3, 4).t()
    before, num_bits = tensor.clone(), 8 * tensor.element_size()
    bit %= num_bits
    flip_bit(tensor, 5, bit)
    assert changed([tensor], [before]) == [(0, 5)]
    word = {16: torch.int16, 32: torch.int32, 64: torch.int64}[num_bits]
    difference = tensor.flatten()[5].view(word) ^ before.flatten()[5].view(word)
    assert int(difference) % 2**num_bits == 1 << bit
    flip_bit(tensor, 5, bit)
    assert torch.equal(tensor, before)


def test_a_flip_hits_the_chosen_bit_of_one_step(tmp_path: Path) -> None:
    plan = FaultPlan().inject("numeric.bitflip", ranks=[0], tensor=1, element=3, bit=31).at(step=2)
    with armed(plan, tmp_path):
        after = steps(GRADIENTS)
    assert [changed(each, GRADIENTS) for each in after] == [[], [(1, 3)], [], [], []]
    assert after[1][1][3] == -GRADIENTS[1][3]
    (record,) = records(tmp_path)
    assert (record.step, record.detail) == (2, {"tensor": 1, "element": 3, "bit": 31})


def test_a_flip_by_chance_is_the_same_in_every_run_of_a_seed(tmp_path: Path) -> None:
    def run(seed: int, rank: int, name: str) -> list[tuple[int, int]]:
        plan = FaultPlan(seed=seed).inject("numeric.bitflip", ranks=[0, 1]).at(step=3)
        with armed(plan, tmp_path / name, rank=rank):
            (hit_,) = changed(steps(GRADIENTS)[2], GRADIENTS)
        (record,) = records(tmp_path / name)
        assert (record.detail["tensor"], record.detail["element"]) == hit_
        return [hit_, (record.detail["bit"], 0)]

    runs = [run(seed, rank, f"{n}") for n, (seed, rank) in enumerate([(1, 0), (1, 0), (1, 1), (2, 0)])]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2] and runs[0] != runs[3]


def test_nan_and_zero_last_as_many_steps_as_they_say(tmp_path: Path) -> None:
    plan = (
        FaultPlan()
        .inject("numeric.nan", ranks=[0], tensor=0, element=11, times=2)
        .at(step=2)
        .inject("numeric.zero", ranks=[0], tensor=1, times=0)
        .at(step=4)
    )
    with armed(plan, tmp_path):
        after = steps(GRADIENTS)
    assert [bool(each[0].isnan().any()) for each in after] == [False, True, True, False, False]
    assert after[1][0].isnan().flatten().tolist() == [False] * 11 + [True]
    assert [bool((each[1] == 0).all()) for each in after] == [False, False, False, True, True]
    assert [record.kind for record in records(tmp_path)] == ["numeric.nan", "numeric.zero"]


def test_another_rank_computes_what_it_should(tmp_path: Path) -> None:
    with armed(FaultPlan().inject("numeric.zero", ranks=[1]), tmp_path, rank=0):
        assert all(not changed(each, GRADIENTS) for each in steps(GRADIENTS))
    assert records(tmp_path) == []


def test_gradients_that_need_grad_history_can_be_hit(tmp_path: Path) -> None:
    leaf = torch.ones(4, requires_grad=True)
    with armed(FaultPlan().inject("numeric.nan", ranks=[0], element=2).at(step=1), tmp_path):
        hit("train.gradients", step=1, gradients=[leaf])
    assert leaf.isnan().tolist() == [False, False, True, False]


def test_corrupted_data_are_other_tokens_that_the_model_knows(tmp_path: Path) -> None:
    inputs = torch.arange(12).view(3, 4)
    with armed(FaultPlan().inject("data.corrupt", ranks=[0]).at(step=2), tmp_path):
        batches = [inputs.clone() for _ in range(3)]
        for step, batch in enumerate(batches, start=1):
            hit("train.data", step=step, inputs=[batch])
    assert torch.equal(batches[0], inputs) and torch.equal(batches[2], inputs)
    assert not (batches[1] == inputs).any()
    assert sorted(batches[1].flatten().tolist()) == inputs.flatten().tolist()


def test_a_stalled_read_holds_up_its_thread_and_no_other(tmp_path: Path) -> None:
    durations = {}

    def read() -> None:
        for step in range(1, 4):
            start = time.monotonic()
            hit("train.data", step=step, inputs=[])
            durations[step] = time.monotonic() - start

    with armed(FaultPlan().inject("data.stall", ranks=[0]).at(step=2).lasting(0.4), tmp_path):
        reader = threading.Thread(target=read)
        reader.start()
        while not records(tmp_path):
            time.sleep(0.001)
        assert 2 not in durations  # we go on while it waits
        reader.join()
    assert durations[2] >= 0.4 > max(durations[1], durations[3])
