"""A trainer's connection to the keeper of its node, made anew whenever it breaks.

One thread listens: it hands answers to whoever waits for them, and when the keeper is lost it looks for another or
starts one, and introduces itself again. Calls fail with KeeperLost meanwhile.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from typing import Any

from .errors import DistrainError
from .sidecar_home import Home
from .sidecar_types import KeeperLost, KeeperRefused
from .wire import Frame, Header, WireError, initiate
from .wire_ends import SyncEnd

PURPOSE = "keeper client"
_ANSWER_S = 30.0
_MARGIN_S = 5.0  # how much longer than the keeper this end waits for an answer
_LONGEST_BACKOFF_S = 10.0

Introduce = Callable[[SyncEnd, float], None]
"""says hello on a fresh connection, with a deadline; raises WireError or KeeperRefused"""
OnNotice = Callable[[Mapping[str, Any]], None]


class Connection:
    """See above; ``number`` counts the keepers that this end has had."""

    def __init__(self, home: Home, *, start: bool, introduce: Introduce, on_notice: OnNotice) -> None:
        self.number = 0
        self.closed = threading.Event()
        self.refused = ""
        """why no keeper will ever take this trainer again"""
        self._home, self._start, self._introduce, self._on_notice = home, start, introduce, on_notice
        self._lock = threading.Lock()
        self._requests = count(1)
        self._waiting: dict[int, Future[Frame]] = {}
        self._end: SyncEnd | None = None
        self._thread: threading.Thread | None = None

    def open(self, *, name: str, timeout_s: float) -> None:
        """Reach a keeper, and listen to it from now on; raises KeeperLost or KeeperRefused."""
        self._attach(timeout_s=timeout_s)
        self._thread = threading.Thread(target=self._listen, name=name, daemon=True)
        self._thread.start()

    def tell(self, request: Header, payload: bytes = b"") -> None:
        """Send what has no answer."""
        end = self._end
        if end is None:
            raise KeeperLost("there is no keeper at the moment", got=self.refused)
        try:
            end.send(request, payload)
        except WireError as cause:
            raise KeeperLost("the keeper is lost", got=str(cause)) from cause

    def ask(self, request: Header, payload: bytes = b"", *, timeout_s: float = _ANSWER_S) -> Frame:
        """Send, and wait for the answer, which the keeper gives within ``timeout_s``."""
        number, future = next(self._requests), Future[Frame]()
        with self._lock:
            self._waiting[number] = future
        try:
            self._send_numbered(request, number, payload)
            return checked(future.result(timeout_s + _MARGIN_S))
        except TimeoutError:
            raise KeeperLost("the keeper does not answer in time", got=str(request["do"])) from None
        finally:
            with self._lock:
                self._waiting.pop(number, None)

    def fetch(self, request: Header) -> tuple[Header, int]:
        """The answer to a request, and the descriptor that comes with it; over a connection of its own."""
        try:
            end = self._dial(timeout_s=_ANSWER_S)
        except (OSError, WireError) as cause:
            raise KeeperLost("the keeper does not answer", got=str(cause)) from cause
        try:
            end.send(request)
            answer = checked(end.receive(timeout_s=_ANSWER_S)).header
            return answer, receive_fd(end.socket)
        except WireError as cause:
            raise KeeperLost("the keeper does not answer", got=str(cause)) from cause
        finally:
            end.close()

    def close(self) -> None:
        """End the connection, and the thread."""
        self.closed.set()
        if end := self._end:
            end.close()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(_ANSWER_S)

    def _send_numbered(self, request: Header, number: int, payload: bytes) -> None:
        end = self._end
        if end is None:
            raise KeeperLost("there is no keeper at the moment", got=self.refused)
        try:
            end.send({**request, "id": number}, payload)
        except WireError as cause:
            raise KeeperLost("the keeper is lost", got=str(cause)) from cause

    def _attach(self, *, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        end = self._reach(deadline)
        try:
            self._introduce(end, deadline)
        except WireError as cause:
            end.close()
            raise KeeperLost("the keeper does not answer", got=str(cause)) from cause
        except BaseException:
            end.close()
            raise
        with self._lock:
            self._end = end
            self.number += 1

    def _reach(self, deadline: float) -> SyncEnd:
        """Connect and shake hands; where nobody listens, start a keeper."""
        pause = 0.02
        while True:
            try:
                return self._dial(timeout_s=max(0.05, deadline - time.monotonic()))
            except (OSError, WireError) as cause:
                if time.monotonic() > deadline or self.closed.wait(pause):
                    hint = f"look at {self._home.log}"
                    raise KeeperLost("no keeper answers on this node", got=str(cause), hint=hint) from None
            pause = min(2 * pause, 0.5)

    def _dial(self, *, timeout_s: float) -> SyncEnd:
        try:
            connection = self._home.connect(timeout_s=timeout_s)
        except OSError:
            if not self._start:
                raise
            connection = self._begin(timeout_s=timeout_s)
        try:
            handshake = initiate(self._home.key(), purpose=PURPOSE)
            return SyncEnd.shake(connection, handshake, timeout_s=min(timeout_s, _ANSWER_S))
        except BaseException:
            connection.close()
            raise

    def _begin(self, *, timeout_s: float) -> socket.socket:
        """Start a keeper, unless another rank has done so meanwhile, and connect to it."""
        with self._home.locked():
            with suppress(OSError):
                return self._home.connect(timeout_s=timeout_s)
            self._home.key(create=True)
            with self._home.listen() as listener:
                self._home.start(listener).wait()
                return self._home.connect(timeout_s=timeout_s)

    def _listen(self) -> None:
        while not self.closed.is_set():
            try:
                while end := self._end:
                    self._deliver(end.receive())
            except WireError as cause:
                self._forget(why=str(cause))
            if not self.closed.is_set():
                self._find_another()
        self._forget(why="this end is closed")

    def _deliver(self, frame: Frame) -> None:
        if "notice" in frame.header:
            self._on_notice(frame.header["notice"])
            return
        with self._lock:
            waiting = self._waiting.pop(frame.header.get("re", 0), None)
        if waiting:
            waiting.set_result(frame)

    def _forget(self, *, why: str) -> None:
        with self._lock:
            end, self._end = self._end, None
            waiting, self._waiting = self._waiting, {}
        if end:
            end.close()
        for future in waiting.values():
            future.set_exception(KeeperLost("the keeper is lost", got=why))

    def _find_another(self) -> None:
        for attempt in count():
            if attempt and self.closed.wait(min(0.05 * 2**attempt, _LONGEST_BACKOFF_S)):
                return
            try:
                self._attach(timeout_s=_ANSWER_S)
                return
            except KeeperLost as error:
                if attempt == 0:
                    self._on_notice({"event": "keeper_lost", "level": "warning", "text": str(error)})
            except DistrainError as error:
                self.refused = str(error)
                self._on_notice({"event": "keeper_refused", "level": "error", "text": str(error)})
                self.closed.wait()


def checked(frame: Frame) -> Frame:
    """The answer, or KeeperRefused."""
    if "refused" in frame.header:
        raise KeeperRefused(str(frame.header["refused"]), got=str(frame.header.get("got", "")))
    return frame


def receive_fd(connection: socket.socket) -> int:
    """The descriptor that follows an answer."""
    connection.settimeout(_ANSWER_S)
    try:
        _, fds, _, _ = socket.recv_fds(connection, 1, 1)
        connection.settimeout(None)
    except OSError as cause:
        raise WireError("the connection is lost", got=str(cause)) from cause
    if len(fds) != 1:
        raise WireError("the keeper gave no memory")
    os.set_inheritable(fds[0], False)
    return fds[0]
