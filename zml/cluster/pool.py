"""Nodes that come when jobs need them and go when they do not: `zml coordinator --cluster FOLDER --pool pool.toml`.

    backend = "slurm"           # or "local": processes of this machine
    most = 8                    # nodes, and least = 0
    cpus = 4                    # of each, and gpus, memory_mb
    cost_per_hour = 0.9
    budget_per_hour = 6.0
    idle_s = 300                # so long too many, and some go
    [options]                   # of sbatch: partition, time, account, ...
    partition = "gpu"           # README, under Many jobs, has all keys

How many there should be, `scheduler.cluster.autoscale` says. Rule: a node that is to go is told so, and lets what
it runs leave in order; only what still waits for its machine is taken back.
"""

from __future__ import annotations

import asyncio
import sys
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import structlog

from ..errors import USAGE, ZmlError
from ..scheduler.cluster import events
from ..scheduler.cluster.autoscale import Bounds, Watch, decide, reach_of
from ..scheduler.cluster.reach import Fleet
from ..scheduler.cluster.resources import Node, NodeId, Resources
from ..scheduler.cluster.view import view_of
from ..slurm.processes import LocalProvider
from ..slurm.provider import Provider, SlurmProvider
from ..slurm.shape import Needs
from ..slurm.table import State
from .nodes import POOLED

if TYPE_CHECKING:
    from .hub import Hub

LOOK_S = {"local": 2.0, "slurm": 10.0}  # one squeue locks the controller

log = structlog.get_logger()


Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
Amount = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


class PoolConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """pool.toml."""

    backend: Literal["local", "slurm"]
    most: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    least: Amount = 0
    cpus: Count = 1
    gpus: Amount = 0
    memory_mb: Count = 4096
    rack: str = ""
    low: float = 0.35
    high: float = 0.65
    idle_s: Annotated[float, msgspec.Meta(ge=0)] = 300.0
    cost_per_hour: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    budget_per_hour: Annotated[float, msgspec.Meta(gt=0)] | None = None
    options: dict[str, str | int] = {}  # of sbatch
    setup: list[str] = []  # lines of the batch script before the node begins: modules, environments

    def bounds(self) -> Bounds:
        """Raises ValueError, also where a key would have no effect: whoever writes it counts on it."""
        if self.backend != "slurm" and (self.options or self.setup):
            raise ValueError('options and setup are of sbatch; with them comes backend = "slurm"')
        cost, budget = self.cost_per_hour, self.budget_per_hour
        if not (isfinite(cost) and isfinite(self.idle_s) and isfinite(budget or 0.0)):
            raise ValueError("idle_s, cost_per_hour and budget_per_hour must be finite")
        if budget is not None and not cost:
            raise ValueError("budget_per_hour bounds nothing without cost_per_hour, what one node costs")
        if budget is not None and self.least * cost > budget:
            raise ValueError(f"least = {self.least} costs more than budget_per_hour = {budget:g} pays for")
        return Bounds(
            least=self.least,
            most=self.most,
            low=self.low,
            high=self.high,
            idle_s=self.idle_s,
            budget_per_hour=self.budget_per_hour,
        )


def read_pool(path: Path) -> PoolConfig:
    """Raises ZmlError."""
    try:
        config = msgspec.toml.decode(path.read_bytes(), type=PoolConfig)
        config.bounds()
        return config
    except OSError as error:
        raise ZmlError(USAGE, f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.MsgspecError, ValueError) as bad:
        raise ZmlError(USAGE, f"{path}: {bad}", "README, under Many jobs, has its keys.") from None


def provider_of(config: PoolConfig, addresses: list[str], keys: str, name: str) -> Provider:
    """Where nodes come from. Each allocation runs `zml node`."""
    at = [part for address in addresses for part in ("--coordinator", address)]
    offers = ["--cpus", str(config.cpus), "--gpus", str(config.gpus), "--memory-mb", str(config.memory_mb)]
    more = (["--keys", keys] if keys else []) + (["--rack", config.rack] if config.rack else [])
    cost = ["--cost-per-hour", str(config.cost_per_hour)] if config.cost_per_hour else []
    program = [sys.executable, "-P", "-m", "zml"]
    command = [*program, "node", "--pool", *at, *offers, *more, *cost]
    if config.backend == "local":
        return LocalProvider(command)
    needs = Needs(cpus=config.cpus, memory_mb=config.memory_mb, gpus=config.gpus)
    options = [(key, str(value)) for key, value in config.options.items()]
    return SlurmProvider(name, command, needs, options=options, setup=config.setup, requeue=False)


