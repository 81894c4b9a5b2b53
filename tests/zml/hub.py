"""The coordinator of many jobs on the in-memory network: the real hub, desk and attempts, in virtual time.

Nodes and members keep the contract of `zml.cluster.node`, of an agent and of a shard: they offer, join, are heard, do
what they are told, and end. They have no processes, and nothing is trained.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from zml.cluster.desk import JobDesk
from zml.cluster.hub import Hub
from zml.cluster.jobs import JobView, Submission
from zml.cluster.wire import (
    Ceased,
    Goodbye,
    LetGo,
    NodeBeat,
    NodePulse,
    Offer,
    Offered,
    Quit,
    Run,
    Runs,
    Strange,
    Vocabulary,
)
from zml.config import Settings
from zml.journal import Journal
from zml.lease import COORDINATOR, Lease, ask
from zml.messages import (
    Exited,
    Fenced,
    JobSpec,
    Join,
    Joined,
    Launch,
    Leave,
    Message,
    Ok,
    Pulse,
    Settle,
    Stands,
    Stop,
)
from zml.scheduler.cluster.plan import Policy
from zml.scheduler.cluster.policies import POLICIES
from zml.scheduler.cluster.rules import Rules
from zml.transport import Refusal, TransportError
from zml.transport.memory import MemoryEndpoint, MemoryNetwork

ADDRESS = "tcp://127.0.0.1:7077"
RULES = Rules(lease_s=5, start_s=60, drain_s=30, stop_s=10, retry_s=2)
ASK_S = 600.0


class FakeMember:
    """A worker whose script runs for `script_s`, or a shard."""

    def __init__(self, node: FakeNode, job: str, slot: str) -> None:
        self.node, self.job, self.slot = node, job, slot
        self.incarnation = 0
        self.lease: Lease | None = None
        self.ending = ""  # why
        self.launched = self.exited = False
        self.heard = 0
        self.tasks: list[asyncio.Task[None]] = []
        self.endpoint = node.cluster.network.endpoint(
            f"{slot}-of-{job}-on-{node.name}", vocabulary=Vocabulary, handler=self.handle
        )
        self.start(self.live())

    def start(self, what: Any) -> None:
        self.tasks.append(asyncio.ensure_future(what))

    async def live(self) -> None:
        await self.endpoint.start()
        await self.endpoint.connect(COORDINATOR, [ADDRESS], timeout_s=ASK_S)
        role: Any = "shard" if self.slot[0] == "p" else "worker"
        says = self.node.cluster.metrics.get(self.slot, "")
        wish = Join(
            job=self.job,
            role=role,
            member=self.slot,
            node=self.node.name,
            pid=1,
            addresses=[ADDRESS],
            metrics=says,
        )
        answer = (await ask(self.endpoint, wish, within_s=ASK_S)).message
        assert isinstance(answer, Joined)
        self.incarnation = answer.incarnation
        self.lease = Lease(self.endpoint, answer, JobSpec(), ASK_S)
        await self.lease.keep()

    def handle(self, peer: str, message: Any, payload: memoryview | None) -> Message | None:
        match message:
            case Pulse():
                self.heard += 1
                if self.lease is not None:
                    self.lease.heard(message)
                return None
            case Fenced() if self.lease is not None and self.lease.is_mine(message):
                if not self.exited:  # else it is over because it has told so
                    self.end()
                return None
            case Launch():
                if not self.incarnation:
                    raise Refusal("early", "not yet")
                if not self.launched:
                    self.launched = True
                    self.node.launched += 1
                    self.start(self.script())
            case Stop():
                if not self.ending:
                    self.ending = message.because
                    self.start(self.leave(message.because))
            case Settle():
                return Stands(-1)
        return Ok()

    async def script(self) -> None:
        await asyncio.sleep(self.node.cluster.script_s)
        self.exited = True
        code = self.node.cluster.codes.get(self.job, 0)
        exited = Exited(job=self.job, member=self.slot, incarnation=self.incarnation, code=code)
        await ask(self.endpoint, exited, within_s=ASK_S)

    async def leave(self, because: str) -> None:
        try:
            goodbye = Leave(self.job, self.slot, self.incarnation, because)
            await ask(self.endpoint, goodbye, within_s=3.0)
        except TransportError:
            pass  # its job is over, and nobody there to listen
        self.end(done=True)

    def end(self, *, done: bool = False) -> None:
        """Its process is gone, and its node tells."""
        if self.node.members.pop((self.job, self.slot), None) is self:
            self.vanish()
            self.node.tell(Ceased(self.node.name, self.job, self.slot, "it ended", done))

    def vanish(self) -> None:
        self.node.cluster.network.crash(self.endpoint.name)
        for task in self.tasks:
            if task is not asyncio.current_task():
                task.cancel()


class FakeNode:
    """A machine. What runs there can be put there by hand: it is then told to end it."""

    def __init__(self, cluster: FakeCluster, name: str, cpus: int) -> None:
        self.cluster, self.name, self.cpus = cluster, name, cpus
        self.boot = f"boot-of-{name}"
        self.members: dict[tuple[str, str], FakeMember] = {}
        self.strangers: list[tuple[str, str]] = []  # that run, and nobody knows why
        self.runs: list[tuple[str, str]] = []  # every order to run something, with repetitions
        self.quits: list[Quit] = []
        self.launched = 0
        self.offering = False
        self.let_go = 0  # times that it was told to go
        self.gone = False
        self.tasks: list[asyncio.Task[None]] = []
        self.endpoint = cluster.network.endpoint(f"node-{name}", vocabulary=Vocabulary, handler=self.handle)
        self.tasks.append(asyncio.ensure_future(self.live()))

    async def live(self) -> None:
        await self.endpoint.start()
        await self.endpoint.connect(COORDINATOR, [ADDRESS], timeout_s=ASK_S)
        await self.offer()
        while True:
            self.endpoint.notify(COORDINATOR, NodeBeat(self.name, self.boot))
            await asyncio.sleep(1.0)

    async def offer(self) -> None:
        if self.offering:
            return
        self.offering = True
        try:
            here = msgspec.json.encode(Runs([*self.members, *self.strangers]))
            offer = Offer(
                node=self.name, boot=self.boot, cpus=self.cpus, gpus=0, memory_mb=1000, hosts=("10.0.0.7",)
            )
            answer = await self.endpoint.request(COORDINATOR, offer, here, timeout_s=30)
            assert isinstance(answer.message, Offered)
        except TransportError:
            pass  # it will be told again that it is a stranger
        finally:
            self.offering = False

    def handle(self, peer: str, message: Any, payload: memoryview | None) -> Message | None:
        match message:
            case NodePulse():
                return None
            case Strange():
                self.tasks.append(asyncio.ensure_future(self.offer()))
                return None
            case Run():
                self.runs.append((message.job, message.slot))
                if (message.job, message.slot) not in self.members:
                    self.members[message.job, message.slot] = FakeMember(self, message.job, message.slot)
            case LetGo():
                self.let_go += 1
                if self.let_go == 1:
                    self.tasks.append(asyncio.ensure_future(self.leave()))
            case Quit():
                self.quits.append(message)
                if (message.job, message.slot) in self.strangers:
                    self.strangers.remove((message.job, message.slot))
                elif (member := self.members.get((message.job, message.slot))) is not None:
                    member.end()
                else:
                    self.tell(Ceased(self.name, message.job, message.slot, "is not here", False))
        return Ok()

    async def leave(self) -> None:
        """It was told so: as soon as nothing runs here."""
        while self.members:
            await asyncio.sleep(0.1)
        goodbye = Goodbye(self.name, self.boot, True, "let go")
        await self.endpoint.request(COORDINATOR, goodbye, timeout_s=ASK_S)
        self.gone = True
        asyncio.get_running_loop().call_soon(self.die)

    def tell(self, ceased: Ceased) -> None:
        async def telling() -> None:
            await ask(self.endpoint, ceased, within_s=ASK_S)

        self.tasks.append(asyncio.ensure_future(telling()))

    def die(self) -> None:
        """As a machine without power: nobody says anything."""
        for member in self.members.values():
            member.vanish()
        self.members.clear()
        self.cluster.network.crash(self.endpoint.name)
        for task in self.tasks:
            task.cancel()


class FakeCluster:
    """A hub with its desk, and nodes. `script_s`: how long every script takes."""

    def __init__(self, folder: Path, seed: int = 1, *, policy: str = "las", script_s: float = 20.0) -> None:
        self.folder = folder
        self.network = MemoryNetwork(seed)
        self.policy: Policy = POLICIES[policy]
        self.script_s = script_s
        self.codes: dict[str, int] = {}  # attempt -> how its scripts end, if not with 0
        self.nodes: dict[str, FakeNode] = {}
        self.metrics: dict[str, str] = {}  # what members of these names say of where they are scraped

    async def start(self) -> None:
        """The first coordinator, or one that goes on where another was."""

        def endpoint(handler: Any) -> MemoryEndpoint:
            return self.network.endpoint(COORDINATOR, vocabulary=Vocabulary, handler=handler, bind=[ADDRESS])

        self.journal = Journal(self.folder / "state")
        self.hub = Hub(
            self.folder,
            Settings(coordinator=(ADDRESS,)),
            RULES,
            self.policy,
            endpoint,
            self.journal,
            clock=asyncio.get_running_loop().time,
        )
        self.desk = JobDesk(self.hub)
        await self.hub.start()

    async def kill(self) -> None:
        """As kill -9: it says nothing more, and writes nothing more."""
        hub = self.hub
        self.network.crash(COORDINATOR)
        hub.abandoned = True
        hub.vigil.end()
        for timer in (hub.round_timer, hub.greeting):
            if timer is not None:
                timer.cancel()
        for life in hub.attempts.lives.values():
            if life.coordinator is not None:
                life.coordinator.abandon()
        hub.nodes.orders.cancel()
        await hub.attempts.close_all()
        self.journal.close()

    async def close(self) -> None:
        for node in self.nodes.values():
            node.die()
        await self.hub.close()

    def node(self, name: str, cpus: int = 4) -> FakeNode:
        self.nodes[name] = FakeNode(self, name, cpus)
        return self.nodes[name]

    def submit(self, *, key: str = "", user: str = "ada", **more: Any) -> str:
        asked = Submission(script="train.py", folder="/", **more)
        return self.desk.submit(asked, user, key=key).id

    async def running(self, count: int) -> list[str]:
        """So many new jobs, once they run."""
        jobs = [self.submit() for _ in range(count)]
        for job in jobs:
            await self.until_state(job, "RUNNING")
        return jobs

    async def until(self, condition: Callable[[], Any], what: str, within_s: float = 600.0) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + within_s
        while not condition():
            assert loop.time() < end, f"not within {within_s:g} s: {what}; {self.network}"
            await asyncio.sleep(0.05)

    async def until_state(self, job: str, state: str) -> JobView:
        await self.until(lambda: self.desk.job(job).state == state, f"{job} is {state}")
        return self.desk.job(job)
