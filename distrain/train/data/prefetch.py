"""Reads the next step's data while this step computes.

One thread, one step ahead. The stream itself is never ahead: what the thread prepares is a peek, and counts as
consumed only when the trainer takes it, so that a checkpoint in between is exact.
"""

import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np

from .batches import BatchStream, GlobalBatch

T = TypeVar("T")
JOIN_TIMEOUT_S = 5.0


class Prefetcher(Generic[T]):
    """Yields the batches of ``stream`` together with ``prepare(batch)``, computed in a thread one step ahead.

    ``prepare`` fetches and collates the caller's share (``BatchStream.fetch``, ``micro.split``, ``micro.collate``).
    An exception in it is raised by the ``next`` that would have returned its result. Use as a context manager.
    """

    def __init__(self, stream: BatchStream, prepare: Callable[[GlobalBatch], T]) -> None:
        self._stream = stream
        self._orders: SimpleQueue[tuple[GlobalBatch, Future[T]] | None] = SimpleQueue()
        self._thread = threading.Thread(
            target=_serve, args=(self._orders, prepare), name="distrain-prefetch", daemon=True
        )
        self._thread.start()
        self._ahead = self._order(stream.peek())

    def next(self) -> tuple[GlobalBatch, T]:
        """The stream's next batch, now consumed, and what ``prepare`` made of it."""
        batch = self._stream.next()
        expected, future = self._ahead
        if not _same(batch, expected):  # the stream was moved, by a restored checkpoint
            _, future = self._order(batch)
        self._ahead = self._order(self._stream.peek())
        return batch, future.result()

    def close(self) -> None:
        """Stop the thread; warns if it hangs in a read, which ends with the process."""
        self._orders.put(None)
        self._thread.join(JOIN_TIMEOUT_S)
        if self._thread.is_alive():
            warnings.warn(
                f"a data read hangs for more than {JOIN_TIMEOUT_S:g} s", ResourceWarning, stacklevel=2
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _order(self, batch: GlobalBatch) -> tuple[GlobalBatch, "Future[T]"]:
        future: Future[T] = Future()
        self._orders.put((batch, future))
        return batch, future


def _serve(
    orders: "SimpleQueue[tuple[GlobalBatch, Future[T]] | None]", prepare: Callable[[GlobalBatch], T]
) -> None:
    while (order := orders.get()) is not None:
        batch, future = order
        try:
            future.set_result(prepare(batch))
        except BaseException as error:  # handed to the consumer, whatever it is
            future.set_exception(error)


def _same(one: GlobalBatch, other: GlobalBatch) -> bool:
    return one.step == other.step and np.array_equal(one.ids, other.ids)
