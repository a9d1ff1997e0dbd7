"""Ring attention: keys and values go round the ranks while each attends to those that pass (Liu et al. 2023).

Rank p starts with its own, so that step s sees those of place p - s::

    step       0       1       2          gradients of the keys of place 0
    place 0   own <-  of 2 <-  of 1       1 adds at step 1, 2 at step 2, then they come home to 0
    place 1   own <-  of 0 <-  of 2
    place 2   own <-  of 1 <-  of 0

The next portion is on its way while a step computes. Partial outputs merge by their LSE; output and LSE are kept for
the backward pass, which sends the keys and values round once more and their gradients one step behind. So a rank holds
its own tokens and two portions, whatever the sequences' lengths. With one place nothing travels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .varlen import Kernel, Saved

KEYS, GRADIENTS = 0, 1  # tags, for gloo; NCCL takes messages in the order of the steps


class Ring(NamedTuple):
    """The ranks among which keys and values go round, as seen by one of them."""

    group: dist.ProcessGroup | None
    num_travelling: int
    """rows of a place that others need"""

    @property
    def num_places(self) -> int:
        """Steps of a round; 1 if nothing has to travel."""
        return 1 if self.group is None or self.num_travelling == 0 else dist.get_world_size(self.group)

    def shift(self, tensor: Tensor, *, tag: int) -> Callable[[], Tensor]:
        """Start sending ``tensor`` to the next place; the result waits for the one from the place before."""
        assert self.group is not None
        place, num_places = dist.get_rank(self.group), dist.get_world_size(self.group)
        arriving = torch.empty_like(tensor)
        ends = (
            (dist.isend, tensor, (place + 1) % num_places),
            (dist.irecv, arriving, (place - 1) % num_places),
        )
        works = dist.batch_isend_irecv(
            [dist.P2POp(do, buffer, group=self.group, tag=tag, group_peer=peer) for do, buffer, peer in ends]
        )
        return partial(_arrived, works, arriving, tensor)


def _arrived(works: Sequence[dist.Work], arriving: Tensor, _sent: Tensor) -> Tensor:
    """``arriving`` once it is there; what was sent is kept until it has left."""
    for work in works:
        work.wait()
    return arriving


def ring_attention(q_HNE: Tensor, k_KNE: Tensor, v_KNE: Tensor, *, kernel: Kernel, ring: Ring) -> Tensor:
    """Attention of own queries to the keys of all places: [H, N, E], K divides H. Differentiable."""
    q_KGNE = q_HNE.unflatten(0, (k_KNE.shape[0], -1))
    out_KGNE: Tensor = _RingAttention.apply(q_KGNE, k_KNE, v_KNE, kernel, ring)  # type: ignore[no-untyped-call]
    return out_KGNE.flatten(0, 1)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_KGNE: Tensor, k_KNE: Tensor, v_KNE: Tensor, kernel: Kernel, ring: Ring) -> Tensor:
        wide = torch.promote_types(q_KGNE.dtype, torch.float32)
        num_kv_heads, num_readers, num_tokens, num_features = q_KGNE.shape
        # Token by token in memory, as the projection that comes next reads it.
        out_KGNE = q_KGNE.new_zeros(
            (num_tokens, num_kv_heads, num_readers, num_features),
            dtype=wide if ring.num_places > 1 else q_KGNE.dtype,
        ).permute(1, 2, 0, 3)
        lse_KGN = q_KGNE.new_zeros(q_KGNE.shape[:3], dtype=wide)
        portions = _Portions(k_KNE, v_KNE, ring)
        for step in range(ring.num_places):
            kernel.forward(step, q_KGNE, portions.at(step), out_KGNE, lse_KGN)
        out_KGNE = out_KGNE.to(q_KGNE.dtype)
        ctx.save_for_backward(q_KGNE, k_KNE, v_KNE, out_KGNE, lse_KGN)
        ctx.kernel, ctx.ring = kernel, ring
        return out_KGNE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_KGNE: Tensor) -> tuple[Tensor | None, ...]:
        q_KGNE, k_KNE, v_KNE, out_KGNE, lse_KGN = ctx.saved_tensors
        kernel, ring = ctx.kernel, ctx.ring
        saved = Saved(grad_KGNE, q_KGNE, out_KGNE, lse_KGN)
        dq_KGNE = lse_KGN.new_zeros(q_KGNE.shape)
        dkv_2KNE = lse_KGN.new_zeros((2, *k_KNE.shape))
        portions = _Portions(k_KNE, v_KNE, ring)
        travelling: Callable[[], Tensor] | None = None
        for step in range(ring.num_places):
            portion = portions.at(step)
            gradients = dkv_2KNE if step == 0 else dkv_2KNE.new_zeros((2, *portion[0].shape))
            kernel.backward(step, saved, portion, dq_KGNE, gradients)
            if travelling is not None:
                gradients += travelling()
            if step > 0:
                travelling = ring.shift(gradients, tag=GRADIENTS)
        if travelling is not None:
            dkv_2KNE[:, :, : ring.num_travelling] += travelling()
        dk_KNE, dv_KNE = dkv_2KNE.to(k_KNE.dtype).unbind()
        return dq_KGNE.to(q_KGNE.dtype), dk_KNE, dv_KNE, None, None


class _Portions:
    """Keys and values as they pass a rank: own ones whole at step 0, then what travels of the others'."""

    def __init__(self, k_KNE: Tensor, v_KNE: Tensor, ring: Ring) -> None:
        self._ring, self._own = ring, (k_KNE, v_KNE)
        self._arriving: Callable[[], Tensor] | None = None

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """The portion of ``step``, once it is there; the next one sets out."""
        rows = slice(self._ring.num_travelling)
        held = None
        if self._arriving is not None:
            held = self._arriving()
        elif self._ring.num_places > 1:
            held = torch.stack([tensor[:, rows] for tensor in self._own])
        is_last = step == self._ring.num_places - 1
        self._arriving = None if is_last or held is None else self._ring.shift(held, tag=KEYS)
        if step == 0 or held is None:
            return self._own
        return held[0], held[1]
