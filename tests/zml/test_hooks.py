"""Gradients leave during backward, parameters arrive with the step, and the script notices nothing of it."""

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from zml.agent.seat import Seat
from zml.codec import by_name
from zml.errors import ZmlError
from zml.hyper import OptimizerSpec
from zml.iothread import IoThread
from zml.layout import Bucket, Layout, Registration, buckets
from zml.messages import Advance, Commit, Enter, JobSpec, Load, Pull, Push
from zml.messages import Seat as RosterSeat
from zml.plan import Plan
from zml.scheduler.ids import JobId
from zml.shard.shard import Shard
from zml.worker.binding import Binding
from zml.worker.client import Deliver, Progress
from zml.worker.hooks import Hooks
from zml.worker.traffic import Traffic

JOB, ME = "job", "w0"


class Direct:
    """A client without a network: its shard is called on the spot, in the I/O thread."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.seat = Seat(job=JOB, worker=ME, incarnation=1, coordinator=[])
        self.told: list[str] = []  # what reached the shard, in order
        self.asked: list[int] = []  # the clocks of pulls
        self.broken = ""
        self.spared = 0
        self.pushes: list[asyncio.Task[None]] = []

    def tell(self, message: Any, payload: Any = None) -> Any:
        return self.shard.handle(ME, message, payload)

    def push(
        self, bucket: Bucket, clock: int, payload: memoryview, absent: list[int], seen: int = -1
    ) -> None:
        # A copy, as on its way through the network: the buffer is used again by the next step.
        task = asyncio.ensure_future(self._push(bucket, clock, memoryview(bytes(payload)), absent))
        self.pushes.append(task)

    async def _push(self, bucket: Bucket, clock: int, payload: memoryview, absent: list[int]) -> None:
        self.told.append(f"push {bucket.index}")
        self.tell(Push(JOB, ME, 1, clock, bucket.index, absent), payload)

    def commit(
        self, clock: int, hyper: bytes, cut: Sequence[Bucket], progress: Progress
    ) -> Coroutine[Any, Any, None]:
        """Counts when it is called: a later clock's pushes come behind."""
        if self.broken:
            raise ZmlError("ZML-E205", self.broken)
        self.told.append(f"commit {clock}")
        self.tell(Commit(JOB, ME, 1, clock, len(cut)), memoryview(hyper))
        return asyncio.sleep(0)

    async def pull_all(
        self,
        wanted: Sequence[tuple[Bucket, list[int]]],
        clock: int,
        deliver: Deliver,
        step: int | None = None,
    ) -> None:
        self.asked.append(clock)
        for bucket, have in wanted:
            answer = self.tell(Pull(JOB, ME, 1, clock, bucket.index, have))
            message, payload = answer if isinstance(answer, tuple) else await answer
            deliver(bucket, message, payload)

    async def load(self, bucket: Bucket, payload: memoryview) -> None:
        self.tell(Load(JOB, ME, 1, bucket.index), memoryview(bytes(payload)))


