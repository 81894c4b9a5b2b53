"""What may be deleted of jobs that are over, and what stays whatever was asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scheduler.cluster.views import request
from zml.scheduler.cluster.retention import DAY_S, Keep, expired
from zml.scheduler.cluster.state import Cluster, Job, Over, Standing
from zml.scheduler.ids import JobId


def ended(*days: float) -> Cluster:
    """Jobs j0, j1, ... that ended after so many days each; and one that runs."""
    cluster = Cluster(jobs={JobId("runs"): Job(request("runs"), since=0.0)})
    for number, at in enumerate(days):
        asked = request(f"j{number}")
        cluster.over[asked.job] = Over(asked, Standing.SUCCEEDED, 0, "so", at * DAY_S, 1, 0.0, None)
    return cluster


def gone(keep: Keep, *needed: str, days: tuple[float, ...] = (1, 2, 3, 8), now: float = 10.0) -> list[str]:
    return [job for job, _ in expired(ended(*days), keep, {*map(JobId, needed)}, now * DAY_S)]


def test_nothing_goes_unless_it_was_asked_for() -> None:
    assert gone(Keep()) == []


def test_the_newest_stay_and_so_does_what_ended_a_short_time_ago() -> None:
    assert gone(Keep(jobs=3)) == ["j0"]
    assert gone(Keep(days=7.5)) == ["j0", "j1"]
    assert gone(Keep(jobs=3, days=7.5)) == ["j0"], "beyond both"
    assert gone(Keep(jobs=0)) == ["j0", "j1", "j2", "j3"]


def test_what_others_need_stays() -> None:
    assert gone(Keep(jobs=1), "j1") == ["j0", "j2"]


def test_it_is_said_why() -> None:
    assert expired(ended(1, 2), Keep(jobs=1), (), 10 * DAY_S) == [
        ("j0", "it ended 9.0 days ago, and 1 job since")
    ]


@given(
    st.lists(st.integers(0, 20), max_size=8).map(sorted),
    st.none() | st.integers(0, 5),
    st.none() | st.integers(0, 20),
    st.sets(st.integers(0, 7)),
)
def test_what_is_kept_is_kept(
    days: list[int], jobs: int | None, keep_days: int | None, needed: set[int]
) -> None:
    left = gone(
        Keep(jobs=jobs, days=keep_days), *(f"j{n}" for n in needed), days=(*map(float, days),), now=20.0
    )
    assert "runs" not in left and not {*left} & {f"j{n}" for n in needed}
    for number, at in enumerate(days):
        if (jobs is not None and len(days) - number <= jobs) or (
            keep_days is not None and 20 - at < keep_days
        ):
            assert f"j{number}" not in left
        elif number not in needed and (jobs, keep_days) != (None, None):
            assert f"j{number}" in left


def test_less_than_nothing_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match="negative"):
        Keep(jobs=-1)
