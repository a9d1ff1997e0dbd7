"""What keepers agree on, in every order of events."""

from itertools import count, permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.sidecar.agreement import Agreement
from distrain.sidecar.terms import MEMORY, Commit, Output, Retry, Rules, Tell


class Talk:
    """An agreement, and what it has said."""

    def __init__(self, world_size: int = 2, *, every: tuple[int, ...] = (1,), num_attempts: int = 2) -> None:
        rules = Rules(world_size=world_size, every=every, num_attempts=num_attempts, backoff_s=1.0)
        names = (f"a{number}" for number in count())
        self.agreement = Agreement(rules, new_name=lambda: next(names))
        self.orders = count(1)
        self.order: dict[tuple[int, int], int] = {}
        self.said: list[dict[str, Any]] = []
        self.commits: list[Commit] = []
        self.retries: list[Retry] = []

    def hear(self, outputs: list[Output]) -> None:
        for output in outputs:
            match output:
                case Tell(_, message):
                    self.said.append(message)
                case Commit():
                    self.commits.append(output)
                case Retry():
                    self.retries.append(output)

    def take(self, do: str, member: int, **fields: Any) -> None:
        self.hear(self.agreement.take(member, {"do": do, **fields}))

    def come(
        self, rank: int, holds: tuple[int, ...] = (), *, member: int | None = None, is_there: bool = True
    ) -> None:
        rows = [[step, self.order.setdefault((rank, step), next(self.orders))] for step in holds]
        who = {"rank": rank, "is_there": is_there}
        self.take("rank", rank if member is None else member, **who, holds=rows, fills=[])

    def end(self, rank: int) -> None:
        self.take("ends", rank, rank=rank)

    def open(self, rank: int, step: int, *, durable: bool = False, streams: bool = False) -> None:
        self.order[rank, step] = next(self.orders)
        fields = {"rank": rank, "step": step, "order": self.order[rank, step]}
        self.take("opened", rank, durable=durable, streams=streams, **fields)

    def seal(self, rank: int, step: int) -> None:
        self.take("sealed", rank, rank=rank, step=step, order=self.order[rank, step])

    def save(self, step: int, *, ranks: int = 2) -> None:
        for rank in range(ranks):
            self.open(rank, step)
        for rank in range(ranks):
            self.seal(rank, step)

    def begun(self, step: int, tier: int = 0) -> str:
        """The name of the latest attempt."""
        found = [m for m in self.said if m["do"] == "begin" and (m["step"], m["tier"]) == (step, tier)]
        return str(found[-1]["attempt"])

    def prepare(self, rank: int, step: int, tier: int = 0, *, attempt: str = "") -> None:
        fields = {"step": step, "tier": tier, "attempt": attempt or self.begun(step, tier)}
        self.take("prepared", rank, writer=rank, digest=f"d{rank}", **fields)

    def fail(self, rank: int, step: int, tier: int = 0) -> None:
        fields = {"step": step, "tier": tier, "attempt": self.begun(step, tier)}
        self.take("failed", rank, writer=rank, reason="broken", final=False, **fields)

    def finish(self) -> Commit:
        commit = self.commits.pop()
        self.hear(self.agreement.committed(commit, "folder"))
        return commit

    def told(self, do: str) -> list[int]:
        """The steps of messages of a kind, in order."""
        return [message["step"] for message in self.said if message["do"] == do]


@pytest.fixture
def talk() -> Talk:
    found = Talk()
    for rank in range(2):
        found.come(rank)
    return found


def test_a_step_is_begun_with_the_first_rank_and_committed_with_the_last(talk: Talk) -> None:
    talk.open(0, 1)
    assert talk.told("due") == [1] and talk.told("begin") == [1]
    talk.open(1, 1)
    talk.seal(0, 1)
    talk.prepare(0, 1)
    assert not talk.told("protected") and not talk.commits
    talk.seal(1, 1)
    assert talk.told("protected") == [1] and not talk.commits
    talk.prepare(1, 1)
    commit = talk.finish()
    assert commit.digests == {0: "d0", 1: "d1"} and talk.told("committed") == [1]
    assert not talk.agreement.busy


