"""What is said too often is counted, and nothing goes without a word."""

from hypothesis import given
from hypothesis import strategies as st

from zml.logs.repeats import ALIKE, SAME, Flood, Repeats


def say(repeats: Repeats[str], key: str, item: str, now: float) -> list[str]:
    passes = repeats.passes(key, now)
    told = [f"{count} x {newest}" for count, newest in repeats.due(now)]
    if passes:
        return [*told, item]
    repeats.hold(key, item)
    return told


def test_after_the_first_few_one_passes_now_and_then_with_the_number_of_the_others() -> None:
    repeats: Repeats[str] = Repeats(burst=2, every_s=10)
    assert [say(repeats, "a", f"a{n}", 0) for n in range(4)] == [["a0"], ["a1"], [], []]
    assert say(repeats, "a", "a4", 9) == []
    assert say(repeats, "a", "a5", 10) == ["3 x a4", "a5"]
    assert repeats.rest() == []


def test_a_count_is_told_when_others_speak_though_its_own_message_does_not_come_again() -> None:
    repeats: Repeats[str] = Repeats(burst=1, every_s=10)
    assert [say(repeats, "a", f"a{n}", 0) for n in range(3)] == [["a0"], [], []]
    assert say(repeats, "b", "b0", 5) == ["b0"]
    assert say(repeats, "c", "c0", 20) == ["2 x a2", "c0"]


def test_at_the_end_all_counts_are_told() -> None:
    repeats: Repeats[str] = Repeats(burst=1, every_s=10)
    for key in "aabbb":
        say(repeats, key, key, 0)
    assert repeats.rest() == [(1, "a"), (2, "b")]
    assert repeats.rest() == []


def test_what_makes_room_for_others_is_told() -> None:
    repeats: Repeats[str] = Repeats(burst=1, every_s=10, most=2)
    assert [say(repeats, "a", "a", 0) for _ in range(3)] == [["a"], [], []]
    assert say(repeats, "b", "b", 0) == ["b"]
    assert say(repeats, "c", "c", 0) == ["2 x a", "c"]


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0, 30))),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_each_is_told_or_counted_once_and_memory_is_bounded(
    events: list[tuple[str, float]], burst: int, most: int
) -> None:
    repeats: Repeats[str] = Repeats(burst=burst, every_s=10, most=most)
    now, told, counted = 0.0, 0, 0
    for key, later in events:
        now += later
        passes = repeats.passes(key, now)
        told += passes
        counted += sum(count for count, _ in repeats.due(now))
        if not passes:
            repeats.hold(key, key)
        assert len(repeats._buckets) <= most
    assert told + counted + sum(count for count, _ in repeats.rest()) == len(events)


def test_the_very_same_line_is_counted_soon_and_lines_that_are_alike_late() -> None:
    flood: Flood[str] = Flood()

    def told(message: str, detail: int) -> bool:
        held_by = flood.held_by(message, detail, 0.0)
        if held_by is not None:
            held_by[0].hold(held_by[1], f"{message} {detail}")
        return held_by is None

    assert sum(told("a", 0) for _ in range(100)) == SAME[0]
    assert sum(told("b", n) for n in range(2000)) == ALIKE[0]
    assert flood.due(0.0) == [(100 - SAME[0], "a 0")]  # it made room for the others
    assert flood.rest() == [(2000 - ALIKE[0], "b 1999")]
