"""Several "nodes" on one machine: one agent process a node, as on a real cluster, under one parent.

The parent binds the port and lends it to node 0's agent; from there the agents meet, watch each other and stop each
other by the very code that real nodes use. The parent passes signals on and takes the agents' exit codes; if it
dies, so do they, and with them their ranks.
"""

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from distrain.core.errors import DistrainError

from .options import LaunchOptions
from .signals import Signals
from .store import listen_or_explain
from .tether import tie_to_parent


def run_emulated(options: LaunchOptions, *, environ: Mapping[str, str]) -> int:
    """Run a job of ``options.emulate_nodes`` nodes; its exit code."""
    with Signals() as arrived:
        with listen_or_explain(options.master_addr, port=options.master_port) as listener:
            nodes = node_options(options, port=int(listener.getsockname()[1]))
            agents = [_start(node, listener=listener, environ=environ) for node in nodes]
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


def _start(
    options: LaunchOptions, *, listener: socket.socket, environ: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start the agent of one node, in a session of its own so that only the parent hears Ctrl-C."""
    command = [sys.executable, "-m", "distrain.launch.emulate", options.to_json(), str(os.getpid())]
    fds = [listener.fileno()] if options.node_rank == 0 else []
    return subprocess.Popen(
        [*command, *map(str, fds)], env=dict(environ), pass_fds=fds, start_new_session=True
    )


def _wait(agents: Sequence[subprocess.Popen[bytes]], arrived: Signals) -> list[int]:
    """Wait for all agents, passing on signals; their exit codes."""
    poll = select.poll()
    poll.register(arrived.fileno(), select.POLLIN)
    pidfds = {os.pidfd_open(agent.pid): agent for agent in agents}
    for fd in pidfds:
        poll.register(fd, select.POLLIN)
    running = set(pidfds)
    while running:
        for fd, _ in poll.poll():
            if fd in running:
                running.remove(fd)
                poll.unregister(fd)
                os.close(fd)
        for signum in arrived.take():
            for fd in running:
                signal.pidfd_send_signal(fd, signum)
    return [agent.wait() for agent in agents]


if __name__ == "__main__":
    from .run import run_node

    tie_to_parent(int(sys.argv[2]))
    borrowed = [socket.socket(fileno=int(fd)) for fd in sys.argv[3:]]
    try:
        code = run_node(LaunchOptions.from_json(sys.argv[1]), listener=next(iter(borrowed), None))
    except DistrainError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    sys.exit(code)
