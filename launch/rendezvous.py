"""How the agents of several nodes find each other, agree on the job and number themselves.

Node 0 listens where the others expect it; they connect and introduce themselves; once all are there it tells each
its seat, and only then does any rank start. Agents that do not belong together (another job, another number of
nodes, another plan) are refused with the reason instead of hanging. The connections stay open: through them the
agents learn at once when a node fails or disappears.

With static rendezvous every node brings its number, and node 0's port goes on to the store once all have met, so
that the job needs no other. With c10d nodes are numbered by arrival, and the store gets a port of its own.
"""

import errno
import hashlib
import secrets
import selectors
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from distrain.core.errors import LaunchError
from distrain.core.wire import KEY_BYTES

from .job import Seat
from .link import Link, Message
from .options import LaunchOptions
from .store import listen, listen_or_explain

PROTOCOL = 1
RETRY_S = 0.2


@dataclass(frozen=True, slots=True)
class Hello:
    """What an agent says of itself."""

    protocol: int
    run_id: str
    node: str
    nnodes: int
    nproc: int
    node_rank: int | None
    plan_digest: str

    @classmethod
    def of(cls, options: LaunchOptions) -> "Hello":
        """How the agent of a node with ``options`` introduces itself."""
        digest = hashlib.sha256(Path(options.plan).read_bytes()).hexdigest() if options.plan else ""
        name = options.node_name or socket.gethostname()
        return cls(PROTOCOL, options.run_id, name, options.nnodes, options.nproc, options.node_rank, digest)


@dataclass(frozen=True, slots=True)
class Meeting:
    """The outcome: this node's seat, the links to the other agents, and on node 0 the store's socket."""

    seat: Seat
    links: Mapping[int, Link]
    """on node 0: to every other node by its rank; elsewhere: to node 0"""
    store: socket.socket | None
    members: socket.socket | None = None
    """on node 0 of several: where its keeper will listen to those of the others"""


def meet(options: LaunchOptions, *, listener: socket.socket | None = None) -> Meeting:
    """Meet the other nodes; ``listener`` is where node 0 listens, if somebody has bound it already.

    Raises ConfigError if this node should listen and cannot, LaunchError if the others do not come in time, or
    refuse this one.
    """
    listener = listener or _listener(options)
    if listener is None:
        return _join(options)
    if options.nnodes == 1:
        return Meeting(_seat(options, {0: Hello.of(options)}, store=listener), {}, listener)
    return _gather(options, listener)


def _listener(options: LaunchOptions) -> socket.socket | None:
    """Where this node listens as node 0, or None if another node is node 0."""
    host, port = options.local_addr or options.master_addr, options.master_port
    is_host = options.node_rank == 0 if options.node_rank is not None else options.is_host
    if is_host is None and options.nnodes > 1:
        try:
            return listen(host, port=port)
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
                return None
    return None if is_host is False else listen_or_explain(host, port=port)


def refusal(hello: Hello, own: Hello, *, taken: Mapping[int, Hello]) -> str:
    """Why the agent that says ``hello`` cannot join the job of ``own``; empty if it can."""
    fixed = own.node_rank is not None
    if hello.protocol != own.protocol:
        return "it runs another version of Distrain"
    if hello.run_id != own.run_id:
        return f"this is job {own.run_id!r} (--rdzv-id), not {hello.run_id!r}"
    if hello.nnodes != own.nnodes:
        return f"the job has {own.nnodes} nodes (--nnodes), not {hello.nnodes}"
    if not isinstance(hello.nproc, int) or hello.nproc < 1:
        return "it has no ranks"
    if hello.plan_digest != own.plan_digest:
        return "it has another plan (--plan)"
    if (hello.node_rank is not None) != fixed:
        return "it uses another --rdzv-backend"
    if hello.node_rank is not None and not 0 < hello.node_rank < own.nnodes:
        return f"there is no place for a node of rank {hello.node_rank}"
    if hello.node_rank is not None and hello.node_rank in taken:
        return f"node rank {hello.node_rank} is taken by {taken[hello.node_rank].node}"
    return ""


def _gather(options: LaunchOptions, listener: socket.socket) -> Meeting:
    """Node 0's side."""
    own = Hello.of(options)
    heard: dict[Link, Hello | None] = {}
    try:
        _wait_for_all(heard, own, listener=listener, timeout_s=options.join_timeout_s)
        joined = {link: hello for link, hello in heard.items() if hello}
    except BaseException:
        for link in heard:
            link.close()
        listener.close()
        raise
    for link in heard.keys() - joined.keys():
        link.close()
    here = options.local_addr or options.master_addr
    if options.shared_port:
        return _seat_all(options, own, joined, store=listener, members=listen(here, port=0))
    listener.close()
    return _seat_all(options, own, joined, store=listen(here, port=0), members=listen(here, port=0))


