"""Whole clusters in one thread: training that ends, whoever joins, is slow, is cut off or dies."""

import asyncio
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from tests.simulation import simulate
from tests.soaking import soak
from tests.zml.cluster import Cluster, Script, parameters
from zml.lease import COORDINATOR
from zml.messages import Commit, Exited, JobSpec, Pull, Push, Taken
from zml.scheduler import calls
from zml.scheduler.audit import audit
from zml.scheduler.ids import WorkerId
from zml.shard.ps import Ps
from zml.transport import Refused
from zml.transport.memory import MemoryNetwork

MODES = [0, 2, None]


def same(scripts: list[Script]) -> None:
    """All replicas are identical to the last bit."""
    first, *others = [parameters(script) for script in scripts]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def trained(scripts: list[Script]) -> list[tuple[int, int]]:
    return sorted(pair for script in scripts for pair in script.trained)


def run(
    seed: int,
    *,
    workers: int = 3,
    shards: int = 2,
    staleness: int | None = 0,
    compress: str = "none",
    optimizer_on: Literal["auto", "shard", "worker"] = "auto",
    folder: Path | None = None,
    **network: float,
) -> tuple[list[Script], Cluster]:
    async def main() -> tuple[list[Script], Cluster]:
        spec = JobSpec(
            workers=workers,
            shards=shards,
            staleness=staleness,
            compress=compress,
            optimizer_on=optimizer_on,
        )
        cluster = Cluster(
            MemoryNetwork(seed, **network),  # type: ignore[arg-type]
            spec,
            compute_s=lambda name: 0.03 * (1 + int(name[1:])),
            folder=folder,
        )
        await cluster.start()
        scripts = [cluster.script(f"w{index}") for index in range(workers)]
        assert await cluster.finish() == 0, [script.error for script in scripts]
        return scripts, cluster

    return simulate(main())


@pytest.mark.parametrize("staleness", MODES)
@pytest.mark.parametrize("optimizer_on", ["shard", "worker"])
@pytest.mark.parametrize("compress", ["none", "bf16", "topk:10%"])
def test_workers_train_every_batch_once_and_end_with_one_model(
    staleness: int | None, compress: str, optimizer_on: Literal["shard", "worker"]
) -> None:
    scripts, _ = run(1, staleness=staleness, compress=compress, optimizer_on=optimizer_on)
    assert trained(scripts) == [(epoch, batch) for epoch in range(2) for batch in range(12)]
    same(scripts)
    if staleness is not None:
        assert max(script.greatest_staleness for script in scripts) <= staleness


def test_two_synchronous_runs_end_with_the_same_bits_whatever_the_network_does() -> None:
    calm, _ = run(1)
    stormy, _ = run(2, loss=0.02, duplication=0.05)
    same([*calm, *stormy])


@pytest.mark.parametrize("seed", [0, 2, 3, *soak([4, 5])])  # 1 loses a worker's joining for a whole lease
@pytest.mark.parametrize("staleness", MODES)
def test_a_network_that_loses_doubles_and_reorders_changes_no_count(seed: int, staleness: int | None) -> None:
    scripts, cluster = run(seed, staleness=staleness, loss=0.03, duplication=0.05)
    print(f"seed {seed}")
    assert trained(scripts) == [(epoch, batch) for epoch in range(2) for batch in range(12)]
    same(scripts)
    steps = [ps.core.steps for ps in cluster.shards.values() if ps.core is not None]
    assert steps == ([8, 8] if staleness == 0 else [24, 24]), "a step counts once on each shard"


@pytest.mark.parametrize("staleness", MODES)
@pytest.mark.parametrize("seed", range(4))
def test_the_others_finish_what_a_killed_worker_leaves(seed: int, staleness: int | None) -> None:
    async def main() -> tuple[list[Script], int]:
        cluster = Cluster(MemoryNetwork(seed), JobSpec(workers=3, shards=2, staleness=staleness))
        await cluster.start()
        scripts = [cluster.script(f"w{index}") for index in range(3)]
        while len(scripts[1].trained) < 2:
            await cluster_pause()
        cluster.kill("w1")
        return scripts, await cluster.finish()

    scripts, code = simulate(main())
    assert code == 0
    assert set(trained(scripts)) == {(epoch, batch) for epoch in range(2) for batch in range(12)}, (
        "no batch is lost"
    )
    same([scripts[0], scripts[2]])


