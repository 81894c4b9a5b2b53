"""`zml coordinator --cluster FOLDER`: the process around the coordinator of many jobs.

    FOLDER/state/          the journal: who submitted what, and what was decided
    FOLDER/jobs/j7/2/      the run directory of the second attempt of job j7, as `zml run` makes them
    FOLDER/archives/       code that was sent
    FOLDER/cluster.json    where it listens, while it does

Started again on the same folder it goes on, at the same addresses: jobs train on meanwhile. On SIGUSR1 it writes to its
log how it goes: how many jobs and attempts there are, and how long rounds take (`bench/jobs.py` asks so).
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import structlog

from ..coordinator.coordinating import keep_synced, where
from ..dashboard.mounting import of_hub
from ..journal import Journal
from ..lease import COORDINATOR
from ..link import LISTENER, control_endpoint
from ..metrics.endpoint import reached_at
from ..metrics.lag import Lag
from ..metrics.roles import HubSource
from ..runs import rundir
from ..scheduler.cluster.plan import Quota
from ..scheduler.cluster.policies import POLICIES
from ..scheduler.cluster.retention import Keep
from ..scheduler.cluster.rules import Rules
from ..scheduler.explain import counted
from ..tracing import process as tracing
from ..transport import Endpoint, Handler
from . import tables
from .desk import JobDesk
from .hub import Hub
from .pool import Pool, PoolConfig, provider_of
from .retention import Retention
from .wire import Vocabulary

if TYPE_CHECKING:
    from ..config import Settings

HERE = "cluster.json"
STATE = "state"
# Threads that read thousands of journals make many short system calls: after each, a thread waits for Python's lock, by
# default 5 ms.
SWITCH_S = 0.0005
MOST_PEERS = 50_000  # nodes and members of all jobs, if the system lets this process have as many files
# A thousand attempts are 300,000 objects, and to look through all of them for garbage takes up to half a second, in
# which nobody is heard: that is done when some two million have been made that are still there, and small steps before.
COLLECT = (5_000, 4, 100)

log = structlog.get_logger()


class Listening(msgspec.Struct, frozen=True):
    """cluster.json."""

    addresses: list[str]
    http: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a cluster is served."""

    policy: str
    http: str  # HOST:PORT
    tokens: str | None = None  # a file: who may come in by HTTP from beyond this machine
    quotas: dict[str, Quota]
    shares: dict[str, float]
    pool: PoolConfig | None
    keep: Keep


def listening(folder: Path) -> Listening | None:
    """Where the coordinator of this folder listens, or did last."""
    try:
        return msgspec.json.decode((folder / HERE).read_bytes(), type=Listening)
    except (OSError, msgspec.MsgspecError):
        return None


def serve(settings: Settings, folder: Path, plan: Plan, say: Callable[[str], None]) -> int:
    """Serve a cluster until told to stop; jobs stay where they are. `say` is for people. Raises ZmlError."""
    import uvloop

    tracing.begin(settings.trace, "coordinator", COORDINATOR)
    sys.setswitchinterval(SWITCH_S)
    try:
        return uvloop.run(_serve(settings, folder, plan, say))
    finally:
        tracing.end()


