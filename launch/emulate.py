"""Several "nodes" on one machine: one agent process a node, as on a real cluster, under one parent.

The parent binds the port and lends it to node 0's agent; from there the agents meet, watch each other and stop each
other by the very code that real nodes use. With ``--netns`` each agent moves into a network of its own first
(``network``), and node 0's binds the port there. The parent passes signals on and takes the agents' exit codes; if it
dies, so do they, and with them their ranks.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from distrain.core import netns
from distrain.core.errors import DistrainError

from .network import PORT, VARIABLES, Network, join
from .options import LaunchOptions
from .signals import Signals
from .store import listen_or_explain
from .tether import tie_to_parent


def run_emulated(options: LaunchOptions, *, environ: Mapping[str, str]) -> int:
    """Run a job of ``options.emulate_nodes`` nodes; its exit code."""
    with ExitStack() as stack:
        arrived = stack.enter_context(Signals())
        if options.netns:
            network = stack.enter_context(Network(options.emulate_nodes, environ=environ))
            return exit_code(_wait(_start_apart(options, network, environ=environ), arrived, network))
        with listen_or_explain(options.master_addr, port=options.master_port) as listener:
            nodes = node_options(options, port=int(listener.getsockname()[1]))
            lent = {"listener": listener.fileno()}
            agents = [_start(node, {} if node.node_rank else lent, environ=environ) for node in nodes]
        return exit_code(_wait(agents, arrived))


def node_options(options: LaunchOptions, *, port: int) -> list[LaunchOptions]:
    """What each node's agent is to do."""
    count = options.emulate_nodes
    return [
        replace(
            options,
            emulate_nodes=1,
            nnodes=count,
            node_rank=node_rank,
            node_name=f"node{node_rank:0{len(str(count - 1))}}",
            master_port=port,
        )
        for node_rank in range(count)
    ]


def exit_code(codes: Sequence[int]) -> int:
    """The job's exit code from its agents': 1 if any failed or was killed, else what they agree on."""
    if any(code == 1 or code < 0 for code in codes):
        return 1
    return next((code for code in codes if code), 0)


def _start_apart(
    options: LaunchOptions, network: Network, *, environ: Mapping[str, str]
) -> list[subprocess.Popen[bytes]]:
    """Start the agents, each in a network of its own."""
    options = replace(options, master_addr=netns.address(0))
    nodes = node_options(options, port=options.master_port or PORT)
    return [
        _start(node, {"switch": network.fileno()}, group=group, environ={**environ, **VARIABLES})
        for node, group in zip(nodes, network.groups or [""] * len(nodes), strict=True)
    ]


def _start(
    options: LaunchOptions, fds: Mapping[str, int], *, group: str = "", environ: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start the agent of one node, in a session of its own so that only the parent hears Ctrl-C."""
    place = json.dumps({"parent": os.getpid(), "group": group, **fds})
    return subprocess.Popen(
        [sys.executable, "-m", "distrain.launch.emulate", options.to_json(), place],
        env=dict(environ),
        pass_fds=list(fds.values()),
        start_new_session=True,
    )


def _wait(
    agents: Sequence[subprocess.Popen[bytes]], arrived: Signals, network: Network | None = None
) -> list[int]:
    """Wait for all agents, passing on signals, and ending them if their network ends; their exit codes."""
    poll = select.poll()
    poll.register(arrived.fileno(), select.POLLIN)
    pidfds = {os.pidfd_open(agent.pid): agent for agent in agents}
    for fd in pidfds:
        poll.register(fd, select.POLLIN)
    running = set(pidfds)
    switch = os.pidfd_open(network.switch.pid) if network else -1
    if network:
        poll.register(switch, select.POLLIN)
    while running:
        signums = []
        for fd, _ in poll.poll():
            if fd in running:
                running.remove(fd)
            elif fd == switch:
                print("[launch] the network of the emulated nodes is gone", file=sys.stderr, flush=True)
                signums.append(signal.SIGKILL)  # no agent would hear of the others' end
                switch = -1  # closed below
            else:
                continue
            poll.unregister(fd)
            os.close(fd)
        for signum in (*signums, *arrived.take()):
            for fd in running:
                signal.pidfd_send_signal(fd, signum)
    if switch >= 0:
        os.close(switch)
    return [agent.wait() for agent in agents]


def _main(options: LaunchOptions, place: Mapping[str, Any]) -> int:
    """Be the agent of one node; its exit code."""
    from .run import run_node

    try:
        if "switch" in place:
            join(options.node_rank or 0, switch=place["switch"], group=place["group"])
        tie_to_parent(place["parent"])  # last: the kernel forgets it where a process gets other rights
        listener = socket.socket(fileno=place["listener"]) if "listener" in place else None
        return run_node(options, listener=listener)
    except DistrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(_main(LaunchOptions.from_json(sys.argv[1]), json.loads(sys.argv[2])))
