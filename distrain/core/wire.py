"""How the processes of a job talk: frames of JSON and bytes, authenticated, limited, never pickled.

A frame::

    | DT | version | kind | length of header | length of payload | header: JSON object | payload | tag |
      2      1        1           4                   8                                            32

The tag is an HMAC-SHA256 over the frame's number in its direction and all that stands before. Its key exists for one
connection and one direction only: both ends derive it from the key of the job and two fresh nonces. So a frame cannot
be forged, altered, repeated, left out, sent back to where it came from, or carried over to another connection::

    initiator ── clear  {nonce} ────────────▶ acceptor
              ◀───────────────── clear  {nonce} ──
              ── sealed {} ─────────────────▶           proves that it has the key
              ◀───────────────── sealed {} ───          so does this

Frames are not encrypted: see docs/threat-model.md. Until the other end has proven itself it may send a kilobyte, and
has a few seconds. What is wrong with a frame ends the connection, by WireError; there is no way on from there.
"""

import hashlib
import hmac
import json
import secrets
import struct
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from .errors import DistrainError

VERSION = 1
CLEAR, SEALED = 0, 1
HEADER_LIMIT_BYTES = 1 << 20
PAYLOAD_LIMIT_BYTES = 1 << 28
STRANGER_LIMIT_BYTES = 1 << 10
"""the longest header of somebody who has not proven anything yet"""
KEY_BYTES = 32

PREFIX_BYTES = 16

_PREFIX = struct.Struct(">2sBBIQ")
_MAGIC = b"DT"
_TAG_BYTES = 32
_NONCE_BYTES = 16

Header = dict[str, Any]


class WireError(DistrainError):
    """The other end is gone, or what came from it is not what it should be."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message."""

    header: Header
    payload: bytes = b""


@dataclass(slots=True)
class _Direction:
    """Key and counter of one direction."""

    key: bytes
    number: int = 0

    def tag(self, *parts: bytes) -> bytes:
        """The tag of the next frame."""
        mac = hmac.new(self.key, struct.pack(">Q", self.number), hashlib.sha256)
        for part in parts:
            mac.update(part)
        self.number += 1
        return mac.digest()


@dataclass(slots=True)
class Session:
    """The keys of one connection once its handshake is over."""

    sending: _Direction
    receiving: _Direction


@dataclass(frozen=True, slots=True)
class Receive:
    """What a handshake yields in order to get the next frame: who may send how much."""

    session: Session | None


Handshake = Generator[bytes | Receive, Frame, Session]
"""yields bytes to send, or Receive to be sent a frame; returns the session"""


def encode(header: Header, payload: bytes = b"", *, session: Session | None) -> bytes:
    """The frame of ``header`` and ``payload``; clear without a session.

    Raises:
        WireError: it is longer than the other end would take.
    """
    body = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    _check_lengths(len(body), len(payload), is_stranger=session is None)
    prefix = _PREFIX.pack(_MAGIC, VERSION, CLEAR if session is None else SEALED, len(body), len(payload))
    tag = session.sending.tag(prefix, body, payload) if session else b""
    return b"".join((prefix, body, payload, tag))


def lengths(prefix: bytes, *, session: Session | None) -> tuple[int, int, int]:
    """Bytes of header, payload and tag that follow ``prefix``.

    Raises:
        WireError: it does not begin a frame, or one that is too long or of the wrong kind.
    """
    magic, version, kind, header_bytes, payload_bytes = _PREFIX.unpack(prefix)
    if magic != _MAGIC:
        raise WireError("this is not Distrain's wire format", got=repr(prefix[:8]))
    if version != VERSION:
        raise WireError(
            "the other end speaks another version of the wire format", got=str(version), allowed=str(VERSION)
        )
    if kind != (CLEAR if session is None else SEALED):
        raise WireError("a frame is of the wrong kind", got=str(kind))
    _check_lengths(header_bytes, payload_bytes, is_stranger=session is None)
    return header_bytes, payload_bytes, 0 if session is None else _TAG_BYTES


def decode(prefix: bytes, body: bytes, payload: bytes, tag: bytes, *, session: Session | None) -> Frame:
    """The frame in these bytes, which are authenticated before they are looked at.

    Raises:
        WireError: the tag is wrong, or the header is not a JSON object.
    """
    if session and not hmac.compare_digest(tag, session.receiving.tag(prefix, body, payload)):
        raise WireError("a frame is not from the other end, or not the next one: its tag is wrong")
    try:
        header = json.loads(body)
    except (ValueError, RecursionError):
        raise WireError("the header of a frame is not JSON", got=repr(body[:40])) from None
    if not isinstance(header, dict):
        raise WireError("the header of a frame is not a JSON object", got=repr(body[:40]))
    return Frame(header, payload)


def _check_lengths(header_bytes: int, payload_bytes: int, *, is_stranger: bool) -> None:
    header_limit = STRANGER_LIMIT_BYTES if is_stranger else HEADER_LIMIT_BYTES
    payload_limit = 0 if is_stranger else PAYLOAD_LIMIT_BYTES
    if header_bytes > header_limit or payload_bytes > payload_limit:
        raise WireError(
            "a frame is too long",
            got=f"header {header_bytes}, payload {payload_bytes} bytes",
            allowed=f"header {header_limit}, payload {payload_limit} bytes",
        )


def initiate(key: bytes, *, purpose: str) -> Handshake:
    """The handshake of the end that connects; both ends name the same ``purpose``."""
    own = secrets.token_bytes(_NONCE_BYTES)
    yield encode({"nonce": own.hex()}, session=None)
    other = _nonce((yield Receive(None)))
    session = _session(key, purpose, initiator=own, acceptor=other, is_initiator=True)
    yield encode({}, session=session)
    yield Receive(session)
    return session


def accept(key: bytes, *, purpose: str) -> Handshake:
    """The handshake of the end that is connected to."""
    own = secrets.token_bytes(_NONCE_BYTES)
    other = _nonce((yield Receive(None)))
    yield encode({"nonce": own.hex()}, session=None)
    session = _session(key, purpose, initiator=other, acceptor=own, is_initiator=False)
    yield Receive(session)
    yield encode({}, session=session)
    return session


def _nonce(frame: Frame) -> bytes:
    try:
        nonce = bytes.fromhex(frame.header["nonce"])
    except (KeyError, TypeError, ValueError):
        nonce = b""
    if len(nonce) != _NONCE_BYTES:
        raise WireError("the other end begins with something else than a nonce")
    return nonce


def _session(key: bytes, purpose: str, *, initiator: bytes, acceptor: bytes, is_initiator: bool) -> Session:
    there, back = (
        _Direction(hmac.digest(key, f"distrain {way} {purpose}\0".encode() + initiator + acceptor, "sha256"))
        for way in ("there", "back")
    )
    return Session(there, back) if is_initiator else Session(back, there)
