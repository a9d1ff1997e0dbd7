"""Corpora of token files: where documents begin and end, and which files are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.core.config import DataConfig
from distrain.core.errors import ConfigError, DataError
from distrain.train.data import token_files
from distrain.train.data.corpus import Corpus, open_corpus

VOCAB, EOS = 1000, 999


def index(folder: Path, **fields: Any) -> None:
    table = {"dtype": "uint16", "vocab_size": VOCAB, "eos_id": EOS} | fields
    (folder / "tokens.json").write_text(json.dumps(table))


def open_tokens(folder: Path, *, vocab_size: int = VOCAB) -> Corpus:
    return open_corpus(DataConfig(source="tokens", path=str(folder), held_out=0.0), vocab_size=vocab_size)


def documents(corpus: Corpus) -> dict[str, list[int]]:
    return {
        corpus.name(number): corpus.read(number, 0, int(length)).tolist()
        for number, length in enumerate(corpus.lengths)
    }


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_documents_are_what_lies_between_two_end_tokens(tmp_path: Path, dtype: str) -> None:
    index(tmp_path, dtype=dtype)
    np.array([1, 2, EOS, EOS, 3, EOS], dtype=dtype).tofile(tmp_path / "a.bin")
    np.save(tmp_path / "b.npy", np.array([4, 5, 6], dtype=np.int32))
    (tmp_path / "c.bin").touch()
    np.array([EOS, 7], dtype=dtype).tofile(tmp_path / "d.bin")
    expected = {
        "a.bin#0": [1, 2],
        "a.bin#1": [],
        "a.bin#2": [3],
        "b.npy#0": [4, 5, 6],
        "d.bin#0": [],
        "d.bin#1": [7],
    }
    assert documents(open_tokens(tmp_path)) == expected


@given(st.lists(st.lists(st.integers(0, EOS - 1), max_size=8), min_size=1, max_size=8), st.booleans())
def test_documents_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, written: list[list[int]], ends: bool
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    index(folder)
    row = [token for document in written for token in (*document, EOS)]
    np.array(row if ends or not written[-1] else row[:-1], dtype=np.uint16).tofile(folder / "a.bin")
    assert list(documents(open_tokens(folder)).values()) == written


def test_files_longer_than_one_scan_are_found_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "SCANNED_AT_ONCE", 4)
    index(tmp_path)
    np.array([1, 2, 3, EOS, 4, 5, 6, 7, 8, EOS, 9], dtype=np.uint16).tofile(tmp_path / "a.bin")
    assert list(documents(open_tokens(tmp_path)).values()) == [[1, 2, 3], [4, 5, 6, 7, 8], [9]]


@pytest.mark.parametrize("bad", [VOCAB, 65535])
def test_ids_beyond_the_vocabulary_are_damage(tmp_path: Path, bad: int) -> None:
    index(tmp_path)
    np.array([1, bad, EOS], dtype=np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match=str(bad)):
        open_tokens(tmp_path)


def test_negative_ids_are_damage(tmp_path: Path) -> None:
    index(tmp_path)
    np.save(tmp_path / "a.npy", np.array([1, -2, 3]))
    with pytest.raises(DataError, match="-2"):
        open_tokens(tmp_path)


def test_half_a_token_at_the_end_is_damage(tmp_path: Path) -> None:
    index(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"123")
    with pytest.raises(DataError, match="3 bytes"):
        open_tokens(tmp_path)


@pytest.mark.parametrize("what", ["truncated", "floats", "two dimensions", "objects", "no header"])
def test_arrays_that_are_no_token_rows_are_damage(tmp_path: Path, what: str) -> None:
    index(tmp_path)
    path = tmp_path / "a.npy"
    arrays = {
        "floats": np.ones(3),
        "two dimensions": np.ones((2, 2), dtype=np.int64),
        "objects": np.array([1, None], dtype=object),
    }
    np.save(path, arrays.get(what, np.arange(100)), allow_pickle=True)
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    if what == "no header":
        path.write_bytes(b"\x01\x02" * 100)
    with pytest.raises(DataError, match=r"a\.npy"):
        open_tokens(tmp_path)


def test_a_model_vocabulary_smaller_than_the_files_is_a_mistake_of_the_config(tmp_path: Path) -> None:
    index(tmp_path)
    np.array([1, EOS], dtype=np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(ConfigError, match=f"vocab_size={VOCAB}"):
        open_tokens(tmp_path, vocab_size=VOCAB - 1)


def test_a_folder_without_token_files_is_a_mistake_of_the_config(tmp_path: Path) -> None:
    index(tmp_path)
    with pytest.raises(ConfigError, match=r"\.npy"):
        open_tokens(tmp_path)


def test_a_missing_index_is_asked_for_with_an_example(tmp_path: Path) -> None:
    np.array([1, EOS], dtype=np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(ConfigError, match=r'try: \{"dtype"'):
        open_tokens(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\xff"])
def test_an_index_that_is_no_table_is_a_mistake_of_the_config(tmp_path: Path, text: str) -> None:
    np.array([1, EOS], dtype=np.uint16).tofile(tmp_path / "a.bin")
    (tmp_path / "tokens.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"tokens\.json"):
        open_tokens(tmp_path)


def test_everything_wrong_with_an_index_is_listed_at_once(tmp_path: Path) -> None:
    np.array([1, EOS], dtype=np.uint16).tofile(tmp_path / "a.bin")
    index(tmp_path, dtype="float32", vocab_size=True, eos_id=-3, eos=5)
    with pytest.raises(ConfigError) as caught:
        open_tokens(tmp_path)
    named = [problem.error.split()[0] for problem in caught.value.problems]
    assert named == ["unknown", "dtype", "vocab_size", "eos_id"]
