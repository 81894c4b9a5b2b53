"""What must hold of the checkpoints of a run, each held against the histories of the shards.

A checkpoint of n updates is made of what each shard had after its nth, and its ledger names exactly the batches that
are in those: so it is the same cut through all shards, and whoever goes on from it computes every other batch, once.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from tests.zml.cluster import Cluster, Script
from tests.zml.test_cluster import same, trained
from zml.checkpoint import Checkpoint, newest, read
from zml.checkpoint.folder import entries
from zml.messages import JobSpec
from zml.scheduler.ids import JobId
from zml.shard.shard import Shard
from zml.transport.memory import MemoryNetwork

from .faults import Plan
from .invariants import Account, Step
from .processes import live
from .recorder import Recorder
from .witness import Record, pairs

LONGEST_S = 600.0
Batch = tuple[int, int]  # epoch, number


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
    """The shard of this history; and what a checkpoint should have of it after so many updates."""
    shard = Shard(JobId("job"), name)
    seen: dict[int, dict[str, Tensor]] = {}
    for message, payload in pairs(history):
        shard.replay(message, payload)
        if (
            shard.steps in moments
            and shard.store is not None
            and (shard.steps == 0 or shard.steps not in seen)
        ):
            seen[shard.steps] = shard.store.state(published=False)[1]
    return shard, seen


def is_what_shards_had(
    checkpoint: Checkpoint, seen: Mapping[str, Mapping[int, Mapping[str, Tensor]]]
) -> None:
    """`seen`: by shard and updates."""
    step = checkpoint.manifest.step
    for shard, moments in seen.items():
        assert step in moments, f"{checkpoint.path.name}: {shard} never stood at {step} updates"
        for name, tensor in moments[step].items():
            chunk, _, part = name.partition("/")
            assert np.array_equal(checkpoint.chunk(int(chunk))[part], tensor.numpy()), (
                f"{checkpoint.path.name}: {shard} had another {name} after {step} updates"
            )


def held(checkpoint: Checkpoint, batches: int) -> set[Batch]:
    """The batches that the checkpoint says are in its parameters."""
    ledger = checkpoint.ledger
    if not ledger:
        return set()
    done = {(epoch, batch) for epoch in range(ledger["epoch"]) for batch in range(batches)}
    intervals = ledger["committed"]
    return done | {(ledger["epoch"], batch) for first, last in intervals for batch in range(first, last + 1)}


def ledger_is_what_is_in_the_parameters(
    checkpoint: Checkpoint, account: Account, recorder: Recorder, bound: int | None, batches: int
) -> None:
    assert not checkpoint.ledger.get("skipped"), f"{checkpoint.path.name}: nobody skips a batch"
    ours = applied(account.steps, checkpoint.manifest.step, bound)
    found: set[Batch] = set()
    done: dict[object, int] = {}
    for step in ours:
        given = recorder.given.get((step.who, step.epoch), [])
        before = done.get((step.who, step.epoch), 0)
        found |= {(step.epoch, batch) for batch in given[before : step.done]}
        done[step.who, step.epoch] = step.done
    said = held(checkpoint, batches)
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


def can_be_gone_on_from(checkpoint: Checkpoint, plan: Plan, seed: int, folder: Path) -> None:
    """By any number of workers and shards: each batch is in the checkpoint or is trained after it, once."""
    dice = random.Random(seed)
    shards = dice.randint(1, 3)
    spec = JobSpec(
        workers=dice.randint(1, 3),
        shards=shards,
        replicas=dice.choice((0, 1)) if shards > 1 else 0,
        staleness=dice.choice((0, 1, None)),
        compress=plan.compress,
        optimizer_on=plan.optimizer_on,
    )

    async def main() -> list[Script]:
        cluster = Cluster(
            MemoryNetwork(seed), spec, folder=folder, resumed=checkpoint, compute_s=lambda name: 0.03
        )
        await cluster.start()
        scripts = [
            cluster.script(f"w{index}", batches=plan.batches, epochs=plan.epochs, seed=100 + index)
            for index in range(spec.workers)
        ]
        code = await cluster.finish()
        assert code == 0, f"{checkpoint.path.name} is gone on from: {[script.error for script in scripts]}"
        return scripts

    later = live(main(), [], limit_s=LONGEST_S)
    both = sorted([*held(checkpoint, plan.batches), *trained(later)])
    every = [(epoch, batch) for epoch in range(plan.epochs) for batch in range(plan.batches)]
    assert both == every, f"{checkpoint.path.name}, gone on from with {spec}, gives {both}"
    same(later)
