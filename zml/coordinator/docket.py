"""The coordinator's docket: all that it must not forget, and the journal in which that is written.

One small method for each thing that can happen. Each changes the state, writes the change down, and returns the answer;
what the journal has no room for yet waits there, and no answer may be given before `settled`. What changed nothing is
not written. Read again in order, the records make the same state: who is a member and why (the machine), who computes
which batch (the ledger), and what is in neither (`Facts`). Times are the machine's own, which goes on from the last
record when another process takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ..journal import Entry, Journal
from ..messages import Finished
from ..scheduler import actions, batches, calls, epoch, events
from ..scheduler.ids import JobId, WorkerId, as_member
from ..scheduler.looking import changed
from ..scheduler.machine import Machine
from ..scheduler.membership import Fate, Gone
from ..scheduler.plain import NotPlain, build, build_fields, plain, plain_fields
from ..scheduler.state import Draining, Job, Kept, Ready, Running
from ..tracing import on as tracing_on
from ..tracing.trees import Recoveries
from .facts import FACTS, Claimed, Fact, Facts, Owed, Spoke

EVENTS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        events.Submitted,
        events.Joined,
        events.Registered,
        events.Loaded,
        events.Returned,
        events.BackupReady,
        events.BackupLost,
        events.Vacating,
        events.NotPromoted,
        events.Exited,
        events.Left,
        events.Died,
        events.DrainAsked,
        events.Cancelled,
        events.Lost,
        events.TimeUp,
    )
}
LEDGER_STATE: dict[str, Any] = {
    "epoch": int,
    "incarnations": dict[WorkerId, int],
    "present": list[WorkerId],
    "current": epoch.Pass | None,
    "draining": str | None,
    "reissued": int,
    "samples": int,
}
NEWS = "news"  # says something of the last call, and nothing of the next


class Docket:
    """See the module. Without a journal nothing is written, and everything is settled."""

    def __init__(
        self, job: JobId, machine: Machine, journal: Journal | None, clock: Callable[[], float]
    ) -> None:
        """Reads the journal; raises ZmlError that names the record which cannot be. `machine` is fresh."""
        self.machine = machine
        self.journal = journal
        self.ledger = batches.Ledger()
        self.facts = Facts()
        self.recoveries = Recoveries(job)
        self._clock = clock
        self._behind_s = 0.0  # the clock minus the machine's time
        self.resumed = journal is not None and not journal.empty
        if journal is not None and self.resumed:
            self._recover(journal)
        self.job = JobId(self.facts.begun.job) if self.facts.begun is not None else job

    @property
    def now(self) -> float:
        """The machine's time."""
        return self._clock() - self._behind_s

    def by_clock(self, at: float) -> float:
        """One of the machine's times, by the clock."""
        return at + self._behind_s

    def settled(self) -> bool:
        """Is everything written, so that answers may be given and orders sent?"""
        return self.journal is None or self.journal.settled()

    @property
    def trouble(self) -> str:
        """Why not."""
        return self.journal.trouble if self.journal is not None else ""

    @property
    def running(self) -> Job | None:
        """The job; None before it was submitted, and when it is over."""
        return self.machine.jobs.get(self.job)

    def has_finished(self, member: str, incarnation: int) -> bool:
        """Did this script come to its end?"""
        job = self.running
        record = job.members.records.get(as_member(member)) if job is not None else None
        return isinstance(record, Gone) and (record.incarnation, record.fate) == (incarnation, Fate.DONE)

    @property
    def loaded(self) -> bool:
        """Do the shards hold parameters?"""
        phase = self.running.phase if self.running is not None else None
        return isinstance(phase, Running | Draining) and isinstance(phase.parameters, Ready)

    # -- what happens ------------------------------------------------------------------------------------

    def event(self, event: events.Event | events.Finding) -> list[actions.Action]:
        """Tell the machine; returns what it orders, to be performed once that is settled."""
        now = self.now
        performed = self._tell(event, now)
        if tracing_on():
            job = self.running
            self.recoveries.look(job.away if job is not None and isinstance(job.phase, Running) else None)
        if changed(event, performed):
            self._write(f"event.{type(event).__name__}", plain_fields(event), now)
        return performed

    def fact(self, fact: Fact) -> None:
        self.facts.note(fact)
        self._write(f"fact.{type(fact).__name__}", msgspec.to_builtins(fact, builtin_types=(bytes,)))

    def owe(self, shard: str, step: Finished) -> None:
        """A shard is to count this step with its next roster."""
        if step not in self.to(shard):
            self.fact(Owed(shard, step, paid=False))

    def to(self, shard: str) -> Sequence[Finished]:
        return self.facts.owed.get(shard, ())

    def behind(self) -> list[str]:
        """Shards that are still to count something that others have."""
        return [shard for shard, steps in self.facts.owed.items() if steps]

    def paid(self, shard: str, step: Finished) -> None:
        if step in self.to(shard):
            self.fact(Owed(shard, step, paid=True))

    def claim(self, what: str, worker: str) -> str:
        """Who may write this file: whoever asked first."""
        if what not in self.facts.claims:
            self.fact(Claimed(what, worker))
        return self.facts.claims[what]

    def spoke(self, worker: str, peer: str) -> None:
        if self.facts.scripts.get(worker) != peer:
            self.fact(Spoke(worker, peer))

    def perform(self, call: calls.Call) -> batches.Answer:
        """Ask the ledger, and write down what has changed it."""
        answer = self.ledger.perform(call)
        if self.ledger.news:
            self._write(f"ledger.{type(call).__name__}", plain_fields(call))
        return answer

    # -- how the state changes, now and when it is read again ------------------------------------------------

    def _tell(self, event: events.Event | events.Finding, now: float) -> list[actions.Action]:
        self._release(event)
        performed = self.machine.tell(event, now)
        for action in performed:
            match action:
                case actions.Admit():
                    self.facts.peers[action.member] = action.peer
                case actions.Place():
                    self.facts.placement = action.placement
                case actions.Initialise():
                    self.facts.initialiser = action.worker
                case actions.Fence():
                    self._give_back(action.member)
        return performed

    def _release(self, event: events.Event | events.Finding) -> None:
        """A worker that does not come to the end of its script: others may write the files that it was to write."""
        match event:
            case events.Exited(worker=member) if event.code or event.signal:
                pass
            case events.Left(member=member):
                pass
            case _:
                return
        if self.machine.is_current(event.job, member, event.incarnation):
            self._give_back(member)

    def _give_back(self, member: str) -> None:
        claims = self.facts.claims
        for what in [what for what, owner in claims.items() if owner == member]:
            del claims[what]

    # -- the journal -----------------------------------------------------------------------------------------

    def _write(self, kind: str, fields: dict[str, Any], now: float | None = None) -> None:
        if self.journal is None:
            return
        self.journal.write(kind, self.now if now is None else now, fields)
        if self.journal.long:
            self.journal.shorten(self.snapshot())

    def snapshot(self) -> dict[str, Any]:
        """The whole state as plain data."""
        ledger = {name: value for name, value in vars(self.ledger).items() if name != NEWS}
        assert ledger.keys() == LEDGER_STATE.keys(), "the ledger has something that would be forgotten"
        return {
            "time": self.now,
            "machine": plain(self.machine.keep()),
            "ledger": plain(ledger),
            "facts": msgspec.to_builtins(self.facts, builtin_types=(bytes,)),
        }

    def _recover(self, journal: Journal) -> None:
        """Become what the journal says; the machine's time goes on from there, and nobody's lease does."""
        self.machine.unwatched()
        at = journal.read_back(self._restore, self._replay)
        self._behind_s = self._clock() - at

    def _restore(self, state: dict[str, Any]) -> float:
        self.machine.unwatched(build(Kept, state["machine"], "machine"))
        for name, kind in LEDGER_STATE.items():
            if name not in state["ledger"]:
                continue  # written before there was one
            setattr(self.ledger, name, build(kind, state["ledger"][name], f"ledger.{name}"))
        self.facts = msgspec.convert(state["facts"], Facts)
        return float(state["time"])

    def _replay(self, entry: Entry) -> None:
        group, _, name = entry.kind.partition(".")
        if group == "event" and name in EVENTS:
            self._tell(build_fields(EVENTS[name], entry.fields, name), entry.time)
        elif group == "ledger" and name in calls.KINDS:
            self.ledger.perform(build_fields(calls.KINDS[name], entry.fields, name))
        elif group == "fact" and name in FACTS:
            self.facts.note(msgspec.convert(entry.fields, FACTS[name]))
        else:
            raise NotPlain("its kind is not known; a newer zml may have written it")
