"""Where a coordinator that is started again listens, and how long its members wait for it."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.simulation import simulate
from zml.config import Settings
from zml.coordinator.coordinating import serve, where
from zml.errors import HELD, LOST, ZmlError
from zml.lease import COORDINATOR, NO_ROOM, Lease, ask
from zml.messages import AnyMessage, Exited, JobSpec, Joined, Ok, Pulse
from zml.runs import rundir
from zml.transport import DeadlineExceeded, Refusal, Refused
from zml.transport.memory import MemoryNetwork

ADDRESS = "tcp://127.0.0.1:7077"
JOINED = Joined(job="j", member="w0", incarnation=1, generation=1, heartbeat_s=0.15, lease_s=1.5, run_dir="")
EXITED = Exited(job="j", member="w0", incarnation=1)


@pytest.mark.parametrize(
    ("wanted", "before", "there"),
    [
        ([], [], ["tcp://127.0.0.1:7077"]),
        ([], ["tcp://10.0.0.1:81"], ["tcp://10.0.0.1:81"]),
        (["tcp://127.0.0.1:0"], [], ["tcp://127.0.0.1:0"]),
        (["tcp://127.0.0.1:0"], ["tcp://127.0.0.1:4711"], ["tcp://127.0.0.1:4711"]),
        (
            ["tcp://127.0.0.1:0", "tcp://127.0.0.1:0", "ipc:///new/s"],
            ["tcp://127.0.0.1:1", "ipc:///old/s", "tcp://127.0.0.1:2"],
            ["tcp://127.0.0.1:1", "tcp://127.0.0.1:2", "ipc:///new/s"],
        ),
        (["tcp://10.0.0.1:0"], ["tcp://127.0.0.1:4711"], ["tcp://10.0.0.1:0"]),
        (["tcp://127.0.0.1:99"], ["tcp://127.0.0.1:4711"], ["tcp://127.0.0.1:99"]),
        ([], ["tcp://127.0.0.1:1", "ipc:///gone/with/its/launcher/s"], ["tcp://127.0.0.1:1"]),
    ],
)
def test_it_listens_where_it_did_before(
    wanted: Sequence[str], before: Sequence[str], there: list[str]
) -> None:
    assert where(wanted, before) == there


def test_a_socket_whose_folder_is_there_is_used_again(tmp_path: Path) -> None:
    assert where([], [f"ipc://{tmp_path}/s"]) == [f"ipc://{tmp_path}/s"]


def test_the_run_of_a_coordinator_of_many_jobs_is_nobody_elses(tmp_path: Path) -> None:
    here = rundir.Listening([ADDRESS], 0, "j1.1")
    rundir.write(tmp_path / rundir.COORDINATOR, msgspec.json.encode(here))
    with pytest.raises(ZmlError) as refused:
        serve(Settings(run_dir=str(tmp_path), job="j1"), JobSpec())
    assert refused.value.code == HELD and "many jobs" in str(refused.value)
    assert not (tmp_path / rundir.STATE).exists(), "nothing was touched"


def nothing(peer: str, message: Any, payload: Any) -> None:
    return None


def test_a_member_waits_as_long_as_it_was_told_and_says_what_to_do() -> None:
    async def main() -> tuple[ZmlError, float]:
        loop = asyncio.get_running_loop()
        endpoint = MemoryNetwork(1).endpoint("w0", vocabulary=AnyMessage, handler=nothing)
        await endpoint.start()
        lease = Lease(endpoint, JOINED, JobSpec(), away_s=600.0)
        keeping = asyncio.ensure_future(lease.keep())
        await asyncio.sleep(500.0)
        assert lease.waiting
        lease.heard(Pulse("j", 1))
        assert not lease.waiting
        since = loop.time()
        error = await keeping
        await endpoint.close()
        return error, loop.time() - since

    error, seconds = simulate(main())
    assert 600.0 <= seconds < 601.0
    assert error.code == LOST and "silent for 600 s" in error.what and "--run-dir" in error.fix


def test_what_a_coordinator_has_no_room_for_is_asked_again_and_what_it_refuses_is_not() -> None:
    async def main() -> tuple[int, str]:
        network = MemoryNetwork(1)
        asked: list[str] = []

        def handle(peer: str, message: Any, payload: Any) -> Ok:
            asked.append(peer)
            if len(asked) < 4:
                raise Refusal(NO_ROOM, "the disk is full")
            if len(asked) > 4:
                raise Refusal("job", "another job")
            return Ok()

        coordinator = network.endpoint(COORDINATOR, vocabulary=AnyMessage, handler=handle, bind=[ADDRESS])
        agent = network.endpoint("agent", vocabulary=AnyMessage, handler=nothing)
        await coordinator.start()
        await agent.start()
        await agent.connect(COORDINATOR, [ADDRESS])
        await ask(agent, EXITED, within_s=30.0)
        with pytest.raises(Refused) as refused:
            await ask(agent, EXITED, within_s=30.0)
        network.crash(COORDINATOR)
        with pytest.raises(DeadlineExceeded):
            await ask(agent, EXITED, within_s=30.0)
        await agent.close()
        return len(asked), refused.value.code

    assert simulate(main()) == (5, "job")
