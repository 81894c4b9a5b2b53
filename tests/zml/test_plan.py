"""How gradients travel, settled from what was asked for."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zml.compression import parse
from zml.messages import JobSpec
from zml.plan import FIRST_DENSITY, Plan


def test_topk_and_local_steps_put_the_optimizer_on_the_workers_unless_told() -> None:
    assert Plan.of(JobSpec()).optimizer_on == "shard"
    assert Plan.of(JobSpec(compress="bf16")).optimizer_on == "shard"
    assert Plan.of(JobSpec(compress="topk:1%")).optimizer_on == "worker"
    assert Plan.of(JobSpec(local_steps=4)).optimizer_on == "worker"
    assert Plan.of(JobSpec(compress="topk:1%", optimizer_on="shard")).optimizer_on == "shard"


def test_what_waits_fades_where_that_was_asked_for() -> None:
    assert Plan.of(JobSpec(compress="topk:1%")).decay == 1.0
    assert Plan.of(JobSpec(compress="topk:1%", residual_decay=0.95)).decay == 0.95


def test_an_exchange_stays_in_flight_only_with_a_staleness_bound() -> None:
    assert [Plan.of(JobSpec(staleness=s)).overlap for s in (0, 1, 4, None)] == [False, True, True, True]


@given(st.floats(1e-5, 1.0, exclude_max=True), st.integers(0, 1000))
def test_the_density_falls_to_what_was_asked_for_and_stays_there(wanted: float, warm_up: int) -> None:
    plan = Plan.of(JobSpec(compress=f"topk:{wanted}"))
    densities = [plan.density(clock, warm_up) or 0.0 for clock in range(warm_up + 2)]
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] == plan.compression.density == pytest.approx(wanted)
    assert densities[0] == (max(FIRST_DENSITY, wanted) if warm_up else wanted) or wanted >= FIRST_DENSITY


def test_the_warm_up_is_a_twentieth_of_the_run_unless_told() -> None:
    assert Plan.of(JobSpec(compress="topk:1%")).warm_up(2000) == 100
    assert Plan.of(JobSpec(compress="topk:1%", warm_up_steps=7)).warm_up(2000) == 7
    several = JobSpec(compress="topk:1%", warm_up_steps=7, local_steps=3)
    assert Plan.of(several).warm_up(2000) == 3, "of seven steps, the last one leaves with the third exchange"
    assert Plan.of(JobSpec(compress="bf16")).warm_up(2000) == 0
    assert Plan.of(JobSpec(compress="bf16")).density(5, 10) is None


def gain(density: float | None, workers: int = 4, *, short: bool = True, **asked: Any) -> float:
    return Plan.of(JobSpec(workers=4, **asked)).gain(density, workers, short=short)


def test_a_mean_of_short_updates_keeps_its_length_and_single_updates_their_own() -> None:
    assert gain(0.01, compress="topk:1%") == math.sqrt(4)
    assert gain(0.01, 2, compress="topk:1%") == math.sqrt(2), "two were lost"
    assert gain(0.01, short=False, compress="topk:1%") == 1.0
    assert gain(0.01, compress="topk:1%", staleness=None) == 1.0
    assert gain(0.01, compress="topk:1%", local_steps=8) == 2.0
    assert gain(0.01, compress="topk:1%", local_steps=8, staleness=2) == 0.5
    assert gain(None, local_steps=8) == 1.0
    assert gain(None, local_steps=8, staleness=None) == 1 / 4
    assert gain(0.01, compress="topk:1%", outer_lr=0.7) == 0.7
    assert gain(1.0, compress="auto") == 1.0, "what leaves whole is as dense"
    assert not Plan.of(JobSpec(compress="auto")).masks(1.0) and Plan.of(JobSpec(compress="auto")).masks(0.1)


def test_auto_is_coded_as_topk_and_decides_on_the_density_alone() -> None:
    plan = Plan.of(JobSpec(compress="auto"))
    assert plan.auto and plan.compression == parse("topk:1%") and plan.warm_up(2000) == 0
