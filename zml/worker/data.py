"""A map-style loader divided over the workers of a job.

The order of an epoch is drawn from one generator state, the senior worker's, so that it does not depend on how many
workers there are; the coordinator deals the batches of that order. A single worker draws exactly what plain Python
would have drawn, in the same order, from the same generators.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Protocol, cast

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ..errors import LOADER, ZmlError
from ..scheduler.ahead import ahead

DIVISIBLE = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
TAKE = 16  # batches asked for at once, at least: a message in every 16 steps
MOST_AT_ONCE = 256  # what fits into one header, asked for and reported
SMOOTHING = 8  # steps over which the time of one is averaged, about


class Ledger(Protocol):
    """The coordinator's ledger of batches, as one worker sees it. Each call may wait for other members."""

    def open_epoch(self, batches: int, generator_state: bytes, samples: int, batch_size: int) -> bytes:
        """Begin the worker's next epoch; returns the generator state from which all workers draw its order.

        `samples` are in all its batches, and `batch_size` in each but the last.
        """
        ...

    def take(self, most: int, done: list[int], *, wait: bool) -> list[int] | None:
        """More batches; [] when there are none for now (only with `wait` false), None when the epoch is over."""
        ...

    def ask(self, most: int, done: list[int]) -> None:
        """Begin to ask for more, as `take` without waiting, while the script goes on with what it has."""
        ...

    def answered(self, *, wait: bool) -> list[int] | None:
        """What `ask` has brought, once; None while it has not been answered (only with `wait` false)."""
        ...

    def begin(self, batches: int) -> None:
        """The inner loader is asked for the last of the first so many batches of this epoch that were taken."""
        ...

    @property
    def workers(self) -> int:
        """Among whom an epoch is divided, about."""
        ...

    def in_hand(self, batches: int, samples: int) -> None:
        """The script is about to compute on one batch more."""
        ...

    def flush(self) -> None:
        """Every step that the script has made counts, when this returns."""
        ...

    def stopping(self) -> str:
        """Why the script is to take no more batches; empty while it is."""
        ...

    def depart(self) -> None:
        """It takes no more: every step that it has made counts, and the batches in them are told."""
        ...

    def reading(self, items: Iterator[Any]) -> Iterator[Any]:
        """The same items; the time that the script spends inside of them is seen."""
        ...


