"""What tests of the script's side share."""

from collections.abc import Iterator

import pytest

from zml.iothread import IoThread


@pytest.fixture
def io() -> Iterator[IoThread]:
    thread = IoThread("test")
    yield thread
    thread.close()
