"""The cluster's decisions: `tell(event, now) -> [Action]`, and `decide(policy, now) -> [Decision]`, to be told in turn.

Rules: what a process takes of a node is taken until the node says that the process is gone, or the node itself is; so
no node is ever given more than it offers. A job has one attempt at a time; the next begins when nothing of the former
is left. An attempt that was asked to leave has a deadline, after that it is stopped, and after another its processes
are killed: nothing waits for ever. The loss of machines costs a job no retry.

It reads no clock and knows neither sockets nor files. Told the same events at the same times, a machine comes to the
same state: that is how another process goes on where this one died.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any, TypeAlias

from .. import rules as lease_rules
from ..explain import counted
from ..ids import JobId, WorkerId
from ..leases import Key, Leases, Unwatched
from . import view as views
from .actions import Action, Bury, Close, Drain, Finish, Ignored, Open, Quit, Run, Stop
from .events import (
    Began,
    CancelAsked,
    Decision,
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
    Outcome,
    PauseAsked,
    Preempted,
    ResumeAsked,
    ScaleAsked,
    Shrank,
    Started,
    Submitted,
    TimeUp,
)
from .plan import Policy, Profile, Quota, Verdict
from .resources import NodeId
from .rules import Rules
from .state import Attempt, Cluster, Job, Leaving, Over, Present, Slot, Standing, Then, number_of

EXIT_CANCELLED = 130
EXIT_TIMED_OUT = 124  # as timeout(1)
EXIT_LOST = 1

Actions: TypeAlias = Iterator[Action]


def key_of(node: NodeId) -> Key:
    """A node's lease."""
    return JobId(""), WorkerId(node)


