"""All that the coordinator of many jobs must not forget: the cluster machine's state and what was submitted.

As a job's own docket (`zml.coordinator.docket`): each thing that happens changes the state and is written down; read
again in order, the records make the same state. That is why the machine's rules are among them: another process may
have others. Times are seconds since 1970 by a clock that never goes back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec

from ..journal import Entry, Journal
from ..scheduler.cluster import actions, events, state
from ..scheduler.cluster.events import Outcome
from ..scheduler.cluster.lives import EXIT_TIMED_OUT
from ..scheduler.cluster.machine import HANDLERS, Machine
from ..scheduler.cluster.state import Then
from ..scheduler.explain import counted
from ..scheduler.ids import JobId
from ..scheduler.plain import NotPlain, build, build_fields, plain_fields
from . import snapshots
from .jobs import AttemptView, Decision, Submission

EVENTS: dict[str, type] = {kind.__name__: kind for kind in HANDLERS if kind is not events.NodeHeard}
Beside: TypeAlias = Callable[[Callable[[], bool], Callable[[bool], None]], None]
"""Do this while others go on, and say how it went."""
ENDINGS = {
    Outcome.FAILED: "has failed",
    Outcome.LOST: "was lost",
    Outcome.DRAINED: "has left in order",
    Outcome.CANCELLED: "was stopped",
}  # of attempts, in words; with a success the job is over
DECISIONS = 30  # of each job that are kept


class Accepted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Somebody's job was taken. Nothing is decided by it; who runs it needs to know."""

    job: str
    user: str
    key: str
    submission: Submission


class Record(msgspec.Struct):
    """What is known of a job beside the machine's state."""

    accepted: Accepted
    submitted_at: float
    attempts: list[AttemptView] = []
    decisions: list[Decision] = []


class Facts(msgspec.Struct):
    """What the records add up to."""

    number: int = 0  # of the latest job
    records: dict[str, Record] = {}
    keys: dict[str, str] = {}  # user and key -> job
    discarding: list[str] = []  # jobs that nobody knows any more, and whose files are not gone yet


