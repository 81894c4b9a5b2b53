"""As many nodes as it takes for everybody to have a whole place, beside what runs; and no more."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.cluster.views import GPU, node, on, request, view
from zml.scheduler.cluster.autoscale import Bounds, Watch, decide, pays_for, reach_of
from zml.scheduler.cluster.fewest import idlest
from zml.scheduler.cluster.plan import Candidate
from zml.scheduler.cluster.policies import POLICIES
from zml.scheduler.cluster.resources import Node, NodeId, Resources

KIND = node("pool-", gpus=0, cpus=4)
BIG = node("big", gpus=0, cpus=64)
BOUNDS = Bounds(most=8, idle_s=0)


def job(name: str, cpus: int, *at: str, workers: int = 1) -> Candidate:
    asked = request(name, workers, worker=Resources(cpus=cpus))
    return Candidate(request=asked, allocation=on(*at) if at else None)


def pooled(count: int) -> tuple[Node, ...]:
    return tuple(replace(KIND, id=NodeId(f"pool-{i}")) for i in range(count))


def wanted(have: int, *jobs: Candidate, others: tuple[Node, ...] = (), bounds: Bounds = BOUNDS) -> int:
    seen = view(100, (*others, *pooled(have)), *jobs)
    return decide(seen, have, reach_of(KIND, bounds, others), bounds, Watch()).nodes


def test_shares_of_nodes_are_no_place() -> None:
    """12 CPUs are those of three nodes, and four workers that take 3 each need four."""
    assert wanted(0, *(job(f"j{i}", 3) for i in range(4))) == 4
    assert wanted(3, *(job(f"j{i}", 3, f"pool-{i}") for i in range(3)), job("j3", 3)) == 4


def test_who_runs_stays_where_he_is_and_who_waits_gets_a_node_beside_him() -> None:
    half = [job("a", 2, "pool-0"), job("b", 2, "pool-1")]
    assert wanted(2, *half, job("c", 4)) == 3, "they could share a node, but they do not"
    assert wanted(2, *half, job("c", 2)) == 2


def test_a_node_goes_only_if_what_it_runs_finds_room_on_the_others() -> None:
    assert wanted(2, job("a", 2, "pool-0"), job("b", 2, "pool-1")) == 1
    # In other places these would do with two nodes of 6 CPUs; in those that are left there is none for e.
    kind = node("pool-", gpus=0, cpus=6)
    here = tuple(replace(kind, id=NodeId(f"pool-{i}")) for i in range(3))
    at = [("a", 3, 0), ("b", 2, 0), ("c", 3, 1), ("d", 2, 1), ("e", 2, 2)]
    jobs = [job(name, cpus, f"pool-{where}") for name, cpus, where in at]
    assert decide(view(100, here, *jobs), 3, reach_of(kind, BOUNDS), BOUNDS, Watch()).nodes == 3


def test_what_stands_on_nodes_that_are_not_of_the_pool_needs_none_of_it() -> None:
    runs = job("wide", 1, *["big"] * 16, workers=16)
    assert wanted(0, runs, others=(BIG,)) == 0
    assert wanted(4, runs, others=(BIG,)) == 0, "and keeps none"
    assert wanted(0, runs, job("waits", 4), others=(BIG,)) == 0, "it has room there"
    full = job("wide", 1, *["big"] * 62, workers=62)
    assert wanted(0, full, job("waits", 4), others=(BIG,)) == 1
    assert wanted(0, full, job("a", 2), job("b", 2), others=(BIG,)) == 1, "one beside it, one on a new node"
    leaves = replace(BIG, leaving=True)
    assert wanted(0, job("a", 2, "big"), others=(leaves,)) == 1, "it has to go somewhere"


def test_who_waits_for_a_node_that_is_not_of_the_pool_asks_for_none_of_it_in_vain() -> None:
    own = node("own", gpus=1, cpus=4)
    asked = request("gpu", worker=GPU, shard=Resources(cpus=4))
    runs = Candidate(request=request("runs", worker=GPU), allocation=on("own"))
    waits = Candidate(request=replace(asked, shards=2))
    for have in (0, 1, 2):
        assert wanted(have, runs, waits, others=(own,)) == 1, "for a shard that has no room on the other"


def test_a_budget_is_counted_as_it_is_written() -> None:
    assert [pays_for(3.3, 1.1), pays_for(0.3, 0.1), pays_for(3.29, 1.1), pays_for(6, 0.9)] == [3, 3, 2, 6]


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3)), min_size=1, max_size=10
    ),
    policy=st.sampled_from(["fifo", "las"]),
    own=st.integers(0, 2),
)
def test_everybody_gets_his_place_and_nodes_do_not_come_and_go(
    sizes: list[tuple[int, int, int]], policy: str, own: int
) -> None:
    """Jobs come by and by, with shards too. In the end all run, and then nodes go for good."""
    others = tuple(node(f"own{i}", gpus=0, cpus=5) for i in range(own))
    bounds = Bounds(most=60, idle_s=0)
    waiting = [
        Candidate(
            request=request(
                f"j{i}", workers, worker=Resources(cpus=cpus), shard=Resources(cpus=1) * bool(shards),
                shards=max(1, shards), submitted=float(i),
            )
        )
        for i, (cpus, workers, shards) in enumerate(sizes)
    ]  # fmt: skip
    jobs: list[Candidate] = []
    here: dict[NodeId, Node] = {}
    made = 0
    counts = []
    for now in range(60):
        jobs += [waiting.pop(0)] if waiting else []
        machines = (*others, *here.values())
        plan = POLICIES[policy](view(float(now), machines, *jobs))
        jobs = [replace(each, allocation=plan.verdicts[each.request.job].allocation) for each in jobs]
        seen = view(float(now), machines, *jobs)
        count = decide(seen, len(here), reach_of(KIND, bounds, others), bounds, Watch()).nodes
        while len(here) < count:
            made += 1
            here[NodeId(f"pool-{made}")] = replace(KIND, id=NodeId(f"pool-{made}"))
        for name in idlest(seen, here)[: len(here) - count]:
            del here[name]
        counts.append((len(here), made, sum(each.allocation is None for each in jobs)))
    assert counts[-1] == counts[-10], "nobody comes or goes any more"
    assert counts[-1][2] == 0, "and nobody waits"


@pytest.mark.parametrize("have", [0, 150, 400])
def test_a_thousand_jobs_are_counted_by_placing_few_of_them_on_many_nodes(have: int) -> None:
    """All of one kind: so many as fit on whole nodes."""
    jobs = [job(f"j{i}", 3, *([f"pool-{i}"] if i < have else [])) for i in range(1000)]
    assert wanted(have, *jobs, bounds=Bounds(most=2000, idle_s=0)) == 1000
    assert wanted(have, *jobs, bounds=Bounds(most=500, idle_s=0)) == 500
