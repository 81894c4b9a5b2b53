"""A loader over an IterableDataset that can say where it stands, divided exactly: which samples are in which batch does
not depend on who reads it, and no sample is lost or read into two batches.

`parts` says where each batch lies and `reader` reads it there. Here is which of them this worker is leased, and where
states of the stream are known: those that this worker has seen, and those that the coordinator keeps of all. A state is
told once what was read before it is applied, now and then; what lies between it and the place that is wanted is read
again, and dropped.

With `zml_shard(index, count)`, or the `shard` of Hugging Face's `datasets`, the stream is read in as many parts as the
job was asked to have workers, times the processes of a loader. Then each worker reads only its own, as long as all are
there. Without, each reads everything and drops what others train.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Protocol

import structlog
from torch.utils.data import DataLoader, IterableDataset

from ..errors import LOADER, ZmlError
from .data import DividedLoader, Ledger, Returned, Share
from .parts import Cut, Place
from .reader import Read, Reader, Wanted, most_parts
from .streams import length

EVERY = 16  # batches of a part between two states of it that are told
EVERY_S = 1.0  # and no sooner
KEPT = 4  # states of a part that this worker keeps itself
HERE = -1  # in the process of the script

log = structlog.get_logger()


class StreamLedger(Ledger, Protocol):
    """The ledger, where it also keeps states of a stream."""

    def tell_state(self, place: Place, state: bytes) -> None:
        """What lies before this place is applied, and this is the state there. May be lost."""
        ...

    def find_state(self, place: Place) -> tuple[int, bytes] | None:
        """The position of the nearest state that is kept, at this place or before it, and the state."""
        ...


class ExactStream(DividedLoader):
    """Yields what each leased batch of the stream holds."""

    ledger: StreamLedger

    def __init__(
        self, loader: DataLoader[Any], ledger: StreamLedger, workers: int, batches: int | None = None
    ) -> None:
        super().__init__(loader, ledger, checked=True)
        self.batches = length(loader) if batches is None else batches
        if self.batches < 1:
            what = f"an epoch of {self.batches} batches"
            raise ZmlError(LOADER, what, "Give zml.join at least batches=1 of a stream.")
        # An empty stream says so when it is read.
        parts = max(1, min(workers * max(1, loader.num_workers), most_parts(loader.dataset)))
        self.mine = Cut.first(parts, self.batches, loader.batch_size or 0, bool(loader.drop_last))
        self.cut: Cut | None = None  # of the newest epoch; None before this worker's first

        def reader() -> Reader:
            return Reader(loader.dataset, loader.batch_size, bool(loader.drop_last), loader.collate_fn)

        # Processes of the loader get what this one has open with them: nothing.
        self.here, self.there = reader(), reader()
        self.slots = loader.num_workers
        self.turn = 0  # of the processes of the loader, which are asked one after another
        self.returned = False  # what is asked for now is read in this process
        self.stands: dict[tuple[int, int], int] = {}  # by process and part: it reads on from there
        self.known: dict[int, list[tuple[int, bytes]]] = {}  # states by part, in ascending order
        self.told: dict[int, tuple[int, float]] = {}  # by part, the last that was asked for: where, and when
        self.seen: dict[int, tuple[Place, bytes]] = {}  # by batch, the state behind it; until it is applied
        self.warned = False

    def __len__(self) -> int:
        return self.batches

    def samples_of(self, batch: int) -> list[int]:
        return []  # they have no indices

    def draw_order(self) -> None:
        """Where the batches of this epoch lie."""
        # Who has begun no epoch begins in the one that is open, whose cut is known: mine is that of the very first.
        mine = self.mine if self.cut is None else self.cut.next(self.batches)
        self.cut = self.mine.understand(self.ledger.open_epoch(self.batches, mine.to_bytes(), 0, 0))
        self.seen.clear()

    def _divided(self) -> Iterator[Any]:
        if self._inner is None:
            self._inner = reading(
                self.loader, self.there if self.slots else self.here, Share(self), self.slots
            )
        self.turn, self.returned = 0, False
        if not self.loader.persistent_workers:
            self.stands = {(slot, part): at for (slot, part), at in self.stands.items() if slot == HERE}
        for read in self._inner:
            yield self._take_in(read)

    def _again(self) -> Iterator[Any]:
        self.returned = True
        for read in reading(self.loader, self.here, Returned(self), 0):
            yield self._take_in(read)

    def _take_in(self, read: Read) -> Any:
        assert self.cut is not None
        if read.failed:
            kind = type(self.loader.dataset).__name__
            fix = "Make every part that zml_shard(index, count) or shard leaves hold at least one batch."
            raise ZmlError(LOADER, f"{kind}: {read.failed}", fix)
        batch = self.handed[0][0]
        if read.state is not None:
            part, position = self.cut.place(batch)
            self.seen[batch] = Place(part, position + 1), read.state
        if read.untold and not self.warned:
            self.warned = True
            log.warning(
                "a stream's state cannot be kept: who goes on reads from further back", because=read.untold
            )
        return read.batch

    # -- what is asked of the reader ---------------------------------------------------------------------

    def asked(self, batch: int) -> tuple[Any, int]:
        assert self.cut is not None
        place = self.cut.place(batch)
        slot = self.turn % self.slots if self.slots and not self.returned else HERE
        self.turn += 1
        known, state = self._begin_at(slot, place)
        self.stands[slot, place.part] = place.position + 1
        tell = self._is_to_tell(batch, place)
        wanted = Wanted(self.cut.parts, place.part, place.position, known, state, tell)
        return wanted, self.loader.batch_size or 1

    def _begin_at(self, slot: int, place: Place) -> tuple[int, bytes | None]:
        """The state that this process needs, if it needs one: where it is, and the state."""
        stands = self.stands.get((slot, place.part))
        if place.position == 0 or (stands is not None and stands <= place.position < stands + EVERY):
            return 0, None
        own = [each for each in self.known.get(place.part, ()) if each[0] <= place.position]
        best = own[-1] if own else None
        if best is None or best[0] + EVERY < place.position:
            best = max(filter(None, (best, self.ledger.find_state(place))), default=None)
        if best is None or (stands is not None and best[0] <= stands <= place.position):
            return 0, None
        return best

    def _is_to_tell(self, batch: int, place: Place) -> bool:
        """Is it time for another state of this part? At the end of an epoch always: processes end there."""
        assert self.cut is not None
        now = time.monotonic()
        at, when = self.told.get(place.part, (0, now))
        due = abs(place.position + 1 - at) >= EVERY and now - when >= EVERY_S
        if due or self.cut.is_last_of_part(batch) or place.part not in self.told:
            self.told[place.part] = place.position + 1, now
            return True
        return False

    # -- what is applied ---------------------------------------------------------------------------------

    def take_done(self) -> list[int]:
        done = super().take_done()
        newest: dict[int, tuple[Place, bytes]] = {}
        for batch in done:
            if (seen := self.seen.pop(batch, None)) is not None:
                newest[seen[0].part] = max(seen, newest.get(seen[0].part, seen))
        for place, state in newest.values():
            kept = dict(self.known.get(place.part, ())) | {place.position: state}
            self.known[place.part] = sorted(kept.items())[-KEPT:]
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


def reading(loader: DataLoader[Any], reader: Reader, places: Any, processes: int) -> DataLoader[Any]:
    """A loader with everything of `loader`, that asks the reader for these places, one after another."""
    beside: dict[str, Any] = {}
    if processes:
        beside = {
            "timeout": loader.timeout,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
        }
    return DataLoader(
        reader,  # type: ignore[arg-type]  # it has what a map-style data set is asked for
        batch_size=None,
        sampler=places,
        collate_fn=as_it_is,
        num_workers=processes,
        pin_memory=loader.pin_memory,
        generator=loader.generator,
        **beside,
    )


def as_it_is(read: Any) -> Any:
    return read
