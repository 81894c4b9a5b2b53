"""A loader divided: one worker sees what plain Python would have seen, several see every batch once."""

import gc
import itertools
import os
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from zml.errors import ZmlError
from zml.worker.data import DividedLoader


class AnswersAtOnce:
    """The part of a ledger that a worker asks while it computes."""

    workers = 1
    begun = 0
    answer: list[int] | None = None

    def take(self, most: int, done: list[int], *, wait: bool) -> list[int] | None:
        raise NotImplementedError

    def ask(self, most: int, done: list[int]) -> None:
        assert self.answer is None, "it has not looked at the last answer"
        self.answer = self.take(most, done, wait=False)

    def answered(self, *, wait: bool) -> list[int] | None:
        answer, self.answer = self.answer, None
        return answer

    def begin(self, batches: int) -> None:
        self.begun = batches


class Alone(AnswersAtOnce):
    """A ledger with one worker: everything is dealt to it."""

    def __init__(self) -> None:
        self.todo: list[int] = []
        self.done: list[int] = []
        self.late: list[list[int]] = []  # what comes back from lost workers, one list per asking
        self.samples = 0

    def open_epoch(self, batches: int, generator_state: bytes, samples: int, batch_size: int) -> bytes:
        self.todo, self.done = list(range(batches)), []
        return generator_state

    def take(self, most: int, done: list[int], *, wait: bool) -> list[int] | None:
        self.done += done
        given, self.todo = self.todo[:most], self.todo[most:]
        if given or not wait:
            return given
        return self.late.pop(0) if self.late else None

    def in_hand(self, batch: int, samples: int) -> None:
        self.samples += samples

    def reading(self, items: Iterator[Any]) -> Iterator[Any]:
        return items

    def flush(self) -> None:
        pass

    def stopping(self) -> str:
        return ""

    def depart(self) -> None:
        raise AssertionError("nobody is to leave")


class Dealt(AnswersAtOnce):
    """Workers of one job in turn: worker `rank` of `world` gets every `world`-th batch, all share one order."""

    def __init__(self, rank: int, world: int, state: bytes | None) -> None:
        self.rank, self.world, self.state = rank, world, state
        self.todo: list[int] = []

    def open_epoch(self, batches: int, generator_state: bytes, samples: int, batch_size: int) -> bytes:
        self.todo = list(range(self.rank, batches, self.world))
        return self.state or generator_state

    def take(self, most: int, done: list[int], *, wait: bool) -> list[int] | None:
        given, self.todo = self.todo[:most], self.todo[most:]
        return None if wait else given

    def in_hand(self, batch: int, samples: int) -> None:
        pass

    def reading(self, items: Iterator[Any]) -> Iterator[Any]:
        return items

    def flush(self) -> None:
        pass

    def stopping(self) -> str:
        return ""

    def depart(self) -> None:
        raise AssertionError("nobody is to leave")


def numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count))


def loaders() -> Iterator[tuple[str, dict[str, Any]]]:
    data = numbers(53)
    yield "sequential", {}
    yield "shuffled", {"shuffle": True}
    yield "shuffled, last dropped", {"shuffle": True, "drop_last": True}
    yield "own generator", {"shuffle": True, "generator": torch.Generator().manual_seed(5)}
    yield "subset", {"sampler": SubsetRandomSampler(range(0, len(data), 2))}
    yield "weighted", {"sampler": WeightedRandomSampler([1.0] * 53, 40)}


def two_epochs(loader: Any, seed: int) -> list[list[int]]:
    """Batches of two epochs, with the generator used in between as dropout would."""
    torch.manual_seed(seed)
    if loader.generator is not None:
        loader.generator.manual_seed(seed)
    seen = []
    for _ in range(2):
        for (batch,) in loader:
            seen.append(batch.tolist())
            torch.rand(3)
    return [*seen, [int(torch.randint(1 << 30, ()))]]


