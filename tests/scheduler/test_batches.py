"""The ledger: every batch once, whoever comes and goes."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from zml.scheduler.batches import (
    MOST_BATCHES,
    Condemned,
    Drained,
    Ledger,
    Mismatch,
    Opened,
    Over,
    Suspected,
    Taken,
    Waiting,
)
from zml.scheduler.ids import Seat, WorkerId

W0, W1, W2, W3 = (WorkerId(f"w{n}") for n in range(4))


def founders(*workers: WorkerId) -> list[Seat]:
    return [Seat(worker, 1, True) for worker in workers]


def opened(batches: int, *workers: WorkerId) -> Ledger:
    """A ledger whose epoch 0 all of these founders have opened."""
    ledger = Ledger()
    ledger.members(founders(*workers))
    for worker in workers:
        assert ledger.open(worker, 0, batches, b"order of w0") == Opened(0, b"order of w0")
    return ledger


def taken(ledger: Ledger, worker: WorkerId, most: int = 100) -> list[int]:
    answer = ledger.take(worker, ledger.epoch, most)
    assert isinstance(answer, Taken), answer
    return list(answer.batches)


# -- opening ---------------------------------------------------------------------------------------------


def test_the_order_of_the_senior_worker_counts_and_the_others_wait_for_it() -> None:
    ledger = Ledger()
    ledger.members(founders(W0, W1))
    because = "w0 has not opened epoch 1 yet, and its order counts"
    assert ledger.open(W1, 0, 10, b"order of w1") == Waiting((W0,), because)
    assert ledger.open(W0, 0, 10, b"order of w0") == Opened(0, b"order of w0")
    assert ledger.open(W1, 0, 10, b"order of w1") == Opened(0, b"order of w0")


def test_opening_twice_is_opening_once() -> None:
    ledger = opened(4, W0, W1)
    first = taken(ledger, W0, 1)
    assert ledger.open(W0, 0, 4, b"another order") == Opened(0, b"order of w0")
    assert first + taken(ledger, W0) == [0, 2]


def test_if_the_senior_is_lost_before_it_opens_the_next_one_does() -> None:
    ledger = Ledger()
    ledger.members(founders(W0, W1))
    ledger.members(founders(W1))
    assert ledger.open(W1, 0, 3, b"order of w1") == Opened(0, b"order of w1")
    assert taken(ledger, W1) == [0, 1, 2]


def test_workers_that_see_different_epochs_are_told_so_and_nothing_changes() -> None:
    ledger = opened(10, W0)
    ledger.members([*founders(W0), Seat(W1, 1, False)])
    assert ledger.open(W1, 0, 11, b"") == Mismatch("w1 sees 11 batches in epoch 1, and w0 10")
    assert taken(ledger, W0) == list(range(10)), "w1 was dealt nothing"


@pytest.mark.parametrize("batches", [-1, MOST_BATCHES + 1, 10**18])
def test_a_number_of_batches_that_nobody_can_keep_account_of_allocates_nothing(batches: int) -> None:
    ledger = Ledger()
    ledger.members(founders(W0))
    answer = ledger.open(W0, 0, batches, b"")
    assert isinstance(answer, Mismatch) and f"{batches:,}" in answer.because
    assert ledger.current is None


def test_the_next_epoch_waits_until_every_batch_of_this_one_is_committed() -> None:
    ledger = opened(4, W0, W1)
    ledger.commit(W0, 0, taken(ledger, W0))
    assert ledger.open(W0, 1, 4, b"1") == Waiting(
        (W1,), "epoch 1 has 2 of 4 batches to go: w1 has 2 from 1 on"
    )
    ledger.commit(W1, 0, taken(ledger, W1))
    assert ledger.open(W0, 1, 4, b"1") == Opened(4, b"1")
    assert ledger.epoch == 1


def test_no_epoch_can_be_left_out() -> None:
    ledger = opened(4, W0)
    assert ledger.open(W0, 2, 4, b"") == Mismatch("w0 opens epoch 3, and the job is in epoch 1")


def test_a_job_that_is_resumed_begins_with_a_later_epoch() -> None:
    ledger = Ledger()
    ledger.members(founders(W0, W1))
    assert isinstance(ledger.open(W1, 7, 2, b""), Waiting)
    assert ledger.open(W0, 7, 2, b"0") == Opened(0, b"0")
    assert ledger.epoch == 7


def test_who_opens_an_epoch_that_is_over_is_sent_on() -> None:
    ledger = opened(2, W0)
    ledger.commit(W0, 0, taken(ledger, W0))
    ledger.open(W0, 1, 2, b"1")
    ledger.members([*founders(W0), Seat(W1, 1, False)])
    assert ledger.open(W1, 0, 2, b"own") == Opened(2, b"own")
    assert ledger.take(W1, 0, 5) == Over(2)


def test_an_epoch_without_batches_is_over_at_once() -> None:
    ledger = opened(0, W0)
    assert ledger.take(W0, 0, 1) == Over(0)
    assert ledger.open(W0, 1, 0, b"") == Opened(0, b"")


# -- dealing ---------------------------------------------------------------------------------------------


def test_batches_are_dealt_like_cards_in_order_of_seniority() -> None:
    ledger = opened(7, W1, W0)
    assert taken(ledger, W1) == [0, 2, 4, 6]
    assert taken(ledger, W0) == [1, 3, 5]


def test_who_has_nothing_left_waits_for_the_others_by_name() -> None:
    ledger = opened(4, W0, W1, W2)
    ledger.commit(W2, 0, taken(ledger, W2))
    assert ledger.take(W2, 0, 1) == Waiting(
        (W0, W1), "epoch 1 has 3 of 4 batches to go: w0 has 2 from 0 on, w1 has 1"
    )


def test_a_lost_workers_batches_go_out_first_and_the_rest_is_dealt_anew() -> None:
    ledger = opened(12, W0, W1, W2)
    assert taken(ledger, W0, 3) == [0, 3, 6]
    ledger.commit(W0, 0, [0])
    assert taken(ledger, W2, 1) == [2]
    ledger.members([Seat(W1, 1, True), Seat(W2, 1, True)])
    # 3 and 6 were out and come back; 1, 4, 5, 7, 8, 9, 10, 11 were not
    assert taken(ledger, W1) == [3, 1, 5, 8, 10]
    assert taken(ledger, W2) == [6, 4, 7, 9, 11]


def test_a_latecomer_gets_a_share_when_it_opens_the_epoch_and_not_before() -> None:
    ledger = opened(6, W0)
    assert taken(ledger, W0, 2) == [0, 1]
    ledger.members([*founders(W0), Seat(W1, 1, False)])
    assert ledger.take(W1, 0, 1) == Mismatch("w1 has not opened epoch 1")
    assert taken(ledger, W0, 1) == [2], "nobody waits for a script that still imports its libraries"
    ledger.open(W1, 0, 6, b"")
    assert taken(ledger, W0) == [3, 5] and taken(ledger, W1) == [4]


def test_a_latecomer_that_is_not_there_yet_has_no_share_of_the_next_epoch() -> None:
    ledger = opened(2, W0)
    ledger.members([*founders(W0), Seat(W1, 1, False)])
    ledger.commit(W0, 0, taken(ledger, W0))
    ledger.open(W0, 1, 2, b"1")
    assert taken(ledger, W0) == [0, 1]


def test_who_skips_into_the_next_epoch_gets_no_share_that_it_would_never_take() -> None:
    ledger = opened(4, W0)
    ledger.members([*founders(W0), Seat(W1, 1, False)])
    assert isinstance(ledger.open(W1, 1, 4, b""), Waiting)
    assert taken(ledger, W0) == [0, 1, 2, 3]


def test_a_new_incarnation_does_not_hold_what_its_former_self_held() -> None:
    ledger = opened(4, W0, W1)
    assert taken(ledger, W1) == [1, 3]
    ledger.members([Seat(W0, 1, True), Seat(W1, 2, False)])
    assert ledger.commit(W1, 0, [1]) == Mismatch("w1 commits batch 1 of epoch 1, which nobody holds")
    ledger.open(W1, 0, 4, b"")
    assert taken(ledger, W0) == [1, 0] and taken(ledger, W1) == [3, 2]


def test_being_told_of_the_members_twice_changes_nothing() -> None:
    ledger = opened(6, W0, W1)
    before = ledger.current
    assert before is not None and not before.dealt_again
    ledger.members(founders(W0, W1))
    assert not before.dealt_again
    assert taken(ledger, W0) == [0, 2, 4]


def test_who_begins_an_epoch_where_the_others_rest_already_lets_them_rest_longer() -> None:
    """It stood still at the end of the epoch before, which it had rested through further than it needed to."""
    ledger = opened(2, W0, W1)
    assert ledger.take(W0, 0, 2, clock=0) == Taken((0,))
    assert not ledger.dealt_again, "who has done its batch at clock 0 rests until clock 2"
    assert ledger.take(W1, 0, 2, clock=2) == Taken((1,))
    assert ledger.dealt_again, "clock 2 is waited for"
    ledger.reached(0, 1)
    assert ledger.commit(W0, 0, [0]) is None and ledger.commit(W1, 0, [1]) is None
    assert ledger.take(W0, 0, 1) == Over(3)


def test_when_all_are_gone_the_batches_wait_for_whoever_comes() -> None:
    ledger = opened(4, W0)
    taken(ledger, W0, 2)
    ledger.members([])
    ledger.check()
    ledger.members([Seat(W1, 1, False)])
    assert ledger.open(W1, 0, 4, b"") == Opened(0, b"order of w0")
    assert taken(ledger, W1) == [0, 1, 2, 3]


# -- taking and committing -------------------------------------------------------------------------------


def test_samples_are_those_of_batches_that_counted_and_each_counts_once() -> None:
    ledger = Ledger()
    ledger.members(founders(W0, W1))
    for epoch in (0, 1):
        for worker in (W0, W1):
            assert isinstance(ledger.open(worker, epoch, 5, b"", 18, 4), Opened)
        taken(ledger, W0)
        mine = taken(ledger, W1)
        ledger.settle(W1, epoch, 1)
        assert ledger.samples == 18 * epoch + 4
        for _ in range(2):
            ledger.commit(W1, epoch, mine)
            ledger.commit(W0, epoch, [0, 4])
        assert ledger.samples == 18 * epoch + 14, "the last batch is shorter"
        ledger.commit(W0, epoch, [2])
    assert ledger.samples == 36
    ledger.open(W0, 2, 3, b"")
    ledger.commit(W0, 2, taken(ledger, W0))
    assert ledger.samples == 36, "nobody has said how many"


def test_asking_again_after_a_lost_answer_leases_nothing_twice() -> None:
    ledger = opened(10, W0)
    assert ledger.take(W0, 0, 3, have=0) == Taken((0, 1, 2))
    assert ledger.take(W0, 0, 3, have=0) == Taken((0, 1, 2)), "the answer was lost"
    assert ledger.take(W0, 0, 3, have=2) == Taken((2,)), "two of three had arrived"
    assert ledger.take(W0, 0, 3, have=3) == Taken((3, 4, 5))
    assert ledger.take(W0, 0, 3, have=9) == Mismatch(
        "w0 asks for 3 batches after 9, and was given 6 in epoch 1"
    )


def test_a_batch_that_was_committed_is_still_part_of_what_was_given() -> None:
    ledger = opened(4, W0)
    ledger.take(W0, 0, 2, have=0)
    ledger.commit(W0, 0, [0])
    assert ledger.take(W0, 0, 2, have=0) == Taken((0, 1))


def test_committing_twice_is_committing_once() -> None:
    ledger = opened(3, W0)
    taken(ledger, W0)
    assert ledger.commit(W0, 0, [0, 1]) is None and ledger.commit(W0, 0, [1, 0]) is None
    assert (ledger.committed, ledger.batches) == (2, 3)
    assert ledger.commit(W0, 0, [2, 2]) is None
    assert ledger.take(W0, 0, 1) == Over(3)


@pytest.mark.parametrize(
    ("epoch", "batches", "because"),
    [
        (0, [1], "w0 commits batch 1 of epoch 1, which w1 holds"),
        (0, [0, 2], "w0 commits batch 2 of epoch 1, which nobody holds"),
        (0, [0, 4], "w0 commits batch 4; epoch 1 has 4"),
        (0, [-1], "w0 commits batch -1; epoch 1 has 4"),
        (1, [0], "w0 commits batches of epoch 2, which is not open"),
    ],
)
def test_what_a_worker_does_not_hold_it_cannot_commit_and_nothing_changes(
    epoch: int, batches: list[int], because: str
) -> None:
    ledger = opened(4, W0, W1)
    taken(ledger, W0, 1)
    taken(ledger, W1, 1)
    assert ledger.commit(W0, epoch, batches) == Mismatch(because)
    assert ledger.committed == 0


def test_a_commit_of_an_epoch_that_is_over_says_nothing_new() -> None:
    ledger = opened(2, W0)
    batches = taken(ledger, W0)
    ledger.commit(W0, 0, batches)
    ledger.open(W0, 1, 2, b"1")
    assert ledger.commit(W0, 0, batches) is None
    assert ledger.committed == 0


def test_the_next_clock_is_beyond_every_clock_that_a_batch_can_have_used() -> None:
    ledger = opened(4, W0, W1)
    taken(ledger, W1)
    ledger.members(founders(W0))
    again = taken(ledger, W0)
    assert again == [1, 3, 0, 2]
    ledger.commit(W0, 0, again)
    assert ledger.take(W0, 0, 1) == Over(4 + 4), "4 batches, and 4 leases after they were dealt again"


def test_the_next_clock_is_beyond_the_clocks_that_workers_have_told() -> None:
    ledger = opened(2, W0)
    batches = taken(ledger, W0)
    ledger.reached(0, 9)
    ledger.reached(0, 7)
    ledger.commit(W0, 0, batches)
    ledger.reached(0, 20)
    assert ledger.take(W0, 0, 1) == Over(9), "the answer does not change once the epoch is over"


# -- what a lost worker cannot say any more ---------------------------------------------------------------


def test_what_the_shards_know_of_a_lost_worker_is_committed_and_the_rest_goes_out_again() -> None:
    ledger = opened(6, W0, W1)
    assert taken(ledger, W0) == [0, 2, 4]
    ledger.commit(W0, 0, [0])
    for _ in range(2):  # twice is the same as once
        assert ledger.settle(W0, 0, 2) is None
    assert ledger.committed == 2
    ledger.members(founders(W1))
    assert taken(ledger, W1) == [4, 1, 3, 5]
    ledger.check()


def test_what_was_skipped_stays_skipped_when_a_worker_is_settled() -> None:
    ledger = opened(4, W0)
    taken(ledger, W0)
    assert ledger.skip(W0, 0, 1) is None
    assert ledger.settle(W0, 0, 3) is None
    assert (ledger.committed, ledger.skipped) == (2, 1)
    ledger.check()


@pytest.mark.parametrize(
    ("epoch", "done", "because"),
    [
        (0, 4, "w0 was given 3 batches of epoch 1, and 4 are to be applied"),
        (0, -1, "w0 is settled for -1 batches of epoch 1, and the job is in epoch 1"),
        (1, 1, "w0 is settled for 1 batches of epoch 2, and the job is in epoch 1"),
    ],
)
def test_a_worker_is_not_settled_for_what_it_never_had(epoch: int, done: int, because: str) -> None:
    ledger = opened(6, W0, W1)
    taken(ledger, W0)
    assert ledger.settle(W0, epoch, done) == Mismatch(because)
    assert ledger.committed == 0


def test_a_worker_that_is_settled_for_an_epoch_that_is_over_says_nothing_new() -> None:
    ledger = opened(1, W0)
    ledger.commit(W0, 0, taken(ledger, W0))
    ledger.open(W0, 1, 1, b"")
    assert ledger.settle(W0, 0, 1) is None and ledger.committed == 0


def test_workers_that_see_different_samples_in_the_same_number_of_batches_are_told_so() -> None:
    ledger = Ledger()
    ledger.members(founders(W0, W1))
    ledger.open(W0, 0, 4, b"", 31, 8)
    assert ledger.open(W1, 0, 4, b"", 32, 8) == Mismatch("w1 sees 32 samples in epoch 1, and w0 31")


# -- batches that do harm -----------------------------------------------------------------------------------


def test_after_a_crash_what_was_in_hand_goes_out_one_at_a_time_and_is_cleared_when_it_is_committed() -> None:
    ledger = opened(8, W0, W1)
    assert taken(ledger, W0, 3) == [0, 2, 4]
    ledger.commit(W0, 0, [0])
    assert ledger.blame(W0, 2) == Suspected(0, (2, 4))
    ledger.members(founders(W1))
    assert taken(ledger, W1) == [2] and ledger.suspects([2, 4, 1]) == [2, 4]
    because = "epoch 1 has 7 of 8 batches to go: w1 has 7 from 2 on"
    assert ledger.take(W1, 0, 5) == Waiting((W1,), because), "a suspect stays alone in hand"
    ledger.commit(W1, 0, [2])
    assert taken(ledger, W1) == [4]
    ledger.commit(W1, 0, [4])
    assert ledger.suspects(range(8)) == []
    assert taken(ledger, W1) == [1, 3, 5, 6, 7]


def test_a_suspect_waits_until_everything_else_is_committed() -> None:
    ledger = opened(6, W0, W1)
    assert taken(ledger, W0, 1) == [0] and taken(ledger, W1, 1) == [1]
    ledger.blame(W0, 2)
    ledger.members(founders(W1))
    assert isinstance(ledger.take(W1, 0, 5), Waiting)
    ledger.commit(W1, 0, [1])
    assert taken(ledger, W1) == [0]


def test_the_batch_that_crashes_twice_is_condemned_and_no_other() -> None:
    ledger = opened(6, W0, W1, W2)
    assert taken(ledger, W0) == [0, 3]
    assert ledger.blame(W0, 2) == Suspected(0, (0, 3))
    ledger.members(founders(W1, W2))
    assert taken(ledger, W1) == [0] and taken(ledger, W2) == [3]
    ledger.commit(W1, 0, [0])
    assert ledger.blame(W2, 2) == Condemned(0, 3, 2)
    assert ledger.skip(W2, 0, 3) is None and ledger.skip(W2, 0, 3) is None
    ledger.members(founders(W1))
    ledger.commit(W1, 0, taken(ledger, W1))
    assert isinstance(ledger.take(W1, 0, 1), Over)
    assert (ledger.committed, ledger.skipped) == (5, 1)
    ledger.check()


def test_nobody_is_condemned_together_with_others_however_many_crashes() -> None:
    ledger = opened(4, W0)
    taken(ledger, W0)
    for _ in range(9):
        assert ledger.blame(W0, 2) == Suspected(0, (0, 1, 2, 3))


def test_what_a_crashed_script_had_taken_and_not_begun_is_innocent() -> None:
    ledger = opened(8, W0, W1)
    assert taken(ledger, W0) == [0, 2, 4, 6]
    ledger.commit(W0, 0, [0])
    assert ledger.blame(W0, 2, begun=1) is None, "it had begun one, which is applied"
    assert ledger.blame(W0, 2, begun=2) == Suspected(0, (2,))
    ledger.members(founders(W1))
    assert ledger.suspects(range(8)) == [2]
    assert taken(ledger, W1) == [2]
    ledger.commit(W1, 0, [2])
    assert taken(ledger, W1) == [4, 6, 1, 3, 5, 7], "what came back goes out first, and no more alone"
    ledger.check()


def test_a_batch_that_crashes_two_scripts_is_condemned_though_the_second_had_taken_others_too() -> None:
    ledger = opened(4, W0, W1)
    assert taken(ledger, W0) == [0, 2] and taken(ledger, W1) == [1, 3]
    assert ledger.blame(W0, 2, begun=1) == Suspected(0, (0,))
    assert ledger.blame(W0, 2, begun=1) == Condemned(0, 0, 2)
    assert ledger.blame(W1, 2, begun=1) == Suspected(0, (1,))


def test_a_crash_without_a_batch_in_hand_accuses_nobody() -> None:
    ledger = opened(2, W0, W1)
    assert ledger.blame(W0, 2) is None
    ledger.commit(W0, 0, taken(ledger, W0))
    assert ledger.blame(W0, 2) is None
    ledger = Ledger()
    ledger.members(founders(W0))
    assert ledger.blame(W0, 2) is None


@pytest.mark.parametrize(
    ("worker", "epoch", "batch", "because"),
    [
        (W0, 0, 1, "w0 skips batch 1 of epoch 1, which w1 holds"),
        (W0, 0, 2, "w0 skips batch 2 of epoch 1, which nobody holds"),
        (W0, 0, 3, "w0 skips batch 3 of epoch 1, which is applied"),
        (W0, 0, 4, "w0 skips batch 4 of epoch 1, and there is none"),
        (W0, 1, 0, "w0 skips batch 0 of epoch 2, and there is none"),
    ],
)
def test_nobody_skips_what_it_does_not_hold(worker: WorkerId, epoch: int, batch: int, because: str) -> None:
    ledger = opened(4, W0, W1)
    taken(ledger, W0, 1)
    taken(ledger, W1)
    ledger.commit(W1, 0, [3])
    assert ledger.skip(worker, epoch, batch) == Mismatch(because)
    assert ledger.skipped == 0


def test_a_skipped_batch_cannot_be_committed() -> None:
    ledger = opened(2, W0)
    taken(ledger, W0)
    ledger.skip(W0, 0, 0)
    assert ledger.commit(W0, 0, [0, 1]) == Mismatch("w0 commits batch 0 of epoch 1, which was skipped")
    assert ledger.committed == 0


# -- draining --------------------------------------------------------------------------------------------


def test_a_drained_ledger_gives_out_nothing_and_still_takes_commits() -> None:
    ledger = opened(4, W0)
    batches = taken(ledger, W0, 2)
    ledger.drain("Ctrl-C")
    assert ledger.take(W0, 0, 1) == Drained("Ctrl-C")
    assert ledger.open(W0, 1, 4, b"") == Drained("Ctrl-C")
    assert ledger.commit(W0, 0, batches) is None and ledger.committed == 2


def test_an_epoch_that_is_over_is_over_even_when_drained() -> None:
    ledger = opened(1, W0)
    ledger.commit(W0, 0, taken(ledger, W0))
    ledger.drain("Ctrl-C")
    assert ledger.take(W0, 0, 1) == Over(1)


# -- whatever happens ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 7)), max_size=40),
)
def test_when_nobody_is_lost_every_batch_is_given_out_exactly_once(
    batches: int, workers: int, asked: list[tuple[int, int]]
) -> None:
    names = [WorkerId(f"w{n}") for n in range(workers)]
    ledger = opened(batches, *names)
    given: Counter[int] = Counter()
    for choice, most in [*asked, *((n, batches) for n in range(workers))]:
        answer = ledger.take(names[choice % workers], 0, most)
        if isinstance(answer, Taken):
            given.update(answer.batches)
            assert ledger.commit(names[choice % workers], 0, answer.batches) is None
    assert given == Counter(range(batches))
    assert ledger.take(names[0], 0, 1) == Over(batches)


class Epochs(RuleBasedStateMachine):
    """Workers that take, compute, lose answers, commit, die and come, over several epochs.

    Beside the ledger runs an account of its own: who holds which batch, what is committed. Every call is written down,
    and in the end repeated on a second ledger, which must answer the same.
    """

    @initialize(workers=st.integers(1, 4), batches=st.integers(0, 20))
    def begin(self, workers: int, batches: int) -> None:
        self.ledger, self.twin = Ledger(), Ledger()
        self.batches = batches
        self.seats = [Seat(WorkerId(f"w{n}"), 1, True) for n in range(workers)]
        self.born = workers
        self.held: dict[WorkerId, list[int]] = {}  # of each worker that has opened the epoch: given, in order
        self.done: dict[WorkerId, set[int]] = {}  # of these, what is committed
        self.committed: Counter[int] = Counter()
        self.epoch = 0
        self.clock = {"first": 0, "leases": 0}
        self.both_members()

    def both_members(self) -> None:
        self.ledger.members(self.seats)
        self.twin.members(self.seats)
        for worker in set(self.held) - {seat.worker for seat in self.seats}:
            del self.held[worker], self.done[worker]

    def one(self, choice: int) -> WorkerId | None:
        return self.seats[choice % len(self.seats)].worker if self.seats else None

    @rule(choice=st.integers(0, 9))
    def opens(self, choice: int) -> None:
        worker = self.one(choice)
        if worker is None:
            return
        over = self.ledger.current is not None and sum(self.committed.values()) == self.batches
        epoch = self.epoch + over
        token = f"{worker} {epoch}".encode()
        answer = self.ledger.open(worker, epoch, self.batches, token)
        assert self.twin.open(worker, epoch, self.batches, token) == answer
        match answer:
            case Opened(first_clock, kept):
                if self.ledger.epoch > self.epoch:
                    assert first_clock >= self.clock["first"] + self.clock["leases"]
                    self.clock = {"first": first_clock, "leases": 0}
                    self.epoch, self.committed = self.ledger.epoch, Counter()
                    self.held, self.done = {}, {}
                assert kept.endswith(f" {self.epoch}".encode())
                self.held.setdefault(worker, [])
                self.done.setdefault(worker, set())
            case Waiting(waiting_for, _):
                assert waiting_for, "it waits for nobody"
            case _:
                raise AssertionError(answer)

    @rule(choice=st.integers(0, 9), most=st.integers(1, 6), arrives=st.booleans())
    def takes(self, choice: int, most: int, arrives: bool) -> None:
        worker = self.one(choice)
        if worker is None or worker not in self.held:
            return
        have = len(self.held[worker])
        answer = self.ledger.take(worker, self.epoch, most, have)
        assert self.twin.take(worker, self.epoch, most, have) == answer
        match answer:
            case Taken(batches):
                assert 1 <= len(batches) <= most
                if arrives:
                    self.held[worker] += batches
                    self.clock["leases"] += len(batches)
            case Over(next_clock):
                assert sum(self.committed.values()) == self.batches
                assert next_clock >= self.clock["first"] + self.clock["leases"]
            case Waiting(waiting_for, _):
                assert waiting_for and set(waiting_for) <= {seat.worker for seat in self.seats}
                assert sum(self.committed.values()) < self.batches
            case _:
                raise AssertionError(answer)

    @rule(choice=st.integers(0, 9), share=st.floats(0, 1), twice=st.booleans())
    def commits(self, choice: int, share: float, twice: bool) -> None:
        worker = self.one(choice)
        if worker is None or worker not in self.held:
            return
        open_batches = [batch for batch in self.held[worker] if batch not in self.done[worker]]
        now = open_batches[: round(share * len(open_batches))]
        for _ in range(1 + twice):
            assert self.ledger.commit(worker, self.epoch, now) is None
            assert self.twin.commit(worker, self.epoch, now) is None
        self.done[worker].update(now)
        self.committed.update(now)

    @rule(choice=st.integers(0, 9), again=st.booleans())
    def dies(self, choice: int, again: bool) -> None:
        if not self.seats:
            return
        seat = self.seats.pop(choice % len(self.seats))
        self.held.pop(seat.worker, None)
        self.done.pop(seat.worker, None)
        if again:
            self.seats.append(Seat(seat.worker, seat.incarnation + 1, False))
        self.both_members()

    @rule()
    def is_born(self) -> None:
        if len(self.seats) < 5:
            self.seats.append(Seat(WorkerId(f"w{self.born}"), 1, False))
            self.born += 1
            self.both_members()

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        self.ledger.check()
        assert set(self.committed.values()) <= {1}, "a batch was committed twice"
        assert self.ledger.committed == sum(self.committed.values())
        held = [
            batch for worker in self.held for batch in self.held[worker] if batch not in self.done[worker]
        ]
        assert len(set(held)) == len(held), "two workers hold one batch"

    def teardown(self) -> None:
        """Whatever has happened: the workers that are left bring the epoch to its end."""
        if not getattr(self, "seats", None) or self.ledger.current is None:
            return
        for seat in self.seats:
            self.ledger.open(seat.worker, self.epoch, self.batches, b"")
        for seat in self.seats:
            have = 0
            while isinstance(answer := self.ledger.take(seat.worker, self.epoch, 3, have), Taken):
                have += len(answer.batches)
                assert self.ledger.commit(seat.worker, self.epoch, answer.batches) is None
        assert isinstance(self.ledger.take(self.seats[0].worker, self.epoch, 1), Over)
        assert self.ledger.committed == self.batches


Epochs.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestEpochs = Epochs.TestCase
