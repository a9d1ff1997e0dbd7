"""The layout of a run as a file: what the planner decided, or the user said, and workers carry out.

A plan is a versioned JSON object that can be printed, compared and replayed. Whoever reads one gets a plan
that a mesh can be built from, or one error with everything that is wrong with it; whether the model fits it
is for ``core.layout.check_layout`` to say, which needs the model.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any

from distrain.core.errors import ConfigError, Problem, nearest, raise_if
from distrain.core.layout import check_mesh
from distrain.core.vocabulary import DataParallel, Degrees, Schedule

from . import plan_file

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelPlan:
    """How a model is laid out over ``world_size`` ranks, and how good that is said to be."""

    world_size: int
    degrees: Degrees
    schedule: Schedule = Schedule.ONE_F_ONE_B
    data: DataParallel = DataParallel.DDP
    micro_batches: int = 1
    placement: tuple[tuple[int, ...], ...] = ()
    """global ranks of each node; empty: in order"""
    objective: float | None = None
    """estimated seconds of one step; None for a layout that the user gave"""
    bound: float | None = None
    """no layout of the grid takes fewer seconds than this"""
    gap: float | None = None
    """(objective - bound) / objective"""
    status: str = "given"
    """``given`` by the user, or what the planner has proven"""
    seconds: float = 0.0
    """time that planning took"""
    reasons: tuple[str, ...] = ()
    """why this layout, in sentences"""
    version: int = VERSION

    def to_json(self) -> str:
        """The plan as one JSON object."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def save(self, path: Path | str) -> None:
        """Write the plan to ``path``, which has the old content or the new one at any moment.

        A link stays a link; what is no file, such as a pipe, is written to as it is.
        """
        plan_file.save(path, self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> "ParallelPlan":
        """The plan that ``save`` wrote; ConfigError lists everything that is wrong with the file."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("the plan cannot be read", got=f"{path}: {error}") from error
        return cls.from_json(text, source=str(path))

    @classmethod
    def from_json(cls, text: str, *, source: str = "the plan") -> "ParallelPlan":
        """The plan that ``to_json`` printed; errors name ``source``."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ConfigError("the plan is not JSON", got=f"{source}: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError("the plan is not a JSON object", got=f"{source}: {type(data).__name__}")
        values, problems = _read(data)
        raise_if(problems)
        plan = cls(**values)
        raise_if(list(_problems(plan)))
        return plan


def _read(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Values of the known fields, and what is wrong with the rest."""
    values: dict[str, Any] = {}
    problems = []
    for name in data.keys() - _READERS.keys():
        close = nearest(name, _READERS)
        hint = close and f"did you mean {close}?"
        problems.append(Problem("the plan has an unknown field", got=name, hint=hint))
    for field in fields(ParallelPlan):
        if field.name not in data:
            if field.default is MISSING or field.name == "version":
                problems.append(Problem(f"the plan lacks {field.name}"))
            continue
        allowed, read = _READERS[field.name]
        try:
            values[field.name] = read(data[field.name])
        except (ValueError, TypeError) as error:
            problems.append(Problem(f"the plan's {field.name} is wrong", got=str(error), allowed=allowed))
    return values, sorted(problems, key=str)


def _problems(plan: ParallelPlan) -> Iterator[Problem]:
    """What keeps a mesh from being built; the words are those for a config."""
    degrees = plan.degrees
    yield from check_mesh(
        degrees,
        schedule=plan.schedule,
        data=plan.data,
        micro_batches=plan.micro_batches,
        global_batch=degrees.dp * plan.micro_batches,
        world_size=plan.world_size,
    )
    shard = {DataParallel.FSDP2: degrees.dp, DataParallel.HSDP: degrees.dp_shard}.get(plan.data, 1)
    if degrees.dp_shard != shard:
        yield Problem(
            f"data = {plan.data} fixes dp_shard", got=f"dp_shard = {degrees.dp_shard}", allowed=str(shard)
        )
    placed = sorted(rank for ranks in plan.placement for rank in ranks)
    if placed and (len(placed) != plan.world_size or placed != list(range(len(placed)))):
        yield Problem(
            "the plan does not place every rank once",
            got=f"{len(placed)} places, {len(set(placed))} different ranks",
            allowed=f"each rank from 0 to {plan.world_size - 1} once, or no placement",
        )


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(repr(value))
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ValueError(repr(value))
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(repr(value))
    return value


def _version(value: object) -> int:
    if value != VERSION:
        raise ValueError(repr(value))
    return VERSION


def _degrees(value: object) -> Degrees:
    known = [field.name for field in fields(Degrees)]
    if not isinstance(value, dict) or value.keys() - set(known):
        raise ValueError(repr(value))
    return Degrees(**{name: _whole(size) for name, size in value.items()})


def _ranks(value: object) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, list) or not all(isinstance(node, list) for node in value):
        raise ValueError(repr(value))
    return tuple(tuple(_whole(rank) for rank in node) for node in value)


def _optional(value: object) -> float | None:
    return None if value is None else _number(value)


def _sentences(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError(repr(value))
    return tuple(_text(sentence) for sentence in value)


_READERS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "world_size": ("a whole number", _whole),
    "degrees": ("tp, pp, dp, vpp and dp_shard as whole numbers", _degrees),
    "schedule": (", ".join(Schedule), Schedule),
    "data": (", ".join(DataParallel), DataParallel),
    "micro_batches": ("a whole number", _whole),
    "placement": ("a list of ranks for each node", _ranks),
    "objective": ("seconds or null", _optional),
    "bound": ("seconds or null", _optional),
    "gap": ("a number or null", _optional),
    "status": ("a word", _text),
    "seconds": ("a number", _number),
    "reasons": ("a list of sentences", _sentences),
    "version": (str(VERSION), _version),
}