@pytest.mark.parametrize("staleness", MODES)
@pytest.mark.parametrize("workers", [3, 4])
def test_the_one_batch_of_a_killed_worker_is_trained_while_the_others_rest(
    workers: int, staleness: int | None
) -> None:
    """Who gets the batch starts where the others rest, so they have to rest longer than they meant to."""

    async def main() -> tuple[list[Script], int, float, Cluster]:
        hangs = False
        batches = 4 * workers + 1  # w0 has one more than the others
        spec = JobSpec(workers=workers, shards=2, staleness=staleness)
        cluster = Cluster(
            MemoryNetwork(1), spec, compute_s=lambda name: 1e6 if hangs and name == "w0" else 0.02
        )
        await cluster.start()
        scripts = [cluster.script(f"w{index}", batches=batches, epochs=2) for index in range(workers)]
        while len(scripts[0].trained) < 4:
            await cluster_pause()
        hangs = True
        await cluster_pause(5)
        cluster.kill("w0")
        killed_at = asyncio.get_running_loop().time()
        code = await cluster.finish()
        return scripts, code, asyncio.get_running_loop().time() - killed_at, cluster

    scripts, code, seconds, cluster = simulate(main())
    assert code == 0, [script.error for script in scripts]
    assert seconds < 20, "nobody waits for more than the lease and an answer"
    assert set(trained(scripts)) == {(epoch, batch) for epoch in range(2) for batch in range(4 * workers + 1)}
    assert not any(ps.core.committed for ps in cluster.shards.values() if ps.core), (
        "every step is in the parameters"
    )
    same(scripts[1:])


@pytest.mark.parametrize("staleness", MODES)
def test_a_late_worker_joins_gets_the_parameters_and_contributes(staleness: int | None) -> None:
    async def main() -> list[Script]:
        cluster = Cluster(MemoryNetwork(3), JobSpec(workers=2, shards=2, staleness=staleness))
        await cluster.start()
        scripts = [cluster.script(f"w{index}", epochs=3) for index in range(2)]
        while len(scripts[0].trained) < 3:
            await cluster_pause()
        scripts.append(cluster.script("w2", epochs=3, seed=99))
        assert await cluster.finish() == 0
        return scripts

    scripts = simulate(main())
    assert trained(scripts) == [(epoch, batch) for epoch in range(3) for batch in range(12)]
    assert len(scripts[2].trained) >= 4, "it has a share of at least one whole epoch"
    same(scripts)


def test_a_worker_that_raises_fails_the_job_and_the_others_are_stopped() -> None:
    async def main() -> tuple[int, Cluster]:
        cluster = Cluster(MemoryNetwork(4), JobSpec(workers=2, shards=1))
        await cluster.start()
        good = cluster.script("w0")
        bad = cluster.script("w1", batches=11)  # another data set: it disagrees about the epoch
        code = await cluster.finish()
        assert bad.error is not None or good.error is not None
        return code, cluster

    code, _ = simulate(main())
    assert code == 1


@pytest.mark.parametrize(("code", "signal"), [(0, 9), (1, 0), (0, 0)], ids=["killed", "failed", "finished"])
def test_a_file_is_written_by_another_when_its_writer_did_not_come_to_its_end(code: int, signal: int) -> None:
    async def main() -> tuple[bool, bool, bool]:
        cluster = Cluster(MemoryNetwork(6), JobSpec(workers=2, shards=1))
        await cluster.start()
        one, two = (cluster.script(f"w{index}", epochs=50) for index in range(2))
        while not (one.trained and two.trained):
            await cluster_pause()
        first, other = await one.client.claim("model"), await two.client.claim("model")
        exited = Exited(job="job", member="w0", incarnation=1, code=code, signal=signal)
        await one.agent.request(COORDINATOR, exited, timeout_s=5)
        if code:  # the failure of a script ends the job
            assert await cluster.finish() == code
            return first.granted, other.granted, False
        again = (await two.client.claim("model")).granted
        cluster.coordinator.interrupt("SIGINT")
        cluster.coordinator.interrupt("SIGINT")
        await cluster.finish()
        return first.granted, other.granted, again

    assert simulate(main()) == (True, False, signal != 0)


