"""What emulated nodes feel of their network: ranks that send each other numbered packets and keep book."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from distrain.core import netns

CGROUPS = Path("/sys/fs/cgroup")

SIZE = 300
PINGER = """
import contextlib, os, socket, sys, threading, time
from distrain.core import netns
from distrain.core.failpoints import hit
from distrain.faults.inject import arm

node, num_nodes, num_steps = int(os.environ["GROUP_RANK"]), int(os.environ["GROUP_WORLD_SIZE"]), int(sys.argv[2])
others = [each for each in range(num_nodes) if each != node]
book = os.open(f"{sys.argv[1]}/node{node}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
post = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
with contextlib.suppress(PermissionError):  # a reader that has to wait for a processor loses nothing
    post.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE
post.bind((netns.address(node), 7000))
heard = set()

def receive():
    while True:
        data, (host, _) = post.recvfrom(2048)
        now = time.monotonic_ns()
        source, number, sent = data.split()[:3]
        heard.add(int(source))
        os.write(book, b"got %s %s %s %d\\n" % (source, number, sent, now))

def send():
    for number in range(10**9):
        for each in others:
            now = time.monotonic_ns()
            os.write(book, b"sent %d %d %d 0\\n" % (each, number, now))
            post.sendto(b"%d %d %d ".ljust(NBYTES) % (node, number, now), (netns.address(each), 7000))
        time.sleep(0.005)

for work in (receive, send):
    threading.Thread(target=work, daemon=True).start()
while len(heard) < len(others):
    time.sleep(0.001)
with arm():
    for step in range(1, num_steps + 1):
        hit("train.step", step=step)
        os.write(book, b"step %d 0 %d 0\\n" % (step, time.monotonic_ns()))
        time.sleep(0.02)
time.sleep(0.5)
""".replace("NBYTES", str(SIZE))


@dataclass(frozen=True, slots=True)
class Packet:
    """One that a node has sent."""

    sent_ns: int
    received_ns: int | None
    """None: never"""


class Books:
    """What all nodes have written down."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self._lines = {
            node: [line.split() for line in (folder / f"node{node}").read_text().splitlines()]
            for node in range(num_nodes)
        }

    def begun_ns(self, node: int, step: int) -> int:
        """When a node was past the beginning of a step, and whatever the step began with had happened."""
        return next(int(w[3]) for w in self._lines[node] if w[0] == "step" and int(w[1]) == step)

    def packets(self, source: int, target: int, *, since_ns: int, until_ns: int) -> list[Packet]:
        """Those sent in a time."""
        got = {int(w[2]): int(w[4]) for w in self._lines[target] if w[0] == "got" and int(w[1]) == source}
        sent = (w for w in self._lines[source] if w[0] == "sent" and int(w[1]) == target)
        found = [Packet(int(w[3]), got.get(int(w[2]))) for w in sent if since_ns <= int(w[3]) < until_ns]
        assert found, "nothing was sent"
        return found


def need_networks() -> None:
    """Skip where nodes cannot have networks."""
    if missing := netns.missing():
        pytest.skip(missing)


def groups_of(pids: Iterable[int]) -> list[str]:
    """Names of the control groups of the emulated nodes in which processes are."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    return sorted({line.rpartition("/")[2] for line in lines if "distrain-node" in line})


def are_left(groups: Iterable[str]) -> bool:
    """Whether any of these groups is still there."""
    return any(path.is_dir() for name in groups for path in CGROUPS.glob(f"**/{name}"))


def child_of(parent: int, word: bytes) -> int:
    """The child with this word in its command line."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            ppid = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if ppid == parent and word in (path / "cmdline").read_bytes():
                return int(path.name)
    raise LookupError(f"process {parent} has no child {word!r}")
