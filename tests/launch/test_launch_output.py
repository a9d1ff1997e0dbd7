"""Output of many ranks on one console: whole lines, every byte, no blocking."""

import fcntl
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.launch.output import LONGEST_LINE_BYTES, TAIL_BYTES, Console, Lines, Tail, label, wants_colour


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """``data`` in pieces of ``sizes``, then the rest."""
    pieces = []
    for size in sizes:
        pieces.append(data[:size])
        data = data[size:]
    return [*pieces, data]


@given(st.binary(max_size=200), st.lists(st.integers(0, 20), max_size=20))
def test_lines_do_not_depend_on_how_the_stream_was_cut(data: bytes, sizes: list[int]) -> None:
    lines = Lines()
    got = [line for piece in cut(data, sizes) for line in lines.feed(piece)] + lines.close()
    whole = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    assert b"\n".join(got) == whole.removesuffix(b"\n")


def test_a_line_without_end_comes_in_bounded_pieces() -> None:
    lines = Lines()
    got = [line for _ in range(40) for line in lines.feed(b"x" * 10_000)] + lines.close()
    assert b"".join(got) == b"x" * 400_000
    assert max(map(len, got)) <= LONGEST_LINE_BYTES


def test_the_last_line_needs_no_newline() -> None:
    lines = Lines()
    assert lines.feed(b"a\nlast") == [b"a"]
    assert lines.close() == [b"last"]
    assert lines.close() == []


def test_a_progress_bar_shows_as_lines() -> None:
    lines = Lines()
    assert lines.feed(b"10%\r20%\r") == [b"10%"]
    assert lines.feed(b"30%\r\n") == [b"20%", b"30%"]


def test_labels_are_equally_wide_and_coloured_on_request() -> None:
    assert label(3, world_size=128) == b"[rank   3] "
    assert label(127, world_size=128, node="node1") == b"[node1 rank 127] "
    assert label(0, world_size=2, colour=True) == b"\x1b[36m[rank 0]\x1b[0m "


def test_colours_are_for_terminals_whose_user_wants_them() -> None:
    leader, follower = os.openpty()
    reader, writer = os.pipe()
    assert wants_colour(follower, environ={"TERM": "xterm"})
    assert not wants_colour(follower, environ={"NO_COLOR": "1"})
    assert not wants_colour(follower, environ={"TERM": "dumb"})
    assert not wants_colour(writer, environ={"TERM": "xterm"})
    for fd in (leader, follower, reader, writer):
        os.close(fd)


@given(st.lists(st.binary(min_size=1, max_size=3000), max_size=60))
def test_the_tail_is_the_end_of_the_stream(pieces: list[bytes]) -> None:
    tail = Tail()
    for piece in pieces:
        tail.feed(piece, now=1.0)
    assert tail.text == b"".join(pieces)[-TAIL_BYTES:].decode(errors="replace")


def test_the_tail_knows_when_the_last_traceback_began_even_if_it_came_in_two_reads() -> None:
    tail = Tail()
    for now, piece in enumerate(
        [b"x\nTrace", b"back (most recent call last):", b"\n  File", b"\nE: e"], start=1
    ):
        tail.feed(piece, now=float(now))
    assert tail.traceback_at == 2.0


@pytest.fixture
def pipe() -> tuple[int, int]:
    return os.pipe()


def test_a_console_without_a_reader_never_blocks_and_loses_nothing(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    console = Console(writer)
    sent = b"".join(b"%d\n" % i for i in range(200_000))
    for start in range(0, len(sent), 50_000):
        console.write(sent[start : start + 50_000])
    assert console.waiting
    assert console.full
    got = bytearray()

    def read() -> None:
        while data := os.read(reader, 1 << 16):
            got.extend(data)

    thread = threading.Thread(target=read)
    thread.start()
    console.flush()
    os.close(writer)
    thread.join()
    os.close(reader)
    assert got == sent
    assert not console.waiting


def test_two_consoles_on_one_pipe_do_not_cut_each_others_lines(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)  # so that they must take turns
    consoles = [Console(writer), Console(writer)]
    lines = [[f"{name}{i:{'.'}>{20 + i % 70}}\n".encode() for i in range(3000)] for name in "ab"]
    for console, mine in zip(consoles, lines, strict=True):
        console.write(b"".join(mine))
    got = b""
    while any(console.waiting for console in consoles):
        got += os.read(reader, 4096)
        consoles.reverse()
        for console in consoles:
            console.pump()
    os.close(writer)
    while data := os.read(reader, 4096):
        got += data
    os.close(reader)
    assert sorted(got.splitlines(keepends=True)) == sorted(lines[0] + lines[1])


def test_a_reader_that_leaves_does_not_end_the_job(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    console = Console(writer)
    os.close(reader)
    console.write(b"gone\n")
    console.write(b"still gone\n")
    console.flush()
    assert not console.waiting
    os.close(writer)