async def _serve(settings: Settings, folder: Path, plan: Plan, say: Callable[[str], None]) -> int:
    from ..metrics.mount import mounted
    from ..web.server import serve as serve_http

    more_files()
    gc.set_threshold(*COLLECT)
    before = listening(folder)
    journal = Journal(folder / STATE, flag="--cluster")
    bind = where(settings.bind, before.addresses if before is not None else ())

    def endpoint(handler: Handler) -> Endpoint:
        return control_endpoint(
            settings,
            COORDINATOR,
            handler,
            keys=(LISTENER,),
            bind=bind,
            vocabulary=Vocabulary,
            peers=MOST_PEERS,
        )

    try:
        hub = Hub(
            folder,
            settings,
            Rules(drain_s=settings.drain_s),
            POLICIES[plan.policy],
            endpoint,
            journal,
            quotas=plan.quotas,
            shares=plan.shares,
        )
    except BaseException:
        journal.close()
        raise
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    asyncio.get_running_loop().add_signal_handler(
        signal.SIGUSR1, lambda: log.info("figures", **hub.figures())
    )
    syncing = asyncio.ensure_future(keep_synced(journal))
    server = pool = pooling = keeping = None
    lag = Lag()
    try:
        await hub.start()
        source = HubSource(hub, lag, plan.http)
        where_http = same_port(plan.http, before)
        desk = JobDesk(hub)
        mounts = [mounted(source), of_hub(desk, folder)]
        server = await serve_http(desk, where_http, tokens=plan.tokens, mounts=mounts, pool=hub.of_fleet)
        source.url = reached_at(server.url, [*hub.endpoint.addresses, *bind])
        lag.start()
        keeping = asyncio.ensure_future(Retention(hub, plan.keep).run())
        here = Listening(list(hub.endpoint.addresses), server.url, os.getpid())
        rundir.write(folder / HERE, msgspec.json.encode(here))
        going_on = len(hub.machine.cluster.jobs)
        say(f"serving {folder}" + (f", where {counted(going_on, 'job')} go on" if going_on else ""))
        say(f"  nodes:  zml node --coordinator {here.addresses[0]}")
        say(f"  people: zml submit, zml jobs, zml nodes --server {here.http}")
        log.info("serving", folder=str(folder), addresses=here.addresses, http=here.http, policy=plan.policy)
        if plan.pool is not None:
            name = pool_name(folder, hub.mark)
            provider = provider_of(plan.pool, here.addresses, settings.keys, name)
            pool = Pool(hub, plan.pool, provider)
            pooling = asyncio.ensure_future(pool.run())
        await stopping.wait()
        say("stopping: jobs train on, and find whoever serves this folder next")
        if plan.pool is not None and plan.pool.backend == "local":
            say("  but what runs on nodes of the local pool ends with them, and goes on from its checkpoint")
        log.info("stopping", because="a signal; jobs go on, and find the next coordinator of this folder")
        return 0
    finally:
        lag.stop()
        # From the last to the first; what fails keeps none of the others from its turn.
        async with AsyncExitStack() as ends:
            ends.push_async_callback(hub.close)
            if pool is not None:
                ends.push_async_callback(pool.close)
            for task in filter(None, (pooling, keeping, syncing)):
                ends.push_async_callback(ended, task)
            if server is not None:
                ends.push_async_callback(server.stop)


async def ended(task: asyncio.Future[Any]) -> None:
    task.cancel()
    await asyncio.wait({task})


def pool_name(folder: Path, mark: str) -> str:
    """What the allocations of this cluster's pool are called: no other cluster's, be its folder called as it may."""
    own = Path(mark).name if mark else hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return f"zml-{re.sub(r'[^A-Za-z0-9._-]', '_', folder.name)}-{own}"


def same_port(wanted: str, before: Listening | None) -> str:
    """Where the system chose a port before, that one: people have it in their shells."""
    host, _, port = wanted.rpartition(":")
    if port == "0" and before is not None:
        return f"{host}:{before.http.rpartition(':')[2]}"
    return wanted


def more_files() -> None:
    """Each attempt has a few files open: as many as the system lets this process have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What users.toml says of a user: the most that all his jobs may hold together, and his share."""

    gpus: Annotated[int, msgspec.Meta(ge=0)] | None = None
    cpus: Annotated[int, msgspec.Meta(ge=0)] | None = None
    workers: Annotated[int, msgspec.Meta(ge=0)] | None = None
    share: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 1.0


def read_users(path: Path | None) -> tuple[dict[str, Quota], dict[str, float]]:
    """Quotas and shares. Raises ZmlError."""
    if path is None:
        return {}, {}
    fix = "Each user is a table: [ada] gpus = 8, cpus, workers, share = 2.0."
    rules = {
        user: tables.convert(table, Rule, f"{path}: [{user}]", fix)
        for user, table in tables.read(path, fix).items()
    }
    quotas = {
        user: Quota(gpus=rule.gpus, cpus=rule.cpus, workers=rule.workers) for user, rule in rules.items()
    }
    return quotas, {user: rule.share for user, rule in rules.items()}