def test_the_next_tier_is_filled_from_the_one_before() -> None:
    talk = Talk(1, every=(1, 2, 1))
    talk.come(0)
    for step in (1, 2):
        talk.save(step, ranks=1)
        for tier in (0, 1, 2) if step == 1 else (0, 2):
            talk.prepare(0, step, tier)
            talk.finish()
    sources = [(m["step"], m["tier"], m["source"]) for m in talk.said if m["do"] == "begin"]
    assert sources == [(1, 0, MEMORY), (1, 1, 0), (1, 2, 1), (2, 0, MEMORY), (2, 2, 0)]


def test_an_attempt_that_fails_is_tried_again_and_then_given_up(talk: Talk) -> None:
    talk.save(1)
    first = talk.begun(1)
    talk.fail(1, 1)
    assert talk.said[-1] == {
        "do": "abandon",
        "step": 1,
        "tier": 0,
        "attempt": first,
        "reason": "rank 1: broken",
        "again": True,
    }
    talk.prepare(0, 1, attempt=first)  # late: of no importance
    (retry,) = talk.retries
    talk.hear(talk.agreement.retry(retry.tier, retry.step))
    assert talk.begun(1) != first
    talk.fail(0, 1)
    assert talk.said[-1]["again"] is False and not talk.agreement.busy and not talk.commits


def test_after_a_step_that_came_to_nothing_the_next_is_due_however_soon() -> None:
    talk = Talk(1, every=(100,), num_attempts=1)
    talk.come(0)
    talk.save(1, ranks=1)
    talk.fail(0, 1)
    talk.save(2, ranks=1)
    talk.prepare(0, 2)
    talk.finish()
    talk.save(3, ranks=1)
    assert talk.told("begin") == [1, 2]


def test_where_a_tier_is_given_up_the_next_gets_the_step_from_memory() -> None:
    talk = Talk(1, every=(1, 1), num_attempts=1)
    talk.come(0)
    talk.save(1, ranks=1)
    talk.fail(0, 1)
    assert [(m["tier"], m["source"]) for m in talk.said if m["do"] == "begin"] == [(0, MEMORY), (1, MEMORY)]


def test_a_rank_that_skips_a_step_loses_it_for_all_whoever_is_first(talk: Talk) -> None:
    talk.take("gone", 0, rank=0, step=1, reason="no slot")
    talk.open(1, 1)
    assert talk.told("lost") == [1] and not talk.told("begin")
    talk.open(1, 2)
    talk.take("gone", 0, rank=0, step=2, reason="no slot")
    assert talk.told("lost") == [1, 2] and not talk.agreement.busy
    talk.save(3)
    assert talk.told("protected") == [3]


def test_a_rank_that_goes_on_leaves_behind_what_it_has_not_sealed(talk: Talk) -> None:
    talk.open(0, 1)
    talk.open(1, 1)
    talk.seal(1, 1)
    talk.open(1, 2)
    assert not talk.told("lost")
    talk.open(0, 2)
    assert talk.told("lost") == [1]


def test_a_step_saved_again_is_another_one(talk: Talk) -> None:
    talk.save(1)
    old = dict(talk.order)
    talk.open(0, 1)
    (lost,) = [message for message in talk.said if message["do"] == "lost"]
    assert dict(lost["snapshots"]) == {0: old[0, 1], 1: old[1, 1]}
    talk.seal(0, 1)
    talk.take("sealed", 1, rank=1, step=1, order=old[1, 1])  # what is left of the first life
    assert talk.told("protected") == [1]
    talk.open(1, 1)
    talk.seal(1, 1)
    assert talk.told("protected") == [1, 1]


def test_a_commit_under_way_is_not_called_back(talk: Talk) -> None:
    talk.save(1)
    for rank in range(2):
        talk.prepare(rank, 1)
    talk.take("gone", 0, rank=0, step=1, reason="dropped")
    assert "abandon" not in [message["do"] for message in talk.said]
    talk.finish()
    assert talk.told("committed") == [1]


def test_a_commit_that_is_refused_counts_as_an_attempt(talk: Talk) -> None:
    talk.save(1)
    for rank in range(2):
        talk.prepare(rank, 1)
    talk.hear(talk.agreement.refused(talk.commits.pop(), "EIO"))
    talk.hear(talk.agreement.retry(0, 1))
    for rank in range(2):
        talk.prepare(rank, 1)
    talk.finish()
    assert talk.told("committed") == [1]


