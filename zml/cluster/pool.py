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
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar

import msgspec
import structlog

from ..errors import USAGE, ZmlError
from ..scheduler.cluster import events
from ..scheduler.cluster.autoscale import Bounds, Watch, decide, pays_for, reach_of
from ..scheduler.cluster.fewest import idlest
from ..scheduler.cluster.reach import Fleet
from ..scheduler.cluster.resources import Node, NodeId, Resources
from ..scheduler.cluster.view import view_of
from ..scheduler.explain import counted
from ..slurm.processes import ID, LocalProvider
from ..slurm.provider import Provider, SlurmProvider
from ..slurm.shape import Needs
from ..slurm.table import Allocation, State
from . import tables
from .inventory import Trouble, allocation_of, inventory, is_over, worse
from .nodes import POOLED

if TYPE_CHECKING:
    from .hub import Hub

LOOK_S = {"local": 2.0, "slurm": 10.0}  # one squeue locks the controller
CLOSE_S = 10.0  # for what goes on in a thread

P = ParamSpec("P")
T = TypeVar("T")

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
        if budget is not None and self.least > pays_for(budget, cost):
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
    fix = "README, under Many jobs, has its keys."
    config = tables.convert(tables.read(path, fix), PoolConfig, str(path), fix)
    try:
        config.bounds()
    except ValueError as bad:
        raise ZmlError(USAGE, f"{path}: {bad}", fix) from None
    return config


