"""Attention over the packed sequences of one group of ranks: what a model calls.

Each rank brings the queries, keys and values of its own tokens. Ulysses turns them into all tokens of some heads, the
ring brings what other places hold, and Ulysses turns back::

    [T, H, E] --all-to-all--> [H / u, u T, E] --ring of r--> [H / u, u T, E] --all-to-all--> [T, H, E]

With one rank none of it happens. Which token is where says ``SequenceLayout``; rotary positions are applied before,
from ``layout.positions``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from distrain.core.errors import ConfigError
from distrain.parallel.groups import GroupRegistry

from .layout import SequenceLayout
from .loop import FlashCpu, LoopKernel, Plain
from .packed import FlashCuda, PackedKernel
from .ring import Ring, ring_attention
from .ulysses import HeadSplit, gather_heads, scatter_heads
from .varlen import Kernel, pieces


class SequenceAttention:
    """Causal grouped-query attention inside each sequence of ``layout``, for one micro-batch on one group of ranks."""

    def __init__(
        self,
        layout: SequenceLayout,
        *,
        index: int = 0,
        ranks: Sequence[int] = (0,),
        groups: GroupRegistry | None = None,
        window: int = 0,
    ) -> None:
        """``index`` is this rank's place among the group's global ``ranks`` (ascending); ``window`` 0 is none.

        Makes the process groups that are missing: with more than one rank, all of the group's must come here, and
        must do so in the same order for all their groups.
        """
        if len(ranks) != layout.degree or list(ranks) != sorted(ranks):
            raise ConfigError(
                "the ranks do not fit the layout",
                got=f"ranks {list(ranks)}, degree {layout.degree}",
                allowed=f"{layout.degree} ascending ranks",
            )
        if layout.degree > 1 and groups is None:
            raise ValueError("more than one rank needs groups to talk in")
        self.layout = layout
        self._window = window
        self._place, self._ulysses_index = divmod(index, layout.ulysses)
        self._kernels: dict[tuple[torch.device, torch.dtype, int], Kernel] = {}
        first = index - self._ulysses_index
        share = tuple(ranks[first : first + layout.ulysses])
        around = tuple(ranks[self._ulysses_index :: layout.ulysses])
        self._share = groups.of(share) if groups and len(share) > 1 else None
        self._ring = Ring(groups.of(around) if groups and len(around) > 1 else None, layout.num_travelling)

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        """[T, H, E], [T, K, E], [T, K, E] of this rank's tokens -> [T, H, E]; zeros for padding. Differentiable.

        Autocast's type counts where it is on, as in torch's own attention.
        """
        if q_THE.shape[0] != self.layout.num_local:
            raise ValueError(f"{q_THE.shape[0]} tokens, the layout has {self.layout.num_local} on every rank")
        q_THE, k_TKE, v_TKE = (_as_computed(tensor) for tensor in (q_THE, k_TKE, v_TKE))
        split = HeadSplit.of(
            num_heads=q_THE.shape[1], num_kv_heads=k_TKE.shape[1], num_ranks=self.layout.ulysses
        )
        kernel = self._kernel(q_THE)
        if self._share is None or self.layout.num_local == 0:
            q, k, v = (tensor.transpose(0, 1) for tensor in (q_THE, k_TKE, v_TKE))
            return ring_attention(q, k, v, kernel=kernel, ring=self._ring).transpose(0, 1)
        q, k, v = scatter_heads(q_THE, k_TKE, v_TKE, split=split, group=self._share)
        if repeats := split.repeats(self._ulysses_index):
            k, v = k[list(repeats)], v[list(repeats)]
        out = ring_attention(q, k, v, kernel=kernel, ring=self._ring)
        return gather_heads(out, split=split, group=self._share)

    def _kernel(self, like: Tensor) -> Kernel:
        key = like.device, like.dtype, like.shape[-1]
        if key not in self._kernels:
            self._kernels[key] = self._new_kernel(*key)
        return self._kernels[key]

    def _new_kernel(self, device: torch.device, dtype: torch.dtype, num_features: int) -> Kernel:
        places = self.layout.places
        steps = [
            pieces(places[self._place], places[self._place - step], window=self._window)
            for step in range(self._ring.num_places)
        ]
        if FlashCuda.serves(device, dtype, num_features=num_features):
            return PackedKernel(steps, window=self._window, device=device, varlen=FlashCuda())
        return LoopKernel(
            steps, window=self._window, rectangle=FlashCpu() if device.type == "cpu" else Plain()
        )


def _as_computed(x: Tensor) -> Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
