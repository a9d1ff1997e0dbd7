"""What happens to a layer's saved activations between forward and backward: kept, swapped or recomputed, by tokens.

A sequence of n tokens is cut at two places, for each of four groups of a layer's tensors::

        0            keep           keep + swap               n
        ├── device ──┼──── host ────┼──── recomputed ─────────┤

The input and what mixes tokens (attention) is what the others are recomputed from, so their own tails are never thrown
away, unless attention is done again for all tokens. That is MEMO's token-wise plan (2407.12117, section 4.1), which
never keeps; its alpha is swap / n of the two groups around attention.

Cuts lie on multiples of ``TOKENS``, and a part that is recomputed is all of the sequence or at least ``TOKENS`` long:
products of a few rows run other kernels, with other roundings.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distrain.core.errors import ConfigError, Problem

TOKENS = 128
"""tokens that a cut is rounded to"""

UNSWAPPED_LAYERS = 2
"""last layers of a pass, whose backward begins before a swap would have ended"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Tokens, first to last, that are kept, swapped and recomputed."""

    keep: int = 0
    swap: int = 0
    recompute: int = 0

    @property
    def num_tokens(self) -> int:
        """All of them."""
        return self.keep + self.swap + self.recompute

    def at(self, num_tokens: int) -> "Split":
        """The same shares of another number of tokens, on cuts that are allowed there."""
        if num_tokens == self.num_tokens or not self.num_tokens:
            return self
        return snap(num_tokens, keep=self.keep / self.num_tokens, swap=self.swap / self.num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """One layer: a cut for each group of its tensors, all of the same number of tokens."""

    input: Split
    attention: Split
    """outputs of attention, and whatever else mixes tokens or cannot be made again token by token"""
    before_attention: Split
    after_attention: Split

    @classmethod
    def of(cls, tokens: Split, *, input: Split | None = None, attention: Split | None = None) -> "LayerPlan":
        """One cut on both sides of attention; input and attention are swapped unless told otherwise."""
        swapped = Split(swap=tokens.num_tokens)
        return cls(
            input=input or swapped,
            attention=attention or swapped,
            before_attention=tokens,
            after_attention=tokens,
        )

    @property
    def splits(self) -> tuple[Split, ...]:
        """Of input, attention, before and after it."""
        return self.input, self.attention, self.before_attention, self.after_attention

    @property
    def num_tokens(self) -> int:
        """Of every cut."""
        return self.input.num_tokens

    @property
    def keeps_all(self) -> bool:
        """Whether the layer can be left alone."""
        return not any(split.swap or split.recompute for split in self.splits)

    @property
    def recomputes(self) -> bool:
        """Whether anything is thrown away."""
        return any(split.recompute for split in self.splits)

    def at(self, num_tokens: int) -> "LayerPlan":
        """The same shares of another number of tokens."""
        if num_tokens == self.num_tokens:
            return self
        names = ("input", "attention", "before_attention", "after_attention")
        return LayerPlan(
            **{name: split.at(num_tokens) for name, split in zip(names, self.splits, strict=True)}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationPlan:
    """What every layer of a rank does with its activations.

    Raises:
        ConfigError: a layer's cut is not allowed, or its places contradict its cut.
    """

    layers: tuple[LayerPlan, ...]
    host_bytes: int | None = None
    """most host memory that swapped tensors of this rank may take; None: as much as they need"""

    def __post_init__(self) -> None:
        problems = [problem for i, layer in enumerate(self.layers) for problem in _problems(i, layer)]
        if problems:
            raise ConfigError.of(problems)

    @property
    def digest(self) -> str:
        """Equal for equal plans, on any machine."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """As plain values; ``from_json`` reads them."""
        return {"layers": [asdict(layer) for layer in self.layers], "host_bytes": self.host_bytes}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ActivationPlan":
        """The plan that ``to_json`` gave."""
        layers = tuple(
            LayerPlan(**{name: Split(**split) for name, split in layer.items()}) for layer in value["layers"]
        )
        return cls(layers=layers, host_bytes=value["host_bytes"])

    @classmethod
    def of_policy(
        cls,
        kept: Sequence[Sequence[int]],
        swapped: Sequence[Sequence[int]],
        *,
        groups: Sequence[str],
        num_tokens: int,
        host_bytes: int | None = None,
    ) -> "ActivationPlan":
        """The plan in which layer l keeps ``kept[l][g]`` and swaps ``swapped[l][g]`` tokens of ``groups[g]``.

        Groups are named as the fields of ``LayerPlan``.
        """
        layers = tuple(
            LayerPlan(
                **{
                    name: Split(keep=keep, swap=swap, recompute=num_tokens - keep - swap)
                    for name, keep, swap in zip(groups, *rows, strict=True)
                }
            )
            for rows in zip(kept, swapped, strict=True)
        )
        return cls(layers=layers, host_bytes=host_bytes)


def snap(num_tokens: int, *, keep: float = 0.0, swap: float = 0.0) -> Split:
    """The allowed cut below shares ``keep`` and ``swap`` of ``num_tokens``; the rest is recomputed."""
    end = num_tokens if keep + swap > 1 - 1e-9 else rounded_down((keep + swap) * num_tokens)
    if 0 < num_tokens - end < min(TOKENS, num_tokens):
        end = max(end - TOKENS, 0)
    start = end if swap < 1e-9 else min(rounded_down(keep * num_tokens), end)
    return Split(keep=start, swap=end - start, recompute=num_tokens - end)


def uniform(mode: str, *, num_layers: int, num_tokens: int, alpha: float = 1.0) -> ActivationPlan:
    """One plan for all layers.

    ``none`` keeps everything, ``recompute`` recomputes whole layers from inputs that stay on the device, ``swap``
    swaps everything, ``memo`` swaps inputs, attention and the share ``alpha`` of the other tensors' tokens, and
    recomputes the rest. The last ``UNSWAPPED_LAYERS`` of ``swap`` and ``memo`` keep everything.
    """
    keep, swap, again = Split(keep=num_tokens), Split(swap=num_tokens), Split(recompute=num_tokens)
    kept = LayerPlan.of(keep, input=keep, attention=keep)
    layers = {
        "none": kept,
        "recompute": LayerPlan.of(again, input=keep, attention=again),
        "swap": LayerPlan.of(swap),
        "memo": LayerPlan.of(snap(num_tokens, swap=alpha)),
    }
    if mode not in layers:
        raise ConfigError("no such activation mode", got=mode, allowed=", ".join(layers))
    num_kept = min(UNSWAPPED_LAYERS, num_layers) if mode in ("swap", "memo") else 0
    return ActivationPlan(layers=(layers[mode],) * (num_layers - num_kept) + (kept,) * num_kept)


def rounded_down(tokens: float) -> int:
    """To a cut that is allowed; what misses one by rounding is taken for it."""
    return int(tokens / TOKENS + 1e-6) * TOKENS


def _problems(index: int, layer: LayerPlan) -> list[Problem]:
    problems = [problem for split in layer.splits for problem in _problems_of_cut(index, split)]
    if len({split.num_tokens for split in layer.splits}) > 1:
        problems.append(
            Problem(
                f"layer {index}'s groups have different numbers of tokens",
                got=", ".join(str(split.num_tokens) for split in layer.splits),
            )
        )
    if layer.attention.recompute and any(split.recompute != split.num_tokens for split in layer.splits[1:]):
        problems.append(
            Problem(
                f"layer {index} recomputes attention for a part of its tokens",
                got=f"{layer.attention.recompute} of {layer.num_tokens} tokens",
                allowed="attention kept or swapped, or everything recomputed",
            )
        )
    if layer.input.recompute:
        problems.append(Problem(f"layer {index} would recompute its own input", allowed="keep, swap"))
    return problems


def _problems_of_cut(index: int, split: Split) -> list[Problem]:
    n = split.num_tokens
    got = f"keep {split.keep}, swap {split.swap}, recompute {split.recompute}"
    cuts = (split.keep, split.keep + split.swap)
    if min(split.keep, split.swap, split.recompute) < 0 or any(cut % TOKENS and cut != n for cut in cuts):
        return [
            Problem(
                f"layer {index}'s tokens are cut at a place that is not allowed",
                got=got,
                allowed=f"multiples of {TOKENS}",
                hint="planners.activation_plan.snap",
            )
        ]
    if 0 < split.recompute < min(TOKENS, n):
        return [
            Problem(
                f"layer {index} recomputes too few tokens to be exact",
                got=got,
                allowed=f"none, all, or at least {TOKENS}",
                hint="planners.activation_plan.snap",
            )
        ]
    return []
