"""The clock that jumps: it keeps asyncio's order, and a deadlock is an error instead of a wait."""

import asyncio
import time

import pytest

from tests.simulation import NothingWillHappen, VirtualTimeLoop, simulate


def test_hours_pass_at_once_and_in_order() -> None:
    happened: list[tuple[float, str]] = []

    async def wait(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        happened.append((asyncio.get_running_loop().time() - 1000, name))

    async def main() -> str:
        await asyncio.gather(wait("late", 7200), wait("early", 0.5), wait("between", 3600))
        return "done"

    before = time.monotonic()
    assert simulate(main()) == "done"
    assert [name for _, name in happened] == ["early", "between", "late"]
    assert [at for at, _ in happened] == pytest.approx([0.5, 3600, 7200])
    assert time.monotonic() - before < 60


def test_a_timeout_ends_a_wait_that_nothing_else_would() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert simulate(main()) == pytest.approx(1030)


def test_a_deadlock_names_the_tasks_that_wait() -> None:
    async def wait_for(event: asyncio.Event) -> None:
        await event.wait()

    async def main() -> None:
        task = asyncio.create_task(wait_for(asyncio.Event()), name="the other")
        await task

    with pytest.raises(NothingWillHappen, match=r"the other \(.*wait_for\) waits at .*test_simulation.py"):
        simulate(main())


def test_time_that_only_heartbeats_pass_is_over_some_day() -> None:
    async def beat() -> None:
        while True:
            await asyncio.sleep(1)

    async def main() -> None:
        heart = asyncio.create_task(beat())
        await asyncio.Event().wait()
        heart.cancel()

    with pytest.raises(NothingWillHappen, match="time is over"):
        simulate(main(), limit_s=100)


def test_work_for_a_thread_is_done_on_the_spot() -> None:
    async def main() -> int:
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(divmod, 1, 0)
        return await asyncio.to_thread(max, 3, 4)

    assert simulate(main()) == 4


def test_an_error_that_nobody_saw_is_raised_before_time_moves_on() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_later(1, divmod, 1, 0)
        await asyncio.sleep(2)
        raise KeyError("too late")

    with pytest.raises(AssertionError, match="divmod") as caught:
        simulate(main())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_task_that_failed_unseen_fails_the_simulation() -> None:
    async def fail() -> None:
        raise KeyError("unseen")

    async def main() -> None:
        asyncio.create_task(fail())  # noqa: RUF006
        await asyncio.sleep(1)

    with pytest.raises(AssertionError, match="never retrieved"):
        simulate(main())


def test_a_loop_that_lags_finds_its_timers_overdue() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        due = loop.time() + 1
        loop.advance(5)
        await asyncio.sleep(due - loop.time())
        return loop.time()

    assert simulate(main()) == pytest.approx(1005)
