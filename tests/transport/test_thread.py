"""Calls from one thread into the event loop of another: bounded in number and time, and never lost."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from zml.transport import Congested, DeadlineExceeded, Handover, LoopThread, PeerLost

PATIENCE_S = 30.0


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    thread = LoopThread("bulk", most=3)
    yield thread
    thread.stop()


async def double(number: int) -> int:
    await asyncio.sleep(0)
    return 2 * number


async def for_ever() -> None:
    await asyncio.Event().wait()


async def break_down() -> None:
    raise ZeroDivisionError("its own")


def test_a_call_runs_there_and_its_result_comes_back(thread: LoopThread) -> None:
    bulk = thread.start()
    assert bulk.call(lambda: double(21), timeout_s=PATIENCE_S) == 42
    with pytest.raises(ZeroDivisionError, match="its own"):
        bulk.call(break_down, timeout_s=PATIENCE_S)

    async def main() -> None:
        assert await bulk.ask(lambda: double(4), timeout_s=PATIENCE_S) == 8
        with pytest.raises(ZeroDivisionError):
            await bulk.ask(break_down, timeout_s=PATIENCE_S)

    asyncio.run(main())
    assert bulk.under_way == 0


def test_a_deadline_names_the_thread_and_cancels_what_runs_there(thread: LoopThread) -> None:
    bulk = thread.start()
    cancelled = threading.Event()

    async def wait() -> None:
        try:
            await for_ever()
        finally:
            cancelled.set()

    with pytest.raises(DeadlineExceeded, match=r"bulk did not answer a flush within 0\.05 s"):
        bulk.call(wait, timeout_s=0.05, what="a flush")
    assert cancelled.wait(PATIENCE_S)
    cancelled.clear()

    async def main() -> None:
        with pytest.raises(DeadlineExceeded, match="bulk"):
            await bulk.ask(wait, timeout_s=0.05)

    asyncio.run(main())
    assert cancelled.wait(PATIENCE_S)


def test_a_timeout_of_the_coroutine_itself_is_not_taken_for_the_deadline(thread: LoopThread) -> None:
    bulk = thread.start()

    async def give_up() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        bulk.call(give_up, timeout_s=PATIENCE_S)


def test_whoever_waits_for_an_answer_can_be_cancelled(thread: LoopThread) -> None:
    bulk = thread.start()
    begun, ended = threading.Event(), threading.Event()

    async def wait() -> None:
        begun.set()
        try:
            await for_ever()
        finally:
            ended.set()

    async def main() -> None:
        task = asyncio.ensure_future(bulk.ask(wait, timeout_s=PATIENCE_S))
        await asyncio.to_thread(begun.wait, PATIENCE_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert ended.wait(PATIENCE_S)


def test_no_more_calls_are_taken_than_agreed(thread: LoopThread) -> None:
    bulk = thread.start()
    gate, reached = threading.Event(), threading.Event()

    def block() -> None:
        reached.set()
        gate.wait(PATIENCE_S)

    seen: list[int] = []
    done = threading.Event()
    assert bulk.post(block)
    assert reached.wait(PATIENCE_S)
    assert [bulk.post(seen.append, number) for number in range(2)] == [True, True]
    assert [bulk.post(done.set) for _ in range(3)] == [True, False, False]
    with pytest.raises(Congested, match="3 requests wait for bulk"):
        bulk.call(lambda: double(1), timeout_s=PATIENCE_S)
    gate.set()
    assert done.wait(PATIENCE_S)
    assert seen == [0, 1]
    assert bulk.call(lambda: double(1), timeout_s=PATIENCE_S) == 2


def test_a_posted_function_that_fails_is_logged_and_the_loop_goes_on(thread: LoopThread) -> None:
    bulk = thread.start()
    with capture_logs() as logs:
        bulk.post(lambda: 1 // 0)
        assert bulk.call(lambda: double(1), timeout_s=PATIENCE_S) == 2
    assert [entry["thread"] for entry in logs] == ["bulk"]
    assert "ZeroDivisionError" in logs[0]["traceback"]


def test_to_stop_cancels_what_runs_and_later_calls_find_nobody(thread: LoopThread) -> None:
    bulk = thread.start()
    begun = threading.Event()
    outcome: list[BaseException] = []

    async def wait() -> None:
        begun.set()
        await for_ever()

    def call() -> None:
        try:
            bulk.call(wait, timeout_s=PATIENCE_S)
        except PeerLost as error:
            outcome.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    assert begun.wait(PATIENCE_S)
    thread.stop()
    caller.join(PATIENCE_S)
    assert [str(error) for error in outcome] == ["bulk is lost: it ended meanwhile"]
    with pytest.raises(PeerLost, match="its event loop has ended"):
        bulk.call(lambda: double(1), timeout_s=PATIENCE_S)
    assert not bulk.post(print)
    assert bulk.under_way == 0
    thread.stop()


def test_a_thread_that_hangs_is_named_when_it_should_end(thread: LoopThread) -> None:
    bulk = thread.start()
    gate, reached = threading.Event(), threading.Event()

    def block() -> None:
        reached.set()
        gate.wait(PATIENCE_S)

    bulk.post(block)
    assert reached.wait(PATIENCE_S)
    with pytest.raises(DeadlineExceeded, match=r"bulk did not answer its end within 0\.05 s"):
        thread.stop(0.05)
    gate.set()


def test_both_loops_can_call_each_other(thread: LoopThread) -> None:
    """A shard's bulk thread asks the control loop while that one asks the bulk thread."""
    bulk = thread.start()

    async def main() -> None:
        control = Handover(asyncio.get_running_loop(), "control", most=3)

        async def there() -> int:
            return await control.ask(lambda: double(5), timeout_s=PATIENCE_S)

        results = await asyncio.gather(*(bulk.ask(there, timeout_s=PATIENCE_S) for _ in range(3)))
        assert results == [10, 10, 10]

    asyncio.run(main())
