"""What one agent knows of the others while the job runs, and what it tells them.

A node that stops says so at once, with the reason, and the others stop too; when its ranks are gone it reports how
each ended. Node 0 collects the reports and gives the verdict, so that every node ends with the same exit code and
one of them prints the whole story. An agent that vanishes shows as a closed connection; one whose machine vanishes,
as silence.
"""

import math
import time
from collections.abc import Mapping

from .failure import NodeReport, exit_code, first_failure
from .link import Link, Message

BEAT_S = 1.0
SILENCE_S = 15.0


class Team:
    """A job of one node: nobody to tell, nobody to wait for. Also what the other kinds have in common.

    ``why`` is set when this node has to stop because of another, with ``signum`` if a signal is the reason;
    ``trouble`` if it is the loss of node 0. ``lost`` says when which nodes were. ``settled`` means that the verdict
    ``code`` on the whole job is known.
    """

    def __init__(self, links: Mapping[int, Link], *, nodes: tuple[str, ...], node_rank: int) -> None:
        self.links = dict(links)
        self.why = ""
        self.signum = 0
        self.trouble = ""
        self.settled = False
        self.code = 0
        self.reports: dict[int, NodeReport] = {}
        self.lost: dict[int, float] = {}
        """seconds since the epoch by rank"""
        self.nodes = nodes
        self._node_rank = node_rank
        self._heard: dict[int, float] = {}
        self._beat_at = -math.inf

    def announce(self, why: str, *, signum: int = 0) -> None:
        """Tell the others that this node stops, and why."""
        self.why = self.why or why
        for link in self.links.values():
            link.send({"stop": why, "signum": signum})

    def finish(self, report: NodeReport) -> None:
        """This node's ranks are gone."""
        self.reports[self._node_rank] = report
        self._settle()

    def hear(self, node_rank: int, *, now: float) -> None:
        """Take what came over the link to ``node_rank``."""
        link = self.links[node_rank]
        for message in link.receive():
            self._heard[node_rank] = now
            try:
                self._take(node_rank, message)
            except (KeyError, TypeError, ValueError):  # not one of ours
                link.closed = True

    def tick(self, *, now: float) -> None:
        """Show that this node lives, and look for nodes that do not."""
        if now >= self._beat_at + BEAT_S:
            self._beat_at = now
            for link in self.links.values():
                link.send({"beat": True})
        for node_rank, link in list(self.links.items()):
            if now > self._heard.setdefault(node_rank, now) + SILENCE_S:
                link.closed = True
            if link.closed:
                link.close()
                del self.links[node_rank]
                self._lose(node_rank)

    def close(self) -> None:
        """End the connections."""
        for link in self.links.values():
            link.close()

    def _settle(self) -> None:
        self.code = exit_code(self.reports.values())
        self.settled = True

    def _take(self, node_rank: int, message: Message) -> None:
        """One kind's reading of a message."""

    def _lose(self, node_rank: int) -> None:
        """One kind's answer to the loss of a node."""

    def _lost(self, node_rank: int) -> str:
        return f"{self.nodes[node_rank]} is lost: its launcher is gone or does not answer"


class Host(Team):
    """Node 0: passes on who stops, collects reports, gives the verdict."""

    def _take(self, node_rank: int, message: Message) -> None:
        if "stop" in message:
            self._stop(str(message["stop"]), signum=int(message["signum"]), origin=node_rank)
        if "report" in message:
            self._add(node_rank, NodeReport.from_json(message["report"]))

    def _lose(self, node_rank: int) -> None:
        if node_rank not in self.reports:
            self.lost[node_rank] = time.time()
            self._add(node_rank, NodeReport(trouble=self._lost(node_rank)))

    def _add(self, node_rank: int, report: NodeReport) -> None:
        self.reports[node_rank] = report
        first = first_failure(report.exits)
        if first or report.trouble:
            why = f"rank {first.rank} on {first.node} failed: {first.how}" if first else report.trouble
            self._stop(why, signum=0, origin=node_rank)
        self._settle()

    def _stop(self, why: str, *, signum: int, origin: int) -> None:
        if not self.why:
            self.why, self.signum = why, signum
            for node_rank, link in self.links.items():
                if node_rank != origin:
                    link.send({"stop": why, "signum": signum})

    def _settle(self) -> None:
        if len(self.reports) == len(self.nodes):
            super()._settle()
            first = first_failure(each for report in self.reports.values() for each in report.exits)
            why = f"rank {first.rank} on {first.node} failed first: {first.how}" if first else self.why
            for link in self.links.values():
                link.send({"end": self.code, "why": why})


class Member(Team):
    """Any other node: stops when node 0 says so, reports to it, takes its verdict."""

    def finish(self, report: NodeReport) -> None:
        self.reports[self._node_rank] = report
        for link in self.links.values():
            link.send({"report": report.to_json()})
        self._settle_alone()

    def _take(self, node_rank: int, message: Message) -> None:
        if "stop" in message and not self.why:
            self.why, self.signum = str(message["stop"]), int(message["signum"])
        if "end" in message:
            self.code, self.why, self.settled = int(message["end"]), str(message["why"]), True

    def _lose(self, node_rank: int) -> None:
        if not self.settled:
            self.lost[node_rank] = time.time()
            self.why = self.trouble = self._lost(node_rank)
            self._settle_alone()

    def _settle_alone(self) -> None:
        """Without node 0 there is nobody left to give a verdict."""
        if not self.links and self.reports:
            self.code, self.settled = 1, True


def team(links: Mapping[int, Link], *, nodes: tuple[str, ...], node_rank: int) -> Team:
    """The kind of team that a node in its place is part of."""
    kind = Team if len(nodes) == 1 else Host if node_rank == 0 else Member
    return kind(links, nodes=nodes, node_rank=node_rank)
