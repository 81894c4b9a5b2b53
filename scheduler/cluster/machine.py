"""The cluster's decisions: `tell(event, now) -> [Action]`, and `decide(policy, now) -> [Decision]`, to be told in turn.
A policy that takes its time is asked in two steps, `look` and `agree`; what happens in between goes before.

Rules: what a process takes of a node is taken until the node says that the process is gone, or the node itself is; so
no node is ever given more than it offers. A job has one attempt at a time; the next begins when nothing of the former
is left. An attempt that was asked to leave has a deadline, after that it is stopped, and after another its processes
are killed: nothing waits for ever. The loss of machines costs a job no retry.

It reads no clock and knows neither sockets nor files. Told the same events at the same times, a machine comes to the
same state: that is how another process goes on where this one died. The rules are told it too, for each process may
have others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any

from .. import rules as lease_rules
from ..ids import JobId, WorkerId
from ..leases import Key, Leases, Unwatched
from . import view as views
from .actions import Action, Discard, Ignored, Open, Quit, Run
from .events import (
    Began,
    CancelAsked,
    Decision,
    Discarded,
    Ended,
    Event,
    Finding,
    Gone,
    Grew,
    NodeCame,
    NodeHeard,
    NodeLeaving,
    NodeLeft,
    NodeLost,
    PauseAsked,
    Preempted,
    ResumeAsked,
    Ruled,
    ScaleAsked,
    Shrank,
    Started,
    Submitted,
    TimeUp,
)
from .lives import EXIT_CANCELLED, Actions, Lives
from .plan import Plan, Policy, Profile, Quota, Verdict, View
from .resources import NodeId
from .rules import Rules
from .state import Attempt, Cluster, Job, Present, Standing, Then, number_of


def key_of(node: NodeId) -> Key:
    """A node's lease."""
    return JobId(""), WorkerId(node)


