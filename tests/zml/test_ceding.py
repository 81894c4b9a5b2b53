"""Two shards while a bucket goes from one to the other, one order at a time: what is late, early or doubled counts as
little as what is wrong."""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch

from zml.codec import by_name
from zml.hyper import OptimizerSpec, hyper_of, write_hyper
from zml.layout import Layout, Registration, buckets
from zml.messages import (
    Align,
    Assign,
    Assignment,
    Cede,
    Commit,
    Enter,
    Graft,
    Hold,
    Load,
    Mark,
    Muster,
    Ok,
    Push,
    Release,
    Roster,
    Seat,
    Settle,
    Snap,
)
from zml.scheduler.ids import JobId
from zml.shard.holding import front_of, furthest
from zml.shard.shard import Shard
from zml.transport import Refusal
from zml.worker.binding import Binding
from zml.worker.outbox import Outbox

JOB = "job"
AS_IT_WAS, AS_IT_IS_TO_BE = [0, 0, 0], [0, 0, 1]


class Two:
    """p0 holds three buckets, p1 is to get the last one; w0 and w1 train."""

    def __init__(self, holders: Sequence[int] = AS_IT_WAS, staleness: int | None = None) -> None:
        torch.manual_seed(1)
        self.model = torch.nn.Linear(5, 3)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        layout = Layout.of(self.model, self.optimizer, chunk_elements=6)
        self.registration = Registration(layout, OptimizerSpec.of(self.optimizer), 1)
        self.placement = list(holders)
        self.cut = buckets(layout, self.placement, 1)
        self.staleness = staleness
        self.source, self.target = self.shards = [Shard(JobId(JOB), name) for name in ("p0", "p1")]
        binding = Binding(layout, self.model)
        for shard in self.shards:
            self.assign(shard, 0, [])
            muster = Muster([Seat("w0", 1, True), Seat("w1", 1, True)])
            shard.order(Roster(JOB, 1), msgspec.msgpack.encode(muster))
            for worker in ("w0", "w1") if shard.buckets else ():
                self.ask(shard, Enter(JOB, worker, 1))
            for index, bucket in shard.buckets.items():
                values = torch.empty(layout.chunks[bucket.chunks[0]].size)
                binding.read(bucket.chunks[0], values)
                self.ask(shard, Load(JOB, "w0", 1, index), values.numpy().tobytes())

    def assign(self, shard: Shard, edition: int, holders: Sequence[int]) -> Any:
        assignment = Assignment(self.registration.to_bytes(), self.placement, list(holders), edition)
        order = Assign(JOB, shard.name, self.staleness, "none")
        return shard.order(order, msgspec.msgpack.encode(assignment))

    def ask(self, shard: Shard, message: Any, payload: bytes | None = None) -> Any:
        view = None if payload is None else memoryview(payload)
        return shard.handle(f"{message.worker}.1", message, view)

    def push(self, shard: Shard, worker: str, clock: int) -> None:
        for index, bucket in shard.buckets.items():
            outbox = Outbox(bucket, self.registration.layout, by_name("none"))
            for values in outbox.values.values():
                values.fill_(1.0)
            assert self.ask(shard, Push(JOB, worker, 1, clock, index), bytes(outbox.pack())) == Ok()

    def commit(self, shard: Shard, worker: str, clock: int) -> Any:
        order = Commit(JOB, worker, 1, clock, len(shard.buckets))
        return self.ask(shard, order, write_hyper(hyper_of(self.optimizer)))

    def step(self, worker: str, clock: int) -> None:
        for shard in self.shards:
            if shard.buckets:
                self.push(shard, worker, clock)
                assert self.commit(shard, worker, clock) == Ok()

    def hold(self) -> None:
        for shard in self.shards:
            if shard.buckets:
                shard.order(Hold(JOB, 1), b"")

    def cede(self, buckets: Sequence[int] = (2,)) -> bytes:
        order = Cede(JOB, 1, 1, list(buckets), "p1")
        answer: Any = self.source.order(order, msgspec.msgpack.encode(front_of(self.source)))
        return bytes(answer[1])


