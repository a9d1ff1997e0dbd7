"""Where the sidecar of a node is found, how strangers are kept out, and how one is started.

Each keeper listens on a unix socket in a folder that only its user can enter. Whoever wants one binds that socket
first and hands it to the new process, so that a connection made at any time waits until the keeper answers: nobody
polls, and nobody starts a second one. ``distrain launch`` holds the socket itself and starts a keeper when the first
client knocks; without a launcher the first client does, under a lock::

    $XDG_RUNTIME_DIR/distrain/ or /tmp/distrain-UID/        0700
        JOB-NODE.sock      0600   JOB is a hash of the job's name, NODE the rank of the node
        JOB-NODE.log       0600   what a keeper has to say that ends badly
        JOB.key            0600   unless DISTRAIN_JOB_KEY holds the job's key
        JOB.coordinator    0600   address of node 0's keeper, unless DISTRAIN_COORDINATOR holds it
        JOB.lock           0600
"""

import fcntl
import hashlib
import os
import secrets
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ConfigError
from .wire import KEY_BYTES

JOB = "DISTRAIN_JOB"
"""name of the job"""
JOB_KEY = "DISTRAIN_JOB_KEY"
"""its secret, in hexadecimal digits"""
COORDINATOR = "DISTRAIN_COORDINATOR"
"""HOST:PORT where the keeper of node 0 listens for the others"""
BACKLOG = 1024


class Home:
    """The place of one node's keeper."""

    def __init__(self, job: str, *, node_rank: int, environ: Mapping[str, str] = os.environ) -> None:
        """Make the folder if need be; raises ConfigError if it cannot be trusted."""
        self.job, self.node_rank = job, node_rank
        self.folder = runtime_folder(environ)
        self._job_name = hashlib.blake2b(job.encode(), digest_size=8).hexdigest()
        self._name = f"{self._job_name}-{node_rank}"
        self._environ = environ

    @property
    def log(self) -> Path:
        """Where the keeper's stderr goes."""
        return self.folder / f"{self._name}.log"

    @property
    def _socket(self) -> Path:
        return self.folder / f"{self._name}.sock"

    @property
    def _key(self) -> Path:
        return self.folder / f"{self._job_name}.key"

    @property
    def _coordinator(self) -> Path:
        return self.folder / f"{self._job_name}.coordinator"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the job on this machine; the kernel lets go of it if its holder dies."""
        fd = os.open(self.folder / f"{self._job_name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def key(self, *, create: bool = False) -> bytes:
        """The job's key: of the environment, or of its file, which is made if need be (hold the lock).

        Raises:
            ConfigError: there is none, or it is none.
        """
        text = self._environ.get(JOB_KEY, "")
        if not text and create and not self._key.exists():
            self._write(self._key, secrets.token_hex(KEY_BYTES))
        if not text:
            with suppress(FileNotFoundError):
                text = _read_private(self._key)
        try:
            key = bytes.fromhex(text)
        except ValueError:
            key = b""
        if len(key) < KEY_BYTES:
            raise ConfigError(
                "there is no key for this job",
                got=f"{len(key)} bytes from {JOB_KEY} or {self._key}",
                allowed=f"{KEY_BYTES} bytes or more, in hexadecimal digits",
                hint=f"leave {JOB_KEY} to `distrain launch`, or set it to the same value on every node",
            )
        return key

    def listen(self) -> socket.socket:
        """Bind the socket in place of what an earlier owner left there; hold the lock."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        fresh = self._socket.with_suffix(".new")
        try:
            fresh.unlink(missing_ok=True)
            with _short(fresh) as path:
                listener.bind(path)
                os.chmod(path, 0o600)
            listener.listen(BACKLOG)
            fresh.rename(self._socket)  # whoever sees it can connect, as long as its owner lives
        except BaseException:
            listener.close()
            raise
        return listener

    def connect(self, *, timeout_s: float) -> socket.socket:
        """Connect to whoever holds the socket; raises OSError if nobody does."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout_s)
            with _short(self._socket) as path:
                connection.connect(path)
        except BaseException:
            connection.close()
            raise
        return connection

    def publish_coordinator(self, address: str) -> None:
        """Leave the address for the other keepers of this machine."""
        self._write(self._coordinator, address)

    def coordinator(self) -> str:
        """HOST:PORT of node 0's keeper; empty if nobody has said it yet."""
        if address := self._environ.get(COORDINATOR, ""):
            return address
        with suppress(FileNotFoundError):
            return _read_private(self._coordinator)
        return ""

    def coordinator_to_be(self) -> str:
        """HOST:PORT at which node 0's keeper has to listen; port 0 is any, to be published."""
        return self._environ.get(COORDINATOR, "") or "127.0.0.1:0"

    def remove(self) -> None:
        """Take away this node's files, and the job's with those of its last node."""
        with self.locked():
            for path in (self._socket, self.log):
                path.unlink(missing_ok=True)
            if not list(self.folder.glob(f"{self._job_name}-*.sock")):
                for path in self.folder.glob(f"{self._job_name}.*"):
                    path.unlink(missing_ok=True)

    def start(
        self,
        listener: socket.socket,
        *,
        tcp: socket.socket | None = None,
        lease: int | None = None,
        command: Sequence[str] = (sys.executable, "-m", "distrain.sidecar"),
    ) -> subprocess.Popen[bytes]:
        """Start a keeper that answers on ``listener``, and as coordinator on ``tcp``.

        With a ``lease``, a descriptor whose other end the caller holds, it stays this process's child and serves
        until that end is closed; without, it detaches (the returned process ends at once) and sees for itself.
        """
        fds = {"--listen-fd": listener.fileno()}
        fds |= {"--tcp-fd": tcp.fileno()} if tcp else {}
        fds |= {"--lease-fd": lease} if lease is not None else {}
        arguments = ["--job", self.job, "--node-rank", str(self.node_rank)]
        arguments += [str(word) for pair in fds.items() for word in pair]
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (root, self._environ.get("PYTHONPATH", ""))))
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            return subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**self._environ, JOB_KEY: self.key().hex(), "PYTHONPATH": path},
                pass_fds=tuple(fds.values()),
                start_new_session=True,
            )
        finally:
            os.close(log)

    def _write(self, path: Path, text: str) -> None:
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(text)
        temporary.rename(path)


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name for ``path`` that fits a socket's address, however long the folder's is."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def runtime_folder(environ: Mapping[str, str]) -> Path:
    """The folder of this user's sockets, made if need be.

    Raises:
        ConfigError: it is somebody else's, or others can enter it.
    """
    base = environ.get("XDG_RUNTIME_DIR", "")
    folder = Path(base, "distrain") if base else Path("/tmp", f"distrain-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as cause:
        raise ConfigError(
            "the folder for sockets cannot be used", got=f"{folder}: {cause.strerror}"
        ) from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            "the folder for sockets cannot be trusted",
            got=f"{folder}, mode {stat.filemode(found.st_mode)}, owner {found.st_uid}",
            allowed=f"a folder of user {os.getuid()} that nobody else can enter",
            hint=f"chmod 700 {folder}, or set XDG_RUNTIME_DIR",
        )
    return folder


def _read_private(path: Path) -> str:
    """The text of a file that nobody else could have written or read."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(fd) as file:
        found = os.fstat(fd)
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise ConfigError(
                "a private file can be read by others",
                got=f"{path}, mode {stat.filemode(found.st_mode)}",
                allowed="0600",
            )
        return file.read(4096).strip()
