"""Leases: who is silent, who is only late, and when the observer is to blame."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zml.scheduler.ids import JobId, WorkerId
from zml.scheduler.leases import Ended, Key, Leases
from zml.scheduler.rules import Rules

RULES = Rules(lease_s=1.0, lease_most_s=5.0, jitter_factor=2.0, lag_s=0.25)


def key(number: int) -> Key:
    return JobId("j"), WorkerId(f"w{number}")


def granted(*numbers: int, at: float = 10.0) -> Leases:
    leases = Leases(RULES)
    leases.look(at)
    for number in numbers:
        leases.grant(key(number))
    return leases


def test_a_member_that_is_never_heard_is_lost_after_its_lease() -> None:
    leases = granted(0)
    assert leases.next_deadline() == 11.0
    leases.look(10.9)
    assert leases.ended() == []
    leases.look(11.0)
    assert leases.ended() == [Ended(key(0), 1.0)]
    assert list(leases) == [] and leases.next_deadline() is None


def test_a_renewal_begins_the_lease_anew() -> None:
    leases = granted(0, 1)
    leases.look(10.8)
    leases.renew(key(0))
    leases.look(11.0)
    assert leases.ended() == [Ended(key(1), 1.0)]
    assert leases.next_deadline() == pytest.approx(11.8)


def test_whoever_is_known_to_be_gone_is_not_found_lost() -> None:
    leases = granted(0, 1)
    leases.drop(key(0))
    leases.look(11.0)
    assert leases.ended() == [Ended(key(1), 1.0)]


def test_a_new_lease_of_the_same_member_does_not_end_with_the_old_one() -> None:
    leases = granted(0)
    leases.look(10.5)
    leases.drop(key(0))
    leases.grant(key(0))
    leases.look(11.0)
    assert leases.ended() == []
    assert leases.next_deadline() == 11.5


def test_leases_end_in_the_order_of_time() -> None:
    leases = granted(2)
    leases.look(10.1)
    leases.grant(key(1))
    leases.look(11.2)
    assert [ended.key for ended in leases.ended()] == [key(2), key(1)]


def test_a_member_may_come_and_go_within_one_moment() -> None:
    leases = granted(0)
    for _ in range(3):
        leases.drop(key(0))
        leases.grant(key(0))
    leases.look(11.0)
    assert leases.ended() == [Ended(key(0), 1.0)]


def beats(leases: Leases, number: int, times: list[float]) -> None:
    for at in times:
        leases.look(at)
        assert leases.ended() == []
        leases.renew(key(number))


def test_a_member_whose_renewals_are_regular_has_no_more_than_its_lease() -> None:
    leases = granted(0)
    beats(leases, 0, [10.0 + 0.2 * n for n in range(1, 21)])
    assert leases.next_deadline() == pytest.approx(15.0)


def test_a_member_that_was_late_gets_twice_its_lateness_on_top_and_loses_it_slowly() -> None:
    leases = granted(0)
    beats(leases, 0, [10.2, 10.4, 10.6, 11.4])  # the last one 0.6 s later than usual
    assert leases.next_deadline() == pytest.approx(11.4 + 1.0 + 2 * 0.6)
    beats(leases, 0, [11.4 + 0.2 * n for n in range(1, 101)])
    assert leases.next_deadline() == pytest.approx(31.4 + 1.0, abs=0.2)


def test_a_renewal_never_shortens_a_lease() -> None:
    leases = granted(0)
    beats(leases, 0, [10.2, 10.4, 11.2])
    end = leases.next_deadline()
    beats(leases, 0, [11.2])  # its lateness is forgotten a little, and no time has passed
    assert leases.next_deadline() == end


def test_no_jitter_makes_a_lease_longer_than_the_longest() -> None:
    leases = granted(0)
    beats(leases, 0, [10.2])
    for _ in range(6):  # each as late as its lease just allows
        at = (leases.next_deadline() or 0.0) - 0.01
        beats(leases, 0, [at])
    assert leases.next_deadline() == pytest.approx(at + 5.0)


def test_an_observer_that_was_held_up_fences_nobody_before_it_has_listened() -> None:
    leases = granted(0, 1)
    leases.look(10.6)
    leases.look(14.0)  # 3 s after the deadline it had given
    assert leases.ended() == []
    leases.renew(key(0))  # that was lying in the inbox
    assert leases.next_deadline() == pytest.approx(14.4), "what was left when it last looked: 0.4 s"
    leases.look(14.4)
    assert [ended.key for ended in leases.ended()] == [key(1)]


def test_an_observer_that_is_a_little_late_does_not_doubt_itself() -> None:
    leases = granted(0)
    leases.look(11.2)
    assert [ended.key for ended in leases.ended()] == [key(0)]


def test_a_lost_member_is_found_even_by_an_observer_that_is_always_late() -> None:
    leases = granted(0)
    leases.look(12.0)
    assert leases.ended() == []
    leases.look(14.0)
    assert [ended.key for ended in leases.ended()] == [key(0)]


def test_time_does_not_go_back() -> None:
    leases = granted(0, at=10.0)
    with pytest.raises(AssertionError, match=r"time went back from 10\.0 to 9\.0"):
        leases.look(9.0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0.0, 0.4)), max_size=60))
def test_the_deadline_is_the_earliest_end_and_every_end_comes(steps: list[tuple[int, float]]) -> None:
    """Against a plain model: regular time, no lag, the lease of a renewal as `Lease.renew` computes it."""
    leases = granted(at=0.0)
    now = 0.0
    for number, gap_s in steps:
        # Never later than the deadline, so that nobody doubts the observer.
        now = min([now + gap_s, *([d] if (d := leases.next_deadline()) is not None else [])])
        leases.look(now)
        due = {k for k in leases if leases._leases[k].ends <= now}
        assert {ended.key for ended in leases.ended()} == due
        if key(number) in leases:
            leases.renew(key(number))
        else:
            leases.grant(key(number))
        assert leases.next_deadline() == min(lease.ends for lease in leases._leases.values())
        assert (leases.next_deadline() or 0.0) > now


def test_a_member_that_speaks_seldomer_is_waited_for_longer_in_every_respect() -> None:
    leases = granted(0, 1)
    leases.renew(key(0), 4.0)
    leases.renew(key(1))
    leases.look(11.0)
    assert leases.ended() == [Ended(key(1), 1.0)]
    leases.look(11.9)
    assert not leases.is_silent(key(0)), "half of its lease is not over"
    leases.look(12.0)
    assert leases.is_silent(key(0))
    assert leases.next_deadline() == 14.0
    leases.renew(key(0))
    deadline = leases.next_deadline()
    assert deadline is not None and deadline >= 14.0, "no renewal makes a lease shorter"


@given(st.lists(st.tuples(st.floats(0.01, 2.0), st.floats(0.0, 2.0)), min_size=1, max_size=30))
def test_nobody_is_called_silent_for_a_time_of_which_not_all_was_read(
    turns: list[tuple[float, float]],
) -> None:
    """Whoever would be over at a moment up to which everything was read is over, and nobody else."""
    leases, now = granted(0, at=0.0), 0.0
    for after_s, unread_s in turns:
        now += after_s
        leases.look(now)
        deadline = leases.next_deadline()
        assert deadline is not None
        ended = leases.first_ended(unread_s)
        assert (ended is not None) == (deadline <= now - unread_s)
