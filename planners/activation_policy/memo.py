"""MEMO's rule (2407.12117, section 4.1): one fraction alpha for all layers, in closed form.

The layer's input and the output of attention are always swapped, since attention is never made again. Of all else, the
first alpha of the tokens is swapped and the rest is made again. alpha is the largest number that lets the copy of one
layer hide behind the forward of the next, and all copies fit into the host::

    (S_in + S_attn + alpha S_oth) / B  <=  T_layer                  overlap
    (n - 2) (S_in + S_attn + alpha S_oth)  <=  M_host               host

The last two layers stay where they are: their backward follows at once. If even alpha = 0 breaks a row, the paper is
silent; here there is no alpha, and the row says what is missing.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoAlpha:
    """What each row allows, before it is clipped."""

    overlap: float
    """the alpha at which the copy takes as long as a layer's forward; negative if it always takes longer"""
    host: float
    """the alpha at which the host is full; negative if it cannot hold even inputs and attention"""
    overlap_deficit_s: float
    """time by which the copy of input and attention alone exceeds a layer's forward"""
    host_deficit_bytes: float
    """bytes by which inputs and attention alone exceed the host"""

    @property
    def alpha(self) -> float | None:
        """The largest that both rows allow; None if not even 0 does."""
        lowest = min(self.overlap, self.host)
        return None if lowest < 0 else min(1.0, lowest)

    @property
    def binding(self) -> Literal["overlap", "host", "none"]:
        """The row that keeps alpha below 1."""
        if min(self.overlap, self.host) >= 1:
            return "none"
        return "overlap" if self.overlap < self.host else "host"

    @property
    def explanation(self) -> str:
        """Why alpha is what it is, in a sentence."""
        missing = []
        if self.overlap < 0:
            missing.append(
                f"copying input and attention output takes {self.overlap_deficit_s * 1e3:.1f} ms "
                "longer than the forward of a layer"
            )
        if self.host < 0:
            missing.append(
                f"inputs and attention outputs exceed the host by {self.host_deficit_bytes / 2**30:.1f} GiB"
            )
        if missing:
            return "no alpha: " + "; ".join(missing)
        if self.binding == "none":
            return "everything is swapped, and both rows have room left"
        return f"the {self.binding} row binds (overlap alone would allow {self.overlap:.3f}, host {self.host:.3f})"


def memo_alpha(
    *,
    input_bytes: float,
    attention_bytes: float,
    other_bytes: float,
    num_layers: int,
    forward_s: float,
    bytes_per_s: float,
    host_bytes: float,
) -> MemoAlpha:
    """alpha for layers whose forward takes ``forward_s``; sizes of one layer and time of one rank.

    Three layers or more; with fewer there is nothing to swap, and alpha is that of the overlap row.
    """
    always = input_bytes + attention_bytes
    swapped_layers = max(0, num_layers - 2)
    hidden_bytes = forward_s * bytes_per_s
    room_bytes = host_bytes / swapped_layers if swapped_layers else float("inf")
    return MemoAlpha(
        overlap=(hidden_bytes - always) / other_bytes,
        host=(room_bytes - always) / other_bytes,
        overlap_deficit_s=max(0.0, always / bytes_per_s - forward_s),
        host_deficit_bytes=max(0.0, swapped_layers * always - host_bytes),
    )
