"""No node is kept for who could not begin on all that there can be, and he is told."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.cluster.test_properties import requests
from tests.scheduler.cluster.views import node, request, view
from zml.scheduler.cluster.autoscale import Bounds, Watch, decide, reach_of
from zml.scheduler.cluster.placement import Room, place
from zml.scheduler.cluster.plan import Candidate, Quota
from zml.scheduler.cluster.reach import Reach
from zml.scheduler.cluster.request import Request
from zml.scheduler.cluster.resources import Node, NodeId, Resources

CPU = Resources(cpus=1)
PAIR = node("pool-", gpus=0, cpus=2)


def settled(reach: Reach, bounds: Bounds, have: int, *jobs: Candidate, **more: object) -> tuple[int, str]:
    """How many nodes there are once everybody has waited for long, and why."""
    watch, because, now = Watch(), "", 100.0
    for _ in range(4):
        seen = replace(view(now, (), *jobs), **more)  # type: ignore[arg-type]
        decision = decide(seen, have, reach, bounds, watch)
        have, watch, because = decision.nodes, decision.watch, decision.because
        now += bounds.idle_s
    return have, because


def test_no_node_stays_for_a_job_that_needs_more_than_the_pool_may_have() -> None:
    bounds = Bounds(most=2, idle_s=8)
    wide = Candidate(request=request("wide", 6, worker=CPU))
    reach = reach_of(PAIR, bounds)
    assert settled(reach, bounds, 2, wide) == (
        0,
        "no node is needed; of no use to wide, which would not fit on all that there can be",
    )
    narrow = Candidate(request=request("narrow", 1, worker=CPU))
    assert settled(reach, bounds, 2, wide, narrow)[0] == 1
    beside = reach_of(PAIR, bounds, [node("own", cpus=2)])
    assert settled(beside, bounds, 0, wide)[0] == 2, "with the one that is not of the pool it fits"


def test_no_node_stays_for_who_may_not_have_it() -> None:
    bounds = Bounds(most=4, idle_s=8)
    jobs = [Candidate(request=request(f"j{i}", 2, worker=CPU, user="ada")) for i in range(3)]
    quotas = {"ada": Quota(workers=4)}
    assert settled(reach_of(PAIR, bounds), bounds, 0, *jobs)[0] == 3
    assert settled(reach_of(PAIR, bounds), bounds, 3, *jobs, quotas=quotas)[0] == 2
    assert settled(reach_of(PAIR, bounds), bounds, 3, *jobs, quotas={"ada": Quota(cpus=1)})[0] == 0
    leave = {"ada": 2}  # workers that are on their way out, of jobs that go on
    assert settled(reach_of(PAIR, bounds), bounds, 3, *jobs, quotas=quotas, held_workers=leave)[0] == 1


def test_as_many_come_as_one_job_needs_even_where_their_sum_would_be_enough() -> None:
    shards = request("a", 1, worker=Resources(cpus=2), shard=Resources(cpus=3), shards=2)
    bounds = Bounds(most=5)
    reach = reach_of(node("pool-", cpus=4), bounds)
    assert settled(reach, bounds, 0, Candidate(request=shards))[0] == 3


@pytest.mark.parametrize(
    ("asked", "others", "said"),
    [
        (
            request("a", worker=Resources(cpus=8)),
            (),
            "no node of the pool has 8 CPUs for one worker; each has 2 CPUs",
        ),
        (
            request("a", worker=Resources(cpus=8)),
            (node("own", cpus=4),),
            "no node of the pool has 8 CPUs for one worker; each has 2 CPUs, and no other node that is here has",
        ),
        (request("a", 6, worker=CPU), (), "it needs 3 nodes: the pool has 2 at most"),
        (
            request("a", 9, worker=CPU),
            (node("own", cpus=4),),
            "9 workers with 1 CPU each do not fit on the 1 node that is not of the pool and all that it may have: "
            "the pool has 2 at most",
        ),
    ],
)
def test_who_cannot_begin_is_told_what_there_can_be(
    asked: Request, others: tuple[Node, ...], said: str
) -> None:
    reach = reach_of(PAIR, Bounds(most=2), others)
    assert reach.nodes_for(asked) is None
    assert reach.why_not(asked) == said


@settings(max_examples=60, deadline=None)
@given(data=st.data(), most=st.integers(0, 4), have=st.integers(0, 6))
def test_after_a_while_no_node_is_kept_for_who_does_not_fit_on_what_can_be_had(
    data: st.DataObject, most: int, have: int
) -> None:
    """The answer is the same as if they had never come."""
    bounds = Bounds(most=most, idle_s=8)
    kind = node("pool-", gpus=data.draw(st.integers(0, 4)), cpus=data.draw(st.integers(1, 8)), memory_mb=400)
    others = tuple(
        node(f"own{i}", gpus=1, cpus=2, memory_mb=100) for i in range(data.draw(st.integers(0, 2)))
    )
    jobs = [Candidate(request=data.draw(requests(f"j{i}"))) for i in range(data.draw(st.integers(0, 5)))]
    all_of_it = [*others, *(replace(kind, id=NodeId(f"pool-{i}")) for i in range(most))]

    def fits(job: Candidate) -> bool:
        return place(Room(all_of_it), job.request, job.request.least) is not None

    reach = reach_of(kind, bounds, others)
    kept = settled(reach, bounds, have, *jobs)[0]
    able = [job for job in jobs if fits(job)]
    assert kept <= most
    assert kept == settled(reach, bounds, have, *able)[0]
    if not able:
        assert kept == 0
    for job in able:
        assert reach.nodes_for(job.request) is not None
