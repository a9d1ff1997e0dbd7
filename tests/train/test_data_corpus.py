"""Corpora of text: what becomes a document, what is held out, and which damage is refused."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from distrain.core.config import DataConfig
from distrain.core.errors import ConfigError, DataError, DistrainError
from distrain.train.data.corpus import Corpus, open_corpus
from distrain.train.data.tokenizer import Ids

VOCAB = 258
NOBODY = 65534


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def text_corpus(folder: Path, *, pattern: str = "**/*", held_out: float = 0.0) -> Corpus:
    data = DataConfig(source="text", path=str(folder), pattern=pattern, held_out=held_out)
    return open_corpus(data, vocab_size=VOCAB)


def names(corpus: Corpus) -> list[str]:
    return [corpus.name(document) for document in range(len(corpus.lengths))]


def content(corpus: Corpus, document: int) -> bytes:
    return bytes(corpus.read(document, 0, int(corpus.lengths[document])).astype(np.uint8))


def assert_four_lines(error: DistrainError) -> None:
    assert [line.split(":")[0] for line in str(error).splitlines()] == ["error", "got", "allowed", "try"]


def test_every_file_is_a_document_whatever_its_name_and_its_bytes(tmp_path: Path) -> None:
    files = {
        "a.txt": b"alpha",
        "sub dir/b' ; echo.txt": b"\xff\xfe\x00 no utf-8",
        "sub dir/deeper/c\nnewline.txt": bytes(range(256)),
        "\u00fcml\u00e4ut.txt": b"u",
        os.fsdecode(b"not-utf8-\xff.txt"): b"odd name",
        "empty.txt": b"",
    }
    corpus = text_corpus(write(tmp_path, files))
    assert sorted(names(corpus)) == sorted(files)
    assert {name: content(corpus, document) for document, name in enumerate(names(corpus))} == files


def test_documents_are_in_the_same_order_wherever_the_folder_lies(tmp_path: Path) -> None:
    files = {f"{letter}/{index}.txt": b"x" for letter in "cab" for index in (2, 0, 1)}
    first = text_corpus(write(tmp_path / "one", files))
    second = text_corpus(write(tmp_path / "two", dict(reversed(files.items()))))
    assert names(first) == names(second) == sorted(files)
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**/*", ["a.md", "a.txt", "x/b.txt", "x/y/c.txt"]),
        ("*", ["a.md", "a.txt"]),
        ("**/*.txt", ["a.txt", "x/b.txt", "x/y/c.txt"]),
        ("x/**", ["x/b.txt", "x/y/c.txt"]),
        ("**/y/*", ["x/y/c.txt"]),
        ("?.[mn]d", ["a.md"]),
    ],
)
def test_the_pattern_chooses_documents(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    everything = ["a.md", "a.txt", "x/b.txt", "x/y/c.txt", ".hidden", ".git/d.txt"]
    write(tmp_path, dict.fromkeys(everything, b"text"))
    assert names(text_corpus(tmp_path, pattern=pattern)) == expected


def test_links_are_followed_and_a_circle_of_links_ends(tmp_path: Path) -> None:
    write(tmp_path, {"real/a.txt": b"a", "elsewhere/b.txt": b"bb"})
    (tmp_path / "real" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "real" / "circle").symlink_to(tmp_path / "real")
    assert names(text_corpus(tmp_path / "real")) == ["a.txt", "more/b.txt"]


def test_a_slice_of_a_document_is_read_alone(tmp_path: Path) -> None:
    corpus = text_corpus(write(tmp_path, {"a": b"0123456789"}))
    assert corpus.read(0, 3, 6).tolist() == list(b"345")
    assert corpus.read(0, 10, 10).tolist() == []


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "unmatched"])
def test_no_documents_is_a_mistake_of_the_config(tmp_path: Path, kind: str) -> None:
    write(tmp_path, {"file": b"x", "unmatched/a.md": b"x"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        text_corpus(tmp_path / kind, pattern="**/*.txt")
    assert_four_lines(caught.value)
    assert kind in str(caught.value)


def test_a_link_that_leads_nowhere_is_refused_if_it_matches(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"x"})
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert names(text_corpus(tmp_path, pattern="a*")) == ["a.txt"]
    with pytest.raises(DataError, match=r"gone\.txt") as caught:
        text_corpus(tmp_path)
    assert_four_lines(caught.value)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": b"x"})
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match=r"pipe\.txt"):
        text_corpus(tmp_path)


@contextmanager
def an_ordinary_user() -> Iterator[None]:
    """Root may read everything, so it becomes nobody for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("name", ["secret", "secret.txt"])
def test_what_may_not_be_read_is_named(name: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = write(Path(temporary), {"a.txt": b"x", "secret/b.txt": b"x", "secret.txt": b"x"})
        folder.chmod(0o755)
        (folder / name).chmod(0)
        with an_ordinary_user(), pytest.raises(DataError, match="secret"):
            corpus = text_corpus(folder)
            [content(corpus, document) for document in range(len(corpus.lengths))]
        (folder / name).chmod(0o700)


def test_a_file_that_vanished_or_shrank_since_opening_is_named(tmp_path: Path) -> None:
    corpus = text_corpus(write(tmp_path, {"a": b"long enough", "b": b"gone soon"}))
    (tmp_path / "a").write_bytes(b"short")
    (tmp_path / "b").unlink()
    with pytest.raises(DataError, match="'a'"):
        corpus.read(0, 2, 8)
    with pytest.raises(DataError, match="cannot be read"):
        corpus.read(1, 0, 4)


def test_a_vocabulary_too_small_for_the_bytes_is_a_mistake_of_the_config(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"x"})
    with pytest.raises(ConfigError, match="vocab_size=258") as caught:
        open_corpus(DataConfig(source="text", path=str(tmp_path)), vocab_size=257)
    assert_four_lines(caught.value)


