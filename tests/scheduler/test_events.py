"""Events are facts: they cannot be changed, and a job that could not be is not submitted."""

from dataclasses import FrozenInstanceError, fields
from typing import get_args

import pytest

from zml.scheduler.events import Event, FromMember, Submitted, Ticked
from zml.scheduler.ids import JobId

JOB = JobId("j")


def test_every_event_is_of_a_job_and_first_says_which() -> None:
    assert [kind.__name__ for kind in get_args(Event) if fields(kind)[0].name != "job"] == []


def test_what_comes_from_a_member_names_its_incarnation() -> None:
    for kind in get_args(FromMember):
        assert [field.name for field in fields(kind)][2] == "incarnation", kind


def test_an_event_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Ticked(JOB).job = JobId("another")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("workers", "shards", "staleness", "message"),
    [
        (0, 1, 0, "workers must be 1 to 65,536, not 0"),
        (1, 0, 0, "shards must be 1 to 65,536, not 0"),
        (1, 70_000, None, "shards must be 1 to 65,536, not 70,000"),
        (1, 1, -1, "staleness must not be negative, not -1"),
    ],
)
def test_a_job_that_could_not_be_is_refused_with_the_value(
    workers: int, shards: int, staleness: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Submitted(JOB, workers, shards, staleness)
