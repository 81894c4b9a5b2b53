"""An agent and its script, over real sockets and signals; and how often an agent may start again."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from zml.agent.leaving import MOST_BYTES, STOPPED, VARIABLE, AgentEnd, ScriptEnd
from zml.agent.restarts import Restarts

ROOT = Path(__file__).resolve().parents[2]


def pair(environment: dict[str, str], left: list[str]) -> tuple[AgentEnd, ScriptEnd, list[str]]:
    asked: list[str] = []
    agent = AgentEnd(lambda: left.append("left"))
    environment |= {VARIABLE: str(os.dup(agent.other.fileno()))}
    return agent, ScriptEnd(asked.append, environment), asked


async def until(condition: list[str]) -> None:
    async with asyncio.timeout(10):
        while not condition:
            await asyncio.sleep(0.005)


def test_a_script_is_asked_and_answers() -> None:
    async def main() -> None:
        environment: dict[str, str] = {}
        left: list[str] = []
        agent, script, asked = pair(environment, left)
        assert VARIABLE not in environment, "it is for nobody whom the script starts"
        script.listen(asyncio.get_running_loop())
        agent.ask("SIGTERM on its machine")
        await until(asked)
        assert asked == ["SIGTERM on its machine"] and not left
        script.left()
        await until(left)
        assert left == ["left"]
        agent.close()
        agent.close()
        assert script.socket is not None
        asyncio.get_running_loop().remove_reader(script.socket)
        script.socket.close()

    asyncio.run(main())


def test_a_long_reason_is_cut_and_a_script_that_reads_nothing_blocks_nobody() -> None:
    async def main() -> list[str]:
        agent, script, asked = pair({}, [])
        for _ in range(5000):
            agent.ask("x" * 10_000)  # far more than the buffer of the socket holds
        script.listen(asyncio.get_running_loop())
        await until(asked)
        agent.close()
        assert script.socket is not None
        asyncio.get_running_loop().remove_reader(script.socket)
        script.socket.close()
        return asked

    assert asyncio.run(main())[0] == "x" * (MOST_BYTES - len("leave "))


def test_without_an_agent_nothing_is_heard_and_nothing_told() -> None:
    script = ScriptEnd(lambda because: None, {})
    script.left()
    assert script.socket is None


CHILD = """
import asyncio, os, signal, sys, threading, time
from zml.agent.leaving import ScriptEnd
if "own" in sys.argv:
    signal.signal(signal.SIGTERM, lambda number, frame: print("mine", flush=True))
asked = []
end = ScriptEnd(asked.append)
loop = asyncio.new_event_loop()
threading.Thread(target=loop.run_forever, daemon=True).start()
loop.call_soon_threadsafe(end.listen, loop)
end.catch()
if "fork" in sys.argv:
    here, there = os.pipe()
    child = os.fork()
    if not child:
        os.write(there, b"x")
        time.sleep(60)
        os._exit(1)
    os.read(here, 1)  # what comes before a forked process has begun is lost in Python
    os.kill(child, signal.SIGTERM)
    print(os.WTERMSIG(os.waitpid(child, 0)[1]), asked, flush=True)
    sys.exit()
print("ready", flush=True)
while not asked:
    time.sleep(0.01)
print("asked", asked[0], flush=True)
time.sleep(60)
"""


def start(*words: str, pass_fds: tuple[int, ...] = (), **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=pass_fds,
    )


def line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def end(child: subprocess.Popen[str]) -> int:
    try:
        return child.wait(20)
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_script_asks_it_the_first_time_and_kills_it_the_second(number: int) -> None:
    child = start()
    assert line(child) == "ready"
    child.send_signal(number)
    assert line(child) == f"asked {signal.Signals(number).name}"
    child.send_signal(number)
    assert end(child) == -number


def test_a_users_own_handler_stays_and_a_stop_is_left_to_it() -> None:
    async def main() -> int:
        agent = AgentEnd(lambda: None)
        child = start("own", pass_fds=agent.pass_fds, **agent.environment())
        assert await asyncio.to_thread(line, child) == "ready"
        agent.stop()
        child.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(line, child) == "mine"
        agent.ask("enough")
        assert await asyncio.to_thread(line, child) == "asked enough"
        child.kill()
        agent.close()
        return await asyncio.to_thread(end, child)

    assert asyncio.run(main()) == -signal.SIGKILL


def test_a_stop_ends_a_script_that_has_no_handler_at_once() -> None:
    async def main() -> int:
        agent = AgentEnd(lambda: None)
        child = start(pass_fds=agent.pass_fds, **agent.environment())
        assert await asyncio.to_thread(line, child) == "ready"
        agent.stop()
        try:
            return await asyncio.to_thread(end, child)
        finally:
            agent.close()

    assert asyncio.run(main()) == STOPPED


def test_processes_that_a_script_forks_die_of_sigterm_as_ever() -> None:
    child = start("fork")
    assert line(child) == f"{int(signal.SIGTERM)} []"
    assert end(child) == 0


def test_so_many_restarts_are_allowed_within_an_hour_and_then_again() -> None:
    restarts = Restarts(2)
    assert [restarts.take(at) for at in (0.0, 100.0, 200.0, 3599.0)] == [True, True, False, False]
    assert str(restarts) == "2 of 2 restarts within an hour"
    assert restarts.take(3600.0) and not restarts.take(3600.0) and restarts.take(3700.0)
    assert not Restarts(0).take(0.0)
