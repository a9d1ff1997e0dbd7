"""torch.distributed.checkpoint: save, and async_save with each of its ways to stage and to write."""

import os
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from .base import Training


class Sync:
    """``dcp.save``, which syncs its files by itself."""

    overlaps = False

    def __init__(self, training: Training, folder: Path) -> None:
        self._training, self._folder = training, folder

    def save(self, step: int) -> None:
        dcp.save(self._state(), storage_writer=FileSystemWriter(self._folder / str(step)))

    def fence(self) -> None:
        pass

    def durable(self) -> None:
        pass

    def restore(self, step: int) -> None:
        dcp.load(self._state(), storage_reader=FileSystemReader(self._folder / str(step)))

    def close(self) -> None:
        pass

    def _state(self) -> dict[str, Any]:
        return dict(self._training.tensors())


class Async(Sync):
    """``dcp.async_save``; what it stages is safe when staging has ended."""

    overlaps = True

    def __init__(
        self,
        training: Training,
        folder: Path,
        *,
        staging: StagingOptions | None,
        kind: AsyncCheckpointerType,
    ) -> None:
        super().__init__(training, folder)
        os.environ |= {"MASTER_ADDR": "127.0.0.1"}  # the group of its process
        self._stager = DefaultStager(staging) if staging else None
        self._kind = kind
        self._staged: Future[Any] | None = None
        self._written: Future[Any] | None = None

    def save(self, step: int) -> None:
        self.durable()
        response = dcp.async_save(
            self._state(),
            storage_writer=FileSystemWriter(self._folder / str(step)),
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )
        if isinstance(response, AsyncSaveResponse):
            self._staged, self._written = response.staging_completion, response.upload_completion
        else:
            self._staged, self._written = None, response

    def fence(self) -> None:
        if self._staged:
            self._staged.result()

    def durable(self) -> None:
        if self._written:
            self._written.result()

    def close(self) -> None:
        self.durable()
        if self._stager:
            self._stager.close()


def _staging(*, background: bool) -> StagingOptions:
    """Buffers that are kept, in shared memory; the other options need a GPU."""
    return StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=True,
        use_async_staging=background,
        use_non_blocking_copy=False,
    )


_THREAD, _PROCESS = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS

sync = Sync
thread = partial(Async, staging=None, kind=_THREAD)
thread_cached = partial(Async, staging=_staging(background=False), kind=_THREAD)
thread_async_staging = partial(Async, staging=_staging(background=True), kind=_THREAD)
process_shared = partial(Async, staging=_staging(background=False), kind=_PROCESS)
process_async_staging = partial(Async, staging=_staging(background=True), kind=_PROCESS)
