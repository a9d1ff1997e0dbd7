"""Buffers as CSV: ``id,lower,upper,size``, and ``offset`` once they are planned.

The columns are those that MiniMalloc reads and writes, so its files, and those of anything that speaks to it, can be
planned here, as long as they ask for nothing more: columns such as ``gaps`` or ``alignment`` say where a plan is valid,
and to pass over them would be a plan of another problem. What was read and is written again is the same, byte for byte
(but for a mark of the encoding, CRLF and empty lines). A file is read to its end before it is refused, so that one
look shows all that is wrong.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from distrain.core.errors import ConfigError, Problem, nearest, raise_if

from .problem import Buffer, mistakes

COLUMNS = ("id", "lower", "upper", "size")
OFFSET = "offset"
_SHOWN = 50  # mistakes; a file of another kind would fill the screen for minutes


def parse(text: str, *, name: str = "the table") -> tuple[Buffer, ...]:
    """The buffers of a CSV file's ``text``; columns may stand in any order. ConfigError lists all that is wrong."""
    rows = [(number, row) for number, row in _rows(text, name) if any(cell.strip() for cell in row)]
    if not rows:
        raise ConfigError(f"{name} is empty", allowed="a first line: " + ",".join(COLUMNS))
    (_, header), *body = rows
    columns = [word.strip() for word in header]
    raise_if(list(_header_problems(columns, name)))
    problems: list[Problem] = []
    buffers, where = [], []
    for number, row in body:
        place = f"line {number} of {name}"
        if len(row) != len(columns):
            problems.append(
                Problem(
                    f"{place} has the wrong number of cells", got=str(len(row)), allowed=str(len(columns))
                )
            )
            continue
        cells = dict(zip(columns, row, strict=True))
        numbers = {column: _integer(cells[column]) for column in columns if column != "id"}
        bad = [column for column, value in numbers.items() if value is None]
        for column in bad:
            problems.append(
                Problem(f"{place}: {column} is no integer", got=repr(cells[column]), allowed="an integer")
            )
        if not bad:
            lower, upper, size = (numbers[column] or 0 for column in COLUMNS[1:])
            buffers.append(Buffer(cells["id"], lower, upper, size))
            where.append(place)
    problems += mistakes(buffers, where)
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [Problem(f"and {len(problems) - _SHOWN} more mistakes in {name}")]
    raise_if(problems)
    return tuple(buffers)


def read(path: Path) -> tuple[Buffer, ...]:
    """The buffers of the file ``path``; ConfigError lists all that is wrong."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return parse(file.read(), name=path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("a table of buffers cannot be read", got=f"{path}: {error}") from None


def text(buffers: Sequence[Buffer], offsets: Sequence[int] | None = None) -> str:
    """The CSV file of ``buffers``, with their ``offsets`` if they are planned."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS if offsets is None else (*COLUMNS, OFFSET))
    rows: Iterable[tuple[object, ...]] = ((each.id, each.lower, each.upper, each.size) for each in buffers)
    if offsets is not None:
        rows = ((*row, offset) for row, offset in zip(rows, offsets, strict=True))
    writer.writerows(rows)
    return out.getvalue()


def write(path: Path, buffers: Sequence[Buffer], offsets: Sequence[int] | None = None) -> None:
    """Write ``text`` to ``path``."""
    path.write_text(text(buffers, offsets), encoding="utf-8", newline="")


def _rows(content: str, name: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ConfigError(f"line {reader.line_num} of {name} is no CSV", got=str(error)) from None


def _header_problems(columns: Sequence[str], name: str) -> Iterator[Problem]:
    known = (*COLUMNS, OFFSET)
    for column in COLUMNS:
        if column not in columns:
            yield Problem(f"{name} lacks the column {column}", got=",".join(columns), allowed=",".join(known))
    for column in dict.fromkeys(columns):
        if column not in known:
            close = nearest(column, known)
            yield Problem(
                f"{name} has an unknown column",
                got=column,
                allowed=",".join(known),
                hint=f"did you mean {close}?" if close else "leave it out, if the plan may pass over it",
            )
        elif columns.count(column) > 1:
            yield Problem(f"{name} has the column {column} more than once", got=",".join(columns))


def _integer(cell: str) -> int | None:
    try:
        return int(cell)
    except ValueError:
        return None
