"""Rules that contradict themselves are refused by name and value."""

from typing import Any

import pytest

from zml.scheduler.rules import Rules


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lease_s": 0.0}, "lease_s must be above 0 and at most 5, not 0"),
        ({"lease_s": 9.0}, "lease_s must be above 0 and at most 5, not 9"),
        ({"return_s": -1.0}, "return_s must not be negative, not -1"),
        ({"goodbye_s": -1.0}, "goodbye_s must not be negative, not -1"),
        ({"jitter_factor": -0.5}, "jitter_factor must not be negative, not -0.5"),
    ],
)
def test_rules_that_cannot_be_kept_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rules(**given)


def test_a_member_is_silent_after_half_a_lease() -> None:
    assert Rules(lease_s=3.0).silent_s == 1.5
