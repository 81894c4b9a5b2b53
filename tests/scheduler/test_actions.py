"""Actions are orders, and each says why."""

from dataclasses import FrozenInstanceError, fields
from typing import get_args

import pytest

from zml.scheduler.actions import Action, Drain
from zml.scheduler.ids import JobId


def test_every_action_names_its_job_first_and_its_reason_last() -> None:
    for kind in get_args(Action):
        names = [field.name for field in fields(kind)]
        assert (names[0], names[-1]) == ("job", "because"), kind


def test_an_action_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Drain(JobId("j"), "Ctrl-C").because = "no reason"  # type: ignore[misc]
