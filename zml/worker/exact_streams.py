"""A loader over an IterableDataset that can say where it stands, divided exactly: which samples are in which batch does
not depend on who reads it, and no sample is lost or read into two batches.

`parts` says where each batch lies and `reader` reads it there. Here is which of them this worker is leased, and where
states of the stream are known: those that this worker has seen, and those that the coordinator keeps of all. A state is
told once the batch before it is applied, now and then; what lies between it and the place that is wanted is read again,
and dropped.

With `zml_shard(index, count)`, or the `shard` of Hugging Face's `datasets`, the stream is read in as many parts as the
job was asked to have workers, times the processes of a loader. Then each worker reads only its own, as long as all are
there. Without, each reads everything and drops what others train.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import structlog
from torch.utils.data import DataLoader, IterableDataset

from ..errors import LOADER, ZmlError
from ..thinning import thinned
from .data import Ledger, like
from .parts import Cut, Place, parts_for
from .reader import KEEP, Read, Reader, Wanted, most_parts
from .streams import OverStream

EVERY = 16  # batches of a part between two states of it that are told
EVERY_S = 2.0  # and no sooner: each is tried, which may open files
UNEVEN = 8  # shards for each part, below which parts are noticeably unequal

log = structlog.get_logger()


class Asked(NamedTuple):
    """For a state behind the batch at `position`; `at` in seconds of the monotonic clock."""

    position: int
    at: float


class StreamLedger(Ledger, Protocol):
    """The ledger, where it also keeps states of a stream."""

    def tell_state(self, place: Place, state: bytes) -> None:
        """The batch before this place is applied, and this is the state there. May be lost."""
        ...

    def find_state(self, place: Place) -> tuple[int, bytes] | None:
        """The position of the nearest state that is kept, at this place or before it, and the state."""
        ...


class ExactStream(OverStream):
    """Yields what each leased batch of the stream holds. `workers`: as many as the job was asked to have."""

    ledger: StreamLedger

    def __init__(
        self, loader: DataLoader[Any], ledger: StreamLedger, workers: int, batches: int | None = None
    ) -> None:
        super().__init__(loader, ledger, batches)
        self.most = most_parts(loader.dataset)
        parts = parts_for(workers * max(1, loader.num_workers), self.most)
        self.mine = Cut.first(parts, self.batches, loader.batch_size or 0, bool(loader.drop_last))
        self.cut: Cut | None = None  # of the newest epoch; None before this worker's first
        # As it is now: what the script does to it later is not what other workers, or the next run, would read.
        whole = copied(loader.dataset)
        self.reader = Reader(whole, loader.batch_size, bool(loader.drop_last), loader.collate_fn)
        self.slots = loader.num_workers
        self.turn = 0  # of the processes of the loader, which are asked one after another
        self.pools = 0  # of such processes, that there were; 0 is that of the script itself
        self.pool = 0  # that is asked now
        self.staying: int | None = None  # the pool that reads every epoch, where the user wants that
        # By pool and process: where it reads on, by part; the one that was read last at the end.
        self.stands: dict[tuple[int, int], dict[int, int]] = {}
        self.known: dict[int, dict[int, bytes]] = {}  # states by part and position
        self.asked_at: dict[int, Asked] = {}  # by part, the last state that was asked for
        self.told_at: dict[int, float] = {}  # by part
        # By batch, states that are known with it, and told once it is applied.
        self.seen: dict[int, list[tuple[Place, bytes]]] = {}
        self.silent = False  # no state can be kept
        self.warned: set[str] = set()
        if 1 < parts and self.most < UNEVEN * parts and self.most % parts:
            log.warning(
                "parts of a stream are unequal, and read equally often", shards=self.most, parts=parts
            )

    def draw_order(self) -> None:
        """Where the batches of this epoch lie."""
        # Who has begun no epoch begins in the one that is open, whose cut is known: mine is that of the very first.
        mine = self.mine if self.cut is None else self.cut.next(self.batches)
        token = self.ledger.open_epoch(self.batches, mine.to_bytes(), 0, 0)
        self.cut = self.mine.understand(token, self.most)
        self.seen.clear()

    def _over(self, places: Any) -> DataLoader[Any]:
        return like(self.loader, dataset=self.reader, batch_size=None, sampler=places, collate_fn=as_it_is)

    def _divided(self) -> Iterator[Any]:
        if self.staying is None or not self.slots:
            self._begin_pool()
        else:
            self.turn, self.pool = 0, self.staying
        if self.loader.persistent_workers:
            self.staying = self.pool
        yield from self._reads(super()._divided())

    def _again(self) -> Iterator[Any]:
        self._begin_pool()
        return self._reads(super()._again())

    def _begin_pool(self) -> None:
        """The next to be asked are processes that have read nothing yet; the script's own goes on."""
        self.turn = 0
        if self.slots:
            self.pools += 1
            self.pool = self.pools
            stay = (0, self.staying)
            self.stands = {slot: parts for slot, parts in self.stands.items() if slot[0] in stay}

    def _reads(self, source: Iterable[Read]) -> Iterator[Any]:
        try:
            for read in source:
                yield self._take_in(read)
        except Exception:
            self.stands.clear()  # who has failed begins anew
            raise

    def _take_in(self, read: Read) -> Any:
        assert self.cut is not None
        if read.failed:
            kind, fix = type(self.loader.dataset).__name__, "Look at what it reads."
            if self.cut.parts > 1:
                fix = "Make every part that zml_shard(index, count) or shard leaves hold at least one batch."
            raise ZmlError(LOADER, f"{kind}: {read.failed}", fix)
        batch = self.handed[0][0]
        if read.state is not None:
            self.seen.setdefault(batch, []).append((Place(self.cut.place(batch).part, read.at), read.state))
        if read.untold:
            self.silent = True
            self._warn("the stream is read from further back by whoever takes over", read.untold)
        if read.refused:
            self._warn("a part of the stream is read from its front", read.refused)
        return read.batch

    def _warn(self, what: str, because: str) -> None:
        """Once."""
        if what not in self.warned:
            self.warned.add(what)
            log.warning(what, dataset=type(self.loader.dataset).__name__, because=because)

    # -- what is asked of the reader ---------------------------------------------------------------------

    def asked(self, batch: int) -> tuple[Any, int]:
        assert self.cut is not None
        place = self.cut.place(batch)
        slot = self.pool, self.turn % max(self.slots, 1)
        self.turn += 1
        stands = self.stands.setdefault(slot, {})
        known = self._begin_at(stands.get(place.part), place)
        # As the reader does: it keeps open what was read last.
        keep = max(KEEP, 2 * self.cut.parts // max(self.ledger.workers * max(self.slots, 1), 1))
        stands.pop(place.part, None)
        stands[place.part] = place.position + 1
        while len(stands) > keep:
            del stands[next(iter(stands))]
        tell = not self.silent and self._is_time(batch, place)
        at, state = known or (0, None)
        wanted = Wanted(self.cut.parts, place.part, place.position, at, state, tell, keep)
        return wanted, self.loader.batch_size or 1

    def _begin_at(self, stands: int | None, place: Place) -> tuple[int, bytes] | None:
        """The state that a process needs which stands there, and where that is; None where it reads on, or from the
        front."""
        # Others' batches may lie between, and those of the other processes.
        far = EVERY + 2 * max(self.ledger.workers, 1) * max(self.slots, 1)
        if place.position == 0 or (stands is not None and stands <= place.position <= stands + far):
            return None
        own = self.known.get(place.part, {})
        at = max((position for position in own if position <= place.position), default=0)
        best = (at, own[at]) if at else None
        if at + EVERY < place.position and (found := self.ledger.find_state(place)) is not None:
            best = found if best is None or found[0] > best[0] else best
        begins = best[0] if best is not None else 0
        if stands is not None and begins <= stands <= place.position:
            begins, best = stands, None
        if place.position - begins > far:
            log.info("reading up to a place in the stream", part=place.part, batches=place.position - begins)
        return best

    def _is_time(self, batch: int, place: Place) -> bool:
        """For another state of this part? It comes with the next batch, and so before the last of an epoch, where
        processes end there."""
        assert self.cut is not None
        now = time.monotonic()
        last = self.asked_at.get(place.part)
        due = last is None or (abs(place.position - last.position) >= EVERY and now - last.at >= EVERY_S)
        stay = not self.slots or self.loader.persistent_workers
        if due or (not stay and self.cut.is_last_of_part(batch + self.cut.parts)):
            self.asked_at[place.part] = Asked(place.position, now)
            return True
        return False

    # -- what is applied ---------------------------------------------------------------------------------

    def take_done(self) -> list[int]:
        done = super().take_done()
        now = time.monotonic()
        for place, state in sorted(each for batch in done for each in self.seen.pop(batch, ())):
            own = self.known.setdefault(place.part, {})
            own[place.position] = state
            self.known[place.part] = {each: own[each] for each in thinned(own, place.position)}
            if now - self.told_at.get(place.part, -EVERY_S) >= EVERY_S:
                self.told_at[place.part] = now
                self.ledger.tell_state(place, state)
        return done

    def _stop(self) -> None:
        super()._stop()
        self.seen.clear()


def is_exact(loader: Any) -> bool:
    """Is it a loader over a stream that can say where it stands?"""
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or not isinstance(dataset, IterableDataset):
        return False
    return all(callable(getattr(dataset, name, None)) for name in ("state_dict", "load_state_dict"))


def copied(dataset: Any) -> Any:
    """Each part is read from a copy. Raises ZmlError."""
    try:
        return copy.deepcopy(dataset)
    except Exception as error:
        raise ZmlError(
            LOADER,
            f"a {type(dataset).__name__} cannot be copied: {error}",
            "Open files and connections in its __iter__: a copy is read by each who takes over a part of it.",
        ) from error


def as_it_is(read: Any) -> Any:
    return read
