"""Who may talk to a keeper, and what happens to those who talk nonsense: only they notice."""

import json
import os
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distrain.checkpoint.layout import STRIDE
from distrain.core import shared_memory
from distrain.core.errors import ConfigError
from distrain.core.sidecar_client import KeeperClient, KeeperLost, KeeperRefused
from distrain.core.sidecar_connection import PURPOSE
from distrain.core.sidecar_home import Home
from distrain.core.wire import Frame, WireError, initiate
from distrain.core.wire_ends import SyncEnd
from helpers.keepers import Keepers, Rank, config_of, keepers_in, layout_of, until

pytestmark = pytest.mark.processes

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


def home_of(keepers: Keepers) -> Home:
    return Home("job", node_rank=0, environ=keepers.environ)


def knock(keepers: Keepers) -> SyncEnd:
    """A connection that has shaken hands."""
    home = home_of(keepers)
    return SyncEnd.shake(home.connect(timeout_s=5), initiate(home.key(), purpose=PURPOSE))


def hello(**changes: Any) -> dict[str, Any]:
    """What a trainer says first, or something like it."""
    return {
        "do": "hello",
        "returns": False,
        "job": "job",
        "rank": 0,
        "local_rank": 0,
        "world_size": 1,
        "node_rank": 0,
        "num_nodes": 1,
        "slot_bytes": STRIDE,
        "num_slots": 1,
        "config": config_of().to_json(),
        "pid": 1,
        **changes,
    }


def answer_to(keepers: Keepers, header: Mapping[str, Any], payload: bytes = b"", *, fd: int = -1) -> Frame:
    end = knock(keepers)
    try:
        end.send(dict(header), payload)
        if fd >= 0:
            socket.send_fds(end.socket, [b"\0"], [fd])
        return end.receive(timeout_s=30)
    finally:
        end.close()


def works(rank: Rank, step: int) -> bool:
    """Whether the keeper serves its trainer as ever."""
    return rank.save(step) and rank.client.wait(step, level="protected", timeout_s=30).reached


def test_folder_socket_and_key_are_the_users_alone(keepers: Keepers, tmp_path: Path) -> None:
    keepers.rank(config_of())
    folder = tmp_path / "run" / "distrain"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    modes = {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == dict.fromkeys((".sock", ".key", ".lock", ".log"), 0o600)


def test_the_key_is_in_no_command_line(keepers: Keepers) -> None:
    keepers.rank(config_of())
    (pid,) = keepers.pids
    assert home_of(keepers).key().hex().encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_folder_that_others_can_enter_is_not_used(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "distrain"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigError, match="cannot be trusted"):
        Home("job", node_rank=0, environ={"XDG_RUNTIME_DIR": str(tmp_path)})


def test_a_folder_that_is_a_link_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "distrain").symlink_to("elsewhere")
    with pytest.raises(ConfigError, match="cannot be trusted"):
        Home("job", node_rank=0, environ={"XDG_RUNTIME_DIR": str(tmp_path)})


def test_a_key_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    home = Home("job", node_rank=0, environ={"XDG_RUNTIME_DIR": str(tmp_path)})
    assert home.key(create=True) == home.key()
    next(home.folder.glob("*.key")).chmod(0o644)
    with pytest.raises(ConfigError, match="can be read by others"):
        home.key()


@pytest.mark.parametrize("key", ["", "zz", "ab" * 31])
def test_a_key_that_is_none_is_explained(tmp_path: Path, key: str) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path), "DISTRAIN_JOB_KEY": key}
    with pytest.raises(ConfigError, match="no key for this job"):
        Home("job", node_rank=0, environ=environ).key()


def test_a_client_with_another_key_is_not_served(keepers: Keepers) -> None:
    rank = keepers.rank(config_of())
    with pytest.raises(KeeperLost):
        KeeperClient.connect(
            job="job",
            rank=0,
            local_rank=0,
            world_size=1,
            slot_bytes=STRIDE,
            num_slots=1,
            config=config_of(),
            timeout_s=0.5,
            environ={**keepers.environ, "DISTRAIN_JOB_KEY": "ab" * 32},
        )
    assert works(rank, 1)


