"""Where a shard's push log begins: the shard's whole state at one record, so that the records before can go.

A base is a folder of records of its own, written beside the running shard and complete when its last record is there:

    the account (`Account`, msgpack), then one record per tensor: its `Name` and its bytes, then `END`

What is staged or waits for other workers is in it too, frames and all: a shard that begins from a base and reads the
log from there on is the one that read the whole log, to the bit, but for the logs of deltas (whoever is behind gets the
parameters themselves).
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
import numpy as np
import torch
from torch import Tensor

from ..codec import split
from ..hyper import read_hyper
from ..messages import Assign, Seat
from ..rates import Course
from ..records import Damaged, Records, sync_folder
from ..scheduler.ids import WorkerId
from ..scheduler.staleness import Account as GateAccount
from .counted import Committed, Last, Step
from .doubt import Doubt
from .snapshot import Snapshot
from .store import Staged

if TYPE_CHECKING:
    from .shard import Shard

PREFIX = "base-"
END = b"end"
STAGED = ("staged/", "committed/")  # so the names begin of tensors that are payloads


class Push(msgspec.Struct, frozen=True, array_like=True):
    """One staged bucket: its frames are the next tensor record of bytes."""

    bucket: int
    absent: list[int]
    payload: str  # name of the record
    seen: int = -1


Counted: TypeAlias = tuple[int, int, int, bytes, int]  # `counted.Last`


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """A shard without its tensors."""

    assign: Assign | None
    assignment: bytes
    generation: int
    seats: list[Seat]
    gate: dict[str, Any]
    fenced: dict[str, int]
    last: dict[str, Counted]
    applied: dict[str, Counted]
    staged: dict[str, dict[int, list[Push]]]  # by worker and clock
    committed: dict[int, dict[str, tuple[list[Push], Counted]]]  # by clock and worker
    hyper: bytes
    steps: int
    versions: dict[int, tuple[int, int, int]]
    course: Course = Course()
    doubt: tuple[int, list[int], bool] | None = None  # `doubt.Doubt`

    def lasts(self) -> Iterator[Counted]:
        """Of all steps that count and wait."""
        for steps in self.committed.values():
            yield from (last for _, last in steps.values())


@dataclass(slots=True)
class State:
    """A shard as it was at one moment. `tensors` holds staged payloads as bytes, too; what its chunks held is in them,
    or in a snapshot, which is read once."""

    account: Account
    tensors: dict[str, Tensor]
    snapshot: Snapshot | None = None

    def all(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.tensors.items()
        if self.snapshot is not None:
            yield from self.snapshot.tensors()


def state_of(shard: Shard, buckets: Collection[int] | None = None) -> State:
    """Of this moment: all, or only what it has of these buckets. In the shard's own thread; what is staged is copied
    now, and of the chunks nothing."""
    wanted = shard.buckets.keys() if buckets is None else buckets
    chunks = [chunk for bucket in sorted(wanted) for chunk in shard.buckets[bucket].chunks]
    snapshot = shard.store.snapshot(chunks, published=True) if shard.store is not None else None
    tensors: dict[str, Tensor] = {}

    def kept(pushes: Mapping[int, Staged], where: str) -> list[Push]:
        found = []
        for bucket, staged in sorted(pushes.items()):
            if bucket not in wanted:
                continue
            name = f"{where}/{bucket}"
            payload = bytearray().join(staged.frames.values())
            tensors[name] = torch.frombuffer(payload or bytearray(1), dtype=torch.uint8)[: len(payload)]
            found.append(Push(bucket, sorted(staged.absent), name, staged.seen))
        return found

    staged = {
        str(worker): {
            clock: kept(step.pushes, f"{STAGED[0]}{worker}/{clock}") for clock, step in steps.items()
        }
        for worker, steps in shard.staged.items()
    }
    committed: dict[int, dict[str, tuple[list[Push], Counted]]] = {
        clock: {
            str(worker): (
                kept(
                    dict(zip(sorted(shard.pushed), step.pushes, strict=True)), f"{STAGED[1]}{worker}/{clock}"
                ),
                step.last,
            )
            for worker, step in steps.items()
        }
        for clock, steps in shard.committed.items()
    }
    account = Account(
        assign=shard.assigned,
        assignment=shard.assignment,
        generation=shard.generation,
        seats=list(shard.seats),
        gate=msgspec.to_builtins(shard.gate.account()),
        fenced={str(worker): incarnation for worker, incarnation in shard.fenced.items()},
        last={str(worker): last for worker, last in shard.last.items()},
        applied={str(worker): last for worker, last in shard.applied.items()},
        staged=staged,
        committed=committed,
        hyper=shard.hyper_bytes,
        steps=shard.steps,
        versions=snapshot.versions if snapshot is not None else {},
        course=shard.pace.course,
        doubt=_told(shard.doubt) if buckets is None else None,
    )
    return State(account, tensors, snapshot)


def _told(doubt: Doubt | None) -> tuple[int, list[int], bool] | None:
    return None if doubt is None else (doubt.edition, sorted(doubt.buckets), doubt.gives)


def become(shard: Shard, state: State) -> None:
    """Make a new shard the one that was copied."""
    account, tensors = state.account, dict(state.all())
    if account.assign is not None:
        # Whatever checkpoint it began with is in the tensors.
        shard.replay(msgspec.structs.replace(account.assign, checkpoint=""), memoryview(account.assignment))
    if account.doubt is not None and shard.store is not None:
        edition, buckets, gives = account.doubt
        shard.doubt = Doubt(edition, frozenset(buckets), gives)
        if not gives:
            come = [shard.cut[index] for index in buckets]
            shard.store.make_room([chunk for bucket in come for chunk in bucket.chunks])
            shard.hold_buckets(sorted([*shard.buckets.values(), *come], key=lambda bucket: bucket.index))
    stand_as(shard, account)
    if shard.store is None:
        return
    shard.staged = {
        WorkerId(worker): {clock: Step(_staged(shard, kept, tensors)) for clock, kept in steps.items()}
        for worker, steps in account.staged.items()
    }
    shard.committed = {
        clock: {
            WorkerId(worker): committed_of(shard, list(_staged(shard, kept, tensors).values()), last)
            for worker, (kept, last) in steps.items()
        }
        for clock, steps in account.committed.items()
    }
    shard.store.load_state(account.versions, of_chunks(tensors))


def of_chunks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that are no payloads."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(STAGED)}


def stand_as(shard: Shard, account: Account) -> None:
    """Know of the workers what that one knew, and have nothing of their steps."""
    shard.gate.restore(msgspec.convert(account.gate, GateAccount))
    shard.generation, shard.seats, shard.steps = account.generation, account.seats, account.steps
    shard.incarnations = {WorkerId(seat.worker): seat.incarnation for seat in account.seats}
    shard.fenced = {WorkerId(worker): n for worker, n in account.fenced.items()}
    shard.last = {WorkerId(worker): Last(*last) for worker, last in account.last.items()}
    shard.applied = {WorkerId(worker): Last(*last) for worker, last in account.applied.items()}
    shard.staged, shard.committed = {}, {}
    shard.pace.course = account.course
    shard.agree()
    if account.hyper and shard.store is not None:
        shard.hyper, shard.hyper_bytes = read_hyper(account.hyper, shard.store.spec), account.hyper


def staged_of(push: Push, chunks: Sequence[int], tensors: Mapping[str, Tensor]) -> Staged:
    """Raises KeyError, or BadFrame, which is a ValueError."""
    frames = split(tensors[push.payload].numpy().data, chunks)
    return Staged(frames, frozenset(push.absent), push.seen)


def committed_of(shard: Shard, pushes: Sequence[Staged], last: Counted) -> Committed:
    assert shard.store is not None
    return Committed(pushes, read_hyper(last[3], shard.store.spec), Last(*last))


def _staged(shard: Shard, kept: Sequence[Push], tensors: Mapping[str, Tensor]) -> dict[int, Staged]:
    return {push.bucket: staged_of(push, shard.buckets[push.bucket].chunks, tensors) for push in kept}


# -- on disk --------------------------------------------------------------------------------------------------


class Name(msgspec.Struct, frozen=True, array_like=True):
    """The head of a tensor's record."""

    name: str
    dtype: str


