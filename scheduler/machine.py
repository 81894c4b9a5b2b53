"""The coordinator's decisions for all its jobs: `handle(event, now) -> [Action]`, and `next_deadline()`.

The machine is the only writer of the state. Which event does what in which state is the table EVENTS; an event without
an entry there, or from a former incarnation, is `Ignored` and changes nothing. Where a job goes from there, by way of
FINISHING, is in the tables of `state`. Both, as `table()` prints them:

                 FORMING       RUNNING          DRAINING         FINISHING
    Joined       found         welcome          turn away        turn away
    Renewed      renew         renew            renew            renew
    Exited       script ended  script ended     script ended     goodbye
    Left         leave         leave            leave            goodbye
    Lost         lose          lose             lose             goodbye
    Died         lose          lose             lose             goodbye
    DrainAsked   cancel        drain            -                -
    Cancelled    cancel        cancel           cancel           give up
    Registered   -             register         register         -
    Loaded       -             load             load             -
    Returned     -             resume           resume           -
    BackupReady  -             back up          back up          -
    BackupLost   -             expose           expose           -
    Vacating     -             vacate           vacate           -
    NotPromoted  -             not promoted     not promoted     -
    TimeUp       -             give up waiting  give up waiting  time up

                                        FORMING    RUNNING    DRAINING
    everybody asked for is here         RUNNING    -          -
    a drain was asked for               -          DRAINING   -
    an end was asked for                CANCELLED  CANCELLED  CANCELLED
    a script failed                     FAILED     FAILED     FAILED
    a layout is not acceptable          -          FAILED     FAILED
    a shard does not come back          -          FAILED     FAILED
    workers gone, some finished         SUCCEEDED  SUCCEEDED  -
    workers gone, in order              -          CANCELLED  CANCELLED
    workers gone, and nobody came back  FAILED     FAILED     FAILED

Rules: a worker's script is launched when its agent has joined, and waits in `zml.join` until the job begins: when all
workers and shards asked for are members. From then on nobody waits for a worker that is gone: the generation goes up,
the shards are told, the others go on. Only if nobody else is left it waits, `return_s` at most, for a worker that was
lost to come back. The first script that fails ends the job with its exit code. A shard that is gone is waited for,
where nobody else has its chunks: its next incarnation must show that it has them, or the process that reads its log
when time is up. Where its backup is up to date, that one serves instead, and nobody waits for the process that is gone
(`homes`).

A machine can die and go on as another: what `tell` is told, told again in the same order to one that is `unwatched`,
makes the same state, and `watch` gives everybody a lease again. Who was heard and when is in no journal.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeAlias

from . import explain, ring
from .actions import (
    Action,
    Admit,
    Announce,
    Drain,
    Fence,
    Finish,
    Ignored,
    Initialise,
    Launch,
    Place,
    Refuse,
    Stop,
)
from .admission import grows, place_for, why_stranger
from .events import (
    BackupLost,
    BackupReady,
    Cancelled,
    Died,
    DrainAsked,
    Event,
    Exited,
    Finding,
    FromMember,
    Joined,
    Left,
    Loaded,
    Lost,
    NotPromoted,
    Registered,
    Renewed,
    Returned,
    Submitted,
    Ticked,
    TimeUp,
    Vacating,
)
from .explain import counted
from .going_on import GoingOn
from .homes import Home
from .housing import EXIT_LOST, Housing
from .ids import ChunkKey, JobId, MemberId, Name, ShardId, WorkerId, as_member, member_id
from .leases import Leases
from .looking import Looking
from .membership import Alive, Fate, Gone, how_it_ended, role_of
from .rules import Rules
from .state import (
    NEXT,
    OUTCOME,
    Cause,
    Draining,
    Finishing,
    Forming,
    Job,
    Layout,
    Loading,
    Over,
    Ready,
    Return,
    Running,
    State,
    Unknown,
)

# 65 thousand million parameters. A peer names the number, and the placement allocates by it.
MOST_CHUNKS = 1_000_000

# What the job's command ends with; the user's own script may end with any other.
EXIT_LAYOUT = 1
EXIT_DRAINED = 75  # EX_TEMPFAIL: safe to run again
EXIT_CANCELLED = 130

Actions: TypeAlias = Iterator[Action]


class Machine(Housing, Looking, GoingOn):
    """All jobs of one coordinator. Invariants: `check()`."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.jobs: dict[JobId, Job] = {}  # not over
        self.over: dict[JobId, Over] = {}  # the latest `remembered_jobs`, the oldest first
        self.leases = Leases(rules)  # one of every member that is alive
        self.goodbyes: dict[JobId, float] = {}  # exactly the jobs that are FINISHING: until when
        # Exactly the jobs that are RUNNING without a worker: until when, and how they end if none comes back.
        self.returns: dict[JobId, Return] = {}

    # -- in and out ----------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Action]:
        """It is `now`, and this happened. Returns what to do, in this order. `now` never goes back."""
        self.leases.look(now)
        heard = (
            self.tell(event, now) if isinstance(event, Renewed) else []
        )  # at last, before its lease is looked at
        actions = [*heard]
        while (finding := self.finding(now)) is not None:
            actions += self.tell(finding, now)
        return actions if isinstance(event, Renewed) else [*actions, *self.tell(event, now)]

    def finding(self, now: float, unread_s: float = 0.0) -> Finding | None:
        """What time alone has done and nobody has been told yet: to be told to `tell`, and then to be asked again.
        `unread_s`: for so long members may have been heard, and nobody has listened yet."""
        self.leases.look(now)
        if (ended := self.leases.first_ended(unread_s)) is not None:
            job, member = ended.key
            return Lost(job, member, f"silent for {ended.silent_s:.1f} s")
        return next((TimeUp(job) for job, until in self._waits() if until <= now), None)

    def tell(self, event: Event | Finding, now: float) -> list[Action]:
        """This alone happened; what time has done is asked for with `finding`."""
        self.leases.look(now)
        return [*self._take(event, now)]

    def put_off(self, job: JobId, now: float) -> None:
        """FINISHING, and what its end waits for goes on: the time for that begins anew."""
        if job in self.goodbyes:
            self.goodbyes[job] = max(self.goodbyes[job], now + self.rules.goodbye_s)

    def next_deadline(self) -> float | None:
        """When to come with `Ticked`, if nothing happens before: the earliest end of a lease or of a patience."""
        ends = [until for _, until in self._waits()]
        if (lease := self.leases.next_deadline()) is not None:
            ends.append(lease)
        return min(ends, default=None)

    def _take(self, event: Event | Finding, now: float) -> Actions:
        """Look the event up in the table."""
        if isinstance(event, Ticked):
            return
        job = self.jobs.get(event.job)
        if isinstance(event, Submitted):
            yield from self._submit(event)
        elif job is None:
            yield self._too_late(event)
        elif (handler := EVENTS[job.state].get(type(event))) is None:
            yield Ignored(job.id, f"{type(event).__name__} means nothing to a job that is {job.state.name}")
        elif isinstance(event, FromMember) and (because := why_stranger(job, event)):
            yield Ignored(job.id, because)
        else:
            yield from handler(self, job, event, now)

    def _submit(self, event: Submitted) -> Actions:
        if event.job in self.jobs or event.job in self.over:
            yield Ignored(event.job, f"job {event.job} was submitted before")
            return
        self.jobs[event.job] = Job(
            event.job,
            event.workers,
            event.shards,
            event.staleness,
            resumed=event.resumed,
            replicas=event.replicas,
        )

    def _too_late(self, event: Event | Finding) -> Action:
        over = self.over.get(event.job)
        because = f"there is no job {event.job}"
        if over is not None:
            because = f"job {event.job} is over ({over.state.name}: {over.because})"
        if isinstance(event, Joined):
            return Refuse(event.job, event.peer, because)
        return Ignored(event.job, because)

    # -- joining -------------------------------------------------------------------------------------

    def _found(self, job: Job, event: Joined, now: float) -> Actions:
        """FORMING: one more; with the last of those asked for, the job begins."""
        name = place_for(job, event, self.leases)
        if not isinstance(name, Name):
            yield name
            return
        yield from self._admit(job, name, event.peer)
        if name.role == "worker":
            # It may take as long to load as the shards that are to come.
            record = job.members.alive("worker")[member_id(name)]
            worker = WorkerId(member_id(name))
            yield Launch(job.id, worker, record.incarnation, f"{worker}#{record.incarnation} joined")
        yield from self._may_begin(job, now)

    def _may_begin(self, job: Job, now: float) -> Actions:
        """FORMING: if all who are asked for are here, and not all workers have come to their end already."""
        if job.missing_workers:
            return
        if not job.members.workers():
            cause, exit_code = self._no_worker_left(job, job.members.gone("worker")[-1][1])
            yield from self._finish(job, cause, exit_code, explain.outcome(job), now)
            return
        if job.missing_shards:
            return
        job.members.found()
        job.generation = 1
        self._move(job, Cause.COMPLETE, Running(Unknown()))
        because = f"{counted(job.workers, 'worker')} and {counted(job.shards, 'shard')} are here"
        yield Announce(job.id, job.generation, job.members.seats(), because)
        for member, record in job.members.alive("shard").items():
            job.homes[ShardId(member)] = Home(ShardId(member), record.incarnation, member)
        yield from self._spread(job, now)

    def _welcome(self, job: Job, event: Joined, now: float) -> Actions:
        """RUNNING: a worker comes late, or again; or a shard comes again, or is one more."""
        name = place_for(job, event, self.leases)
        if not isinstance(name, Name):
            yield name
            return
        if grows(job, name):
            yield from self._grow(job, name, event.peer, now)
            return
        if name.role == "shard":
            yield from self._readmit(job, name, event.peer, now)
            return
        self.returns.pop(job.id, None)
        job.generation += 1
        yield from self._admit(job, name, event.peer)
        seat = job.members.seats()[-1]
        because = f"{seat.worker}#{seat.incarnation} joined"
        yield Announce(job.id, job.generation, job.members.seats(), because)
        yield from self._initialise_again(job, because)
        yield Launch(job.id, seat.worker, seat.incarnation, because)

    def _give_up_waiting(self, job: Job, event: TimeUp, now: float) -> Actions:
        """Whoever was to come back has had its time."""
        # A journal tells that it was so, by the rules of then: by today's it may be due later.
        now = max(now, min((by for name, by in self._waits() if name == job.id), default=now))
        if any(until <= now for until in job.away.values()):
            yield from self._do_without(job, now)
        elif job.id in self.returns:
            back = self.returns[job.id]
            yield from self._finish(job, back.cause, back.exit_code, explain.outcome(job), now)

    def _waits(self) -> Iterator[tuple[JobId, float]]:
        """Who waits for somebody, and until when."""
        yield from self.goodbyes.items()
        yield from ((job.id, min(job.away.values())) for job in self.jobs.values() if job.away)
        yield from ((job, back.by) for job, back in self.returns.items())

    def _turn_away(self, job: Job, event: Joined, now: float) -> Actions:
        if event.role == "shard" and isinstance(job.phase, Draining):
            yield from self._welcome(job, event, now)
            return
        doing = "being drained" if isinstance(job.phase, Draining) else "finishing"
        yield Refuse(job.id, event.peer, f"job {job.id} is {doing}: {explain.why(job)}")

    def _admit(self, job: Job, name: Name, peer: str) -> Actions:
        former = job.members.records.get(member_id(name))
        if isinstance(former, Alive):
            again = f"{member_id(name)} joined again as incarnation {former.incarnation + 1}"
            # Fence before admit: until then the id still stands for the former process.
            yield Fence(job.id, member_id(name), former.incarnation, again)
            self._close(job, member_id(name), Fate.LOST, again, EXIT_LOST)
        member, record = job.members.admit(name, peer)
        self.leases.grant((job.id, member))
        because = f"job {job.id} has a place for a {name.role}"
        yield Admit(job.id, peer, member, record.incarnation, job.generation, because)

    # -- the parameters ------------------------------------------------------------------------------

    def _register(self, job: Job, event: Registered, now: float) -> Actions:
        """A script shows its layout: the first one counts, the others must show the same."""
        assert isinstance(job.phase, Running | Draining)
        parameters = job.phase.parameters
        if not isinstance(parameters, Unknown):
            layout = parameters.layout
            if event.digest != layout.digest:
                because = f"{event.worker} and {layout.shown_by} show different models or optimizers"
                yield from self._refuse_layout(job, event, because, now)
            return
        if not 1 <= event.chunks <= MOST_CHUNKS:
            because = (
                f"{event.worker} shows a model of {event.chunks:,} chunks, of 1 to {MOST_CHUNKS:,} possible"
            )
            yield from self._refuse_layout(job, event, because, now)
            return
        because = f"{event.worker} shows a model of {counted(event.chunks, 'chunk')}"
        chunks = [ChunkKey(str(index)) for index in range(event.chunks)]
        yield Place(job.id, ring.place(chunks, self.shards(job.id)), because)
        layout = Layout(event.digest, event.chunks, WorkerId(event.worker))
        if job.resumed:
            job.phase = replace(job.phase, parameters=Ready(layout))
            return
        yield from self._initialise(job, job.phase, layout, because)

    def _refuse_layout(self, job: Job, event: Registered, because: str, now: float) -> Actions:
        record = job.members.records[WorkerId(event.worker)]
        assert isinstance(record, Alive)
        yield Refuse(job.id, record.peer, because)
        yield from self._finish(job, Cause.LAYOUT_REFUSED, EXIT_LAYOUT, because, now)

    def _initialise(self, job: Job, phase: Running | Draining, layout: Layout, because: str) -> Actions:
        """The most senior worker brings the first parameters."""
        senior = job.members.seats()[0]
        job.phase = replace(phase, parameters=Loading(layout, senior.worker, senior.incarnation))
        yield Initialise(job.id, senior.worker, because)

    def _initialise_again(self, job: Job, because: str) -> Actions:
        """If the parameters are still to come, and not from a worker that is gone."""
        assert isinstance(job.phase, Running | Draining)
        match job.phase.parameters:
            case Loading(layout, initialiser, incarnation):
                if (initialiser, incarnation) != job.members.seats()[0][:2]:
                    yield from self._initialise(job, job.phase, layout, because)

    def _load(self, job: Job, event: Loaded, now: float) -> Actions:
        assert isinstance(job.phase, Running | Draining)
        parameters = job.phase.parameters
        if isinstance(parameters, Loading) and parameters.initialiser == event.worker:
            job.phase = replace(job.phase, parameters=Ready(parameters.layout))
        elif not isinstance(parameters, Ready):
            yield Ignored(job.id, f"{event.worker} was not asked to bring the first parameters")

    # -- staying and leaving -------------------------------------------------------------------------

    def _renew(self, job: Job, event: Renewed, now: float) -> Actions:
        self.leases.renew((job.id, as_member(event.member)), event.times)
        return iter(())

    def _lose(self, job: Job, event: Lost | Died, now: float) -> Actions:
        """A lease has ended, or a process, whose last words are refused too."""
        member = as_member(event.member)
        yield Fence(job.id, member, job.members.records[member].incarnation, event.because)
        back_by = now + self.rules.return_s
        gone = self._close(job, member, Fate.LOST, event.because, EXIT_LOST, back_by)
        yield from self._go_on(job, member, gone, now)

    def _leave(self, job: Job, event: Left, now: float) -> Actions:
        """An orderly goodbye."""
        member = as_member(event.member)
        yield from self._go_on(job, member, self._close(job, member, Fate.LEFT, event.because), now)

    def _script_ended(self, job: Job, event: Exited, now: float) -> Actions:
        worker = as_member(event.worker)
        exit_code = 128 + event.signal if event.signal else event.code
        if event.returns:  # its agent lives on, and needs no order to stop
            gone = self._close(job, worker, Fate.LOST, event.because, exit_code, now + self.rules.return_s)
            yield from self._go_on(job, worker, gone, now)
            return
        if event.signal or event.is_loss:
            gone = self._close(job, worker, Fate.LOST, event.because, exit_code)
        elif event.code:
            gone = self._close(job, worker, Fate.FAILED, event.because, event.code)
        else:
            gone = self._close(job, worker, Fate.DONE, event.because)
        yield Stop(job.id, worker, event.because)
        yield from self._go_on(job, worker, gone, now)

    def _go_on(self, job: Job, member: MemberId, gone: Gone, now: float) -> Actions:
        """One fewer: the others go on, or the job cannot."""
        because = how_it_ended(member, gone)
        if isinstance(job.phase, Forming) and gone.fate is not Fate.FAILED:
            yield from self._may_begin(job, now)  # who has come to its end for good is not waited for
            return
        if role_of(member) == "shard":
            for shard, _ in self.served_by(job.id, ShardId(member)):
                job.away.pop(shard, None)  # one that died while it read its log has its whole time again
            yield from self._unhouse(job, ShardId(member), because, now)
        elif gone.fate is Fate.FAILED:
            yield from self._finish(job, Cause.SCRIPT_FAILED, gone.exit_code, because, now)
        elif not job.members.workers():
            yield from self._without_workers(job, gone, because, now)
        else:
            job.generation += 1
            yield Announce(job.id, job.generation, job.members.seats(), because)
            yield from self._initialise_again(job, because)

    def _without_workers(self, job: Job, last: Gone, because: str, now: float) -> Actions:
        """Nobody computes: wait for who may come back, or end."""
        cause, exit_code = self._no_worker_left(job, last)
        back_by = max((gone.back_by or now for _, gone in job.members.gone("worker")), default=now)
        if back_by <= now or cause is Cause.WORKERS_DONE or not isinstance(job.phase, Running):
            yield from self._finish(job, cause, exit_code, explain.outcome(job), now)
            return
        self.returns[job.id] = Return(back_by, cause, exit_code)
        job.generation += (
            1  # the shards are to take nothing from a former self, though nobody takes its place yet
        )
        yield Announce(job.id, job.generation, (), because)

    def _no_worker_left(self, job: Job, last: Gone) -> tuple[Cause, int]:
        fates = {gone.fate for _, gone in job.members.gone("worker")}
        if isinstance(job.phase, Draining) and fates & {Fate.DONE, Fate.LEFT}:
            return Cause.WORKERS_DRAINED, EXIT_DRAINED
        if Fate.DONE in fates:
            return Cause.WORKERS_DONE, 0
        if isinstance(job.phase, Running) and last.fate is Fate.LEFT:
            return Cause.WORKERS_DRAINED, EXIT_DRAINED
        loss = job.members.first_loss
        return Cause.WORKERS_LOST, loss.exit_code if loss is not None else EXIT_LOST

    # -- ending --------------------------------------------------------------------------------------

    def _drain(self, job: Job, event: DrainAsked, now: float) -> Actions:
        assert isinstance(job.phase, Running)
        if job.id in self.returns:  # there is nobody to finish a step
            yield from self._finish(job, Cause.WORKERS_DRAINED, EXIT_DRAINED, event.because, now)
            return
        self._move(job, Cause.DRAIN_ASKED, Draining(job.phase.parameters, event.because))
        yield Drain(job.id, event.because)

    def _cancel(self, job: Job, event: DrainAsked | Cancelled, now: float) -> Actions:
        yield from self._finish(job, Cause.CANCEL_ASKED, EXIT_CANCELLED, event.because, now)

    def _finish(self, job: Job, cause: Cause, exit_code: int, because: str, now: float) -> Actions:
        """Everybody is to stop; the job is over when all have, or have had their time."""
        until = now + self.rules.goodbye_s
        self._move(job, cause, Finishing(cause, exit_code, because, until))
        for soon_over in (job.away, job.promoting, job.backups, job.copying):
            soon_over.clear()
        self.returns.pop(job.id, None)
        self.goodbyes[job.id] = until
        for member in job.members.everybody():
            yield Stop(job.id, member, because)
        if not job.members.everybody():
            yield from self._end(job, "")

    def _goodbye(self, job: Job, event: Left | Lost | Died | Exited, now: float) -> Actions:
        """FINISHING: one of those who were to stop has stopped, in whatever way."""
        member = as_member(event.worker if isinstance(event, Exited) else event.member)
        self._close(job, member, Fate.STOPPED, explain.why(job))
        if not job.members.everybody():
            yield from self._end(job, "")

    def _give_up(self, job: Job, event: Cancelled, now: float) -> Actions:
        """FINISHING: asked once more, nobody is waited for any longer."""
        yield from self._end(job, event.because)

    def _time_up(self, job: Job, event: TimeUp, now: float) -> Actions:
        yield from self._end(job, f"it did not stop within {self.rules.goodbye_s:g} s")

    def _end(self, job: Job, because: str) -> Actions:
        """The last of a job: what is left of it is a record. `because` is why those still alive are not waited for."""
        assert isinstance(job.phase, Finishing)
        phase = job.phase
        for member in job.members.everybody():
            self._close(job, member, Fate.STOPPED, because)
        del self.jobs[job.id], self.goodbyes[job.id]
        records = {member: gone for member, gone in job.members.records.items() if isinstance(gone, Gone)}
        state = OUTCOME[phase.cause]
        self.over[job.id] = Over(
            job.id, state, phase.cause, phase.exit_code, phase.because, job.generation, records
        )
        while len(self.over) > self.rules.remembered_jobs:
            del self.over[next(iter(self.over))]
        yield Finish(job.id, state, phase.exit_code, phase.because)

    # -- the two ways in which state changes -----------------------------------------------------------

    def _move(self, job: Job, cause: Cause, phase: Running | Draining | Finishing) -> None:
        assert NEXT[job.state].get(cause) is phase.state, f"{job.state} -> {phase.state} by {cause}"
        job.phase = phase

    def _close(
        self,
        job: Job,
        member: MemberId,
        fate: Fate,
        because: str,
        exit_code: int = 0,
        back_by: float | None = None,
    ) -> Gone:
        """A member ends, and its lease with it."""
        if (job.id, member) in self.leases:
            self.leases.drop((job.id, member))
        return job.members.end(member, fate, because, exit_code, back_by)


