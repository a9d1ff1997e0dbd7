"""The kernels of sequence attention against plain softmax, with all places of a ring in one process."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from distrain.parallel.sequence.attention import SequenceAttention
from distrain.parallel.sequence.layout import SequenceLayout
from distrain.parallel.sequence.loop import FlashCpu, LoopKernel, Plain
from distrain.parallel.sequence.packed import Call, FlashCuda, PackedKernel
from distrain.parallel.sequence.varlen import Kernel, Piece, Saved, pieces

LENGTHS = (1, 130, 2, 7, 300, 3, 40)
KV_HEADS, READERS, FEATURES = 2, 3, 8
Steps = Sequence[Sequence[Piece]]


class FlashOnPaper:
    """What variable-length flash attention promises and refuses, in plain operations: the stand-in for CUDA's."""

    def forward(self, call: Call, q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        """Output [Q, H, E] and LSE [H, Q]."""
        scores = self._scores(call, q, k, scale)
        lse = scores.logsumexp(-1)
        return torch.einsum("hqk,khe->qhe", (scores - lse[..., None]).exp(), self._for_readers(v, q)), lse

    def backward(
        self,
        call: Call,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        scale: float,
    ) -> Sequence[Tensor]:
        """Gradients with the given output and LSE, as flash computes them."""
        assert grad.shape == out.shape == q.shape and lse.is_contiguous()
        p = (self._scores(call, q, k, scale) - lse[..., None]).exp()
        dp = torch.einsum("qhe,khe->hqk", grad, self._for_readers(v, q))
        ds = p * (dp - (grad * out).sum(-1).T[..., None]) * scale
        dq = torch.einsum("hqk,khe->qhe", ds, self._for_readers(k, q))
        dk, dv = torch.einsum("hqk,qhe->khe", ds, q), torch.einsum("hqk,qhe->khe", p, grad)
        dk, dv = (each.unflatten(1, (k.shape[1], -1)).sum(2) for each in (dk, dv))
        return dq, dk, dv

    def _scores(self, call: Call, q: Tensor, k: Tensor, scale: float) -> Tensor:
        assert q.shape[-1] % 8 == 0, "head_size must be a multiple of 8"
        scores = torch.einsum("qhe,khe->hqk", q, self._for_readers(k, q)) * scale
        shown = torch.zeros(len(q), len(k), dtype=torch.bool)
        bounds = zip(call.starts_q, call.starts_q[1:], call.starts_k, call.starts_k[1:], strict=False)
        for first_q, last_q, first_k, last_k in bounds:
            n, m = int(last_q - first_q), int(last_k - first_k)
            assert n <= call.longest_q and m <= call.longest_k
            aligned = torch.arange(n)[:, None] + m - n
            keys = torch.arange(m)
            left = keys >= aligned - call.left if call.left >= 0 else torch.tensor(True)
            right = keys <= aligned + call.right if call.right >= 0 else torch.tensor(True)
            shown[first_q:last_q, first_k:last_k] = left & right
        assert shown.any(1).all(), "a query that sees no key has no LSE"
        return scores.masked_fill(~shown, -torch.inf)

    def _for_readers(self, heads: Tensor, q: Tensor) -> Tensor:
        return heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1)


def packed(steps: Steps, window: int) -> Kernel:
    return PackedKernel(steps, window=window, device=torch.device("cpu"), varlen=FlashOnPaper())


def flash_cpu(steps: Steps, window: int) -> Kernel:
    return LoopKernel(steps, window=window, rectangle=FlashCpu())


def plain(steps: Steps, window: int) -> Kernel:
    return LoopKernel(steps, window=window, rectangle=Plain())


