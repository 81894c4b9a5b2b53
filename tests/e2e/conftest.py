from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Playground, playground


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Playground]:
    with playground(tmp_path.resolve()) as found:
        yield found
