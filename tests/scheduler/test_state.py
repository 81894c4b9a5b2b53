"""The tables are whole, and the checks see what is wrong."""

from dataclasses import replace

import pytest

from tests.scheduler.play import JOB, Play, running
from zml.scheduler.ids import WorkerId
from zml.scheduler.membership import Alive
from zml.scheduler.state import NEXT, OUTCOME, Cause, Forming, Job, Loading, Running, State


def test_every_cause_that_leads_to_finishing_has_an_outcome_and_no_other() -> None:
    finishing = {cause for row in NEXT.values() for cause, state in row.items() if state is State.FINISHING}
    assert finishing == OUTCOME.keys()


def test_every_state_that_is_not_over_can_be_left() -> None:
    assert {state for state in State if not state.over} == {*NEXT, State.FINISHING}
    assert {state for state in State if state.over} == set(OUTCOME.values())


def test_nothing_leads_back() -> None:
    order = list(State)
    for state, row in NEXT.items():
        assert all(order.index(following) > order.index(state) for following in row.values())


def test_every_cause_is_used() -> None:
    assert set(Cause) == {cause for row in NEXT.values() for cause in row}


def job_of(play: Play) -> Job:
    return play.machine.jobs[JOB]


def test_a_job_that_is_complete_and_does_not_run_is_found() -> None:
    job = job_of(running(1, 1))
    job.phase, job.generation = Forming(), 0
    with pytest.raises(AssertionError, match="everybody is here, and it does not run"):
        job.check()


def test_a_former_initialiser_is_found() -> None:
    play = running(2, 1)
    play.register("w0")
    job = job_of(play)
    assert isinstance(job.phase, Running) and isinstance(job.phase.parameters, Loading)
    job.phase = Running(replace(job.phase.parameters, initialiser=WorkerId("w1")))
    with pytest.raises(AssertionError, match="w0 is senior to the initialiser"):
        job.check()


def test_a_latecomer_that_is_senior_to_a_founder_is_found() -> None:
    job = job_of(running(2, 1))
    record = job.members.records[WorkerId("w0")]
    assert isinstance(record, Alive)
    job.members._enter(WorkerId("w0"), replace(record, founder=False))
    with pytest.raises(AssertionError, match="a founder is junior to a latecomer"):
        job.check()