class Pool:
    """One kind of node. `run` until cancelled; then `close`."""

    def __init__(self, hub: Hub, config: PoolConfig, provider: Provider) -> None:
        self.hub = hub
        self.config = config
        self.provider = provider
        self.bounds = config.bounds()
        offers = Resources(cpus=config.cpus, gpus=config.gpus, memory_mb=config.memory_mb)
        self.kind = Node(id=NodeId(POOLED), offers=offers, cost_per_hour=config.cost_per_hour)
        self.watch = Watch()
        self.said = ""

    async def run(self) -> None:
        while True:
            try:
                await self.look()
            except ZmlError as error:
                log.warning("pool cannot look", because=str(error))
            except Exception:  # a mistake of ours is not to end the pool without a word
                log.exception("pool cannot look")
            await asyncio.sleep(LOOK_S[self.config.backend])

    async def look(self) -> None:
        """Compare what there is with what there should be, and bring them together."""
        allocations = await asyncio.to_thread(self.provider.look)
        for each in allocations:
            if each.state.over:
                if each.state is State.FAILED:
                    log.warning("allocation failed", id=each.id, because=each.because)
                self.provider.forget(each.id)
        alive = [each for each in allocations if not each.state.over]
        nodes = self.hub.machine.cluster.nodes
        here = [name for name, present in nodes.items() if name.startswith(POOLED)]
        staying = [name for name in here if not nodes[name].node.leaving]
        going = [name for name in here if nodes[name].node.leaving]
        for name in going:  # again, should a coordinator before this one have died before it had told it
            self.hub.nodes.let_go(name, "it is not needed any more")
        waiting = [each.id for each in alive if each.state is not State.RUNNING]
        # What runs and is not here yet, or was asked for by a coordinator before this one.
        coming = max(0, len(alive) - len(waiting) - len(here))
        count = len(staying) + len(waiting) + coming

        hub = self.hub
        profiles = hub.profiles.of(hub.machine.cluster, hub.docket.now)
        view = view_of(hub.machine.cluster, hub.docket.now, hub.quotas, hub.shares, profiles)
        others = [present.node for name, present in nodes.items() if not name.startswith(POOLED)]
        reach = reach_of(self.kind, self.bounds, others)
        decision = decide(view, count, reach, self.bounds, self.watch)
        self.watch = decision.watch
        if decision.nodes != count and decision.because != self.said:
            log.info("pool", nodes=count, wanted=decision.nodes, because=decision.because)
        self.said = decision.because
        room = self.bounds.most - len(going) - count  # those that go exist, and cost
        more = max(0, min(decision.nodes - count, room))
        awaited = max(0, min(decision.nodes, count) - len(staying))
        hub.fleet = Fleet(reach, decision.because, awaited)
        if more:
            await asyncio.to_thread(self.provider.ask, more)
            hub.fleet = Fleet(reach, decision.because, awaited + more)
        elif decision.nodes < count:
            await self._fewer(count - decision.nodes, waiting, staying, decision.because)

    async def _fewer(self, count: int, waiting: list[str], staying: list[NodeId], because: str) -> None:
        """First what still waits for its machine, then the nodes on which least is running."""
        for id in waiting[:count]:
            await asyncio.to_thread(self.provider.release, id)
        left = count - len(waiting[:count])
        taken = self.hub.machine.cluster.taken()
        here = [name for name in staying if name in taken]
        for name in sorted(here, key=lambda name: (taken[name].gpus, taken[name].cpus, name))[:left]:
            self.hub.dispatch(events.NodeLeaving(name, because))
            self.hub.nodes.let_go(name, because)

    def close(self) -> None:
        """Nodes of this machine end with it; those of Slurm wait for the next coordinator of the folder."""
        if isinstance(self.provider, LocalProvider):
            self.provider.close()
