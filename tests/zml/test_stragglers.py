"""Who is slow and who starves, out of the seconds of a step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zml.stragglers import BUSY, MOST, NOTICED_S, SLOW, busy_s, data_share, seldom, stragglers, unheard


def test_who_waits_is_not_slow_and_the_phase_is_the_one_that_makes_the_difference() -> None:
    found = stragglers(
        {
            "w0": {"compute": 0.1, "data": 0.02, "wait": 0.3},
            "w1": {"compute": 0.1, "data": 0.32},
            "w2": {"compute": 0.1, "data": 0.02, "wait": 0.3},
        }
    )
    assert {name: (round(slow.ratio, 3), slow.phase) for name, slow in found.items()} == {"w1": (3.5, "data")}


def test_nobody_is_slow_alone_or_by_what_nobody_notices() -> None:
    assert stragglers({}) == {}
    assert stragglers({"w0": {"compute": 9.0}}) == {}
    assert stragglers({"w0": {"compute": 0.001}, "w1": {"compute": 0.001 + NOTICED_S / 2}}) == {}


def test_against_those_that_do_nothing_the_ratio_has_an_end() -> None:
    assert stragglers({"w0": {"wait": 1.0}, "w1": {"compute": 1.0}})["w1"].ratio == MOST


@pytest.mark.parametrize(
    ("phases", "share"), [({}, 0.0), ({"data": 1.0}, 1.0), ({"data": 1, "wait": 3}, 0.25)]
)
def test_the_share_of_the_loader_is_of_the_whole_step(phases: dict[str, float], share: float) -> None:
    assert data_share(phases) == share


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=3),
        st.dictionaries(st.sampled_from((*BUSY, "wait")), st.floats(0.0, 10.0)),
        max_size=9,
    )
)
def test_only_the_busier_half_can_be_slow(workers: dict[str, dict[str, float]]) -> None:
    found = stragglers(workers)
    ordered = sorted(busy_s(phases) for phases in workers.values())
    for name, slow in found.items():
        assert busy_s(workers[name]) >= ordered[len(ordered) // 2] and SLOW <= slow.ratio <= MOST


@given(heard_s=st.floats(-1.0, 1e3), every_s=st.floats(0.0, 1e2))
def test_how_often_somebody_speaks_is_told_where_it_matters_and_nowhere_else(
    heard_s: float, every_s: float
) -> None:
    assert unheard(heard_s, seldom(every_s)) == unheard(heard_s, every_s)
    assert seldom(0.15) == 0.0 and seldom(2.0) == 2.0