Handler: TypeAlias = Callable[..., Actions]
M = Machine

EVENTS: dict[State, dict[type, Handler]] = {
    State.FORMING: {
        Joined: M._found,
        Renewed: M._renew,
        Exited: M._script_ended,
        Left: M._leave,
        Lost: M._lose,
        Died: M._lose,
        DrainAsked: M._cancel,
        Cancelled: M._cancel,
    },
    State.RUNNING: {
        Joined: M._welcome,
        Renewed: M._renew,
        Registered: M._register,
        Loaded: M._load,
        Returned: M._resume,
        BackupReady: M._back_up,
        BackupLost: M._expose,
        Vacating: M._vacate,
        NotPromoted: M._not_promoted,
        Exited: M._script_ended,
        Left: M._leave,
        Lost: M._lose,
        Died: M._lose,
        DrainAsked: M._drain,
        Cancelled: M._cancel,
        TimeUp: M._give_up_waiting,
    },
    State.DRAINING: {
        Joined: M._turn_away,
        Renewed: M._renew,
        Registered: M._register,
        Loaded: M._load,
        Returned: M._resume,
        BackupReady: M._back_up,
        BackupLost: M._expose,
        Vacating: M._vacate,
        NotPromoted: M._not_promoted,
        Exited: M._script_ended,
        Left: M._leave,
        Lost: M._lose,
        Died: M._lose,
        Cancelled: M._cancel,
        TimeUp: M._give_up_waiting,
    },
    State.FINISHING: {
        Joined: M._turn_away,
        Renewed: M._renew,
        Exited: M._goodbye,
        Left: M._goodbye,
        Lost: M._goodbye,
        Died: M._goodbye,
        Cancelled: M._give_up,
        TimeUp: M._time_up,
    },
}
"""Which event does what in which state. `Submitted` makes a job, `Ticked` only lets time be looked at."""


def table() -> str:
    """Both tables for people; the head of this module is compared with it."""
    return explain.table(EVENTS)
