"""A worker of a chaotic world: an agent and its script, each a process that can die without the other."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from tests.zml.cluster import Script, parameters
from zml.lease import COORDINATOR, Lease
from zml.messages import AnyMessage, Exited, Fenced, Launch, Ok
from zml.transport import Refusal, TransportError

from .processes import Process

if TYPE_CHECKING:
    from .world import World


class Worker(Script):
    """An agent and, in a process of its own, its script. Each life has a name of its own, as processes have."""

    def __init__(self, world: World, name: str, life: int) -> None:
        super().__init__(world, name, world.plan.batches, world.plan.epochs, seed=7 + life)
        self.world = world
        self.life = life
        self.agent = world.network.endpoint(
            f"agent-{name}.{life}", vocabulary=AnyMessage, handler=self.handle
        )
        dice = random.Random(f"{world.network.seed} {name} {life}")
        self.changes = lambda: dice.random() < world.plan.changes
        self.ahead = world.plan.ahead
        self.process = world.process(f"agent-{name}.{life}")
        self.script_process: Process | None = None
        self.order: Launch = Launch("", "", 0)  # none yet
        self.fenced_at: float | None = None
        self.end: list[torch.Tensor] | None = None  # its parameters, once it has come to its end

    def handle(self, peer: str, message: Any, payload: memoryview | None) -> Any:
        if isinstance(message, Launch):
            if getattr(self, "lease", None) is None:
                raise Refusal("early", "this agent has not joined yet")
            if self.task is None or message.incarnation > self.order.incarnation:
                if self.script_process is not None:
                    self.script_process.kill()
                self.script_process = self.world.process(f"{message.member}.{message.incarnation}")
                self.order = message
                self.task = self.script_process.run(self._train(message))
            return Ok()
        lease: Lease | None = getattr(self, "lease", None)  # it may not have joined yet
        if isinstance(message, Fenced) and lease is not None and lease.is_mine(message):
            # An agent ends its script, or is too slow to: then the script finds out by itself.
            self.world.fenced(self)
        return super().handle(peer, message, payload)

    async def _epochs(self) -> None:
        await super()._epochs()
        self.end = parameters(self)
        self.world.trained_at = asyncio.get_running_loop().time()

    def kill(self) -> None:
        """Agent and script, as when their machine goes."""
        self.process.kill()
        if self.script_process is not None:
            self.script_process.kill()

    def kill_script(self) -> None:
        """The agent lives to tell."""
        if self.script_process is not None and self.task is not None and not self.task.done():
            self.script_process.kill()
            self.process.run(self._tell())

    async def _tell(self) -> None:
        order = self.order
        exited = Exited(job=order.job, member=order.member, incarnation=order.incarnation, signal=9)
        with suppress(TransportError):
            await self.agent.request(COORDINATOR, exited, timeout_s=60)
        self.over.set()
