"""Frames between processes: what arrives is what was sent, or the connection ends."""

import secrets
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.core import wire
from distrain.core.wire import Frame, Session, WireError, accept, decode, encode, initiate, lengths
from distrain.core.wire_ends import SyncEnd

KEY = bytes(range(32))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
HEADERS = st.dictionaries(st.text(max_size=8), JSON, max_size=4)


def sessions() -> tuple[Session, Session]:
    """What two ends know after a handshake, without sockets."""
    there, back = initiate(KEY, purpose="test"), accept(KEY, purpose="test")
    hello, _ = next(there), next(back)
    answer = back.send(_clear(hello))
    next(there)
    proof = there.send(_clear(answer))
    session = next(back).session  # type: ignore[union-attr]
    counter_proof = back.send(_sealed(proof, session))
    own = next(there).session  # type: ignore[union-attr]
    return _returned(there, _sealed(counter_proof, own)), _returned(back, None)


def _clear(data: object) -> Frame:
    assert isinstance(data, bytes)
    return taken_apart(data, None)


def _sealed(data: object, session: Session | None) -> Frame:
    assert isinstance(data, bytes)
    return taken_apart(data, session)


def _returned(handshake: wire.Handshake, frame: Frame | None) -> Session:
    try:
        handshake.send(frame) if frame else next(handshake)
    except StopIteration as done:
        session: Session = done.value
        return session
    raise AssertionError("the handshake goes on")


def taken_apart(data: bytes, session: Session | None) -> Frame:
    prefix, rest = data[: wire.PREFIX_BYTES], data[wire.PREFIX_BYTES :]
    header, payload, tag = lengths(prefix, session=session)
    if len(rest) != header + payload + tag:
        raise WireError("cut")
    return decode(
        prefix, rest[:header], rest[header : header + payload], rest[header + payload :], session=session
    )


@given(HEADERS, st.binary(max_size=200))
def test_a_frame_arrives_as_it_was_sent(header: dict[str, object], payload: bytes) -> None:
    there, back = sessions()
    for _ in range(2):
        frame = taken_apart(encode(header, payload, session=there), back)
        assert (frame.header, frame.payload) == (header, payload)
        assert taken_apart(encode(header, payload, session=back), there).header == header


@given(st.data())
def test_a_frame_with_any_bit_changed_is_refused(data: st.DataObject) -> None:
    there, back = sessions()
    frame = bytearray(encode({"do": "seal", "slot": 1}, b"payload", session=there))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        taken_apart(bytes(frame), back)


def test_a_frame_sent_twice_is_refused_the_second_time() -> None:
    there, back = sessions()
    frame = encode({"do": "bye"}, session=there)
    taken_apart(frame, back)
    with pytest.raises(WireError, match="not the next one"):
        taken_apart(frame, back)


def test_a_frame_that_was_left_out_is_noticed_with_the_next() -> None:
    there, back = sessions()
    encode({"do": "copied"}, session=there)
    with pytest.raises(WireError, match="tag is wrong"):
        taken_apart(encode({"do": "seal"}, session=there), back)


def test_a_frame_sent_back_to_where_it_came_from_is_refused() -> None:
    there, _ = sessions()
    with pytest.raises(WireError, match="tag is wrong"):
        taken_apart(encode({"do": "bye"}, session=there), there)


def test_a_frame_of_another_connection_is_refused() -> None:
    there, _ = sessions()
    _, other = sessions()
    with pytest.raises(WireError, match="tag is wrong"):
        taken_apart(encode({"do": "bye"}, session=there), other)


@given(st.binary(min_size=16, max_size=16))
def test_a_prefix_of_anything_is_read_or_refused_and_never_promises_too_much(prefix: bytes) -> None:
    there, _ = sessions()
    for session in (None, there):
        try:
            header, payload, _ = lengths(prefix, session=session)
        except WireError:
            continue
        assert header <= wire.HEADER_LIMIT_BYTES and payload <= wire.PAYLOAD_LIMIT_BYTES


