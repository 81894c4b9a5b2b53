"""What a shard holds of each of its chunks: w, p, the optimizer's state, a version and a log of deltas.

    w        the parameters, exact, fp32             p        what workers hold at the published version
    version  updates applied to w                    log      deltas that lead from older versions of p to p

The rules: a step is checked whole before any of it is applied; gradients are summed in the order given; a
delta is made once per chunk and version, when the first worker asks; the log of a chunk is never larger than
its parameters. With a lossless codec p is w, there is no log, and a step is torch's to the bit; with the others
it is one pass of `fused` over the chunk, right after its gradients were summed in memory that stays in the cache.
One thread owns a store.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .codec import UNKNOWN, BadFrame, Buffer, Codec, Header, Kind, parse
from .codec.frame import HEADER, write_header
from .hyper import Hyper, OptimizerSpec
from .layout import Chunk, Layout
from .optim import UpdateRule, adds, fused_state
from .pages import SIZE, Pages

if TYPE_CHECKING:
    from .fused import Update

ALIGNMENT = 64  # bytes: a cache line, and torch's own

# A plain addition moves w where gradients came, and so many elements bring p all the way. Momentum and Adam move w
# everywhere a little; more elements then bring p closer, and some go out even where nothing came.
MORE, LEAST = 2, 64  # a delta has MORE elements for each that came, and LEAST for each step


@dataclass(slots=True, eq=False)
class Staged:
    """One push: gradient frames by chunk, and the parameters (by index) that had no gradient in this step.

    A chunk may be left out where all its parameters are absent.
    """

    frames: Mapping[int, Buffer]
    absent: frozenset[int] = frozenset()
    checked: bool = field(default=False, init=False)  # by the store: frames are not checked twice


@dataclass(slots=True, eq=False)
class _Held:
    """One chunk. `dense` is a whole frame in memory: header, then p. With a lossless codec p is w."""

    chunk: Chunk
    parameters: frozenset[int]
    w: Tensor
    p: Tensor
    dense: memoryview
    rule: UpdateRule | None  # None: frozen
    version: int = UNKNOWN
    published: int = UNKNOWN
    log: deque[tuple[int, bytes]] = field(
        default_factory=deque
    )  # (base, frame); the last leads to `published`
    log_bytes: int = 0
    budget: int = 0  # elements that the next delta may have


class _Step:
    """One worker's pushes for one clock, together."""

    def __init__(self, pushes: Sequence[Staged]) -> None:
        self.frames: dict[int, Buffer] = {}
        for staged in pushes:
            if self.frames.keys() & staged.frames.keys():
                raise BadFrame("a chunk is pushed twice in one step")
            self.frames.update(staged.frames)
        self.absent = frozenset[int]().union(*(staged.absent for staged in pushes))