def test_strangers_at_the_socket_are_of_no_importance(keepers: Keepers) -> None:
    rank = keepers.rank(config_of())
    silent = [home_of(keepers).connect(timeout_s=5) for _ in range(6)]
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"DT\x01\x00" + b"\xff" * 12, bytes(500)):
        with home_of(keepers).connect(timeout_s=5) as stranger:
            stranger.sendall(words)
            stranger.shutdown(socket.SHUT_WR)
            with suppress(ConnectionResetError):
                while stranger.recv(4096):
                    pass
    assert works(rank, 1)
    for each in silent:
        each.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"job": 5},
        {"job": ""},
        {"job": "x" * 300},
        {"rank": -1},
        {"rank": 1},
        {"rank": True},
        {"rank": "0"},
        {"world_size": 0},
        {"world_size": 1 << 40},
        {"slot_bytes": STRIDE - 1},
        {"slot_bytes": 1 << 60},
        {"slot_bytes": 1 << 43},
        {"num_slots": 0},
        {"num_slots": 1000},
        {"config": None},
        {"config": {}},
        {"config": {"tiers": [{"nonsense": 1}]}},
        {"config": {"tiers": 5}},
        {"config": {**config_of().to_json(), "num_attempts": "many"}},
        {"do": "fetch", "arena": "nothing"},
        {"do": "fetch"},
        {"do": None},
    ],
)
def test_a_hello_that_makes_no_sense_is_refused_with_a_reason(
    keepers: Keepers, changes: dict[str, Any]
) -> None:
    rank = keepers.rank(config_of())
    assert answer_to(keepers, hello(**{"job": "other", **changes})).header["refused"]
    assert works(rank, 1)


def test_memory_of_another_kind_is_not_taken(keepers: Keepers, tmp_path: Path) -> None:
    rank = keepers.rank(config_of())
    claims = json.dumps({"layouts": [], "slots": {}}).encode()
    small = shared_memory.create(4096)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    for fd in (small, file):
        said = answer_to(keepers, hello(job="other", returns=True), claims, fd=fd).header
        assert "not the memory of a rank" in said["refused"]
        os.close(fd)
    assert works(rank, 1)


def test_claims_about_memory_that_does_not_bear_them_out_are_not_believed(keepers: Keepers) -> None:
    keepers.rank(config_of())
    layout = layout_of(0, 1)
    claims = {
        "layouts": [layout.to_json()],
        "slots": {
            "0": {"step": 3, "digest": layout.digest, "objects": {}},
            "7": {"step": 4, "digest": layout.digest, "objects": {}},
        },
    }
    fd = shared_memory.create(4096 + STRIDE)
    end = knock(keepers)
    end.send(hello(job="other", returns=True), json.dumps(claims).encode())
    socket.send_fds(end.socket, [b"\0"], [fd])
    os.close(fd)
    assert "first_slot" in end.receive(timeout_s=30).header
    end.send({"do": "sealed", "id": 1})
    assert end.receive(timeout_s=30).header["steps"] == []
    end.send({"do": "bye", "id": 2})
    end.receive(timeout_s=30)
    end.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Keepers, Rank]]:
    """A keeper with a trainer, for many requests."""
    with keepers_in(tmp_path_factory.mktemp("served")) as found:
        yield found, found.rank(config_of())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    do=st.sampled_from(
        [
            "layout",
            "open",
            "place",
            "copied",
            "seal",
            "invalidate",
            "wait",
            "drain",
            "pin",
            "unpin",
            "nothing",
            "_take",
        ]
    ),
    fields=st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ("step", "slot", "extent", "extents", "level", "tier", "policy", "digest", "reason", "durable"),
            JSON,
        ),
    ),
    payload=st.binary(max_size=20) | JSON.map(lambda value: json.dumps(value).encode()),
)
def test_a_trainer_that_talks_nonsense_is_refused_or_cut_off_and_the_others_are_served(
    served: tuple[Keepers, Rank], do: str, fields: dict[str, Any], payload: bytes
) -> None:
    keepers, rank = served
    end = knock(keepers)
    end.send(hello(job="fuzz"))
    assert "first_slot" in end.receive(timeout_s=30).header
    for fd in socket.recv_fds(end.socket, 1, 1)[1]:
        os.close(fd)
    try:
        end.send({"do": do, "id": 1, "timeout_s": 0.01, **fields}, payload)
        while end.receive(timeout_s=30).header.get("re") != 1:
            pass
        end.send({"do": "bye", "id": 2})
        while end.receive(timeout_s=30).header.get("re") != 2:
            pass
    except WireError:
        pass
    end.close()
    assert rank.client.status()["pid"] in keepers.pids


def test_after_all_that_the_keeper_still_saves(served: tuple[Keepers, Rank]) -> None:
    _, rank = served
    assert works(rank, 1)
    assert "internal_error" not in rank.events()


def test_a_refused_client_says_why(keepers: Keepers) -> None:
    rank = keepers.rank(config_of())
    with pytest.raises(KeeperRefused, match="not being filled"):
        rank.client._connection.ask({"do": "seal", "slot": 0})
    with pytest.raises(KeeperRefused, match="policy is wrong"):
        rank.save(1, policy="hope")
    until(lambda: works(rank, 2), "the keeper goes on")
