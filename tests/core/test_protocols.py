"""Protocols hold for what they were written for, and boxes stay inside their tensors."""

import pytest
import torch

from distrain.core.protocols import ShardBox, Stateful


def test_what_torch_offers_is_stateful_and_a_dict_is_not() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    assert all(isinstance(thing, Stateful) for thing in (model, optimizer, scheduler))
    assert not isinstance({}, Stateful)


def box(offset: tuple[int, ...], shape: tuple[int, ...]) -> ShardBox:
    return ShardBox(fqn="w", dtype="float32", global_shape=(4, 6), offset=offset, shape=shape)


def test_a_box_may_touch_the_edges_of_its_tensor_and_be_empty() -> None:
    assert box((0, 0), (4, 6)) == box((0, 0), (4, 6))
    assert box((4, 0), (0, 6)).shape == (0, 6)
    assert ShardBox(fqn="s", dtype="float32", global_shape=(), offset=(), shape=()).shape == ()


@pytest.mark.parametrize(
    ("offset", "shape"),
    [((1, 0), (4, 6)), ((-1, 0), (1, 1)), ((0, 0), (-1, 1)), ((0,), (4,)), ((0, 7), (4, 0))],
)
def test_a_box_that_leaves_its_tensor_is_refused(offset: tuple[int, ...], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        box(offset, shape)
