"""The goodput model: known numbers come out of the fit again; priors; batch sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zml.scheduler.cluster.goodput import Batches, Learner, Line, Seen, Throughput, efficiency, fit


def ran(model: Throughput, *shapes: tuple[int, int, int]) -> list[Seen]:
    return [Seen(k, n, m, model.grad_s(m), model.step_s(k, n, m)) for k, n, m in shapes]


SHAPES = [(1, 1, 32), (1, 1, 64), (2, 1, 64), (4, 1, 32), (4, 2, 64), (8, 2, 64), (16, 4, 32)]
numbers = st.floats(0.01, 1.0)


@given(
    a=numbers, b=st.floats(0.001, 0.1), c=numbers, d=numbers, e=numbers, f=numbers, shards=st.integers(1, 4)
)
@pytest.mark.parametrize("gamma", [1.0, 1.5, 3.0])
def test_the_fit_finds_the_numbers_that_made_the_steps(
    gamma: float, a: float, b: float, c: float, d: float, e: float, f: float, shards: int
) -> None:
    true = Throughput(
        grad=Line(a, b), alone_s=c / 2, together=Line(c, d), apart=Line(e, f), gamma=gamma, shards=shards
    )
    found = fit(ran(true, *SHAPES), shards)
    assert (found.grad.a, found.grad.b) == pytest.approx((a, b), rel=1e-6)
    for k, n, m in SHAPES:
        assert found.step_s(k, n, m) == pytest.approx(true.step_s(k, n, m), rel=0.03)
    for k, n, m in [
        (3, 1, 48),
        (8, 4, 32),
        (32, 8, 64),
    ]:  # not seen; the fit prefers less overlap than there was
        assert found.step_s(k, n, m) == pytest.approx(true.step_s(k, n, m), rel=0.01 if gamma == 1.0 else 0.2)


def test_more_shards_make_the_same_workers_wait_less() -> None:
    def model(shards: int) -> Throughput:
        return Throughput(grad=Line(1.0), apart=Line(0.1, 0.5), shards=shards)

    assert [model(shards).step_s(8, 2, 1) for shards in (1, 2, 4)] == pytest.approx([5.1, 3.1, 2.1])


def test_what_was_never_seen_is_assumed_to_cost_nothing() -> None:
    alone = fit([Seen(1, 1, 32, 2.0, 2.0)])
    assert (alone.grad, alone.sync_s(8, 4)) == (Line(1.0, 1.0 / 32), 0.0)
    two = fit([Seen(1, 1, 32, 2.0, 2.0), Seen(2, 1, 32, 2.0, 3.0)])
    assert two.sync_s(4, 1) == pytest.approx(two.sync_s(2, 1))
    assert two.sync_s(4, 2) == pytest.approx(1.1 * two.sync_s(2, 1))


def test_a_batch_teaches_less_the_further_it_is_above_the_noise() -> None:
    assert efficiency(100, 10, 10) == 1.0
    assert efficiency(100, 10, 120) == pytest.approx(0.5)


def test_noise_makes_large_batches_worth_it() -> None:
    model = Throughput(grad=Line(1.0, 0.01), apart=Line(1.0))
    batches = Batches(asked=32, most=1024, least_local=8, most_local=256)
    quiet, noisy = (Learner(model, phi, batches, 8).best(4, 1) for phi in (1.0, 10_000.0))
    assert 4 * quiet.batch * (quiet.accumulated + 1) == 32
    assert 4 * noisy.batch * (noisy.accumulated + 1) == 1024


def test_no_more_is_promised_than_for_twice_the_workers_seen_but_on_one_node() -> None:
    learner = Learner(
        Throughput(grad=Line(0.0, 0.01)),
        1e9,
        Batches(asked=32, most=4096, least_local=8, most_local=64),
        seen=2,
    )
    assert learner.goodput(4, 2) == learner.goodput(16, 4)
    assert learner.goodput(8, 1) > learner.goodput(4, 1)


@given(st.floats(32, 4096), st.integers(1, 16))
def test_a_split_is_of_about_the_batch_and_fits_a_worker(batch: float, workers: int) -> None:
    batches = Batches(asked=32, most=4096, least_local=1, most_local=64)
    at_once, accumulated = batches.split(batch, workers)
    assert 1 <= at_once <= 64
    assert workers * at_once * (accumulated + 1) <= 4096
    assert abs(workers * at_once * (accumulated + 1) - batch) <= workers * (accumulated + 1)
    assert accumulated or workers > 1 or batch < 33
