"""The injector: one process beside the job, here a thread of whoever starts the job, that hits ranks from outside.

::

    with Injector(plan, folder) as injector:
        subprocess.run(["distrain", "launch", ...], env={**os.environ, **injector.variables})
    records = read_truth(folder)

Armed processes connect to it (``control``), so it knows who they are and when they die. When it ends, all that it
did and that lasts is undone: stopped processes go on, control groups are gone, links work.
"""

import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from distrain.core.clock import Clock, MonotonicClock
from distrain.core.vocabulary import FaultKind

from .arming import PLAN, TRUTH
from .capabilities import CLOCK, NETWORK
from .control import LINE_BYTES, SOCKET, Lines, encode, peer_of, short_path
from .effects import EFFECTS, Hit, Undo, node_of, store_of
from .engines.clock import preload
from .kinds import KINDS, Victim
from .plan import Fault, FaultPlan
from .timers import Timers
from .truth import FAILED, FIRED, LIFTED, TruthLog

ORDER_S = 5.0
"""how long whoever carries the packets has to begin what it is asked for"""


@dataclass(slots=True)
class _Client:
    """An armed process."""

    connection: socket.socket
    pid: int
    lines: Lines = field(default_factory=Lines)
    hello: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


class Injector:
    """Carries out the faults of ``plan`` that come from outside; ``folder`` is the job's ground truth."""

    def __init__(self, plan: FaultPlan, folder: str | Path, *, clock: Clock | None = None) -> None:
        self.plan, self.folder = plan, Path(folder).absolute()
        self._timers = Timers(clock or MonotonicClock())
        self._clients: dict[socket.socket, _Client] = {}
        self._undo: dict[tuple[int, int], Undo] = {}
        self._done: set[tuple[int, int]] = set()
        self._stack = ExitStack()

    @property
    def variables(self) -> dict[str, str]:
        """What the environment of the job must hold; raises MissingDependencyError."""
        needs = {need for fault in self.plan.faults for need in KINDS[fault.kind].needs}
        preloaded = preload() if CLOCK in needs else {}
        return {PLAN: str(self.folder / "plan.json"), TRUTH: str(self.folder), **preloaded}

    def pids(self, role: str, *, node: int | None = None) -> list[int]:
        """Armed processes of a role (trainer, keeper or network) that live now, on one node or all."""
        return [
            client.pid
            for client in list(self._clients.values())
            if client.hello.get("role") == role and node in (None, client.hello.get("node"))
        ]

    def __enter__(self) -> Self:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.folder / "plan.json").write_text(json.dumps(self.plan.to_json(), indent=1))
        with ExitStack() as stack:
            self._truth = TruthLog(self.folder, who=f"injector-{os.getpid()}")
            stack.callback(self._truth.close)
            self._listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            (self.folder / SOCKET).unlink(missing_ok=True)
            with short_path(self.folder) as path:
                self._listener.bind(path)
                os.chmod(path, 0o600)
            stack.callback((self.folder / SOCKET).unlink, missing_ok=True)
            self._listener.listen(socket.SOMAXCONN)
            ours, wake = socket.socketpair()
            stack.enter_context(ours)
            thread = threading.Thread(target=self._run, args=(ours,), name="distrain-injector", daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(wake.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # -- the thread

    def _run(self, wake: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(wake, selectors.EVENT_READ)
            selector.register(self._listener, selectors.EVENT_READ, partial(self._accept, selector))
            try:
                while not self._turn(selector, wake):
                    self._timers.run()
            finally:
                for undo in self._undo.values():
                    with suppress(OSError):
                        undo()
                for connection in self._clients:
                    connection.close()

    def _turn(self, selector: selectors.BaseSelector, wake: socket.socket) -> bool:
        """Wait for something to do and do it; True if this is the end."""
        for key, _ in selector.select(self._timers.patience_s()):
            if key.fileobj is wake:
                return True
            action: Callable[[], None] = key.data
            action()
        return False

    def _accept(self, selector: selectors.BaseSelector) -> None:
        connection, _ = self._listener.accept()
        pid, uid = peer_of(connection)
        if uid not in (0, os.getuid()):
            connection.close()
            return
        client = self._clients[connection] = _Client(connection, pid)
        selector.register(connection, selectors.EVENT_READ, partial(self._hear, selector, client))

    def _hear(self, selector: selectors.BaseSelector, client: _Client) -> None:
        try:
            data = client.connection.recv(LINE_BYTES)
            for table in client.lines.add(data):
                self._obey(client, table)
        except (OSError, ValueError, LookupError, TypeError):  # it is gone, or does not speak our language
            data = b""
        if not data:
            selector.unregister(client.connection)
            del self._clients[client.connection]
            client.connection.close()

    def _obey(self, client: _Client, table: Mapping[str, Any]) -> None:
        if table.get("do") == "hello":
            client.hello = table
        elif "fault" not in table:  # an answer that came too late
            return
        elif "after_s" in table:
            self._timers.after(float(table["after_s"]), partial(self._inject, client, table))
        else:
            answer = self._inject(client, table)
            with suppress(OSError):  # it has been killed
                client.connection.sendall(encode(answer))

    # -- faults

    def _inject(self, client: _Client, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Carry one fault out on behalf of ``client``; what to answer."""
        number = int(request["fault"])
        fault = self.plan.faults[number]
        is_rank = KINDS[fault.kind].victim is Victim.RANK
        victim = int(client.hello["rank" if is_rank else "node"])
        if (number, victim) in self._done:
            return {"done": number}
        self._done.add((number, victim))
        note = partial(
            self._truth.write, fault=number, kind=fault.kind, victim=victim, step=request.get("step")
        )
        pids: list[int] = []
        try:
            if client.connection in self._clients:
                pids = self._pids(fault, client)
            if not pids:
                raise ProcessLookupError("no such process")
            note(FIRED, pid=pids[0], detail={"pids": pids} if len(pids) > 1 else {})
            undo = EFFECTS[fault.kind](self._hit(number, victim, pids))
        except OSError as error:
            note(FAILED, pid=pids[0] if pids else 0, detail={"reason": str(error)})
            return {"failed": number}
        if undo is not None:
            self._undo[number, victim] = undo
            if fault.duration_s:
                lift = partial(self._lift, (number, victim), partial(note, pid=pids[0]))
                self._timers.after(fault.duration_s, lift)
        return {"done": number, "allocate": fault.kind is FaultKind.PROC_OOM}

    def _hit(self, number: int, victim: int, pids: Sequence[int]) -> Hit:
        carriers = [each for each in self._clients.values() if each.hello.get("role") == "network"]
        return Hit(
            self.plan.faults[number],
            pids,
            self._timers,
            name=f"{number}/{victim}",
            seed=self.plan.chance(number, victim).getrandbits(32),
            order=partial(_order, carriers[-1].connection) if carriers else None,
        )

    def _lift(self, key: tuple[int, int], note: Callable[..., None]) -> None:
        try:
            self._undo.pop(key)()
            note(LIFTED)
        except OSError as error:
            note(LIFTED, detail={"reason": f"could not be lifted: {error}"})

    def _pids(self, fault: Fault, client: _Client) -> list[int]:
        """Whom a fault hits that ``client`` asks for."""
        kind, node = fault.kind, client.hello.get("node")
        if NETWORK in KINDS[kind].needs:
            return self.pids("network")
        if kind is FaultKind.COORDINATOR_KILL:
            return self.pids("keeper", node=0)
        if kind is FaultKind.STORE_KILL:
            return store_of(client.pid)
        if kind is FaultKind.SIDECAR_KILL:
            return self.pids("keeper", node=node)
        if kind is FaultKind.NODE_LOSS:
            # The agent goes first: seeing its ranks die it would tell the other nodes, which no lost node does.
            known = [*self.pids("trainer", node=node), *self.pids("keeper", node=node)]
            return list(dict.fromkeys([*node_of(client.pid), *known]))
        return [client.pid]


def _order(carrier: socket.socket, **table: Any) -> None:
    """Ask whoever carries the nodes' packets for something, and wait until it is done; raises OSError.

    What has not begun within ``ORDER_S`` is not begun any more, and what was begun at the last moment is taken back: a
    fault that is written down as failed is none.
    """
    lines, until_ns = Lines(), time.monotonic_ns() + round(ORDER_S * 1e9)
    carrier.settimeout(ORDER_S)
    try:
        carrier.sendall(encode({**table, "until_ns": until_ns}))
        while data := carrier.recv(LINE_BYTES):
            for answer in lines.add(data):
                if answer.get("failed") == table["name"]:
                    raise OSError(answer.get("reason", "refused"))
                if answer.get("done") == table["name"]:  # others answer what was given up
                    return
        raise ConnectionError("whoever carried the packets of the nodes is gone")
    except TimeoutError:
        with suppress(OSError):
            carrier.sendall(encode({"do": "lift", "name": table["name"]}))
        raise TimeoutError(
            f"whoever carries the packets of the nodes did not answer in {ORDER_S:g} s"
        ) from None
    except ValueError as error:
        raise ConnectionError(f"the answer of the network cannot be understood: {error}") from None
    finally:
        carrier.settimeout(None)
