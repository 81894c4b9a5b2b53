"""State as plain data and back; and a machine that is told its former self's story is that machine."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.scheduler.play import JOB, running
from tests.scheduler.test_machine import World
from zml.scheduler.actions import Action
from zml.scheduler.epoch import Pass
from zml.scheduler.events import Event, Exited, Finding, Joined, Lost
from zml.scheduler.ids import Seat, WorkerId
from zml.scheduler.looking import changed
from zml.scheduler.machine import Machine
from zml.scheduler.plain import NotPlain, build, build_fields, plain, plain_fields
from zml.scheduler.state import Kept


def packed(value: Any) -> bytes:
    return msgspec.msgpack.encode(plain(value))


def there_and_back(kind: Any, value: Any) -> Any:
    again = build(kind, msgspec.msgpack.decode(packed(value)), "here")
    assert packed(again) == packed(value)
    return again


def test_every_kind_of_field_comes_back_as_it_was() -> None:
    @dataclass
    class Everything:
        deque_of: dict[WorkerId, deque[int]]
        set_of: set[int]
        bytes_of: bytearray
        seats: tuple[Seat, ...]
        maybe: float | None
        derived: int = field(init=False, default=7)

    Everything.__annotations__["deque_of"] = dict[WorkerId, deque[int]]
    seats = (Seat(WorkerId("w0"), 1, True),)
    for maybe in (None, 0.5):
        value = Everything({WorkerId("w1"): deque([3, 1])}, {5, 2}, bytearray(b"\0\1"), seats, maybe)
        again = there_and_back(Everything, value)
        assert again == value
        assert (type(again.deque_of["w1"]), type(again.bytes_of)) == (deque, bytearray)


def test_an_epoch_of_the_ledger_comes_back_with_its_seniority() -> None:
    names = [field.name for field in Pass.__dataclass_fields__.values()]
    assert "shares" in names
    current = Pass(0, 3, 0, b"token", WorkerId("w9"), 0, 0, bytearray(3), 3)
    current.undealt = [0, 1, 2]
    current.deal([WorkerId("w9"), WorkerId("w1")])
    again = there_and_back(Pass, current)
    assert again == current and [*again.shares] == ["w9", "w1"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"job": "j", "worker": "w0"}, "record 7: Exited needs 'incarnation'"),
        ({"job": "j", "odd": 1}, "record 7: Exited has no 'odd'"),
        ({"is": "Exited", "job": "j"}, "record 7: Exited has no 'is'"),
        ([], "record 7: '[]' where Exited is meant"),
        (
            {
                "job": "j",
                "worker": 3,
                "incarnation": 1,
                "code": 0,
                "signal": 0,
                "because": "",
                "returns": False,
                "is_loss": False,
            },
            "record 7.worker: '3' where str is meant",
        ),
        (
            {
                "job": "j",
                "worker": "w0",
                "incarnation": True,
                "code": 0,
                "signal": 0,
                "because": "",
                "returns": False,
                "is_loss": False,
            },
            "record 7.incarnation: 'True' where int is meant",
        ),
    ],
)
def test_what_is_not_of_the_type_is_named_with_its_place(data: Any, said: str) -> None:
    with pytest.raises(NotPlain) as caught:
        build_fields(Exited, data, "record 7")
    assert str(caught.value) == said


def test_what_was_written_before_there_was_a_field_has_its_default() -> None:
    @dataclass
    class Later:
        first: int
        second: list[int] = field(default_factory=list)
        third: int = 3

    assert build(Later, {"is": "Later", "first": 1}, "here") == Later(1, [], 3)
    assert build_fields(Later, {"first": 1, "third": 4}, "here") == Later(1, [], 4)
    with pytest.raises(NotPlain, match="Later needs 'first'"):
        build_fields(Later, {"third": 4}, "here")


@pytest.mark.parametrize("phase", [{"is": "Gone"}, {"is": ["Running"]}, "Running", None])
def test_a_class_that_a_field_does_not_allow_cannot_come_to_be(phase: Any) -> None:
    data = plain(running(1, 1).machine.keep())
    data["jobs"][JOB]["phase"] = phase
    with pytest.raises(NotPlain, match=r"here.jobs\['j'\].phase: .* where Forming or Running or .* is meant"):
        build(Kept, data, "here")


def test_a_watched_successor_waits_for_everybody_and_loses_who_stays_silent() -> None:
    play = running(2, 1)
    successor = Machine(play.machine.rules)
    successor.unwatched(build(Kept, plain(play.machine.keep()), "here"))
    successor.watch(play.now, grace_s=5.0)
    successor.check()
    assert successor.next_deadline() == play.now + 5.0
    assert successor.finding(play.now + 4.9) is None
    assert successor.finding(play.now + 5.0) == Lost(JOB, WorkerId("w0"), "silent for 5.0 s")


class Lives(World):
    """As `World`, and every event that changed something is told to a second machine, which may take over."""

    def tell(self, event: Event) -> list[Action]:
        machine = self.machine
        if not hasattr(self, "second"):
            self.second = Machine(machine.rules)
            self.second.unwatched()
        told: list[tuple[Event | Finding, float]] = []
        ask = machine.tell

        def tell(event: Event | Finding, now: float) -> list[Action]:
            actions = ask(event, now)
            if changed(event, actions):
                told.append((event, now))
            return actions

        machine.tell = tell  # type: ignore[method-assign]
        try:
            actions = super().tell(event)
        finally:
            del machine.tell
        for one, now in told:
            name = type(one)
            again = build_fields(name, msgspec.msgpack.decode(packed(plain_fields(one))), "record")
            self.second.tell(again, now)
            self.second.check()
        assert packed(self.second.keep()) == packed(machine.keep())
        return actions

    @rule(fresh=st.booleans(), peer=st.integers(0, 3))
    def dies(self, fresh: bool, peer: int) -> None:
        """The second one takes over, as it is or from a snapshot, after a join that may have been refused."""
        self.tell(Joined(self.jobs[1], "shard", "p0", f"process {peer} of 1"))
        kept = self.second.keep()
        if fresh:
            kept = build(Kept, msgspec.msgpack.decode(packed(kept)), "snapshot")
        self.machine = Machine(self.second.rules)
        self.machine.unwatched(kept)
        self.machine.watch(self.now, grace_s=3.0)
        self.second = Machine(self.machine.rules)
        self.second.unwatched(build(Kept, plain(kept), "snapshot"))


Lives.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLives = Lives.TestCase
