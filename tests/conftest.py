"""What all tests share: tests that need root or Prometheus are skipped, with the reason, where there is none; and the
codec's kernels are compiled, once on a machine, before the clock of any test runs."""

import os
import shutil
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

# How long an example takes says nothing where many tests share a machine.
settings.register_profile("zml", deadline=None)
settings.load_profile("zml")


@pytest.fixture(autouse=True)
def _log_lines_as_they_come() -> Iterator[None]:
    """A command that one test has called, and that was to be silent, silences no other."""
    yield
    structlog.reset_defaults()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = {
        "root": "needs root"
        if os.geteuid() != 0
        else "needs the `ip` command"
        if not shutil.which("ip")
        else "",
        "prometheus": ""
        if shutil.which("prometheus") and shutil.which("promtool")
        else "needs Debian's prometheus",
    }
    for item in items:
        for marker, reason in lacking.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly or all("scheduler" in item.path.parts for item in session.items):
        return
    import torch

    from zml.codec import kernels

    # Tests run side by side, and torch's threads spin while they wait for each other.
    torch.set_num_threads(1)

    for module in (kernels.ENTRY, *kernels.ON_SHARDS, *kernels.ON_DEVICES):
        kernels.prepare(lambda text: print(f"{text} ..."), module)
