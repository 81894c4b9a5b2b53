"""Curves with fewer points: bounded, in order, and no peak is lost."""

from hypothesis import given
from hypothesis import strategies as st

from zml.dashboard.thinning import pick, rounded

VALUES = st.lists(st.none() | st.floats(-1e6, 1e6), max_size=400)


@given(VALUES, st.integers(8, 60))
def test_points_are_bounded_in_order_and_hold_every_extreme(column: list[float | None], most: int) -> None:
    kept = pick([column], most)
    assert kept == sorted(set(kept)) and len(kept) <= most
    if not column:
        return
    assert kept[0] == 0 and kept[-1] == len(column) - 1
    there = [value for value in column if value is not None]
    shown = [column[row] for row in kept if column[row] is not None]
    if there:
        assert (min(v for v in shown if v is not None), max(v for v in shown if v is not None)) == (
            min(there),
            max(there),
        )
    assert (None in column) == (None in [column[row] for row in kept]), "a value that was not finite is seen"


def test_few_points_stay_as_they_are() -> None:
    assert pick([[3.0, None, 1.0]], 10) == [0, 1, 2]
    assert pick([], 10) == []


def test_two_columns_keep_the_peaks_of_both() -> None:
    up = [float(n == 700) for n in range(1000)]
    down = [-float(n == 300) for n in range(1000)]
    assert {300, 700} <= set(pick([up, down], 50))


def test_numbers_are_as_long_as_anybody_sees() -> None:
    assert [rounded(value) for value in (0.123456789, 1234567.0, None, 0.0)] == [
        0.123457,
        1234570.0,
        None,
        0.0,
    ]
