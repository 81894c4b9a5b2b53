"""What all tests share: tests that need root are skipped, with the reason, where there is none."""

import os
import shutil

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = (
        "needs root" if os.geteuid() != 0 else "needs the `ip` command" if not shutil.which("ip") else ""
    )
    if lacking:
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason=lacking))
