"""Trainers for tests of the keeper: clients in this process, and processes that can be killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrain.checkpoint.blob import BlobReader
from distrain.checkpoint.candidates import candidates
from distrain.checkpoint.keeper_config import KeeperConfig, TierConfig
from distrain.checkpoint.layout import EXTENT_BYTES, STRIDE, WriterLayout, pack, segments
from distrain.checkpoint.storage import Storage, aligned_memory
from distrain.checkpoint.tiers import open_storage
from distrain.core.protocols import ShardBox
from distrain.core.sidecar_client import KeeperClient, KeeperLost, KeeperRefused, Slot
from distrain.core.sidecar_home import Home

DEADLINE_S = 40.0
ROOT = Path(__file__).parents[2]


def until(condition: Callable[[], object], what: str) -> None:
    """Poll ``condition`` until it holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"never happened: {what}")
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def layout_of(rank: int, world_size: int, *, nbytes: int = 1 << 20) -> WriterLayout:
    """One tensor of bytes over all ranks, of which each writes ``nbytes``."""
    box = ShardBox(
        fqn="w", dtype="uint8", global_shape=(world_size * nbytes,), offset=(rank * nbytes,), shape=(nbytes,)
    )
    return pack(rank, [box])


def pattern(step: int, rank: int, nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What a rank's bytes are at a step."""
    words = np.arange(-(-nbytes // 8), dtype=np.uint64) * np.uint64(2654435761) + np.uint64(
        step * 1000 + rank
    )
    return words.view(np.uint8)[:nbytes]


def fill(client: KeeperClient, slot: Slot, layout: WriterLayout, data: np.ndarray[Any, Any]) -> None:
    """Copy ``data`` extent by extent, and say so."""
    memory = np.frombuffer(slot.memory, np.uint8)
    for position, start, length in segments(0, layout.nbytes):
        extent = position // STRIDE
        place = client.place(slot, extent, timeout_s=DEADLINE_S) + position % STRIDE
        memory[place : place + length] = data[start : start + length]
        client.copied(slot, [extent])


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong at a failpoint of a keeper."""

    point: str
    action: str
    """kill, the name of an errno, or seconds to sleep"""
    on_hit: int = 1
    always: bool = False
    """from that hit on, at every one"""


class Rank:
    """One rank's client, with what it saves."""

    def __init__(self, client: KeeperClient, rank: int, world_size: int, nbytes: int) -> None:
        self.client, self.rank, self.layout = client, rank, layout_of(rank, world_size, nbytes=nbytes)
        self.notices: list[Mapping[str, Any]] = []
        client.on_notice = self.notices.append

    def open(
        self, step: int, *, policy: str = "block", durable: bool = False, timeout_s: float = 30
    ) -> Slot | None:
        objects = {"step": step, "rank": self.rank}
        return self.client.open(
            step, self.layout, objects, policy=policy, timeout_s=timeout_s, durable=durable
        )

    def fill(self, slot: Slot) -> None:
        fill(self.client, slot, self.layout, pattern(slot.step, self.rank, self.layout.nbytes))

    def save(self, step: int, *, policy: str = "block", durable: bool = False) -> bool:
        """Save a step up to its seal; False if it was skipped."""
        slot = self.open(step, policy=policy, durable=durable)
        if slot:
            self.fill(slot)
            self.client.seal(slot)
        return slot is not None

    def events(self) -> list[str]:
        return [str(notice["event"]) for notice in self.notices]


class Keepers:
    """Starts clients of one job, and sees that nothing of it is left."""

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self.folder, self.environ = folder, environ
        self.ranks: list[Rank] = []
        self.trainers: list[Trainer] = []
        self.pids: set[int] = set()

    def environ_of(self, node_rank: int, num_nodes: int) -> dict[str, str]:
        return {**self.environ, "GROUP_RANK": str(node_rank), "GROUP_WORLD_SIZE": str(num_nodes)}

    def rank(
        self,
        config: KeeperConfig,
        *,
        rank: int = 0,
        world_size: int = 1,
        node_rank: int = 0,
        num_nodes: int = 1,
        nbytes: int = 1 << 20,
        num_slots: int = 2,
        slot_extents: int = 0,
        start: bool = True,
        job: str = "job",
    ) -> Rank:
        """A client in this process."""
        layout = layout_of(rank, world_size, nbytes=nbytes)
        client = KeeperClient.connect(
            job=job,
            rank=rank,
            local_rank=rank,
            world_size=world_size,
            slot_bytes=slot_extents * STRIDE or layout.slot_bytes,
            num_slots=num_slots,
            config=config,
            start=start,
            environ=self.environ_of(node_rank, num_nodes),
        )
        self.ranks.append(Rank(client, rank, world_size, nbytes))
        self.pids.add(int(client.status()["pid"]))
        return self.ranks[-1]

    def trainer(self, config: KeeperConfig, **arguments: Any) -> "Trainer":
        """A client in a process of its own."""
        self.trainers.append(Trainer(config, self.environ, self.folder, arguments))
        return self.trainers[-1]

    def start_keeper(
        self, *faults: Fault, node_rank: int = 0, prefix: Sequence[str] = (), job: str = "job"
    ) -> None:
        """Start a keeper in which things will go wrong; clients find it instead of starting one."""
        home = Home(job, node_rank=node_rank, environ=self.environ_of(node_rank, 1))
        spec = json.dumps([asdict(fault) for fault in faults])
        command = [*prefix, sys.executable, str(ROOT / "tests/helpers/armed_keeper.py"), spec]
        with home.locked():
            home.key(create=True)
            with home.listen() as listener:
                assert home.start(listener, command=command).wait() == 0

    def close(self) -> None:
        for trainer in self.trainers:
            trainer.kill()
        for each in self.ranks:
            with suppress(KeeperLost, KeeperRefused):
                self.pids.add(int(each.client.status()["pid"]))
            each.client.close(flush=False)
        for pid in self.pids:
            if alive(pid):
                os.kill(pid, signal.SIGTERM)
        for pid in self.pids:
            until(lambda pid=pid: not alive(pid), f"end of keeper {pid}")  # type: ignore[misc]


class Trainer:
    """A process that does what it is told, until it is killed."""

    def __init__(
        self, config: KeeperConfig, environ: Mapping[str, str], folder: Path, arguments: Mapping[str, Any]
    ) -> None:
        path = f"{ROOT}/tests:{ROOT}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "helpers.keepers", json.dumps([config.to_json(), str(folder), arguments])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environ, "PYTHONPATH": path},
            text=True,
            start_new_session=True,
        )
        self.keeper_pid = int(self.read())

    def do(self, call: str, *arguments: Any, **keywords: Any) -> Any:
        """Call a method of ``Rank`` there, or of its client (``client.wait``); the result as JSON."""
        self.begin(call, *arguments, **keywords)
        return self.read()

    def begin(self, call: str, *arguments: Any, **keywords: Any) -> None:
        """The same, without waiting."""
        assert self.process.stdin
        print(json.dumps([call, arguments, keywords]), file=self.process.stdin, flush=True)

    def read(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise EOFError("the trainer is gone")
        return json.loads(line)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe and not pipe.closed:
                pipe.close()


def obey(config: Mapping[str, Any], folder: str, arguments: Mapping[str, Any]) -> None:
    """What a ``Trainer`` process does."""
    keepers = Keepers(Path(folder), os.environ)
    rank = keepers.rank(KeeperConfig.from_json(config), **arguments)
    print(json.dumps(int(rank.client.status()["pid"])), flush=True)
    for line in sys.stdin:
        call, positional, keywords = json.loads(line)
        if call == "open_and_stop":
            slot = rank.open(*positional, **keywords)
            assert slot
            rank.fill(slot)
            result: Any = True
        else:
            target = rank.client if call.startswith("client.") else rank
            result = getattr(target, call.removeprefix("client."))(*positional, **keywords)
        plain = getattr(result, "__dataclass_fields__", None)
        print(json.dumps({name: getattr(result, name) for name in plain} if plain else result), flush=True)


@contextmanager
def keepers_in(folder: Path) -> Iterator[Keepers]:
    """Keepers whose sockets are below ``folder``."""
    run = folder / "run"
    run.mkdir()
    found = Keepers(folder, {**os.environ, "XDG_RUNTIME_DIR": str(run)})
    try:
        yield found
    finally:
        found.close()


def local(folder: Path, **options: Any) -> TierConfig:
    """A tier in a folder."""
    return TierConfig(url=str(folder / "local"), name="local", **options)


def config_of(*tiers: TierConfig, **options: Any) -> KeeperConfig:
    """A configuration for tests: quick to try again."""
    return KeeperConfig(tiers=tiers, **{"backoff_s": 0.05, **options})


def committed(url: str, *, writers: Sequence[int] | None = None) -> dict[int, str]:
    """Folders of the checkpoints that are there and good, by step."""
    return {
        each.step: each.folder
        for each in candidates(open_storage(url), writers=writers)
        if each.manifest is not None
    }


def content(url: str, step: int, writer: int) -> bytes:
    """A writer's bytes in a checkpoint, verified."""
    storage: Storage = open_storage(url)
    good = (each for each in candidates(storage, writers=[writer]) if each.manifest)
    found = next(each for each in good if each.step == step)
    assert found.manifest
    stored = found.manifest.writers[writer]
    buffer = aligned_memory(STRIDE)
    with BlobReader(storage, found.folder, writer=writer, crcs=stored.crcs) as blob:
        whole = b"".join(bytes(blob.read(extent, buffer)) for extent in range(len(stored.crcs)))
    assert not any(whole[stored.nbytes :])
    assert len(whole) == len(stored.crcs) * EXTENT_BYTES
    return whole[: stored.nbytes]


def is_saved(url: str, step: int, *, world_size: int = 1, nbytes: int = 1 << 20) -> bool:
    """Whether a checkpoint holds exactly what all ranks had at that step."""
    return all(
        content(url, step, rank) == pattern(step, rank, nbytes).tobytes() for rank in range(world_size)
    )


if __name__ == "__main__":
    obey(*json.loads(sys.argv[1]))
