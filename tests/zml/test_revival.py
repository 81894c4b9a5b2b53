"""What is started again: what died, not what ended; a few times, ever later."""

import pytest

from zml.config import Settings
from zml.launch.revival import Again, Revivals


def test_a_killed_process_comes_again_at_once_then_ever_later_and_then_not_at_all() -> None:
    revivals = Revivals(Settings(coordinator_restarts=7))
    waits = [revivals.decide("coordinator", -9, [], 1.0) for _ in range(8)]
    assert [again and again.after_s for again in waits] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, None]


def test_a_minute_of_health_begins_the_count_anew_and_each_process_has_its_own() -> None:
    revivals = Revivals(Settings(worker_restarts=1))
    assert revivals.decide("w0", -9, [], 1.0) == Again(0.0, 1, 1)
    assert revivals.decide("w0", -9, [], 59.0) is None
    assert revivals.decide("w0", -9, [], 60.0) == Again(0.0, 1, 1)
    assert revivals.decide("w1", -9, [], 1.0) == Again(0.0, 1, 1)


@pytest.mark.parametrize(
    ("member", "code", "last", "comes_again"),
    [
        ("coordinator", -9, [], True),
        ("coordinator", 1, ["ZeroDivisionError"], True),
        ("coordinator", 4, ["error: the address is in use [ZML-E201]"], True),
        ("coordinator", 3, ["error: odd settings"], False),
        ("coordinator", 5, ["error: the journal is damaged [ZML-E411]"], False),
        ("p0", -11, [], True),
        ("p0", 4, ["error: the coordinator has been silent for 600 s [ZML-E205]"], False),
        ("w0", -9, [], True),
        ("w0", -15, [], False),
        ("w0", 0, [], False),
        ("w0", 1, ["ValueError: odd data"], False),
        ("w0", 1, ["error: w0#1 was fenced: silent for 1.5 s [ZML-E204]", "  more"], True),
        ("w0", 137, [], False),  # its script was killed, and that is the agent's to judge
    ],
)
def test_what_died_comes_again_and_what_ended_does_not(
    member: str, code: int, last: list[str], comes_again: bool
) -> None:
    assert (Revivals(Settings()).decide(member, code, last, 5.0) is not None) == comes_again