def test_an_edition_moves_a_bucket_with_what_is_staged_and_an_older_one_means_nothing() -> None:
    async def main() -> None:
        two = Two()
        two.step("w0", 0)
        two.push(two.source, "w0", 1)
        two.hold()
        parcel = two.cede()
        assert two.cede() == parcel, "twice is the same as once"
        assert (
            two.target.order(Graft(JOB, "p1", 1), parcel)
            == Ok()
            == two.target.order(Graft(JOB, "p1", 1), parcel)
        )
        for shard in (two.target, two.source):
            two.assign(shard, 1, AS_IT_IS_TO_BE)
            two.assign(shard, 0, AS_IT_WAS)
        assert (set(two.source.buckets), set(two.target.buckets)) == ({0, 1}, {2})
        for shard in two.shards:
            with pytest.raises(Refusal, match="edition 1"):
                two.ask(shard, Enter(JOB, "w0", 1, known=True))
            two.ask(shard, Enter(JOB, "w0", 1, known=True, edition=1))
            assert two.commit(shard, "w0", 1) == Ok(), "its pushes moved along"
        assert two.source.steps == two.target.steps == 2
        with pytest.raises(Refusal, match="takes nothing in"):
            two.target.order(Graft(JOB, "p1", 1), parcel)  # late, and after its edition

    asyncio.run(main())


def test_where_it_stays_as_it_was_the_target_forgets_what_it_got() -> None:
    async def main() -> None:
        two = Two()
        two.step("w0", 0)
        two.hold()
        two.target.order(Graft(JOB, "p1", 1), two.cede())
        for shard in two.shards:
            two.assign(shard, 1, AS_IT_WAS)
        assert two.source.buckets.keys() == {0, 1, 2} and not two.target.buckets
        two.ask(two.source, Enter(JOB, "w0", 1, known=True, edition=1))
        two.push(two.source, "w0", 1)
        assert two.commit(two.source, "w0", 1) == Ok()

    asyncio.run(main())


def test_in_doubt_nothing_counts_and_no_cut_is_made() -> None:
    async def main() -> None:
        two = Two(holders=[0, 0, 1], staleness=0)
        for clock in range(2):
            for worker in ("w0", "w1"):
                two.push(two.source, worker, clock)
                two.push(two.target, worker, clock)
            if clock == 0:
                for worker in ("w0", "w1"):
                    assert two.commit(two.source, worker, 0) == two.commit(two.target, worker, 0) == Ok()
        two.hold()
        assert two.target.holding is not None
        front = front_of(two.source)
        parcel = two.cede([1])
        two.target.holding._too_long()  # it was held for so long that it goes on by itself
        two.target.order(Graft(JOB, "p1", 1), parcel)
        for shard in two.shards:
            waits = two.commit(shard, "w0", 1)
            await asyncio.sleep(0)
            assert not isinstance(waits, Ok)
            target = msgspec.msgpack.encode(furthest([front]))
            for order, payload in (
                (Align(JOB, 1), target),
                (Hold(JOB, 2), b""),
                (Mark(JOB, 2, 0), b""),
            ):
                with pytest.raises(Refusal, match="edition 1"):
                    shard.order(order, payload)
            shard.order(Release(JOB, 1), b"")
            assert shard.steps == 1
            if asyncio.isfuture(waits):
                waits.cancel()
            else:
                waits.close()

    asyncio.run(main())


def test_a_target_that_was_told_of_a_loss_does_not_forget_it() -> None:
    async def main() -> None:
        two = Two()
        two.step("w0", 0)
        two.step("w1", 0)
        two.push(two.source, "w1", 1)
        two.hold()
        parcel = two.cede()
        for shard in (two.target, two.source):
            shard.order(Settle(JOB, "w1", 1), b"")
        two.target.order(Graft(JOB, "p1", 1), parcel)
        for shard in (two.target, two.source):
            two.assign(shard, 1, AS_IT_IS_TO_BE)
            with pytest.raises(Refusal) as refused:
                two.ask(shard, Enter(JOB, "w1", 1, edition=1))
            assert refused.value.code == "fenced"

    asyncio.run(main())


def test_a_copy_for_a_checkpoint_stays_while_others_hold() -> None:
    async def main() -> None:
        two = Two()
        two.step("w0", 0)
        two.hold()
        two.source.order(Snap(JOB, 1), msgspec.msgpack.encode(front_of(two.source)))
        copy = two.source.copy
        two.source.order(Hold(JOB, 2), b"")
        assert copy is not None and two.source.copy is copy
        two.source.order(Release(JOB, 2), b"")

    asyncio.run(main())


def test_a_shard_that_has_lost_what_it_got_does_not_begin_without() -> None:
    two = Two()
    with pytest.raises(Refusal, match="has lost the buckets"):
        two.assign(Shard(JobId(JOB), "p1"), 1, AS_IT_IS_TO_BE)
