"""Which cases of a test are run each time, and which only when there is time for them."""

from collections.abc import Iterable
from typing import Any

import pytest


def soak(values: Iterable[Any]) -> list[Any]:
    """These parameters belong to `pytest -m soak`."""
    return [pytest.param(value, marks=pytest.mark.soak) for value in values]


def soak_cases(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """The same, for several names at once."""
    return [pytest.param(*case, marks=pytest.mark.soak) for case in cases]