@pytest.mark.parametrize(("name", "options"), list(loaders()), ids=[name for name, _ in loaders()])
def test_one_worker_sees_what_plain_python_sees_and_leaves_the_generator_where_it_leaves_it(
    name: str, options: dict[str, Any]
) -> None:
    plain = DataLoader(numbers(53), batch_size=8, **options)
    assert two_epochs(DividedLoader(plain, Alone()), seed=3) == two_epochs(plain, seed=3)


def test_worker_processes_of_the_loader_change_nothing() -> None:
    plain = DataLoader(numbers(53), batch_size=4, shuffle=True, num_workers=1)
    assert two_epochs(DividedLoader(plain, Alone()), seed=3) == two_epochs(plain, seed=3)


def collate(samples: list[Any]) -> Any:
    """The batch, and which process collated it."""
    return (
        torch.stack([sample for (sample,) in samples]),
        os.getpid(),
        int(os.environ.get("SET_BY_INIT", "-1")),
    )


def set_up(worker: int) -> None:
    os.environ["SET_BY_INIT"] = str(worker)


def in_worker_processes(**options: Any) -> DataLoader[Any]:
    return DataLoader(
        numbers(53), batch_size=4, num_workers=2, collate_fn=collate, worker_init_fn=set_up, **options
    )


@pytest.mark.parametrize("persistent", [False, True], ids=["new", "persistent"])
def test_the_users_worker_processes_collation_and_set_up_are_used(persistent: bool) -> None:
    plain = in_worker_processes(persistent_workers=persistent, prefetch_factor=3, timeout=60)
    divided = DividedLoader(plain, Alone())
    epochs = [list(divided) for _ in range(2)]
    for items in epochs:
        assert sorted(n for batch, _, _ in items for n in batch.tolist()) == list(range(53))
        assert {worker for _, _, worker in items} == {0, 1} and os.getpid() not in {
            pid for _, pid, _ in items
        }
    first, second = ({pid for _, pid, _ in items} for items in epochs)
    assert (first == second) == persistent


def test_every_option_of_the_users_loader_is_that_of_the_divided_one() -> None:
    generator = torch.Generator().manual_seed(2)
    plain = in_worker_processes(
        persistent_workers=True,
        prefetch_factor=5,
        timeout=7,
        pin_memory=True,
        generator=generator,
        multiprocessing_context="fork",
        drop_last=True,
        shuffle=True,
    )
    divided = DividedLoader(plain, Alone())
    inner = divided._divided()
    assert isinstance(inner, DataLoader) and len(inner) == len(plain) == 13
    for name in (
        "dataset",
        "num_workers",
        "collate_fn",
        "pin_memory",
        "timeout",
        "worker_init_fn",
        "multiprocessing_context",
        "generator",
        "prefetch_factor",
        "persistent_workers",
    ):
        assert getattr(inner, name) == getattr(plain, name), name


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [8] * 6 + [5]), (True, [8] * 6)])
def test_nothing_is_padded_and_the_tail_is_dropped_only_where_the_user_drops_it(
    drop_last: bool, sizes: list[int]
) -> None:
    class Told(Alone):
        def open_epoch(self, batches: int, generator_state: bytes, samples: int, batch_size: int) -> bytes:
            assert (batches, samples, batch_size) == (len(sizes), sum(sizes), 8)
            return super().open_epoch(batches, generator_state, samples, batch_size)

    loader = DividedLoader(DataLoader(numbers(53), batch_size=8, drop_last=drop_last), Told())
    assert [len(batch) for (batch,) in loader] == sizes


