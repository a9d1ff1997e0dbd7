"""The errors Distrain raises, and the four lines in which a user sees them.

A mistake of the user's ends in a message that says what is wrong, what was got, what is allowed and what to try::

    error: parallel.tp does not divide model.num_heads
    got: tp = 3, num_heads = 8
    allowed: 1, 2, 4, 8
    try: --set parallel.tp=2

The tree; the number is the exit code of the command line::

    DistrainError                1
    ├── ConfigError              3   something in a config, a plan or a flag is impossible: lists every problem
    ├── InfeasibleError          4   proven: no solution exists
    ├── UndecidedError           5   no answer within the time given
    ├── LaunchError              1   workers could not be started, or one of them failed
    ├── DataError                1   data is missing or damaged: never passed over in silence
    └── MissingDependencyError   1   an optional package or a native build is not there
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, in the four lines of every user message; empty lines are left out."""

    error: str
    got: str = ""
    allowed: str = ""
    hint: str = ""

    def __str__(self) -> str:
        rows = (("error", self.error), ("got", self.got), ("allowed", self.allowed), ("try", self.hint))
        return "\n".join(f"{name}: {text}" for name, text in rows if text)


class DistrainError(Exception):
    """Base of all errors of this package; ``exit_code`` is what the command line ends with."""

    exit_code = 1

    def __init__(self, error: str, *, got: str = "", allowed: str = "", hint: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem(error, got, allowed, hint),)
        super().__init__(error)

    def __str__(self) -> str:
        return "\n\n".join(str(problem) for problem in self.problems)


class ConfigError(DistrainError):
    """A config, a plan or a flag cannot work; carries every problem found, not just the first."""

    exit_code = 3

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> "ConfigError":
        """The error that lists ``problems`` (at least one)."""
        listed = tuple(problems)
        if not listed:
            raise ValueError("a ConfigError needs at least one problem")
        error = cls(listed[0].error)
        error.problems = listed
        return error


class InfeasibleError(DistrainError):
    """It is proven that no solution exists."""

    exit_code = 4


class UndecidedError(DistrainError):
    """Neither a solution nor a proof was found in the time given."""

    exit_code = 5


class LaunchError(DistrainError):
    """Workers could not be started, or one of them failed."""


class DataError(DistrainError):
    """Data is missing or damaged."""


class MissingDependencyError(DistrainError):
    """An optional package or a native build is missing; the hint says how to get it."""


def raise_if(problems: Sequence[Problem]) -> None:
    """Raise one ConfigError that lists ``problems``, if there are any."""
    if problems:
        raise ConfigError.of(problems)


def nearest(word: str, choices: Iterable[str]) -> str:
    """The choice most like ``word``, or an empty string if none is close."""
    return next(iter(get_close_matches(word, list(choices), n=1, cutoff=0.6)), "")
