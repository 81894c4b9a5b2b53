"""What the members say of themselves, gathered for whoever looks: the job's status in words and numbers.

It decides nothing. Rates are taken over the last few seconds, values are means over the workers that reported lately.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from .errors import ZmlError
from .facts import Facts, Progressed
from .messages import Exited, Failure, JobSpec, Join, Joined, Report
from .scheduler import explain
from .scheduler.batches import Ledger
from .scheduler.state import Job, Over
from .status import JobStatus, MemberFailure, MemberStatus

RATE_S = 15.0  # samples per second are counted over this window
FRESH_S = 10.0  # older values are not part of the mean


@dataclass(slots=True)
class Card:
    """One member, as it described itself and as it was last heard."""

    role: str
    node: str
    device: str
    incarnation: int
    heard_at: float
    steps: int = -1
    epoch: int = -1
    staleness: int = 0
    samples: int = 0  # of all incarnations
    before: int = 0  # of the former ones
    values: dict[str, float] = field(default_factory=dict)
    reported_at: float = -1.0


class Board:
    """Cards of all members that ever joined, and the job's own numbers. Times are the loop's seconds."""

    def __init__(self, spec: JobSpec, failures: list[MemberFailure]) -> None:
        """`failures` grows as scripts fail."""
        self.spec = spec
        self.failures = failures
        self.cards: dict[str, Card] = {}
        self.epochs = 0
        self.started_at = time.time()
        self.training_since = math.inf  # when the first report came
        self.samples = 0
        self.counted: deque[tuple[float, int]] = (
            deque()
        )  # (when, samples in all), oldest first, within RATE_S

    def joined(self, join: Join, joined: Joined, now: float) -> None:
        card = Card(join.role, join.node, join.device, joined.incarnation, now)
        if (former := self.cards.get(joined.member)) is not None:
            again = former.incarnation == joined.incarnation  # the same process, whose answer was lost
            card.samples, card.before = former.samples, former.before if again else former.samples
        self.cards[joined.member] = card

    def recall(self, facts: Facts, now: float) -> None:
        """What was known before the coordinator was started again; the rest comes with the next reports."""
        for member, card in facts.entered.items():
            self.cards[member] = Card(card.role, card.node, card.device, card.incarnation, now)
        if facts.begun is not None:
            self.started_at = facts.begun.at
        if facts.progress is not None:
            self.epochs = facts.progress.epochs
            for member, (samples, before) in facts.progress.samples.items():
                self.cards[member].samples, self.cards[member].before = samples, before
                self.samples += samples
            self.training_since = now - facts.progress.training_s

    def progress(self, now: float) -> Progressed:
        """What `recall` needs of the members' reports; to be asked after the first of them."""
        samples = {member: (card.samples, card.before) for member, card in self.cards.items() if card.samples}
        return Progressed(samples, self.epochs, now - self.training_since)

    def heard(self, member: str, now: float) -> None:
        if member in self.cards:
            self.cards[member].heard_at = now

    def report(self, report: Report, now: float) -> None:
        self.training_since = min(self.training_since, now)
        card = self.cards[report.worker]
        card.steps, card.epoch, card.staleness = report.steps, report.epoch, report.staleness
        more = max(0, card.before + report.samples - card.samples)
        card.samples += more
        card.values = report.values or card.values
        card.reported_at = now
        self.epochs = max(self.epochs, report.epochs)
        self.samples += more
        self.counted.append((now, self.samples))
        while self.counted[0][0] < now - RATE_S:
            self.counted.popleft()

    def meant(self, exited: Exited, error: ZmlError) -> MemberFailure:
        """The script ended as `exited` says, and this is what that means."""
        told = exited.failure or Failure(kind="", at=time.time())
        step = max(0, self.cards[exited.member].steps)
        failure = msgspec.structs.replace(told, kind="ZmlError", text=str(error), step=step)
        return MemberFailure(member=exited.member, failure=failure)

    def status(self, record: Job | Over, ledger: Ledger, now: float) -> JobStatus:
        """The job as a whole. `now` is the loop's time."""
        views = [view for view in explain.members(record) if view.member in self.cards]
        active = [view.member for view in views if view.role == "worker" and view.state == "active"]
        waiting = explain.waiting_for(record) if isinstance(record, Job) else ""
        status = JobStatus(
            job=record.id,
            state=record.state.name,
            because=explain.why(record),
            script=self.spec.script,
            mode=self.spec.mode,
            workers=self.spec.workers,
            shards=self.spec.shards,
            generation=record.generation,
            epoch=ledger.epoch,
            epochs=self.epochs,
            epoch_progress=(ledger.committed + ledger.skipped) / ledger.batches if ledger.batches else 0.0,
            steps=self.steps(active),
            values=self.values(now),
            samples=self.samples,
            samples_per_s=self.samples_per_s(),
            staleness=self.staleness(active),
            started_at=self.started_at,
            at=time.time(),
            members=[self.member(view.member, view.state, view.because, now) for view in views],
            waiting_for=[waiting] if waiting else [],
            failures=self.failures,
            exit_code=record.exit_code if isinstance(record, Over) else None,
        )
        progress = status.progress
        if isinstance(record, Over) or not progress:
            return status
        return msgspec.structs.replace(
            status, eta_s=(now - self.training_since) * (1.0 - progress) / progress
        )

    # -- numbers ------------------------------------------------------------------------------------------

    def samples_per_s(self) -> float:
        if len(self.counted) < 2:
            return 0.0
        (first_at, first), (last_at, last) = self.counted[0], self.counted[-1]
        return (last - first) / (last_at - first_at) if last_at > first_at else 0.0

    def values(self, now: float) -> dict[str, float | None]:
        """Mean over the workers that reported lately, in the order in which the script gave them."""
        fresh = [card for card in self.cards.values() if card.values and now - card.reported_at <= FRESH_S]
        fresh = fresh or [card for card in self.cards.values() if card.values]
        names = dict.fromkeys(name for card in fresh for name in card.values)
        means: dict[str, float | None] = {}
        for name in names:
            numbers = [card.values[name] for card in fresh if name in card.values]
            mean = sum(numbers) / len(numbers)
            means[name] = mean if math.isfinite(mean) else None  # JSON knows no NaN
        return means

    def member(self, member: str, state: str, because: str, now: float) -> MemberStatus:
        card = self.cards[member]
        return MemberStatus(
            member=member,
            role=card.role,
            state=state,
            because=because,
            incarnation=card.incarnation,
            node=card.node,
            device=card.device,
            steps=card.steps,
            samples=card.samples,
            heard_s=max(0.0, now - card.heard_at),
        )

    def steps(self, active: Sequence[str]) -> int:
        """Of the worker that has made the most."""
        return max((self.cards[worker].steps for worker in active), default=0)

    def staleness(self, active: Sequence[str]) -> int:
        return max((self.cards[worker].staleness for worker in active), default=0)


def why(exited: Exited) -> str:
    """How a script ended, as the end of a sentence that begins with the worker's name."""
    failure = exited.failure
    if exited.signal:
        return f"its script was killed by {failure.kind if failure else f'signal {exited.signal}'}"
    if exited.code == 0:
        return "its script finished"
    if failure is None or failure.kind.startswith("exit code"):
        return f"its script ended with exit code {exited.code}"
    where = f" ({failure.file}:{failure.line})" if failure.file else ""
    return f"its script raised {failure.kind}: {failure.text.splitlines()[0] if failure.text else ''}{where}"
