"""Pings: never missing where nothing else shows that a connection is there."""

from hypothesis import given
from hypothesis import strategies as st

from zml.transport.pings import SPARED, Pings


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=60))
def test_a_ping_is_spared_only_where_messages_went_both_ways(turns: list[tuple[bool, bool, bool]]) -> None:
    pings, now, spared, last = Pings(0.5), 0.0, 0, 0
    pings.begin(now)
    for spoke, listened, needed in turns:
        pings.spoke |= spoke
        pings.listened |= listened
        now = pings.due
        number = pings.next(now, needed=needed)
        assert pings.due == now + 0.5
        if number is None:
            spared += 1
            assert spoke and listened and not needed and spared <= SPARED
        else:
            assert number == last + 1
            assert not (spoke and listened) or needed or spared == SPARED
            spared, last = 0, number


def test_the_round_trip_is_that_of_the_newest_ping() -> None:
    pings = Pings(1.0)
    pings.begin(0.0)
    assert pings.next(1.0, needed=False) == 1
    assert pings.next(2.0, needed=False) == 2
    pings.answered(1, 2.1)
    assert pings.rtt_s == 0.0
    pings.answered(2, 2.5)
    assert pings.rtt_s == 0.5
    pings.end()
    assert pings.due == float("inf")