@pytest.mark.parametrize("held_out", [-0.1, 1.0, float("nan")])
def test_held_out_must_be_a_fraction(tmp_path: Path, held_out: float) -> None:
    with pytest.raises(ConfigError, match="held_out"):
        text_corpus(write(tmp_path, {"a": b"x"}), held_out=held_out)


def test_an_unknown_source_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="stdlib, text, tokens"):
        open_corpus(DataConfig(source="web"), vocab_size=VOCAB)


class WordTokenizer:
    """Tokens of unequal length: the length of a word, spaces dropped."""

    vocab_size = 100
    eos_id = 0
    is_bytewise = False

    def encode(self, text: bytes | str) -> Ids:
        data = text.encode() if isinstance(text, str) else text
        return np.array([len(word) for word in data.split()], dtype=np.int64)

    def decode(self, ids: Ids) -> bytes:
        return b" ".join(b"x" * int(number) for number in ids if number)


def test_a_tokenizer_whose_tokens_differ_in_length_fits_in(tmp_path: Path) -> None:
    write(tmp_path, {f"{index}": b"a bb ccc " * index for index in range(40)})
    data = DataConfig(source="text", path=str(tmp_path), held_out=0.0)
    corpus = open_corpus(data, vocab_size=100, tokenizer=WordTokenizer())
    lengths = {name: int(length) for name, length in zip(names(corpus), corpus.lengths, strict=True)}
    assert lengths == {f"{index}": 3 * index for index in range(40)}
    assert corpus.read(names(corpus).index("7"), 1, 5).tolist() == [2, 3, 1, 2]


def test_a_tokenizer_that_breaks_its_word_is_caught(tmp_path: Path) -> None:
    write(tmp_path, {"a": b"x" * 150})
    data = DataConfig(source="text", path=str(tmp_path), held_out=0.0)
    corpus = open_corpus(data, vocab_size=100, tokenizer=WordTokenizer())
    with pytest.raises(DataError, match="vocabulary"):
        corpus.read(0, 0, 1)


def test_training_and_validation_share_no_document_and_lose_none(tmp_path: Path) -> None:
    corpus = text_corpus(write(tmp_path, {f"{index}.txt": b"x" for index in range(300)}), held_out=0.2)
    train, held_out = corpus.documents("train"), corpus.documents("held_out")
    assert sorted([*train, *held_out]) == list(range(300))
    assert 30 <= len(held_out) <= 90


def test_a_document_added_later_moves_no_other_from_one_split_to_the_other(tmp_path: Path) -> None:
    def held_out() -> set[str]:
        corpus = text_corpus(tmp_path, held_out=0.2)
        return {corpus.name(int(document)) for document in corpus.documents("held_out")}

    write(tmp_path, {f"{index}.txt": b"x" for index in range(100)})
    before = held_out()
    write(tmp_path, {f"new/{index}.txt": b"x" for index in range(100)})
    write(tmp_path, {f"{index}.txt": b"changed" for index in range(50)})
    assert before == {name for name in held_out() if not name.startswith("new/")}


def test_of_few_documents_one_is_held_out_and_of_one_none(tmp_path: Path) -> None:
    few = text_corpus(write(tmp_path / "few", {"a": b"x", "b": b"x", "c": b"x"}), held_out=0.0001)
    one = text_corpus(write(tmp_path / "one", {"a": b"x"}), held_out=0.0001)
    assert len(few.documents("held_out")) == 1
    assert len(one.documents("held_out")) == 0


@pytest.mark.parametrize("change", ["length", "name", "addition", "split"])
def test_the_fingerprint_tells_other_data_apart(tmp_path: Path, change: str) -> None:
    write(tmp_path, {f"{index}": b"text" for index in range(50)})
    before = text_corpus(tmp_path, held_out=0.1).fingerprint
    if change == "length":
        (tmp_path / "7").write_bytes(b"texts")
    if change == "name":
        (tmp_path / "7").rename(tmp_path / "7a")
    if change == "addition":
        (tmp_path / "50").write_bytes(b"text")
    after = text_corpus(tmp_path, held_out=0.5 if change == "split" else 0.1).fingerprint
    assert before != after


def test_the_standard_library_is_a_corpus_of_megabytes_with_a_long_tail() -> None:
    corpus = open_corpus(DataConfig(), vocab_size=VOCAB)
    lengths = np.sort(corpus.lengths)
    assert lengths.sum() > 8_000_000
    assert lengths[-1] > 20 * np.median(lengths)
    assert len(corpus.documents("held_out")) > 0
    documents = names(corpus)
    assert all(name.endswith(".py") for name in documents)
    assert not {"site-packages", "test", "tests"} & {part for name in documents for part in name.split("/")}
    assert b"class Thread" in content(corpus, documents.index("threading.py"))