def expected(lengths: Sequence[int], tensors: Sequence[Tensor], window: int) -> list[Tensor]:
    """Output and gradients of q [K, G, N, E], k, v [K, N, E] of sequences one after the other."""
    *leaves, grad = tensors
    q, k, v = (leaf.clone().requires_grad_() for leaf in leaves)
    positions = torch.cat([torch.arange(length) for length in lengths])
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ago = positions[:, None] - positions
    shown = (sequence[:, None] == sequence) & (ago >= 0) & (ago < (window or len(positions)))
    scores = torch.einsum("kgqe,kme->kgqm", q, k) / math.sqrt(q.shape[-1])
    out = torch.einsum("kgqm,kme->kgqe", scores.masked_fill(~shown, -torch.inf).softmax(-1), v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


@pytest.mark.parametrize("make", [flash_cpu, plain, packed])
@pytest.mark.parametrize("ring", [1, 2, 3])
@pytest.mark.parametrize("window", [0, 1, 9, 100, 149, 1000])
def test_each_kernel_gives_what_plain_softmax_does(
    make: Callable[[Steps, int], Kernel], ring: int, window: int
) -> None:
    assert_equal_to_softmax(make, ring, window, num_features=FEATURES)


@pytest.mark.parametrize("num_features", [2, 12])
def test_heads_that_flash_does_not_take_are_filled_up(num_features: int) -> None:
    assert_equal_to_softmax(packed, 2, 100, num_features=num_features)


def assert_equal_to_softmax(
    make: Callable[[Steps, int], Kernel], ring: int, window: int, *, num_features: int
) -> None:
    """Output and gradients of all places of a ring against one softmax over everything."""
    layout = SequenceLayout.build(LENGTHS, ring=ring)
    generator = torch.Generator().manual_seed(0)
    shapes = [(READERS, sum(LENGTHS)), (sum(LENGTHS),), (sum(LENGTHS),), (READERS, sum(LENGTHS))]
    whole = [
        torch.randn(KV_HEADS, *shape, num_features, dtype=torch.float64, generator=generator)
        for shape in shapes
    ]
    rows = [torch.from_numpy(layout.tokens(place)) for place in range(ring)]
    found = [torch.zeros_like(tensor) for tensor in (whole[3], *whole[:3])]
    for place in range(ring):
        kernel = make(
            [
                pieces(layout.places[place], layout.places[place - step], window=window)
                for step in range(ring)
            ],
            window,
        )
        q, grad = whole[0][:, :, rows[place]], whole[3][:, :, rows[place]]
        out, lse = torch.zeros_like(q), q.new_zeros(q.shape[:3])
        portions = [[tensor[:, rows[place - step]] for tensor in whole[1:3]] for step in range(ring)]
        for step, portion in enumerate(portions):
            kernel.forward(step, q, portion, out, lse)
        dq, saved = torch.zeros_like(q), Saved(grad, q, out, lse)
        for step, portion in enumerate(portions):
            dkv = [torch.zeros_like(tensor) for tensor in portion]
            kernel.backward(step, saved, portion, dq, dkv)
            real = rows[place - step] >= 0
            for target, gradient in zip(found[2:], dkv, strict=True):
                target[:, rows[place - step][real]] += gradient[:, real]
        real = rows[place] >= 0
        found[0][:, :, rows[place][real]] = out[:, :, real]
        found[1][:, :, rows[place][real]] = dq[:, :, real]
    for got, want in zip(found, expected(LENGTHS, whole, window), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rectangle", "most"), [(Plain, 128), (FlashCpu, 1000)])
def test_without_a_flash_kernel_memory_stays_linear(
    monkeypatch: pytest.MonkeyPatch, rectangle: type[Plain | FlashCpu], most: int
) -> None:
    seen = []

    def forward(self: object, q: Tensor, k: Tensor, v: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        seen.append(q.shape[2])
        return torch.zeros_like(q), q.new_zeros(q.shape[:3])

    monkeypatch.setattr(rectangle, "forward", forward)
    (only,) = SequenceLayout.build([1000]).places
    q, k = torch.zeros(1, 1, 1000, 4), torch.zeros(1, 1000, 4)
    kernel = LoopKernel([pieces(only, only)], window=0, rectangle=rectangle())
    kernel.forward(0, q, (k, k), torch.zeros_like(q), q.new_zeros(q.shape[:3]))
    assert max(seen) == most
    assert sum(seen) == 1000


@pytest.mark.parametrize(("left", "right"), [(-1, 0), (-1, -1), (5, 0), (3, -1)])
def test_the_operators_of_cuda_take_what_they_are_given(left: int, right: int) -> None:
    device = torch.device("meta")  # shapes and signatures, without a GPU
    rows, starts = (torch.empty(n, dtype=torch.int64, device=device) for n in (12, 3))
    call = Call(left, right, True, rows, rows, starts.int(), starts.int(), 8, 8)
    q, k = (torch.empty(12, heads, 16, dtype=torch.bfloat16, device=device) for heads in (6, 2))
    out, lse = FlashCuda().forward(call, q, k, k, scale=0.25)
    assert out.shape == q.shape and lse.shape == (6, 12) and lse.dtype is torch.float32
    gradients = FlashCuda().backward(call, out, q, k, k, out, lse, scale=0.25)
    assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, k.shape]


@pytest.mark.parametrize(
    ("capability", "dtype", "num_features", "expected"),
    [
        ((8, 0), torch.bfloat16, 256, True),
        ((9, 0), torch.float16, 100, True),
        ((8, 0), torch.bfloat16, 264, False),
        ((7, 5), torch.float16, 64, False),
        ((9, 0), torch.float32, 64, False),
    ],
)
def test_flash_is_asked_only_for_what_it_can_do(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    num_features: int,
    expected: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert FlashCuda.serves(torch.device("cuda", 0), dtype, num_features=num_features) is expected
    assert not FlashCuda.serves(torch.device("cpu"), dtype, num_features=num_features)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("num_features", [FEATURES, 100, 264])
def test_flash_on_a_gpu_agrees_with_plain_softmax(window: int, num_features: int) -> None:
    device = torch.device("cuda")
    attention = SequenceAttention(SequenceLayout.build(LENGTHS), window=window)
    heads = (KV_HEADS * READERS, KV_HEADS, KV_HEADS, KV_HEADS * READERS)
    *leaves, grad = (torch.randn(sum(LENGTHS), n, num_features) for n in heads)
    outcomes = []
    for where, dtype in ((device, torch.bfloat16), (torch.device("cpu"), torch.float64)):
        q, k, v = (leaf.bfloat16().to(where, dtype).requires_grad_() for leaf in leaves)
        out = attention.attend(q, k, v)
        gradients = torch.autograd.grad(out, (q, k, v), grad.bfloat16().to(where, dtype))
        outcomes.append([tensor.detach().double().cpu() for tensor in (out, *gradients)])
    for got, want in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-2 * float(want.abs().max()))


def test_without_a_window_a_sequence_is_one_piece_a_step() -> None:
    layout = SequenceLayout.build([800, 5], ring=4)
    for place in range(4):
        for step in range(4):
            found = pieces(layout.places[place], layout.places[place - step])
            on_both = {span.sequence for span in layout.places[place]} & {
                span.sequence for span in layout.places[place - step]
            }
            assert len(found) == len(on_both)


def test_a_window_leaves_out_what_is_out_of_sight() -> None:
    layout = SequenceLayout.build([8000], ring=4)
    computed = [
        (queries[1] - queries[0]) * (keys[1] - keys[0])
        for place in range(4)
        for step in range(4)
        for queries, keys, *_ in pieces(layout.places[place], layout.places[place - step], window=10)
    ]
    # Six chunks and one of twice the length, cut in bands later, and six neighbours of which 9 tokens see 9.
    assert sum(computed) == 6 * 1000**2 + 2000**2 + 6 * 9**2
