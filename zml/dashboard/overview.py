"""The first page, out of a status and the history: how it is, in words; what is wrong; the numbers.

Pure: no file, no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from ..runs.history import Row
from ..status import CheckpointStatus, DataStatus, JobStatus, MemberStatus, since_the_first
from ..text.ansi import printable
from ..text.console import counted, duration
from .findings import Evidence, about, findings
from .rates import middle, shares
from .thinning import MOST, pick, rounded
from .views import (
    Chart,
    DataNow,
    Event,
    Finding,
    Head,
    LastCheckpoint,
    Member,
    Numbers,
    Overview,
    Script,
    Series,
    tone_of,
)

LATEST = 14  # events on the page
MOST_VALUES = 24  # curves of what the script logs
MOST_MARKS = 60


def overview(
    name: str,
    evidence: Evidence,
    versions: Mapping[str, str],
    events: Sequence[Event],
    bound: int | None = 0,
) -> Overview:
    status = evidence.status
    whole = since_the_first(status)
    found = findings(evidence)
    return Overview(
        head=head(name, evidence, found),
        numbers=numbers(evidence, bound),
        findings=found,
        members=[member(each) for each in whole.members],
        phases=shares(list(evidence.lately.workers.values())),
        checkpoint=checkpoint(status.checkpoint),
        data=data(status.data),
        events=list(events[-LATEST:]),
        failures=scripts(whole),
        versions=dict(versions),
    )


def head(name: str, evidence: Evidence, found: Sequence[Finding]) -> Head:
    status = evidence.status
    tone = tone_of(status.state)
    if not status.over and found and found[0].level != "note":
        tone = found[0].level if found[0].level == "bad" else "warn"
    return Head(
        name=name,
        script=status.script.rpartition("/")[2] or status.job,
        state=status.state,
        tone=tone,
        headline=headline(status),
        because=status.because,
        over=status.over,
        mode=status.mode,
        folder=status.run_dir,
        began=status.started_at,
        at=status.at,
        silent_s=0.0 if status.over else round(evidence.silent_s),
        job=status.job,
        generation=status.generation,
        boots=status.boots,
        exit_code=status.exit_code,
    )


def headline(status: JobStatus) -> str:
    """How it is, as a person would say it."""
    took = duration(max(0.0, status.at - status.started_at))
    steps = steps_of(status)
    done = [counted(status.epochs, "epoch")] if status.epochs and status.state == "SUCCEEDED" else []
    done += [counted(steps, "step")] if steps else []
    after = f" after {took}" + (f": {', '.join(done)}" if done else "")
    match status.state:
        case "SUCCEEDED":
            return f"Finished{after}"
        case "FAILED":
            return f"Failed{after}"
        case "CANCELLED":
            return f"Stopped{after}"
        case "FORMING" | "STARTING":
            return "Waiting for everybody to join" if not status.members else "Getting ready"
        case "DRAINING":
            return "Leaving in order: steps are finished and saved"
        case "FINISHING":
            return "Ending"
    if steps == 0:
        return "Running, before the first step"
    where = f"epoch {status.epoch + 1}" + (f" of {status.epochs}" if status.epochs else "")
    eta = f", done in about {about(status.eta_s)}" if status.eta_s is not None else ""
    return f"Training {where}, step {steps + status.steps_before:,}{eta}"


def steps_of(status: JobStatus) -> int:
    """Also of a job that is over, whose workers are active no more."""
    return max(status.steps, max((each.steps for each in status.of("worker")), default=0), 0)


def numbers(evidence: Evidence, bound: int | None) -> Numbers:
    status, rows = evidence.status, evidence.rows
    figures = [each.figures for each in status.of("worker") if each.figures is not None]
    rate = next((each.learning_rate for each in figures if each.learning_rate is not None), None)
    if rate is None:
        rate = next((row.learning_rate for row in reversed(rows) if row.learning_rate is not None), None)
    return Numbers(
        steps=steps_of(since_the_first(status)),
        epoch=status.epoch,
        epochs=status.epochs,
        epoch_progress=status.epoch_progress,
        progress=1.0 if status.state == "SUCCEEDED" else status.progress,
        samples=status.samples,
        samples_per_s=mean_rate(status) if status.over else status.samples_per_s,
        peak_samples_per_s=max((row.samples_per_s for row in rows), default=0.0) or None,
        step_s=middle([each.step_s for each in evidence.lately.workers.values()]),
        eta_s=None if status.over else status.eta_s,
        elapsed_s=round(max(0.0, (status.at if status.over else evidence.now) - status.started_at))
        if status.started_at
        else 0.0,
        staleness=status.staleness,
        staleness_bound=bound,
        learning_rate=rate,
        values=dict(status.values) or (dict(rows[-1].values) if rows else {}),
        sent_bytes=sum(each.sent_bytes for each in figures),
        received_bytes=sum(each.received_bytes for each in figures),
        dense_bytes=sum(each.dense_sent_bytes + each.dense_received_bytes for each in figures),
    )


def mean_rate(status: JobStatus) -> float | None:
    seconds = status.at - status.started_at
    return status.samples / seconds if seconds > 0 and status.samples > 0 else None


def member(status: MemberStatus) -> Member:
    return Member(
        member=status.member,
        role=status.role,
        state=status.state,
        tone=tone_of(status.state),
        because=status.because,
        node=status.node,
        steps=status.steps,
        heard_s=round(status.heard_s, 1),
        incarnation=status.incarnation,
    )


def checkpoint(status: CheckpointStatus) -> LastCheckpoint:
    return LastCheckpoint(
        name=status.path.rpartition("/")[2],
        step=status.step,
        at=status.at,
        bytes=status.bytes,
        held_s=status.held_s,
        took_s=status.took_s,
        taken=status.taken,
        failed=status.failed,
        because=status.because,
    )


def data(status: DataStatus) -> DataNow:
    return DataNow(
        batches=status.batches,
        batch_size=status.batch_size,
        committed=status.committed,
        skipped=status.skipped,
        leased=status.leased,
        reissued=status.reissued,
    )


def scripts(status: JobStatus) -> list[Script]:
    """The first to fail first: of several it is the cause."""
    return [
        Script(
            member=each.member,
            kind=each.failure.kind,
            text=each.failure.text[:4000],
            file=each.failure.file,
            line=each.failure.line,
            source=[line[:400] for line in each.failure.source[:20]],
            first_source_line=each.failure.first_source_line,
            step=each.failure.step,
            batch=each.failure.batch[:400],
            log=each.failure.log,
            at=each.failure.at,
        )
        for each in sorted(status.failures, key=lambda each: each.failure.at)[:8]
    ]


# -- curves ------------------------------------------------------------------------------------------------------


def series(rows: Sequence[Row], events: Iterable[Event], most: int = MOST, *, before: int = 0) -> Series:
    """Every curve by itself, so that each keeps its own peaks. `before`: steps of the runs before, which count too."""
    rows = [msgspec.structs.replace(row, steps=row.steps + before) for row in rows] if before else rows
    names = list(dict.fromkeys(name for row in rows for name in row.values))[:MOST_VALUES]
    marks = [each for each in events if each.tone in ("bad", "warn") or each.kind in ("Place", "Finish")]
    return Series(
        values=[
            chart(
                name,
                [row for row in rows if name in row.values],
                [row.values[name] for row in rows if name in row.values],
                most,
            )
            for name in names
        ],
        samples_per_s=chart("samples/s", rows, throughput(rows), most),
        staleness=chart("staleness", rows, [float(row.staleness) for row in rows], most // 2),
        learning_rate=chart("learning rate", rows, [row.learning_rate for row in rows], most // 2),
        workers=chart("workers", rows, [float(row.workers) for row in rows], most // 2),
        marks=marks[-MOST_MARKS:],
    )


def throughput(rows: Sequence[Row]) -> list[float | None]:
    """A rate takes two reports: the first row's 0 says that it is not known yet."""
    return [row.samples_per_s if row.samples_per_s or place else None for place, row in enumerate(rows)]


def chart(name: str, rows: Sequence[Row], y: Sequence[float | None], most: int = MOST) -> Chart:
    kept = pick([y], most) if y else []
    return Chart(
        name=printable(name)[:80],
        step=[rows[row].steps for row in kept],
        at=[round(rows[row].at, 1) for row in kept],
        y=[rounded(y[row]) for row in kept],
    )
