"""One agent a node: sees its ranks through to their end, together.

A single loop waits on everything at once (ends of processes, pipes, signals, the other agents), so nothing is
polled and a dead rank is noticed when it dies. When one fails the agent waits a moment for others that failed by
themselves, tells the other nodes, and stops the rest by the ladder of signals. What happens then, today a summary
and the end, is for the caller of ``run`` to decide from the report: that is where a restart would begin.
"""

import math
import select
import subprocess
import time
from collections.abc import Callable
from functools import partial
from signal import SIGKILL

from .failure import NodeReport, first_failure, signal_name
from .output import Console
from .ranks import Ranks
from .signals import PASSING, Signals
from .stopping import Ladder
from .team import BEAT_S, Team

SETTLE_S = 0.3
"""after a failure: time for ranks that fail for the same reason to do so themselves"""
LOST_PEER_SETTLE_S = 2.0
"""after errors that only tell of a lost peer: time for the end of that peer to show"""
SWEEP_S = 0.1
"""between two looks for processes that outlive the ranks that started them"""


class Agent:
    """Watches the started ``ranks`` of one node.

    ``store`` is the process that serves the rendezvous store, if it runs on this node; ``grace_s`` overrides the
    time between the first signal and SIGKILL.
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        team: Team,
        consoles: tuple[Console, Console],
        store: subprocess.Popen[bytes] | None,
        grace_s: float | None,
    ) -> None:
        self._ranks = ranks
        self._team = team
        self._consoles = consoles
        self._store = store
        self._grace_s = grace_s
        self._ladder: Ladder | None = None
        self._settled_at = math.inf
        self._trouble = ""
        self._signum = 0

    def run(self, arrived: Signals) -> NodeReport:
        """Wait for the ranks, then for the verdict of the team; how this node's ranks ended."""
        while not self._ended(now=time.monotonic()):
            self._turn(arrived)
            self._react(now=time.monotonic())
        exits = self._ranks.finish()
        report = NodeReport.of(exits, trouble=self._trouble or self._team.trouble, signum=self._signum)
        self._team.finish(report)
        while not self._team.settled:
            self._turn(arrived)
        return report

    def say(self, text: str) -> None:
        """A line of the launcher's own."""
        self._consoles[1].write(f"[launch] {text}\n".encode())

    def tell(self, text: str) -> None:
        """Several lines of the launcher's own, as they are."""
        self._consoles[1].write(f"\n{text}\n".encode(errors="replace"))

    def _turn(self, arrived: Signals) -> None:
        """Wait until something happens or is due, and take note of it."""
        actions: dict[int, Callable[[float], object]] = {
            arrived.fileno(): lambda _: self._on_signals(arrived.take())
        }
        for worker in self._ranks.workers:
            if worker.exit_code is None:
                actions[worker.pidfd] = worker.look
        actions |= {stream.fileno(): stream.pump for stream in self._ranks.open_streams()}
        for node_rank, link in self._team.links.items():
            actions[link.fileno()] = partial(self._on_message, node_rank)
        poll = select.poll()
        for fd in actions:
            poll.register(fd, select.POLLIN)
        for console in self._consoles:
            if console.waiting:
                actions[console.fd] = partial(_write, console)
                poll.register(console.fd, select.POLLOUT)
        ready = {fd for fd, _ in poll.poll(1000 * self._patience_s(now=time.monotonic()))}
        now = time.time()
        for fd, action in actions.items():  # ends of ranks before their output: one time stamp for all
            if fd in ready:
                action(now)
        self._team.tick(now=time.monotonic())

    def _patience_s(self, *, now: float) -> float:
        """How long to wait if nothing happens."""
        due = [now + BEAT_S, self._ladder.next_at if self._ladder else self._settled_at]
        if not self._ranks.running:
            due.append(now + SWEEP_S)
        return max(0.0, min(due) - now)

    def _on_message(self, node_rank: int, _now: float) -> None:
        self._team.hear(node_rank, now=time.monotonic())

    def _on_signals(self, signums: list[int]) -> None:
        for signum in signums:
            if signum in PASSING:
                self._ranks.signal(signum)
            elif self._ladder:
                self._ladder.hurry(now=time.monotonic())
            else:
                self._signum = signum
                self._stop(signal_name(signum), signum=signum)

    def _react(self, *, now: float) -> None:
        """Decide, from what is known now, whether to stop, and send what is due."""
        if self._ladder is None:
            self._look_for_trouble(now=now)
        if self._ladder is None and not self._ranks.running and self._ranks.survivors():
            self._ladder = Ladder.after_failure(grace_s=self._grace_s, now=now)
        for signum in self._ladder.due(now=now) if self._ladder else []:
            self._ranks.stop(signum)
        if self._ladder and self._ladder.exhausted:
            self._ranks.stop(SIGKILL)

    def _look_for_trouble(self, *, now: float) -> None:
        first = first_failure(self._ranks.ended())
        if self._team.why:
            self._signum = self._team.signum
            self._stop(self._team.why, signum=self._signum)
        elif self._store and self._ranks.running and self._store.poll() is not None:
            self._trouble = f"the rendezvous store ended: exit code {self._store.returncode}"
            self._stop(self._trouble)
        elif first:
            self._settled_at = min(self._settled_at, now + LOST_PEER_SETTLE_S)
            if not first.lost_peer:
                self._settled_at = min(self._settled_at, now + SETTLE_S)
            if now >= self._settled_at:
                self._stop(f"rank {first.rank} on {first.node} failed: {first.how}")

    def _stop(self, why: str, *, signum: int = 0) -> None:
        """Begin to end the ranks here and on the other nodes."""
        now = time.monotonic()
        if signum:
            self._ladder = Ladder.after_signal(signum, grace_s=self._grace_s, now=now)
        else:
            self._ladder = Ladder.after_failure(grace_s=self._grace_s, now=now)
        if self._ranks.running:
            self.say(f"{why}; stopping {self._ranks.running} of {len(self._ranks.workers)} ranks")
        self._team.announce(why, signum=signum)

    def _ended(self, *, now: float) -> bool:
        """Whether this node has nothing left to wait for."""
        if self._ladder and now >= self._ladder.gives_up_at:
            self.say(f"processes that SIGKILL did not end: {self._ranks.survivors()}")
            return True
        if self._ranks.running:
            return False
        if self._ladder is None and self._team.links and first_failure(self._ranks.ended()):
            return False  # another node may hold the reason
        return not self._ranks.survivors()


def _write(console: Console, _now: float) -> None:
    console.pump()
