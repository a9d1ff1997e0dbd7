"""What the keepers of a job agree on: which snapshots are complete, what is written where, and when it is committed.

Node 0's keeper coordinates. Every keeper is a *member*, that one too, and tells it what its ranks do; it answers with
what all of them have to know. It has no memory that must survive: a member says on joining what its ranks hold, and
what is on disk is decided by one rename. So if the coordinator dies, the next one begins with what it is told.

::

    member to coordinator                                   coordinator to members
      rank       a rank has come, and what it has sealed
      opened     it fills a slot                              due        the tiers that the step will go to
      sealed     the slot is complete                         begin      write your ranks' part of it there
      gone       it is no good, or was skipped or dropped     protected  every rank has sealed it
      ends       the rank will save nothing more              abandon    stop writing; ``again`` if it is tried again
      left       it is not there any more
      prepared   one writer's bytes are durable on a tier     committed  it is a checkpoint
      failed     they are not                                 lost       forget the step

One attempt at one tier is a two-phase commit: all writers prepared, then one commit. Everything here is pure: events
go in, and come out as messages and as things to do (``Commit``, ``Retry``).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .progress import Attempt, StepProgress
from .terms import (
    MEMORY,
    Commit,
    Message,
    Output,
    Retry,
    Rules,
    Tell,
    begin_message,
    committed_message,
    due_message,
)

REMEMBERED_STEPS = 64


class Agreement:
    """The coordinator's mind. ``new_name`` names attempts."""

    def __init__(self, rules: Rules, *, new_name: Callable[[], str]) -> None:
        self._rules, self._new_name = rules, new_name
        self._members: dict[int, set[int]] = {}
        """ranks by keeper"""
        self._present: set[int] = set()
        """ranks that are there"""
        self._steps: dict[int, StepProgress] = {}
        self._skipped: dict[int, set[int]] = {}
        """ranks by step that they will not save"""
        self._ended: set[int] = set()
        """ranks that are there, and will save nothing more"""
        self._left: set[int] = set()
        """ranks that were there"""
        self._last: dict[int, int] = {}
        self._out: list[Output] = []

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self._rules.world_size

    @property
    def busy(self) -> bool:
        """Whether anything is being written, or will be."""
        return any(step.attempts or step.waiting for step in self._steps.values())

    @property
    def in_flight(self) -> Mapping[int, Sequence[tuple[int, str]]]:
        """Steps and attempts under way, by tier."""
        found: dict[int, list[tuple[int, str]]] = {}
        for number, step in self._steps.items():
            for tier, attempt in step.attempts.items():
                found.setdefault(tier, []).append((number, attempt.name))
        return found

    def needed(self, tier: int) -> set[int]:
        """Steps whose checkpoint on ``tier`` is still read from."""
        return {
            number
            for number, step in self._steps.items()
            if tier in step.committed
            and (step.waiting or any(a.source == tier for a in step.attempts.values()))
        }

    def take(self, member: int, message: Message) -> list[Output]:
        """What follows from a member's message; KeyError, TypeError or AttributeError if it is none."""
        handle = getattr(self, f"_on_{message['do']}")
        handle(member, message)
        return self._flush()

    def gone_member(self, member: int) -> list[Output]:
        """The connection to a member is lost. What its ranks have sealed may come back with another keeper."""
        ranks = self._members.pop(member, set())
        reason = f"the keeper of ranks {_shown(ranks)} is lost"
        for number, step in list(self._steps.items()):
            if ranks & (step.opened.keys() - step.sealed.keys()):
                self._lose(number, reason)
                continue
            lacking = {rank for rank, owner in step.sealed.items() if owner == member}
            for rank in lacking:
                del step.sealed[rank]
            step.protected = step.protected and not lacking
            for tier, attempt in list(step.attempts.items()):
                if attempt.active and not attempt.committing and not ranks <= attempt.digests.keys():
                    self._fail(number, tier, reason, after_s=self._rules.rejoin_s)
        self._ended -= ranks
        self._without(ranks)
        return self._flush()

    def retry(self, tier: int, step: int) -> list[Output]:
        """The pause after a failed attempt is over; with ``MEMORY``, the time in which ranks may bring a step along."""
        found = self._steps.get(step)
        if found and tier == MEMORY and not found.is_decided:
            self._lose(step, "not every rank has come back with it")
        attempt = found.attempts.get(tier) if found else None
        if found and attempt and not attempt.active:
            if self._can_begin(found, attempt):
                self._begin(step, tier, attempt.source, tries=attempt.tries)
            else:
                self._give_up(step, tier, "not every rank has it any more")
        return self._flush()

    def committed(self, commit: Commit, folder: str) -> list[Output]:
        """The commit is done."""
        self._out.append(Tell(None, committed_message(commit.step, commit.tier, folder)))
        if found := self._found(commit):
            del found.attempts[commit.tier]
            found.committed[commit.tier] = folder
            self._next_tier(commit.step, source=commit.tier)
        return self._flush()

    def refused(self, commit: Commit, reason: str) -> list[Output]:
        """The commit failed."""
        if found := self._found(commit):
            found.attempts[commit.tier].committing = False
            self._fail(commit.step, commit.tier, reason)
        return self._flush()

    # -- messages

    def _on_rank(self, member: int, message: Message) -> None:
        """A rank has come, with complete snapshots of these steps in memory, oldest first."""
        rank, there = message["rank"], {number for number, _ in message["holds"] + message["fills"]}
        unsealed = [n for n, s in self._steps.items() if rank in s.opened.keys() - s.sealed.keys()]
        for number in [n for n in unsealed if n not in there]:
            self._lose(number, f"rank {rank} has come back without it")
        if member not in self._members:
            decided = [(number, step) for number, step in self._steps.items() if step.is_decided]
            self._out += [
                Tell(member, due_message(number, step.tiers, is_first=False)) for number, step in decided
            ]
            self._out += [
                Tell(member, begin_message(n, tier, attempt=each.name, source=each.source))
                for n, tier, each in self._active()
            ]
        self._members.setdefault(member, set()).add(rank)
        self._ended.discard(rank)
        if message["is_there"]:
            self._present.add(rank)
            self._left.discard(rank)
        for number, order in message["holds"]:
            if number not in self._steps:
                self._steps[number] = StepProgress()
                self._out.append(Retry(MEMORY, number, self._rules.rejoin_s))
            step = self._steps[number]
            step.opened[rank] = order
            step.sealed[rank] = member
            for tier, folder in step.committed.items():
                self._out.append(Tell(member, committed_message(number, tier, folder)))
            if self._is_complete(step):
                self._protect(number)
                if not step.is_decided:  # whether it was on disk, nobody knows any more
                    self._decide(number)
                self._resume(number)
            else:
                self._lose_without_ended(number)

    def _on_opened(self, member: int, message: Message) -> None:
        number, rank = message["step"], message["rank"]
        for other in [n for n, s in self._steps.items() if n < number and rank not in s.sealed]:
            self._lose(other, f"rank {rank} went on without it")
        if (
            number in self._steps
            and self._steps[number].opened.get(rank, message["order"]) != message["order"]
        ):
            self._lose(number, f"rank {rank} saves it again")
        step = self._steps.setdefault(number, StepProgress())
        step.opened[rank] = message["order"]
        step.streams |= message["streams"]
        skipped = self._skipped.setdefault(number, set())
        skipped.discard(rank)
        if skipped:
            self._lose(number, f"ranks {_shown(skipped)} skipped it")
        elif not self._lose_without_ended(number) and (
            not step.is_decided or message["durable"] > step.durable
        ):
            step.durable |= message["durable"]
            self._decide(number)
        self._trim()

    def _on_sealed(self, member: int, message: Message) -> None:
        step = self._steps.get(message["step"])
        if step and step.opened.get(message["rank"]) == message["order"]:
            step.sealed[message["rank"]] = member
            if self._is_complete(step):
                self._protect(message["step"])

    def _on_gone(self, member: int, message: Message) -> None:
        self._skipped.setdefault(message["step"], set()).add(message["rank"])
        if message["step"] in self._steps:
            self._lose(message["step"], f"rank {message['rank']}: {message['reason']}")

    def _on_ends(self, member: int, message: Message) -> None:
        """Whatever others have of steps that this rank has not begun, none of these will ever be complete."""
        self._ended.add(message["rank"])
        for number in list(self._steps):
            self._lose_without_ended(number, ranks={message["rank"], *self._left})

    def _on_left(self, member: int, message: Message) -> None:
        rank = message["rank"]
        self._ended.discard(rank)
        self._left.add(rank)
        for ranks in self._skipped.values():
            ranks.discard(rank)
        for number in [n for n, s in self._steps.items() if rank not in s.sealed]:
            self._lose(number, f"rank {rank} is gone")
        self._without({rank})

    def _on_prepared(self, member: int, message: Message) -> None:
        attempt = self._attempt(message)
        if attempt:
            attempt.digests[message["writer"]] = message["digest"]
            if len(attempt.digests) == self._rules.world_size and not attempt.committing:
                attempt.committing = True
                self._out.append(
                    Commit(message["tier"], message["step"], attempt.name, dict(attempt.digests))
                )

    def _on_failed(self, member: int, message: Message) -> None:
        attempt = self._attempt(message)
        if attempt and not attempt.committing:
            reason = f"rank {message['writer']}: {message['reason']}"
            self._fail(message["step"], message["tier"], reason, final=message["final"])

    # -- decisions

    def _active(self) -> Iterator[tuple[int, int, Attempt]]:
        for number, step in self._steps.items():
            for tier, attempt in step.attempts.items():
                if attempt.active:
                    yield number, tier, attempt

    def _found(self, commit: Commit) -> StepProgress | None:
        """The step of a commit, unless another attempt has taken its place."""
        step = self._steps.get(commit.step)
        attempt = step.attempts.get(commit.tier) if step else None
        return step if attempt and attempt.name == commit.attempt else None

    def _attempt(self, message: Message) -> Attempt | None:
        """The attempt a message is about, if it is still under way."""
        step = self._steps.get(message["step"])
        attempt = step.attempts.get(message["tier"]) if step else None
        return attempt if attempt and attempt.active and attempt.name == message["attempt"] else None

    def _is_complete(self, step: StepProgress) -> bool:
        return len(step.sealed) == self._rules.world_size and not step.streams and not step.protected

    def _protect(self, number: int) -> None:
        step = self._steps[number]
        step.protected = True
        self._tell(do="protected", step=number, snapshots=list(step.opened.items()))

    def _decide(self, number: int) -> None:
        """Choose the tiers of a step, and begin with the first."""
        step = self._steps[number]
        have = step.tiers
        for tier, every in enumerate(self._rules.every):
            last = self._last.get(tier)
            if tier not in have and (step.durable or last is None or not last < number < last + every):
                step.waiting.append(tier)
                self._last[tier] = number
        step.waiting.sort()
        self._out.append(Tell(None, due_message(number, step.tiers, is_first=not step.is_decided)))
        step.is_decided = True
        if not step.attempts:
            self._next_tier(number, source=max(step.committed, default=MEMORY))

    def _can_begin(self, step: StepProgress, attempt: Attempt) -> bool:
        return len(step.sealed) == self._rules.world_size or attempt.source != MEMORY

    def _resume(self, number: int) -> None:
        """Ranks that were lost are back: try again at once what waits for them."""
        for tier, attempt in list(self._steps[number].attempts.items()):
            if not attempt.active:
                self._begin(number, tier, attempt.source, tries=attempt.tries)

    def _next_tier(self, number: int, *, source: int) -> None:
        step = self._steps[number]
        if step.waiting:
            self._begin(number, step.waiting.pop(0), source, tries=0)

    def _begin(self, number: int, tier: int, source: int, *, tries: int) -> None:
        attempt = Attempt(self._new_name(), source, tries + 1)
        self._steps[number].attempts[tier] = attempt
        self._out.append(Tell(None, begin_message(number, tier, attempt=attempt.name, source=source)))

    def _fail(
        self, number: int, tier: int, reason: str, *, final: bool = False, after_s: float | None = None
    ) -> None:
        """An attempt failed: try again after ``after_s`` or the usual pause, or give up."""
        step = self._steps[number]
        attempt = step.attempts[tier]
        attempt.active = False
        if final or step.streams or attempt.tries >= self._rules.num_attempts:
            self._give_up(number, tier, reason)
            return
        self._abandon(number, tier, attempt, reason, again=True)
        pause_s = self._rules.backoff_s * 2 ** (attempt.tries - 1) if after_s is None else after_s
        self._out.append(Retry(tier, number, pause_s))

    def _give_up(self, number: int, tier: int, reason: str) -> None:
        step = self._steps[number]
        attempt = step.attempts.pop(tier)
        self._abandon(number, tier, attempt, reason, again=False)
        self._owe(tier, number)
        if attempt.source == MEMORY and step.streams:
            step.waiting.clear()
        self._next_tier(number, source=attempt.source)

    def _abandon(self, number: int, tier: int, attempt: Attempt, reason: str, *, again: bool) -> None:
        self._tell(do="abandon", step=number, tier=tier, attempt=attempt.name, reason=reason, again=again)

    def _lose(self, number: int, reason: str) -> None:
        """The step cannot be completed any more, or is replaced."""
        step = self._steps[number]
        for tier in step.waiting:
            self._owe(tier, number)
        for tier in list(step.attempts):
            attempt = step.attempts.pop(tier)
            self._owe(tier, number)
            if (
                not attempt.committing
            ):  # a commit under way is not called back; it will be told when it is done
                self._abandon(number, tier, attempt, reason, again=False)
        del self._steps[number]
        self._tell(do="lost", step=number, snapshots=list(step.opened.items()), reason=reason)

    def _lose_without_ended(self, number: int, *, ranks: Collection[int] | None = None) -> bool:
        """Lose a step that ``ranks`` (all that have ended) have not begun; whether there are any such."""
        opened = self._steps[number].opened
        lacking = [rank for rank in (self._ended if ranks is None else ranks) if rank not in opened]
        if lacking:
            self._lose(number, f"ranks {_shown(lacking)} have ended without it")
        return bool(lacking)

    def _owe(self, tier: int, number: int) -> None:
        """The tier did not get this step: the next one is due, however soon it comes."""
        if self._last.get(tier) == number:
            del self._last[tier]

    def _without(self, ranks: set[int]) -> None:
        """Once nobody is there any more, nobody will complete what is not."""
        self._present -= ranks
        if not self._present:
            for number in [n for n, s in self._steps.items() if len(s.sealed) < self._rules.world_size]:
                self._lose(number, "everybody is gone")

    def _trim(self) -> None:
        for number in list(self._steps)[:-REMEMBERED_STEPS]:
            step = self._steps[number]
            if not step.attempts and not step.waiting:
                del self._steps[number]
        for number in list(self._skipped)[:-REMEMBERED_STEPS]:
            del self._skipped[number]

    def _tell(self, **message: Any) -> None:
        self._out.append(Tell(None, message))

    def _flush(self) -> list[Output]:
        out, self._out = self._out, []
        return out


def _shown(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))
