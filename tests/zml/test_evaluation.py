"""`zml.evaluate`: alone a loop, in a cluster every sample once, and the same bits."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import zml
from zml.errors import ZmlError
from zml.scheduler.batches import Taken
from zml.scheduler.evaluation import Evaluations, Key, Totals
from zml.scheduler.ids import Seat, WorkerId
from zml.worker.data import DividedLoader
from zml.worker.evaluation import Anew, Evaluator, Result, alone

KEY = Key(0, 1)


def loader(count: int = 53, batch_size: int | None = 8, **options: Any) -> DataLoader[Any]:
    torch.manual_seed(5)
    return DataLoader(TensorDataset(torch.randn(count)), batch_size=batch_size, **options)


def sums(batch: Any) -> dict[str, Any]:
    (x,) = batch
    return {"sum": x.sum(), "n": len(x)}


class Desks:
    """All workers of one job, in one thread: where one has to wait, the others go on first."""

    def __init__(self, *workers: str) -> None:
        self.evaluations = Evaluations()
        self.alive = list(workers)
        self.tell()
        self.before_waiting: Callable[[], None] = lambda: None

    def tell(self) -> None:
        self.evaluations.members([Seat(WorkerId(worker), 1, True) for worker in self.alive])

    def of(self, worker: str) -> "Desk":
        return Desk(self, worker)


class Desk:
    def __init__(self, desks: Desks, worker: str) -> None:
        self.desks, self.worker = desks, WorkerId(worker)

    def ask(
        self, batches: int, results: list[Result], holds: list[int], *, wait: bool
    ) -> list[int] | dict[str, float] | Anew:
        assert self.desks.evaluations.report(self.worker, KEY, results) is None
        while True:
            answer = self.desks.evaluations.ask(self.worker, KEY, batches, holds)
            if isinstance(answer, Taken):
                return list(answer.batches)
            if isinstance(answer, Totals):
                return answer.totals
            if not wait:
                return []
            self.desks.before_waiting()


def expected(plain: DataLoader[Any]) -> dict[str, float]:
    found = [sums(batch) for batch in plain]
    return {"n": float(sum(f["n"] for f in found)), "sum": math.fsum(float(f["sum"]) for f in found)}


@pytest.mark.parametrize("options", [{}, {"num_workers": 2, "prefetch_factor": 3}, {"drop_last": True}])
def test_one_worker_finds_what_a_loop_finds_and_leaves_the_generator_where_a_loop_leaves_it(
    options: dict[str, Any],
) -> None:
    plain = loader(**options)
    wanted = expected(plain)
    torch.manual_seed(1)
    assert alone(sums, plain) == wanted
    there = torch.get_rng_state()
    torch.manual_seed(1)
    assert Evaluator(plain).run(sums, Desks("w0").of("w0")) == wanted
    assert torch.equal(torch.get_rng_state(), there)


def test_several_workers_see_every_sample_once_and_get_the_same_totals() -> None:
    desks, plain = Desks("w0", "w1", "w2"), loader()
    seen: list[float] = []
    found: dict[str, dict[str, float]] = {}

    def fn(batch: Any) -> dict[str, Any]:
        seen.extend(batch[0].tolist())
        others = [worker for worker in ("w1", "w2") if worker not in found]
        if others:  # in the middle of w0's first batch w1 comes, and in the middle of w1's first, w2
            found[others[0]] = {}
            found[others[0]] = Evaluator(plain).run(fn, desks.of(others[0]))
        return sums(batch)

    with pytest.raises(RecursionError):
        # w2 has to wait for w1, who waits for it in this one thread: what is out must come in
        desks.before_waiting = lambda: (_ for _ in ()).throw(RecursionError)
        Evaluator(plain).run(fn, desks.of("w0"))
    held = set(desks.evaluations.going[KEY].leases.values())
    assert held == {"w0", "w1"}, "w2 has done all the others"

    def noting(batch: Any) -> dict[str, Any]:
        seen.extend(batch[0].tolist())
        return sums(batch)

    # Both are lost, and w2 goes on: what they held it computes, too, and nothing else again.
    before = len(seen)
    desks.alive = ["w2"]
    desks.tell()
    assert Evaluator(plain).run(noting, desks.of("w2")) == (expected(plain))
    again = sorted(seen[before:])
    assert sorted([*seen[:before], *again]) == sorted([*plain.dataset.tensors[0].tolist(), *again])  # type: ignore[attr-defined]


def test_what_a_lost_worker_held_follows_after_the_own_share() -> None:
    desks, plain = Desks("w0", "w1"), loader()
    lost = desks.of("w1").ask(7, [], [], wait=False)
    assert lost == [0]

    def lose() -> None:
        desks.alive = ["w0"]
        desks.tell()

    desks.before_waiting = lose
    order: list[float] = []

    def noting(batch: Any) -> dict[str, Any]:
        order.append(float(batch[0][0]))
        return sums(batch)

    totals = Evaluator(plain).run(noting, desks.of("w0"))
    firsts = [float(batch[0][0]) for batch in plain]
    assert totals == expected(plain) and order == [*firsts[1:], firsts[0]]


def test_a_coordinator_that_has_begun_anew_is_told_nothing_of_what_went_before() -> None:
    plain = loader()
    told: list[list[int]] = []

    class Restarted(Desk):
        def ask(self, batches: int, results: list[Result], holds: list[int], *, wait: bool) -> Any:
            told.append([batch for batch, _ in results])
            if len(told) == 3:
                self.desks.evaluations = Evaluations()
                self.desks.tell()
                return Anew()
            return super().ask(batches, results, holds, wait=wait)

    assert Evaluator(plain).run(sums, Restarted(Desks("w0"), "w0")) == expected(plain)
    assert [batch for batches in told[3:] for batch in batches] == list(range(7))


def test_an_exception_in_the_function_reaches_the_script() -> None:
    def fn(batch: Any) -> dict[str, Any]:
        raise LookupError("no such class")

    with pytest.raises(LookupError):
        Evaluator(loader()).run(fn, Desks("w0").of("w0"))


def test_alone_it_is_a_loop_over_any_loader() -> None:
    assert zml.evaluate(lambda x: {"x": x, "n": 1}, [0.1] * 10) == {"n": 10.0, "x": 1.0}
    assert zml.evaluate(lambda x: {"x": x}, []) == {}


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([1, 2], "list"),
        (DataLoader(Stream()), "Stream"),
        (loader(shuffle=True), "RandomSampler"),
        (loader(batch_size=None), "NoneType"),
    ],
    ids=["no loader", "iterable", "shuffled", "no batches"],
)
def test_what_cannot_be_divided_is_refused_with_the_fix(given: Any, named: str) -> None:
    with pytest.raises(ZmlError, match=named) as refused:
        Evaluator(given)
    assert refused.value.code == "ZML-E304" and refused.value.fix


def test_the_training_loader_itself_may_be_evaluated_if_it_has_an_order() -> None:
    plain = loader()
    assert Evaluator(DividedLoader(plain, None)).loader is plain  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "returned", [3.0, {"x": "a word"}, {"x": torch.ones(2)}, {"": 1.0}, {f"n{n}": 1 for n in range(40)}]
)
def test_what_is_no_sum_is_refused(returned: Any) -> None:
    with pytest.raises(ZmlError) as refused:
        alone(lambda batch: returned, [0])
    assert refused.value.code == "ZML-E304"
