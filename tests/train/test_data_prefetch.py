"""Reading one step ahead: the same batches, the same errors, and no thread left behind."""

import threading
from pathlib import Path

import pytest

from distrain.core.config import DataConfig
from distrain.core.errors import DataError
from distrain.train.data.batches import BatchStream, GlobalBatch
from distrain.train.data.corpus import open_corpus
from distrain.train.data.prefetch import Prefetcher

PATIENCE_S = 20.0


@pytest.fixture
def stream(tmp_path: Path) -> BatchStream:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 4)
    corpus = open_corpus(DataConfig(source="text", path=str(tmp_path), held_out=0.0), vocab_size=258)
    return BatchStream(corpus, packing="fixed", seq_len=8, global_batch=4, seed=0)


def test_batches_come_in_order_with_what_was_made_of_them(stream: BatchStream) -> None:
    expected = [stream.peek(ahead) for ahead in range(50)]
    with Prefetcher(stream, lambda batch: stream.fetch(batch.ids)) as prefetcher:
        for wanted in expected:
            batch, sequences = prefetcher.next()
            assert batch.ids.tolist() == wanted.ids.tolist()
            assert [tokens.tolist() for tokens in sequences] == [
                tokens.tolist() for tokens in stream.fetch(wanted.ids)
            ]


def test_the_next_batch_is_prepared_before_it_is_asked_for(stream: BatchStream) -> None:
    prepared: dict[int, threading.Event] = {step: threading.Event() for step in range(3)}
    with Prefetcher(stream, lambda batch: prepared[batch.step].set()) as prefetcher:
        assert prepared[0].wait(PATIENCE_S)
        prefetcher.next()
        assert prepared[1].wait(PATIENCE_S)
        assert not prepared[2].is_set()


def test_what_is_prepared_ahead_does_not_count_as_consumed(stream: BatchStream) -> None:
    ready = threading.Event()
    with Prefetcher(stream, lambda batch: ready.set() if batch.step == 1 else None) as prefetcher:
        prefetcher.next()
        assert ready.wait(PATIENCE_S)
        assert stream.state_dict()["position"] == 4


def test_a_restored_position_takes_effect_at_once(stream: BatchStream) -> None:
    start = stream.state_dict()
    with Prefetcher(stream, lambda batch: batch.step) as prefetcher:
        first = [prefetcher.next()[1] for _ in range(3)]
        stream.load_state_dict(start)
        again = [prefetcher.next()[1] for _ in range(3)]
    assert first == again == [0, 1, 2]


def test_an_error_in_the_thread_reaches_the_step_that_needed_the_data(stream: BatchStream) -> None:
    def prepare(batch: GlobalBatch) -> int:
        if batch.step == 2:
            raise DataError("the disk is gone")
        return batch.step

    with Prefetcher(stream, prepare) as prefetcher:
        assert [prefetcher.next()[1] for _ in range(2)] == [0, 1]
        with pytest.raises(DataError, match="the disk is gone"):
            prefetcher.next()


def test_the_thread_has_a_name_and_ends_with_the_block_even_after_an_error(stream: BatchStream) -> None:
    def names() -> list[str]:
        return [thread.name for thread in threading.enumerate()]

    with pytest.raises(KeyError), Prefetcher(stream, lambda batch: batch.step):
        assert "distrain-prefetch" in names()
        raise KeyError
    assert "distrain-prefetch" not in names()


def test_a_read_that_hangs_is_reported_and_does_not_hang_the_end(
    stream: BatchStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distrain.train.data.prefetch.JOIN_TIMEOUT_S", 0.05)
    release = threading.Event()
    prefetcher = Prefetcher(stream, lambda batch: release.wait(PATIENCE_S))
    with pytest.warns(ResourceWarning, match="hangs"):
        prefetcher.close()
    release.set()
