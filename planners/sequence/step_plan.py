"""What one training step does with its sequences: which slots compute which of them, group by group.

Slots are the places 0..N-1 of the data plane, the same for every (tp, pp) coordinate; whoever runs a plan maps them to
ranks. Within a micro-batch the groups are disjoint, and slots that no group names have nothing to compute. Over the
whole step every sequence is in exactly one group.

Two schedules share this form. In lock-step a micro-batch ends for everybody when its slowest group ends, so a step
takes the sum of the slowest groups. Asynchronously there is no such barrier: a group starts as soon as its own slots
have finished what earlier micro-batches gave them::

    lock-step      |[ 0 1 ]......|[ 0 ]..|         asynchronous   [ 0 1 ][ 0 ]
                   |[   2 3     ]|[ 2 3 ]|                        [   2 3     ][ 2 3 ]
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal, cast, get_args

from distrain.core.errors import ConfigError, Problem, nearest, raise_if

from .. import plan_file

VERSION = 1

Schedule = Literal["lock-step", "asynchronous"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)

_SHOWN = 5  # of many numbers in one message


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """Slots that compute some sequences together, one after the other."""

    ranks: tuple[int, ...]
    """slots of the data plane, ascending"""
    sequences: tuple[int, ...]
    """indices into the lengths that were planned"""
    estimated_ms: float

    @property
    def degree(self) -> int:
        """Over how many slots each of the sequences is split."""
        return len(self.ranks)


MicroBatch = tuple[SequenceGroup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """The groups of every micro-batch of one step, what the step costs, and how good that is proven to be."""

    microbatches: tuple[MicroBatch, ...]
    num_slots: int
    schedule: Schedule = "lock-step"
    estimated_ms: float
    lower_bound_ms: float
    """no plan of this schedule takes less"""
    gap: float
    """(estimated - lower bound) / estimated"""
    status: str
    """``optimal`` only if the bound proves it, else ``feasible``"""
    seconds: float
    """time that planning took"""
    baselines: Mapping[str, float] = field(default_factory=dict)
    """ms of a step under one degree for all (``static``), and one a micro-batch (``batch_adaptive``)"""
    reasons: tuple[str, ...] = ()
    """how this plan came about, in sentences"""

    def check(self, lengths: Sequence[int]) -> list[Problem]:
        """What keeps this plan from carrying out a step over ``lengths``: slots, and each sequence exactly once.

        Memory and times are for ``check_plan``, which needs the cost model.
        """
        return [
            *(
                problem
                for index, groups in enumerate(self.microbatches)
                for problem in _slots(index, groups, self.num_slots)
            ),
            *_served(self.microbatches, len(lengths)),
        ]

    def to_json(self) -> str:
        """The plan as one JSON object, one line a group."""
        head: dict[str, Any] = {
            "version": VERSION,
            "num_slots": self.num_slots,
            "schedule": self.schedule,
            "estimated_ms": self.estimated_ms,
            "lower_bound_ms": self.lower_bound_ms,
            "gap": self.gap,
            "status": self.status,
            "seconds": self.seconds,
            "baselines": dict(self.baselines),
            "reasons": list(self.reasons),
        }
        lines = [
            f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}," for name, value in head.items()
        ]
        batches = ",\n".join(
            "  [\n" + ",\n".join(f"   {json.dumps(_group_json(group))}" for group in groups) + "\n  ]"
            for groups in self.microbatches
        )
        return "\n".join(["{", *lines, ' "microbatches": [', batches, " ]", "}"]) + "\n"

    def save(self, path: Path | str) -> None:
        """Write the plan to ``path``, which has the old content or the new one at any moment.

        A link stays a link; what is no file, such as a pipe, is written to as it is.
        """
        plan_file.save(path, self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> "StepPlan":
        """The plan that ``save`` wrote; ConfigError lists everything that is wrong with the file."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("the plan cannot be read", got=f"{path}: {error}") from error
        return cls.from_json(text, source=str(path))

    @classmethod
    def from_json(cls, text: str, *, source: str = "the plan") -> "StepPlan":
        """The plan that ``to_json`` printed; errors name ``source``."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ConfigError("the plan is not JSON", got=f"{source}: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError("the plan is not a JSON object", got=f"{source}: {type(data).__name__}")
        raise_if(list(_unreadable(data)))
        return cls(
            microbatches=tuple(tuple(map(_group, groups)) for groups in data["microbatches"]),
            num_slots=data["num_slots"],
            schedule=cast(Schedule, data["schedule"]),
            estimated_ms=float(data["estimated_ms"]),
            lower_bound_ms=float(data["lower_bound_ms"]),
            gap=float(data["gap"]),
            status=data["status"],
            seconds=float(data["seconds"]),
            baselines={name: float(value) for name, value in data["baselines"].items()},
            reasons=tuple(data["reasons"]),
        )


def step_ms(microbatches: Sequence[MicroBatch], *, num_slots: int, schedule: str) -> float:
    """How long a step takes if every group takes its ``estimated_ms``: the replay of a plan on ``num_slots`` slots."""
    ends = (
        start_ms + group.estimated_ms
        for groups in replay(microbatches, num_slots=num_slots, schedule=schedule)
        for group, start_ms in groups
    )
    return max(ends, default=0.0)


def replay(
    microbatches: Sequence[MicroBatch], *, num_slots: int, schedule: str
) -> Iterator[list[tuple[SequenceGroup, float]]]:
    """The groups of each micro-batch with the ms at which they start."""
    free_ms = [0.0] * num_slots
    barrier_ms = 0.0
    for groups in microbatches:
        started = []
        for group in groups:
            start_ms = max(barrier_ms, *(free_ms[rank] for rank in group.ranks))
            started.append((group, start_ms))
            for rank in group.ranks:
                free_ms[rank] = start_ms + group.estimated_ms
        if schedule == "lock-step":
            barrier_ms = max(
                (start_ms + group.estimated_ms for group, start_ms in started), default=barrier_ms
            )
        yield started


def _slots(index: int, groups: Sequence[SequenceGroup], num_slots: int) -> Iterator[Problem]:
    taken: set[int] = set()
    for group in groups:
        where = f"micro-batch {index}: {_some(group.ranks)}"
        if not group.ranks or list(group.ranks) != sorted(set(group.ranks)):
            yield Problem("the ranks of a group are not ascending", where, "at least one, each once")
        elif group.ranks[0] < 0 or group.ranks[-1] >= num_slots:
            yield Problem("a group names a rank that is not there", where, f"0 to {num_slots - 1}")
        elif shared := taken.intersection(group.ranks):
            yield Problem("groups of one micro-batch share ranks", f"micro-batch {index}: {_some(shared)}")
        taken.update(group.ranks)


def _served(microbatches: Sequence[MicroBatch], num_sequences: int) -> Iterator[Problem]:
    times = [0] * num_sequences
    for groups in microbatches:
        for group in groups:
            for sequence in group.sequences:
                if not 0 <= sequence < num_sequences:
                    yield Problem(
                        "a group names a sequence that is not there",
                        f"sequence {sequence}",
                        f"0 to {num_sequences - 1}",
                    )
                else:
                    times[sequence] += 1
    if missing := [index for index, count in enumerate(times) if count == 0]:
        yield Problem("sequences are left out", _some(missing), "each sequence in exactly one group")
    if doubled := [index for index, count in enumerate(times) if count > 1]:
        yield Problem("sequences are computed more than once", _some(doubled), "each in exactly one group")


def _some(numbers: Sequence[int] | set[int]) -> str:
    listed = sorted(numbers)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(map(str, listed[:_SHOWN])) + more


def _group_json(group: SequenceGroup) -> dict[str, Any]:
    return {
        "ranks": list(group.ranks),
        "degree": group.degree,
        "sequences": list(group.sequences),
        "estimated_ms": group.estimated_ms,
    }


def _group(data: Mapping[str, Any]) -> SequenceGroup:
    return SequenceGroup(tuple(data["ranks"]), tuple(data["sequences"]), float(data["estimated_ms"]))


def _unreadable(data: Mapping[str, Any]) -> Iterator[Problem]:
    """What is not of the form that ``to_json`` prints."""
    for name in sorted(data.keys() - _FORMS.keys()):
        close = nearest(name, _FORMS)
        yield Problem("the plan has an unknown field", name, hint=close and f"did you mean {close}?")
    for name, (allowed, fits) in _FORMS.items():
        if name not in data:
            yield Problem(f"the plan lacks {name}", allowed=allowed)
        elif not fits(data[name]):
            yield Problem(f"the plan's {name} is wrong", repr(data[name])[:80], allowed)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _is_group(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"ranks", "degree", "sequences", "estimated_ms"}
        and all(
            isinstance(value[name], list) and all(map(_is_whole, value[name]))
            for name in ("ranks", "sequences")
        )
        and value["degree"] == len(value["ranks"]) > 0
        and _is_number(value["estimated_ms"])
    )


_FORMS: Mapping[str, tuple[str, Any]] = {
    "version": (str(VERSION), lambda value: value == VERSION),
    "num_slots": ("a whole number", _is_whole),
    "schedule": (", ".join(SCHEDULES), lambda value: value in SCHEDULES),
    "estimated_ms": ("a number", _is_number),
    "lower_bound_ms": ("a number", _is_number),
    "gap": ("a number", _is_number),
    "status": ("a word", lambda value: isinstance(value, str)),
    "seconds": ("a number", _is_number),
    "baselines": (
        "a number for each name",
        lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    ),
    "reasons": (
        "a list of sentences",
        lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
    ),
    "microbatches": (
        "a list of lists of groups with ranks, degree, sequences and estimated_ms",
        lambda value: (
            isinstance(value, list)
            and all(isinstance(groups, list) and all(map(_is_group, groups)) for groups in value)
        ),
    ),
}
