"""Who gets how many workers, and how many nodes there should be."""

from dataclasses import dataclass, replace

from tests.scheduler.cluster.views import node, nodes, on, request, told, view
from zml.scheduler.cluster.autoscale import Bounds, Watch, decide, reach_of
from zml.scheduler.cluster.plan import Candidate
from zml.scheduler.cluster.policies import POLICIES

zml = POLICIES["zml"]


@dataclass(frozen=True)
class Scales:
    """The k-th worker is worth share^k."""

    share: float
    apart: float = 1.0

    def goodput(self, workers: int, nodes: int) -> float:
        sums = sum(self.share**k for k in range(workers))
        return sums * (self.apart if nodes > 1 else 1.0)


def job(name: str, share: float, *at: str, least: int = 1, most: int = 8, changes: int = 0) -> Candidate:
    return Candidate(
        request=request(name, least, most),
        allocation=on(*at) if at else None,
        attained_s=1_000.0,
        changes=changes,
        profile=Scales(share),
    )


def test_workers_go_where_they_teach_most() -> None:
    good, poor = job("good", 0.95, "n00"), job("poor", 0.1, "n00")
    assert told(zml(view(10_000, nodes(1), good, poor))) == {
        "good": ("GROWS", ("n00", "n00", "n00")),
        "poor": ("RUNS", ("n00",)),
    }


def test_a_job_that_changed_too_often_stays_as_it_is() -> None:
    calm, restless = job("a", 0.95, "n00"), job("a", 0.95, "n00", changes=300)
    assert told(zml(view(10_000, nodes(1), calm)))["a"] == ("GROWS", ("n00",) * 4)
    assert told(zml(view(10_000, nodes(1), restless)))["a"] == ("RUNS", ("n00",))


def test_a_plan_that_was_carried_out_is_followed_by_none() -> None:
    """No flapping: what the policy made of a view, it leaves."""
    jobs = [job(f"j{i}", 0.7 + 0.05 * i, f"n{i % 4:02}") for i in range(6)]
    now, machines = 10_000.0, nodes(4)
    for _ in range(3):
        plan = zml(view(now, machines, *jobs))
        jobs = [replace(j, allocation=plan.verdicts[j.request.job].allocation) for j in jobs]
    again = zml(view(now + 60, machines, *jobs))
    assert {why for why, _ in told(again).values()} == {"RUNS"}


def test_a_new_job_gets_its_least_from_whoever_has_most_above_what_he_should() -> None:
    rich = job("rich", 0.9, "n00", "n00", "n00", "n00")
    new = replace(job("new", 0.9), request=request("new", 1, 1), profile=None)
    seen = told(zml(view(10_000, nodes(1), rich, new)))
    assert seen["rich"][0] == "SHRINKS" and seen["new"] == ("NO_ROOM", None)


# -- nodes -----------------------------------------------------------------------------------------------

KIND = node("new")


def nodes_for(now: float, have: int, bounds: Bounds, watch: Watch, *jobs: Candidate) -> tuple[int, Watch]:
    decision = decide(view(now, nodes(have), *jobs), have, reach_of(KIND, bounds), bounds, watch)
    assert decision.because
    return decision.nodes, decision.watch


def test_nodes_come_at_once_and_go_after_a_while() -> None:
    bounds = Bounds(most=10, low=0.5, high=0.8, idle_s=300)
    busy = [Candidate(request=request(f"j{i}", 4)) for i in range(3)]
    assert nodes_for(0, 1, bounds, Watch(), *busy) == (3, Watch())
    assert nodes_for(0, 5, bounds, Watch(), *busy) == (5, Watch(0))
    assert nodes_for(299, 5, bounds, Watch(0), *busy) == (5, Watch(0))
    assert nodes_for(300, 5, bounds, Watch(0), *busy) == (3, Watch())
    assert nodes_for(100, 3, bounds, Watch(0), *busy) == (3, Watch())


def test_a_count_that_is_about_right_stays() -> None:
    bounds = Bounds(most=20, low=0.4, high=0.8)
    jobs = [replace(job(f"j{i}", 0.8), request=request(f"j{i}", 1, 16)) for i in range(4)]
    few = nodes_for(0, 1, bounds, Watch(), *jobs)[0]
    assert 1 < few < 20
    assert nodes_for(0, few, bounds, Watch(), *jobs) == (few, Watch())


def test_the_budget_and_the_most_bound_the_nodes() -> None:
    jobs = [Candidate(request=request(f"j{i}", 4)) for i in range(30)]
    dear = replace(KIND, cost_per_hour=2.5)
    bounds = Bounds(most=20, budget_per_hour=10.0)
    decision = decide(view(0, nodes(1), *jobs), 1, reach_of(dear, bounds), bounds, Watch())
    assert decision.nodes == 4
    assert decision.because == (
        "4 nodes would be used at 65% or better, and there is 1, 10 an hour pays for 4"
    )
    assert nodes_for(0, 1, Bounds(most=20), Watch(), *jobs)[0] == 20


def test_nobody_is_there_and_the_least_remains() -> None:
    assert nodes_for(1_000, 3, Bounds(least=1, most=9, idle_s=0), Watch())[0] == 1