class Twin:
    """The same model twice: one trained through zml, one by torch alone."""

    def __init__(self, io: IoThread, compress: str = "none", *, frozen: bool = False, **options: Any) -> None:
        torch.manual_seed(3)
        self.model, self.plain = (
            torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3))
            for _ in range(2)
        )
        self.plain.load_state_dict(self.model.state_dict())
        if frozen:
            self.model[0].weight.requires_grad_(False)
        numbers = {"lr": 0.1, "momentum": 0.9, **options}
        self.optimizer = torch.optim.SGD(self.model.parameters(), **numbers)
        self.plain_optimizer = torch.optim.SGD(self.plain.parameters(), **numbers)
        layout = Layout.of(self.model, self.optimizer, chunk_elements=40)
        registration = Registration(layout, OptimizerSpec.of(self.optimizer), 1)
        placement = [0] * len(layout.chunks)
        shard = Shard(JobId(JOB), "p0")
        shard.assign(registration, placement, 0, compress)
        shard.roster(1, [RosterSeat(ME, 1, True)])
        shard.handle(ME, Enter(JOB, ME, 1), None)
        self.direct = Direct(shard)
        cut = buckets(layout, placement, 1)
        self.steps = 0
        self.leaves_out = False
        self.left: list[str] = []  # out
        binding = Binding(layout, self.model)
        codec, plan = by_name(compress), Plan.of(JobSpec(compress=compress))
        self.traffic = Traffic(binding, cut, codec, self.direct, io, plan, self)  # type: ignore[arg-type]
        self.hooks = Hooks(self.traffic, self.optimizer, self.stepped)
        self.traffic.load_shards()
        self.traffic.pull(0, everything=True)
        self.hooks.install()
        self.x, self.y = torch.randn(16, 6), torch.randint(0, 3, (16,))

    def stepped(self) -> None:
        self.steps += 1

    def leaving(self) -> tuple[int, int]:
        return -1, 0

    def counted(self) -> None:
        pass

    def left_out(self, because: str) -> bool:
        self.left.append(because)
        return self.leaves_out

    def both(self) -> Iterator[tuple[torch.nn.Module, torch.optim.Optimizer]]:
        yield self.model, self.optimizer
        yield self.plain, self.plain_optimizer

    def backward(self, model: torch.nn.Module) -> None:
        F.cross_entropy(model(self.x), self.y).backward()  # type: ignore[no-untyped-call]

    def equal(self) -> bool:
        pairs = zip(self.model.parameters(), self.plain.parameters(), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


def test_buckets_leave_during_backward_the_last_layers_first(io: IoThread) -> None:
    twin = Twin(io)
    twin.backward(twin.model)
    io.call(nothing())
    pushes = list(twin.direct.told)
    assert pushes == [f"push {bucket.index}" for bucket in twin.traffic.buckets], (
        "all left, in order of readiness"
    )
    twin.optimizer.step()
    assert twin.direct.told == [*pushes, "commit 0"], "and the step only counts them"
    assert twin.steps == 1


def test_a_worker_that_has_departed_makes_no_steps_any_more(io: IoThread) -> None:
    twin = Twin(io)
    twin.backward(twin.model)
    twin.optimizer.step()
    twin.hooks.depart()
    told, before = list(twin.direct.told), [p.detach().clone() for p in twin.model.parameters()]
    twin.backward(twin.model)
    twin.optimizer.step()
    io.call(nothing())
    assert twin.direct.told == told and twin.steps == 1
    assert all(torch.equal(p, was) for p, was in zip(twin.model.parameters(), before, strict=True))


def test_steps_give_the_bits_of_torch(io: IoThread) -> None:
    twin = Twin(io, weight_decay=0.01)
    for step in range(6):
        for model, optimizer in twin.both():
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            twin.backward(model)
            optimizer.step()
    assert twin.equal()


def test_gradients_that_change_after_backward_are_sent_again_and_from_then_on_with_the_step(
    io: IoThread,
) -> None:
    twin = Twin(io)
    for _ in range(3):
        for model, optimizer in twin.both():
            optimizer.zero_grad()
            twin.backward(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
    assert twin.equal()
    assert not twin.hooks.early
    count = len(twin.traffic.buckets)
    assert [word.partition(" ")[0] for word in twin.direct.told] == (
        ["push"] * 2 * count + ["commit"] + 2 * (["push"] * count + ["commit"])
    )


def test_gradients_of_several_backward_passes_add_up(io: IoThread) -> None:
    twin = Twin(io)
    for _ in range(2):
        for model, optimizer in twin.both():
            optimizer.zero_grad()
            for _ in range(3):
                twin.backward(model)
            optimizer.step()
    assert twin.equal()


def test_gradients_are_there_again_after_the_step(io: IoThread) -> None:
    twin = Twin(io)
    for model, optimizer in twin.both():
        twin.backward(model)
        optimizer.step()
    for ours, plain in zip(twin.model.parameters(), twin.plain.parameters(), strict=True):
        assert ours.grad is not None and plain.grad is not None
        assert torch.equal(ours.grad, plain.grad), "a script may look at them"


def test_a_step_that_a_grad_scaler_drops_is_dropped_here_too(io: IoThread) -> None:
    twin = Twin(io)
    for bad in (False, True, False):
        for model, optimizer in twin.both():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(twin.x), twin.y)
            (loss * float("inf") if bad else loss).backward()  # type: ignore[no-untyped-call]
            if not bad:  # as GradScaler decides
                optimizer.step()
    assert twin.equal()
    assert twin.traffic.clock == twin.steps == 2


@pytest.mark.parametrize(
    "fused", [False, True], ids=["unscaled before the step", "unscaled by the optimizer"]
)
def test_a_grad_scaler_unscales_what_is_sent_and_drops_what_is_not_finite(io: IoThread, fused: bool) -> None:
    twin = Twin(io, fused=fused)
    for model, optimizer in twin.both():
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for bad in (False, False, True, False):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(twin.x), twin.y)
            scaler.scale(loss * float("inf") if bad else loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
    assert twin.equal()
    assert twin.traffic.clock == twin.steps == 3


def test_gradients_changed_behind_autograd_are_sent_as_they_are_at_the_step(io: IoThread) -> None:
    twin = Twin(io)
    for model, optimizer in twin.both():
        for _ in range(3):
            optimizer.zero_grad()
            twin.backward(model)
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.data.clamp_(-0.01, 0.01)  # no version counter moves
            optimizer.step()
    assert twin.equal()
    assert not twin.hooks.early


def test_a_sparse_payload_on_its_way_stays_as_it_is_while_its_bucket_is_packed_again(io: IoThread) -> None:
    twin = Twin(io, compress="topk:5%")
    left: list[memoryview] = []

    def push(bucket: Bucket, clock: int, payload: memoryview, absent: list[int], seen: int = -1) -> None:
        left.append(payload)

    twin.direct.push = push  # type: ignore[method-assign]
    outbox = next(iter(twin.traffic.outboxes.values()))
    for value in (1.0, 3.0):
        outbox.take_back()
        for values in outbox.values.values():
            values.fill_(value)
        twin.traffic.leave(outbox)
        io.call(nothing())
        if len(left) == 1:
            before = bytes(left[0])
    assert bytes(left[0]) == before != bytes(left[1])


def test_gradients_that_nobody_changes_are_sent_once(io: IoThread) -> None:
    twin = Twin(io)
    for _ in range(2):
        twin.optimizer.zero_grad()
        twin.backward(twin.model)
        twin.optimizer.step()
    pushes = [told for told in twin.direct.told if told.startswith("push")]
    assert len(pushes) == 2 * len(twin.traffic.buckets)
    assert twin.hooks.early


def test_what_left_before_a_rest_leaves_again_with_the_step_after_it(io: IoThread) -> None:
    twin = Twin(io)
    for model, _ in twin.both():
        twin.backward(model)
    io.call(nothing())
    twin.direct.tell(Advance(JOB, ME, 1, 5))
    twin.traffic.clock = 5
    for _, optimizer in twin.both():
        optimizer.step()
    assert twin.direct.told[-1] == "commit 5"
    assert twin.equal()


def test_a_parameter_that_is_thawed_after_joining_is_refused(io: IoThread) -> None:
    twin = Twin(io, frozen=True)
    twin.backward(twin.model)
    twin.optimizer.step()
    twin.model[0].weight.requires_grad_(True)
    twin.backward(twin.model)
    with pytest.raises(ZmlError, match=r"0\.weight has a gradient, but it was frozen") as refused:
        twin.optimizer.step()
    assert refused.value.code == "ZML-E513"


def test_a_gradient_that_is_not_finite_stops_the_script_before_the_step_counts(io: IoThread) -> None:
    twin = Twin(io)
    (F.cross_entropy(twin.model(twin.x), twin.y) * float("nan")).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(ZmlError, match=r"the gradient of \S+ is not finite at step 0 of w0") as stopped:
        twin.optimizer.step()
    assert stopped.value.code == "ZML-E502"
    assert "commit 0" not in twin.direct.told


@pytest.mark.parametrize("compress", ["none", "bf16", "topk:20%"])
def test_a_step_that_is_left_out_leaves_no_trace(io: IoThread, compress: str) -> None:
    """One run meets a step without a finite gradient in the middle, the other never did."""
    left_out, undisturbed = Twin(io, compress=compress), Twin(io, compress=compress)
    left_out.leaves_out = True
    for bad in (False, True, True, False, False):
        for twin in (left_out,) if bad else (left_out, undisturbed):
            twin.optimizer.zero_grad()
            loss = F.cross_entropy(twin.model(twin.x), twin.y)
            if bad:
                # Only the first layer's gradient is bad: what the last one sent early is taken back.
                loss = loss + next(twin.model.parameters()).sum() * float("nan")
            loss.backward()  # type: ignore[no-untyped-call]
            twin.optimizer.step()
    assert left_out.traffic.clock == left_out.steps == undisturbed.steps == 3
    assert len(left_out.left) == 2 and "0.weight is not finite at step 1 of w0" in left_out.left[0]
    for ours, others in zip(left_out.model.parameters(), undisturbed.model.parameters(), strict=True):
        torch.testing.assert_close(
            ours, others, rtol=1e-6, atol=1e-7
        )  # residuals are restored up to rounding
        assert ours.grad is not None and others.grad is not None


def test_a_closure_is_refused(io: IoThread) -> None:
    twin = Twin(io)
    with pytest.raises(ZmlError, match="closure") as refused:
        twin.optimizer.step(lambda: 0.0)
    assert refused.value.code == "ZML-E503"


def test_what_ends_the_exchange_ends_the_step(io: IoThread) -> None:
    twin = Twin(io)
    twin.direct.broken = "p0 is gone"
    twin.backward(twin.model)
    with pytest.raises(ZmlError, match="p0 is gone"):
        twin.optimizer.step()


def test_bf16_carries_what_it_drops_into_the_next_step(io: IoThread) -> None:
    twin = Twin(io, compress="bf16", momentum=0.0)
    for _ in range(60):
        for model, optimizer in twin.both():
            optimizer.zero_grad()
            twin.backward(model)
            optimizer.step()
    assert not twin.equal()
    for ours, plain in zip(twin.model.parameters(), twin.plain.parameters(), strict=True):
        assert torch.allclose(ours, plain, atol=2e-2), "error feedback keeps the two together"


async def nothing() -> None:
    """Whatever was posted before has happened once this has run."""
