"""The end of a run: every rule is looked at. What they mean is in `invariants`, `witness` and `cuts`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tests.zml.test_recovery import bits, replayed, same_bits
from zml.checkpoint import Checkpoint
from zml.shard.shard import Shard

from . import cuts, invariants
from .faults import Freeze, Partition, Weather
from .invariants import Account
from .witness import pairs

TAKE_S = 30.0
QUIET_S = 5.0

if TYPE_CHECKING:
    from .world import World


def check(world: World, code: int) -> None:
    """Raises AssertionError."""
    plan, recorder, witness = world.plan, world.recorder, world.witness
    errors = {name: script.error for name, script in world.scripts.items() if script.error is not None}
    assert code == 0, f"the job ended with {code}: {errors}"
    witness.no_log_holds_two_histories()
    witness.copies_follow()
    logs = {shard: home.log for shard, home in world.homes.items()}
    histories = {shard: witness.history(log) for shard, log in logs.items()}
    read = {shard: pairs(history) for shard, history in histories.items()}
    accounts = invariants.read_all(read, plan.staleness)
    invariants.every_bucket_lives_on_one_shard(accounts, world.coordinator.facts.holders)
    shards_know_the_placement(world, accounts)
    invariants.a_step_counts_on_all_or_none(accounts)
    invariants.what_was_acknowledged_is_in_the_logs(accounts, recorder)
    to_do = world.batches - world.before
    invariants.every_batch_counts_once(accounts, recorder, to_do)
    invariants.the_ledger_heard_of_every_batch_from_one_worker(recorder, to_do)
    agreed = {(shard, let.log) for let in recorder.let if (shard := let.shard)}
    counts = {(shard, log): witness.agree(log, logs[shard]) for shard, log in agreed}
    invariants.nobody_is_let_beyond_the_bound(
        accounts, recorder, plan.staleness, lambda shard, log: counts[shard, log]
    )
    invariants.versions_never_go_back(recorder)
    checkpoints = cuts.found_in(world.checkpoints)
    steps = [checkpoint.manifest.step - world.steps_before for checkpoint in checkpoints]
    seen = {}
    for shard, history in histories.items():
        whole, seen[shard] = cuts.replay(shard, history, set(steps))
        shard_is_what_its_history_makes(world, shard, whole)
        if whole.store is None:
            continue
        versions = [held.version for held in whole.store._trained]
        invariants.applied_as_often_as_counted(accounts[shard], versions, plan.staleness)
    backups_are_what_their_histories_make(world)
    for checkpoint, step in zip(checkpoints, steps, strict=True):
        cuts.is_what_shards_had(checkpoint, step, seen)
        for account in accounts.values():
            if account.trains:
                cuts.ledger_is_what_is_in_the_parameters(
                    checkpoint, step, account, recorder, plan, world.before
                )
    ends = [worker.end for worker in world.lives_of_workers if worker.end is not None]
    assert ends, "nobody has finished"
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True)), "replicas differ"
    checkpoints_are_taken_in_time(world, checkpoints)


def shards_know_the_placement(world: World, accounts: Mapping[str, Account]) -> None:
    """Who is said to have the newest edition has it, and waits for none; others may wait for that one, or for the one
    that was being decided when the job was over. In memory it is the same."""
    facts, told = world.coordinator.facts, world.coordinator.shard_desk.editions
    for shard, account in accounts.items():
        assert account.edition <= facts.edition, f"{shard} has {account.edition}, which was never decided"
        assert account.doubt in (0, facts.deciding, facts.edition), f"{shard} waits for {account.doubt}"
        if told.get(shard) == facts.edition and account.doubt != facts.deciding:
            assert not account.doubt, f"{shard} was told of {facts.edition}, and waits for {account.doubt}"
        if shard in told:
            assert account.edition >= told[shard], f"{shard} was told {told[shard]}, has {account.edition}"
        index = int(world.homes[shard].host[1:])
        core = world.shards[index].cores.get(shard)
        if world.is_alive(index) and core is not None and core.store is not None:
            assert core.buckets.keys() == {bucket.index for bucket in account.mine}, (
                f"{shard}: {core.buckets}"
            )
            assert (core.doubt.edition if core.doubt is not None else 0) == account.doubt, shard


def shard_is_what_its_history_makes(world: World, shard: str, whole: Shard) -> None:
    """On disk, and in the memory of the process in which it lives."""
    home = world.homes[shard]
    folder = folder_of(world, home.log)
    if whole.store is None:  # it has joined, and got no further
        assert not world.witness.is_on_disk(folder) or int(shard[1:]) >= world.plan.shards
        return
    if world.witness.is_on_disk(folder) < len(world.witness.history(home.log)):
        same_bits(replayed(folder, shard), whole)
    index = int(home.host[1:])
    core = world.shards[index].cores.get(shard)
    if world.is_alive(index) and core is not None:
        same_bits(whole, core)


def backups_are_what_their_histories_make(world: World) -> None:
    """Those of processes that live to the end."""
    for index, ps in world.shards.items():
        for shard, backup in ps.backups.items() if world.is_alive(index) else ():
            if backup.whole and not backup.broken and not backup.backlog:
                whole, _ = cuts.replay(shard, world.witness.history(backup.name), set())
                assert (backup.core.store is None) == (whole.store is None)
                if whole.store is None or not whole.store.ready:
                    continue  # there are no parameters yet
                ours, theirs = bits(backup.core), bits(whole)
                assert ours.keys() == theirs.keys()
                differ = [name for name in ours if not torch.equal(ours[name], theirs[name])]
                assert not differ, f"{backup.name} has another {differ}"


def checkpoints_are_taken_in_time(world: World, checkpoints: list[Checkpoint]) -> None:
    """None hangs; and where nothing has gone wrong for a while, the last one has all batches. What was lost on the way
    to a process that is there is sent again only after many seconds: that may be too late for the last one."""
    plan = world.plan
    assert max(world.took_s, default=0.0) < TAKE_S, f"a checkpoint took {max(world.took_s):.1f} s"
    loses = plan.weather.loss or any(isinstance(f, Freeze | Partition | Weather) for _, f in plan.faults)
    quiet = not world.troubles and world.trained_at > world.troubled_until + QUIET_S
    if plan.checkpoint_s and not loses and quiet:
        most = max((len(cuts.held(found, plan.batches)) for found in checkpoints), default=0)
        assert most == len(world.batches), f"the last checkpoint has {most} batches"


def chosen(world: World) -> Checkpoint | None:
    """What to go on from: one that was taken in the midst of it all, if there is one."""
    checkpoints = cuts.found_in(world.checkpoints)
    midst = [found for found in checkpoints if cuts.held(found, world.plan.batches) < world.batches]
    return world.dice.choice(midst or checkpoints) if checkpoints else None


def folder_of(world: World, name: str) -> Path:
    assert world.folder is not None
    return world.folder / name
