"""What ``distrain doctor --profile`` measures, and the cost model that it makes of it.

The ranks (``measure.py``) time micro-batches of many shapes on groups of every degree and write them down; the process
that started them fits the model. No torch is needed to read and fit.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distrain.core.errors import DataError
from distrain.core.vocabulary import ModelShape
from distrain.planners.sequence.fit import Fit, Sample, bytes_per_token, fit

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The measurements of one machine and model."""

    samples: tuple[Sample, ...]
    memory: tuple[tuple[int, int], ...]
    """(tokens of a rank, bytes on its device)"""
    limit_bytes: int
    """what tensors can have of a device"""
    device: str
    date: str

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps({"version": VERSION, **asdict(self)}) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Profile":
        """Read what ``save`` wrote.

        Raises:
            DataError: it is not there, or not such a file.
        """
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            if values.pop("version") != VERSION:
                raise ValueError("another version")
            samples = tuple(
                Sample(tuple(each["lengths"]), each["degree"], each["ms"]) for each in values.pop("samples")
            )
            memory = tuple((int(tokens), int(num_bytes)) for tokens, num_bytes in values.pop("memory"))
            return cls(samples=samples, memory=memory, **values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError("the profile cannot be read", got=f"{path}: {error}") from None

    def fit(self, shape: ModelShape) -> Fit:
        """The cost model of a model of ``shape`` on the machine that was measured."""
        fixed, per_token = bytes_per_token(self.memory)
        tokens = int((self.limit_bytes - fixed) / per_token) if per_token > 0 else self.memory[-1][0]
        return fit(self.samples, layers=shape.num_layers, hidden=shape.d_model, tokens_per_gpu=max(1, tokens))

    def to_toml(self, fitted: Fit) -> str:
        """The cost model's file, with what it is worth in comments."""
        head = [
            f"# distrain doctor --profile, {self.date}, {self.device}",
            f"# {len(self.samples)} groups timed; the model is off by {fitted.mean_error:.1%} on average,"
            f" {fitted.worst_error:.1%} at the worst",
        ]
        return "\n".join(head) + "\n" + fitted.cost.to_toml()


def shapes(longest: int) -> list[tuple[int, ...]]:
    """Groups worth timing, of up to ``longest`` tokens: single sequences, packs of equal ones, and a mixed pack."""
    found = [
        *((longest // parts,) for parts in (1, 2, 4, 8)),
        *((longest // parts,) * parts for parts in (2, 4, 16)),
        (longest // 2, longest // 4, longest // 8, longest // 8),
    ]
    return list(dict.fromkeys(lengths for lengths in found if min(lengths) > 0))


def degrees(num_slots: int) -> Iterator[int]:
    """Sizes of groups worth having: those that fill ``num_slots``, and powers of two, which may leave some idle."""
    return (
        degree for degree in range(1, num_slots + 1) if num_slots % degree == 0 or degree & (degree - 1) == 0
    )


def rows(profile: Profile, fitted: Fit) -> Sequence[tuple[int, str, float, float]]:
    """(degree, group, measured ms, predicted ms) of each sample, for people."""
    return [
        (sample.degree, _named(sample.lengths), sample.ms, sample.ms * (1 + error))
        for sample, error in zip(profile.samples, fitted.errors, strict=True)
    ]


def _named(lengths: tuple[int, ...]) -> str:
    return f"{len(lengths)} x {lengths[0]}" if len(set(lengths)) == 1 else " + ".join(map(str, lengths))
