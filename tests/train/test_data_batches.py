"""Which sequences make a step: everything once an epoch, the same everywhere, and exact after any resume."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.core.config import DataConfig
from distrain.core.errors import ConfigError, DataError
from distrain.train.data.batches import BatchStream, total_tokens
from distrain.train.data.corpus import Corpus, Split, open_corpus
from distrain.train.data.shuffle import shuffled
from helpers.ranks import run_ranks

EOS = 256


def corpus_of(folder: Path, texts: list[bytes], *, held_out: float = 0.0) -> Corpus:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04}").write_bytes(text)
    return open_corpus(DataConfig(source="text", path=str(folder), held_out=held_out), vocab_size=258)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return corpus_of(tmp_path / "corpus", [bytes([65 + number % 26]) * (3 * number) for number in range(40)])


def stream_of(corpus: Corpus, **changes: Any) -> BatchStream:
    settings: dict[str, Any] = {"packing": "fixed", "seq_len": 10, "global_batch": 8, "seed": 1}
    return BatchStream(corpus, **(settings | changes))


def consumed(stream: BatchStream, steps: int) -> list[int]:
    return [int(sequence) for _ in range(steps) for sequence in stream.next().ids]


@given(st.integers(1, 2000), st.integers(-(2**70), 2**70), st.integers(0, 5))
def test_a_shuffle_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    order = shuffled(np.arange(size), size=size, seed=seed, epoch=epoch)
    assert sorted(order.tolist()) == list(range(size))


def test_a_shuffle_is_the_same_at_any_position_and_another_for_each_seed_and_epoch() -> None:
    whole = shuffled(np.arange(1000), size=1000, seed=7, epoch=3)
    assert shuffled(np.array([999, 5, 5]), size=1000, seed=7, epoch=3).tolist() == whole[[999, 5, 5]].tolist()
    for seed, epoch in ((7, 4), (8, 3), (3, 7)):
        other = shuffled(np.arange(1000), size=1000, seed=seed, epoch=epoch)
        assert np.count_nonzero(other == whole) < 10


def test_a_shuffle_keeps_its_order_from_release_to_release() -> None:
    assert shuffled(np.arange(10), size=10, seed=1234, epoch=0).tolist() == [6, 1, 9, 2, 4, 7, 3, 8, 5, 0]


def test_a_shuffle_mixes_near_and_far() -> None:
    size, expected = 100_000, 1000
    chi_squares = []
    for seed in range(10):
        order = shuffled(np.arange(size), size=size, seed=seed, epoch=0)
        counts = np.histogram2d(np.arange(size), order, bins=10)[0]
        chi_squares.append(float(((counts - expected) ** 2 / expected).sum()))
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert 65 < np.mean(chi_squares) < 100  # 81 degrees of freedom


def test_windows_cover_the_concatenated_documents_each_prediction_once(tmp_path: Path) -> None:
    texts = [b"hello", b"", b"a longer document", b"x"]
    stream = stream_of(corpus_of(tmp_path, texts), seq_len=4)
    row = [token for text in texts for token in (*text, EOS)]
    assert stream.num_sequences == (len(row) - 1) // 4
    for number, window in enumerate(stream.fetch(range(stream.num_sequences))):
        assert window.dtype == np.int64
        assert window.tolist() == row[4 * number : 4 * number + 5]


def test_documents_stay_whole_up_to_the_limit_and_long_ones_are_cut(tmp_path: Path) -> None:
    texts = [b"hello", b"", b"0123456789ab", b"x", b"0123"]
    stream = stream_of(corpus_of(tmp_path, texts), packing="documents", seq_len=5)
    expected = [
        [*b"hello", EOS],
        [*b"012345"],
        [*b"56789a"],
        [*b"ab", EOS],
        [*b"x", EOS],
        [*b"0123", EOS],
    ]
    assert [tokens.tolist() for tokens in stream.fetch(range(stream.num_sequences))] == expected


@pytest.mark.parametrize("packing", ["fixed", "documents"])
def test_lengths_are_those_of_the_tokens_fetched(corpus: Corpus, packing: str) -> None:
    stream = stream_of(corpus, packing=packing)
    batch = stream.next()
    assert [len(tokens) - 1 for tokens in stream.fetch(batch.ids)] == batch.lengths.tolist()
    assert batch.ids.dtype == batch.lengths.dtype == np.int64
    assert total_tokens(batch) == sum(batch.lengths)


@pytest.mark.parametrize("packing", ["fixed", "documents"])
def test_an_epoch_holds_every_sequence_once_and_the_next_has_another_order(
    corpus: Corpus, packing: str
) -> None:
    stream = stream_of(corpus, packing=packing, global_batch=1)
    first, second = (consumed(stream, stream.num_sequences) for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(stream.num_sequences))
    assert first != second


def test_a_batch_may_span_epochs_and_even_exceed_one(tmp_path: Path) -> None:
    stream = stream_of(corpus_of(tmp_path, [b"0123456789" * 3]), global_batch=7)
    assert stream.num_sequences == 3
    assert set(Counter(consumed(stream, 3)).values()) == {7}


def test_peeking_shows_the_future_and_consumes_nothing(corpus: Corpus) -> None:
    stream = stream_of(corpus)
    expected = [stream.peek(ahead) for ahead in range(60)]
    before = stream.state_dict()
    assert before == stream_of(corpus).state_dict()
    for step, batch in enumerate(expected):
        taken = stream.next()
        assert taken.step == batch.step == step
        assert taken.ids.tolist() == batch.ids.tolist()
        assert taken.lengths.tolist() == batch.lengths.tolist()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus_of(tmp_path_factory.mktemp("corpus"), [b"z" * (number % 37) for number in range(60)])


@given(st.integers(0, 40), st.integers(1, 50), st.integers(1, 50), st.sampled_from(["fixed", "documents"]))
def test_a_resumed_stream_goes_on_exactly_also_with_another_batch_size(
    small: Corpus, before: int, old: int, new: int, packing: str
) -> None:
    interrupted = stream_of(small, packing=packing, global_batch=old)
    seen = consumed(interrupted, before)
    resumed = stream_of(small, packing=packing, global_batch=new)
    resumed.load_state_dict(interrupted.state_dict())
    assert resumed.peek().step == before
    seen += consumed(resumed, 10)
    assert seen == stream_of(small, packing=packing, global_batch=len(seen)).peek().ids.tolist()


def test_a_state_holds_nothing_but_numbers_and_strings(corpus: Corpus) -> None:
    stream = stream_of(corpus)
    consumed(stream, 3)
    state = stream.state_dict()
    assert state["position"] == 24
    assert {type(value) for value in state.values()} <= {int, str}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 2}, "seed"),
        ({"seq_len": 11}, "seq_len"),
        ({"packing": "documents"}, "packing"),
        ({"split": "held_out"}, "split"),
    ],
)
def test_a_position_in_other_sequences_is_refused(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    corpus = corpus_of(tmp_path, [b"some text " * 5] * 20, held_out=0.2)
    state = stream_of(corpus).state_dict()
    with pytest.raises(ConfigError, match=f"{named} differs"):
        stream_of(corpus, **changes).load_state_dict(state)


def test_a_position_in_another_corpus_is_refused_with_everything_else_that_differs(tmp_path: Path) -> None:
    state = stream_of(corpus_of(tmp_path, [b"some text"] * 20)).state_dict()
    grown = stream_of(corpus_of(tmp_path, [b"some text"] * 21), seed=5)
    with pytest.raises(ConfigError) as caught:
        grown.load_state_dict(state)
    assert [problem.error.split()[1] for problem in caught.value.problems] == ["corpus", "differs"]
    assert grown.state_dict()["position"] == 0


@pytest.mark.parametrize(
    "damage", [{"position": -1}, {"position": "8"}, {"step": None}, {"version": 2}, {"position": True}]
)
def test_a_damaged_state_is_refused(corpus: Corpus, damage: dict[str, Any]) -> None:
    stream = stream_of(corpus)
    with pytest.raises(DataError, match="state"):
        stream.load_state_dict(stream.state_dict() | damage)
    with pytest.raises(DataError, match="state"):
        stream.load_state_dict({"position": 3})


def test_impossible_settings_are_listed_at_once(corpus: Corpus) -> None:
    with pytest.raises(ConfigError) as caught:
        stream_of(corpus, packing="tight", seq_len=0, global_batch=-1)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("packing", ["fixed", "documents"])
def test_a_split_without_a_sequence_is_refused(tmp_path: Path, packing: str) -> None:
    with pytest.raises(ConfigError, match="train split"):
        stream_of(corpus_of(tmp_path, [b"", b""]), packing=packing)


def test_a_sequence_that_does_not_exist_is_refused(corpus: Corpus) -> None:
    stream = stream_of(corpus)
    for number in (-1, stream.num_sequences):
        with pytest.raises(IndexError):
            stream.fetch([number])


def test_validation_reads_held_out_documents_only(tmp_path: Path) -> None:
    texts = [bytes([33 + number]) * 50 for number in range(90)]
    corpus = corpus_of(tmp_path, texts, held_out=0.3)

    def bytes_of(split: Split) -> set[int]:
        stream = stream_of(corpus, split=split, packing="documents")
        return {
            token for tokens in stream.fetch(range(stream.num_sequences)) for token in tokens.tolist()
        } - {EOS}

    train, held_out = bytes_of("train"), bytes_of("held_out")
    assert not train & held_out
    assert len(train) + len(held_out) == 90


def digest(rank: int, world_size: int) -> tuple[list[int], list[int]]:
    corpus = open_corpus(DataConfig(), vocab_size=258)
    stream = BatchStream(corpus, packing="documents", seq_len=4096, global_batch=64, seed=3)
    consumed(stream, 5)
    batch = stream.next()
    return batch.ids.tolist(), [int(tokens.sum()) for tokens in stream.fetch(batch.ids)]


@pytest.mark.ranks
def test_every_rank_sees_the_same_batch_without_talking() -> None:
    one, other = run_ranks(digest, 2)
    assert one == other == digest(0, 1)
