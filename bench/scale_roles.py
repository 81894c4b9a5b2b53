"""The processes that `scale.py` starts: real shards, and light workers that compute nothing. Not for people.

Started with a role and one JSON argument; each answers every line of its input with one line of JSON, and ends when
its input does. A shard is a `Shard` behind its own endpoint; a worker is a `Client` with an endpoint of its
own, many in one process. What a worker pushes was encoded once, and what it pulls is counted and not decoded:
both are work of each worker's own machine. No shared memory, because workers have other machines, and no push log.
"""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import checkout  # noqa: F401
import torch
import uvloop
from peer import cpu_s, quiet

import zml.link
from zml.agent.seat import Seat
from zml.codec import UNKNOWN, by_name
from zml.config import Settings
from zml.hyper import OptimizerSpec, hyper_of, write_hyper
from zml.layout import Bucket, Layout, Registration, buckets
from zml.link import bulk_endpoint
from zml.messages import Delta, JobSpec
from zml.messages import Seat as RosterSeat
from zml.plan import Plan
from zml.scheduler.ids import JobId
from zml.shard.serving import nobody
from zml.shard.shard import Shard
from zml.worker.client import Client
from zml.worker.outbox import Outbox
from zml.worker.updates import outer_hyper, outer_spec

JOB, WIDTH, CONNECT_S = "scale", 1024, 30.0
Command = Callable[[dict[str, Any]], Awaitable[Any]]


class Model:
    """One large matrix, cut and placed as a job would cut it."""

    def __init__(self, elements: int, shards: int, compress: str) -> None:
        self.plan = Plan.of(JobSpec(compress=compress))
        shape = (max(1, elements // WIDTH), WIDTH)
        if self.plan.optimizer_on == "worker":
            layout, spec = Layout.build([("matrix", shape, 0)], 2), outer_spec()
            self.hyper = write_hyper(outer_hyper(self.plan, self.plan.compression.density, 1, True, True))
        else:
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3, momentum=0.9)
            layout, spec = Layout.build([("matrix", shape, 0)], 1), OptimizerSpec.of(optimizer)
            self.hyper = write_hyper(hyper_of(optimizer))
        self.registration = Registration(layout, spec, self.plan.bucket_chunks(8))
        self.placement = [index * shards // len(layout.chunks) for index in range(len(layout.chunks))]
        self.cut = buckets(layout, self.placement, self.registration.bucket_chunks)
        self.codec = by_name(str(self.plan.compression))

    def payloads(self) -> dict[int, memoryview]:
        """A worker's push of each bucket."""
        random, found = torch.Generator().manual_seed(0), {}
        for bucket in self.cut:
            outbox = Outbox(bucket, self.registration.layout, self.codec)
            for values in outbox.values.values():
                values.copy_(1e-3 * torch.randn(len(values), generator=random))
            density = self.plan.compression.density if self.plan.compression.sparse else None
            found[bucket.index] = memoryview(bytes(outbox.pack(density, 1.0)))
        return found


# -- a shard -------------------------------------------------------------------------------------------------


async def shard(index: int, elements: int, shards: int, compress: str) -> None:
    model = Model(elements, shards, compress)
    core = Shard(JobId(JOB), f"p{index}")
    core.assign(model.registration, model.placement, 0, compress)
    assert core.store is not None
    for bucket in core.buckets.values():
        size = sum(model.registration.layout.chunks[chunk].size for chunk in bucket.chunks)
        core.store.load_bucket(bucket.chunks, memoryview(bytes(4 * size)))
    endpoint = bulk_endpoint(Settings(bind=("tcp://127.0.0.1:0",)), f"p{index}", core.handle)
    await endpoint.start()

    async def command(asked: dict[str, Any]) -> Any:
        if "workers" in asked:
            generation = asked["generation"]
            core.roster(generation, [RosterSeat(f"w{n}", generation, False) for n in range(asked["workers"])])
        return {"cpu_s": cpu_s(), "updates": core.steps}

    await serve(endpoint.addresses, command)
    await endpoint.close()


# -- workers -------------------------------------------------------------------------------------------------


class Worker:
    """One worker, over any number of incarnations."""

    def __init__(self, name: str, model: Model, payloads: dict[int, memoryview]) -> None:
        self.name = name
        self.model = model
        self.payloads = payloads
        self.endpoint = bulk_endpoint(Settings(), name, nobody, listens=False)
        self.versions = [UNKNOWN] * len(model.registration.layout.chunks)
        self.came = 0  # bytes

    async def connect(self, addresses: dict[str, list[str]]) -> None:
        await self.endpoint.start()
        for name, where in addresses.items():
            await self.endpoint.connect(name, where, timeout_s=CONNECT_S)

    async def enter(self, shards: list[str], incarnation: int) -> None:
        seat = Seat(job=JOB, worker=self.name, incarnation=incarnation, coordinator=[])
        self.client = Client(seat, self.endpoint, self.endpoint)  # nothing goes to a coordinator in a step
        self.client.where.met(shards)
        self.clock = await self.client.enter()
        await self.pull()

    async def run(self, steps: int, compute_s: float) -> list[float]:
        """When each step ended. In sync, the pull does not wait for the commit's answer."""
        ends: list[float] = []
        for _ in range(steps):
            await asyncio.sleep(compute_s)
            for bucket in self.model.cut:
                self.client.push(bucket, self.clock, self.payloads[bucket.index], [])
            commit = self.client.commit(self.clock, self.model.hyper, self.model.cut)
            self.clock += 1
            await asyncio.gather(commit, self.pull())
            ends.append(time.monotonic())
        return ends

    async def pull(self) -> None:
        wanted = [
            (bucket, [self.versions[chunk] for chunk in bucket.chunks]) for bucket in reversed(self.model.cut)
        ]
        await self.client.pull_all(wanted, self.clock, self.deliver)

    def deliver(self, bucket: Bucket, delta: Delta, payload: memoryview | None) -> None:
        self.came += len(payload or b"")
        for chunk, version in zip(bucket.chunks, delta.versions, strict=True):
            self.versions[chunk] = version


async def workers(
    first: int, count: int, elements: int, compress: str, addresses: dict[str, list[str]]
) -> None:
    model = Model(elements, len(addresses), compress)
    payloads = model.payloads()
    crew = [Worker(f"w{number}", model, payloads) for number in range(first, first + count)]
    for worker in crew:
        await worker.connect(addresses)

    async def command(asked: dict[str, Any]) -> Any:
        mine = [worker for worker in crew if int(worker.name[1:]) < asked["workers"]]
        if "steps" not in asked:
            await asyncio.gather(*(worker.enter(list(addresses), asked["generation"]) for worker in mine))
            return len(mine)
        before, cpu = sum(worker.came for worker in mine), cpu_s()
        ends = await asyncio.gather(*(worker.run(asked["steps"], asked["compute_s"]) for worker in mine))
        came = sum(worker.came for worker in mine) - before
        return {"ends": ends, "came": came, "cpu_s": cpu_s() - cpu}

    await serve(sum(map(len, payloads.values())), command)
    for worker in crew:
        await worker.endpoint.close()


# -- both ----------------------------------------------------------------------------------------------------


async def serve(hello: Any, command: Command) -> None:
    print(json.dumps(hello), flush=True)
    lines = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := await lines.readline():
        print(json.dumps(await command(json.loads(line))), flush=True)


if __name__ == "__main__":
    quiet()
    torch.set_num_threads(1)
    zml.link.BULK = replace(zml.link.BULK, slots=0)
    uvloop.run({"shard": shard, "workers": workers}[sys.argv[1]](**json.loads(sys.argv[2])))