def test_what_is_in_hand_is_the_batch_that_is_fetched_and_then_those_without_a_step() -> None:
    seen: list[list[int]] = []

    class Looks(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            seen.append(list(loader.in_hand))
            return super().__getitem__(index)  # type: ignore[no-untyped-call]

    loader = DividedLoader(DataLoader(Looks(torch.arange(3)), batch_size=1), Alone())
    for index, _ in enumerate(loader):
        seen.append(list(loader.in_hand))
        if index:
            loader.leaving()
            loader.counted()
            seen.append(list(loader.in_hand))
    assert seen == [[0], [0], [1], [0, 1], [], [2], [2], []] and loader.in_hand == []


def test_a_step_that_is_left_out_takes_the_batches_since_the_last_one_and_no_other() -> None:
    ledger = Alone()
    loader = DividedLoader(DataLoader(numbers(6), batch_size=1), ledger)
    for index, _ in enumerate(loader):
        if index == 1:
            loader.stepped()  # a local step with two batches, which has not left yet
        if index == 3:
            assert loader.left_out() == [2, 3]
        if index == 4:
            loader.leaving()
            loader.counted()
            assert loader.done == [0, 1, 4]
    assert loader.position == 6
    assert sorted(ledger.done) == [0, 1, 4, 5] and loader.samples_of(3) == [3]


@pytest.mark.parametrize("world", [2, 3, 7])
def test_several_workers_share_one_order_whatever_their_own_generators_hold(world: int) -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state().numpy().tobytes()
    plain = [batch.tolist() for (batch,) in DataLoader(numbers(53), batch_size=8, shuffle=True)]
    # The order is drawn after the loader's own seed: let the shared state be that of this moment.
    torch.manual_seed(11)
    torch.empty((), dtype=torch.int64).random_()
    state = torch.get_rng_state().numpy().tobytes()
    shares = []
    for rank in range(world):
        torch.manual_seed(100 + rank)
        loader = DataLoader(numbers(53), batch_size=8, shuffle=True)
        shares.append([batch.tolist() for (batch,) in DividedLoader(loader, Dealt(rank, world, state))])
    dealt = [batch for row in itertools.zip_longest(*shares) for batch in row if batch is not None]
    assert dealt == plain


def test_a_batch_is_done_once_a_step_has_taken_it_up() -> None:
    ledger = Alone()
    loader = DividedLoader(DataLoader(numbers(40), batch_size=1), ledger)
    for index, _ in enumerate(loader):
        if index % 2:
            loader.leaving()  # a step every second batch: gradients of two accumulate
            loader.counted()
        assert set(ledger.done) <= set(range(index)), "no batch is done before its step"
    assert sorted(ledger.done) == list(range(40))
    assert ledger.samples == 40


class Away(Alone):
    """Its coordinator dies once the loader knows how long a step takes, and answers when `back` is set."""

    back = False

    def answered(self, *, wait: bool) -> list[int] | None:
        if not self.back and self.begun > 1:
            assert not wait, "nobody waits who has batches left"
            return None
        return super().answered(wait=wait)


def test_a_script_goes_on_with_what_it_has_while_the_coordinator_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zml.worker.data.ahead", lambda batch_s, share: 20)
    ledger = Away()
    loader = DividedLoader(DataLoader(numbers(100), batch_size=1), ledger)
    seen = []
    for (batch,) in loader:
        seen.append(int(batch))
        loader.leaving()
        loader.counted()
        assert ledger.begun == len(seen), "nothing is begun that is not asked for"
        assert ledger.back or len(loader.leased) + len(seen) == 36, "20 ahead, and a message's worth"
        assert ledger.back or loader.asking == (len(loader.leased) < 20)
        ledger.back = ledger.back or not loader.leased
    assert seen == list(range(100)) and sorted(ledger.done) == seen


def test_what_was_asked_for_when_the_loop_was_left_is_given_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zml.worker.data.ahead", lambda batch_s, share: 20)
    ledger = Away()
    loader = DividedLoader(DataLoader(numbers(100), batch_size=1), ledger)
    for _ in loader:
        if loader.asking:
            break
    ledger.back = True
    loader.finish()
    assert sorted(ledger.done) == list(range(100)) and not loader.asking


def test_batches_of_a_lost_worker_follow_after_the_own_share() -> None:
    ledger = Alone()
    ledger.late = [[2, 0], [1]]
    loader = DividedLoader(DataLoader(numbers(6), batch_size=2), ledger)
    seen = [batch.tolist() for (batch,) in loader]
    assert seen == [[0, 1], [2, 3], [4, 5], [4, 5], [0, 1], [2, 3]]
    assert ledger.done == [0, 1, 2, 2, 0, 1]


def test_a_loop_that_is_left_early_gives_up_the_rest_of_the_share_when_the_script_goes_on() -> None:
    ledger = Alone()
    loader = DividedLoader(DataLoader(numbers(100), batch_size=1), ledger)
    for (_,) in loader:
        break
    assert ledger.done == [], "it may have been an exception: nothing is claimed"
    loader.finish()
    assert sorted(ledger.done) == list(range(100)), "nobody waits for batches that the script does not want"
    assert [int(batch) for (batch,) in loader] == list(range(100)), "the next epoch is whole"


def test_the_divided_loader_answers_like_the_one_it_was_made_from() -> None:
    plain = DataLoader(numbers(53), batch_size=8)
    divided = DividedLoader(plain, Alone())
    assert len(divided) == len(plain) == 7
    assert divided.dataset is plain.dataset
    assert divided.batch_size == 8


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class Odd(Sampler[int]):
    def __init__(self, data: Dataset[Any]) -> None: ...

    def __iter__(self) -> Iterator[int]:
        return iter([1, 0])

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("loader", "named"),
    [
        ([1, 2, 3], "list"),
        (DataLoader(Endless()), "IterableDataset"),
        (DataLoader(numbers(2), sampler=Odd(numbers(2))), "Odd"),
        (DataLoader(numbers(2), batch_sampler=[[0], [1]]), "list"),
        (DataLoader(numbers(2), batch_size=None), "NoneType"),
    ],
    ids=["no loader", "iterable", "own sampler", "own batches", "no batches"],
)
def test_what_cannot_be_divided_is_refused_with_the_fix(loader: Any, named: str) -> None:
    with pytest.raises(ZmlError, match=named) as refused:
        DividedLoader(loader, Alone())
    assert refused.value.code == "ZML-E301"
    assert refused.value.fix


