"""One step across a worker and its shards, on the in-memory network in virtual time: one tree, the right parents, times
nested."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.simulation import simulate
from tests.zml.cluster import Cluster, Script
from zml import tracing
from zml.messages import JobSpec
from zml.tracing.sampling import trace_of
from zml.tracing.shards import ShardTrace
from zml.tracing.span import Span
from zml.tracing.steps import Origin, StepTrace
from zml.transport.memory import MemoryNetwork

Compute = Callable[[str], float]
Tree = dict[str, Any]


@pytest.fixture
def spans() -> Iterator[list[Span]]:
    found: list[Span] = []
    tracing.into(found.extend)
    yield found
    tracing.into(None)


def steady(name: str) -> float:
    return 0.03 * (1 + int(name[1:]))


def slow_at(step: int, worker: str) -> Compute:
    """This worker's n-th step takes a second."""
    count: Counter[str] = Counter()

    def compute(name: str) -> float:
        count[name] += 1
        return 1.0 if (name, count[name]) == (worker, step + 1) else 0.05

    return compute


async def train(
    every: int, staleness: int | None = 0, compute_s: Compute = steady, workers: int = 2, batches: int = 12
) -> Cluster:
    spec = JobSpec(workers=workers, shards=2, staleness=staleness)
    cluster = Cluster(MemoryNetwork(3), spec, compute_s=compute_s)
    await cluster.start()
    now = asyncio.get_running_loop().time
    for index in range(workers):
        script = cluster.script(f"w{index}", batches=batches, epochs=1)
        origin = Origin("run", "job", script.name, 1, alone=staleness is None)
        script.trace = StepTrace(origin, every, tracing.emit, now)
    while len(cluster.shards) < 2 or any(ps.core is None for ps in cluster.shards.values()):
        await asyncio.sleep(0.001)
    for ps in cluster.shards.values():
        assert ps.core is not None and isinstance(ps.core.trace, ShardTrace)
        ps.core.trace.now = now
    assert await cluster.finish() == 0, [script.error for script in cluster.scripts.values()]
    for script in cluster.scripts.values():
        script.trace.end()
    return cluster


def where(span: Span) -> str:
    """Who made it: a worker's step by its worker, what it has with a shard by that."""
    return str(span.attributes.get("zml.shard") or span.attributes.get("zml.worker") or "")


def must_be_trees(spans: list[Span], roots: int) -> None:
    """Every span lies within its parent, which is there; but what goes on with a shard may outlast its step."""
    by_id = {span.context.span_id: span for span in spans}
    assert len(by_id) == len(spans)
    assert sum(span.parent_id is None for span in spans) == roots
    for span in spans:
        if span.parent_id is not None:
            above = by_id[span.parent_id]
            assert above.context.trace_id == span.context.trace_id
            assert above.began <= span.began <= span.ended, (above, span)
            assert span.ended <= above.ended or span.name in ("zml.push", "zml.pull"), (above, span)


def tree(spans: list[Span], root: Span) -> Tree:
    """Names and places, by parent."""
    below = [span for span in spans if span.parent_id == root.context.span_id]
    return {f"{span.name} {where(span)}".strip(): tree(spans, span) for span in below}


def test_a_step_is_one_tree_across_workers_and_shards(spans: list[Span]) -> None:
    simulate(train(1))
    trace = trace_of("run", "job", 2)
    mine = [span for span in spans if span.context.trace_id == trace]
    must_be_trees(mine, roots=2)
    roots = {where(span): span for span in mine if span.parent_id is None}
    pull: Tree = {f"zml.pull {shard}": {f"zml.ps.pull {shard}": {}} for shard in ("p0", "p1")}
    first: Tree = {f"zml.push {shard}": {f"zml.ps.push {shard}": {}} for shard in ("p0", "p1")}
    last: Tree = {f"zml.push {s}": {f"zml.ps.push {s}": {}, f"zml.ps.apply {s}": {}} for s in ("p0", "p1")}
    thread: Tree = {"zml.compute": {}, "zml.wait": {}}
    # w1 computes for longer, so that its commit completes the clock.
    assert tree(mine, roots["w0"]) == {**thread, **first, **pull}
    assert tree(mine, roots["w1"]) == {**thread, **last, **pull}
    applied = [span for span in mine if span.name == "zml.ps.apply"]
    pushed = {(where(span), span.parent_id): span for span in mine if span.name == "zml.push"}
    for span in applied:
        assert (span.attributes["zml.completed_by"], span.attributes["zml.workers"]) == ("w1", 2)
        other = pushed[where(span), roots["w0"].context.span_id]
        assert [link.span_id for link in span.links] == [other.context.span_id]
    parked = {
        (where(span), str(span.attributes["zml.worker"])): span.attributes["zml.parked_s"]
        for span in mine
        if span.name == "zml.ps.pull"
    }
    # w0 waits at each shard for the 30 ms that w1 computes longer. Both ask before their commits are there.
    for shard in ("p0", "p1"):
        assert parked[shard, "w0"] == pytest.approx(0.03, abs=0.01)
        assert parked[shard, "w1"] == pytest.approx(0.0, abs=0.01)


