"""How long a peer may be silent: it follows the jitter that was seen, between its floor and its ceiling."""

from statistics import fmean, pstdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zml.transport.liveness import DEVIATIONS, SAMPLES, Liveness


def liveness() -> Liveness:
    return Liveness(0.0, interval_s=0.75, floor_s=2.0, most_s=60.0)


def test_three_intervals_may_pass_at_least() -> None:
    assert liveness().limit_s == 3.0
    assert Liveness(0.0, interval_s=0.75, floor_s=5.0, most_s=4.0).limit_s == 5.0


def test_a_steady_peer_gets_no_more_than_the_floor() -> None:
    peer = liveness()
    for second in range(1, 200):
        peer.heard(float(second))
    assert (peer.limit_s, peer.deadline) == (3.0, 202.0)


@given(st.lists(st.floats(0.51, 1000.0), min_size=1, max_size=3 * SAMPLES))
def test_the_limit_is_the_mean_and_eight_deviations_of_the_newest_gaps(gaps: list[float]) -> None:
    peer, now = liveness(), 0.0
    for gap in gaps:
        now += gap
        peer.heard(now)
    newest = gaps[-SAMPLES:]
    wanted = fmean(newest) + DEVIATIONS * pstdev(newest) + 0.75
    assert peer.limit_s == pytest.approx(min(max(wanted, 3.0), 60.0), abs=1e-3)


def test_a_torrent_of_messages_says_nothing_about_pauses() -> None:
    peer = liveness()
    for gap in (1.0, 2.0, 1.0, 2.0):
        peer.heard(peer.last_heard + gap)
    before = peer.limit_s
    for _ in range(10_000):
        peer.heard(peer.last_heard + 0.00001)
    assert peer.limit_s == before


def test_a_pause_of_our_own_is_no_evidence_against_the_peer() -> None:
    peer = liveness()
    peer.heard(1.0)
    peer.forgive(10.0, 11.5)
    assert peer.deadline == 14.0
    peer.heard(12.0)  # one second after it would have been heard
    assert peer.limit_s == 3.0


def test_a_break_is_not_jitter() -> None:
    peer = liveness()
    peer.heard(1.0)
    peer.resume(500.0)
    peer.heard(501.0)
    assert (peer.limit_s, peer.deadline) == (3.0, 504.0)


def test_no_more_is_forgiven_than_there_was_silence() -> None:
    peer = liveness()
    peer.heard(1.0)
    for _ in range(5):
        peer.forgive(10.0, 4.5)
    assert peer.deadline == 7.5
