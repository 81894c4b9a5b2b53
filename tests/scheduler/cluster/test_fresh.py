"""A round about newcomers alone gives them what a round over all jobs would."""

import random
from copy import deepcopy

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scheduler.cluster.test_machine import World, live, new_world
from zml.scheduler.cluster.events import Started
from zml.scheduler.cluster.plan import Quota
from zml.scheduler.cluster.view import view_of_new
from zml.scheduler.ids import JobId


def fresh(world: World, quotas: dict[str, Quota] | None = None) -> list[Started] | None:
    decisions = world.machine.decide_fresh(world.policy, world.now, quotas)
    return None if decisions is None else [each for each in decisions if isinstance(each, Started)]


@given(
    seed=st.integers(0, 2**32), steps=st.integers(5, 40), policy=st.sampled_from(["las", "fifo", "static"])
)
@settings(max_examples=100, deadline=None)
def test_newcomers_get_what_a_round_over_all_jobs_would_give_them(seed: int, steps: int, policy: str) -> None:
    rng, world = random.Random(seed), new_world(policy)
    world.come("n1", 6)
    try:
        for _ in range(steps):
            live(world, rng)
    except AssertionError:
        return  # what `test_machine` is about
    world.round()
    for number in range(rng.randint(1, 3)):
        least = rng.randint(1, 2)
        world.submit(f"k{number}", least=least, most=least, shards=rng.randint(1, 2))
    whole = deepcopy(world.machine).decide(world.policy, world.now)
    alone = fresh(world)
    if alone is not None:
        assert {each.job: each.slots for each in alone} == {
            each.job: each.slots for each in whole if isinstance(each, Started)
        }


def test_nodes_without_room_are_not_looked_at_again() -> None:
    """Also where shards take nothing; but each of several that must not be together may need one."""
    world = new_world()
    for number in range(5):
        world.come(f"n{number}", 2)
    world.submit("j1", least=8, most=8)
    world.round()
    world.begin("j1", 1)
    world.submit("j2")
    world.submit("j3", shards=2, replicas=1)
    for job, nodes in (("j2", 1), ("j3", 5)):
        view = view_of_new(world.machine.cluster, [JobId(job)], world.now, {})
        assert view is None, "somebody else waits"
        world.machine.cluster.jobs[JobId("j2" if job == "j3" else "j3")].paused = "for a try"
        view = view_of_new(world.machine.cluster, [JobId(job)], world.now, {})
        assert view is not None and len(view.nodes) == nodes
        world.machine.cluster.jobs[JobId("j2" if job == "j3" else "j3")].paused = ""


def test_who_waits_is_not_overtaken() -> None:
    world = new_world()
    world.come("n1", 2)
    world.submit("j1", least=3, most=3)
    world.submit("j2")
    assert fresh(world) is None, "there is no room for all of them"
    world.submit("j3")
    assert fresh(world) is None, "somebody waits"


def test_what_depends_on_others_is_for_a_round_over_all_jobs() -> None:
    world = new_world()
    world.come("n1", 4)
    world.submit("j1", least=1, most=3)
    assert fresh(world) is None, "how many workers it should have"
    world.round()
    world.begin("j1", 1)
    world.submit("j2", user="ada")
    assert fresh(world, {"ada": Quota(cpus=1)}) is None, "what its user may have"
    world.round()
    world.begin("j2", 1)
    world.advance(1)
    assert fresh(world) == [], "nobody has come"


def test_a_newcomer_that_comes_after_another_waits_for_it_and_is_in_nobodys_way() -> None:
    world = new_world()
    world.come("n1", 4)
    world.submit("j1")
    world.submit("j2", after=(JobId("j1"),))
    assert [each.job for each in fresh(world) or []] == ["j1"]
