"""Which rank failed first, and how to say it. Pure.

When one rank dies the others soon fail too, with errors about lost connections; what helps is the traceback of the
first. The order of deaths as seen by the agent can deceive: a rank's sockets close before its process ends, so a
peer may report the broken connection earlier. Errors that only tell of a lost peer therefore come after all others.
"""

import json
import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

HEADER = "Traceback (most recent call last):"
CHAINED = ("The above exception was the direct cause", "During handling of the above exception")
FATAL = "Fatal Python error:"
LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused by peer",
    "broken pipe",
    "remote process exited",
    "nccl communicator was aborted",
    "failed to recv, got 0 bytes",
    "socket timeout",
)
TORCH_PREFIX = re.compile(r"^\[rank\d+\]: ?", re.MULTILINE)
"""what torch writes in front of a traceback's lines once a process group is there"""
LONGEST_ERROR_LINES = 60
LONGEST_LINE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExit:
    """How one rank ended."""

    rank: int
    local_rank: int
    node: str
    pid: int
    code: int
    """its exit code; -N: killed by signal N"""
    at: float
    """seconds since the epoch: of its error if known, else of its end"""
    error: str = ""
    """its traceback, or the end of its stderr"""
    log: str = ""
    stopped: bool = False
    """whether the launcher had told it to stop"""

    @property
    def failed(self) -> bool:
        """Whether it failed of its own accord."""
        return self.code != 0 and not self.stopped

    @property
    def last_line(self) -> str:
        """The line of its error that names it: ``ValueError: ...``."""
        return exception_line(self.error)

    @property
    def lost_peer(self) -> bool:
        """Whether its error only says that another rank is gone."""
        error = self.last_line.lower()
        return any(phrase in error for phrase in LOST_PEER)

    @property
    def how(self) -> str:
        """``exit code 3`` or ``SIGKILL``."""
        return f"exit code {self.code}" if self.code >= 0 else signal_name(-self.code)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """How one node's ranks ended."""

    exits: tuple[WorkerExit, ...] = ()
    trouble: str = ""
    """what went wrong besides the ranks: the store or another node was lost"""
    signum: int = 0
    """the signal that told the node's launcher to stop, if one did before anything failed"""

    @classmethod
    def of(cls, exits: Sequence[WorkerExit], *, trouble: str, signum: int) -> "NodeReport":
        """The report on ``exits``: only the first failure keeps more than a line of its error."""
        first = first_failure(exits)
        short = [
            each if each is first else replace(each, error=each.last_line[:LONGEST_LINE]) for each in exits
        ]
        return cls(exits=tuple(short), trouble=trouble, signum=signum)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "NodeReport":
        """The report that ``to_json`` made."""
        return cls(**{**fields, "exits": tuple(WorkerExit(**each) for each in fields["exits"])})


def signal_name(signum: int) -> str:
    """``SIGKILL`` for 9."""
    return signal.Signals(signum).name if signum in set(signal.Signals) else f"signal {signum}"


def first_failure(exits: Iterable[WorkerExit]) -> WorkerExit | None:
    """The rank whose failure explains the others': the earliest error that is not about a lost peer."""
    failed = [each for each in exits if each.failed]
    return min(failed, key=lambda e: (e.lost_peer, e.at, e.code >= 0, e.rank), default=None)


def exit_code(reports: Iterable[NodeReport]) -> int:
    """What the launch ends with: 1 if anything failed, else 128 + the signal that stopped it, else 0."""
    reports = list(reports)
    if any(each.trouble or first_failure(each.exits) for each in reports):
        return 1
    return next((128 + each.signum for each in reports if each.signum), 0)


def recorded_error(text: str) -> str:
    """The traceback in a file that torch's ``@record`` wrote at TORCHELASTIC_ERROR_FILE; empty if unreadable."""
    try:
        message = json.loads(text)["message"]
    except (ValueError, KeyError, TypeError):
        return ""
    if isinstance(message, dict):
        extra = message.get("extraInfo")
        trace = extra.get("py_callstack") if isinstance(extra, dict) else None
        return str(trace or message.get("message", "")).strip()
    return str(message).strip()


def error_in(tail: str) -> str:
    """The last traceback of a rank's stderr with those it is chained to, or its last lines if there is none."""
    lines = TORCH_PREFIX.sub("", tail).splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith((HEADER, FATAL))]
    if not starts:
        return "\n".join(line[:LONGEST_LINE] for line in lines[-20:]).strip()
    first = len(starts) - 1
    while first and any(line.startswith(CHAINED) for line in lines[starts[first - 1] : starts[first]]):
        first -= 1
    found = lines[starts[first] :]
    if len(found) > LONGEST_ERROR_LINES:
        half = LONGEST_ERROR_LINES // 2
        found = [*found[:half], f"  ... {len(found) - 2 * half} lines ...", *found[-half:]]
    return "\n".join(line[:LONGEST_LINE] for line in found).strip()


def exception_line(error: str) -> str:
    """The first line after the last traceback's frames; without a traceback the last line."""
    lines = [line for line in error.splitlines() if line and not line[0].isspace()]
    starts = [i for i, line in enumerate(lines) if line == HEADER and i + 1 < len(lines)]
    fatal = [line for line in lines if line.startswith(FATAL)]
    if starts:
        return lines[starts[-1] + 1]
    return next(iter(fatal or lines[-1:]), "")


def summary(exits: Sequence[WorkerExit], *, trouble: str = "") -> str:
    """The end of a failed job, in words: the first failure with its traceback, then one line on all others."""
    first = first_failure(exits)
    if trouble and (first is None or first.lost_peer):
        first, head = None, [f"error: {trouble}"]
    else:
        head = []
    if first is not None:
        head.append(f"error: rank {first.rank} failed first: {first.how}")
        where = f"on {first.node}, local rank {first.local_rank}, pid {first.pid}"
        head.append(where + (f", log {first.log}" if first.log else ""))
        known = HEADER in first.error or FATAL in first.error
        head += ["", *([] if known else ["the end of its stderr:"]), first.error, ""] if first.error else []
    others = _others([each for each in exits if each is not first], first)
    return "\n".join(head + ([f"others: {others}"] if others else []))


def _others(exits: Sequence[WorkerExit], first: WorkerExit | None) -> str:
    failed = [each for each in exits if each.failed]
    same = [each for each in failed if first and each.last_line and each.last_line == first.last_line]
    after = [each for each in failed if each not in same]
    lost = [each for each in after if each.lost_peer]
    stopped = [each for each in exits if each.stopped]
    done = [each for each in exits if not each.failed and not each.stopped]
    parts = [
        f"same error on {_count(same)}" if same else "",
        f"{_count(lost)} lost contact with a peer" if lost else "",
        *(f"rank {each.rank} failed too: {each.how}" for each in after if each not in lost),
        f"{_count(stopped)} stopped by the launcher" if stopped else "",
        f"{_count(done)} had finished" if done else "",
    ]
    return "; ".join(part for part in parts if part)


def _count(exits: Sequence[WorkerExit]) -> str:
    noun = "rank" if len(exits) == 1 else "ranks"
    return f"{len(exits)} {noun} ({ranges(each.rank for each in exits)})"


def ranges(ranks: Iterable[int]) -> str:
    """``0, 3-7`` for 0, 3, 4, 5, 6, 7."""
    runs = groupby(enumerate(sorted(ranks)), key=lambda pair: pair[1] - pair[0])
    spans = [[rank for _, rank in run] for _, run in runs]
    return ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans)