@pytest.mark.parametrize(
    ("code", "signal", "ends"), [(3, 0, "FAILED"), (0, 9, "FAILED"), (0, 0, "SUCCEEDED")]
)
def test_scripts_may_end_before_a_shard_has_come(code: int, signal: int, ends: str) -> None:
    async def main() -> tuple[int, str]:
        cluster = Cluster(MemoryNetwork(6), JobSpec(workers=2, shards=1))
        await cluster.coordinator.start()
        scripts = [cluster.script(f"w{index}") for index in range(2)]
        await cluster.until(lambda: all(script.task is not None for script in scripts))
        for script in scripts[: 1 if code else 2]:  # the first failure ends the job
            exited = Exited(job="job", member=script.name, incarnation=1, code=code, signal=signal)
            await script.agent.request(COORDINATOR, exited, timeout_s=5)
        return await cluster.finish(), cluster.coordinator.status().state

    assert simulate(main()) == (code or (128 + signal if signal else 0), ends)


@pytest.mark.parametrize("seed", range(4))
def test_whoever_is_killed_an_audit_of_what_the_ledger_was_asked_finds_every_batch_once(seed: int) -> None:
    async def main() -> tuple[list[calls.Call], list[Script]]:
        cluster = Cluster(MemoryNetwork(seed), JobSpec(workers=3, shards=2, staleness=2))
        made: list[calls.Call] = []
        perform = cluster.coordinator.dealer.perform
        cluster.coordinator.dealer.perform = lambda call: [made.append(call), perform(call)][1]  # type: ignore
        await cluster.start()
        scripts = [cluster.script(f"w{index}", batches=30, epochs=3) for index in range(3)]
        for victim, after in ((1, 4), (2, 9)):
            while len(scripts[victim].trained) < after:
                await cluster_pause()
            cluster.kill(f"w{victim}")
        assert await cluster.finish() == 0, [script.error for script in scripts]
        return made, scripts

    made, scripts = simulate(main())
    accounts = audit(made)
    assert {pair for script in scripts for pair in script.trained} == {
        (e, b) for e in range(3) for b in range(30)
    }
    assert [(a.epoch, a.committed, a.closed, a.sound) for a in accounts] == [
        (n, 30, True, True) for n in range(3)
    ]
    assert sum(account.reissued for account in accounts) > 0, "the killed ones held something"


def test_what_was_in_an_answer_that_got_lost_comes_again() -> None:
    async def main() -> list[list[int]]:
        cluster = Cluster(MemoryNetwork(7), JobSpec(workers=1, shards=1), compute_s=lambda name: 1e6)
        await cluster.start()
        script = cluster.script("w0", batches=20)
        while ledger_of(cluster, "w0") == 0:
            await cluster_pause()
        client, answers = script.client, []
        for lost in (True, False, False):
            before = client.reached
            reply = await client.take(0, 0, 3, [], hold=False)
            assert isinstance(reply, Taken)
            answers.append(reply.batches)
            if lost:
                client.reached = before
        for _ in range(2):
            cluster.coordinator.interrupt("SIGINT")
        await cluster.finish()
        return answers

    assert simulate(main()) == [[2, 3, 4], [2, 3, 4], [5, 6, 7]]


def test_of_workers_that_depart_the_last_one_is_told_so() -> None:
    async def main() -> tuple[list[bool], int, int]:
        cluster = Cluster(MemoryNetwork(8), JobSpec(workers=3, shards=1), compute_s=lambda name: 1e6)
        await cluster.start()
        scripts = [cluster.script(f"w{index}") for index in range(3)]
        while any(ledger_of(cluster, script.name) == 0 for script in scripts):
            await cluster_pause()
        one, two, three = (script.client for script in scripts)
        await one.take(0, 0, 0, [0], hold=False)  # it leaves: it only tells what is done
        last = [await one.depart(), await one.depart(), await two.depart()]
        assert scripts[0].lease is not None
        await scripts[0].lease.leave("SIGTERM")
        last.append(await three.depart())
        committed, taken = cluster.coordinator.ledger.committed, ledger_of(cluster, "w0")
        for _ in range(2):
            cluster.coordinator.interrupt("SIGINT")
        await cluster.finish()
        return last, committed, taken

    assert simulate(main()) == ([False, False, False, True], 1, 0)