class Leaving(Alone):
    """Told to leave while its `at`-th batch is computed."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at
        self.loader: DividedLoader | None = None
        self.seen = 0
        self.departures = 0

    def in_hand(self, batch: int, samples: int) -> None:
        self.seen += 1

    def stopping(self) -> str:
        return "SIGTERM" if self.seen >= self.at else ""

    def depart(self) -> None:
        assert self.loader is not None
        self.departures += 1
        self.done += self.loader.take_done()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "stepped", [True, False], ids=["with a step each", "with the last step still to come"]
)
def test_a_worker_that_is_to_leave_gets_no_further_batch_and_tells_just_what_is_in_steps(
    workers: int, stepped: bool
) -> None:
    ledger = Leaving(at=3)
    loader = DataLoader(TensorDataset(torch.arange(40.0)), batch_size=2, num_workers=workers)
    divided = ledger.loader = DividedLoader(loader, ledger)
    batches = 0
    for _ in divided:
        batches += 1
        if stepped or batches < 3:
            divided.leaving()
            divided.counted()
    assert (batches, ledger.departures) == (3, 1)
    assert ledger.done == ([0, 1, 2] if stepped else [0, 1]), "the others go back to the ledger"
    assert not divided.open and not divided.leased and not divided.handed and not divided.under_way
    assert list(divided) == [], "and there is nothing more, however often the script asks"


def test_a_script_that_leaves_its_loop_when_it_is_told_to_leave_gives_up_no_share_of_others() -> None:
    ledger = Leaving(at=2)
    loader = DataLoader(TensorDataset(torch.arange(40.0)), batch_size=2)
    divided = ledger.loader = DividedLoader(loader, ledger)
    for _ in divided:
        divided.leaving()
        divided.counted()
        if ledger.seen == 2:
            break
    divided.finish()
    assert ledger.done == [0, 1] and ledger.departures == 1


def test_processes_that_stay_end_with_the_loader() -> None:
    loader = DividedLoader(in_worker_processes(persistent_workers=True), Alone())
    assert len(list(loader)) == len(loader)
    began = weakref.ref(loader)
    gc.disable()
    try:
        del loader
        assert began() is None, "nothing leads back to it: torch ends its processes at once"
    finally:
        gc.enable()
