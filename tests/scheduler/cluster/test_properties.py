"""What holds for every policy, whatever it is shown: capacity, gangs, verdicts, nobody delayed, nobody starving."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.cluster.views import GPU, node, nodes, request, view
from zml.scheduler.cluster.order import in_order, least_served
from zml.scheduler.cluster.placement import Room, place, takes
from zml.scheduler.cluster.plan import Allocation, Candidate, Plan, Quota, View, Why
from zml.scheduler.cluster.policies import POLICIES
from zml.scheduler.cluster.request import Request
from zml.scheduler.cluster.resources import NOTHING, Node, NodeId, Resources

NAMES = sorted(POLICIES)
KINDS = [GPU, Resources(cpus=2), Resources(cpus=1, gpus=2, memory_mb=100)]
SHARDS = [NOTHING, Resources(cpus=1, memory_mb=50)]


class Diminishing:
    """A profile: the k-th worker adds 1/k."""

    def goodput(self, workers: int, nodes: int) -> float:
        return sum(1 / k for k in range(1, workers + 1)) * (1.0 if nodes == 1 else 0.9)


@st.composite
def requests(draw: st.DrawFn, name: str) -> Request:
    least = draw(st.integers(1, 5))
    shards = draw(st.integers(1, 3))
    return request(
        name,
        least,
        least + draw(st.integers(0, 5)),
        submitted=float(draw(st.integers(0, 50))),
        priority=draw(st.integers(0, 1)),
        user=draw(st.sampled_from(["ada", "bob"])),
        preemptible=draw(st.booleans()),
        time_limit_s=draw(st.sampled_from([None, 10.0, 1000.0])),
        worker=draw(st.sampled_from(KINDS)),
        shard=draw(st.sampled_from(SHARDS)),
        shards=shards,
        replicas=draw(st.integers(0, 1)) if shards > 1 else 0,
    )


@st.composite
def views(draw: st.DrawFn) -> View:
    """Nodes, some leaving, and jobs, of which some hold what a policy could have given them."""
    machines = tuple(
        node(
            f"n{i}",
            gpus=draw(st.integers(0, 4)),
            cpus=draw(st.integers(0, 8)),
            memory_mb=400,
            rack=f"r{i % 2}",
        )
        for i in range(draw(st.integers(1, 5)))
    )
    room = Room(machines)
    jobs = []
    for i in range(draw(st.integers(0, 8))):
        asked = draw(requests(f"j{i}"))
        allocation = None
        if draw(st.booleans()):
            allocation = place(room, asked, draw(st.integers(asked.least, asked.most)))
            if allocation is not None:
                room.take_all(allocation, asked)
        draining = allocation is not None and draw(st.integers(0, 5)) == 0
        ending = allocation is not None and not draining and draw(st.integers(0, 5)) == 0
        jobs.append(
            Candidate(
                request=asked,
                allocation=allocation,
                since=60.0,
                attained_s=float(draw(st.sampled_from([0, 10, 100_000]))),
                changes=draw(st.integers(0, 2)),
                runnable=draw(st.integers(0, 5)) > 0,
                draining=draining,
                ending=ending,
                profile=draw(st.sampled_from([None, Diminishing()])),
            )
        )
    machines = tuple(replace(m, leaving=draw(st.integers(0, 4)) == 0) for m in machines)
    return View(now=100.0, nodes=machines, jobs=tuple(jobs))


def used(machines: Sequence[Node], held: Sequence[tuple[Request, Allocation]]) -> dict[NodeId, Resources]:
    found = {machine.id: NOTHING for machine in machines}
    for asked, allocation in held:
        for at, amount in takes(allocation, asked).items():
            found[at] = found[at] + amount
    return found


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(seen=views())
def test_a_plan_keeps_to_what_there_is(name: str, seen: View) -> None:
    plan = POLICIES[name](seen)
    assert plan.verdicts.keys() == {job.request.job for job in seen.jobs}
    offers = {machine.id: machine.offers for machine in seen.nodes}
    leaving = {machine.id for machine in seen.nodes if machine.leaving}
    planned, until_then = [], []
    for job in seen.jobs:
        verdict = plan.verdicts[job.request.job]
        assert verdict.because
        given = verdict.allocation
        if given is not None:
            planned.append((job.request, given))
            # Gang: at least what it needs, with all its shards.
            assert job.request.least <= len(given.workers) <= job.request.most
            assert len(given.shards) == job.request.shards
            assert not given.nodes & leaving
            assert verdict.why in (Why.RUNS, Why.STARTS, Why.GROWS, Why.SHRINKS)
            assert job.runnable and not job.draining
            if job.ending:
                assert job.allocation is not None
                assert given.shards == job.allocation.shards
                assert not Counter(given.workers) - Counter(job.allocation.workers)
        else:
            assert verdict.why not in (Why.RUNS, Why.STARTS, Why.GROWS, Why.SHRINKS)
        if job.allocation is not None:
            until_then.append((job.request, job.allocation))
    for at, amount in used(seen.nodes, planned).items():
        assert offers[at].holds(amount)
    # It can be carried out at once: what each has and what each gets beyond that fit together.
    for at in offers:
        most = NOTHING
        for job in seen.jobs:
            has = takes(job.allocation, job.request).get(at, NOTHING) if job.allocation else NOTHING
            given = plan.verdicts[job.request.job].allocation
            gets = takes(given, job.request).get(at, NOTHING) if given else NOTHING
            most = most + Resources(
                cpus=max(has.cpus, gets.cpus),
                gpus=max(has.gpus, gets.gpus),
                memory_mb=max(has.memory_mb, gets.memory_mb),
            )
        assert offers[at].holds(most), at


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(seen=views(), gpus=st.integers(0, 8), workers=st.integers(0, 8), held=st.integers(0, 2))
def test_nobody_who_gets_anything_has_more_than_his_quota_at_any_moment(
    name: str, seen: View, gpus: int, workers: int, held: int
) -> None:
    quota = Quota(gpus=gpus, workers=workers)
    seen = replace(seen, quotas={"ada": quota}, held={"ada": GPU * held}, held_workers={"ada": held})
    plan = POLICIES[name](seen)
    gets, has_gpus, has_workers = False, held, held
    for job in seen.jobs:
        had, given = job.allocation, plan.verdicts[job.request.job].allocation
        before, after = (0 if each is None else len(each.workers) for each in (had, given))
        if job.request.user == "ada":
            gets = gets or after > before
            has_workers += max(before, after)
            has_gpus += job.request.worker.gpus * max(before, after)
    assert not gets or (has_gpus <= gpus and has_workers <= workers)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=20, deadline=None)
@given(seen=views())
def test_a_plan_depends_on_the_view_alone(name: str, seen: View) -> None:
    assert POLICIES[name](seen) == POLICIES[name](seen)


@settings(max_examples=100, deadline=None)
@given(seen=views())
def test_nobody_who_comes_later_keeps_a_waiting_job_from_room_that_could_be_made(seen: View) -> None:
    """Backfill and growth cost the first in the order nothing: what waits would not fit if all preemptible jobs
    behind it, and all workers above the least, were gone."""
    plan = POLICIES["fifo"](seen)
    order = in_order(seen, lambda job, now: ())
    first = next((j for j in order if plan.verdicts[j.request.job].why is Why.BEHIND), None)
    for job in order:
        why = plan.verdicts[job.request.job].why
        if why is Why.NO_ROOM and "it waits" not in plan.verdicts[job.request.job].because:
            first = job
            break
        if job is first:
            break
    if first is None or not first.request.preemptible:
        return
    room = Room([machine for machine in seen.nodes if not machine.leaving])
    behind = {job.request.job for job in order[order.index(first) :] if job.request.preemptible}
    for job in order:
        given = plan.verdicts[job.request.job].allocation
        if given is not None and job.request.job not in behind:
            room.take_all(Allocation(given.workers[: job.request.least], given.shards), job.request)
        elif (
            given is None
            and plan.verdicts[job.request.job].why in (Why.NO_ROOM, Why.PREEMPTED)
            and job is not first
        ):
            return  # room is reserved for somebody before it
    found = place(room, first.request, first.request.least)
    assert found is None or any(
        plan.verdicts[job.request.job].allocation and not job.request.preemptible for job in order
    )


# -- nobody starves --------------------------------------------------------------------------------------


def play(plan: Plan, jobs: list[Candidate], now: float, seconds: float) -> list[Candidate]:
    """Carry a plan out at once, and let time pass."""
    after = []
    for job in jobs:
        has = plan.verdicts[job.request.job].allocation
        since = job.since if (has is None) == (job.allocation is None) else now
        served = seconds * len(has.workers) if has is not None else 0.0
        after.append(replace(job, allocation=has, since=since, attained_s=job.attained_s + served))
    return after


@dataclass(frozen=True)
class Arrival:
    size: int
    wider: int
    preemptible: bool
    priority: int
    scales: bool


arrivals = st.builds(
    Arrival,
    size=st.integers(1, 8),
    wider=st.integers(0, 4),
    preemptible=st.booleans(),
    priority=st.integers(-1, 0),
    scales=st.booleans(),
)


@settings(max_examples=10, deadline=None)
@given(
    big=st.integers(1, 8),
    wider=st.integers(0, 4),
    kinds=st.lists(arrivals, min_size=1, max_size=6),
    lasts=st.integers(1, 4),
    name=st.sampled_from(["fifo", "las", "zml", "srtf"]),
)
def test_a_job_that_fits_runs_whatever_of_its_priority_or_below_keeps_arriving(
    big: int, wider: int, kinds: list[Arrival], lasts: int, name: str
) -> None:
    machines, round_s = nodes(2), 3_600.0
    patient = request("patient", big, big + wider, submitted=0.0)
    jobs = [Candidate(request=patient, attained_s=big * 20_000.0, profile=Diminishing())]
    now, number = 0.0, 0
    for _ in range(60 + 50 * lasts):  # due after 50 hours; until then 40 jobs may have come before it
        for kind in kinds:  # more than the nodes can do, for ever
            asked = request(
                f"new{number}",
                kind.size,
                kind.size + kind.wider,
                submitted=now,
                preemptible=kind.preemptible,
                priority=kind.priority,
            )
            profile = Diminishing() if kind.scales else None
            jobs.append(Candidate(request=asked, since=now, left_s=1.0, profile=profile))
            number += 1
        for _ in range(2):  # what is taken away is given at once
            plan = POLICIES[name](view(now, machines, *jobs))
            jobs = play(plan, jobs, now, 0.0)
        jobs = play(plan, jobs, now, round_s)
        if jobs[0].allocation is not None:
            return
        now += round_s
        done = {j.request.job for j in jobs[1:] if j.attained_s >= lasts * round_s * j.request.least}
        waiting = [j for j in jobs[1:] if j.request.job not in done]
        run = [j for j in waiting if j.allocation is not None]
        jobs = [jobs[0], *run, *[j for j in waiting if j.allocation is None][:40]]
    raise AssertionError(f"it waited for {now:g} s")


def test_who_starves_goes_first_and_keeps_its_place_for_a_while() -> None:
    long = Candidate(request=request("long", 4, submitted=0.0), attained_s=4 * 20_000.0)
    new = Candidate(request=request("new", 4, submitted=170_000.0))
    waited = 20_000.0 * 9

    def first(now: float, job: Candidate) -> str:
        return in_order(view(now, nodes(1), job, new), least_served)[0].request.job

    assert first(waited - 1, long) == "new"
    assert first(waited, long) == "long"
    running = replace(long, allocation=Allocation((NodeId("n00"),) * 4, (NodeId("n00"),)))
    assert first(waited + 3_600, replace(running, attained_s=4 * 23_600.0)) == "long"
    assert first(waited + 21_000, replace(running, attained_s=4 * 41_000.0)) == "new"