class Machine(Lives):
    """All jobs and nodes of one coordinator. Invariants: `cluster.check()`."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.cluster = Cluster()
        self.leases = Leases(self._lease_rules())
        self.verdicts: Mapping[JobId, Verdict] = {}  # of the latest round: why who has what
        # Nodes that nobody has heard since this was watched: what is planned for them is not decided yet.
        self.unheard: set[NodeId] = set()
        self.fresh: dict[JobId, None] = {}  # jobs that came since the latest round
        self.touched: set[JobId] = set()  # jobs to which something has happened since they were looked at
        self.patient_until = 0.0  # nobody's time is over before: he may not have heard what he was to do
        # Deadlines of jobs; each job's present one is among them, and what is not present any more is passed over.
        self._dues: list[tuple[float, JobId]] = []

    def _lease_rules(self) -> lease_rules.Rules:
        lease_s = self.rules.lease_s
        return lease_rules.Rules(lease_s=lease_s, lease_most_s=3 * lease_s)

    # -- in and out ------------------------------------------------------------------------------------

    def tell(self, event: Event, now: float) -> list[Action]:
        """It is `now`, and this happened. Returns what to do, in this order. `now` never goes back."""
        self.leases.look(now)
        actions = [*HANDLERS[type(event)](self, event, now)]
        touched: set[JobId] = {action.job for action in actions}
        touched.add(event.request.job if isinstance(event, Submitted) else getattr(event, "job", JobId("")))
        self.touched |= touched
        for name in touched:
            self.cluster.review(name)
            if (job := self.cluster.jobs.get(name)) is not None and (due := self._due(job)) < inf:
                heappush(self._dues, (due, job.id))
        return actions

    def finding(self, now: float, unread_s: float = 0.0) -> Finding | None:
        """What time alone has done: to be told, and then to be asked again. `unread_s`: for so long nodes may have been
        heard, and nobody has listened yet."""
        self.leases.look(now)
        if (ended := self.leases.first_ended(unread_s)) is not None:
            return NodeLost(NodeId(ended.key[1]), f"silent for {ended.silent_s:.1f} s")
        due = self._first_due()
        is_due = due is not None and max(due[0], self.patient_until) <= now
        return self._overdue(self.cluster.jobs[due[1]], now) if due is not None and is_due else None

    def next_deadline(self) -> float | None:
        """When to ask for a finding again, if nothing happens before."""
        due, lease = self._first_due(), self.leases.next_deadline()
        ends = [max(due[0], self.patient_until)] if due is not None else []
        return min([*ends, *([lease] if lease is not None else [])], default=None)

    def _first_due(self) -> tuple[float, JobId] | None:
        while self._dues:
            job = self.cluster.jobs.get(self._dues[0][1])
            if job is not None and self._due(job) == self._dues[0][0]:
                return self._dues[0]
            heappop(self._dues)
        return None

    def decide(
        self,
        policy: Policy,
        now: float,
        *,
        quotas: Mapping[str, Quota] | None = None,
        shares: Mapping[str, float] | None = None,
        profiles: Mapping[JobId, Profile] | None = None,
    ) -> list[Decision]:
        """A round. Changes nothing but `verdicts`: each decision is to be told, once it is written down."""
        if again := self.replacements():
            return again
        return self.agree(policy(self.look(now, quotas=quotas, shares=shares, profiles=profiles)))

    def replacements(self) -> list[Decision]:
        """What goes before a round: shards that are nowhere. Those of them that find room."""
        return [*views.replacements(self.cluster, self.unheard)]

    def look(
        self,
        now: float,
        *,
        quotas: Mapping[str, Quota] | None = None,
        shares: Mapping[str, float] | None = None,
        profiles: Mapping[JobId, Profile] | None = None,
    ) -> View:
        """The picture for a policy. Nothing that happens from now on changes it: a policy may take its time."""
        self.touched.clear()
        return views.view_of(self.cluster, now, quotas or {}, shares or {}, profiles or {})

    def agree(self, plan: Plan) -> list[Decision]:
        """What has to be decided for this plan to come true, which was made of what was seen last. Where something has
        happened to a job since, or what was to be given to it is not there any more, nothing is decided about it: the
        next round sees it."""
        since = {
            name: verdict
            for name in self.touched
            if name not in plan.verdicts and (verdict := self.verdicts.get(name)) is not None
        }
        self.verdicts = {**plan.verdicts, **since} if since else plan.verdicts
        for name in [name for name in self.fresh if name in plan.verdicts]:
            del self.fresh[name]
        return [*views.differences(self.cluster, plan, self.touched, self.unheard)]

    def decide_fresh(
        self, policy: Policy, now: float, quotas: Mapping[str, Quota] | None = None
    ) -> list[Decision] | None:
        """A round about those alone who have come since the latest one. Where nobody waits and all of them find what
        they need, they need not wait for a round over all, which would give them the same. None: that one is due."""
        fresh, self.fresh = self.fresh, {}
        view = views.view_of_new(self.cluster, fresh, now, quotas or {}, self.unheard)
        if view is None:
            return None
        plan = policy(view)
        if any(verdict.allocation is None for verdict in plan.verdicts.values()):
            return None
        self.verdicts = {**self.verdicts, **plan.verdicts}
        return [*views.differences(self.cluster, plan, (), self.unheard)]

    def unwatched(self) -> None:
        """A journal is read: nobody is heard, and who fell silent is written there."""
        self.leases = Unwatched(self._lease_rules())

    def become(self, cluster: Cluster) -> None:
        """Go on from this state, while a journal is read."""
        self.cluster = cluster
        self.rules = cluster.rules or self.rules
        self._count_dues()
        for node in cluster.nodes:
            self.leases.grant(key_of(node))

    def _count_dues(self) -> None:
        jobs = self.cluster.jobs.values()
        self._dues = [(due, job.id) for job in jobs if (due := self._due(job)) < inf]
        heapify(self._dues)

    def watch(self, now: float, lasts_s: float) -> None:
        """From now on it is real: every node is to be heard within this time. While nobody watched nobody was told
        anything, so that whose time has run out meanwhile has as much again."""
        self.patient_until = now + lasts_s + self.rules.drain_s
        self.leases = Leases(self._lease_rules())
        self.leases.look(now)
        self.unheard = set(self.cluster.nodes)
        for node in self.unheard:
            self.leases.grant(key_of(node), lasts_s)

    def _ruled(self, event: Ruled, now: float) -> Actions:
        """Another process has its own rules. What was to happen by a certain time still is."""
        self.rules = self.cluster.rules = event.rules
        self._count_dues()
        yield from ()

    # -- people ----------------------------------------------------------------------------------------

    def _submit(self, event: Submitted, now: float) -> Actions:
        request = event.request
        if request.job in self.cluster.jobs or request.job in self.cluster.over:
            yield Ignored(request.job, f"job {request.job} was submitted before")
            return
        self.cluster.jobs[request.job] = Job(request, since=now, counted=now)
        self.fresh[request.job] = None
        yield from self._may_still_begin(self.cluster.jobs[request.job], now)

    def _cancel(self, event: CancelAsked, now: float) -> Actions:
        job = self.cluster.jobs.get(event.job)
        if job is None:
            yield self._no_such(event.job)
        elif job.attempt is None:
            yield from self._finish(job, Standing.CANCELLED, EXIT_CANCELLED, event.because, now)
        else:
            yield from self._leave(job, Then.CANCEL, event.because, now)

    def _pause(self, event: PauseAsked, now: float) -> Actions:
        job = self.cluster.jobs.get(event.job)
        if job is None:
            yield self._no_such(event.job)
        elif job.attempt is None:
            job.paused = job.paused or event.because
        else:
            yield from self._leave(job, Then.PAUSE, event.because, now)

    def _resume(self, event: ResumeAsked, now: float) -> Actions:
        job = self.cluster.jobs.get(event.job)
        if job is None:
            yield self._no_such(event.job)
        elif job.attempt is not None:
            leaving = job.attempt.leaving
            if leaving is not None and leaving.then is Then.PAUSE:  # it goes on its way out, and comes back
                leaving.then = Then.REQUEUE
        elif job.paused:
            job.paused, job.since = "", now

    def _scale(self, event: ScaleAsked, now: float) -> Actions:
        job = self.cluster.jobs.get(event.job)
        if job is None:
            yield self._no_such(event.job)
            return
        job.request = replace(job.request, least=event.least, most=event.most)

    def _discarded(self, event: Discarded, now: float) -> Actions:
        if self.cluster.over.pop(event.job, None) is None:
            yield Ignored(event.job, f"no job {event.job} is over")
        else:
            yield Discard(event.job, event.because)

    def _no_such(self, name: JobId) -> Ignored:
        over = self.cluster.over.get(name)
        if over is None:
            return Ignored(name, f"there is no job {name}")
        return Ignored(name, f"job {name} is over ({over.standing.name}: {over.because})")

    # -- nodes -------------------------------------------------------------------------------------------

    def _node_came(self, event: NodeCame, now: float) -> Actions:
        name = event.node.id
        before = self.cluster.nodes.get(name)
        self.unheard.discard(name)
        if before is not None and before.boot != event.boot:
            yield from self._node_gone(name, "its node was started again", now)
            before = None
        if before is None:
            self.leases.grant(key_of(name))
            self.cluster.nodes[name] = Present(event.node, event.boot)
            return
        self.leases.renew(key_of(name))
        # What a running node offers does not shrink below what was given to it.
        taken = self.cluster.taken()[name]
        offers = event.node.offers if event.node.offers.holds(taken) else before.node.offers
        leaving = before.node.leaving or event.node.leaving
        before.node = replace(event.node, offers=offers, leaving=leaving)
        for job in self.cluster.jobs.values():  # it may have missed what it was told
            if (attempt := job.attempt) is not None:
                for slot, place in attempt.slots.items():
                    if place.node == name and attempt.outcome is None and not place.leaving:
                        yield Run(job.id, attempt.number, slot, name, "its node has come back")
                    elif place.node == name:
                        yield Quit(
                            job.id,
                            attempt.number,
                            slot,
                            name,
                            False,
                            "its node has come back, and it is to go",
                        )

    def _node_heard(self, event: NodeHeard, now: float) -> Actions:
        present = self.cluster.nodes.get(event.node)
        if present is None or present.boot != event.boot:
            yield Ignored(JobId(""), f"node {event.node} is not here")
            return
        self.leases.renew(key_of(event.node))
        self.unheard.discard(event.node)

    def _node_leaving(self, event: NodeLeaving, now: float) -> Actions:
        """Its workers leave in order, where others are left to go on; otherwise the job is drained."""
        present = self.cluster.nodes.get(event.node)
        if present is None:
            yield Ignored(JobId(""), f"node {event.node} is not here")
            return
        present.node = replace(present.node, leaving=True)
        for job in list(self.cluster.jobs.values()):
            attempt = job.attempt
            if attempt is None or attempt.leaving is not None or attempt.outcome is not None:
                continue
            here = [slot for slot, place in attempt.slots.items() if place.node == event.node]
            stay = [slot for slot in attempt.workers() if slot not in here]
            if not here:
                continue
            because = f"node {event.node} leaves: {event.because}"
            if attempt.began is None or not stay or any(slot[0] == "p" for slot in here):
                yield from self._leave(job, Then.REQUEUE, because, now)
            else:
                yield from self._shrink(job, attempt, here, because, now)

    def _node_left(self, event: NodeLeft | NodeLost, now: float) -> Actions:
        if event.node not in self.cluster.nodes:
            yield Ignored(JobId(""), f"node {event.node} is not here")
            return
        yield from self._node_gone(event.node, f"node {event.node}: {event.because}", now)

    def _node_gone(self, name: NodeId, because: str, now: float) -> Actions:
        self.leases.drop(key_of(name))
        self.unheard.discard(name)
        for job in list(self.cluster.jobs.values()):
            if (attempt := job.attempt) is not None:
                for slot in [slot for slot, place in attempt.slots.items() if place.node == name]:
                    yield from self._slot_gone(job, attempt, slot, because, now)
        self.cluster.remove(name)

    # -- the rounds' decisions -----------------------------------------------------------------------------

    def _started(self, event: Started, now: float) -> Actions:
        job = self.cluster.jobs[event.job]
        assert job.attempt is None and event.attempt == job.attempts + 1
        job.count(now)
        workers = [number_of(slot) for slot in event.slots if slot[0] == "w"]
        job.attempts, job.since, job.changes = event.attempt, now, job.changes + 1
        job.attempt = Attempt(event.attempt, now, {}, len(workers), max(workers) + 1)
        for slot, node in event.slots.items():
            self.cluster.put(job, job.attempt, slot, node)
        yield Open(job.id, event.attempt, len(workers), event.because)
        for slot, node in event.slots.items():
            yield Run(job.id, event.attempt, slot, node, event.because)

    def _grew(self, event: Grew, now: float) -> Actions:
        found = self._attempt(event.job, event.attempt)
        assert found is not None
        job, attempt = found
        job.count(now)
        job.since, job.changes = now, job.changes + 1
        for slot, node in event.slots.items():
            self.cluster.put(job, attempt, slot, node)
            if slot[0] == "w":
                attempt.next_worker = max(attempt.next_worker, number_of(slot) + 1)
            yield Run(job.id, attempt.number, slot, node, event.because)

    def _shrank(self, event: Shrank, now: float) -> Actions:
        found = self._attempt(event.job, event.attempt)
        assert found is not None
        yield from self._shrink(*found, event.slots, event.because, now)

    def _shrink(self, job: Job, attempt: Attempt, slots: list[str], because: str, now: float) -> Actions:
        job.count(now)
        job.since, job.changes = now, job.changes + 1
        for slot in slots:
            place = attempt.slots[slot]
            place.leaving, place.until = True, now + self.rules.drain_s
            yield Quit(job.id, attempt.number, slot, place.node, False, because)

    def _preempted(self, event: Preempted, now: float) -> Actions:
        found = self._attempt(event.job, event.attempt)
        assert found is not None
        found[0].changes += 1
        yield from self._leave(found[0], Then.REQUEUE, event.because, now)


M = Machine
HANDLERS: dict[type, Callable[[Machine, Any, float], Actions]] = {
    Submitted: M._submit,
    CancelAsked: M._cancel,
    PauseAsked: M._pause,
    ResumeAsked: M._resume,
    ScaleAsked: M._scale,
    Discarded: M._discarded,
    NodeCame: M._node_came,
    NodeHeard: M._node_heard,
    NodeLeaving: M._node_leaving,
    NodeLeft: M._node_left,
    NodeLost: M._node_left,
    Gone: M._gone,
    Began: M._began,
    Ended: M._ended,
    Ruled: M._ruled,
    TimeUp: M._time_up,
    Started: M._started,
    Grew: M._grew,
    Shrank: M._shrank,
    Preempted: M._preempted,
}
"""What each event does."""