def _wait_for_all(
    heard: dict[Link, Hello | None], own: Hello, *, listener: socket.socket, timeout_s: float
) -> None:
    """Take connections into ``heard``, with the hello of those that have joined, until the job is complete."""
    deadline = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while (num_nodes := 1 + sum(hello is not None for hello in heard.values())) < own.nnodes:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready and time.monotonic() >= deadline:
                names = ", ".join([own.node, *(hello.node for hello in heard.values() if hello)])
                got = f"{num_nodes} of {own.nnodes} nodes: {names}"
                raise LaunchError(f"not every node came within {timeout_s:g} s", got=got)
            for key, _ in ready:
                if key.fileobj is listener:
                    link = Link(listener.accept()[0])
                    heard[link] = None
                    selector.register(link, selectors.EVENT_READ)
                elif isinstance(key.fileobj, Link):
                    _hear(key.fileobj, heard, own=own)
                    if key.fileobj.closed:
                        selector.unregister(key.fileobj)
                        del heard[key.fileobj]
                        key.fileobj.close()


def _hear(link: Link, heard: dict[Link, Hello | None], *, own: Hello) -> None:
    """Hear what came over ``link``: note a hello that fits, refuse one that does not."""
    for message in link.receive():
        try:
            hello = Hello(**message)
        except TypeError:
            link.closed = True
            return
        taken = {each.node_rank: each for each in heard.values() if each and each.node_rank is not None}
        reason = refusal(hello, own, taken=taken)
        if reason:
            link.send({"refused": reason})
            link.closed = True
        else:
            heard[link] = hello


def _seat_all(
    options: LaunchOptions,
    own: Hello,
    joined: Mapping[Link, Hello],
    *,
    store: socket.socket,
    members: socket.socket,
) -> Meeting:
    """Number the nodes and tell each its seat."""
    links: dict[int, Link] = {}
    hellos = {0: own}
    for arrival, (link, hello) in enumerate(joined.items(), start=1):
        rank = arrival if hello.node_rank is None else hello.node_rank
        links[rank], hellos[rank] = link, hello
    seat = _seat(options, hellos, store=store, members=members)
    for rank, link in links.items():
        link.send({"seat": {**asdict(seat), "node_rank": rank}})
    return Meeting(seat, links, store, members)


def _seat(
    options: LaunchOptions,
    hellos: Mapping[int, Hello],
    *,
    store: socket.socket,
    members: socket.socket | None = None,
) -> Seat:
    """Node 0's seat among the nodes that said ``hellos``."""
    nodes = [hellos[rank] for rank in sorted(hellos)]
    addr = options.master_addr if options.shared_port else options.local_addr or options.master_addr
    names = tuple(node.node for node in nodes)
    return Seat(
        0,
        names,
        tuple(node.nproc for node in nodes),
        addr,
        int(store.getsockname()[1]),
        job=f"{options.run_id}-{secrets.token_hex(4)}",
        job_key=secrets.token_hex(KEY_BYTES),
        coordinator=f"{addr}:{members.getsockname()[1]}" if members else "",
    )


def _join(options: LaunchOptions) -> Meeting:
    """Any other node's side."""
    where = f"{options.master_addr}:{options.master_port}"
    deadline = time.monotonic() + options.join_timeout_s
    link = Link(_connect(options, deadline=deadline, where=where))
    link.send(asdict(Hello.of(options)))
    answer = _answer(link, deadline=deadline)
    if "seat" in answer:
        seat = answer["seat"]
        names, nprocs = tuple(seat["nodes"]), tuple(seat["nprocs"])
        return Meeting(Seat(**{**seat, "nodes": names, "nprocs": nprocs}), {0: link}, None)
    link.close()
    if "refused" in answer:
        raise LaunchError(f"the job at {where} refused this node: {answer['refused']}")
    hint = "is the job running already, or does another program listen there?"
    raise LaunchError("node 0 closed the connection before the job began", got=where, hint=hint)


def _connect(options: LaunchOptions, *, deadline: float, where: str) -> socket.socket:
    """Try until node 0 listens; it may start later than this node."""
    while True:
        try:
            left = max(RETRY_S, min(10.0, deadline - time.monotonic()))
            return socket.create_connection((options.master_addr, options.master_port), timeout=left)
        except OSError as error:
            if time.monotonic() + RETRY_S > deadline:
                text = f"node 0 could not be reached within {options.join_timeout_s:g} s: {error.strerror or error}"
                raise LaunchError(text, got=where) from None
            time.sleep(RETRY_S)


def _answer(link: Link, *, deadline: float) -> Message:
    """Node 0's first message; empty if none comes."""
    with selectors.DefaultSelector() as selector:
        selector.register(link, selectors.EVENT_READ)
        while not link.closed and selector.select(max(0.0, deadline - time.monotonic())):
            for message in link.receive():
                return message
    return {}