class Store:
    """The chunks of one shard. `chunks` are indices into the layout; the order is of no account."""

    def __init__(self, layout: Layout, chunks: Iterable[int], spec: OptimizerSpec, codec: Codec) -> None:
        self.layout = layout
        self.spec = spec
        self.codec = codec
        self.chunks = tuple(sorted(chunks))
        cut = [layout.chunks[index] for index in self.chunks]
        largest = max((chunk.size for chunk in cut), default=0)
        self._sum = torch.empty(largest)
        self._one = torch.empty(largest)
        self._slab = _aligned(sum(_stride(chunk) for chunk in cut))
        self._exact = self._slab if codec.lossless else _aligned(len(self._slab))  # w, at the places of p
        self._pages = Pages(2 * len(self._slab) + 2 * SIZE * len(cut))
        self._held: dict[int, _Held] = {}
        at = 0
        for chunk in cut:
            self._held[chunk.index] = self._hold(chunk, at)
            at += _stride(chunk)

    def _hold(self, chunk: Chunk, at: int) -> _Held:
        body = at + ALIGNMENT  # the header ends where the aligned body begins
        p = self._slab[body : body + 4 * chunk.size].view(torch.float32)
        w = p if self.codec.lossless else self._exact[body : body + 4 * chunk.size].view(torch.float32)
        dense = self._slab[body - HEADER.size : body + 4 * chunk.size].numpy().data.cast("B")
        rule = None if self.layout.frozen(chunk.index) else UpdateRule(self.spec, chunk, w)
        parameters = frozenset(segment.parameter for segment in chunk.segments)
        return _Held(chunk, parameters, w, p, dense, rule)

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
        bucket = [self._find(chunk) for chunk in chunks]
        wanted = sum(4 * held.chunk.size for held in bucket)
        if len(values) != wanted:
            raise BadFrame(f"{len(values)} bytes of first parameters for chunks that have {wanted}")
        if any(held.version > 0 for held in bucket):
            raise BadFrame("first parameters for a chunk that has had steps")
        rest = memoryview(values)
        for held in bucket:
            size = 4 * held.chunk.size
            held.w.view(torch.uint8).numpy().data[:] = rest[:size]
            if held.p is not held.w:
                held.p.copy_(held.w)
            held.version = held.published = 0
            self._head(held)
            rest = rest[size:]

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
        if not staged.absent <= set(range(len(self.layout.parameters))):
            raise BadFrame("an absent parameter that is not in the layout")
        staged.checked = True

    def check_step(self, pushes: Sequence[Staged]) -> None:
        """Raise BadFrame unless these pushes of one worker are together a whole step of this store."""
        self._together(pushes)

    def apply(self, steps: Sequence[Sequence[Staged]], hypers: Sequence[object]) -> None:
        """One step of the optimizer with the mean of the workers' steps, summed in the order given.

        Each of `steps` is what one worker pushed for one clock. A parameter that is absent from all is
        skipped, one absent from some counts as zero there. Raises BadFrame or BadHyper, and then has changed
        nothing.
        """
        accepted = self.spec.accept(hypers)
        together = [self._together(pushes) for pushes in steps]
        updates = self._updates(accepted, len(steps))
        for held in self._held.values():
            if held.rule is not None:
                group = held.chunk.group
                self._apply(held, held.rule, together, accepted[group], updates[group])

    def _updates(self, hypers: Sequence[Hyper], workers: int) -> Sequence[Update | None]:
        """Per group the fused update of one step; None where torch makes it."""
        if self.codec.lossless:
            return [None] * len(hypers)
        from . import fused  # compiled code, which a store with a lossless codec does without

        name = self.spec.name
        return [
            None if fused_state(name, hyper) is None else fused.update(name, hyper, workers)
            for hyper in hypers
        ]

    def _together(self, pushes: Sequence[Staged]) -> _Step:
        for staged in pushes:
            self.check(staged)
        step = _Step(pushes)
        for index, held in self._held.items():
            if held.rule is not None and index not in step.frames and not held.parameters <= step.absent:
                raise BadFrame(f"chunk {index} is missing from a step")
        return step

    def _apply(
        self, held: _Held, rule: UpdateRule, steps: Sequence[_Step], hyper: Hyper, update: Update | None
    ) -> None:
        index, own = held.chunk.index, held.parameters
        missing = [step.absent & own for step in steps if step.absent]  # of the parameters that live here
        given: list[Buffer]
        if any(missing):
            missing = [step.absent & own for step in steps]
            given = [step.frames[index] for step, absent in zip(steps, missing, strict=True) if absent != own]
            missing = [absent for absent in missing if absent != own]
            if not given:
                return  # every parameter is absent from every step: no update, no new version
            nowhere = frozenset.intersection(*missing)
        else:
            missing, nowhere = [], frozenset()
            given = [step.frames[index] for step in steps]
        gradient = self._add(held.chunk, given, missing)
        spans = rule.spans(hyper, nowhere) if update else None
        if update and spans is not None:
            moved = update(spans, gradient.numpy())
        else:
            moved = 0 if self.codec.lossless else int(torch.count_nonzero(gradient))
            if len(steps) > 1:
                gradient = torch.div(gradient, len(steps), out=self._sum[: held.chunk.size])
            rule.step(gradient, hyper, nowhere)
        held.budget += moved if adds(self.spec.name, hyper) else MORE * moved + LEAST
        held.version += 1

    def _add(self, chunk: Chunk, frames: Sequence[Buffer], missing: Sequence[frozenset[int]]) -> Tensor:
        """The sum of the frames, in order; what the only frame holds is not copied.

        `missing`: for each frame, the parameters that it does not speak of; empty if all speak of all.
        """
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

    # -- parameters for workers ------------------------------------------------------------------------------

    def version(self, chunk: int) -> int:
        """Updates applied to a chunk; UNKNOWN before its first parameters are here."""
        return self._find(chunk).version

    def pull(self, chunk: int, have: int) -> tuple[int, list[bytes]]:
        """A chunk's newest version, and the frames that lead there from `have` (UNKNOWN: from nothing)."""
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

    def _frames(self, held: _Held, have: int) -> Sequence[Buffer]:
        """What leads from `have` to the newest version. A memoryview is live: good until the next step."""
        assert held.version != UNKNOWN, f"chunk {held.chunk.index} has no parameters yet"
        if held.published != held.version:
            self._publish(held)
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

    def _publish(self, held: _Held) -> None:
        if not self.codec.lossless:
            budget = min(held.budget, held.chunk.size)
            frame = self.codec.publish(held.chunk, held.w, held.p, held.published, held.version, budget)
            held.budget = 0
            if parse(frame).kind == Kind.DELTA:
                held.log.append((held.published, frame))
                held.log_bytes += len(frame)
            else:
                held.log.clear()
                held.log_bytes = 0
            while held.log_bytes > len(held.dense):  # whoever is that far behind is better served with p
                held.log_bytes -= len(held.log.popleft()[1])
        held.published = held.version
        self._head(held)

    def _head(self, held: _Held) -> None:
        """Say in the dense frame which version its parameters are."""
        header = Header(0, Kind.PARAMETERS, held.chunk.index, held.published, 4 * held.chunk.size)
        write_header(held.dense, header)

    def _find(self, chunk: int) -> _Held:
        held = self._held.get(chunk)
        if held is None:
            raise BadFrame(f"chunk {chunk} is not held here")
        return held


def _stride(chunk: Chunk) -> int:
    """Bytes of one chunk in the slab: room for the header, then the body, to the next aligned address."""
    return ALIGNMENT + -(-4 * chunk.size // ALIGNMENT) * ALIGNMENT


def _aligned(size: int) -> Tensor:
    raw = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    skip = -raw.data_ptr() % ALIGNMENT
    return raw[skip : skip + size]
