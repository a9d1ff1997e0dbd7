"""A network for emulated nodes: starts the process that carries their packets, and moves agents into it.

Each node is a network namespace with one device and, where the machine allows it, a control group; its address is
198.18.0.1 plus its rank. The nodes reach each other and nothing else. Gloo and NCCL are told which device to use.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from distrain.core import netns
from distrain.core.errors import ConfigError, LaunchError
from distrain.faults.inject.cgroups import find_controller

PORT = 29500
"""where nodes meet if nothing else is said: in a namespace of its own nobody else can have taken it"""
VARIABLES = dict.fromkeys(("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), netns.INTERFACE)


class Network:
    """The parent's end, as a context; nothing of it is left afterwards, nor if this process is killed."""

    def __init__(self, num_nodes: int, *, environ: Mapping[str, str]) -> None:
        """Raises ConfigError if this machine does not allow it."""
        if what := netns.missing():
            raise ConfigError("nodes cannot have networks of their own here", got=what, hint=netns.HINT)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.switch = subprocess.Popen(
                [sys.executable, "-m", "distrain.launch.switch", str(num_nodes), str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=dict(environ),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        assert self.switch.stdout
        with self.switch.stdout as answer:
            line = answer.readline()
        if not line:
            self.close()
            raise LaunchError("the network of the emulated nodes does not start")
        self.groups: list[str] = json.loads(line)
        """folders of the nodes' control groups; empty if there are none"""

    def fileno(self) -> int:
        """What an agent needs to ``join``."""
        return self._socket.fileno()

    def close(self) -> None:
        """Take the network away, and wait until that is done."""
        self._socket.close()
        assert self.switch.stdin
        self.switch.stdin.close()
        if self.switch.wait():
            find_controller("freezer")  # takes away the groups of those who cannot

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def join(node_rank: int, *, switch: int, group: str) -> None:
    """Make the calling process, an agent, and all that it will start a node: ``switch`` is ``Network.fileno()``.

    Raises:
        LaunchError: the kernel refuses.
    """
    try:
        if group:
            Path(group, "cgroup.procs").write_text(str(os.getpid()))
        device = netns.enter(node_rank)
        with socket.socket(fileno=switch) as connection:
            socket.send_fds(connection, [b"%d" % node_rank], [device])
        os.close(device)
    except OSError as error:
        raise LaunchError(f"node {node_rank} cannot have a network of its own", got=str(error)) from None
