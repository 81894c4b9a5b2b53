"""The coordinator of many jobs: events in, the cluster machine decides, actions out.

Rules: what has changed is in the journal before an order goes out or an answer is given; while the journal has no room
nothing is changed. Rounds of the policy follow each other at a distance, so that a thousand submissions are decided
about together; each decision is written down like any other event. Plans are made in a thread of their own, of a
picture that does not change; what happens meanwhile goes before what was planned.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import inf
from pathlib import Path
from typing import Any

import structlog
from msgspec import Struct

from ..config import Settings
from ..coordinator.vigil import Vigil
from ..journal import Journal
from ..lease import NO_ROOM
from ..link import listen
from ..messages import Stop
from ..runs import rundir
from ..scheduler.cluster import actions, events
from ..scheduler.cluster.machine import Machine
from ..scheduler.cluster.plan import Plan, Policy, Quota
from ..scheduler.cluster.reach import Fleet
from ..scheduler.cluster.rules import Rules
from ..scheduler.ids import JobId
from ..transport import Endpoint, Handler, Refusal
from .attempts import Attempts, chosen
from .away import mark_of
from .docket import Docket
from .jobs import Submission
from .nodes import Nodes, archive_file
from .profiles import Profiles
from .retention import Remains
from .wire import Ceased, Goodbye, NodeBeat, Offer, Output, Want, Work

GREET_S = 0.01  # between two rounds about newcomers alone, at least,
GREET_SHARE = 3  # and so many times as long as one takes,
GREETED = 3  # the shortest of so many: one that memory was cleared away in says nothing of the next
ROUND_S = 0.1  # between two rounds, at least
ROUND_SHARE = 5  # and so many times as long as one takes
AGAIN_S = 10.0  # without news: what time does to the order of jobs
GRACE_S = 15.0  # for nodes to find a coordinator that was started again, and to be heard;
GRACE_EACH_S = 0.005  # and for each process that comes back beside them: some 3 ms of work (`bench/jobs.py`)
RETURN_S = 2.0  # without a round at first: it would give the same, and nodes and members are to be heard;
RETURN_MOST_S = 6.0  # as long as a node's lease where one is not heard, which then gets nothing new
ROOM_S = 0.5
BUSY_S = 0.2  # more has come than was read in this time: nobody begins before those who are here are heard,
PUT_OFF_S = 5.0  # for so long at most
MOST_STRANGERS = 10_000
ROUNDS = 1_000  # whose times are kept

log = structlog.get_logger()


class PutOff:
    """Would more begin than can be listened to? Each job that begins talks more than one that runs."""

    def __init__(self) -> None:
        self.since = inf

    def waits(self, unread_s: float) -> bool:
        """Once more? `unread_s`: something may have lain unread for so long."""
        now = asyncio.get_running_loop().time()
        self.since = min(self.since, now) if unread_s >= BUSY_S else inf
        if now - self.since >= PUT_OFF_S:
            self.since = inf
        return self.since < inf


class Hub:
    """`changed` is set and replaced at each change of jobs."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        rules: Rules,
        policy: Policy,
        endpoint: Callable[[Handler], Endpoint],
        journal: Journal | None,
        *,
        heartbeat_s: float = 1.0,
        quotas: dict[str, Quota] | None = None,
        shares: dict[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Where the journal holds a cluster, that one goes on. Raises ZmlError."""
        self.folder = folder
        self.settings = settings
        self.policy = policy
        self.quotas, self.shares = quotas or {}, shares or {}
        self.machine = Machine(rules)
        self.endpoint = endpoint(self.handle)
        self.attempts = Attempts(folder, settings, lambda: self.endpoint, self.dispatch)
        run_dir = lambda job, n: str(self.attempts.run_dir(job, n))  # noqa: E731
        self.docket = Docket(self.machine, journal, run_dir, clock)
        self.docket.beside = self.beside
        self.remains = Remains(folder, self.docket)
        self.mark = mark_of(folder)
        logs = lambda job, n: self.attempts.run_dir(job, n) / rundir.LOGS  # noqa: E731
        self.nodes = Nodes(folder, self.endpoint, self.machine, self.dispatch, self.work, logs, heartbeat_s)
        self.profiles = Profiles(self.attempts)
        self.held: list[actions.Action] = []
        self.fleet: Fleet | None = None  # where there is an autoscaler: what it says
        self.changed = asyncio.Event()
        self.abandoned = False
        self.newcomers, self.rounds = PutOff(), PutOff()
        self.vigil = Vigil(lambda: self.endpoint.catch_up(), self._tick)
        self.round_timer: asyncio.Handle | None = None
        self.round_at = 0.0  # when it is due; uvloop's handles do not all say so
        self.began = self.returned_by = 0.0  # when it began to listen, and by when nodes have come back
        self.rested_until = 0.0  # no round before
        self.greeting: asyncio.Handle | None = None
        self.greeted_until = 0.0  # the same of rounds about newcomers
        self.greet_s: deque[float] = deque(maxlen=GREETED)  # how long the latest of those took
        self.planner = ThreadPoolExecutor(1, "zml-planning")
        self.writer = ThreadPoolExecutor(1, "zml-snapshots")
        self.planning: asyncio.Future[Plan] | None = None
        self.round_due = False  # another, once that is planned
        self.round_s: deque[float] = deque(maxlen=ROUNDS)  # how long the latest ones took
        self.held_s: deque[float] = deque(
            maxlen=2 * ROUNDS
        )  # and what of it in the one thread that hears all
        self.seen_off: set[str] = set()

    async def start(self) -> None:
        """Listen, and go on where another process was."""
        going_on = [
            (job.id, job.attempt)
            for job in self.machine.cluster.jobs.values()
            if job.attempt is not None and job.attempt.outcome is None
        ]
        await self.attempts.read_ahead(
            (job, attempt.number, attempt.asked, self._submission(job)) for job, attempt in going_on
        )
        await listen(self.endpoint)
        self.began = asyncio.get_running_loop().time()
        if self.docket.resumed:
            jobs = self.machine.cluster.jobs.values()
            processes = sum(len(job.attempt.slots) for job in jobs if job.attempt is not None)
            self.machine.watch(self.docket.now, GRACE_S + GRACE_EACH_S * processes)
            self.rested_until = self.began + RETURN_S
            self.returned_by = self.began + RETURN_MOST_S
            for job, attempt in going_on:
                self._open(job, attempt.number, attempt.asked)
                if attempt.leaving is not None:
                    tell = self.attempts.stop if attempt.leaving.stopped else self.attempts.drain
                    tell(job, attempt.number, attempt.leaving.because)
            log.info("cluster goes on", jobs=len(self.machine.cluster.jobs))
        self.look_again()
        self.soon()

    def of_fleet(self) -> str:
        """What an autoscaler says of nodes that come and go, where there is one."""
        return str(self.fleet or "")

    async def close(self) -> None:
        self.abandoned = True
        self.vigil.end()
        for timer in (self.round_timer, self.greeting):
            if timer is not None:
                timer.cancel()
        for threads in (self.planner, self.writer):
            threads.shutdown(wait=False, cancel_futures=True)
        await self.nodes.close()
        await self.attempts.close_all()
        await self.remains.close()
        await self.endpoint.close()
        if self.docket.journal is not None:
            self.docket.journal.close()

    # -- deciding and acting ----------------------------------------------------------------------------

    def dispatch(self, event: events.Event) -> list[actions.Action]:
        """Hand an event to the machine and perform what it orders; returns that. The only place that does."""
        if self.abandoned:
            return []
        decided: list[actions.Action] = []
        if isinstance(event, events.NodeHeard):  # heard at last, before its lease is looked at
            decided += self.docket.event(event)
        self._find(decided, inf)
        if not isinstance(event, events.NodeHeard):
            decided += self.docket.event(event)
        self._act(decided)
        if not isinstance(event, events.NodeHeard) or decided:
            self.look_again()
            self.wake()
            if isinstance(event, events.Submitted):
                self.greet()
            elif not self._is_as_planned(event):
                self.soon()
        return decided

    def _is_as_planned(self, event: events.Event) -> bool:
        """Has only come true what a round has decided, so that another would decide the same? Of what begins, only the
        number of workers may be changed."""
        if not isinstance(event, events.Began):
            return False
        job = self.machine.cluster.jobs.get(event.job)
        return job is not None and job.request.least == job.request.most

    def _find(self, decided: list[actions.Action], unread_s: float) -> None:
        """What time has done changes the state too: it has to wait while nothing can be written. Who is silent is found
        by `_tick` alone, which has read what has come."""
        while (
            self.docket.settled() and (finding := self.machine.finding(self.docket.now, unread_s)) is not None
        ):
            decided += self.docket.event(finding)
            if isinstance(finding, events.NodeLost):
                log.warning("node lost", node=finding.node, because=finding.because)
                self.nodes.forget(finding.node)

    def _tick(self, unread_s: float) -> None:
        decided: list[actions.Action] = []
        self._find(decided, unread_s)
        self._act(decided)
        if decided:
            self.wake()
            self.soon()
        self.look_again()

    def _act(self, decided: list[actions.Action]) -> None:
        self.held += decided
        if self.docket.settled():
            held, self.held = self.held, []
            for action in held:
                self.perform(action)

    def perform(self, action: actions.Action) -> None:
        match action:
            case actions.Open():
                self._open(action.job, action.attempt, action.workers)
            case actions.Run():
                self.nodes.run(action)
            case actions.Quit():
                self.nodes.quit(action)
            case actions.Drain():
                self.attempts.drain(action.job, action.attempt, action.because)
            case actions.Stop():
                self.attempts.stop(action.job, action.attempt, action.because)
            case actions.Bury():
                self.attempts.bury(action.job, action.attempt, action.slot, action.because)
            case actions.Close():
                self.attempts.close(action.job, action.attempt)
            case actions.Discard():
                log.info("job deleted", job=action.job, because=action.because)
                self.remains.discard(action.job)
            case actions.Finish():
                log.info("job over", job=action.job, state=action.state.name, because=action.because)

    def _open(self, job: JobId, attempt: int, workers: int) -> None:
        self.attempts.open(job, attempt, workers, self._submission(job))

    def _submission(self, job: JobId) -> Submission:
        return self.docket.facts.records[job].accepted.submission

    def work(self, job: JobId, attempt: int) -> Work | None:
        """What a node needs to know."""
        record = self.docket.facts.records.get(job)
        if record is None:
            return None
        asked = record.accepted.submission
        archive_at = str(archive_file(self.folder, asked.archive)) if asked.archive else ""
        return Work(
            run_dir=str(self.attempts.run_dir(job, attempt)),
            mark=self.mark,
            coordinator=list(self.endpoint.addresses),
            settings=chosen(asked),
            environment=asked.environment,
            script=asked.script,
            args=asked.args,
            folder=asked.folder,
            archive=asked.archive or "",
            archive_at=archive_at,
            gpus=asked.gpus,
            cpus=asked.cpus,
            memory_mb=asked.memory_mb,
            shard_memory_mb=asked.shard_memory_mb,
        )

    # -- time -------------------------------------------------------------------------------------------

    def look_again(self) -> None:
        """Come back when time will have done something, or when there may be room in the journal again."""
        after_s = inf
        if not self.docket.settled():
            after_s = ROOM_S
        elif (deadline := self.machine.next_deadline()) is not None:
            after_s = deadline - self.docket.now
        self.vigil.look_at(asyncio.get_running_loop().time() + after_s)

    def soon(self, after_s: float = 0.0) -> None:
        """A round is due, as soon as the former one was long enough ago."""
        loop = asyncio.get_running_loop()
        at = max(loop.time() + after_s, self.rested_until)
        if self.round_timer is not None:
            if self.round_at <= at:
                return
            self.round_timer.cancel()
        if not self.abandoned:
            self.round_at, self.round_timer = at, loop.call_at(at, self._round)

    def greet(self) -> None:
        """Whoever has just come begins at once, if that is no business of anybody else's."""
        if self.greeting is None and not self.abandoned:
            loop = asyncio.get_running_loop()
            self.greeting = loop.call_at(max(loop.time(), self.greeted_until), self._greet)

    def _greet(self) -> None:
        self.greeting = None
        if self._returning() or self.newcomers.waits(self.endpoint.catch_up()):
            self.greeting = asyncio.get_running_loop().call_later(BUSY_S, self._greet)
            return
        begin, decisions = time.perf_counter(), None
        if self.docket.settled():
            decisions = self.machine.decide_fresh(self.policy, self.docket.now, self.quotas)
        if decisions is None:
            self.soon()  # it looks again and again
        else:
            self._carry_out(decisions)
        took = time.perf_counter() - begin
        if decisions:
            self.greet_s.append(took)
        rest_s = max(GREET_S, GREET_SHARE * min(self.greet_s, default=0.0))
        self.greeted_until = asyncio.get_running_loop().time() + took + rest_s  # uvloop's clock stood still

    def _carry_out(self, decisions: list[events.Decision]) -> None:
        decided: list[actions.Action] = []
        for decision in decisions:
            decided += self.docket.event(decision)
        self._act(decided)
        if decisions:
            self.look_again()
            self.wake()

    def _round(self) -> None:
        self.round_timer = None
        if self.planning is not None:
            self.round_due = True
            return
        began, machine = time.perf_counter(), self.machine
        if not self.docket.settled():
            self._rest(began)
        elif again := machine.replacements():
            self._carry_out(again)
            self._rest(began)
        elif self._returning() or self.rounds.waits(self.endpoint.catch_up()):
            self.soon(BUSY_S)
        else:
            view = machine.look(
                self.docket.now,
                quotas=self.quotas,
                shares=self.shares,
                profiles=self.profiles.of(machine.cluster, self.docket.now),
            )
            # In a thread, so that whoever talks to this process does not wait for a plan over all jobs.
            loop = asyncio.get_running_loop()
            self.planning = loop.run_in_executor(self.planner, self.policy, view)
            self.held_s.append(time.perf_counter() - began)
            self.planning.add_done_callback(lambda planned: self._planned(planned, began))

    def _returning(self) -> bool:
        """Are nodes still awaited that were here before this process?"""
        return bool(self.machine.unheard) and asyncio.get_running_loop().time() < self.returned_by

    def _planned(self, planned: asyncio.Future[Plan], began: float) -> None:
        self.planning = None
        if self.abandoned or planned.cancelled():
            return
        again = time.perf_counter()
        if (mistake := planned.exception()) is not None:
            log.error("no plan", because=f"{type(mistake).__name__}: {mistake}", exc_info=mistake)
        elif self.docket.settled():
            self._carry_out(self.machine.agree(planned.result()))
        self.held_s.append(time.perf_counter() - again)
        self._rest(began)

    def _rest(self, began: float) -> None:
        """Until the next round."""
        took = time.perf_counter() - began  # uvloop's clock stands still meanwhile
        self.round_s.append(took)
        self.rested_until = asyncio.get_running_loop().time() + max(ROUND_S, ROUND_SHARE * took)
        waits = [
            job.not_before - self.docket.now
            for job in self.machine.cluster.jobs.values()
            if job.attempt is None and job.not_before > self.docket.now
        ]
        due, self.round_due = self.round_due, False
        self.soon(0.0 if due else min([AGAIN_S, *waits]))

    def beside(self, work: Callable[[], bool], then: Callable[[bool], None]) -> None:
        """Do this in a thread, and then that in this one, unless nobody is here any more."""

        def done(future: asyncio.Future[bool]) -> None:
            if not self.abandoned and not future.cancelled():
                mistake = future.exception()
                if mistake is not None:
                    log.error("not written", because=f"{type(mistake).__name__}: {mistake}", exc_info=mistake)
                then(mistake is None and future.result())

        asyncio.get_running_loop().run_in_executor(self.writer, work).add_done_callback(done)

    def figures(self) -> dict[str, float]:
        """How it goes, for whoever measures: the rounds since this was asked last, and how long each step of them held
        everybody else up."""
        found: dict[str, float] = {"rounds": len(self.round_s)}
        for what, times in (("round", self.round_s), ("held", self.held_s)):
            took = sorted(times)
            times.clear()
            for name, share in (("p50", 0.5), ("p99", 0.99), ("most", 1.0)):
                at = min(len(took) - 1, int(share * len(took)))
                found[f"{what}_{name}_ms"] = 1e3 * took[at] if took else 0.0
        return {
            "jobs": len(self.machine.cluster.jobs),
            "nodes": len(self.machine.cluster.nodes),
            "attempts": len(self.attempts.lives),
            "tasks": len(asyncio.all_tasks()),
            **found,
        }

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    # -- messages ---------------------------------------------------------------------------------------

    def handle(self, peer: str, message: Struct, payload: memoryview | None) -> Any:
        """A node's own message, or one of an attempt's members, which goes to the attempt's coordinator."""
        if isinstance(message, NodeBeat | Want | Output):
            return self.nodes.handle(peer, message, payload)
        if isinstance(message, Offer | Ceased | Goodbye):
            self.settle()
            answer = self.nodes.handle(peer, message, payload)
            self.settle()
            return answer
        name = JobId(getattr(message, "job", ""))
        life = self.attempts.lives.get(name)
        if life is not None and life.coordinator is not None:
            return life.coordinator.handle(peer, message, payload)
        if life is not None and not life.over:
            raise Refusal(NO_ROOM, f"attempt {name} is being read")  # to be asked again
        if name and peer not in self.seen_off:  # it did not hear of the end
            if len(self.seen_off) >= MOST_STRANGERS:
                self.seen_off.clear()
            self.seen_off.add(peer)
            self.nodes.orders.stranger(peer, Stop(name, "the job is over"))
        if not name:
            raise Refusal("job", "this coordinator serves many jobs: offer machines with `zml node`")
        raise Refusal("job", f"no attempt {name} runs here")

    def settle(self) -> None:
        """What has changed is written. Raises Refusal where it cannot be."""
        if not self.docket.settled():
            raise Refusal(NO_ROOM, self.docket.trouble)
