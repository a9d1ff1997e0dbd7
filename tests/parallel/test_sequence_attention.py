"""Sequence-parallel attention against plain softmax in one process: outputs and gradients, in float64."""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distrain.core.errors import ConfigError
from distrain.core.protocols import CollectiveCall
from distrain.core.vocabulary import Degrees
from distrain.faults.inject.engines.intercept import intercept, through
from distrain.parallel import init
from distrain.parallel.sequence.attention import SequenceAttention
from distrain.parallel.sequence.layout import SequenceLayout
from distrain.parallel.sequence.ulysses import HeadSplit
from helpers.ranks import run_ranks

pytestmark = pytest.mark.ranks

LENGTHS = (1, 130, 2, 7, 3, 40)
FEATURES = 16


@dataclass(frozen=True)
class Case:
    """Groups of consecutive ranks, each with sequences of its own; ``heads`` are query and key/value heads."""

    groups: tuple[tuple[int, int], ...]
    """(ulysses, ring) of each"""
    lengths: tuple[tuple[int, ...], ...] = (LENGTHS,)
    heads: tuple[int, int] = (4, 2)
    window: int = 0
    dtype: torch.dtype = torch.float64
    multiple_of: int = 1

    @property
    def world_size(self) -> int:
        return sum(ulysses * ring for ulysses, ring in self.groups)

    def place_of(self, rank: int) -> tuple[int, int]:
        """The rank's group, and the group's first rank."""
        starts = [0, *accumulate(ulysses * ring for ulysses, ring in self.groups)]
        group = bisect_right(starts, rank) - 1
        return group, starts[group]

    def __str__(self) -> str:
        groups = "+".join(f"{ulysses}x{ring}" for ulysses, ring in self.groups)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{groups}-heads{self.heads[0]}/{self.heads[1]}-window{self.window}-{dtype}"


def tensors_of(sequence: tuple[int, int], case: Case) -> list[Tensor]:
    """q, k, v and the gradient of the output of one (group, length); the same wherever it lies."""
    generator = torch.Generator().manual_seed(1000 * sequence[0] + sequence[1])
    heads = (case.heads[0], case.heads[1], case.heads[1], case.heads[0])
    return [
        torch.randn(sequence[1], n, FEATURES, generator=generator, dtype=torch.float64).to(case.dtype)
        for n in heads
    ]


def plain(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Attention of one sequence as on paper."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (tensor.repeat_interleave(repeats, dim=1) for tensor in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) / math.sqrt(q.shape[2])
    ago = torch.arange(len(q))[:, None] - torch.arange(len(q))
    shown = (ago >= 0) & (ago < (window or len(q)))
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~shown, -torch.inf).softmax(-1), v)