def test_a_lost_keeper_fails_its_attempts_and_its_return_resumes_them(talk: Talk) -> None:
    talk.save(1)
    talk.prepare(0, 1)
    talk.hear(talk.agreement.gone_member(1))
    assert talk.told("abandon") == [1] and talk.agreement.busy
    talk.come(1, holds=(1,), member=9)
    assert talk.told("begin") == [1, 1] and talk.told("protected") == [1, 1]
    for rank in range(2):
        talk.prepare(rank, 1)
    talk.finish()


def test_a_keeper_that_comes_back_without_a_step_loses_it(talk: Talk) -> None:
    talk.save(1)
    talk.hear(talk.agreement.gone_member(1))
    talk.come(1, member=9)
    assert talk.told("lost") == [1] and not talk.agreement.busy


def test_a_keeper_that_never_comes_back_is_not_waited_for_for_ever(talk: Talk) -> None:
    talk.save(1)
    talk.hear(talk.agreement.gone_member(1))
    (retry,) = talk.retries
    assert retry.after_s == 30.0
    talk.hear(talk.agreement.retry(retry.tier, retry.step))
    assert not talk.agreement.busy


def test_a_new_coordinator_begins_with_what_the_keepers_hold() -> None:
    old, new = Talk(), Talk()
    for rank in range(2):
        old.come(rank)
    old.save(4)
    new.order = old.order
    new.come(0, holds=(4,))
    assert not new.told("protected")
    new.come(1, holds=(4,))
    assert new.told("protected") == [4] and new.told("begin") == [4]


def test_a_rank_that_opens_what_another_brought_along_has_it_decided_too() -> None:
    talk = Talk()
    talk.come(0, holds=(4,))
    talk.come(1)
    talk.open(1, 4)
    talk.seal(1, 4)
    assert talk.told("begin") == [4] and talk.told("protected") == [4]


def test_once_everybody_is_gone_nothing_is_waited_for(talk: Talk) -> None:
    talk.open(0, 1)
    talk.seal(0, 1)
    talk.take("left", 0, rank=0)
    assert talk.agreement.busy
    talk.take("left", 1, rank=1)
    assert talk.told("lost") == [1] and not talk.agreement.busy


def in_order(events: tuple[str, ...]) -> bool:
    return all(events.index(f"{rank} comes") < events.index(f"{rank} ends") for rank in range(2))


ORDERS = list(filter(in_order, permutations(["0 comes", "0 ends", "1 comes", "1 ends"])))


@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
def test_a_step_that_a_rank_ends_without_is_lost_in_every_order_of_events(order: tuple[str, ...]) -> None:
    """To a new coordinator rank 0 brings step 4 along, rank 1 only step 5: nobody will complete either."""
    talk = Talk()
    for event in order:
        rank = int(event[0])
        if event.endswith("comes"):
            talk.come(rank, holds=(4 + rank,))
        else:
            talk.end(rank)
    assert sorted(talk.told("lost")) == [4, 5] and not talk.agreement.busy
    assert all("ended without it" in m["reason"] for m in talk.said if m["do"] == "lost")


def test_a_rank_that_has_ended_is_not_waited_for_by_those_that_go_on(talk: Talk) -> None:
    talk.save(1)
    talk.end(0)
    assert not talk.told("lost")
    talk.open(1, 2)
    assert talk.told("lost") == [2] and talk.told("begin") == [1]
    talk.take("left", 0, rank=0)
    talk.open(1, 3)  # whoever has left may come back: the next life of a job need not come in order
    talk.come(0)
    talk.open(0, 3)
    for rank in range(2):
        talk.seal(rank, 3)
    assert talk.told("lost") == [2] and talk.told("protected") == [1, 3]


def test_a_rank_that_has_left_is_not_waited_for_at_the_end_either(talk: Talk) -> None:
    talk.save(1)
    talk.end(1)
    talk.take("left", 1, rank=1)
    talk.open(0, 2)
    talk.seal(0, 2)
    assert not talk.told("lost")  # it may come back
    talk.end(0)
    assert talk.told("lost") == [2]


def test_ranks_that_do_not_come_back_with_a_step_are_not_waited_for_for_ever() -> None:
    talk = Talk()
    talk.come(0, holds=(4,))
    (retry,) = talk.retries
    assert (retry.tier, retry.step, retry.after_s) == (MEMORY, 4, 30.0)
    talk.hear(talk.agreement.retry(retry.tier, retry.step))
    assert talk.told("lost") == [4] and not talk.agreement.busy


