"""Documents from files of token ids, for corpora that were tokenized beforehand.

A folder of ``.bin`` files (bare little-endian ids) or ``.npy`` files (one dimension), memory-mapped, beside one
``tokens.json`` that says what the ids mean::

    {"dtype": "uint16", "vocab_size": 50257, "eos_id": 50256}

``dtype`` (uint16 or uint32) is that of the .bin files; .npy files carry their own. Documents are what lies between
two ``eos_id``. Opening reads every file once, to find them and to make sure that each id is below ``vocab_size``.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distrain.core.errors import ConfigError, DataError, Problem, raise_if

from .files import FoundFile, find_files, unreadable
from .tokenizer import Ids

INDEX = "tokens.json"
EXAMPLE = '{"dtype": "uint16", "vocab_size": 50257, "eos_id": 50256}'
SCANNED_AT_ONCE = 1 << 24

Mapped = np.ndarray[tuple[int], np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class TokenFormat:
    """What ``tokens.json`` says."""

    dtype: str
    vocab_size: int
    eos_id: int


class TokenSource:
    """Documents of all files in a row, named ``FILE#INDEX``."""

    def __init__(self, form: TokenFormat, names: Sequence[str], tokens: Sequence[Mapped]) -> None:
        self.vocab_size = form.vocab_size
        self.eos_id = form.eos_id
        self._names = names
        self._tokens = tokens
        spans = [_documents(name, ids, form) for name, ids in zip(names, tokens, strict=True)]
        self._first = np.cumsum(
            [0] + [len(starts) for starts, _ in spans]
        )  # document that each file begins with
        self._starts = np.concatenate([starts for starts, _ in spans])
        self.lengths: Ids = np.concatenate([stops - starts for starts, stops in spans])

    def name(self, document: int) -> str:
        """File and index within the file."""
        file = self._file(document)
        return f"{self._names[file]}#{document - self._first[file]}"

    def read(self, document: int, start: int, stop: int) -> Ids:
        """Ids ``start`` to ``stop`` of a document."""
        begin = int(self._starts[document])
        return self._tokens[self._file(document)][begin + start : begin + stop].astype(np.int64)

    def _file(self, document: int) -> int:
        return int(np.searchsorted(self._first, document, side="right")) - 1


def open_tokens(folder: Path, pattern: str) -> TokenSource:
    """The .bin and .npy files below ``folder`` that ``pattern`` matches, read as ``folder/tokens.json`` says.

    Raises ConfigError if folder, files or tokens.json are missing or wrong, DataError for damaged files.
    """
    found = [file for file in find_files(folder, pattern) if file.name.endswith((".bin", ".npy"))]
    if not found:
        raise ConfigError(
            "data.path holds no token files that data.pattern matches",
            got=f"path = {str(folder)!r}, pattern = {pattern!r}",
            allowed="files that end in .bin or .npy",
            hint="--set 'data.pattern=**/*', or --set data.source=text",
        )
    form = read_format(folder / INDEX)
    return TokenSource(form, [file.name for file in found], [_map(folder, file, form) for file in found])


def read_format(path: Path) -> TokenFormat:
    """The content of a ``tokens.json``; raises ConfigError that lists all that is wrong with it."""
    try:
        table = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            "token files need a tokens.json beside them", got=f"no {str(path)!r}", hint=EXAMPLE
        ) from None
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise ConfigError("tokens.json is not JSON", got=f"{str(path)!r}: {error}", hint=EXAMPLE) from None
    if not isinstance(table, dict):
        raise ConfigError("tokens.json is not a table", got=repr(table), hint=EXAMPLE)
    form = TokenFormat(table.get("dtype", "uint16"), table.get("vocab_size", 0), table.get("eos_id", -1))
    raise_if(_problems(form, sorted(table.keys() - {"dtype", "vocab_size", "eos_id"})))
    return form


def _problems(form: TokenFormat, unknown: list[str]) -> list[Problem]:
    problems = []
    if unknown:
        problems.append(
            Problem("unknown keys in tokens.json", ", ".join(unknown), "dtype, vocab_size, eos_id", EXAMPLE)
        )
    if form.dtype not in ("uint16", "uint32"):
        problems.append(Problem("dtype in tokens.json", repr(form.dtype), "uint16, uint32", EXAMPLE))
    sizes_ok = type(form.vocab_size) is int and form.vocab_size > 0
    if not sizes_ok:
        problems.append(
            Problem("vocab_size in tokens.json", repr(form.vocab_size), "a whole number above 0", EXAMPLE)
        )
    if type(form.eos_id) is not int or form.eos_id < 0 or (sizes_ok and form.eos_id >= form.vocab_size):
        problems.append(Problem("eos_id in tokens.json", repr(form.eos_id), "0 to vocab_size - 1", EXAMPLE))
    return problems


def _map(folder: Path, file: FoundFile, form: TokenFormat) -> Mapped:
    """The ids of a file without reading them."""
    path = folder / file.name
    try:
        if file.name.endswith(".npy"):
            return _one_dimension(path, np.load(path, mmap_mode="r", allow_pickle=False))
        dtype = np.dtype(form.dtype).newbyteorder("<")
        if file.num_bytes % dtype.itemsize:
            raise damaged(path, f"{file.num_bytes} bytes are no whole number of {form.dtype}")
        return np.memmap(path, dtype, mode="r") if file.num_bytes else np.empty(0, dtype)
    except OSError as error:
        raise unreadable(path, error) from error
    except (
        ValueError
    ) as error:  # numpy's word for a header it cannot read, or a file shorter than the header says
        raise damaged(path, str(error)) from error


def _one_dimension(path: Path, ids: np.ndarray) -> Mapped:
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise damaged(path, f"an array of {ids.dtype} with {ids.ndim} dimensions, not integers in one")
    return ids


def _documents(name: str, ids: Mapped, form: TokenFormat) -> tuple[Ids, Ids]:
    """First index and index after the last of each document, where a last one may lack its end token."""
    ends = [np.empty(0, np.int64)]
    for start in range(0, len(ids), SCANNED_AT_ONCE):
        part = ids[start : start + SCANNED_AT_ONCE]
        if not (0 <= part.min() and part.max() < form.vocab_size):
            raise damaged(
                name, f"token ids from {part.min()} to {part.max()}, but vocab_size is {form.vocab_size}"
            )
        ends.append(np.flatnonzero(part == form.eos_id) + start)
    stops = np.concatenate(ends)
    if len(ids) and (not len(stops) or stops[-1] != len(ids) - 1):
        stops = np.append(stops, len(ids))
    return np.concatenate([[0], stops[:-1] + 1])[: len(stops)].astype(np.int64), stops


def damaged(path: Path | str, what: str) -> DataError:
    """The error for a token file whose content cannot be what it should be."""
    return DataError(
        "a token file is damaged", got=f"{str(path)!r}: {what}", hint="write it and tokens.json again"
    )
