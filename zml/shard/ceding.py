"""How buckets go from one shard to another that has joined, while the job trains: a two-phase commit over two logs.

    all      Hold, Align     what would count waits, and all stand alike (`holding`)
    source   Cede            its buckets are packed: parameters, optimizer state, and what is staged for them
    target   Graft           has them from now on, and what the source knows of workers where it knew nothing
    all      Assign          an edition of the placement says who holds what: either as it was, or as it is to be

From Cede and Graft on the two are in doubt: nothing that a worker says counts there, and what speaks of these buckets
waits, until the edition has come. The coordinator decides it alone, in its journal, and whoever is away gets it when it
is back (Gray, "Notes on Data Base Operating Systems", 1978). A roster changes both alike meanwhile, for both have
everything.

Rules: what cannot be done changes nothing; all of it is in the log, doubt and all. Workers are asked to make themselves
known again with the new edition, so that nobody speaks to a shard of buckets that it does not hold.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import msgspec
import structlog
from msgspec.structs import replace
from torch import Tensor

from ..hyper import read_hyper
from ..messages import Assign, Assignment, Cede, Front, Graft, Message, Ok
from ..records import MOST_BYTES
from ..scheduler.ids import WorkerId
from ..transport import Refusal
from . import base
from .counted import Committed, Step
from .doubt import Doubt, anew
from .holding import front_of, must_stand

if TYPE_CHECKING:
    from .held import Held
    from .shard import Shard
    from .store import Staged

MOST_PARCEL = MOST_BYTES - (4 << 20)  # it is one record of a log, with its heads and what is known of workers

log = structlog.get_logger()


class Parcel(msgspec.Struct, frozen=True, array_like=True):
    """The payload of a Graft: a `base.State` of some buckets, and where the shard stood that packed it."""

    front: Front
    account: base.Account
    tensors: list[tuple[bytes, bytes]]  # `base.packed`


# -- the source ------------------------------------------------------------------------------------------


def cede(core: Shard, message: Cede, payload: bytes | memoryview) -> tuple[Message, bytes]:
    """Pack these buckets, and do nothing with them any more. Twice is the same as once."""
    buckets = frozenset(message.buckets)
    if core.doubt is None:
        if not core.replaying:
            core.held(message.checkpoint)
            must_stand(core, payload)
            if message.edition <= core.edition or not buckets <= core.buckets.keys():
                raise Refusal("placement", f"{core.name} does not hold all of buckets {sorted(buckets)}")
        parcel = b"" if core.replaying else _packed(core, buckets)
        core.note(message)
        _doubt(core, Doubt(message.edition, buckets, gives=True))
        return Ok(), parcel
    if (core.doubt.edition, core.doubt.buckets) != (message.edition, buckets):
        raise Refusal("placement", f"edition {core.doubt.edition} is being decided")
    return Ok(), _packed(core, buckets)


def _packed(core: Shard, buckets: Collection[int]) -> bytes:
    state = base.state_of(core, buckets)
    size = sum(each.nbytes for each in state.tensors.values())
    size += state.snapshot.bytes if state.snapshot is not None else 0
    if size > MOST_PARCEL:  # another time less may be staged
        raise Refusal("placement", f"{size >> 20} MB are too much to move at once")
    tensors = [(head, bytes(data)) for head, data in (base.packed(*each) for each in state.all())]
    return msgspec.msgpack.encode(Parcel(front_of(core), state.account, tensors))


# -- the target ------------------------------------------------------------------------------------------


def graft(core: Shard, message: Graft, payload: bytes | memoryview) -> Message:
    """Hold these buckets too. Raises Refusal where they do not fit, and then nothing has changed."""
    if core.doubt is not None and core.doubt.edition == message.edition:
        return Ok()
    account, buckets, tensors, chunks = _unpacked(core, message, payload)
    core.note(message, payload)
    _take_in(core, account, buckets, tensors, chunks)
    _doubt(core, Doubt(message.edition, buckets, gives=False))
    return Ok()


def _unpacked(
    core: Shard, message: Graft, payload: bytes | memoryview
) -> tuple[base.Account, frozenset[int], dict[str, Tensor], dict[int, Held]]:
    if core.store is None or core.doubt is not None or message.edition <= core.edition:
        raise Refusal("placement", f"{core.name} takes nothing in for edition {message.edition}")
    try:
        parcel = msgspec.msgpack.decode(payload, type=Parcel)
        tensors = dict(base.unpacked(head, memoryview(data)) for head, data in parcel.tensors)
        buckets = _buckets_of(core, parcel.account)
    except (ValueError, KeyError) as bad:
        raise Refusal("frame", f"what was ceded to {core.name} cannot be read: {bad}") from None
    if core.buckets.keys() & buckets:
        raise Refusal("placement", f"{core.name} holds some of buckets {sorted(buckets)}")
    if parcel.account.generation != core.generation:
        raise Refusal("stale", f"{core.name} knows generation {core.generation}, and not the same workers")
    if core.buckets and parcel.front != front_of(core):
        raise Refusal("stale", f"{core.name} stands elsewhere than who cedes")
    try:
        chunks = core.store.made_of(parcel.account.versions, base.of_chunks(tensors))
        for push in _pushes(parcel.account):
            base.staged_of(push, core.cut[push.bucket].chunks, tensors)
        for last in parcel.account.lasts():
            read_hyper(last[3], core.store.spec)
    except (ValueError, KeyError, IndexError) as bad:
        raise Refusal("frame", f"what was ceded to {core.name} does not fit: {bad}") from None
    return parcel.account, buckets, tensors, chunks


def _buckets_of(core: Shard, account: base.Account) -> frozenset[int]:
    """Those whose chunks are in it. KeyError where they are not whole."""
    found = frozenset(bucket.index for bucket in core.cut if account.versions.keys() & set(bucket.chunks))
    if account.versions.keys() != {chunk for index in found for chunk in core.cut[index].chunks}:
        raise KeyError("a bucket is not whole")
    return found


def _pushes(account: base.Account) -> Iterable[base.Push]:
    for steps in account.staged.values():
        for pushes in steps.values():
            yield from pushes
    for counted in account.committed.values():
        for pushes, _ in counted.values():
            yield from pushes


def _take_in(
    core: Shard,
    account: base.Account,
    buckets: frozenset[int],
    tensors: dict[str, Tensor],
    chunks: dict[int, Held],
) -> None:
    assert core.store is not None
    if not core.buckets:  # it knows nothing of workers that the other does not know better, but who is lost
        fenced = core.fenced
        base.stand_as(core, account)
        core.fenced |= {w: n for w, n in fenced.items() if core.incarnations.get(w) == n}

    def come(kept: list[base.Push]) -> dict[int, Staged]:
        return {push.bucket: base.staged_of(push, core.cut[push.bucket].chunks, tensors) for push in kept}

    for name, steps in account.staged.items():
        staged = core.staged.setdefault(WorkerId(name), {})
        for clock, kept in steps.items():
            staged.setdefault(clock, Step()).pushes.update(come(kept))
    order = sorted(core.pushed)
    for clock, counted in account.committed.items():
        for name, (kept, last) in counted.items():
            committed = core.committed.setdefault(clock, {})
            before = committed.get(WorkerId(name))
            pushes = dict(zip(order, before.pushes, strict=True)) if before is not None else {}
            pushes |= come(kept)
            committed[WorkerId(name)] = base.committed_of(core, [pushes[i] for i in sorted(pushes)], last)
    core.store.take_in(chunks)
    _hold_only(core, core.buckets.keys() | buckets)


# -- both, and all others ----------------------------------------------------------------------------------


def settle(core: Shard, message: Assign, payload: bytes | memoryview, assignment: Assignment) -> None:
    """This edition holds from now on. An older one than is known means nothing, and there is one of each number."""
    if assignment.edition <= core.edition:
        return
    me = int(core.name[1:])
    mine = {bucket for bucket, holder in enumerate(assignment.holders) if holder == me}
    if lacks := mine - core.buckets.keys():
        raise Refusal("placement", f"{core.name} has never had buckets {sorted(lacks)}")
    core.note(replace(message, checkpoint=""), payload)
    gone = core.buckets.keys() - mine
    doubt, core.doubt = core.doubt, None
    core.edition = assignment.edition
    core.pace.holders = len(set(assignment.holders))
    if gone:
        _let_go(core, gone)
    if gone or doubt is not None:
        log.info(
            "placement", shard=core.name, edition=core.edition, buckets=len(core.buckets), gone=len(gone)
        )
        core.meet_again(anew(core.name))
    if doubt is not None:
        doubt.end()


def may_begin(core: Shard, assignment: Assignment) -> None:
    """A shard without anything may take on a layout. Raises Refusal where it is said to hold what has come since."""
    if assignment.edition and int(core.name[1:]) in assignment.holders and not core.replaying:
        raise Refusal(
            "placement", f"{core.name} has lost the buckets that it got with an edition of the placement"
        )


def _let_go(core: Shard, gone: Collection[int]) -> None:
    assert core.store is not None
    chunks = [chunk for index in gone for chunk in core.buckets[index].chunks]
    order = sorted(core.pushed)
    for steps in core.staged.values():
        for step in steps.values():
            for index in step.pushes.keys() & gone:
                del step.pushes[index]
    for counted in core.committed.values():
        for worker, whole in counted.items():
            kept = [push for index, push in zip(order, whole.pushes, strict=True) if index not in gone]
            counted[worker] = Committed(kept, whole.hyper, whole.last)
    core.store.let_go(chunks)
    _hold_only(core, core.buckets.keys() - gone)


def _hold_only(core: Shard, indices: Collection[int]) -> None:
    assert core.store is not None
    core.hold_buckets(core.cut[index] for index in sorted(indices))
    for step in [step for steps in core.staged.values() for step in steps.values()]:
        for staged in step.pushes.values():
            staged.checked = False  # where its chunks lie has changed
    for committed in [step for counted in core.committed.values() for step in counted.values()]:
        for staged in committed.pushes:
            staged.checked = False


def _doubt(core: Shard, doubt: Doubt) -> None:
    core.doubt = doubt
    if core.holding is not None:
        core.holding.stay()
