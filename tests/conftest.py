"""What all tests share: tests that need root or Prometheus are skipped, with the reason, where there is none; those
that start a cluster or a Slurm lie where `make test` looks for them; the codec's kernels are there before any test.
"""

import os
import shutil
import signal
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

# How long an example takes says nothing where many tests share a machine.
settings.register_profile("zml", deadline=None)
settings.load_profile("zml")

# The Makefile's second part collects nothing but these folders.
LIE_IN = {"cluster": {"e2e", "obs"}, "root": {"e2e", "obs"}, "slurm": {"slurm"}}


@pytest.fixture(autouse=True)
def _log_lines_as_they_come() -> Iterator[None]:
    """A command that one test has called, and that was to be silent, silences no other."""
    yield
    structlog.reset_defaults()


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    """A loop that was closed while it listened leaves its handler, and the Ctrl-C of the next test goes there."""
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in watched}
    yield
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def pytest_configure() -> None:
    # What a script starts in the background ignores Ctrl-C, and so does all that it starts: some tests press it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--pollux",
        metavar="FOLDER",
        help="The folder `simulator` of Pollux' artifact: its workloads are simulated too.",
    )


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
        for marker, folders in LIE_IN.items():
            if item.get_closest_marker(marker) and not folders.intersection(
                item.path.relative_to(item.config.rootpath).parts
            ):
                raise pytest.UsageError(
                    f"{item.nodeid} is marked {marker}: it belongs to {' or '.join(sorted(folders))}"
                )


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly or all("scheduler" in item.path.parts for item in session.items):
        return
    import torch

    from tests.kernels import prepare

    # Tests run side by side, and torch's threads spin while they wait for each other.
    torch.set_num_threads(1)
    prepare()
