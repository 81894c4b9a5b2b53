"""Bars and sparklines: numbers in, characters out."""

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.text import Text

from zml.text import bars

finite = st.floats(-1e12, 1e12)


def test_a_step_is_a_bar_of_its_phases_in_their_order() -> None:
    spent = {"apply": 0.1, "data": 0.2, "compute": 0.4, "wait": 0.3}
    assert bars.phases(spent, 1.0, 10).plain == "ddccccwwwa"
    assert bars.phases(spent, 2.0, 10).plain == "dccww"
    assert bars.phases({}, 1.0, 10).plain == "" and bars.phases(spent, 0.0, 10).plain == ""


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), max_size=8), st.integers(0, 200))
def test_what_is_drawn_never_drifts_from_the_sum(parts: list[float], width: int) -> None:
    whole = sum(parts)
    counts = bars.cells(parts, whole, width)
    assert all(count >= 0 for count in counts)
    assert sum(counts) == (width if whole > 0 else 0)


def test_a_sparkline_shows_the_course_and_leaves_gaps() -> None:
    assert bars.spark([0, 1, 2, 3, 4, 5, 6, 7], 8, unicode=True) == "▁▂▃▄▅▆▇█"
    assert bars.spark([7, 0], 8, unicode=False) == "#_"
    assert bars.spark([1, None, 3], 8, unicode=True) == "▁ █"
    assert bars.spark([5, 5, 5], 8, unicode=True) == "▅▅▅"
    assert bars.spark([None, None], 8, unicode=True) == ""
    assert bars.spark([1, 3, 5, 7], 2, unicode=True) == "▁█"


@settings(deadline=None)
@given(st.lists(st.none() | finite, max_size=300), st.integers(0, 80), st.booleans())
def test_a_sparkline_fits(values: list[float | None], width: int, unicode: bool) -> None:
    drawn = bars.spark(values, width, unicode=unicode)
    assert len(drawn) <= width
    assert set(drawn) <= set((bars.BLOCKS if unicode else bars.ASCII_BLOCKS) + " ")
    assert unicode or drawn.isascii()


@settings(deadline=None)
@given(st.text(max_size=40))
def test_for_ascii_only_a_line_stays_as_long(said: str) -> None:
    drawn = bars.ascii_only(Text(said, style="bold"))
    assert drawn.plain.isascii() and drawn.style == "bold"
    assert len(drawn.plain) == len(Text(said).plain)
