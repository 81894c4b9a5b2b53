"""The coordinator dies, at any moment, and another goes on from its journal: nothing is lost or counts twice."""

import asyncio
import errno
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.simulation import simulate
from tests.soaking import soak
from tests.zml.cluster import Cluster, Script, parameters
from zml.errors import FENCED, ZmlError
from zml.lease import COORDINATOR
from zml.messages import JobSpec
from zml.records import NoRoom
from zml.scheduler.events import DrainAsked
from zml.scheduler.ids import JobId
from zml.transport import Refusal
from zml.transport.memory import MemoryNetwork

BATCHES, EPOCHS, WORKERS = 6, 2, 2
EVERY_BATCH = [(epoch, batch) for epoch in range(EPOCHS) for batch in range(BATCHES)]


class Mortal(Cluster):
    """Its coordinator dies at the given moments, counted over all its lives, and is back a moment later.

    `when` says what is counted: messages whose answer is "unanswered" or just "answered" when it dies, or "records" of
    the journal, with nothing done of what follows from the last.
    """

    def __init__(
        self, folder: Path, seed: int, spec: JobSpec, *dies_at: int, when: str = "unanswered"
    ) -> None:
        self.count = 0
        self.dies_at = dies_at
        self.when = when
        self.random = random.Random(seed)
        self.deaths = 0
        super().__init__(MemoryNetwork(seed), spec, state=folder / "state")

    def make_coordinator(self) -> None:
        super().make_coordinator()
        journal = self.coordinator.docket.journal
        assert journal is not None
        write = journal.write

        mine = self.coordinator

        def write_and_die(*args: Any) -> None:
            if mine is not self.coordinator or self.died.is_set():
                return  # what the dead one still computes has no effect
            write(*args)
            if self.when == "records" and self.is_time():
                self.die()

        journal.write = write_and_die  # type: ignore[method-assign, assignment]

    def after_message(self) -> None:
        if self.when != "records" and self.is_time():
            if self.when == "answered":
                asyncio.get_running_loop().call_soon(self.die)
            else:
                self.die()

    def is_time(self) -> bool:
        self.count += 1
        return self.count in self.dies_at

    def die(self) -> None:
        if not self.died.is_set():
            self.deaths += 1
            self.kill_coordinator()
            self.tasks.append(asyncio.ensure_future(self.come_back(self.random.uniform(0.5, 3.0))))

    async def come_back(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        while True:
            try:
                return await self.restart_coordinator()
            except Refusal:  # it died again at once
                self.died.clear()


def train(
    folder: Path, seed: int, *dies_at: int, staleness: int | None = 0, when: str = "unanswered"
) -> tuple[Mortal, list[Script]]:
    async def main() -> tuple[Mortal, list[Script]]:
        spec = JobSpec(workers=WORKERS, shards=2, staleness=staleness)
        cluster = Mortal(folder, seed, spec, *dies_at, when=when)
        await cluster.start()
        scripts = [cluster.script(f"w{index}", batches=BATCHES, epochs=EPOCHS) for index in range(WORKERS)]
        code = await cluster.finish()
        assert code == 0, [script.error for script in scripts]
        return cluster, scripts

    return simulate(main())


def trained(scripts: list[Script]) -> list[tuple[int, int]]:
    return sorted(pair for script in scripts for pair in script.trained)


def same(scripts: list[Script], undisturbed: list[Script]) -> bool:
    """To the last bit."""
    pairs = zip(scripts, undisturbed, strict=True)
    return all(
        torch.equal(mine, theirs)
        for script, other in pairs
        for mine, theirs in zip(parameters(script), parameters(other), strict=True)
    )


# When, and from which moment on; three records are written before anybody comes.
MOMENTS = [("unanswered", 1), ("answered", 2)]
MORE = [("unanswered", 2), ("answered", 1), ("records", 4), ("records", 5)]


@pytest.mark.parametrize("dying", [*MOMENTS, *soak(MORE)], ids=lambda dying: "-".join(map(str, dying)))
def test_whenever_the_coordinator_dies_the_job_ends_as_if_it_had_not(
    tmp_path_factory: pytest.TempPathFactory, dying: tuple[str, int]
) -> None:
    """At every other moment from the first; both ways of dying take the odd and the even ones in turns."""
    when, first = dying
    calm, undisturbed = train(tmp_path_factory.mktemp("calm"), 1, when=when)
    assert trained(undisturbed) == EVERY_BATCH and calm.count > 25
    for dies_at in range(first, calm.count + 1, 2):
        print(f"dies at {dies_at} of {calm.count} {when}")
        cluster, scripts = train(tmp_path_factory.mktemp("run"), 1, dies_at, when=when)
        assert cluster.deaths == 1
        assert trained(scripts) == EVERY_BATCH, "every batch once"
        assert cluster.coordinator.ledger.committed == BATCHES
        assert same(scripts, undisturbed)


@pytest.mark.parametrize("staleness", [0, 2, None])
@pytest.mark.parametrize("seed", [0, *soak([1, 2])])
def test_it_may_die_again_and_again(tmp_path: Path, seed: int, staleness: int | None) -> None:
    chance = random.Random(seed)
    dies_at = sorted(chance.sample(range(1, 40), 5))
    print(f"{seed=} {dies_at=}")
    when = chance.choice(["unanswered", "answered"])
    cluster, scripts = train(tmp_path, seed, *dies_at, staleness=staleness, when=when)
    assert cluster.deaths >= 3
    assert trained(scripts) == EVERY_BATCH
    assert same(scripts[:1], scripts[1:])


def test_training_goes_on_while_the_coordinator_is_away(tmp_path: Path) -> None:
    """Two batches are taken at a time here: they are done before anybody misses it."""

    async def main() -> tuple[int, int, int]:
        cluster = Mortal(tmp_path, 1, JobSpec(workers=2, shards=2))
        await cluster.start()
        scripts = [cluster.script(f"w{index}", batches=40, epochs=1) for index in range(2)]
        while not all(len(script.trained) % 2 for script in scripts):
            await asyncio.sleep(0.001)
        before = sum(len(script.trained) for script in scripts)
        cluster.deaths += 1
        cluster.kill_coordinator()
        await asyncio.sleep(60.0)
        after = sum(len(script.trained) for script in scripts)
        await cluster.restart_coordinator()
        return before, after, await cluster.finish()

    before, after, code = simulate(main())
    assert (after - before, code) == (2, 0)


def test_nothing_changes_while_the_disk_is_full_and_all_goes_on_when_it_is_not(tmp_path: Path) -> None:
    def full(*parts: Any) -> int:
        raise NoRoom(errno.ENOSPC, "no room for 30 bytes", "here")

    async def main() -> list[Script]:
        cluster = Mortal(tmp_path, 1, JobSpec(workers=2, shards=2))
        await cluster.start()
        scripts = [cluster.script(f"w{index}", batches=BATCHES, epochs=EPOCHS) for index in range(2)]
        while len(scripts[0].trained) < 2:
            await asyncio.sleep(0.01)
        journal = cluster.coordinator.docket.journal
        assert journal is not None
        append, journal._records.append = journal._records.append, full  # type: ignore[method-assign]
        late = cluster.script("w2", batches=BATCHES, epochs=EPOCHS, seed=9)
        await asyncio.sleep(10.0)
        assert "no room" in cluster.coordinator.docket.trouble
        members = [member.member for member in cluster.coordinator.status().members]
        assert members == ["w0", "w1", "p0", "p1"], "who looks is answered, and who is heard keeps its place"
        journal._records.append = append  # type: ignore[method-assign]
        assert await cluster.finish() == 0
        assert late.error is None
        return [*scripts, late]

    scripts = simulate(main())
    assert trained(scripts) == EVERY_BATCH
    assert same(scripts[:1], scripts[1:2])


def test_a_member_that_the_journal_does_not_know_is_told_so(tmp_path: Path) -> None:
    async def main() -> tuple[BaseException | None, BaseException | None]:
        cluster = Mortal(tmp_path, 1, JobSpec(workers=1, shards=1))
        await cluster.start()
        script = cluster.script("w0", batches=100, epochs=50)
        while len(script.trained) < 3:
            await asyncio.sleep(0.01)
        cluster.kill_coordinator()
        for path in (tmp_path / "state").glob("*.records"):
            path.unlink()
        await cluster.restart_coordinator()
        shard = cluster.shards[0].over
        while script.error is None or not shard.done():
            await asyncio.sleep(0.1)
        cluster.coordinator.interrupt("SIGINT")
        await cluster.finish()
        return script.error, shard.exception()

    script, shard = simulate(main())
    assert isinstance(script, ZmlError) and isinstance(shard, ZmlError)
    assert (script.code, shard.code) == (FENCED, FENCED)
    assert "p0#1 was never a member of this job, as far as the coordinator's journal says" in shard.what


def test_members_that_did_not_hear_of_the_end_are_told_by_the_next_coordinator(tmp_path: Path) -> None:
    async def main() -> tuple[int, bool]:
        cluster = Mortal(tmp_path, 1, JobSpec(workers=1, shards=1))
        await cluster.start()
        script = cluster.script("w0", batches=2, epochs=1)
        while not script.trained:
            await asyncio.sleep(0.01)
        cluster.network.partition({COORDINATOR}, {ps.endpoint.name for ps in cluster.shards.values()})
        finished = cluster.coordinator.finished
        assert finished is not None
        await finished
        cluster.kill_coordinator()
        cluster.network.heal()
        await cluster.restart_coordinator()
        code = await cluster.coordinator.run()
        ended = all(ps.over.done() and ps.over.result() == 0 for ps in cluster.shards.values())
        await cluster.finish()
        return code, ended

    assert simulate(main()) == (0, True)


def test_what_was_decided_and_not_yet_ordered_is_ordered_by_the_next_coordinator(tmp_path: Path) -> None:
    """It dies between the record of a drain and everything that follows from it."""

    async def main() -> tuple[str | None, str, int]:
        cluster = Mortal(tmp_path, 1, JobSpec(workers=2, shards=1))
        await cluster.start()
        scripts = [cluster.script(f"w{index}", batches=100, epochs=50) for index in range(2)]
        while not all(script.trained for script in scripts):
            await asyncio.sleep(0.01)
        cluster.coordinator.docket.event(DrainAsked(JobId("job"), "a drill"))
        assert cluster.coordinator.ledger.draining is None
        cluster.kill_coordinator()
        await cluster.restart_coordinator()
        draining, state = cluster.coordinator.ledger.draining, cluster.coordinator.status().state
        for _ in range(2):
            cluster.coordinator.interrupt("SIGINT")
        return draining, state, await cluster.finish()

    assert simulate(main()) == ("a drill", "DRAINING", 130)


def test_a_wall_clock_that_jumps_by_days_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leases, patience and the journal go by the monotonic clock: a shard and the coordinator die meanwhile, too."""
    dice = random.Random(4)
    monkeypatch.setattr(time, "time", lambda: 1.8e9 + dice.uniform(-1e6, 1e6))

    async def main() -> Cluster:
        spec = JobSpec(workers=2, shards=2)
        cluster = Cluster(MemoryNetwork(4), spec, folder=tmp_path / "logs", state=tmp_path / "state")
        await cluster.start()
        scripts = [cluster.script(f"w{index}") for index in range(2)]
        await cluster.until(lambda: len(trained(scripts)) > 4)
        cluster.kill_shard(1)
        await asyncio.sleep(2.5)
        cluster.start_shard(1)
        cluster.kill_coordinator()
        await asyncio.sleep(1)
        await cluster.restart_coordinator()
        assert await cluster.finish() == 0, [script.error for script in scripts]
        return cluster

    cluster = simulate(main())
    scripts = list(cluster.scripts.values())
    assert trained(scripts) == [(epoch, batch) for epoch in range(2) for batch in range(12)]
    assert same(scripts[:1], scripts[1:])
