from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture(autouse=True)
def no_step_goes_on() -> Iterator[None]:
    """What a test has bound to log lines is of no other test."""
    structlog.contextvars.clear_contextvars()
    yield
    structlog.contextvars.clear_contextvars()
