"""Allocations by the piece: Slurm's words are understood, and both providers keep one contract."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zml.errors import SLURM, ZmlError
from zml.slurm.processes import ID, LocalProvider
from zml.slurm.provider import Provider, SlurmProvider
from zml.slurm.shape import Needs
from zml.slurm.table import STATES, Allocation, Row, State, became, look, rows

# From `squeue --noheader --states=all --format=%i|%T|%r|%N` of Slurm 22.05.
RECORDED = """\
3|RUNNING|None|n[2-3]
4|COMPLETED|None|n1
5|PENDING|Resources|
6|PENDING|BeginTime|
7|CANCELLED|None|
8|FAILED|NonZeroExitCode|n2
9|NODE_FAIL|None|n4
10|PENDING|PartitionNodeLimit|
11|PREEMPTED|None|n1
12|COMPLETING|NonZeroExitCode|n1
13_4|TIMEOUT|TimeLimit|n1
"""


def test_recorded_lines_are_understood() -> None:
    before = {"6": Allocation("6", State.RUNNING, nodes="n1"), "2": Allocation("2", State.RUNNING)}
    assert look(before, rows("squeue: warning: slow\n" + RECORDED)) == {
        "3": Allocation("3", State.RUNNING, "", "n[2-3]"),
        "4": Allocation("4", State.ENDED, "COMPLETED", "n1"),
        "5": Allocation("5", State.PENDING, "Resources"),
        "6": Allocation("6", State.REQUEUED, "BeginTime"),
        "7": Allocation("7", State.ENDED, "CANCELLED"),
        "8": Allocation("8", State.FAILED, "NonZeroExitCode", "n2"),
        "9": Allocation("9", State.FAILED, "NODE_FAIL", "n4"),
        "10": Allocation("10", State.PENDING, "PartitionNodeLimit", stuck=True),
        "11": Allocation("11", State.PREEMPTED, "PREEMPTED", "n1"),
        "12": Allocation("12", State.RUNNING, "NonZeroExitCode", "n1"),
        "13_4": Allocation("13_4", State.ENDED, "TimeLimit", "n1"),
        "2": Allocation("2", State.ENDED, "Slurm knows it no more"),
    }


def test_a_requeued_one_stays_so_until_it_runs_again() -> None:
    now: Allocation | None = None
    seen = []
    for word in ("PENDING", "RUNNING", "PENDING", "CONFIGURING", "RUNNING", "REQUEUE_HOLD", "COMPLETED"):
        now = became(now, Row("1", word, "None", ""))
        seen.append(now.state)
    pending, running, requeued = State.PENDING, State.RUNNING, State.REQUEUED
    assert seen == [pending, running, requeued, requeued, running, requeued, State.ENDED]


def test_a_state_that_a_newer_slurm_has_changes_nothing() -> None:
    before = Allocation("1", State.RUNNING)
    assert became(before, Row("1", "HIBERNATING", "None", "n1")).state is State.RUNNING


@given(words=st.lists(st.sampled_from([*STATES, "HIBERNATING"]), min_size=1, max_size=12))
def test_looking_twice_is_the_same_as_once(words: list[str]) -> None:
    known: dict[str, Allocation] = {}
    for word in words:
        known = look(known, [Row("1", word, "None", "")])
        assert look(known, [Row("1", word, "None", "")]) == known
    gone = look(known, [])
    assert gone["1"].state.over and look(gone, []) == gone


class Recorder:
    """Stands for Slurm's commands: notes what is called, and answers from a list."""

    def __init__(self, *answers: str | ZmlError) -> None:
        self.answers = list(answers)
        self.called: list[list[str]] = []
        self.texts: list[str] = []

    def __call__(self, words: list[str], *, text: str = "") -> str:
        self.called.append(list(words))
        self.texts.append(text)
        answer = self.answers.pop(0) if self.answers else ""
        if isinstance(answer, ZmlError):
            raise answer
        return answer


def provider(calls: Recorder) -> SlurmProvider:
    return SlurmProvider("pool", ["zml", "worker"], Needs(cpus=2, memory_mb=1000), call=calls)


def test_what_was_granted_before_a_refusal_counts() -> None:
    no = ZmlError(SLURM, "sbatch refuses: QOSMaxSubmitJobPerUserLimit")
    calls = Recorder("21\n", "22;cluster\n", no, no)
    asked = provider(calls)
    assert asked.ask(5) == ["21", "22"]
    with pytest.raises(ZmlError, match="QOSMax"):
        asked.ask(1)
    assert "exec zml worker" in calls.texts[0] and "#SBATCH --job-name=pool" in calls.texts[0]
    assert {each.id: each.state for each in asked.known.values()} == dict.fromkeys(
        ["21", "22"], State.PENDING
    )


