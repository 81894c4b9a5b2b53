"""What a shard holds of each of its chunks: w, p, the optimizer's state, a version and a log of deltas.

    w        the parameters, exact, fp32             p        what workers hold at the published version
    version  updates applied to w                    log      deltas that lead from older versions of p to p

The rules: a step is checked whole before any of it is applied; gradients are summed in the order given; a
delta is made once per chunk and version, when the first worker asks; the log of a chunk is never larger than
its parameters. With a lossless codec p is w, there is no log, and a step is torch's to the bit; with `topk` it is one
pass of `fused` over a few chunks, right after their gradients were summed in memory that stays in the cache.
One thread owns a store. Whatever changes a chunk tells the door before: others may be reading what was (`snapshot`).
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..codec import UNKNOWN, BadFrame, Behind, Buffer, Codec, Kind, kernels, parse
from ..codec.sparse import TopK
from ..hyper import Hyper, OptimizerSpec
from ..layout import CHUNK, Chunk, Layout
from ..noise import Norms
from ..pages import SIZE, Pages
from .held import Held, by_chunk, room, stride
from .optim import adds, fused_state
from .snapshot import Door, Snapshot

if TYPE_CHECKING:
    from ..codec.sums import Sums
    from .fused import Update

log = logging.getLogger(__name__)

AT_ONCE = (
    4  # chunks whose sums are made together: they fit a second-level cache, and calls cost less per chunk
)

# A plain addition moves w where gradients came, and as many elements bring p all the way. Momentum and Adam move w
# everywhere a little; more elements then bring p closer, and some go out even where nothing came. Tried on a small
# classifier (4 workers, 1 %, 500 steps, final loss; all of w - p sent: SGD with momentum 0.718, Adam 0.709):
# a quarter as many as came 0.787 and 0.740, as many 0.756 and 0.733, twice as many 0.734 and 0.730, four times
# 0.740 and 0.722.
MORE, LEAST = 2, 64  # a delta has MORE elements for each that came, and LEAST for each step


@dataclass(slots=True, eq=False)
class Staged:
    """One push: gradient frames by chunk, and the parameters (by index) that had no gradient in this step.

    A chunk may be left out where all its parameters are absent.
    """

    frames: Mapping[int, Buffer]
    absent: frozenset[int] = frozenset()
    seen: int = UNKNOWN  # newest version of its chunks that it was computed with, if that was told
    checked: bool = field(default=False, init=False)  # by the store: frames are not checked twice
    rows: NDArray[np.int64] | None = field(default=None, init=False)  # (place, address, bytes) of each frame


class _Step:
    """One worker's pushes for one clock, together. `rows[place]` is (address, bytes) of a chunk's frame, or zeros."""

    def __init__(self, pushes: Sequence[Staged], places: int) -> None:
        self.rows = np.zeros((places, 2), np.int64)
        self.frames: dict[int, Buffer] = {}
        for staged in pushes:
            if self.frames.keys() & staged.frames.keys():
                raise BadFrame("a chunk is pushed twice in one step")
            self.frames.update(staged.frames)
            if staged.rows is not None:
                self.rows[staged.rows[:, 0]] = staged.rows[:, 1:]
        self.absent = frozenset[int]().union(*(staged.absent for staged in pushes))


class Store:
    """The chunks of one shard. `chunks` are indices into the layout; the order is of no account."""

    def __init__(
        self,
        layout: Layout,
        chunks: Iterable[int],
        spec: OptimizerSpec,
        codec: Codec,
        *,
        follow: bool = False,
    ) -> None:
        """`follow`: deltas are written as the newest gradients were, where workers choose that as they go."""
        self.layout = layout
        self.spec = spec
        self.codec = codec
        self._squares: list[float] | None = None  # of all gradients and of their sum, while they are measured
        self._door = Door(self)
        self.follow = follow
        self._follows = codec if follow and isinstance(codec, TopK) else None
        self._sums: Sums | None = None
        if isinstance(codec, TopK):
            for module in kernels.ON_SHARDS:  # now, and not in a step
                kernels.prepare(log.warning, module)
            self._batch = torch.empty(AT_ONCE * CHUNK)
        self._held: dict[int, Held] = {}
        self._arrange(self._room(chunks))

    def _room(self, chunks: Iterable[int]) -> dict[int, Held]:
        return room(self.layout, self.spec, chunks, lossless=self.codec.lossless)

    def _arrange(self, held: Mapping[int, Held]) -> None:
        """Hold these chunks, and no others."""
        self._held = {index: held[index] for index in sorted(held)}
        self.chunks = tuple(self._held)
        sizes = [each.chunk.size for each in self._held.values()]
        self._sum = torch.empty(max(sizes, default=0))
        self._one = torch.empty(max(sizes, default=0))
        strides = sum(stride(each.chunk) for each in self._held.values())
        self._pages = Pages(2 * strides + 2 * SIZE * len(sizes))
        self._trained = [each for each in self._held.values() if each.rule is not None]
        self._places = {each.chunk.index: place for place, each in enumerate(self._trained)}
        if isinstance(self.codec, TopK):
            from ..codec.sums import Sums

            self._sums = Sums(self.codec, [each.chunk for each in self._trained])
            self._batches = _batches(self._trained)
            self._tables: dict[int, tuple[tuple[NDArray[np.int64], ...], NDArray[np.int64]]] = {}

    # -- the first parameters ----------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """All chunks have their first parameters."""
        return all(held.version != UNKNOWN for held in self._held.values())

    def load(self, chunk: int, values: Buffer) -> None:
        """Version 0 of a chunk: fp32, as it lies in memory. Raises BadFrame, also after a step."""
        self.load_bucket((chunk,), values)

    def load_bucket(self, chunks: Sequence[int], values: Buffer) -> None:
        """Version 0 of several chunks, one after another. Raises BadFrame, and then has changed nothing."""
        rest = memoryview(values)
        bucket = self.check_load(chunks, values)
        self._door.changes(chunks)
        for held in bucket:
            size = 4 * held.chunk.size
            held.w.view(torch.uint8).numpy().data[:] = rest[:size]
            if held.p is not held.w:
                held.p.copy_(held.w)
            held.version = held.published = 0
            held.head()
            rest = rest[size:]

    def check_load(self, chunks: Sequence[int], values: Buffer) -> list[Held]:
        """Raise BadFrame unless these can be the first parameters of these chunks."""
        bucket = [self._find(chunk) for chunk in chunks]
        wanted = sum(4 * held.chunk.size for held in bucket)
        if len(values) != wanted:
            raise BadFrame(f"{len(values)} bytes of first parameters for chunks that have {wanted}")
        if any(held.version > 0 for held in bucket):
            raise BadFrame("first parameters for a chunk that has had steps")
        return bucket

    # -- steps -------------------------------------------------------------------------------------------

    def check(self, staged: Staged) -> None:
        """Raise BadFrame unless every frame of this push can be applied here."""
        if staged.checked:
            return
        for chunk, frame in staged.frames.items():
            held = self._find(chunk)
            if held.rule is None:
                raise BadFrame(f"a gradient for chunk {chunk}, which is frozen")
            self.codec.check(held.chunk, frame)
            if self._follows is not None:
                self._follows.follow(held.chunk, frame)
        if self._sums is not None and staged.frames:
            rows = [(self._places[i], *self._sums.row(frame)) for i, frame in staged.frames.items()]
            staged.rows = np.array(rows, np.int64)
        if not staged.absent <= set(range(len(self.layout.parameters))):
            raise BadFrame("an absent parameter that is not in the layout")
        staged.checked = True

    def check_step(self, pushes: Sequence[Staged]) -> None:
        """Raise BadFrame unless these pushes of one worker are together a whole step of this store."""
        self._together(pushes)

    def apply(
        self, steps: Sequence[Sequence[Staged]], hypers: Sequence[object], *, measure: bool = False
    ) -> Norms | None:
        """One step of the optimizer with the mean of the workers' steps, summed in the order given.

        Each of `steps` is what one worker pushed for one clock. A parameter that is absent from all is
        skipped, one absent from some counts as zero there. Raises BadFrame or BadHyper, and then has changed
        nothing. `measure`: returns the gradients' norms, where the codec is not sparse.
        """
        accepted = self.spec.accept(hypers)
        together = [self._together(pushes) for pushes in steps]
        if self._sums is not None:
            self._apply_sums(self._sums, together, accepted)
            return None
        self._squares = [0.0, 0.0] if measure else None
        for held in self._trained:
            self._apply(held, together, accepted[held.chunk.group])
        if self._squares is None:
            return None
        each, mean = self._squares
        return Norms(each / len(steps), mean / len(steps) ** 2)

    def _together(self, pushes: Sequence[Staged]) -> _Step:
        for staged in pushes:
            self.check(staged)
        step = _Step(pushes, 0 if self._sums is None else len(self._trained))
        for index, held in self._held.items():
            if held.rule is not None and index not in step.frames and not held.parameters <= step.absent:
                raise BadFrame(f"chunk {index} is missing from a step")
        return step

    def _apply(self, held: Held, steps: Sequence[_Step], hyper: Hyper, update: Update | None = None) -> None:
        given: list[Buffer] = []
        missing: list[frozenset[int]] = []  # of each given frame, the parameters that it does not speak of
        for step in steps:
            absent = step.absent & held.parameters if step.absent else step.absent
            if len(absent) < len(held.parameters):
                given.append(step.frames[held.chunk.index])
                missing.append(absent)
        if not given:
            return  # every parameter is absent from every step: no update, no new version
        try:
            total = self._add(held.chunk, given, missing)
        except BadFrame:  # it was whole when it came; in shared memory its sender has changed it since
            log.warning(
                "a checked frame has changed: chunk %d takes no gradient in this step", held.chunk.index
            )
            total = self._sum[: held.chunk.size].zero_()
        if self._squares is not None:
            try:
                self._measure(self._squares, held.chunk, given, missing, total)
            except BadFrame:  # as above: the step is made, and nothing is said of its norms
                self._squares = None
        self._update(held, total, len(steps), hyper, update, frozenset.intersection(*missing))

    def _update(
        self,
        held: Held,
        total: Tensor,
        workers: int,
        hyper: Hyper,
        update: Update | None,
        absent: frozenset[int] = frozenset(),
    ) -> None:
        """One chunk's step, given the sum of the workers' gradients, which may be used up."""
        self._door.changes((held.chunk.index,))
        moved = 0 if self.codec.lossless else int(torch.count_nonzero(total))
        spans = None if update is None else held.trained.spans(hyper, absent)
        if update is not None and spans is not None:
            update(spans, total.numpy(), np.full(len(spans), moved))
        else:
            if workers > 1:
                total = torch.div(total, workers, out=self._sum[: held.chunk.size])
            held.trained.step(total, hyper, absent)
        self._moved(held, hyper, moved)

    def _apply_sums(self, sums: Sums, steps: Sequence[_Step], hypers: Sequence[Hyper]) -> None:
        """The same, a few chunks at once."""
        from .fused import update

        name, workers = self.spec.name, len(steps)
        updates = [
            None if fused_state(name, hyper) is None else update(name, hyper, workers) for hyper in hypers
        ]
        frames = np.stack([step.rows for step in steps], axis=1)
        partial = [step.absent for step in steps if step.absent]
        total = self._batch.numpy()
        for place, last in self._batches:
            batch = self._trained[place:last]
            apart = {
                held.chunk.index
                for held in batch
                if any(not absent.isdisjoint(held.parameters) for absent in partial)
            }
            group = batch[0].chunk.group
            hyper, fused = hypers[group], updates[group]
            entries = sums.take(place, last, frames, total)
            if fused is not None and not apart:
                self._door.changes([held.chunk.index for held in batch])
                parts = [held.trained.spans(hyper) for held in batch]
                if (table := self._table(place, parts)) is not None:
                    fused(table, total, entries)
                    for held, count in zip(batch, entries.tolist(), strict=True):
                        self._moved(held, hyper, count)
                    continue
            for slot, held in enumerate(batch):
                if held.chunk.index in apart:
                    self._apply(held, steps, hyper, fused)
                    continue
                values = self._batch[slot * CHUNK : slot * CHUNK + held.chunk.size]
                self._update(held, values, workers, hyper, fused)

    def _table(self, place: int, parts: list[NDArray[np.int64] | None]) -> NDArray[np.int64] | None:
        """The spans of a batch in one table, if each of its chunks has one span. Mostly they are those of before."""
        known, table = self._tables.get(place, ((), None))
        if len(known) == len(parts) and all(map(operator.is_, known, parts)):
            return table
        spans = [part for part in parts if part is not None and len(part) == 1]
        if len(spans) < len(parts):
            return None
        table = np.concatenate(spans)
        table[:, 0] += CHUNK * np.arange(len(table))
        self._tables[place] = (tuple(spans), table)
        return table

    def _moved(self, held: Held, hyper: Hyper, elements: int) -> None:
        held.budget += elements if adds(self.spec.name, hyper) else MORE * elements + LEAST
        held.version += 1

    def _add(self, chunk: Chunk, frames: Sequence[Buffer], missing: Sequence[frozenset[int]]) -> Tensor:
        """The sum of the frames, in order; what the only frame holds is not copied."""
        if len(frames) == 1 and (only := self.codec.view(chunk, frames[0])) is not None:
            return only
        total = self._sum[: chunk.size]
        if len(frames) == 1 or not any(missing):
            self.codec.total(chunk, frames, total)
            return total
        total.zero_()
        one = self._one[: chunk.size]
        for frame, absent in zip(frames, missing, strict=True):
            self.codec.decode(chunk, frame, one, add=False)
            for segment in chunk.segments:
                if segment.parameter in absent:
                    one[segment.offset : segment.offset + segment.size].zero_()
            total.add_(one)
        return total

    def _measure(
        self,
        squares: list[float],
        chunk: Chunk,
        frames: Sequence[Buffer],
        missing: Sequence[frozenset[int]],
        total: Tensor,
    ) -> None:
        """One chunk's share of the squared norms; right behind `_add`, while the frames are in the cache."""
        for frame, absent in zip(frames, missing, strict=True):
            one = self.codec.view(chunk, frame)
            if one is None or absent:
                one = self._one[: chunk.size]
                self.codec.decode(chunk, frame, one, add=False)
                for segment in chunk.segments:
                    if segment.parameter in absent:
                        one[segment.offset : segment.offset + segment.size].zero_()
            square = float(torch.dot(one, one))
            squares[0] += square
        # What `_add` makes of a single frame still has in it what is absent.
        squares[1] += float(torch.dot(total, total)) if len(frames) > 1 else square

    # -- coming back -----------------------------------------------------------------------------------------

    @property
    def optimizer_bytes(self) -> int:
        """Of the optimizer's state, about: as the first chunk has it."""
        for held in self._trained[:1]:
            state = sum(tensor.nbytes for tensor in held.trained.state().values())
            return state * sum(each.chunk.size for each in self._trained) // held.chunk.size
        return 0

    @property
    def state_bytes(self) -> int:
        """Of parameters and optimizer state, about."""
        copies = 1 if self.codec.lossless else 2
        return 4 * copies * sum(held.chunk.size for held in self._held.values()) + self.optimizer_bytes

    @property
    def newest(self) -> int:
        """The version of the chunk that has had the most updates."""
        return max((held.version for held in self._held.values()), default=0)

    def begin_with(self, chunks: Mapping[int, Mapping[str, NDArray[np.float32]]]) -> None:
        """Version 0 of every chunk, w and optimizer state, from a checkpoint; what is read-only is copied, the rest
        taken over. ValueError if it does not fit."""
        tensors = {
            f"{index}/{name}": torch.from_numpy(values if values.flags.writeable else np.array(values))
            for index, parts in chunks.items()
            for name, values in parts.items()
        }
        for index, held in self._held.items():
            if tensors[f"{index}/w"].shape != held.w.shape:
                raise ValueError(
                    f"chunk {index} has {tensors[f'{index}/w'].numel()} elements, not {held.chunk.size}"
                )
        self.load_state(dict.fromkeys(self._held, (0, 0, 0)), tensors)

    def snapshot(self, chunks: Iterable[int] | None = None, *, published: bool) -> Snapshot:
        """All chunks, or these, as they are at this moment, to be read in any thread while steps are made.

        "CHUNK/p" is in it where it may differ from w, if `published` is wanted. The logs of deltas are not: whoever is
        behind gets p.
        """
        wanted = self._held if chunks is None else {index: self._held[index] for index in chunks}
        versions = {index: (held.version, held.published, held.budget) for index, held in wanted.items()}
        return self._door.mark(versions, published=published)

    def sizes(self, chunk: int, *, published: bool) -> dict[str, int]:
        """Of `parts`, in their order."""
        held = self._held[chunk]
        own = {"w": held.chunk.size}
        if published and held.p is not held.w:
            own["p"] = held.chunk.size
        return own | held.rule.sizes() if held.rule is not None else own

    def parts(self, chunk: int, *, published: bool) -> dict[str, Tensor]:
        """A chunk's parameters and optimizer state, live. For the door; `sizes` may be asked in any thread, too."""
        held = self._held[chunk]
        own = {"w": held.w}
        if published and held.p is not held.w:
            own["p"] = held.p
        return own | held.rule.state() if held.rule is not None else own

    def load_state(self, versions: Mapping[int, tuple[int, int, int]], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what a snapshot has, to the bit. ValueError if it does not fit these chunks."""
        if versions.keys() != self._held.keys():
            raise ValueError(
                f"a state of {len(versions)} chunks, which are not the {len(self._held)} held here"
            )
        parts = by_chunk(tensors)
        self._door.changes(self.chunks)
        for index, held in self._held.items():
            held.fill(versions[index], parts[index])
        if self._sums is not None:
            self._tables.clear()  # addresses of states that are gone

    # -- chunks come and go ----------------------------------------------------------------------------------

    def made_of(
        self, versions: Mapping[int, tuple[int, int, int]], tensors: Mapping[str, Tensor]
    ) -> dict[int, Held]:
        """Chunks of another store as a snapshot has them, to be taken in. ValueError if they do not fit."""
        parts = by_chunk(tensors)
        if (
            not all(0 <= index < len(self.layout.chunks) for index in versions)
            or versions.keys() != parts.keys()
        ):
            raise ValueError(f"{len(versions)} chunks, and tensors of {len(parts)}")
        found = self._room(versions)
        for index, held in found.items():
            if "w" not in parts[index]:
                raise ValueError(f"chunk {index} without parameters")
            held.fill(versions[index], parts[index])
        return found

    def take_in(self, chunks: Mapping[int, Held]) -> None:
        """Hold these too, from `made_of`."""
        self._arrange({**self._held, **chunks})

    def make_room(self, chunks: Iterable[int]) -> None:
        """Hold these too, which `load_state` will fill."""
        self._arrange({**self._held, **self._room(chunks)})

    def let_go(self, chunks: Collection[int]) -> None:
        """Hold these no more. Memory goes with the last chunk that came with them."""
        self._door.changes(list(chunks))
        self._arrange({index: held for index, held in self._held.items() if index not in chunks})

    # -- parameters for workers ------------------------------------------------------------------------------

    def version(self, chunk: int) -> int:
        """Updates applied to a chunk; UNKNOWN before its first parameters are here."""
        return self._find(chunk).version

    def missed(self, staged: Staged) -> int:
        """Updates made since the parameters with which this push was computed; 0 where that was not told."""
        if staged.seen == UNKNOWN or not staged.frames:
            return 0
        return max(0, max(self._find(chunk).version for chunk in staged.frames) - staged.seen)

    def to_publish(self, chunks: Sequence[int]) -> bool:
        """Would `publish_bucket` choose anything? What it chooses depends on when it does; a lossless codec leaves out
        nothing, and so has nothing to choose."""
        return not self.codec.lossless and any(
            held.published != held.version for held in map(self._find, chunks)
        )

    def publish_bucket(self, chunks: Sequence[int]) -> None:
        """Bring the published parameters of these chunks to their newest version."""
        behind = [held for held in map(self._find, chunks) if held.published != held.version]
        if behind:
            self._publish(behind)

    def pull(self, chunk: int, have: int) -> tuple[int, list[bytes]]:
        """A chunk's newest version, and the frames that lead there from `have` (UNKNOWN: from nothing)."""
        self.publish_bucket((chunk,))
        held = self._find(chunk)
        frames = [frame if isinstance(frame, bytes) else bytes(frame) for frame in self._frames(held, have)]
        return held.published, frames

    def pull_bucket(
        self, chunks: Sequence[int], have: Sequence[int]
    ) -> tuple[list[int], list[int], memoryview]:
        """The same for several chunks: their versions, how many frames each has, and the frames, copied once.

        The payload is the caller's for as long as it holds a view of it.
        """
        versions: list[int] = []
        counts: list[int] = []
        payload: list[Buffer] = []
        self.publish_bucket(chunks)
        for chunk, version in zip(chunks, have, strict=True):
            held = self._find(chunk)
            frames = self._frames(held, version)
            versions.append(held.published)
            counts.append(len(frames))
            payload += frames
        size = sum(map(len, payload))
        copy, at = self._pages.lend(size), 0
        for frame in payload:
            copy[at : at + len(frame)] = frame
            at += len(frame)
        return versions, counts, copy.toreadonly()

    def _frames(self, held: Held, have: int) -> Sequence[Buffer]:
        """What leads from `have` to what is published. A memoryview is live: good until the next step."""
        assert held.version != UNKNOWN, f"chunk {held.chunk.index} has no parameters yet"
        if have == held.published:
            return ()
        way: list[Buffer] = []
        for base, frame in reversed(held.log):  # mostly one step: the log may be long
            if base < have:
                break
            way.append(frame)
            if base == have:
                return way[::-1]
        return (held.dense,)

    def _publish(self, behind: Sequence[Held]) -> None:
        if not self.codec.lossless:
            for held, frame in zip(behind, self._deltas(behind), strict=True):
                held.budget = 0
                if parse(frame).kind == Kind.DELTA:
                    held.log.append((held.published, frame))
                    held.log_bytes += len(frame)
                else:
                    held.log.clear()
                    held.log_bytes = 0
                while held.log_bytes > len(held.dense):  # whoever is that far behind is better served with p
                    held.log_bytes -= len(held.log.popleft()[1])
        for held in behind:
            held.published = held.version
            held.head()

    def _deltas(self, behind: Sequence[Held]) -> list[bytes]:
        given = []
        for held in behind:
            self._door.publishes(held.chunk.index)
            budget = min(held.budget, held.chunk.size)
            given.append(Behind(held.chunk, held.w, held.p, held.published, held.version, budget))
        return self.codec.publish(given)

    def _find(self, chunk: int) -> Held:
        held = self._held.get(chunk)
        if held is None:
            raise BadFrame(f"chunk {chunk} is not held here")
        return held


def _batches(trained: Sequence[Held]) -> list[tuple[int, int]]:
    """Neighbours of one group, AT_ONCE of them: the places where a batch begins and ends."""
    found: list[tuple[int, int]] = []
    for place, held in enumerate(trained):
        if found and found[-1][0] > place - AT_ONCE and trained[place - 1].chunk.group == held.chunk.group:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return found