def test_the_report_of_a_former_self_is_refused_so_that_its_agent_knows() -> None:
    async def main() -> str:
        cluster = Cluster(MemoryNetwork(9), JobSpec(workers=2, shards=1))
        await cluster.start()
        one, two = (cluster.script(f"w{index}", epochs=50) for index in range(2))
        while not (one.trained and two.trained):
            await cluster_pause()
        exited = Exited(job="job", member="w0", incarnation=1, signal=9, returns=True)
        await one.agent.request(COORDINATOR, exited, timeout_s=5)
        try:
            await one.agent.request(COORDINATOR, exited, timeout_s=5)
        except Refused as refused:
            return refused.code
        finally:
            for _ in range(2):
                cluster.coordinator.interrupt("SIGINT")
            await cluster.finish()
        return ""

    assert simulate(main()) == "fenced"


def test_any_number_of_batches_is_reported_at_once() -> None:
    async def main() -> tuple[int, int]:
        cluster = Cluster(MemoryNetwork(7), JobSpec(workers=2, shards=1), compute_s=lambda name: 1e6)
        await cluster.start()
        scripts = [cluster.script(f"w{index}", batches=200_000) for index in range(2)]
        while any(ledger_of(cluster, script.name) == 0 for script in scripts):
            await cluster_pause()
        client, done = scripts[0].client, []
        for _ in range(4):
            reply = await client.take(0, 0, 250, [], hold=False)
            assert isinstance(reply, Taken)
            done += reply.batches
        assert len(done) == 1000 and done[1] == done[0] + 2, "every second batch is the other worker's"
        await client.take(0, 0, 1, done, hold=False)
        committed = cluster.coordinator.ledger.committed
        for _ in range(2):
            cluster.coordinator.interrupt("SIGINT")
        await cluster.finish()
        return committed, len(done)

    committed, done = simulate(main())
    assert committed == done


def test_a_partition_shorter_than_the_lease_costs_nobody_its_place() -> None:
    async def main() -> list[Script]:
        network = MemoryNetwork(5)
        cluster = Cluster(network, JobSpec(workers=2, shards=1), lease_s=3.0)
        await cluster.start()
        scripts = [cluster.script(f"w{index}") for index in range(2)]
        while len(scripts[0].trained) < 2:
            await cluster_pause()
        network.partition({"agent-w0", "w0.1"}, {"coordinator", "p0"})
        await cluster_pause(1.0)
        network.heal()
        assert await cluster.finish() == 0
        return scripts

    scripts = simulate(main())
    assert trained(scripts) == [(epoch, batch) for epoch in range(2) for batch in range(12)]
    same(scripts)


def ledger_of(cluster: Cluster, worker: str) -> int:
    """Batches that this worker has taken."""
    current = cluster.coordinator.ledger.current
    return len(current.given.get(WorkerId(worker), [])) if current is not None else 0


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_step_goes_on_beside_what_follows_it_as_in_a_real_worker(staleness: int) -> None:
    """In sync the parameters are asked for beside the commit; with a bound the next step leaves while they are awaited;
    and what has changed leaves again."""
    heard: list[tuple[str, int]] = []

    async def main() -> None:
        spec = JobSpec(workers=2, shards=2, staleness=staleness)
        cluster = Cluster(MemoryNetwork(1), spec, compute_s=lambda name: 0.02 if name == "w0" else 0.2)

        async def waiting(clock: int, answer: Awaitable[Any]) -> Any:
            found = await answer
            heard.append(("answer", clock))
            return found

        def deliver(ps: Ps, peer: str, message: Any, payload: memoryview | None, handler: Any) -> Any:
            answer = handler(peer, message, payload)
            if ps.name != "p1" or not isinstance(message, Push | Commit | Pull) or message.worker != "w0":
                return answer
            heard.append((type(message).__name__, message.clock))
            return waiting(message.clock, answer) if isawaitable(answer) else answer

        cluster.deliver = deliver
        await cluster.start()
        scripts = [cluster.script(f"w{index}", epochs=1) for index in range(2)]
        scripts[0].changes = lambda: True
        assert await cluster.finish() == 0, [script.error for script in scripts]

    simulate(main())
    if staleness == 0:
        assert heard.index(("Pull", 2)) < heard.index(("Commit", 1))
    else:
        assert heard.index(("Pull", 3)) < heard.index(("Push", 2)) < heard.index(("answer", 3))
    buckets = heard.count(("answer", 2 + staleness))
    assert buckets and heard.count(("Push", 1)) == 2 * buckets


