"""Evaluations: every batch once, sums exact to the bit, whoever comes and goes."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zml.scheduler.batches import Mismatch, Taken, Waiting
from zml.scheduler.evaluation import MOST_BATCHES, REMEMBERED, Evaluations, Key, Sum, Totals
from zml.scheduler.ids import Seat, WorkerId

W0, W1, W2 = (WorkerId(f"w{n}") for n in range(3))
KEY = Key(3, 1)


def among(*workers: WorkerId) -> Evaluations:
    evaluations = Evaluations()
    evaluations.members([Seat(worker, 1, True) for worker in workers])
    return evaluations


def given_to(
    evaluations: Evaluations, worker: WorkerId, batches: int, key: Key = KEY, holds: tuple[int, ...] = ()
) -> tuple[int, ...]:
    answer = evaluations.ask(worker, key, batches, holds)
    assert isinstance(answer, Taken), answer
    return answer.batches


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=30), st.randoms())
def test_a_sum_is_what_fsum_gives_in_whatever_order(values: list[float], dice: random.Random) -> None:
    expected = math.fsum(values) if sum(map(abs, values)) < 1e308 else None
    totals = set()
    for _ in range(3):
        dice.shuffle(values)
        total = Sum()
        for value in values:
            total.add(value)
        totals.add(total.total)
    assert len(totals) == 1 and (expected is None or totals == {expected})


def test_sums_beyond_the_largest_double_and_of_what_is_no_number_are_what_they_should_be() -> None:
    def total(*values: float) -> float:
        found = Sum()
        for value in values:
            found.add(value)
        return found.total

    assert total(1.7e308, 1.7e308, -1.7e308) == 1.7e308, "nothing overflows in between"
    assert total(1.7e308, 1.7e308) == math.inf and total(-1.7e308, -1.7e308) == -math.inf
    assert total(1.0, math.inf, 2.0) == math.inf
    assert math.isnan(total(math.inf, -math.inf)) and math.isnan(total(math.nan, 1.0))
    assert total(5e-324, 1.0, -1.0) == 5e-324 and total() == 0.0


def test_one_worker_gets_everything_in_order_and_then_the_totals() -> None:
    evaluations = among(W0)
    assert given_to(evaluations, W0, 5) == (0, 1)
    assert evaluations.report(W0, KEY, [(0, {"loss": 0.5, "n": 8}), (1, {"loss": 0.25, "n": 8})]) is None
    assert given_to(evaluations, W0, 5) == (2,)
    assert given_to(evaluations, W0, 5, holds=(2,)) == (3,), "asked ahead"
    assert given_to(evaluations, W0, 5, holds=(2, 3)) == (4,)
    because = "evaluation 1 after epoch 4 has 3 of 5 batches to go"
    assert evaluations.ask(W0, KEY, 5, (2, 3, 4)) == Waiting((W0,), because)
    assert evaluations.report(W0, KEY, [(n, {"loss": 1.0, "n": 7}) for n in (4, 2, 3)]) is None
    assert evaluations.ask(W0, KEY, 5) == Totals({"loss": 3.75, "n": 37.0})


def test_what_a_lost_worker_held_goes_out_again_and_its_results_that_came_in_stay() -> None:
    evaluations = among(W0, W1)
    assert given_to(evaluations, W0, 12) == (0, 1, 2)
    assert given_to(evaluations, W1, 12) == (3, 4)
    evaluations.report(W0, KEY, [(1, {"n": 1.0})])
    evaluations.members([Seat(W1, 1, True)])
    evaluations.check()
    assert given_to(evaluations, W1, 12, holds=(3, 4)) == (0, 2, 5, 6)
    evaluations.check()


def test_a_new_incarnation_holds_nothing_of_its_former_selfs() -> None:
    evaluations = among(W0, W1)
    given_to(evaluations, W0, 2)
    evaluations.members([Seat(W0, 2, False), Seat(W1, 1, True)])
    because = "w0 has a result of batch 0 of evaluation 1 after epoch 4, which nobody holds"
    assert evaluations.report(W0, KEY, [(0, {"n": 1.0})]) == Mismatch(because)


def test_what_was_in_a_lost_answer_is_given_again() -> None:
    evaluations = among(W0, W1)
    assert given_to(evaluations, W0, 12) == (0, 1, 2)
    evaluations.report(W0, KEY, [(1, {"n": 1.0})])
    assert given_to(evaluations, W0, 12, holds=(2,)) == (0,)
    assert given_to(evaluations, W0, 12, holds=(0, 2)) == (3, 4)
    evaluations.check()


def test_a_result_that_is_told_twice_counts_once_and_late_ones_are_passed_over() -> None:
    evaluations = among(W0)
    given_to(evaluations, W0, 1)
    for _ in range(2):
        assert evaluations.report(W0, KEY, [(0, {"n": 3.0})]) is None
    assert evaluations.ask(W0, KEY, 1) == Totals({"n": 3.0})


def test_a_report_with_something_wrong_in_it_changes_nothing() -> None:
    evaluations = among(W0)
    given_to(evaluations, W0, 4)
    good = (0, {"n": 1.0})
    for wrong in [(3, {"n": 1.0}), (4, {"n": 1.0}), (-1, {"n": 1.0}), (1, {"": 1.0}), (1, {"x" * 65: 1.0})]:
        assert isinstance(evaluations.report(W0, KEY, [good, wrong]), Mismatch)
    assert isinstance(evaluations.report(W0, KEY, [(0, {f"n{n}": 1.0 for n in range(33)})]), Mismatch)
    assert isinstance(evaluations.report(W0, Key(9, 1), [good]), Mismatch)
    assert evaluations.going[KEY].to_go == 4 and evaluations.going[KEY].sums.totals == {}


def test_workers_that_see_different_loaders_are_told_so() -> None:
    evaluations = among(W0, W1)
    given_to(evaluations, W0, 4)
    because = "w1 sees 5 batches in evaluation 1 after epoch 4, and w0 4"
    assert evaluations.ask(W1, KEY, 5) == Mismatch(because)
    for impossible in (-1, MOST_BATCHES + 1):
        assert isinstance(evaluations.ask(W0, Key(4, 1), impossible), Mismatch)


def test_who_goes_on_to_something_else_gives_back_what_it_held() -> None:
    evaluations = among(W0, W1)
    assert given_to(evaluations, W0, 2) == (0,)
    assert given_to(evaluations, W0, 2, Key(3, 2)) == (0,)
    assert given_to(evaluations, W1, 2) == (0,)
    assert evaluations.release(W1) and not evaluations.release(W1)


def test_totals_are_remembered_for_latecomers_and_not_for_ever() -> None:
    evaluations = among(W0)
    for number in range(REMEMBERED + 1):
        assert evaluations.ask(W0, Key(0, number), 0) == Totals({})
    assert len(evaluations.over) == REMEMBERED and Key(0, 0) not in evaluations.over


@pytest.mark.parametrize("seed", range(20))
def test_whoever_dies_every_batch_counts_once_and_the_totals_are_those_of_one_worker(seed: int) -> None:
    dice = random.Random(seed)
    batches = dice.randrange(1, 60)
    values = [dice.gauss(0, 10.0 ** dice.randrange(-8, 8)) for _ in range(batches)]
    incarnation = {W0: 1, W1: 1, W2: 1}
    evaluations = among(*incarnation)
    held: dict[WorkerId, list[int]] = {worker: [] for worker in incarnation}
    seen: list[dict[str, float]] = []
    while len(seen) < 3:
        worker = dice.choice(list(incarnation))
        if dice.random() < 0.15:
            incarnation[worker] += 1
            held[worker] = []
            evaluations.members([Seat(each, number, False) for each, number in incarnation.items()])
        count = dice.randrange(len(held[worker]) + 1)
        done, held[worker] = held[worker][:count], held[worker][count:]
        assert evaluations.report(worker, KEY, [(n, {"sum": values[n], "n": 1.0}) for n in done]) is None
        answer = evaluations.ask(worker, KEY, batches, held[worker])
        if isinstance(answer, Taken) and dice.random() < 0.9:  # else it is lost on the way
            held[worker] += answer.batches
        elif isinstance(answer, Totals):
            seen.append(answer.totals)
        evaluations.check()
    assert seen == 3 * [{"n": float(batches), "sum": math.fsum(values)}], f"seed {seed}"