def test_a_release_is_in_order_and_a_forgotten_one_does_not_come_back() -> None:
    calls = Recorder("21\n", "", "", "21|CANCELLED|None|\n", "21|CANCELLED|None|\n", "")
    asked = provider(calls)
    asked.ask(1)
    asked.release("21")
    assert calls.called[1:] == [
        ["scancel", "--quiet", "--state=PENDING", "21"],
        ["scancel", "--quiet", "--batch", "--signal=TERM", "21"],
    ]
    assert asked.look() == [Allocation("21", State.ENDED, "CANCELLED")]
    asked.forget("21")
    assert asked.look() == []


def test_a_refusal_counts_only_for_what_is_not_over() -> None:
    no = ZmlError(SLURM, "scancel refuses: exit code 1")
    asked = provider(Recorder("21\n", no, "21|COMPLETED|None|n1\n", no, "21|RUNNING|None|n1\n"))
    asked.ask(1)
    asked.release("21")
    with pytest.raises(ZmlError, match="scancel refuses"):
        asked.release("21", now=True)


def test_a_command_that_was_released_while_it_started_has_not_failed() -> None:
    asked = provider(Recorder("21\n", "", "", "21|FAILED|NonZeroExitCode|n1\n"))
    asked.ask(1)
    asked.release("21")
    assert asked.look() == [Allocation("21", State.ENDED, "released", "n1")]


# -- one contract --------------------------------------------------------------------------------------------

PATIENT = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "
    "print('up', flush=True); time.sleep(600)"
)


@pytest.fixture
def local() -> Iterator[Callable[..., LocalProvider]]:
    made: list[LocalProvider] = []

    def make(*command: str) -> LocalProvider:
        made.append(LocalProvider(command))
        return made[-1]

    yield make
    for each in made:
        each.close()


def until(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


def keeps_the_contract(one: Provider) -> None:
    """Of a provider whose command runs until SIGTERM."""

    def states() -> dict[str, State]:
        return {each.id: each.state for each in one.look()}

    first, second = one.ask(2)
    until(lambda: states() == {first: State.RUNNING, second: State.RUNNING})
    one.release(first)
    until(lambda: states()[first] is State.ENDED)
    assert states()[second] is State.RUNNING
    one.release(first)
    one.forget(first)
    one.forget(second)  # it runs: nothing is forgotten of it
    assert set(states()) == {second}
    one.release(second, now=True)
    until(lambda: states()[second].over)


def test_processes_of_this_machine_keep_the_contract(local: Callable[..., LocalProvider]) -> None:
    keeps_the_contract(local(sys.executable, "-c", PATIENT))


def test_a_process_is_told_the_id_of_its_allocation(local: Callable[..., LocalProvider]) -> None:
    code = "import sys; sys.exit(0 if sys.argv[1] == 'pool-' + sys.argv[2] else 3)"
    one, other = (local(sys.executable, "-c", code, f"pool-{ID}", ID) for _ in range(2))
    ids = [*one.ask(2), *other.ask(1)]
    assert len({*ids}) == 3, "no two are called alike, whoever has started them"
    until(lambda: {each.state for each in one.look() + other.look()} == {State.ENDED})


def test_nothing_begins_any_more_once_it_is_closed(local: Callable[..., LocalProvider]) -> None:
    """Also where another thread is about to begin many."""
    one = local("sleep", "600")
    asking = threading.Thread(target=one.ask, args=(200,))
    asking.start()
    until(lambda: one.processes)
    one.close()
    asking.join(60)
    assert len(one.processes) < 200 and {each.state for each in one.look()} == {State.FAILED}
    calls = Recorder("21\n")
    jobs = provider(calls)
    jobs.close()
    assert jobs.ask(3) == [] and not calls.called


def test_a_command_that_fails_is_a_failed_allocation(local: Callable[..., LocalProvider]) -> None:
    one = local(sys.executable, "-c", "import sys; sys.exit(3)")
    (id,) = one.ask(1)
    until(lambda: one.look() == [Allocation(id, State.FAILED, "exit code 3")])
    with pytest.raises(ZmlError, match="cannot run /no/such"):
        local("/no/such").ask(1)
