"""What the members say of themselves, gathered for whoever looks: the job's status in words and numbers.

It decides nothing. Rates are taken over the last few seconds, values are means over the workers that reported lately.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import msgspec

from ..address import host_of
from ..errors import ZmlError
from ..figures import Lives, WorkerFigures, after
from ..messages import Exited, Failure, Gauge, JobSpec, Join, Joined, Report
from ..noise import LEAST, NOTHING, scale, together
from ..plan import Plan
from ..scheduler import explain
from ..scheduler.batches import Ledger
from ..scheduler.state import Job, Over
from ..status import DataStatus, JobStatus, MemberFailure, MemberStatus, NoiseStatus, RateStatus, StepTime
from .facts import Facts, Progressed

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
    every_s: float = 0.0  # between two heartbeats, where they are seldom
    steps: int = -1
    epoch: int = -1
    staleness: int = 0
    samples: int = 0  # of all incarnations
    before: int = 0  # of the former ones
    values: dict[str, float] = field(default_factory=dict)
    reported_at: float = -1.0
    pid: int = 0
    metrics: str = ""
    figures: WorkerFigures | None = None  # of all incarnations
    figures_before: WorkerFigures | None = None  # of the former ones


class Board:
    """Cards of all members that ever joined, and the job's own numbers. Times are the loop's seconds."""

    def __init__(self, spec: JobSpec, failures: list[MemberFailure]) -> None:
        """`failures` grows as scripts fail."""
        self.spec = spec
        self.failures = failures
        self.cards: dict[str, Card] = {}
        self.changes = 0  # grows with all that is told here
        self.gauges: dict[str, Gauge] = {}  # by shard, the newest
        self.lives: dict[str, Lives] = {}  # by shard, what it has counted
        self.full: dict[str, str] = {}  # by shard: why it refuses what comes, where its disk is full
        self.stalls = 0  # how often that was told
        self.change = (1.0, "")  # of the learning rate, the last one told
        self.epochs = 0
        self.started_at = time.time()
        self.training_since = math.inf  # when the first report came
        self.samples = 0
        self.counted: deque[tuple[float, int]] = (
            deque()
        )  # (when, samples in all), oldest first, within RATE_S

    def joined(self, join: Join, joined: Joined, now: float) -> None:
        self.changes += 1
        card = Card(join.role, join.node, join.device, joined.incarnation, now)
        card.pid, card.metrics = join.pid, join.metrics if host_of(join.metrics) else ""
        if (former := self.cards.get(joined.member)) is not None:
            again = former.incarnation == joined.incarnation  # the same process, whose answer was lost
            card.samples, card.before = former.samples, former.before if again else former.samples
            if former.figures is not None:  # what it said of now is of a process that is gone
                card.figures = former.figures if again else after(former.figures, WorkerFigures())
            card.figures_before = former.figures_before if again else former.figures
        self.cards[joined.member] = card

    def recall(self, facts: Facts, now: float) -> None:
        """What was known before the coordinator was started again; the rest comes with the next reports."""
        for member, card in facts.entered.items():
            known = Card(card.role, card.node, card.device, card.incarnation, now)
            known.pid, known.metrics = card.pid, card.metrics if host_of(card.metrics) else ""
            self.cards[member] = known
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

    def heard(self, member: str, now: float, every_s: float) -> None:
        if (card := self.cards.get(member)) is not None:
            card.heard_at, card.every_s = now, every_s

    def report(self, report: Report, now: float) -> None:
        self.changes += 1
        self.training_since = min(self.training_since, now)
        card = self.cards[report.worker]
        card.steps, card.epoch, card.staleness = report.steps, report.epoch, report.staleness
        more = max(0, card.before + report.samples - card.samples)
        card.samples += more
        card.values = report.values or card.values
        if report.figures is not None:
            known = card.figures_before
            card.figures = after(known, report.figures) if known is not None else report.figures
        card.reported_at = now
        self.epochs = max(self.epochs, report.epochs)
        self.samples += more
        self.counted.append((now, self.samples))
        self._forget(now)

    def gauge(self, gauge: Gauge, note: Callable[[str, str], None]) -> None:
        """`note` is told when the learning rate has changed, by one shard for all, and when a disk is full."""
        # A shard to which nothing happens says the same again and again.
        if gauge != self.gauges.get(gauge.shard):
            self.changes += 1
        self.gauges[gauge.shard] = gauge
        if gauge.figures is not None:
            lives = self.lives.setdefault(gauge.shard, Lives())
            lives.told((gauge.member, gauge.incarnation), gauge.figures)
            self._room(gauge.shard, gauge.figures.no_room, note)
        updating = (shard for shard, each in self.gauges.items() if each.updates)
        first = min(updating, key=lambda shard: (len(shard), shard), default="")
        if gauge.shard == first and gauge.change[1] and gauge.change != self.change:
            self.change = gauge.change
            note(f"learning rate x {gauge.change[0]:.4g}", gauge.change[1])

    def _room(self, shard: str, no_room: str, note: Callable[[str, str], None]) -> None:
        if no_room:
            self.stalls += 1
            if shard not in self.full:
                note(no_room, "training waits until there is some")
            self.full[shard] = no_room
        elif self.full.pop(shard, ""):
            note(f"{shard} has room again", "")

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
        waiting = [explain.waiting_for(record)] if isinstance(record, Job) else []
        if isinstance(record, Job):
            here = {view.member for view in views if view.state == "active"}
            for shard, because in sorted(self.full.items()):
                if self.gauges[shard].member in here:  # else that is why
                    waiting.append(f"waiting for room: {because}")
        # When all are done, what they had made is still what the job has made.
        made = active or [view.member for view in views if view.role == "worker"]
        batch_size = ledger.current.batch_size if ledger.current is not None else 0
        status = JobStatus(
            job=record.id,
            state=record.state.name,
            because=explain.why(record),
            script=self.spec.script,
            mode=self.spec.mode,
            workers=self.spec.workers,
            shards=max(self.spec.shards, sum(view.role == "shard" for view in views)),
            generation=record.generation,
            epoch=ledger.epoch,
            epochs=self.epochs,
            epoch_progress=(ledger.committed + ledger.skipped) / ledger.batches if ledger.batches else 0.0,
            steps=self.steps(made),
            values=self.values(now),
            # Scripts tell of what they have in hand, and some die with it: what counts, the ledger knows. Where it
            # has not been told what is in a batch, as of a stream, their word must do.
            samples=ledger.samples if batch_size else self.samples,
            samples_per_s=self.samples_per_s(now),
            staleness=self.staleness(active),
            started_at=self.started_at,
            at=time.time(),
            members=[self.member(view.member, view.state, view.because, now) for view in views],
            rate=self.rate(),
            noise=self.noise(batch_size),
            step_times=self.step_times(batch_size),
            data=DataStatus(
                batches=ledger.batches,
                batch_size=batch_size,
                committed=ledger.committed,
                skipped=ledger.skipped,
                leased=len(ledger.current.leases) if ledger.current is not None else 0,
                reissued=ledger.reissued,
            ),
            waiting_for=list(filter(None, waiting)),
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

    def _forget(self, now: float) -> None:
        while self.counted and self.counted[0][0] < now - RATE_S:
            self.counted.popleft()

    def samples_per_s(self, now: float) -> float:
        """Nothing, where nobody has told anything for a while."""
        self._forget(now)
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

    def rate(self) -> RateStatus | None:
        """As the shard says it that has made the most updates."""
        rule = self.spec.rates
        if rule.scaling == "none" and not rule.damping:
            return None
        newest = max(self.gauges.values(), key=lambda gauge: gauge.updates, default=None)
        if newest is None:
            return RateStatus(scaling=rule.scaling, base_workers=rule.base)
        return RateStatus(
            scaling=rule.scaling,
            base_workers=rule.base,
            factor=newest.factor,
            because=newest.because,
            staleness=newest.late,
            damping=newest.damping,
        )

    def noise(self, batch_size: int) -> NoiseStatus:
        """Of all shards that hold trained parameters, together. Never a guess."""
        if not Plan.of(self.spec).shows_noise:
            return NoiseStatus(because="it takes sync, whole gradients, and the optimizer on the shards")
        holders = max((gauge.holders for gauge in self.gauges.values()), default=1)
        parts = [gauge.noise for gauge in self.gauges.values() if gauge.updates]
        found = together(parts) if len(parts) >= holders else NOTHING
        if found.updates < LEAST:
            what = "it takes two workers or more in an update" if self.spec.workers < 2 else "not enough yet"
            return NoiseStatus(updates=found.updates, because=f"{what}: {found.updates} updates measured")
        samples = scale(found, batch_size)
        because = ""
        if samples is None:
            because = "the batch size is not known" if not batch_size else "the mean gradient drowns in noise"
        variance = found.variance * batch_size if batch_size else None
        return NoiseStatus(
            scale=samples, because=because, updates=found.updates, square=found.square, variance=variance
        )

    def step_times(self, batch_size: int) -> list[StepTime]:
        """Shards see the same steps: for each number of workers, as the one says it that has seen the most."""
        best: dict[int, tuple[int, float]] = {}
        for gauge in self.gauges.values():
            for workers, steps, seconds in gauge.step_times:
                best[workers] = max(best.get(workers, (0, 0.0)), (steps, seconds))
        return [
            StepTime(workers=workers, step_s=seconds, steps=steps, batch_size=batch_size)
            for workers, (steps, seconds) in sorted(best.items())
        ]

    def member(self, member: str, state: str, because: str, now: float) -> MemberStatus:
        card, lives = self.cards[member], self.lives.get(member)
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
            every_s=card.every_s,
            pid=card.pid,
            metrics=card.metrics,
            epoch=card.epoch,
            staleness=card.staleness,
            figures=card.figures,
            shard=lives.together if lives is not None else None,
        )

    def steps(self, active: Iterable[str]) -> int:
        """Of the worker that has made the most; those that have told nothing yet have made none."""
        return max((0, *(self.cards[worker].steps for worker in active)))

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
