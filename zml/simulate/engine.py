"""Time passes in rounds: jobs run, the policy is shown the cluster, its plan is carried out at once.

The rules are those of the Pollux artifact's simulator, so that its figures compare: a round every 60 s, jobs are seen
at the round after they were submitted, whoever's workers change place or number stands still for 30 s (counted as
held), and draining takes no time of its own. A policy gives nobody what somebody else still has, so it is asked again
where its plan took something away.

A round that would decide what the one before has decided is not planned (`RANKS` of `scheduler.cluster.policies`): a
recorded workload has weeks in which one job runs and nothing happens.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from ..scheduler.cluster.autoscale import Bounds, Watch, decide, reach_of
from ..scheduler.cluster.order import RankOf, in_order
from ..scheduler.cluster.plan import Allocation, Candidate, Plan, Policy, View
from ..scheduler.cluster.request import Request
from ..scheduler.cluster.resources import Node, NodeId, Resources
from ..scheduler.ids import JobId
from .work import Work

ASKED_AGAIN = 3  # times that a policy is asked in one round, at most
HOPELESS = 100  # rounds in which nobody runs although somebody waits and nobody is to come
FOREVER_S = 10 * 365 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    round_s: float = 60.0
    restart_s: float = 30.0
    gpus_per_node: int = 4
    racks: int = 1
    boot_s: float = 60.0
    """From asking for a node until it takes work."""
    most_s: float = FOREVER_S


@dataclass(slots=True, kw_only=True)
class Job:
    request: Request
    work: Work
    application: str = ""
    allocation: Allocation | None = None
    since: float = 0.0
    attained_s: float = 0.0
    ran_s: float = 0.0
    changes: int = 0
    stands_s: float = 0.0
    began: float | None = None
    ended: float | None = None
    beside: float = 0.0
    """Seconds of other jobs that were in the system while this one was, itself counted."""

    @property
    def placement(self) -> tuple[int, ...]:
        return () if self.allocation is None else tuple(Counter(self.allocation.workers).values())

    def candidate(self) -> Candidate:
        return Candidate(
            request=self.request,
            allocation=self.allocation,
            since=self.since,
            attained_s=self.attained_s,
            ran_s=self.ran_s,
            changes=self.changes,
            profile=self.work.profile,
            left_s=self.work.left_s(),
        )


Fleet = Callable[[View, int], int]
"""How many nodes should there be?"""
Picture: TypeAlias = tuple[list[JobId], list[NodeId]]
"""The jobs in their order, and the nodes that are here."""


@dataclass(slots=True)
class Tally:
    """What a run used. Hours of machines, whole ones for `provisioned`, shares of them for `allocated`. What
    stood idle is paid for where somebody had something afterwards."""

    provisioned_s: float = 0.0
    allocated_s: float = 0.0
    rounds_s: list[float] = field(default_factory=list)
    """How long the policy thought, for each time it was asked."""
    nodes: list[tuple[float, int, float]] = field(default_factory=list)
    """When, how many nodes, and how many machines' worth of GPUs were held; where it changes."""