def test_the_time_to_come_back_means_nothing_to_a_step_that_is_complete_by_then() -> None:
    talk = Talk()
    talk.come(0, holds=(4,))
    talk.come(1, holds=(4,))
    talk.hear(talk.agreement.retry(MEMORY, 4))
    assert not talk.told("lost") and talk.told("begin") == [4]


def test_memory_of_ranks_that_are_gone_counts_but_they_do_not() -> None:
    talk = Talk()
    talk.come(0)
    talk.come(1, holds=(4,), is_there=False)
    talk.open(0, 4)
    assert talk.told("begin") == [4]
    talk.open(0, 5)  # of which rank 1 has nothing
    talk.take("left", 0, rank=0)
    assert not talk.agreement.busy and 5 in talk.told("lost")


def test_a_stream_is_never_protected_nor_tried_again() -> None:
    talk = Talk(1)
    talk.come(0)
    talk.open(0, 1, streams=True)
    talk.fail(0, 1)
    assert talk.said[-1]["again"] is False
    talk.open(0, 2, streams=True)
    talk.seal(0, 2)
    talk.prepare(0, 2)
    talk.finish()
    assert not talk.told("protected") and talk.told("committed") == [2]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1), st.integers(1, 3)), max_size=40))
def test_once_all_have_ended_every_step_is_on_its_way_or_lost(events: list[tuple[int, int, int]]) -> None:
    talk, here = Talk(), set[int]()
    for kind, rank, step in events:
        if kind == 0:
            talk.hear(talk.agreement.gone_member(rank))
            here.discard(rank)
        elif kind == 1 or rank not in here:
            talk.come(rank, holds=(step,))
            here.add(rank)
        elif kind == 2:
            talk.open(rank, step)
        elif kind == 3 and (rank, step) in talk.order:
            talk.seal(rank, step)
        elif kind == 4:
            talk.end(rank)
        else:
            talk.take("left", rank, rank=rank)
            here.discard(rank)
    for rank in range(2):
        talk.hear(talk.agreement.gone_member(rank))
    said = len(talk.said)
    for rank in range(2):
        talk.come(rank, holds=(4, 6 + rank), member=10 + rank)
    for rank in range(2):
        talk.end(rank)
    told = {
        step: m["do"] for m in talk.said[said:] if (step := m["step"]) >= 4 and m["do"] in ("due", "lost")
    }
    assert told == {4: "due", 6: "lost", 7: "lost"}


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 1), st.integers(1, 3)), max_size=60))
def test_whatever_happens_only_what_all_have_prepared_is_committed(
    events: list[tuple[int, int, int]],
) -> None:
    talk = Talk(num_attempts=3)
    sealed: set[tuple[int, int]] = set()
    prepared: dict[tuple[int, str], set[int]] = {}
    for rank in range(2):
        talk.come(rank)
    for kind, rank, step in events:
        said = len(talk.said)
        known = (rank, step) in talk.order
        if kind in (0, 1):
            talk.open(rank, step)
            sealed.discard((rank, step))
        elif kind in (2, 3) and known:
            talk.seal(rank, step)
            sealed.add((rank, step))
        elif kind in (4, 5) and step in talk.told("begin"):
            attempt = talk.begun(step)
            talk.prepare(rank, step)
            prepared.setdefault((step, attempt), set()).add(rank)
        elif kind == 6 and step in talk.told("begin"):
            talk.fail(rank, step)
        elif kind == 7:
            talk.hear(talk.agreement.gone_member(rank))
            talk.come(rank, holds=tuple(s for r, s in sorted(sealed) if r == rank))
        elif talk.commits:
            commit = talk.finish()
            assert prepared[commit.step, commit.attempt] == {0, 1} == commit.digests.keys()
        for retry in talk.retries:
            talk.hear(talk.agreement.retry(retry.tier, retry.step))
        talk.retries.clear()
        for message in talk.said[said:]:
            if message["do"] == "protected":
                assert {(0, message["step"]), (1, message["step"])} <= sealed
                assert all(talk.order[r, message["step"]] == order for r, order in message["snapshots"])
    while talk.commits:
        talk.finish()
    for rank in range(2):
        talk.take("left", rank, rank=rank)
    talk.save(9)  # whatever came before, the next step works
    assert talk.told("protected")[-1] == 9
    for rank in range(2):
        talk.prepare(rank, 9)
    assert talk.finish().step == 9
