"""The gate: BSP, SSP, asynchronous; founders, latecomers, rests, losses."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zml.scheduler.ids import Seat, WorkerId
from zml.scheduler.staleness import Gate

W0, W1, W2 = WorkerId("w0"), WorkerId("w1"), WorkerId("w2")


def founders(*workers: WorkerId) -> list[Seat]:
    return [Seat(worker, 1, True) for worker in workers]


def gate(bound: int | None, *workers: WorkerId) -> Gate:
    made = Gate(bound)
    made.roster(founders(*workers))
    return made


def test_bsp_starts_a_clock_when_all_have_finished_the_one_before() -> None:
    bsp = gate(0, W0, W1)
    assert bsp.may_start(W0, 0)
    bsp.finish(W0, 0)
    assert not bsp.may_start(W0, 1) and bsp.waiting_for(1) == [W1]
    bsp.finish(W1, 0)
    assert bsp.may_start(W0, 1) and bsp.waiting_for(1) == []


def test_a_clock_is_complete_when_low_is_above_it() -> None:
    bsp = gate(0, W0, W1)
    bsp.finish(W0, 0)
    assert bsp.low == 0
    bsp.finish(W1, 0)
    assert bsp.low == 1


@pytest.mark.parametrize("bound", [1, 3])
def test_ssp_lets_a_worker_run_ahead_by_the_bound_and_no_further(bound: int) -> None:
    ssp = gate(bound, W0, W1)
    for clock in range(bound + 1):
        assert ssp.may_start(W0, clock)
        ssp.finish(W0, clock)
    assert not ssp.may_start(W0, bound + 1) and ssp.waiting_for(bound + 1) == [W1]
    ssp.finish(W1, 0)
    assert ssp.may_start(W0, bound + 1)


def test_without_a_bound_nobody_waits() -> None:
    free = gate(None, W0, W1)
    for clock in range(100):
        assert free.may_start(W0, clock) and free.waiting_for(clock) == []
        free.finish(W0, clock)
    assert free.low == 0


def test_founders_are_waited_for_before_they_say_a_word() -> None:
    bsp = gate(0, W0, W1)
    assert bsp.enter(W0) == 0
    bsp.finish(W0, 0)
    assert bsp.waiting_for(1) == [W1]


def test_a_latecomer_is_not_waited_for_until_it_enters_at_the_slowest_clock() -> None:
    ssp = gate(2, W0, W1)
    for clock in range(3):
        ssp.finish(W0, clock)
    ssp.finish(W1, 0)
    ssp.roster([*founders(W0, W1), Seat(W2, 1, False)])
    assert ssp.low == 1 and W2 not in ssp.active
    assert ssp.enter(W2) == 1
    ssp.finish(W1, 1)
    ssp.finish(W1, 2)
    assert ssp.low == 1 and ssp.waiting_for(4) == [W2]


def test_entering_twice_is_entering_once() -> None:
    bsp = gate(0, W0, W1)
    bsp.finish(W0, 0)
    assert bsp.enter(W0) == 1 and bsp.enter(W0) == 1
    assert bsp.frontier(W1) == 0


def test_finishing_and_advancing_twice_is_once() -> None:
    bsp = gate(0, W0)
    bsp.finish(W0, 4)
    bsp.finish(W0, 2)
    assert bsp.frontier(W0) == 5
    bsp.advance(W0, 9)
    bsp.advance(W0, 7)
    assert bsp.frontier(W0) == 9


def test_losing_the_slowest_opens_the_gate() -> None:
    bsp = gate(0, W0, W1)
    bsp.finish(W0, 0)
    assert not bsp.may_start(W0, 1)
    bsp.roster(founders(W0))
    assert bsp.may_start(W0, 1) and bsp.low == 1


def test_nobody_waits_for_a_worker_that_rests() -> None:
    bsp = gate(0, W0, W1)
    bsp.finish(W1, 0)
    bsp.advance(W1, 10)
    for clock in range(10):
        assert bsp.may_start(W0, clock)
        bsp.finish(W0, clock)
    assert bsp.may_start(W0, 10) and bsp.low == 10


def test_who_comes_back_from_a_rest_begins_where_the_slowest_stands() -> None:
    bsp = gate(0, W0, W1)
    bsp.finish(W0, 0)
    bsp.finish(W1, 0)
    bsp.advance(W1, 10)
    bsp.finish(W0, 1)
    assert bsp.enter(W1) == 2
    assert bsp.waiting_for(3) == [W0, W1]


def test_a_restarted_worker_uses_no_clock_again_that_its_former_self_has_finished() -> None:
    bsp = gate(0, W0, W1)
    bsp.finish(W1, 0)  # acknowledged: it counts
    bsp.roster([Seat(W0, 1, True), Seat(W1, 2, False)])
    assert bsp.low == 0
    assert bsp.enter(W1) == 1


def test_a_new_incarnation_has_to_enter_itself() -> None:
    bsp = gate(0, W0, W1)
    bsp.roster([Seat(W0, 1, True), Seat(W1, 2, False)])
    assert W1 not in bsp.active
    bsp.finish(W0, 0)
    assert bsp.may_start(W0, 1)


def test_when_all_have_left_a_newcomer_begins_where_the_furthest_got() -> None:
    ssp = gate(5, W0, W1)
    for clock in range(4):
        ssp.finish(W0, clock)
    ssp.roster([Seat(W2, 1, False)])
    assert ssp.low is None and ssp.may_start(W2, 99)
    assert ssp.enter(W2) == 4


def test_seniority_is_the_order_of_the_rosters_and_outlives_the_worker() -> None:
    bsp = gate(0, W1, W0)
    bsp.roster([Seat(W0, 1, True), Seat(W1, 2, False), Seat(W2, 1, False)])
    assert bsp.senior() == W0
    bsp.roster([Seat(W1, 2, False), Seat(W2, 1, False)])
    assert bsp.senior() == W1
    assert bsp.in_seniority([W2, W1, W0]) == [W0, W1, W2], "w0 has left; a step of its own still counts"


def test_a_stranger_does_not_enter() -> None:
    with pytest.raises(AssertionError, match="w2 is not in the roster"):
        gate(0, W0).enter(W2)


class Training(RuleBasedStateMachine):
    """Honest workers under one gate: they enter, compute when they may, rest, come back, die and are born.

    The invariant, exactly: at every moment, not only when it starts, a worker that computes clock c sees
    low >= c - s; so no two computing workers are more than s clocks apart.
    """

    @initialize(bound=st.sampled_from([0, 1, 4, None]), workers=st.integers(1, 4))
    def begin(self, bound: int | None, workers: int) -> None:
        self.gate = Gate(bound)
        self.seats = [Seat(WorkerId(f"w{n}"), 1, True) for n in range(workers)]
        self.born = workers
        self.gate.roster(self.seats)
        self.clocks: dict[WorkerId, int] = {}  # who has entered: the clock it computes next, or now
        self.computing: set[WorkerId] = set()
        self.resting: set[WorkerId] = set()
        self.steps: set[tuple[WorkerId, int]] = set()  # finished; the shard has acknowledged them
        self.low = self.gate.low

    def some(self, choice: int, among: list[WorkerId]) -> WorkerId:
        return among[choice % len(among)]

    @rule(choice=st.integers(0, 9))
    def enters(self, choice: int) -> None:
        if self.seats:
            worker = self.some(choice, [seat.worker for seat in self.seats])
            clock = self.gate.enter(worker)
            if worker in self.clocks and worker not in self.resting:
                assert clock == self.clocks[worker]
            self.clocks[worker] = clock
            self.resting.discard(worker)

    @rule(choice=st.integers(0, 9))
    def starts(self, choice: int) -> None:
        idle = [w for w in self.clocks if w not in self.computing | self.resting]
        if idle:
            worker = self.some(choice, idle)
            waiting = self.gate.waiting_for(self.clocks[worker])
            assert self.gate.may_start(worker, self.clocks[worker]) == (not waiting)
            assert worker not in waiting
            if not waiting:
                self.computing.add(worker)

    @precondition(lambda self: self.computing)
    @rule(choice=st.integers(0, 9))
    def finishes(self, choice: int) -> None:
        worker = self.some(choice, sorted(self.computing))
        self.computing.remove(worker)
        step = (worker, self.clocks[worker])
        assert step not in self.steps, "a clock was used twice by one worker"
        self.steps.add(step)
        self.gate.finish(*step)
        self.clocks[worker] += 1

    @rule(choice=st.integers(0, 9), clocks=st.integers(1, 6))
    def rests(self, choice: int, clocks: int) -> None:
        idle = [w for w in self.clocks if w not in self.computing | self.resting]
        if idle:
            worker = self.some(choice, idle)
            self.gate.advance(worker, self.clocks[worker] + clocks)
            self.resting.add(worker)

    @rule(choice=st.integers(0, 9), again=st.booleans())
    def dies(self, choice: int, again: bool) -> None:
        if self.seats:
            seat = self.seats.pop(choice % len(self.seats))
            self.clocks.pop(seat.worker, None)
            self.computing.discard(seat.worker)
            self.resting.discard(seat.worker)
            if again:
                self.seats.append(Seat(seat.worker, seat.incarnation + 1, False))
            self.gate.roster(self.seats)

    @rule()
    def is_born(self) -> None:
        if len(self.seats) < 6:
            self.seats.append(Seat(WorkerId(f"w{self.born}"), 1, False))
            self.born += 1
            self.gate.roster(self.seats)

    @invariant()
    def nobody_computes_beyond_the_bound(self) -> None:
        bound = self.gate.bound
        for worker in self.computing:
            assert self.gate.low is not None
            assert bound is None or self.gate.low >= self.clocks[worker] - bound
        clocks = [self.clocks[worker] for worker in self.computing]
        assert bound is None or not clocks or max(clocks) - min(clocks) <= bound

    @invariant()
    def low_never_falls_while_anybody_is_active(self) -> None:
        low = self.gate.low
        if low is not None and self.low is not None:
            assert low >= self.low
        self.low = low if low is not None else self.low

    @invariant()
    def the_slowest_is_never_kept_waiting(self) -> None:
        if self.gate.active:
            slowest = min(self.gate.active, key=self.gate.frontier)
            assert self.gate.may_start(slowest, self.gate.frontier(slowest))

    @invariant()
    def a_complete_clock_has_a_step_of_everyone_who_computes(self) -> None:
        """BSP: whoever computes clock t does so while t is not complete, so no step comes too late for its mean."""
        if self.gate.bound == 0:
            assert {self.clocks[worker] for worker in self.computing} <= {self.gate.low}

    @invariant()
    def seniority_is_the_order_of_the_roster(self) -> None:
        names = [seat.worker for seat in self.seats]
        assert self.gate.in_seniority(sorted(names)) == names


Training.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestTraining = Training.TestCase
