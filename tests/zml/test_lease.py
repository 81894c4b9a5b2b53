"""A member keeps its lease, and knows its own pauses from the coordinator's silence."""

import asyncio
from typing import Any

import pytest

from tests.simulation import simulate
from zml.lease import Lease
from zml.messages import Heartbeat, JobSpec, Joined
from zml.scheduler.ids import JobId

JOINED = Joined(
    job=JobId("job"), member="w0", incarnation=1, generation=1, heartbeat_s=0.15, lease_s=1.5, run_dir=""
)


class Line:
    """An endpoint that only counts what is sent."""

    def __init__(self) -> None:
        self.beats = 0

    def notify(self, peer: str, message: Any) -> None:
        assert message == Heartbeat("job", "w0", 1)
        self.beats += 1


def test_a_coordinator_that_says_nothing_for_thirty_seconds_is_given_up() -> None:
    async def main() -> tuple[str, int, float]:
        line = Line()
        lease = Lease(line, JOINED, JobSpec(), 30.0)  # type: ignore[arg-type]
        error = await lease.keep()
        return error.what, line.beats, asyncio.get_running_loop().time()

    what, beats, _ = simulate(main())
    assert what == "w0: the coordinator has been silent for 30 s"
    assert beats == pytest.approx(30 / 0.15, abs=2)


def test_a_pause_of_this_process_is_no_silence_of_the_coordinator() -> None:
    """As after SIGSTOP, or a machine that was suspended."""

    async def main() -> int:
        loop, line = asyncio.get_running_loop(), Line()
        lease = Lease(line, JOINED, JobSpec(), 30.0)  # type: ignore[arg-type]
        sleep, pauses = asyncio.sleep, [3600.0, 0.0, 3600.0]

        async def frozen(seconds: float) -> None:
            await sleep(seconds + (pauses.pop() if pauses else 0.0))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio, "sleep", frozen)
            began = loop.time()
            await lease.keep()
        assert loop.time() - began > 2 * 3600
        return line.beats

    assert simulate(main()) == pytest.approx(30 / 0.15, abs=4)
