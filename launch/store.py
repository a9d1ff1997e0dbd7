"""The rendezvous store in a process of its own, so that no rank's death takes it away.

torchrun hosts the store in the agent or in rank 0; a crash there leaves every other rank without rendezvous. Here
the agent binds the port itself, so that the number is known and nobody can take it between choosing and using it,
starts the workers at once, and hands the listening socket to ``python -m distrain.launch.store``. While that process
imports torch, early workers wait in the socket's backlog.
"""

import os
import signal
import socket
import subprocess
import sys

from .tether import tie_to_parent

LOOPBACK = "127.0.0.1"


def listen(host: str = LOOPBACK, *, port: int = 0) -> socket.socket:
    """A socket that listens on ``host``:``port`` (0: any free port); OSError if that cannot be had."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server(address[:2], family=family, backlog=socket.SOMAXCONN)


def start_store(listener: socket.socket) -> subprocess.Popen[bytes]:
    """Serve torch's TCPStore on ``listener``; the process dies with this one, whatever kills it."""
    command = [sys.executable, "-m", "distrain.launch.store", str(listener.fileno()), str(os.getpid())]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, pass_fds=[listener.fileno()], start_new_session=True
    )


def serve(listener: socket.socket) -> None:
    """Serve torch's TCPStore on ``listener`` until a signal ends this process."""
    from torch.distributed import TCPStore

    port = int(listener.getsockname()[1])
    fd = listener.detach()
    store = TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=fd)
    while store is not None:
        signal.pause()


if __name__ == "__main__":
    tie_to_parent(int(sys.argv[2]))
    serve(socket.socket(fileno=int(sys.argv[1])))