def check(loader: Any) -> DataLoader[Any]:
    """The loader, if it can be divided; else a ZmlError that says what to change."""
    if not isinstance(loader, DataLoader):
        kind = type(loader).__name__
        raise ZmlError(
            LOADER, f"zml.join got a {kind}, not a DataLoader", "Wrap the data set in a DataLoader."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise ZmlError(
            LOADER,
            "an IterableDataset has no order that workers could share, and this one cannot say where it stands",
            "Give it state_dict() and load_state_dict(state), use a map-style data set, or zml.join(..., "
            'data="best effort") after reading Limits in the README.',
        )
    if type(loader.batch_sampler) is not BatchSampler:
        kind = type(loader.batch_sampler).__name__
        raise ZmlError(
            LOADER, f"the loader's batch sampler is a {kind}", "Give the DataLoader a batch_size instead."
        )
    if not isinstance(loader.sampler, DIVISIBLE):
        kind, known = type(loader.sampler).__name__, ", ".join(sampler.__name__ for sampler in DIVISIBLE)
        raise ZmlError(LOADER, f"the loader's sampler is a {kind}", f"Use shuffle=True or one of {known}.")
    return loader


class DividedLoader:
    """Looks like the loader it was made from, and yields this worker's share of each epoch.

    Invariants, of the batches taken from the ledger: `leased` are not asked of the inner loader yet, `handed` are and
    come out of it in this order, `open` were yielded, the first `before` of them to local steps that were made already,
    `on_their_way` are in steps to the shards, oldest step first, `done` are applied, and not yet reported.

    More are asked for while there are some left (`scheduler.ahead`): the script goes on while the coordinator is away.
    """

    def __init__(self, loader: DataLoader[Any], ledger: Ledger, *, checked: bool = False) -> None:
        self.loader = loader if checked else check(loader)
        self.ledger = ledger
        self.leased: deque[int] = deque()
        self.handed: deque[tuple[int, int]] = deque()  # (batch, samples)
        self.open: list[int] = []
        self.before = 0
        self.position = (
            0  # batches of this epoch that were yielded: the first so many of all that this worker was given
        )
        self.begun = 0  # batches of this epoch that were asked of the inner loader
        self.asking = False  # for more, while the script computes
        self.dry = False  # there were no more when it was asked last
        self.batch_s: float | None = None  # from one batch to the next, smoothed; None before the second
        self.on_their_way: deque[list[int]] = deque()  # one list per step that does not count yet
        self.done: list[int] = []
        self.order: list[list[int]] = []
        self.fetching = False  # the inner loader is asked for the first of `handed`
        self.under_way = False  # an epoch was begun and is not over; after the loop: the script left it early
        self.yielded_at: float | None = None  # None where what came between is no step
        self._inner: DataLoader[Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def samples_of(self, batch: int) -> list[int]:
        """Indices in the data set."""
        return self.order[batch]

    @property
    def in_hand(self) -> list[int]:
        """What an exception that is raised now came from: the batch that is fetched, else those without a step."""
        return [batch for batch, _ in self.handed][:1] if self.fetching else self.open

    def leaving(self) -> int:
        """A step has taken up every batch that was yielded so far, and is on its way to the shards; `position`."""
        self.on_their_way.append(self.open)
        self.open, self.before = [], 0
        return self.position

    def stepped(self) -> None:
        """The optimizer has made a step of what was yielded so far, whether that has left or not."""
        self.before = len(self.open)

    def left_out(self) -> list[int]:
        """The step that the script was about to make is not made: its batches, which are no longer ours to report."""
        batches, self.open = self.open[self.before :], self.open[: self.before]
        return batches

    def counted(self) -> None:
        """The oldest of the steps on their way is applied."""
        self.done += self.on_their_way.popleft()

    def _pass_over(self) -> None:
        """What the script has passed over without a step is not asked of anybody again."""
        self.ledger.flush()
        self.done += self.open
        self.open, self.before = [], 0

    def __iter__(self) -> Iterator[Any]:
        return self.ledger.reading(self._items())

    def _items(self) -> Iterator[Any]:
        self.finish()
        self.under_way, self.position, self.begun = True, 0, 0
        self.dry, self.yielded_at = False, None
        source: Iterator[Any] = iter(self._divided())
        self.fetching = True
        while not self.ledger.stopping():
            for item in source:
                self.fetching = False
                batch, samples = self.handed.popleft()
                self.open.append(batch)
                self.position += 1
                self.ledger.in_hand(batch, samples)
                self._clock()
                yield item
                if self.ledger.stopping():
                    break
                self.fetching = True
            else:
                self.fetching = False
                self._pass_over()
                more = self.ledger.take(TAKE, self.take_done(), wait=True)
                self.yielded_at = None
                if more is not None:
                    self.leased.extend(more)
                    self.dry = False
                    source, self.fetching = self._again(), True
                elif not self.ledger.stopping():
                    self.under_way = False
                    return
        self._stop()

    def _stop(self) -> None:
        """What was taken and has not come into a step is left to others."""
        self.under_way = self.fetching = False
        self._come_in()
        self.ledger.depart()
        for taken in (self.open, self.handed, self.leased):
            taken.clear()

    def _divided(self) -> Iterable[Any]:
        """The user's loader over this worker's batches; workers, collation and pinning are the user's own."""
        if self._inner is None:
            self._inner = self._over(Share(self))
        return self._inner

    def _over(self, places: Any) -> DataLoader[Any]:
        """The loader that reads what these ask for."""
        return like(self.loader, batch_sampler=places)

    def _again(self) -> Iterator[Any]:
        """Batches that came back from a lost worker, outside of the generators' plain sequence."""
        state = torch.get_rng_state()
        source = iter(self._over(Returned(self)))
        torch.set_rng_state(state)
        return source

    def finish(self) -> None:
        """Where the script left the loop of an epoch early: give up the rest of its share, and see the epoch over."""
        if not self.under_way:
            return
        if self.ledger.stopping():
            self._stop()
            return
        self.under_way = False
        self._pass_over()
        self._come_in()
        self.done += [*(batch for batch, _ in self.handed), *self.leased]
        self.handed.clear()
        self.leased.clear()
        while (batches := self.ledger.take(MOST_AT_ONCE, self.take_done(), wait=True)) is not None:
            self.done += batches
        if self.ledger.stopping():
            self.ledger.depart()

    def take_done(self) -> list[int]:
        done, self.done = self.done, []
        return done

    def draw_order(self) -> None:
        """Draw this epoch's batches, as lists of sample indices, from the senior worker's generator state."""
        generator = getattr(self.loader.sampler, "generator", None) or torch.default_generator
        own = generator.get_state()
        batches = cast(BatchSampler, self.loader.batch_sampler)  # `check` let in nothing else
        samples, size = len(cast(Sized, self.loader.sampler)), batches.batch_size
        samples = len(batches) * size if batches.drop_last else samples
        shared = self.ledger.open_epoch(len(batches), own.numpy().tobytes(), samples, size)
        if shared != own.numpy().tobytes():
            generator.set_state(torch.frombuffer(bytearray(shared), dtype=torch.uint8))
            self.order = list(batches)
            generator.set_state(own)
        else:
            self.order = list(batches)

    def hand_out(self) -> Iterator[Any]:
        """The samples of each leased batch, as the inner loader asks for them."""
        while self.more():
            batch = self.leased.popleft()
            asked, samples = self.asked(batch)
            self.handed.append((batch, samples))
            self.begin()
            yield asked

    def asked(self, batch: int) -> tuple[Any, int]:
        """What the inner loader is asked for where it is asked for this batch, and how many samples that is."""
        samples = self.order[batch]
        return samples, len(samples)

    def begin(self) -> None:
        """One more is asked of the inner loader. Whoever looks for what a script has crashed over looks no further."""
        self.begun += 1
        self.ledger.begin(self.begun)

    def more(self) -> bool:
        """Is there a batch to go on with? Waits only where there is none, and for no other worker."""
        while True:
            if self.asking and (came := self.ledger.answered(wait=not self.leased)) is not None:
                self.asking = False
                self.leased.extend(came)
                self.dry = not came
            few = ahead(self.batch_s, len(self) // max(self.ledger.workers, 1))
            if not self.asking and not self.dry and len(self.leased) <= few:
                self.asking = True
                self.ledger.ask(min(few + TAKE - len(self.leased), MOST_AT_ONCE), self.take_done())
            if self.leased or not self.asking:
                return bool(self.leased)

    def look_again(self) -> bool:
        """Has something been dealt to this worker since there was no more?"""
        self.dry = False
        return self.more()

    def _come_in(self) -> None:
        """What was asked for is here."""
        if self.asking:
            self.asking = False
            self.leased.extend(self.ledger.answered(wait=True) or ())

    def _clock(self) -> None:
        now = time.monotonic()
        if self.yielded_at is not None:
            took_s = now - self.yielded_at
            usual_s = took_s if self.batch_s is None else self.batch_s
            self.batch_s = usual_s + (took_s - usual_s) / SMOOTHING
        self.yielded_at = now


class Share:
    """Batch sampler, or sampler of a stream's batches: the epoch's order is drawn at the first fetch, where torch's own
    sampler draws it too."""

    def __init__(self, divided: DividedLoader) -> None:
        # No circle: a collection of garbage that finds processes which stay waits ten seconds for them, in torch.
        self.divided: DividedLoader = weakref.proxy(divided)

    def __len__(self) -> int:
        return len(self.divided)

    def __iter__(self) -> Iterator[Any]:
        divided = self.divided
        divided.draw_order()
        # Never wait for others here: a loader with worker processes asks ahead, while its own batches are under way.
        while divided.look_again():
            yield from divided.hand_out()


class Returned:
    """The same: what is leased now, and no more."""

    def __init__(self, divided: DividedLoader) -> None:
        self.divided: DividedLoader = weakref.proxy(divided)

    def __len__(self) -> int:
        return len(self.divided.leased)

    def __iter__(self) -> Iterator[Any]:
        return self.divided.hand_out()


# What a loader keeps where others than its own sampler say what it reads.
KEPT = (
    "dataset", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context",
    "generator", "prefetch_factor", "persistent_workers",
)  # fmt: skip


def like(loader: DataLoader[Any], **others: Any) -> DataLoader[Any]:
    """A loader with everything of `loader` but its sampling, and but for these."""
    return DataLoader(**{name: getattr(loader, name) for name in KEPT} | others)