class Machine:
    """All jobs and nodes of one coordinator. Invariants: `cluster.check()`."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.cluster = Cluster()
        self.leases = Leases(self._lease_rules())
        self.verdicts: Mapping[JobId, Verdict] = {}  # of the latest round: why who has what
        self.fresh: dict[JobId, None] = {}  # jobs that came since the latest round
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
        for name in touched | {getattr(event, "job", JobId(""))}:
            if (job := self.cluster.jobs.get(name)) is not None and (due := self._due(job)) < inf:
                heappush(self._dues, (due, job.id))
        return actions

    def finding(self, now: float) -> Finding | None:
        """What time alone has done: to be told, and then to be asked again."""
        self.leases.look(now)
        if (ended := self.leases.first_ended()) is not None:
            return NodeLost(NodeId(ended.key[1]), f"silent for {ended.silent_s:.1f} s")
        due = self._first_due()
        return TimeUp(due[1]) if due is not None and due[0] <= now else None

    def next_deadline(self) -> float | None:
        """When to ask for a finding again, if nothing happens before."""
        due, lease = self._first_due(), self.leases.next_deadline()
        return min((end for end in (due and due[0], lease) if end is not None), default=None)

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
        if again := [*views.replacements(self.cluster)]:
            return again
        view = views.view_of(self.cluster, now, quotas or {}, shares or {}, profiles or {})
        self.fresh.clear()
        plan = policy(view)
        self.verdicts = plan.verdicts
        return [*views.differences(self.cluster, plan)]

    def decide_fresh(
        self, policy: Policy, now: float, quotas: Mapping[str, Quota] | None = None
    ) -> list[Decision] | None:
        """A round about those alone who have come since the latest one. Where nobody waits and all of them find what
        they need, they need not wait for a round over all, which would give them the same. None: that one is due."""
        fresh, self.fresh = self.fresh, {}
        view = views.view_of_new(self.cluster, fresh, now, quotas or {})
        if view is None:
            return None
        plan = policy(view)
        if any(verdict.allocation is None for verdict in plan.verdicts.values()):
            return None
        self.verdicts = {**self.verdicts, **plan.verdicts}
        return [*views.differences(self.cluster, plan)]

    def unwatched(self) -> None:
        """A journal is read: nobody is heard, and who fell silent is written there."""
        self.leases = Unwatched(self._lease_rules())

    def become(self, cluster: Cluster) -> None:
        """Go on from this state, while a journal is read."""
        self.cluster = cluster
        self._dues = [(due, job.id) for job in cluster.jobs.values() if (due := self._due(job)) < inf]
        heapify(self._dues)
        for node in cluster.nodes:
            self.leases.grant(key_of(node))

    def watch(self, now: float, lasts_s: float) -> None:
        """From now on it is real: every node is to be heard within this time."""
        self.leases = Leases(self._lease_rules())
        self.leases.look(now)
        for node in self.cluster.nodes:
            self.leases.grant(key_of(node), lasts_s)

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
            if leaving is None or leaving.then is not Then.PAUSE:
                yield Ignored(job.id, f"job {job.id} is not paused")
            else:  # it goes on its way out, and comes back
                leaving.then = Then.REQUEUE
        elif not job.paused:
            yield Ignored(job.id, f"job {job.id} is not paused")
        else:
            job.paused, job.since = "", now

    def _scale(self, event: ScaleAsked, now: float) -> Actions:
        job = self.cluster.jobs.get(event.job)
        if job is None:
            yield self._no_such(event.job)
            return
        job.request = replace(job.request, least=event.least, most=event.most)

    def _no_such(self, name: JobId) -> Ignored:
        over = self.cluster.over.get(name)
        if over is None:
            return Ignored(name, f"there is no job {name}")
        return Ignored(name, f"job {name} is over ({over.standing.name}: {over.because})")

    # -- nodes -------------------------------------------------------------------------------------------

    def _node_came(self, event: NodeCame, now: float) -> Actions:
        name = event.node.id
        before = self.cluster.nodes.get(name)
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
        for job in list(self.cluster.jobs.values()):
            if (attempt := job.attempt) is not None:
                for slot in [slot for slot, place in attempt.slots.items() if place.node == name]:
                    yield from self._slot_gone(job, attempt, slot, because, now)
        del self.cluster.nodes[name]

    # -- attempts ------------------------------------------------------------------------------------------

    def _gone(self, event: Gone, now: float) -> Actions:
        found = self._attempt(event.job, event.attempt)
        if found is None or event.slot not in found[1].slots:
            yield Ignored(event.job, f"{event.job}.{event.attempt} {event.slot} was gone before")
            return
        found[1].finishing = found[1].finishing or event.done
        yield from self._slot_gone(*found, event.slot, event.because, now)

    def _slot_gone(self, job: Job, attempt: Attempt, slot: str, because: str, now: float) -> Actions:
        job.count(now)
        del attempt.slots[slot]
        if attempt.outcome is None:
            yield Bury(job.id, attempt.number, slot, because)
        if not attempt.slots and attempt.outcome is None and attempt.leaving is None:
            # Nobody is left who could go on; its coordinator would only wait.
            yield from self._leave(
                job, Then.TRY_AGAIN, f"nothing of it is left: {because}", now, at_once=True
            )
        if not attempt.slots and attempt.outcome is not None:
            yield from self._close(job, attempt, now)

    def _began(self, event: Began, now: float) -> Actions:
        found = self._attempt(event.job, event.attempt)
        if found is None or found[1].began is not None:
            yield Ignored(event.job, f"{event.job}.{event.attempt} does not begin")
            return
        job, attempt = found
        attempt.began = now
        job.first_began = job.first_began or now

    def _ended(self, event: Ended, now: float) -> Actions:
        found = self._attempt(event.job, event.attempt)
        if found is None or found[1].outcome is not None:
            yield Ignored(event.job, f"{event.job}.{event.attempt} was over before")
            return
        job, attempt = found
        job.count(now)
        attempt.outcome, attempt.exit_code = event.outcome, event.exit_code
        attempt.because, attempt.ended = event.because, now
        if not attempt.slots:  # else they know, and go by themselves, in time: `_due`
            yield from self._close(job, attempt, now)

    def _close(self, job: Job, attempt: Attempt, now: float) -> Actions:
        """Nothing of the attempt is left."""
        assert attempt.outcome is not None
        yield Close(job.id, attempt.number)
        job.count(now)
        job.ran_s += attempt.ended - attempt.began if attempt.began is not None else 0.0
        job.attempt, job.since = None, now
        then = attempt.leaving.then if attempt.leaving is not None else None
        because = attempt.leaving.because if attempt.leaving is not None else attempt.because
        code = attempt.exit_code
        if attempt.outcome is Outcome.SUCCEEDED:
            yield from self._finish(job, Standing.SUCCEEDED, 0, attempt.because, now)
        elif then is Then.CANCEL:
            yield from self._finish(job, Standing.CANCELLED, code or EXIT_CANCELLED, because, now)
        elif then is Then.TIME_UP:
            yield from self._finish(job, Standing.TIMED_OUT, EXIT_TIMED_OUT, because, now)
        elif then is Then.PAUSE:
            job.paused = because
        elif then is Then.TRY_AGAIN:
            yield from self._lose(job, attempt, because, now)
        elif then is Then.REQUEUE or attempt.outcome is Outcome.DRAINED:
            job.losses = 0  # its turn comes again
        elif attempt.outcome is Outcome.CANCELLED:
            yield from self._finish(job, Standing.CANCELLED, code or EXIT_CANCELLED, because, now)
        elif attempt.outcome is Outcome.FAILED:
            job.failures += 1
            if job.failures > job.request.retries:
                yield from self._finish(job, Standing.FAILED, code or EXIT_LOST, because, now)
            else:
                job.not_before = now + self.rules.pause_s(job.failures)
        else:
            yield from self._lose(job, attempt, because, now)

    def _lose(self, job: Job, attempt: Attempt, because: str, now: float) -> Actions:
        began = attempt.began
        if began is not None and attempt.ended - began > self.rules.healthy_s:
            job.losses = 0
        job.losses += 1
        if job.losses >= (self.rules.false_starts if began is None else self.rules.losses):
            what = f"{counted(job.losses, 'attempt')} in a row were lost, the last one: {because}"
            yield from self._finish(job, Standing.FAILED, EXIT_LOST, what, now)
        else:
            job.not_before = now + self.rules.pause_s(job.losses)

    def _leave(self, job: Job, then: Then, because: str, now: float, *, at_once: bool = False) -> Actions:
        """Ask an attempt to go. The later word counts, but what was cancelled stays so."""
        attempt = job.attempt
        assert attempt is not None
        if attempt.outcome is not None or attempt.leaving is not None:
            if attempt.leaving is None:
                attempt.leaving = Leaving(then, because, attempt.ended + self.rules.stop_s, stopped=True)
            elif attempt.leaving.then not in (Then.CANCEL, Then.TIME_UP):
                attempt.leaving.then, attempt.leaving.because = then, because
            return
        at_once = at_once or attempt.began is None  # nothing is there yet to be saved
        patience_s = self.rules.stop_s if at_once else self.rules.drain_s
        attempt.leaving = Leaving(then, because, now + patience_s, stopped=at_once)
        order = Stop if at_once else Drain
        yield order(job.id, attempt.number, because)

    def _due(self, job: Job) -> float:
        """When time will have done something to this job."""
        attempt = job.attempt
        if attempt is None:
            return inf
        if attempt.outcome is not None:
            return attempt.ended + self.rules.stop_s
        if attempt.leaving is not None:
            return attempt.leaving.until
        if attempt.began is None:
            return attempt.placed + self.rules.start_s
        limit = job.request.time_limit_s
        return attempt.began + limit - job.ran_s if limit is not None else inf

    def _time_up(self, event: TimeUp, now: float) -> Actions:
        job = self.cluster.jobs[event.job]
        attempt = job.attempt
        assert attempt is not None and self._due(job) <= now
        rules = self.rules
        if attempt.outcome is not None:
            attempt.ended = now  # once more, should it not be heard
            for slot, place in attempt.slots.items():
                because = f"it is still there {rules.stop_s:g} s after its job"
                yield Quit(job.id, attempt.number, slot, place.node, True, because)
        elif attempt.leaving is None and attempt.began is None:
            because = f"not everybody was there after {rules.start_s:g} s"
            yield from self._leave(job, Then.TRY_AGAIN, because, now)
        elif attempt.leaving is None:
            because = f"the time limit of {job.request.time_limit_s:g} s is over"
            yield from self._leave(job, Then.TIME_UP, because, now)
        elif not attempt.leaving.stopped:
            attempt.leaving.stopped, attempt.leaving.until = True, now + rules.stop_s
            yield Stop(job.id, attempt.number, f"it has not left after {rules.drain_s:g} s")
        else:
            # Its coordinator does not come to an end either: what runs is killed, and the attempt is over.
            because = f"it has not stopped after {rules.stop_s:g} s"
            yield from self._ended(Ended(job.id, attempt.number, Outcome.LOST, EXIT_LOST, because), now)
            if (again := job.attempt) is not None:
                for slot, place in again.slots.items():
                    yield Quit(job.id, again.number, slot, place.node, True, because)

    # -- the rounds' decisions -----------------------------------------------------------------------------

    def _started(self, event: Started, now: float) -> Actions:
        job = self.cluster.jobs[event.job]
        assert job.attempt is None and event.attempt == job.attempts + 1
        job.count(now)
        workers = [number_of(slot) for slot in event.slots if slot[0] == "w"]
        job.attempts, job.since, job.changes = event.attempt, now, job.changes + 1
        slots = {slot: Slot(node) for slot, node in event.slots.items()}
        job.attempt = Attempt(event.attempt, now, slots, max(workers) + 1)
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
            assert slot not in attempt.slots
            attempt.slots[slot] = Slot(node)
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
            place.leaving = True
            yield Quit(job.id, attempt.number, slot, place.node, False, because)

    def _preempted(self, event: Preempted, now: float) -> Actions:
        found = self._attempt(event.job, event.attempt)
        assert found is not None
        found[0].changes += 1
        yield from self._leave(found[0], Then.REQUEUE, event.because, now)

    # -- ends ------------------------------------------------------------------------------------------------

    def _finish(self, job: Job, standing: Standing, code: int, because: str, now: float) -> Actions:
        over = self.cluster.over
        over[job.id] = Over(
            job.request, standing, code, because, now, job.attempts, job.attained_s, job.first_began
        )
        del self.cluster.jobs[job.id]
        while len(over) > self.rules.remembered:
            del over[next(iter(over))]
        yield Finish(job.id, standing, code, because)
        for other in [other for other in self.cluster.jobs.values() if job.id in other.request.after]:
            yield from self._may_still_begin(other, now)

    def _may_still_begin(self, job: Job, now: float) -> Actions:
        """A job that comes after one that did not succeed never begins."""
        for name in job.request.after:
            over = self.cluster.over.get(name)
            missing = over is None and name not in self.cluster.jobs
            if job.attempt is None and (missing or (over and over.standing is not Standing.SUCCEEDED)):
                how = "is not known" if over is None else f"ended {over.standing.name}"
                because = f"it was to come after {name}, which {how}"
                yield from self._finish(job, Standing.CANCELLED, EXIT_CANCELLED, because, now)
                return

    def _attempt(self, name: JobId, number: int) -> tuple[Job, Attempt] | None:
        job = self.cluster.jobs.get(name)
        if job is None or job.attempt is None or job.attempt.number != number:
            return None
        return job, job.attempt


M = Machine
HANDLERS: dict[type, Callable[[Machine, Any, float], Actions]] = {
    Submitted: M._submit,
    CancelAsked: M._cancel,
    PauseAsked: M._pause,
    ResumeAsked: M._resume,
    ScaleAsked: M._scale,
    NodeCame: M._node_came,
    NodeHeard: M._node_heard,
    NodeLeaving: M._node_leaving,
    NodeLeft: M._node_left,
    NodeLost: M._node_left,
    Gone: M._gone,
    Began: M._began,
    Ended: M._ended,
    TimeUp: M._time_up,
    Started: M._started,
    Grew: M._grew,
    Shrank: M._shrank,
    Preempted: M._preempted,
}
"""What each event does."""
