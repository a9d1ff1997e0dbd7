"""The rendezvous store in a process of its own, so that no rank's death takes it away.

torchrun hosts the store in the agent or in rank 0; a crash there leaves every other rank without rendezvous. Here
the agent binds the port itself, so that the number is known and nobody can take it between choosing and using it,
starts the ranks at once, and hands the listening socket to ``python -m distrain.launch.store``. While that process
imports torch, early ranks wait in the socket's backlog.
"""

import errno
import os
import signal
import socket
import subprocess
import sys

from distrain.core.errors import ConfigError

from .tether import tie_to_parent

LOOPBACK = "127.0.0.1"


def listen(host: str, *, port: int) -> socket.socket:
    """A socket that listens on ``host``:``port`` (0: any free port).

    A name of this machine that it resolves to loopback itself, as Debian's /etc/hosts has it, would be out of the
    other nodes' reach: there it listens on every address. Raises OSError.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    where = str(address[0])
    if where.startswith("127.") and host not in ("localhost", where):
        where = ""
    return socket.create_server((where, port), family=family, backlog=socket.SOMAXCONN)


def listen_or_explain(host: str, *, port: int) -> socket.socket:
    """``listen``, with a ConfigError for every way in which it fails."""
    try:
        return listen(host, port=port)
    except OSError as error:
        got = f"{host}:{port}"
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                "the port is in use", got=got, hint="another --master-port, or none on one node"
            ) from None
        if error.errno == errno.EADDRNOTAVAIL:
            hint = "node 0 must run there; --local-addr names another address to listen on"
            raise ConfigError("the address is not one of this node's", got=got, hint=hint) from None
        raise ConfigError(f"this node cannot listen: {error.strerror or error}", got=got) from None


def start_store(listener: socket.socket) -> subprocess.Popen[bytes]:
    """Serve torch's TCPStore on ``listener``; the process dies with this one, whatever kills it."""
    command = [sys.executable, "-m", "distrain.launch.store", str(listener.fileno()), str(os.getpid())]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[listener.fileno()],
        start_new_session=True,
    )


def serve(listener: socket.socket) -> None:
    """Serve torch's TCPStore on ``listener`` until a signal ends this process."""
    from torch.distributed import TCPStore

    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = LOOPBACK
    store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    while store is not None:
        signal.pause()


if __name__ == "__main__":
    tie_to_parent(int(sys.argv[2]))
    serve(socket.socket(fileno=int(sys.argv[1])))
