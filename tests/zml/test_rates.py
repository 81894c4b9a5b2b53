"""The learning rate's factor as a function of whose steps are in which update, and of nothing else."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zml.rates import Course, Rule, why

Update = tuple[int, dict[str, int]]  # epoch, whose steps


def crew(*workers: int, again: int = 1) -> dict[str, int]:
    return {f"w{worker}": again for worker in workers}


def factors(rule: Rule, updates: list[Update], course: Course | None = None) -> list[float]:
    course, found = course or Course(), []
    for epoch, steps in updates:
        course = course.next(rule, epoch, steps)
        found.append(course.factor)
    return found


ALL, THREE, TWO = crew(0, 1, 2, 3), crew(0, 1, 2), crew(0, 1)


def test_the_number_that_was_asked_for_changes_nothing() -> None:
    rule = Rule("linear", 4, 10)
    assert factors(rule, [(0, ALL)] * 3) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("linear", 2.0), ("sqrt", math.sqrt(2))])
def test_twice_the_workers(scaling: str, factor: float) -> None:
    rule = msgspec.convert([scaling, 2, 0], Rule)
    assert factors(rule, [(0, TWO), (0, ALL)]) == [1.0, factor]


def test_growth_is_warmed_up_from_the_old_factor_to_the_new_one() -> None:
    rule = Rule("linear", 2, 4)
    assert factors(rule, [(0, TWO), *[(0, ALL)] * 6]) == [1.0, 1.25, 1.5, 1.75, 2.0, 2.0, 2.0]


def test_more_workers_than_were_asked_for_begin_with_a_warm_up_and_fewer_without() -> None:
    rule = Rule("linear", 2, 2)
    assert factors(rule, [(0, ALL)] * 3) == [1.5, 2.0, 2.0]
    assert factors(rule, [(0, crew(0))] * 2) == [0.5, 0.5]


def test_growth_in_the_midst_of_a_warm_up_begins_where_that_stood() -> None:
    rule = Rule("linear", 2, 4)
    updates = [(0, TWO), (0, THREE), (0, THREE), *[(0, ALL)] * 4]
    assert factors(rule, updates) == [1.0, 1.125, 1.25, 1.4375, 1.625, 1.8125, 2.0]


def test_a_fall_acts_at_once() -> None:
    rule = Rule("linear", 4, 10)
    assert factors(rule, [(0, ALL), (0, THREE), (0, TWO)]) == [1.0, 0.75, 0.5]


def test_who_had_no_batch_left_at_the_end_of_an_epoch_has_not_come_anew() -> None:
    rule = Rule("linear", 4, 10)
    updates = [(0, ALL), (0, TWO), (0, crew(3)), (1, ALL), (1, ALL)]
    assert factors(rule, updates) == [1.0, 0.5, 0.25, 1.0, 1.0]


def test_one_that_was_away_comes_back_with_a_warm_up() -> None:
    rule = Rule("linear", 4, 2)
    back = {**THREE, "w3": 2}
    assert factors(rule, [(0, ALL), (0, THREE), (0, back), (0, back), (1, back)]) == [
        1.0,
        0.75,
        0.875,
        1.0,
        1.0,
    ]
    assert factors(rule, [(0, ALL), (0, back)]) == [1.0, 1.0], "nobody trained without it"
    assert factors(rule, [(0, ALL), (1, THREE), (2, THREE), (2, ALL), (2, ALL)]) == [
        1.0,
        0.75,
        0.75,
        0.875,
        1,
    ]


def test_a_newcomer_beside_who_is_lost_leaves_the_number_as_it_was() -> None:
    rule = Rule("linear", 4, 10)
    assert factors(rule, [(0, ALL), (0, crew(0, 1, 2, 7)), (1, crew(0, 1, 2, 7))]) == [1.0, 1.0, 1.0]


def test_who_comes_while_others_have_no_batch_left_is_counted_when_all_have_one() -> None:
    rule = Rule("linear", 4, 2)
    assert factors(rule, [(0, ALL), (0, crew(1, 4)), (1, crew(0, 1, 2, 3, 4)), (1, crew(0, 1, 2, 3, 4))]) == [
        1.0,
        0.5,
        1.125,
        1.25,
    ]
    assert factors(Rule("linear", 1, 2), [(0, crew(0)), (0, crew(1)), (0, TWO), (0, TWO)]) == [
        1.0,
        1.0,
        1.5,
        2.0,
    ]


def test_a_job_that_goes_on_begins_where_the_first_one_stood() -> None:
    rule = Rule("linear", 2, 4)
    updates = [(0, TWO), *[(0, ALL)] * 6]
    whole = factors(rule, updates)
    for place in range(1, len(updates)):
        course = Course()
        for epoch, steps in updates[:place]:
            course = course.next(rule, epoch, steps)
        kept = msgspec.convert(msgspec.json.decode(msgspec.json.encode(course.kept())), Course)
        assert factors(rule, updates[place:], kept) == whole[place:], "other workers, the same factors"
    first = Course().next(rule, 3, TWO).kept()
    assert factors(rule, [(3, ALL)] * 4, first) == [1.25, 1.5, 1.75, 2.0], "with more workers: a warm-up"
    assert factors(rule, [(3, crew(0))], first) == [0.5]
    four = Rule("linear", 4, 4)
    resting = Course().next(four, 3, ALL).next(four, 3, crew(1)).kept()
    assert resting.factor == 0.25
    assert factors(four, [(4, ALL)], resting) == [1.0], "the others only had no batch"


@given(
    st.sampled_from(["linear", "sqrt"]),
    st.integers(1, 5),
    st.integers(0, 6),
    st.lists(
        st.tuples(
            st.integers(0, 1), st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 2), min_size=1)
        )
    ),
)
def test_whoever_comes_and_goes_the_factor_is_never_more_than_the_batch_is_worth(
    scaling: str, base: int, warm_up: int, found: list[tuple[int, dict[str, int]]]
) -> None:
    rule = msgspec.convert([scaling, base, warm_up], Rule)
    course, epoch = Course(), 0
    for more, steps in found:
        epoch += more
        before, course = course, course.next(rule, epoch, steps)
        assert 0.0 < course.factor <= rule.share(len(steps))
        assert course == before.next(rule, epoch, dict(reversed(steps.items()))), "the order is of no account"
        if before.workers and len(steps) > before.workers:  # nobody's coming makes it jump
            grown = max(before.level, rule.share(before.most))
            assert course.factor <= grown + (rule.share(len(steps)) - before.factor) / max(1, warm_up) + 1e-9


def test_late_gradients_are_divided_by_how_late_they_are() -> None:
    rule = Rule(damping=True)
    assert [rule.damped(late) for late in (0, 1, 2, 8)] == [1.0, 1.0, 0.5, 0.125]
    assert Rule().damped(8) == 1.0


def test_what_people_are_told() -> None:
    rule = Rule("linear", 2, 4)
    course = Course().next(rule, 0, TWO)
    assert why(rule, course) == "2 workers where 2 were asked for, linear"
    course = course.next(rule, 0, ALL)
    assert why(rule, course) == "4 workers where 2 were asked for, linear; warm-up step 1 of 4 from 1"
    assert why(rule, course.next(rule, 0, crew(3))) == (
        "4 workers where 2 were asked for, linear; 1 in the newest update"
    )
    assert why(Rule(), course) == "" and why(rule, Course()) == ""
    assert why(Rule("sqrt", 1), Course().next(rule, 0, crew(0))) == "1 worker where 1 was asked for, sqrt"
