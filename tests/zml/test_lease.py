"""A member keeps its lease, and knows its own pauses from the coordinator's silence."""

import asyncio
import math
from itertools import pairwise
from typing import Any

import msgspec
import pytest

from tests.simulation import simulate
from zml.lease import COORDINATOR, SLOWER, SLOWEST, Lease
from zml.messages import Heartbeat, JobSpec, Joined, Pulse
from zml.scheduler.ids import JobId

JOINED = Joined(
    job=JobId("job"), member="w0", incarnation=1, generation=1, heartbeat_s=0.15, lease_s=1.5, run_dir=""
)


@pytest.mark.parametrize(
    ("every_s", "first_s"), [(0.0, 0.15), (3.0, 3.0), (0.01, 0.15), (math.nan, 0.15), (1e9, SLOWEST * 0.15)]
)
def test_who_joins_thousands_speaks_seldom_from_the_first_on(every_s: float, first_s: float) -> None:
    async def main() -> list[tuple[float, float]]:
        line, joined = Line(), msgspec.structs.replace(JOINED, every_s=every_s)
        keeping = asyncio.ensure_future(Lease(line, joined, JobSpec(), 600.0).keep())  # type: ignore[arg-type]
        await asyncio.sleep(3 * first_s + 0.01)
        keeping.cancel()
        return line.paces

    paces = simulate(main())
    assert [said_s for _, said_s in paces] == [pytest.approx(first_s)] * 4
    assert [after - before for (before, _), (after, _) in pairwise(paces)] == [pytest.approx(first_s)] * 3


class Line:
    """An endpoint that only counts what is sent."""

    def __init__(self) -> None:
        self.beats = 0
        self.paces: list[tuple[float, float]] = []  # when, and what was said

    async def found(self, peer: str, *, timeout_s: float, anew: bool) -> bool:
        assert peer == COORDINATOR and anew
        await asyncio.sleep(timeout_s)
        return False

    def pace(self, peer: str, ping_s: float) -> None:
        assert peer == COORDINATOR and ping_s >= 0.5

    def notify(self, peer: str, message: Any) -> None:
        assert message == Heartbeat("job", "w0", 1, message.every_s)
        self.beats += 1
        self.paces.append((asyncio.get_running_loop().time(), message.every_s))


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


def test_a_coordinator_of_thousands_is_told_of_each_longer_pause_before_it_is_made() -> None:
    async def main() -> list[tuple[float, float]]:
        line = Line()
        lease = Lease(line, JOINED, JobSpec(), 600.0)  # type: ignore[arg-type]
        keeping = asyncio.ensure_future(lease.keep())
        for asked_s, for_s in ((0.0, 1.0), (1.5, 20.0), (0.3, 3.0)):
            lease.heard(Pulse("job", 1, asked_s))
            await asyncio.sleep(for_s)
        keeping.cancel()
        return line.paces

    paces = simulate(main())
    for (before, said), (now, _) in pairwise(paces):
        assert now - before == pytest.approx(said)
    for (_, said), (_, next_said) in pairwise(paces):
        assert next_said <= SLOWER * said * 1.0001
    spoken = [every for _, every in paces]
    assert spoken[0] == 0.15 and max(spoken) == pytest.approx(1.5) and spoken[-1] == pytest.approx(0.3)
    # A lease is ten times as long as the pause that was said last: one, two or three lost heartbeats do not end it.
    for lost in (1, 2, 3):
        for (before, every_s), (now, _) in zip(paces, paces[lost + 1 :], strict=False):
            assert now - before < 10 * every_s
