"""The four roles, as `mount` looks at them: each hands out a snapshot of what its process has in memory already.

A shard's numbers are those of its last gauge, at most a second old: its own thread is never asked, so that a scrape
waits for no optimizer, and a stuck one shows by what does not grow.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog

from ..address import host_of, is_loopback
from ..config import Settings
from ..scheduler import explain
from ..scheduler.cluster.state import Standing
from ..scheduler.state import Draining, Finishing, Forming
from . import catalog, sources
from .catalog import Role
from .lag import Lag
from .points import Point, Target
from .process import of_process

if TYPE_CHECKING:
    from ..agent.agent import Agent
    from ..cluster.hub import Hub
    from ..cluster.nodes import Reached
    from ..coordinator.coordinator import Coordinator
    from ..shard.ps import Ps

UNNAMED = Settings().job
HERE = ("joined", "active")  # states of members that can be scraped
SINGLE = (catalog.HEARD.name, catalog.LIVES.name)  # of each member
MOST_SAID = 10_000  # members of which it is said that they are not scraped
AT_ONCE = 10  # jobs of which the status is made before others have a turn
MANY = (
    100  # jobs, beyond which their members are not shown one by one: a thousand jobs are some 20,000 series
)

log = structlog.get_logger()


class WorkerSource:
    """An agent, which shows what its script takes. Its counters go on where those of a former script ended."""

    role: Role = "worker"

    def __init__(self, agent: Agent, lag: Lag) -> None:
        self.agent = agent
        self.lag = lag

    async def points(self) -> Sequence[Point]:
        told = self.agent.figures
        found = [*of_process(self.lag, told.memory_bytes, told.cpu_s, told.open_files)]
        if self.agent.name:
            found += sources.of_worker(self.agent.name, told, max(0, self.agent.scripts - 1))
        return found

    def checks(self) -> Mapping[str, str]:
        agent = self.agent
        child = agent.child
        runs = child is not None and child.runs
        return {
            "joined": "" if agent.lease is not None else "it has not joined",
            "script": "" if runs else "its script does not run",
            "parameters": ""
            if child is not None and child.figures is not None
            else "its script is not in the job yet",
            "staying": (agent.leaving or agent.stopping) and f"it leaves: {agent.leaving or agent.stopping}",
        }

    def targets(self) -> None:
        return None


class ShardSource:
    """A process of shards; copies that it keeps of others count where those are served."""

    role: Role = "shard"

    def __init__(self, ps: Ps, lag: Lag) -> None:
        self.ps = ps
        self.lag = lag

    async def points(self) -> Sequence[Point]:
        told = self.ps.figures.items()
        return [
            *of_process(self.lag),
            *(point for shard, figures in told for point in sources.of_shard(shard, figures)),
        ]

    def checks(self) -> Mapping[str, str]:
        ps = self.ps
        checks = {"joined": "" if ps.lease is not None else "it has not joined"}
        for shard in ps.homes:
            core = ps.cores.get(shard)
            if core is None:
                checks[shard] = f"{shard} reads its log"
            elif core.store is None or not core.store.ready:
                checks[shard] = f"{shard} has no parameters yet"
            else:
                checks[shard] = ""
        leaves = ps.vacating is not None or ps.leaving is not None
        return {**checks, "staying": "it leaves" if leaves else ""}

    def targets(self) -> None:
        return None


class CoordinatorSource:
    """The coordinator of one job. `url` is where it is scraped itself.

    A job that nobody has named is shown by the name of its run: of all that are called "job", two would look like one.
    """

    role: Role = "coordinator"

    def __init__(self, coordinator: Coordinator, lag: Lag, url: str) -> None:
        self.coordinator = coordinator
        self.lag = lag
        self.url = url
        self.unseen = Unseen()
        named = coordinator.job != UNNAMED or not coordinator.run_dir
        self.name = str(coordinator.job) if named else Path(coordinator.run_dir).name

    async def points(self) -> Sequence[Point]:
        status = msgspec.structs.replace(self.coordinator.status(), job=self.name)
        return [*of_process(self.lag), *sources.of_job(status)]

    def checks(self) -> Mapping[str, str]:
        hall = self.coordinator
        job = hall.docket.running
        phase = job.phase if job is not None else None
        if job is None or phase is None:
            return {"job": "the job is over"}
        goes_on = not isinstance(phase, Draining | Finishing)
        waits = explain.waiting_for(job) if goes_on else ""
        return {
            "members": waits or ("the job has not begun" if isinstance(phase, Forming) else ""),
            "parameters": "" if hall.docket.loaded else "the shards have no parameters yet",
            "staying": "" if goes_on else f"the job ends: {explain.why(job)}",
            "journal": hall.docket.trouble,
        }

    def targets(self) -> Sequence[Target]:
        itself = target(self.url, "coordinator", "coordinator", self.name, socket.gethostname())
        return [itself, *members(self.coordinator, self.name, self.unseen)]


class HubSource:
    """The coordinator of many jobs. The series of a job are there while it has an attempt that lives.

    What asks for targets sends them its token, and a job may name any: only those are told whose host is one that the
    node has said of itself on which this hub has put the member. A loopback address is told of nodes on this machine.
    """

    role: Role = "hub"

    def __init__(self, hub: Hub, lag: Lag, url: str) -> None:
        self.hub = hub
        self.lag = lag
        self.url = url
        self.unseen = Unseen()

    async def points(self) -> Sequence[Point]:
        cluster = self.hub.machine.cluster
        jobs = Counter(dict.fromkeys((standing.name for standing in Standing), 0))
        jobs.update(job.standing.name for job in cluster.jobs.values())
        jobs.update(over.standing.name for over in cluster.over.values())
        nodes = Counter({"UP": 0, "LEAVING": 0})
        nodes.update("LEAVING" if present.node.leaving else "UP" for present in cluster.nodes.values())
        offers = [present.node.offers for present in cluster.nodes.values()]
        taken = cluster.taken().values()
        gpus = sum(each.gpus for each in offers), sum(each.gpus for each in taken)
        cpus = sum(each.cpus for each in offers), sum(each.cpus for each in taken)
        found = [*of_process(self.lag), *sources.of_cluster(jobs, nodes, gpus, cpus)]
        running = list(self._running())
        for number, (job, coordinator) in enumerate(running, start=1):
            status = msgspec.structs.replace(coordinator.status(), job=job)
            points = sources.of_job(status)
            found += points if len(running) <= MANY else filter(is_short, points)
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)
        return found

    def _running(self) -> Iterator[tuple[str, Coordinator]]:
        """Jobs, and the coordinators of their attempts."""
        for life in self.hub.attempts.lives.values():
            if life.coordinator is not None:
                yield life.job, life.coordinator

    def checks(self) -> Mapping[str, str]:
        return {"journal": self.hub.docket.trouble}

    def targets(self) -> Sequence[Target]:
        found = [target(self.url, "hub", "hub", "", socket.gethostname())]
        for job, coordinator in self._running():
            found += members(coordinator, job, self.unseen, partial(self.hub.nodes.where, coordinator.job))
        return found


def is_short(point: Point) -> bool:
    """Does it tell of a job as a whole, and is it no state that a job is not in?"""
    return point.metric.name not in SINGLE and not (point.metric is catalog.STATE and not point.value)


class Unseen:
    """Says once of each member why it is not among the targets. What it remembers is bounded."""

    def __init__(self) -> None:
        self.said: set[tuple[str, str, str]] = set()

    def say(self, job: str, member: str, url: str, because: str, fix: str) -> None:
        key = (job, member, url)
        if key not in self.said and len(self.said) < MOST_SAID:
            self.said.add(key)
            log.warning("not scraped", job=job, member=member, at=url, because=because, fix=fix)


def members(
    coordinator: Coordinator, job: str, unseen: Unseen, where: Callable[[str], Reached] | None = None
) -> Iterable[Target]:
    """Those that live and can be scraped. `where`: what is known of a member's machine, other than from itself."""
    running = coordinator.docket.running
    cards = coordinator.board.cards
    for view in explain.members(running) if running is not None else ():
        card = cards.get(view.member)
        if card is None or view.state not in HERE or not (host := host_of(card.metrics)):
            continue
        reached = where(view.member) if where is not None else None
        because, fix = why_not(host, card.node, reached)
        if because:
            unseen.say(job, view.member, card.metrics, because, fix)
        else:
            yield target(card.metrics, view.role, view.member, job, card.node)


def why_not(host: str, node: str, reached: Reached | None) -> tuple[str, str]:
    """Why nobody is to be sent to this host, and what to do; empty where somebody may."""
    if reached is not None and host not in reached.hosts:
        return (
            f"{host} is no address of its node",
            "Start that node with --http ADDRESS:0 --http-tokens FILE.",
        )
    machine = node if reached is None else reached.machine
    if is_loopback(host) and machine != socket.gethostname():
        because = f"it answers on {host} of {machine} alone"
        return because, "Start what runs there with --http 0.0.0.0:0 --http-tokens FILE."
    return "", ""


def target(url: str, role: str, member: str, job: str, node: str) -> Target:
    labels = {"role": role, "member": member, "job_id": job, "node": node}
    return Target([url.partition("://")[2]], labels)