def provider_of(config: PoolConfig, addresses: list[str], keys: str, name: str) -> Provider:
    """Where nodes come from. Each allocation runs `zml node`."""
    at = [part for address in addresses for part in ("--coordinator", address)]
    offers = ["--cpus", str(config.cpus), "--gpus", str(config.gpus), "--memory-mb", str(config.memory_mb)]
    more = (["--keys", keys] if keys else []) + (["--rack", config.rack] if config.rack else [])
    cost = ["--cost-per-hour", str(config.cost_per_hour)] if config.cost_per_hour else []
    program = [sys.executable, "-P", "-m", "zml"]
    command = [*program, "node", "--pool", *at, *offers, *more, *cost]
    if config.backend == "local":
        return LocalProvider([*command, "--name", f"{POOLED}{ID}"])
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
        self.look_s = LOOK_S[config.backend]
        self.watch = Watch()
        self.said = ""
        self.told: set[str] = set()  # allocations whose nodes were on their way out
        self.stuck: set[str] = set()  # allocations that were seen to be
        self.came: dict[NodeId, float] = {}  # when the nodes that are here were seen first
        self.trouble: Trouble | None = None
        self.working: asyncio.Future[Any] | None = None  # what goes on in a thread, or did last

    async def run(self) -> None:
        while True:
            try:
                await self.look()
            except ZmlError as error:
                log.warning("pool cannot look", because=str(error))
            except Exception:  # a mistake of ours is not to end the pool without a word
                log.exception("pool cannot look")
            await asyncio.sleep(self.look_s)

    async def look(self) -> None:
        """Compare what there is with what there should be, and bring them together."""
        allocations = await self._in_thread(self.provider.look)
        now = asyncio.get_running_loop().time()
        nodes = self.hub.machine.cluster.nodes
        here = {name: each.node.leaving for name, each in nodes.items() if name.startswith(POOLED)}
        for name, leaves in here.items():
            if leaves:  # again, should a coordinator before this one have died before it had told it
                self.hub.nodes.let_go(name, "it is not needed any more")
        alive = self._alive(allocations, here, now)
        there = inventory(alive, here, self.told)
        self._note(there.stuck, here, now)

        hub = self.hub
        profiles = hub.profiles.of(hub.machine.cluster, hub.docket.now)
        view = view_of(hub.machine.cluster, hub.docket.now, hub.quotas, hub.shares, profiles, of_nodes=True)
        others = [present.node for name, present in nodes.items() if not name.startswith(POOLED)]
        reach = reach_of(self.kind, self.bounds, others)
        # In a thread, as a round is planned in one: a thousand jobs take a while.
        decision = await self._in_thread(decide, view, there.count, reach, self.bounds, self.watch)
        self.watch = decision.watch
        count, wanted, because = there.count, decision.nodes, decision.because
        if wanted != count and because != self.said:
            log.info("pool", nodes=count, wanted=wanted, because=because)
        self.said = because
        more = 0
        if wanted > count:
            more = max(0, min(wanted - count, reach.most - there.going - count))  # who goes exists, and costs
            if more < wanted - count and there.going:
                because = (
                    f"{because}; {counted(there.going, 'node')} on the way out count until they are gone"
                )
            if self.trouble is not None and now < self.trouble.until:
                more = 0
        if wanted <= count or more:
            await self._release([each.id for each in there.stuck])
        if more:
            more = await self._ask(more, now)
        awaited = max(0, min(wanted, count) - len(there.staying)) + more
        hub.fleet = Fleet(reach, because, awaited, self.trouble.said(now) if self.trouble is not None else "")
        if wanted < count:  # first what still waits for its machine, then the nodes on which least is running
            await self._release(there.waiting[: count - wanted])
            left = max(0, count - wanted - len(there.waiting))
            self._let_go(idlest(view, there.staying)[:left], because)

    def _alive(
        self, allocations: Sequence[Allocation], here: Mapping[NodeId, bool], now: float
    ) -> list[Allocation]:
        """Those that are not over. Of the others nothing more is heard."""
        failed = [each for each in allocations if each.state is State.FAILED]
        for each in failed:
            log.warning("allocation failed", id=each.id, because=each.because)
        if failed:
            because = failed[-1].because or "it does not say why"
            self._worse(now, f"{counted(len(failed), 'node')} that came or was to come failed: {because}")
        alive = []
        for each in allocations:
            if each.state.over:
                self.provider.forget(each.id)
            else:
                alive.append(each)
        ids = {each.id for each in alive}
        self.told |= {allocation_of(name, ids) for name, leaves in here.items() if leaves}
        self.told &= ids
        return alive

    def _note(self, stuck: Sequence[Allocation], here: Iterable[NodeId], now: float) -> None:
        """What is new about trouble: more of it, or that it is over."""
        fresh = [each for each in stuck if each.id not in self.stuck]
        for each in fresh:
            log.warning("allocation is stuck", id=each.id, because=each.because)
        self.stuck = {each.id for each in stuck}
        if fresh:
            self._worse(now, f"{counted(len(stuck), 'node')} cannot come: {fresh[-1].because or 'held'}")
        self.came = {name: self.came.get(name, now) for name in here}
        if self.trouble is not None and is_over(self.trouble, self.came, now):
            self.trouble = None

    def _worse(self, now: float, because: str) -> None:
        before, self.trouble = self.trouble, worse(self.trouble, now, because, self.look_s)
        if before is None or before.until != self.trouble.until:
            log.warning("no more nodes for now", because=because, pause_s=self.trouble.until - now)

    async def _ask(self, count: int, now: float) -> int:
        """How many are asked for now."""
        try:
            return len(await self._in_thread(self.provider.ask, count))
        except ZmlError as error:
            self._worse(now, f"none can be asked for: {error.what}")
            return 0

    async def _release(self, ids: Sequence[str]) -> None:
        for id in ids:
            await self._in_thread(self.provider.release, id)

    def _let_go(self, names: Iterable[NodeId], because: str) -> None:
        for name in names:
            if name in self.hub.machine.cluster.nodes:
                self.hub.dispatch(events.NodeLeaving(name, because))
                self.hub.nodes.let_go(name, because)

    async def _in_thread(self, work: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
        """It goes on if whoever waits for it is cancelled; `close` waits for that."""
        working = asyncio.ensure_future(asyncio.to_thread(work, *given, **named))
        self.working = working
        return await asyncio.shield(working)

    async def close(self) -> None:
        """Nodes of this machine end with it; those of Slurm wait for the next coordinator of the folder."""
        await asyncio.to_thread(self.provider.close)
        if self.working is not None:
            await asyncio.wait({self.working}, timeout=CLOSE_S)
            if self.working.done() and (mistake := self.working.exception()) is not None:
                log.warning("pool closes", because=str(mistake))
