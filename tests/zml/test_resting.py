"""A worker that runs out of batches: it rests before it waits, so that nobody waits for it."""

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from zml.messages import EpochOver, Message, Taken, Wait
from zml.worker.member import Member
from zml.worker.timeline import Timeline

LATER, LONGER = Wait("job", ["w0"], "w0 has 7"), Wait("job", ["w0"], "w0 has 7", dealt_again=True)
OVER = EpochOver("job", 0, 40)


class Conversation:
    """A member at clock 10 of an epoch of 40 batches, and what is said between it, the coordinator and the shards."""

    def __init__(self, *replies: Message) -> None:
        self.replies = list(replies)
        self.said: list[str] = []
        self.member = member = Member.__new__(Member)
        member.told = member.draining = ""
        member.ledger_epoch, member.batches, member.next_clock = 0, 40, 40
        member.epochs_wanted, member.rested_at, member.staleness = 2, None, 0
        member.hooks = member.loader = member.keeping = None
        member.timeline = Timeline()
        named: Any = member
        named.plan = SimpleNamespace(overlap=False)
        named.traffic = SimpleNamespace(
            clock=10,
            pull=lambda clock: self.said.append(f"pull {clock}"),
            look_at_link=lambda: self.said.append("look"),
        )
        named.io = SimpleNamespace(call=asyncio.run, post=lambda *call: None)
        named.client = SimpleNamespace(take=self.take, advance=self.advance, enter=self.enter, note_wait=None)

    def take(self, epoch: int, clock: int, most: int, done: list[int], *, hold: bool) -> Any:
        return self.answer(f"take at {clock}" + (", waiting" if hold else ""), self.replies.pop(0))

    def advance(self, clock: int) -> Any:
        return self.answer(f"rest until {clock}", None)

    def enter(self, at_least: int) -> Any:
        return self.answer(f"enter from {at_least}", 12)

    def answer(self, said: str, answer: Any) -> Coroutine[Any, Any, Any]:
        async def reply() -> Any:
            self.said.append(said)
            return answer

        return reply()


@pytest.mark.parametrize(
    ("replies", "said"),
    [
        ([OVER], ["take at 10", "rest until 40", "pull 40", "look"]),
        ([LATER, OVER], ["take at 10", "rest until 40", "take at 40, waiting", "pull 40", "look"]),
        (
            [LATER, LATER, OVER],
            ["take at 10", "rest until 40", "take at 40, waiting", "take at 40, waiting", "pull 40", "look"],
        ),
    ],
    ids=["over", "others have some to go", "for long"],
)
def test_a_worker_waits_for_batches_only_once_nobody_waits_for_it(
    replies: list[Message], said: list[str]
) -> None:
    talk = Conversation(*replies)
    assert talk.member.take(16, [], wait=True) is None
    assert talk.said == said


def test_behind_the_last_epoch_nobody_looks_at_the_link_any_more() -> None:
    talk = Conversation(OVER)
    talk.member.epochs_wanted = 1
    assert talk.member.take(16, [], wait=True) is None
    assert talk.said == ["take at 10", "rest until 40", "pull 40"]


def test_where_workers_have_come_or_gone_it_rests_longer_before_it_waits() -> None:
    talk = Conversation(LONGER, LONGER, Taken("job", 0, [3]))
    assert talk.member.take(16, [], wait=True) == [3]
    rests = ["take at 10", "rest until 40", "take at 40", "rest until 80"]
    assert talk.said == [*rests, "take at 80, waiting", "enter from 10", "pull 12"]


def test_a_worker_that_learns_while_it_waits_that_others_have_come_rests_longer_at_once() -> None:
    talk = Conversation(LATER, LONGER, Taken("job", 0, [3]))
    assert talk.member.take(16, [], wait=True) == [3]
    rests = ["take at 10", "rest until 40", "take at 40, waiting", "rest until 80"]
    assert talk.said == [*rests, "take at 80, waiting", "enter from 10", "pull 12"]


def test_who_only_looks_ahead_is_answered_at_once_and_does_not_rest() -> None:
    talk = Conversation(LATER)
    assert talk.member.take(16, [], wait=False) == []
    assert talk.said == ["take at 10"]