def outcome(attend: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Output, and gradients of q, k and v."""
    leaves = [leaf.requires_grad_() for leaf in leaves]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def expected(group: int, case: Case) -> list[np.ndarray]:
    """Output and gradients of q, k and v of the group's sequences one after the other, in float64."""
    parts = []
    for length in case.lengths[group]:
        *leaves, grad = (tensor.double() for tensor in tensors_of((group, length), case))
        parts.append(outcome(lambda q, k, v: plain(q, k, v, case.window), leaves, grad))
    return [torch.cat(column).numpy() for column in zip(*parts, strict=True)] if parts else []


def local(whole: list[Tensor], layout: SequenceLayout, index: int) -> list[Tensor]:
    """This rank's tokens; padding is filled with rubbish that must not matter."""
    rows = torch.from_numpy(layout.tokens(index))
    padding = (rows < 0)[:, None, None]
    return [tensor[rows.clamp(min=0)].masked_fill(padding, 1e3) for tensor in whole]


def on_ranks(rank: int, world_size: int, case: Case) -> tuple[int, np.ndarray, list[np.ndarray]]:
    """(group, tokens, output and gradients) of one rank."""
    groups = init(Degrees(dp=world_size), device="cpu").groups
    group, first = case.place_of(rank)
    ulysses, ring = case.groups[group]
    layout = SequenceLayout.build(
        case.lengths[group], ulysses=ulysses, ring=ring, multiple_of=case.multiple_of
    )
    index = rank - first
    ranks = range(first, first + layout.degree)
    attention = SequenceAttention(layout, index=index, ranks=ranks, groups=groups, window=case.window)
    sequences = [tensors_of((group, length), case) for length in case.lengths[group]]
    heads = (case.heads[0], case.heads[1], case.heads[1], case.heads[0])
    empty = [torch.zeros(1, n, FEATURES, dtype=case.dtype) for n in heads]
    whole = [torch.cat(column) for column in zip(*sequences, strict=True)] or empty
    *leaves, grad = local(whole, layout, index)
    results = outcome(attention.attend, leaves, grad)
    assert [result.dtype for result in results] == [case.dtype] * 4
    dist.barrier()
    return group, layout.tokens(index), [result.double().numpy() for result in results]


def assert_equal_to_one_process(case: Case, tolerance: float) -> None:
    found = run_ranks(on_ranks, case.world_size, case)
    for group in range(len(case.groups)):
        mine = [(tokens, results) for number, tokens, results in found if number == group]
        order = np.concatenate([tokens for tokens, _ in mine])
        assert sorted(order[order >= 0]) == list(range(sum(case.lengths[group])))
        for index, want in enumerate(expected(group, case)):
            rows = np.concatenate([results[index] for _, results in mine])
            assert not rows[order < 0].any(), "padding gives and takes nothing"
            got = np.empty_like(want)
            got[order[order >= 0]] = rows[order >= 0]
            assert np.abs(got - want).max() <= tolerance * max(1.0, np.abs(want).max())


EXACT = [
    Case(((1, 1),), window=5),
    Case(((2, 1),)),
    Case(((1, 2),)),
    Case(((4, 1),)),
    Case(((1, 4),)),
    Case(((2, 2),)),
    Case(((2, 2),), window=9),
    Case(((1, 4),), window=150),
    Case(((1, 4),), window=17),
    Case(((1, 3),), window=1),
    Case(((4, 1),), heads=(6, 2)),
    Case(((3, 1),), heads=(8, 2)),
    Case(((4, 1),), heads=(4, 1), window=20),
    Case(((2, 2),), heads=(6, 3), multiple_of=4),
    Case(((1, 4),), lengths=((1, 2),)),
    Case(((4, 1),), lengths=((3,),)),
    Case(((1, 2),), lengths=((300, 5, 4, 3, 2, 1, 1, 1),), window=140),
    Case(((2, 1), (1, 1), (1, 1)), lengths=((90, 7), (31,), (2, 3))),
    Case(((1, 2), (1, 1), (1, 1)), lengths=((90, 7), (31,), ())),
    Case(((2, 1), (1, 2)), lengths=((), ())),
]


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_output_and_gradients_equal_plain_softmax_in_one_process(case: Case) -> None:
    assert_equal_to_one_process(case, 1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("group", [(4, 1), (1, 4), (2, 2)])
def test_narrower_types_agree_within_their_precision(
    group: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    assert_equal_to_one_process(Case((group,), dtype=dtype, lengths=((150, 7, 40),)), tolerance)


@pytest.mark.parametrize("group", [(4, 1), (1, 4), (2, 2)])
def test_packing_order_changes_nothing(group: tuple[int, int]) -> None:
    for lengths in (LENGTHS, LENGTHS[::-1], (40, 1, 3, 130, 7, 2)):
        assert_equal_to_one_process(Case((group,), lengths=(lengths,)), 1e-12)


def kept_bytes(rank: int, world_size: int, ulysses: int, ring: int, num_kv_heads: int) -> int:
    """Memory kept for the backward pass by one attention of this rank."""
    layout = SequenceLayout.build([700, 300], ulysses=ulysses, ring=ring)
    groups = init(Degrees(dp=world_size), device="cpu").groups
    attention = SequenceAttention(layout, index=rank, ranks=range(world_size), groups=groups)
    heads = (4, num_kv_heads, num_kv_heads)
    leaves = [torch.randn(layout.num_local, n, FEATURES, requires_grad=True) for n in heads]
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = attention.attend(*leaves)
    out.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("group", [(4, 1), (1, 4), (2, 2)])
def test_memory_of_a_rank_falls_with_the_degree(group: tuple[int, int]) -> None:
    (alone,) = run_ranks(kept_bytes, 1, 1, 1, 4)
    assert alone == 4 * 1000 * 4 * (4 * FEATURES + 1)
    assert run_ranks(kept_bytes, 4, *group, 4) == [alone / 4] * 4


def fails_in_the_middle(rank: int, world_size: int, ulysses: int, ring: int) -> str:
    """What a rank says when rank 1 fails between forward and backward."""
    layout = SequenceLayout.build([64], ulysses=ulysses, ring=ring)
    groups = init(Degrees(dp=world_size), device="cpu").groups
    attention = SequenceAttention(layout, index=rank, ranks=range(world_size), groups=groups)
    leaves = [torch.randn(layout.num_local, 4, FEATURES, requires_grad=True) for _ in range(3)]
    out = attention.attend(*leaves)
    dist.barrier()
    if rank == 1:
        dist.destroy_process_group()
        return "gone"
    try:
        out.sum().backward()
    except RuntimeError as error:
        return type(error).__name__
    return "went on"


@pytest.mark.parametrize("group", [(4, 1), (1, 4), (2, 2)])
def test_no_rank_waits_for_one_that_is_gone(group: tuple[int, int]) -> None:
    first, victim, *others = run_ranks(fails_in_the_middle, 4, *group)
    assert victim == "gone"
    assert [first, *others] == ["RuntimeError"] * 3


def test_too_many_ranks_for_the_heads_are_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError) as caught:
        HeadSplit.of(num_heads=2, num_kv_heads=2, num_ranks=4)
    assert "ulysses <= 2" in str(caught.value) and "ring" in str(caught.value)


def test_heads_that_do_not_divide_are_shared_and_their_keys_go_to_all_readers() -> None:
    split = HeadSplit.of(num_heads=6, num_kv_heads=2, num_ranks=4)
    assert split.queries == ((0, 1), (1, 3), (3, 4), (4, 6))
    assert split.keys == ((0, 1), (0, 1), (1, 2), (1, 2))


def test_autocast_counts_as_it_does_in_torchs_attention() -> None:
    attention = SequenceAttention(SequenceLayout.build([5, 3]))
    q, k, v = (torch.randn(8, 2, FEATURES) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention.attend(q, k, v).dtype is torch.bfloat16
    assert attention.attend(q, k, v).dtype is torch.float32


def traffic(rank: int, world_size: int, ulysses: int, ring: int) -> tuple[Counter[str], int]:
    """Collectives of one forward and backward, and the bytes of the first, as the one seam sees them."""
    seen: list[CollectiveCall] = []

    class Recorder:
        @contextmanager
        def collective(self, call: CollectiveCall) -> Iterator[None]:
            seen.append(call)
            yield

    layout = SequenceLayout.build([64], ulysses=ulysses, ring=ring)
    groups = init(Degrees(dp=world_size), device="cpu").groups
    attention = SequenceAttention(layout, index=rank, ranks=range(world_size), groups=groups)
    leaves = [torch.randn(layout.num_local, 4, FEATURES, requires_grad=True) for _ in range(3)]
    with ExitStack() as stack:
        intercept(through(Recorder()), stack)
        attention.attend(*leaves).sum().backward()
    return Counter(call.name for call in seen), seen[0].num_bytes


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ((4, 1), {"all_to_all": 4}),
        # Keys and values go round in both passes, their gradients once.
        ((1, 4), {"send": 9, "recv": 9}),
        ((2, 2), {"all_to_all": 4, "send": 3, "recv": 3}),
    ],
)
def test_all_traffic_passes_the_seam_of_records_and_faults(
    group: tuple[int, int], names: dict[str, int]
) -> None:
    for counts, num_bytes in run_ranks(traffic, 4, *group):
        assert counts == names
        sent = 2 if group == (1, 4) else 3  # k and v, or q too
        assert num_bytes == sent * 16 * 4 * FEATURES * 4