@pytest.mark.parametrize("staleness", MODES)
def test_no_worker_is_two_steps_ahead_of_a_shard_whose_parameters_are_frozen(staleness: int | None) -> None:
    """If it were lost then, the shards could not be brought to count the same steps."""
    counted: dict[bool, list[int]] = {True: [], False: []}  # by: does the shard train?

    async def main() -> int:
        cluster = Cluster(MemoryNetwork(1), JobSpec(workers=2, shards=2, staleness=staleness))
        cluster.frozen = ("0.weight", "0.bias", "1.bias")

        async def late(reply: Callable[[], Any]) -> Any:
            await asyncio.sleep(1.0)
            return reply()

        def deliver(ps: Ps, peer: str, message: Any, payload: memoryview | None, handler: Any) -> Any:
            def count() -> Any:
                answer = handler(peer, message, payload)
                counted[trains].append(message.clock)
                clocks = [clocks[-1] for clocks in counted.values() if clocks]
                assert len(clocks) < 2 or abs(clocks[0] - clocks[1]) <= 1, counted
                return answer

            if not isinstance(message, Commit) or message.worker != "w1":
                return handler(peer, message, payload)
            assert ps.core is not None
            trains = bool(ps.core.pushed)
            return count() if trains else late(count)

        cluster.deliver = deliver
        await cluster.start()
        for index in range(2):
            cluster.script(f"w{index}", epochs=1)
        return await cluster.finish()

    assert simulate(main()) == 0
    assert len(counted[True]) == len(counted[False]) > 3


@pytest.mark.parametrize("staleness", MODES)
def test_nothing_of_a_worker_that_was_killed_goes_on(staleness: int | None) -> None:
    """What did would fail without anybody who sees it, and `simulate` raises that."""

    async def main() -> int:
        cluster = Cluster(MemoryNetwork(1), JobSpec(workers=3, shards=2, staleness=staleness))
        await cluster.start()
        for index in range(3):
            cluster.script(f"w{index}")
        await cluster.until(lambda: cluster.scripts["w1"].trained)
        cluster.kill("w1")
        return await cluster.finish()

    assert simulate(main()) == 0


async def cluster_pause(seconds: float = 0.01) -> None:
    """Virtual time."""
    await asyncio.sleep(seconds)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_bucket_that_is_pushed_again_counts_as_it_was_pushed_last(shards: int) -> None:
    """As where a script clips its gradients after they have left."""

    async def main(*, twice: bool) -> list[Script]:
        cluster = Cluster(MemoryNetwork(9), JobSpec(workers=1, shards=shards))
        await cluster.start()
        script = cluster.script("w0", batches=6)
        while not script.trained:
            await cluster_pause()
        push = script.client.push
        before: dict[int, memoryview] = {}

        def again(bucket: Any, clock: int, payload: memoryview, absent: list[int], seen: int = -1) -> None:
            if bucket.index in before:
                push(bucket, clock, before[bucket.index], absent)
            before[bucket.index] = memoryview(bytes(payload))
            push(bucket, clock, payload, absent)

        if twice:
            script.client.push = again  # type: ignore[method-assign]
        assert await cluster.finish() == 0, script.error
        return [script]

    same([*simulate(main(twice=False)), *simulate(main(twice=True))])