class Docket:
    """Without a journal nothing is written, and everything is settled."""

    def __init__(
        self,
        machine: Machine,
        journal: Journal | None,
        run_dir: Callable[[str, int], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Reads the journal; raises ZmlError that names the record which cannot be. `machine` is fresh."""
        self.machine = machine
        self.journal = journal
        self.run_dir = run_dir
        self.facts = Facts()
        self.beside: Beside = lambda work, then: then(work())
        self.shortening = False  # a snapshot is being written
        self.resumed = journal is not None and not journal.empty
        rules = machine.rules
        last = self._recover(journal) if journal is not None and self.resumed else 0.0
        self._clock = clock
        self._offset = max(time.time(), last) - clock()
        if machine.cluster.rules != rules:
            self.event(events.Ruled(rules))

    @property
    def now(self) -> float:
        return self._clock() + self._offset

    def settled(self) -> bool:
        return self.journal is None or self.journal.settled()

    @property
    def trouble(self) -> str:
        return self.journal.trouble if self.journal is not None else ""

    # -- what happens --------------------------------------------------------------------------------------

    def event(self, event: events.Event) -> list[actions.Action]:
        """Tell the machine; returns what it orders, to be performed once that is settled."""
        now = self.now
        ordered = self._tell(event, now)
        if not (isinstance(event, events.NodeHeard) or is_nothing(ordered)):
            self._write(f"event.{type(event).__name__}", plain_fields(event), now)
        return ordered

    def accept(self, accepted: Accepted) -> bool:
        """False: there is no room to write it down, and nothing has changed."""
        now = self.now
        if self.journal is not None:
            self.journal.write("fact.Accepted", now, msgspec.to_builtins(accepted))
            if not self.journal.settled():
                self.journal.withdraw()
                return False
        self._accept(accepted, now)
        return True

    def discarded(self, job: str) -> None:
        """Its files are gone."""
        if job in self.facts.discarding:
            self.facts.discarding.remove(job)
            self._write("fact.Discarded", {"job": job}, self.now)

    def next_job(self) -> JobId:
        return JobId(f"j{self.facts.number + 1}")

    # -- how the state changes, now and when it is read again --------------------------------------------------

    def _accept(self, accepted: Accepted, now: float) -> None:
        self.facts.number = max(self.facts.number, int(accepted.job[1:]))
        self.facts.records[accepted.job] = Record(accepted, now)
        if accepted.key:
            self.facts.keys[f"{accepted.user}\0{accepted.key}"] = accepted.job

    def _tell(self, event: events.Event, now: float) -> list[actions.Action]:
        then = self._then(event) if isinstance(event, events.Ended) else None
        ordered = self.machine.tell(event, now)
        if not is_nothing(ordered):
            if isinstance(event, events.Ended):
                self._attempt_over(event, now, then)
            self._note_asked(event, now)
        for action in ordered:
            if isinstance(action, actions.Close):  # one that the machine itself has given up, too
                self._attempt_over(action, now)
                self._note_pause(action, now)
            elif isinstance(action, actions.Discard):
                self.facts.discarding.append(action.job)
                self._drop(action.job)
            elif (record := self.facts.records.get(action.job)) is not None:
                self._note(record, action, now)
        self._forget()
        return ordered

    def _note(self, record: Record, action: actions.Action, now: float) -> None:
        what = ""
        match action:
            case actions.Open():
                where = self.run_dir(action.job, action.attempt)
                view = AttemptView(number=action.attempt, run_dir=where, began_at=now)
                record.attempts = [*record.attempts, view]
                what = f"attempt {action.attempt} begins with {counted(action.workers, 'worker')}"
            case actions.Drain():
                what = "is drained"
            case actions.Stop():
                what = "is stopped"
            case actions.Finish():
                what = action.state.name
            case actions.Run() if action.slot[0] == "w":
                what = f"{action.slot} starts on {action.node}"
            case actions.Quit() if action.slot[0] == "w":
                what = f"{action.slot} leaves {action.node}"
            case actions.Bury():
                what = f"{action.slot} is gone"
        if what and not isinstance(action, actions.Ignored | actions.Close):
            note(record, now, what, action.because)

    def _note_asked(self, event: events.Event, now: float) -> None:
        """What people asked for; what is done about it follows by itself."""
        record = self.facts.records.get(getattr(event, "job", ""))
        if record is None:
            return
        match event:
            case events.PauseAsked() | events.CancelAsked():
                what = "pause" if isinstance(event, events.PauseAsked) else "cancel"
                note(record, now, f"{what} is asked for", event.because)
            case events.ResumeAsked():
                note(record, now, "resume is asked for", "it is to go on when its turn comes")
            case events.ScaleAsked():
                asked = counted(event.least, "worker")
                if event.least != event.most:
                    asked = f"{event.least}..{event.most} workers"
                note(record, now, "scale is asked for", f"it is to have {asked}")

    def _note_pause(self, closed: actions.Close, now: float) -> None:
        """Does the job wait before its next attempt?"""
        job, record = self.machine.cluster.jobs.get(closed.job), self.facts.records.get(closed.job)
        if record is not None and job is not None and job.attempt is None and job.not_before > now:
            because = "the loss of machines costs no retry"
            if closed.outcome is Outcome.FAILED:
                because = f"retry {job.failures} of {job.request.retries}"
            note(record, now, f"is tried again in {job.not_before - now:.0f} s", because)

    def _then(self, event: events.Ended) -> Then | None:
        """What is to follow on the attempt's end, if it was on its way out."""
        job = self.machine.cluster.jobs.get(event.job)
        leaving = job.attempt.leaving if job is not None and job.attempt is not None else None
        return leaving.then if leaving is not None else None

    def _attempt_over(
        self, event: events.Ended | actions.Close, now: float, then: Then | None = None
    ) -> None:
        record = self.facts.records.get(event.job)
        if record is None:
            return
        state: str = event.outcome.name
        code: int | None = event.exit_code
        if event.outcome is Outcome.CANCELLED and then not in (None, Then.CANCEL):
            # Nobody cancelled the job: its time was over, or it goes on in another attempt.
            state, code = ("TIMED_OUT", EXIT_TIMED_OUT) if then is Then.TIME_UP else ("STOPPED", None)
        goes_on = any(view.number == event.attempt and view.ended_at is None for view in record.attempts)
        if goes_on and event.outcome in ENDINGS:
            note(record, now, f"attempt {event.attempt} {ENDINGS[event.outcome]}", event.because)
        record.attempts = [
            msgspec.structs.replace(
                view,
                ended_at=now,
                state=state,
                because=event.because,
                exit_code=code,
            )
            if view.number == event.attempt and view.ended_at is None
            else view
            for view in record.attempts
        ]

    def _forget_unknown(self) -> None:
        """Whose submission was being written when the process died: nobody was told that it was taken."""
        cluster = self.machine.cluster
        for job in [job for job in self.facts.records if job not in cluster.jobs and job not in cluster.over]:
            self._drop(job)

    def _drop(self, job: str) -> None:
        accepted = self.facts.records.pop(job).accepted
        self.facts.keys.pop(f"{accepted.user}\0{accepted.key}", None)

    def _forget(self) -> None:
        """What the machine does not remember, nobody does."""
        cluster = self.machine.cluster
        if len(self.facts.records) <= len(cluster.jobs) + len(cluster.over) + 1:
            return
        gone = [job for job in self.facts.records if job not in cluster.jobs and job not in cluster.over]
        for job in gone[:-1]:  # the newest may be on its way in
            self._drop(job)

    # -- the journal ----------------------------------------------------------------------------------------------

    def _write(self, kind: str, fields: dict[str, Any], now: float) -> None:
        if self.journal is None:
            return
        self.journal.write(kind, now, fields)
        if (
            self.journal.long
            and not self.shortening
            and (number := self.journal.begin_snapshot()) is not None
        ):
            self.shortening = True
            journal, picture = self.journal, snapshots.take(self.machine.cluster, self.facts, self.now)
            self.beside(lambda: journal.write_snapshot(number, snapshots.told(picture)), self._shortened)

    def _shortened(self, done: bool) -> None:
        self.shortening = False
        if done and self.journal is not None:
            self.journal.drop_old()

    def _recover(self, journal: Journal) -> float:
        self.machine.unwatched()
        at = journal.read_back(self._restore, self._replay)
        self._forget_unknown()
        return at

    def _restore(self, found: dict[str, Any]) -> float:
        self.machine.become(build(state.Cluster, found["cluster"], "cluster"))
        self.facts = msgspec.convert(found["facts"], Facts)
        return float(found["time"])

    def _replay(self, entry: Entry) -> None:
        group, _, name = entry.kind.partition(".")
        if group == "event" and name in EVENTS:
            self._tell(build_fields(EVENTS[name], entry.fields, name), entry.time)
        elif entry.kind == "fact.Accepted":
            self._accept(msgspec.convert(entry.fields, Accepted), entry.time)
        elif entry.kind == "fact.Discarded":
            self.facts.discarding.remove(entry.fields["job"])
        else:
            raise NotPlain("its kind is not known; a newer zml may have written it")


def note(record: Record, now: float, what: str, because: str) -> None:
    """For `zml explain JOB`."""
    record.decisions = [*record.decisions, Decision(at=now, what=what, because=because)][-DECISIONS:]


def is_nothing(ordered: list[actions.Action]) -> bool:
    """Was the event ignored?"""
    return bool(ordered) and all(isinstance(action, actions.Ignored) for action in ordered)
