"""A whole cluster on the in-memory network: the real coordinator, shards, clients and their traffic, in virtual time,
from one seed.

Only what needs processes and threads is left out: agents do not start scripts, they are the script, a coroutine that
does what `hooks` and `member` do in their threads. Where those would wait inside of `traffic`, it waits before.
"""

import asyncio
import queue
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from inspect import isawaitable
from pathlib import Path
from typing import Any, TypeVar

import torch

from zml.agent.seat import Seat
from zml.checkpoint import Checkpoint
from zml.checkpoint.folder import is_seen
from zml.codec import by_name
from zml.config import Settings
from zml.coordinator.coordinator import Coordinator
from zml.doctor.answering import Examinee
from zml.doctor.findings import Check
from zml.doctor.means import Means
from zml.hyper import Hyper, OptimizerSpec, hyper_of
from zml.journal import Journal
from zml.layout import Bucket, Layout, Registration, buckets
from zml.lease import COORDINATOR, Lease, ask, join
from zml.messages import (
    AnyMessage,
    EpochOver,
    Examine,
    Exited,
    Heartbeat,
    JobSpec,
    Keep,
    Kept,
    Launch,
    Moved,
    Ok,
    Pulse,
    Stop,
    Taken,
    Wait,
)
from zml.plan import Plan
from zml.runs.events import EventLog
from zml.scheduler.ids import JobId
from zml.scheduler.machine import Machine
from zml.scheduler.rules import Rules
from zml.shard.ps import Ps
from zml.shard.serving import nobody
from zml.tracing.steps import UNTRACED, Untraced
from zml.transport import BULK, CONTROL, Limits, Refusal, TransportError
from zml.transport.memory import MemoryEndpoint, MemoryNetwork
from zml.worker.binding import Binding
from zml.worker.client import Client, Progress
from zml.worker.traffic import Traffic
from zml.worker.updates import outer_hyper, outer_spec

ADDRESS = "tcp://127.0.0.1:7077"
JOB = "job"
T = TypeVar("T")


def model_of(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Linear(10, 4))