@pytest.mark.parametrize("staleness", [0, 2, None])
def test_every_trace_of_every_mode_is_whole(spans: list[Span], staleness: int | None) -> None:
    cluster = simulate(train(1, staleness, workers=3))
    steps = [span for span in spans if span.name == "zml.step"]
    assert len(steps) == sum(len(script.trained) for script in cluster.scripts.values())
    must_be_trees(spans, roots=len(steps))
    updates = Counter(where(span) for span in spans if span.name == "zml.ps.apply")
    made = {
        shard: ps.core.steps for shard, ps in ((f"p{n}", ps) for n, ps in cluster.shards.items()) if ps.core
    }
    assert updates == made, "each update is one span"
    assert Counter(where(span) for span in spans if span.name == "zml.ps.push") == dict.fromkeys(
        made, len(steps)
    )
    assert Counter(where(span) for span in spans if span.name == "zml.ps.pull") == dict.fromkeys(
        made, len(steps)
    )
    workers = Counter(span.context.trace_id for span in steps)
    assert max(workers.values()) == (1 if staleness is None else 3)


def test_a_slow_step_that_was_not_sampled_is_kept_on_workers_and_shards(spans: list[Span]) -> None:
    simulate(train(0, compute_s=slow_at(10, "w1"), batches=40))
    assert {span.context.trace_id for span in spans} == {trace_of("run", "job", 10)}
    steps = {where(span): span for span in spans if span.name == "zml.step"}
    assert {name: step.attributes["zml.kept"] for name, step in steps.items()} == {"w0": "slow", "w1": "slow"}
    must_be_trees(spans, roots=2)
    counts = Counter((span.name, where(span)) for span in spans if span.name.startswith("zml.ps."))
    assert counts == {
        (name, shard): number
        for shard in ("p0", "p1")
        for name, number in (("zml.ps.push", 2), ("zml.ps.apply", 1), ("zml.ps.pull", 2))
    }
    waits = [span for span in spans if span.name == "zml.wait"]
    assert max(span.ended - span.began for span in waits) == pytest.approx(0.95, abs=0.02), "w0 waited for w1"


def test_where_nobody_waits_only_the_slow_workers_step_is_kept(spans: list[Span]) -> None:
    simulate(train(0, staleness=None, compute_s=slow_at(10, "w1"), batches=40))
    [step] = [span for span in spans if span.name == "zml.step"]
    assert (where(step), step.attributes["zml.clock"]) == ("w1", 10)
    must_be_trees(spans, roots=1)
    assert Counter(span.name for span in spans if span.name.startswith("zml.ps.")) == {
        "zml.ps.push": 2,
        "zml.ps.apply": 2,
        "zml.ps.pull": 2,
    }


def test_without_tracing_no_message_and_no_shard_knows_of_it() -> None:
    headers = set()

    async def main() -> None:
        cluster = Cluster(MemoryNetwork(3), JobSpec(workers=1, shards=1))

        def deliver(
            ps: object, peer: str, message: object, payload: object, handler: Callable[..., object]
        ) -> object:
            headers.add(getattr(message, "trace", ""))
            return handler(peer, message, payload)

        cluster.deliver = deliver
        await cluster.start()
        cluster.script("w0", epochs=1)
        assert await cluster.finish() == 0
        for ps in cluster.shards.values():
            assert ps.core is None or not isinstance(ps.core.trace, ShardTrace)

    simulate(main())
    assert headers == {""}


def test_a_shard_that_was_killed_tells_of_its_recovery_and_of_no_update_twice(
    spans: list[Span], tmp_path: Path
) -> None:
    async def main() -> list[Script]:
        cluster = Cluster(MemoryNetwork(5), JobSpec(workers=1, shards=2), folder=tmp_path)
        await cluster.start()
        script = cluster.script("w0", batches=20, epochs=1)
        script.trace = StepTrace(Origin("run", "job", "w0", 1), 1, tracing.emit)
        await cluster.until(lambda: len(script.trained) >= 5)
        cluster.kill_shard(1)
        await asyncio.sleep(0.3)
        cluster.start_shard(1)
        assert await cluster.finish() == 0
        script.trace.end()
        return [script]

    [script] = simulate(main())
    assert len(script.trained) == 20
    updates = Counter((span.context.trace_id, where(span)) for span in spans if span.name == "zml.ps.apply")
    assert set(updates.values()) == {1}
    recovered = [span.attributes for span in spans if span.name == "zml.recover"]
    assert [
        (told["zml.shard"], int(told["zml.messages"]) > 10) for told in recovered if "zml.messages" in told
    ] == [("p1", True)], "the shard has read its log"
    assert [told["zml.shard"] for told in recovered if "zml.messages" not in told] == ["p1"], (
        "the coordinator saw it"
    )
