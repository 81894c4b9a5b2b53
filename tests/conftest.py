"""What all tests share: tests that need root are skipped, with the reason, where there is none; and the codec's kernels
are compiled, once on a machine, before the clock of any test runs."""

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


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly or all("scheduler" in item.path.parts for item in session.items):
        return
    from zml.codec import kernels

    for module in (kernels.ENTRY, *kernels.ON_SHARDS, *kernels.ON_DEVICES):
        kernels.prepare(lambda text: print(f"{text} ..."), module)