def test_a_stranger_may_not_send_much() -> None:
    prefix = wire._PREFIX.pack(b"DT", wire.VERSION, wire.CLEAR, wire.STRANGER_LIMIT_BYTES + 1, 0)
    with pytest.raises(WireError, match="too long"):
        lengths(prefix, session=None)
    with pytest.raises(WireError, match="too long"):
        lengths(wire._PREFIX.pack(b"DT", wire.VERSION, wire.CLEAR, 2, 1), session=None)


def test_what_the_other_end_would_not_take_is_not_even_sent() -> None:
    there, _ = sessions()
    with pytest.raises(WireError, match="too long"):
        encode({"text": "x" * wire.HEADER_LIMIT_BYTES}, session=there)


@pytest.mark.parametrize("body", [b"[]", b"1", b"{", b"\xff", b"[" * 5000, b'{"a": NaN', b""])
def test_a_header_that_is_no_object_is_refused_even_with_the_right_tag(body: bytes) -> None:
    there, back = sessions()
    prefix = wire._PREFIX.pack(b"DT", wire.VERSION, wire.SEALED, len(body), 0)
    with pytest.raises(WireError, match="is not"):
        decode(prefix, body, b"", there.sending.tag(prefix, body, b""), session=back)


def test_another_version_is_named() -> None:
    with pytest.raises(WireError, match="version") as caught:
        lengths(wire._PREFIX.pack(b"DT", 99, wire.CLEAR, 2, 0), session=None)
    assert "99" in str(caught.value)


Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def beside(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Run ``work`` in a thread; its result or error ends up in the list."""
    found: list[object] = []

    def run() -> None:
        try:
            found.append(work())
        except WireError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found


def test_two_ends_with_the_same_key_meet_and_talk(pair: Pair) -> None:
    thread, found = beside(lambda: SyncEnd.shake(pair[1], accept(KEY, purpose="test")))
    here = SyncEnd.shake(pair[0], initiate(KEY, purpose="test"))
    thread.join()
    (there,) = found
    assert isinstance(there, SyncEnd)
    payload = secrets.token_bytes(3_000_000)  # more than a socket holds
    thread, found = beside(lambda: there.receive(timeout_s=10))
    here.send({"do": "layout"}, payload)
    thread.join()
    assert found == [Frame({"do": "layout"}, payload)]


@pytest.mark.parametrize(("key", "purpose"), [(bytes(32), "test"), (KEY, "other")])
def test_ends_with_another_key_or_purpose_refuse_each_other(pair: Pair, key: bytes, purpose: str) -> None:
    thread, found = beside(lambda: SyncEnd.shake(pair[1], accept(KEY, purpose="test"), timeout_s=5))

    def knock() -> None:
        try:
            SyncEnd.shake(pair[0], initiate(key, purpose=purpose), timeout_s=5)
        finally:
            pair[0].close()

    other, refused = beside(knock)
    thread.join()
    pair[1].close()
    other.join()
    assert "tag is wrong" in str(found[0])
    assert isinstance(refused[0], WireError)


def test_an_end_that_says_nothing_is_given_up(pair: Pair) -> None:
    with pytest.raises(WireError, match="in time"):
        SyncEnd.shake(pair[1], accept(KEY, purpose="test"), timeout_s=0.05)


@settings(max_examples=30)
@given(st.binary(max_size=100))
def test_an_end_that_talks_nonsense_is_refused(nonsense: bytes) -> None:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(nonsense)
        left.shutdown(socket.SHUT_WR)
        with pytest.raises(WireError):
            SyncEnd.shake(right, accept(KEY, purpose="test"), timeout_s=5)


def test_an_end_that_takes_nothing_is_given_up(pair: Pair) -> None:
    there, _ = sessions()
    end = SyncEnd(pair[0], there)
    with pytest.raises(WireError):
        end.send({}, bytes(8_000_000), timeout_s=0.05)
    with pytest.raises(WireError):
        end.send({})


def test_closing_an_end_wakes_who_waits_for_it(pair: Pair) -> None:
    there, _ = sessions()
    end = SyncEnd(pair[0], there)
    thread, found = beside(end.receive)
    end.close()
    thread.join(10)
    assert isinstance(found[0], WireError)