class Simulation:
    def __init__(
        self,
        jobs: Sequence[Job],
        policy: Policy,
        nodes: int,
        rules: Rules,
        fleet: Fleet | None = None,
        rank: RankOf | None = None,
    ) -> None:
        """`rank`: what the policy puts jobs in order by, where that is known; else every round is planned."""
        self.jobs = sorted(jobs, key=lambda job: (job.request.submitted, job.request.job))
        self.policy = policy
        self.rules = rules
        self.fleet = fleet
        fixed = all(job.request.least == job.request.most for job in jobs)
        limited = any(job.request.time_limit_s is not None for job in jobs)
        self.rank = rank if fixed and not limited else None
        self.settled: Picture | None = None  # of the latest round, if it has changed nothing
        self.now = 0.0
        self.made = 0
        self.nodes: dict[NodeId, Node] = {}
        self.boots: dict[NodeId, float] = {}  # nodes that are paid for and not yet here
        self.tally = Tally()
        self.idle_s = 0.0  # of all nodes, since anybody last had anything: paid for when somebody has again
        for _ in range(nodes):
            self.add_node(0.0)

    def add_node(self, boots_s: float) -> None:
        name = NodeId(f"n{self.made:03}")
        offers = Resources(gpus=self.rules.gpus_per_node)
        self.nodes[name] = Node(id=name, offers=offers, rack=f"r{self.made % self.rules.racks}")
        if boots_s:
            self.boots[name] = self.now + boots_s
        self.made += 1

    def run(self) -> Tally:
        waiting = list(reversed(self.jobs))
        present: list[Job] = []
        idle = 0
        while waiting or present:
            if self.now > self.rules.most_s:
                break
            if not present and self.fleet is None:
                self.skip_to(waiting[-1].request.submitted)
            self.pass_time(present)
            while waiting and waiting[-1].request.submitted <= self.now:
                job = waiting.pop()
                job.since = job.request.submitted
                present.append(job)
            present = [job for job in present if job.ended is None]
            if self.fleet is not None:
                self.resize(present)
            if present:
                self.schedule(present)
            self.note(present)
            runs = any(job.allocation is not None for job in present)
            idle = 0 if runs or waiting or not present else idle + 1
            if idle > HOPELESS:
                break  # who is left asks for more than there will ever be
        return self.tally

    def skip_to(self, submitted: float) -> None:
        """Nobody is here: the rounds until somebody comes are alike."""
        rounds = max(0, -(-(submitted - self.now) // self.rules.round_s) - 1)
        self.now += rounds * self.rules.round_s
        self.idle_s += rounds * self.rules.round_s * len(self.nodes)

    def pass_time(self, present: Sequence[Job]) -> None:
        round_s = self.rules.round_s
        held_until: list[float] = []
        for job in present:
            job.beside += len(present) * round_s
            placement = job.placement
            if not placement:
                continue
            stands = min(job.stands_s, round_s)
            job.stands_s -= stands
            used = stands + job.work.run(placement, round_s - stands)
            job.attained_s += used * sum(placement)
            job.ran_s += used
            self.tally.allocated_s += used * sum(placement) / self.rules.gpus_per_node
            if job.work.done:
                job.ended = self.now + used
                job.allocation = None
            held_until.append(self.now + round_s if job.ended is None else job.ended)
        until = max(held_until, default=self.now)
        if held_until:
            self.tally.provisioned_s += self.idle_s + (until - self.now) * len(self.nodes)
            self.idle_s = 0.0
        self.now += round_s
        self.idle_s += (self.now - until) * len(self.nodes)

    def view(self, present: Sequence[Job]) -> View:
        here = tuple(node for name, node in self.nodes.items() if name not in self.boots)
        jobs = tuple(job.candidate() for job in present)
        return View(now=self.now, nodes=here, jobs=jobs, change_s=self.rules.restart_s)

    def picture(self, present: Sequence[Job]) -> Picture | None:
        """All that a plan depends on, where that is known, but for what jobs have, which only a plan changes."""
        if self.rank is None:
            return None
        jobs = tuple(job.candidate() for job in present)
        order = in_order(View(now=self.now, nodes=(), jobs=jobs), self.rank)
        return [job.request.job for job in order], [name for name in self.nodes if name not in self.boots]

    def schedule(self, present: Sequence[Job]) -> None:
        picture = self.picture(present)
        if picture is not None and picture == self.settled:
            return
        had = [job.allocation for job in present]
        self.plan(present)
        self.settled = picture if had == [job.allocation for job in present] else None

    def plan(self, present: Sequence[Job]) -> None:
        before = {job.request.job: Counter(job.allocation.workers) for job in present if job.allocation}
        for _ in range(ASKED_AGAIN):
            view = self.view(present)
            began = time.perf_counter()
            plan = self.policy(view)
            self.tally.rounds_s.append(time.perf_counter() - began)
            if not self.carry_out(plan, present):
                break
        for job in present:
            after = Counter(job.allocation.workers) if job.allocation else Counter()
            if after == before.get(job.request.job, Counter()):
                continue
            job.since = self.now
            if job.allocation is not None:
                job.stands_s = self.rules.restart_s
                job.work.place(job.placement)
                job.changes += job.began is not None
                job.began = self.now if job.began is None else job.began

    def carry_out(self, plan: Plan, present: Sequence[Job]) -> bool:
        """Was anything taken from anybody?"""
        taken = False
        for job in present:
            allocation = plan.verdicts[job.request.job].allocation
            if job.allocation is not None:
                had, has = (
                    Counter(job.allocation.workers),
                    Counter(allocation.workers if allocation is not None else ()),
                )
                taken = taken or bool(had - has)
            job.allocation = allocation
        return taken

    # -- nodes that come and go ----------------------------------------------------------------------------

    def resize(self, present: Sequence[Job]) -> None:
        assert self.fleet is not None
        self.boots = {name: at for name, at in self.boots.items() if at > self.now}
        wanted = self.fleet(self.view(present), len(self.nodes))
        while len(self.nodes) < wanted:
            self.add_node(self.rules.boot_s)
        if len(self.nodes) > wanted:
            used = Counter(
                node for job in present if job.allocation is not None for node in job.allocation.workers
            )
            idlest = sorted(self.nodes, key=lambda name: (name not in self.boots, used[name], name))
            for name in idlest[: len(self.nodes) - wanted]:
                self.nodes.pop(name)
                self.boots.pop(name, None)

    def note(self, present: Sequence[Job]) -> None:
        held = sum(len(job.allocation.workers) for job in present if job.allocation is not None)
        entry = (self.now, len(self.nodes), held / self.rules.gpus_per_node)
        if not self.tally.nodes or self.tally.nodes[-1][1:] != entry[1:]:
            self.tally.nodes.append(entry)


class Autoscaler:
    """A fleet that asks `autoscale`, and remembers for it what it has to remember."""

    def __init__(self, bounds: Bounds, gpus_per_node: int) -> None:
        self.bounds = bounds
        self.reach = reach_of(Node(id=NodeId("new"), offers=Resources(gpus=gpus_per_node)), bounds)
        self.watch = Watch()

    def __call__(self, view: View, nodes: int) -> int:
        decision = decide(view, nodes, self.reach, self.bounds, self.watch)
        self.watch = decision.watch
        return decision.nodes