def write(folder: Path, number: int, state: State) -> int:
    """Write the base of the log from record `number` on; then drop older bases. Returns its bytes. Raises OSError.

    It may run in a thread of its own.
    """
    path = folder / f"{PREFIX}{number:020d}"
    shutil.rmtree(path, ignore_errors=True)  # of a process that died while it wrote
    records, size = Records(path), 0
    try:
        records.append(msgspec.msgpack.encode(state.account))
        for name, tensor in state.all():
            head, data = packed(name, tensor)
            size += len(data)
            records.append(len(head).to_bytes(2, "little"), head, data)
        records.append(END)
        records.sync()
    except OSError:
        records.close()
        shutil.rmtree(path, ignore_errors=True)
        raise
    records.close()
    sync_folder(folder)  # the name of the base, before anything that it replaces goes
    for other, base in _bases(folder):
        if other < number:
            shutil.rmtree(base, ignore_errors=True)
    return size


def read(folder: Path) -> tuple[int, State] | None:
    """The newest base that is complete, and the number of the record that follows it; None without one.

    Raises Damaged. One that was not written to its end is passed over: the log before it is still there.
    """
    for number, path in reversed(_bases(folder)):
        records = Records(path)
        try:
            bodies = [body for _, body in records.replay()]
        finally:
            records.close()
        if not bodies or bodies[-1] != END:
            continue
        try:
            account = msgspec.msgpack.decode(bodies[0], type=Account)
            tensors = dict(_tensor(body) for body in bodies[1:-1])
        except (msgspec.MsgspecError, ValueError) as bad:
            raise Damaged(path, 0, f"it cannot be read: {bad}") from None
        return number, State(account, tensors)
    return None


def packed(name: str, tensor: Tensor) -> tuple[bytes, memoryview]:
    """A tensor as head and bytes; `unpacked` is the way back."""
    head = msgspec.msgpack.encode(Name(name, str(tensor.dtype).removeprefix("torch.")))
    return head, tensor.contiguous().view(torch.uint8).numpy().reshape(-1).data


def unpacked(head: bytes | memoryview, data: memoryview) -> tuple[str, Tensor]:
    """Raises ValueError (msgspec's errors are) or KeyError."""
    named = msgspec.msgpack.decode(head, type=Name)
    dtype = {"float32": torch.float32, "uint8": torch.uint8}[named.dtype]
    return named.name, torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()).view(dtype)


def _tensor(body: memoryview) -> tuple[str, Tensor]:
    end = 2 + int.from_bytes(body[:2], "little")
    return unpacked(body[2:end], body[end:])


def _bases(folder: Path) -> list[tuple[int, Path]]:
    return sorted((int(path.name.removeprefix(PREFIX)), path) for path in folder.glob(f"{PREFIX}*"))
