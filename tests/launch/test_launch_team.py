"""Agents among themselves: who may join, who is lost, who has the last word."""

import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import pytest

from distrain.launch.failure import NodeReport, WorkerExit
from distrain.launch.link import LONGEST_MESSAGE_BYTES, Link
from distrain.launch.rendezvous import Hello, refusal
from distrain.launch.team import SILENCE_S, Host, Member, Team, team

OWN = Hello(protocol=1, run_id="j", node="a", nnodes=3, nproc=2, node_rank=0, plan_digest="")
FAILED = WorkerExit(rank=2, local_rank=0, node="b", pid=1, code=3, at=1.0)
NODES = ("a", "b")


@pytest.fixture
def pair() -> Iterator[tuple[Host, Member]]:
    """Two nodes with a connection between them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ends = socket.create_connection(server.getsockname()), server.accept()[0]
    host = Host({1: Link(ends[0])}, nodes=NODES, node_rank=0)
    member = Member({0: Link(ends[1])}, nodes=NODES, node_rank=1)
    yield host, member
    host.close()
    member.close()


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (replace(OWN, node_rank=1), ""),
        (replace(OWN, node_rank=1, nproc=5), ""),
        (replace(OWN, node_rank=1, protocol=2), "another version"),
        (replace(OWN, node_rank=1, run_id="k"), "--rdzv-id"),
        (replace(OWN, node_rank=1, nnodes=4), "the job has 3 nodes"),
        (replace(OWN, node_rank=1, nproc=0), "no ranks"),
        (replace(OWN, node_rank=1, plan_digest="x"), "another plan"),
        (replace(OWN, node_rank=None), "--rdzv-backend"),
        (replace(OWN, node_rank=0), "no place for a node of rank 0"),
        (replace(OWN, node_rank=3), "no place for a node of rank 3"),
        (replace(OWN, node_rank=2), "taken by b"),
    ],
)
def test_a_node_that_does_not_belong_is_told_why(other: Hello, reason: str) -> None:
    said = refusal(other, OWN, taken={2: replace(OWN, node="b", node_rank=2)})
    assert (reason in said) if reason else (said == "")


def test_a_node_alone_knows_the_verdict_from_its_own_report() -> None:
    alone = team({}, nodes=("a",), node_rank=0)
    assert type(alone) is Team
    alone.finish(NodeReport(exits=(FAILED,)))
    assert (alone.settled, alone.code) == (True, 1)


def test_the_verdict_waits_for_every_node_and_is_the_same_on_all(pair: tuple[Host, Member]) -> None:
    host, member = pair
    host.finish(NodeReport())
    assert not host.settled
    member.finish(NodeReport(exits=(FAILED,)))
    host.hear(1, now=0.0)
    assert (host.settled, host.code) == (True, 1)
    member.hear(0, now=0.0)
    assert (member.settled, member.code) == (True, 1)
    assert "rank 2 on b failed first: exit code 3" in member.why


def test_a_stop_reaches_the_other_node_with_its_reason(pair: tuple[Host, Member]) -> None:
    host, member = pair
    member.announce("SIGTERM", signum=15)
    host.hear(1, now=0.0)
    assert (host.why, host.signum) == ("SIGTERM", 15)


def test_silence_means_that_a_node_is_lost_and_beats_break_it(pair: tuple[Host, Member]) -> None:
    host, member = pair
    host.tick(now=0.0)
    member.tick(now=0.0)
    host.hear(1, now=SILENCE_S)
    host.tick(now=2 * SILENCE_S)
    assert host.why == ""
    host.tick(now=2 * SILENCE_S + 1)
    assert "b is lost" in host.why
    host.finish(NodeReport())
    assert (host.settled, host.code) == (True, 1)


def test_without_node_0_a_node_judges_for_itself(pair: tuple[Host, Member]) -> None:
    host, member = pair
    host.close()
    member.hear(0, now=0.0)
    member.tick(now=0.0)
    assert "a is lost" in member.trouble
    assert not member.settled
    member.finish(NodeReport())
    assert (member.settled, member.code) == (True, 1)


@pytest.mark.parametrize(
    "nonsense",
    [
        b"GET / HTTP/1.1\n",
        b"[1]\n",
        b'{"stop": "x"}\n',
        b'{"report": 3}\n',
        b"x" * (LONGEST_MESSAGE_BYTES + 1),
    ],
)
def test_a_peer_that_talks_nonsense_is_cut_off(nonsense: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        stranger, end = socket.create_connection(server.getsockname()), server.accept()[0]
    host = Host({1: Link(end)}, nodes=NODES, node_rank=0)
    stranger.setblocking(False)
    sent = 0
    for _ in range(10_000):
        if sent < len(nonsense):
            with suppress(BlockingIOError):
                sent += stranger.send(nonsense[sent:])
        host.hear(1, now=0.0)
        if host.links[1].closed:
            break
    host.tick(now=0.0)
    assert "b is lost" in host.why
    host.close()
    stranger.close()
