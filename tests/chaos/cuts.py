"""What must hold of the checkpoints of a run, each held against the histories of the shards.

A checkpoint of n updates is made of what each shard had after its nth, and its ledger names exactly the batches that
are in those: so it is the same cut through all shards, and whoever goes on from it computes every other batch, once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from zml.checkpoint import Checkpoint, newest, read
from zml.checkpoint.folder import entries
from zml.messages import Graft
from zml.scheduler.ids import JobId
from zml.shard.shard import Shard

from .faults import Plan
from .invariants import Account, Batch, Step
from .recorder import Recorder
from .witness import Record, pairs


def found_in(root: Path) -> list[Checkpoint]:
    """All of them, the oldest first: each verifies to the byte, and the newest is what a resume would find."""
    checkpoints = [read(root / each.name) for each in entries(root)]
    found, skipped = newest(root)
    assert not skipped, f"a checkpoint that does not verify: {skipped}"
    assert (found and found.path) == (checkpoints[-1].path if checkpoints else None), found
    return checkpoints


def replay(
    name: str, history: Sequence[Record], moments: set[int]
) -> tuple[Shard, dict[int, dict[str, Tensor]]]:
    """The shard of this history; and what a checkpoint should have of it after so many updates, of all that it held
    then: what has come is there, too, and what went stays as it was."""
    shard = Shard(JobId("job"), name)
    seen: dict[int, dict[str, Tensor]] = {}
    for message, payload in pairs(history):
        shard.replay(message, payload)
        if (
            shard.steps in moments
            and shard.store is not None
            and (shard.steps == 0 or shard.steps not in seen or isinstance(message, Graft))
        ):
            seen.setdefault(shard.steps, {}).update(shard.store.snapshot(published=False).tensors())
    return shard, seen


def is_what_shards_had(
    checkpoint: Checkpoint, step: int, seen: Mapping[str, Mapping[int, Mapping[str, Tensor]]]
) -> None:
    """After `step` updates of this run. `seen`: by shard and updates. Who has moved was on two shards, and the same."""
    found: set[int] = set()
    for shard, moments in seen.items():
        for name, tensor in moments.get(step, {}).items():
            chunk, _, part = name.partition("/")
            found.add(int(chunk))
            assert np.array_equal(checkpoint.chunk(int(chunk))[part], tensor.numpy()), (
                f"{checkpoint.path.name}: {shard} had another {name} after {step} updates"
            )
    lacking = checkpoint.holders.keys() ^ found
    assert not lacking, f"{checkpoint.path.name}: no shard with the chunks {lacking} stood at {step} updates"


def held(checkpoint: Checkpoint, batches: int) -> set[Batch]:
    """The batches that the checkpoint says are in its parameters."""
    ledger = checkpoint.ledger
    if not ledger:
        return set()
    done = {(epoch, batch) for epoch in range(ledger["epoch"]) for batch in range(batches)}
    intervals = ledger["committed"]
    return done | {(ledger["epoch"], batch) for first, last in intervals for batch in range(first, last + 1)}


def ledger_is_what_is_in_the_parameters(
    checkpoint: Checkpoint,
    step: int,
    account: Account,
    recorder: Recorder,
    plan: Plan,
    before: frozenset[Batch],
) -> None:
    """After `step` updates of this run, which began with the batches `before`."""
    assert not checkpoint.ledger.get("skipped"), f"{checkpoint.path.name}: nobody skips a batch"
    found = set(before)
    done: dict[object, int] = {}
    for each in applied(account.steps, step, plan.staleness):
        given = recorder.given.get((each.who, each.epoch), [])
        first = done.get((each.who, each.epoch), 0)
        found |= {(each.epoch, batch) for batch in given[first : each.done]}
        done[each.who, each.epoch] = each.done
    said = held(checkpoint, plan.batches)
    assert said == found, (
        f"{checkpoint.path.name}: its ledger has {sorted(said - found)} more and {sorted(found - said)} less "
        f"than the parameters of {account.shard}"
    )


def applied(steps: Sequence[Step], updates: int, bound: int | None) -> list[Step]:
    """What is in the parameters after so many updates: in sync one for each clock."""
    if bound != 0:
        return list(steps[:updates])
    clocks = set(sorted({step.clock for step in steps})[:updates])
    return [step for step in steps if step.clock in clocks]