class Script:
    """A worker: agent and script in one. `gradients(rank, clock, parameters)` fills in what backward would."""

    def __init__(self, cluster: "Cluster", name: str, batches: int, epochs: int, seed: int) -> None:
        self.cluster = cluster
        self.name = name
        self.batches = batches
        self.epochs = epochs
        self.model = model_of(seed)
        for parameter in cluster.frozen:
            self.model.get_parameter(parameter).requires_grad_(False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        # (epoch, batch), in the order in which this worker's steps were acknowledged
        self.trained: list[tuple[int, int]] = []
        self.greatest_staleness = 0
        self.keep: Keep | None = None  # the newest
        self.traffic: Traffic
        self.ahead = 0  # it asks for more batches when it has so many left, and goes on meanwhile
        self.changes: Callable[[], bool] = lambda: False  # is a gradient changed after its bucket has left?
        self.trace: Untraced = UNTRACED  # what it tells of its steps
        self.running: asyncio.Task[None] | None = None  # the agent
        self.task: asyncio.Task[None] | None = None  # the script
        self.over = asyncio.Event()
        self.error: BaseException | None = None
        self.lease: Lease | None = None
        self.agent = cluster.network.endpoint(f"agent-{name}", vocabulary=AnyMessage, handler=self.handle)
        self.examinee = cluster.fit(Examinee(self.agent, self.probe))

    @property
    def clock(self) -> int:
        return self.traffic.clock if hasattr(self, "traffic") else 0

    async def run(self) -> None:
        await self.agent.start()
        lease = await join(self.agent, self.cluster.settings, "worker", self.name)
        keeping = asyncio.ensure_future(lease.keep())
        self.lease = lease
        try:
            await self.over.wait()
            await lease.leave("stopped")
        finally:
            keeping.cancel()
        await self.agent.close()

    def probe(self, name: str) -> MemoryEndpoint:
        """To measure a link with. Its name is one that a test can cut off."""
        handler = lambda peer, message, payload: None  # noqa: E731
        return self.cluster.network.endpoint(
            f"probe-{self.name}", vocabulary=AnyMessage, handler=handler, limits=BULK
        )

    def handle(self, peer: str, message: Any, payload: memoryview | None) -> Any:
        match message:
            case Examine():
                return self.examinee.answer(message, "")
            case Launch():
                if self.lease is None:
                    raise Refusal("early", "this agent has not joined yet")
                if self.task is None:
                    self.task = asyncio.ensure_future(self._train(message))
                return Ok()
            case Stop():
                self.over.set()
                return Ok()
            case Pulse():
                if self.lease is not None:
                    self.lease.heard(message)
        return None

    async def _train(self, order: Launch) -> None:
        seat = Seat(
            job=JOB,
            worker=order.member,
            incarnation=order.incarnation,
            coordinator=[ADDRESS],
            patience_s=self.cluster.patience_s,
        )
        self.seat = seat
        name = f"{order.member}.{order.incarnation}"
        self.script_name = name
        nothing = lambda peer, message, payload: None  # noqa: E731
        control = self.cluster.network.endpoint(name, vocabulary=AnyMessage, handler=self._told)
        bulk = self.cluster.network.endpoint(name, vocabulary=AnyMessage, handler=nothing, limits=BULK)
        await control.start()
        await bulk.start()
        await control.connect(COORDINATOR, [ADDRESS])
        self.client = Noting(seat, control, bulk)
        self.client.acknowledged = self.trained
        self.client.trace = self.trace
        self.io = Here()
        code = 0
        try:
            await self._epochs()
        except Exception as error:
            self.error = error
            code = 1
        finally:
            self.io.close()
            await bulk.close()
            await control.close()
        exited = Exited(job=JOB, member=order.member, incarnation=order.incarnation, code=code)
        try:
            await ask(self.agent, exited, within_s=60)
        except TransportError:
            if not self.over.is_set():  # an agent that was stopped has nobody to tell
                raise
        self.over.set()

    def _told(self, peer: str, message: Any, payload: memoryview | None) -> None:
        if isinstance(message, Moved):
            self.client.where.moved(message)
        elif isinstance(message, Keep):
            self.keep = message
            if not self.cluster.silent:
                me: dict[str, Any] = {
                    "job": JOB,
                    "member": self.seat.worker,
                    "incarnation": self.seat.incarnation,
                }
                kept = Kept(**me, checkpoint=message.checkpoint, files=[])
                self.cluster.tasks.append(asyncio.ensure_future(self.client.of_checkpoint(kept)))

    async def _epochs(self) -> None:
        """What `member.Member` does, and `data.DividedLoader`."""
        client = self.client
        self.plan = Plan.of(self.cluster.spec)
        here = self.plan.optimizer_on == "worker"
        layout = Layout.of(
            self.model, self.optimizer, chunk_elements=self.cluster.chunk_elements, any_optimizer=here
        )
        spec = outer_spec() if here else OptimizerSpec.of(self.optimizer)
        registration = Registration(layout, spec, bucket_chunks=1)
        shown = await client.register(registration.to_bytes(), registration.digest, len(layout.chunks))
        assert shown is not None, "it was not told to leave meanwhile"
        registered, placement = shown
        cut = buckets(layout, placement, 1)
        codec = by_name(str(self.plan.compression))
        binding = Binding(layout, self.model)
        self.traffic = traffic = Traffic(binding, cut, codec, client, self.io, self.plan, self)  # type: ignore[arg-type]
        traffic.arrived = self.arrivals = Arrivals()
        self.leased, self.on_their_way, self.done = deque[int](), deque[int](), list[int]()
        self.rested_at: int | None = None  # the clock at which it ran out of batches, while it rests
        traffic.clock = await client.enter()
        if registered.initialiser == self.seat.worker:
            for bucket in cut:
                values = torch.empty(sum(layout.chunks[chunk].size for chunk in bucket.chunks))
                at = 0
                for chunk in bucket.chunks:
                    binding.read(chunk, values[at:])
                    at += layout.chunks[chunk].size
                await client.load(bucket, memoryview(values.numpy().tobytes()))
            await client.loaded()
        await self._pull(traffic.clock, everything=True)
        for epoch in range(registered.epoch, self.epochs):
            opened = await client.open_epoch(epoch, self.batches, b"")
            assert opened is not None, "nobody drains"
            if opened[0].opener == self.seat.worker:
                await client.tell_note(epoch, f"{self.name} at epoch {epoch}".encode())
            first = opened[0].first_clock
            if self.rested_at is not None and traffic.clock > first:
                traffic.clock = await client.enter(at_least=self.rested_at)
            await self._rest_until(first)
            self.rested_at = None
            self.next_clock = first + self.batches
            self.epoch, self.taken = epoch, 0
            self.trace.pause()
            while (over := await self._through_what_there_is(epoch)) is None:
                pass
            await self._settle(over, registered.staleness or 0)

    async def _through_what_there_is(self, epoch: int) -> int | None:
        """Until there are no more batches for now, and then until there are again; the epoch's end, if it is over."""
        asked: asyncio.Task[Any] | None = None
        while True:
            if asked is None and len(self.leased) <= self.ahead:
                take = self.client.take(epoch, self.clock, 2, self._take_done(), hold=False)
                asked = self.io.submit(take)
            if asked is not None and (asked.done() or not self.leased):
                reply, asked = await asked, None
                if not isinstance(reply, Taken):
                    break
                self.leased.extend(reply.batches)
            if self.leased:
                await self._step(self.leased.popleft())
        while self.leased:
            await self._step(self.leased.popleft())
        await self._flush()
        rests, wanted = 0, 1
        while True:
            reply = await self.client.take(epoch, self.clock, 2, self._take_done(), hold=rests >= wanted)
            match reply:
                case Taken():
                    if self.rested_at is not None:
                        self.traffic.clock = await self.client.enter(at_least=self.rested_at)
                        await self._pull(self.clock)
                        self.rested_at = None
                    self.leased.extend(reply.batches)
                    return None
                case EpochOver():
                    return reply.next_clock
                case Wait():
                    await self._rest(longer=reply.dealt_again)
                    rests, wanted = rests + 1, 2 if reply.dealt_again else 1
                case other:
                    raise AssertionError(f"nobody drains: {other}")

    def _take_done(self) -> list[int]:
        done, self.done = self.done, []
        return done

    async def _rest(self, *, longer: bool) -> None:
        if self.rested_at is None and self.clock < self.next_clock:
            await self._rest_until(self.next_clock)
        elif self.rested_at is None or longer:
            await self._rest_until(self.clock + self.batches)

    async def _rest_until(self, clock: int) -> None:
        await self._flush()
        if self.clock < clock:
            await self.client.advance(clock)
            self.rested_at = self.clock if self.rested_at is None else self.rested_at
            self.traffic.clock = clock

    async def _settle(self, clock: int, staleness: int) -> None:
        rested_at = self.rested_at
        if rested_at is not None and self.clock > clock:
            self.traffic.clock = await self.client.enter(at_least=rested_at)
        await self._rest_until(clock)
        self.rested_at = rested_at
        await self._pull(clock + staleness)

    # -- a step, as `hooks` and `updates` have it ----------------------------------------------------------------

    async def _step(self, batch: int) -> None:
        self.batch = batch
        compute_s = self.cluster.compute_s(self.name)
        await asyncio.sleep(compute_s / 2)
        generator = torch.Generator().manual_seed(1000 * self.epoch + batch)
        for parameter in self.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.requires_grad:
                parameter.grad = 0.01 * parameter.detach() + 0.01 * noise
        if self.plan.optimizer_on == "worker":
            await asyncio.sleep(compute_s / 2)
            hyper = self._update()
        else:
            hyper = await self._backward(compute_s / 2)
        if self.plan.overlap:
            await self._landed()
        self.traffic.begin(hyper)
        if not self.plan.overlap:
            await self._landed()
        clock = self.clock
        self.traffic.end(self.traffic.replica.restore)
        self.greatest_staleness = max(self.greatest_staleness, self.traffic.staleness)
        self.trace.close(clock, 0, 0)

    async def _backward(self, for_s: float) -> list[Hyper]:
        """Buckets leave as soon as their gradients are complete, and once more where those change afterwards."""
        traffic, binding = self.traffic, self.traffic.binding
        trained = [index for index, p in enumerate(binding.parameters) if p.grad is not None]
        touching = {i: [o for o in traffic.outboxes.values() if i in o.bucket.parameters] for i in trained}
        scaled = [index for index in trained if self.changes()]
        for index in scaled:
            gradient_of(binding, index).mul_(2)
        for index in reversed(trained):
            await asyncio.sleep(for_s / len(trained))
            binding.gather(index, traffic.values)
            for outbox in touching[index]:
                outbox.missing.discard(index)
                if not outbox.missing:
                    traffic.leave(outbox)
        for index in scaled:
            gradient_of(binding, index).mul_(0.5)
            for outbox in touching[index]:
                outbox.take_back()
            binding.gather(index, traffic.values)
        for outbox in traffic.outboxes.values():
            if not outbox.sent:
                traffic.leave(outbox)
        return hyper_of(self.optimizer)

    def _update(self) -> list[Hyper]:
        """The optimizer steps on the model, and what that has changed leaves."""
        traffic = self.traffic
        self.optimizer.step()
        for outbox in reversed(traffic.outboxes.values()):
            for chunk, into in outbox.values.items():
                traffic.binding.difference(chunk, traffic.replica.held(chunk), into)
            traffic.leave(outbox)
        return outer_hyper(self.plan, traffic.density, self.plan.workers, momentum=True, normalised=False)

    async def _landed(self) -> None:
        """What the training thread is about to wait for is here."""
        now = asyncio.get_running_loop().time
        began = now()
        await self.arrivals.landed(self.traffic.due)
        self.trace.phase("wait", began, now())

    async def _flush(self) -> None:
        await self._landed()
        self.traffic.drain()

    async def _pull(self, clock: int, *, everything: bool = False) -> None:
        await self._flush()
        self.traffic.ask(clock, everything=everything)
        await self._landed()
        self.traffic.receive(everything=everything)

    # -- which steps count, as Traffic tells it -------------------------------------------------------------------

    def leaving(self) -> Progress:
        self.taken += 1
        self.on_their_way.append(self.batch)
        self.client.carries[self.clock] = (self.epoch, self.batch)
        return self.epoch, self.taken

    def counted(self) -> None:
        self.done.append(self.on_their_way.popleft())

    leaves_out = False

    def left_out(self, because: str) -> bool:
        return False


def gradient_of(binding: Binding, index: int) -> torch.Tensor:
    gradient = binding.parameters[index].grad
    assert gradient is not None
    return gradient


class Here:
    """An IoThread for who lives in the loop itself: what it is given happens soon, in the same order."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[Any]] = set()

    def post(self, function: Callable[..., object], *args: Any) -> None:
        asyncio.get_running_loop().call_soon(function, *args)

    def post_task(
        self, work: Coroutine[Any, Any, None], ended: Callable[[BaseException | None], None]
    ) -> None:
        self.post(self._start, work, ended)

    def _start(self, work: Coroutine[Any, Any, None], ended: Callable[[BaseException | None], None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self.tasks.discard(task)
            ended(asyncio.CancelledError() if task.cancelled() else task.exception())

        task.add_done_callback(done)

    def submit(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        # A script that fails meanwhile does not ask for it.
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return task

    def close(self) -> None:
        for task in self.tasks:
            task.cancel()


class Arrivals(queue.SimpleQueue[Any]):
    """Where a training thread would wait: here what it is to find is waited for before it looks."""

    def __init__(self) -> None:
        self.came = asyncio.Event()
        self.failed = False

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        super().put(item)
        self.failed |= isinstance(item, BaseException)
        self.came.set()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        return super().get(block=False)

    async def landed(self, due: int) -> None:
        """Until so many are here, or what ended their exchange is."""
        while self.qsize() < due and not self.failed:
            self.came.clear()
            await self.came.wait()


class Noting(Client):
    """Says which steps were acknowledged. `carries`: the epoch and the batch of each clock."""

    def __init__(self, seat: Seat, control: MemoryEndpoint, bulk: MemoryEndpoint) -> None:
        super().__init__(seat, control, bulk)
        self.carries: dict[int, tuple[int, int]] = {}
        self.acknowledged: list[tuple[int, int]] = []

    def commit(
        self, clock: int, hyper: bytes, buckets: Sequence[Bucket], progress: Progress = (-1, 0)
    ) -> Coroutine[Any, Any, None]:
        return self._commit_noted(clock, super().commit(clock, hyper, buckets, progress))

    async def _commit_noted(self, clock: int, commit: Coroutine[Any, Any, None]) -> None:
        await commit
        self.acknowledged.append(self.carries[clock])


class Cluster:
    """Coordinator and shards; workers are added with `script`."""

    def __init__(
        self,
        network: MemoryNetwork,
        spec: JobSpec,
        *,
        compute_s: Callable[[str], float] = lambda name: 0.05,
        lease_s: float = 1.5,
        return_s: float = 60.0,
        folder: Path | None = None,
        resumed: Checkpoint | None = None,
        state: Path | None = None,
        sees: Callable[[Path], bool] = is_seen,
    ) -> None:
        """`folder`: where shards keep their push logs; without one their state dies with them. `state`: where the
        coordinator's journal is, for one that is to die and go on. `sees`: do shards' processes see a folder?"""
        self.folder = folder
        self.sees = sees
        self.patience_s = 600.0
        self.chunk_elements = 64  # three chunks: enough for two shards with several buckets
        self.frozen: tuple[str, ...] = ()  # parameters of every script's model that are not trained
        self.silent = False  # scripts do not answer when they are asked to keep their optimizers' state
        self.resumed = resumed
        self.network = network
        self.spec = spec
        self.compute_s = compute_s
        self.settings = Settings(coordinator=(ADDRESS,), lease_s=lease_s, return_s=return_s, bucket_chunks=1)

        self.state = state
        self.died, self.returned = asyncio.Event(), asyncio.Event()
        self.snapshot_bytes = 1 << 20
        self.make_coordinator()
        self.scripts: dict[str, Script] = {}
        self.shards: dict[int, Ps] = {}  # the newest process of each
        # What comes to a shard from workers; a test may put itself between.
        self.deliver: Callable[..., Any] = lambda ps, peer, message, payload, handler: handler(
            peer, message, payload
        )
        self.shard_endpoints: dict[int, list[MemoryEndpoint]] = {}  # all endpoints of the newest process
        self.lives: Counter[int] = Counter()
        self.shard_tasks: dict[int, asyncio.Task[int]] = {}
        self.tasks: list[asyncio.Task[Any]] = []

    def make_coordinator(self) -> None:
        def listen(handler: Any) -> MemoryEndpoint:
            return self.network.endpoint(
                COORDINATOR, vocabulary=AnyMessage, handler=self.watched(handler), bind=[ADDRESS]
            )

        self.coordinator = Coordinator(
            JobId(JOB),
            self.spec,
            Machine(Rules(lease_s=self.settings.lease_s, return_s=self.settings.return_s or 0)),
            listen,
            EventLog(None),
            heartbeat_s=0.15,
            journal=Journal(self.state, snapshot_bytes=self.snapshot_bytes) if self.state else None,
            resumed=self.resumed,
        )
        self.fit(self.coordinator.examine_desk.examinee)

    def fit(self, examinee: Examinee) -> Examinee:
        """For simulated time, and without a look at this machine."""

        async def look(function: Callable[[], Any]) -> Any:
            return function()

        async def knock(address: str) -> str:
            return f"{address} was knocked at"

        def machine(run_dir: Path) -> list[Check]:
            return [Check("disk", "pass", "as if")]

        clock = asyncio.get_running_loop().time
        examinee.means = Means(clock, knock=knock, look=look, machine=machine)
        return examinee

    def watched(self, handler: Any) -> Any:
        """The coordinator's handler, counted: `after_message` is called after each that is no heartbeat."""

        async def end(reply: Awaitable[Any]) -> Any:
            answer = await reply
            self.after_message()
            return self.unless_dead(answer)

        def handle(peer: str, message: Any, payload: Any) -> Any:
            reply = handler(peer, message, payload)
            if asyncio.iscoroutine(reply):
                return end(reply)
            if not isinstance(message, Heartbeat):
                self.after_message()
            return self.unless_dead(reply)

        return handle

    def unless_dead(self, answer: Any) -> Any:
        if self.died.is_set():
            raise Refusal("dead", "nobody hears this")
        return answer

    def after_message(self) -> None: ...

    def kill_coordinator(self) -> None:
        """As kill -9."""
        self.died.set()
        self.network.crash(COORDINATOR)
        self.coordinator.abandon()
        journal = self.coordinator.docket.journal
        assert journal is not None, "a coordinator without a journal is not to die"
        journal.close()

    async def restart_coordinator(self) -> None:
        self.make_coordinator()
        await self.coordinator.start()
        self.died.clear()
        self.returned.set()
        self.returned = asyncio.Event()

    async def start(self) -> None:
        await self.coordinator.start()
        for index in range(self.spec.shards):
            self.start_shard(index)

    def start_shard(self, index: int) -> None:
        """A process of this shard, the first or the next."""
        self.lives[index] += 1
        task = self.shard_tasks[index] = asyncio.ensure_future(self._shard(index))
        self.tasks.append(task)

    def kill_shard(self, index: int) -> None:
        """As kill -9."""
        ps = self.shards[index]
        self.shard_tasks[index].cancel()
        for endpoint in self.shard_endpoints[index]:
            endpoint.die()
        ps.die()

    async def _shard(self, index: int) -> int:
        process = self.shard_endpoints[index] = []

        async def here(function: Callable[[], Any]) -> Any:
            result = function()
            return await result if isawaitable(result) else result

        def endpoint(name: str, handler: Any, limits: Limits, bind: list[str]) -> MemoryEndpoint:
            made = self.network.endpoint(
                name, vocabulary=AnyMessage, handler=handler, limits=limits, bind=bind
            )
            process.append(made)
            return made

        def control(name: str, handler: Any) -> MemoryEndpoint:
            # Processes have names of their own; here they all live in one.
            return endpoint(f"{name}.{self.lives[index]}", handler, CONTROL, [])

        def state(run_dir: str) -> Path | None:
            return self.folder / f"p{index}" if self.folder is not None else None

        async def listen(name: str, handler: Any) -> MemoryEndpoint:
            made = endpoint(name, self.tapped(ps, name, handler), BULK, ["tcp://127.0.0.1:0"])
            await made.start()
            return made

        def dial(name: str) -> MemoryEndpoint:
            return endpoint(name, nobody, BULK, [])

        ps = Ps(index, self.settings, control, here, state, listen, dial, self.sees)
        self.fit(ps.examinee)
        self.shards[index] = ps
        listener = endpoint(ps.name, self.tapped(ps, ps.name, ps.bulk), BULK, ["tcp://127.0.0.1:0"])
        await listener.start()
        try:
            return await ps.run(list(listener.addresses))
        finally:
            await listener.close()

    def tapped(self, ps: Ps, shard: str, handler: Any) -> Any:
        """A shard's handler, behind what a test has put before it."""

        def handle(peer: str, message: Any, payload: memoryview | None) -> Any:
            return self.deliver(ps, peer, message, payload, handler)

        return handle

    def script(self, name: str, *, batches: int = 12, epochs: int = 2, seed: int = 7) -> Script:
        script = Script(self, name, batches, epochs, seed)
        self.scripts[name] = script
        script.running = asyncio.ensure_future(script.run())
        self.tasks.append(script.running)
        return script

    def kill(self, name: str) -> None:
        """As kill -9 of an agent and its script."""
        script = self.scripts[name]
        self.network.crash(f"agent-{name}")
        assert script.running is not None
        script.running.cancel()
        if script.task is not None:
            script.task.cancel()
            self.network.crash(script.script_name)

    def home(self, shard: str) -> Ps | None:
        """The process in which a shard lives; None while nobody serves it."""
        if not self.coordinator.homes.serves(shard):
            return None
        return self.shards[int(self.coordinator.homes.host(shard)[1:])]

    def backed_up(self, shard: str) -> bool:
        """Would its backup be promoted?"""
        job = self.coordinator.machine.jobs.get(JobId(JOB))
        return job is not None and shard in job.backups

    async def until(self, condition: Callable[[], object]) -> None:
        """Let virtual time pass until something holds; the job must not end before."""
        while not condition():
            assert self.coordinator.finished is not None and not self.coordinator.finished.done(), (
                "it is over"
            )
            await asyncio.sleep(0.01)

    async def finish(self) -> int:
        """Until the job is over; the exit code."""
        code = await self._code()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.coordinator.close()
        return code

    async def _code(self) -> int:
        """From the coordinator, or from another that takes its place."""
        while True:
            running = asyncio.ensure_future(self.coordinator.run())
            died = asyncio.ensure_future(self.died.wait())
            await asyncio.wait({running, died}, return_when=asyncio.FIRST_COMPLETED)
            died.cancel()
            if running.done() and not self.died.is_set():
                return running.result()
            running.cancel()
            if self.died.is_set():
                await self.returned.wait()


def parameters(script: Script) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in script.model.parameters()]


Run = Callable[[Cluster], Awaitable[None]]
