"""What is wrong with a run, found from its numbers: what a person would look for on ten pages, in one list.

Pure: evidence in, findings out, the worst first. Each rule is one function that says a sentence, the number it rests on
and the page that shows more. Thresholds stand beside their rules. A rule that has nothing to say is silent; a run that
none speaks about is well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..runs.history import Row
from ..status import JobStatus, MemberStatus, since_the_first
from ..stragglers import STARVED, STARVING, stragglers, unheard
from ..stragglers import starving as hungry
from ..text.ansi import printable
from ..text.console import counted, names, number
from .rates import NOTHING, Lately, shares
from .views import Finding, Level

SHOWN = 5  # of one kind; the rest is counted
UNEVEN = 1.5  # the fullest shard against an even share
OVERDUE = 2.0  # checkpoint intervals
SILENT_S = 15.0  # of a coordinator, whose status is written every two seconds while anything happens
STANDING_S = 120.0  # without a step, at the least
STANDING_STEPS = 20  # and so many steps' time
STARTING_S = 120.0  # until the first step, and nobody worries
FIRST_S = 300.0  # until it, that compiling and loading may take
STUCK_S = 60.0  # of one worker without a step while others make some, at the least
DEEP = 64  # pulls and pushes that wait at one shard

ORDER: tuple[Level, ...] = ("bad", "warn", "note")


@dataclass(frozen=True, slots=True)
class Errors:
    """What one process logged as an error, lately."""

    count: int
    newest: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that the rules look at. `now` is seconds since the Unix epoch."""

    status: JobStatus
    now: float
    lately: Lately = NOTHING
    rows: Sequence[Row] = ()  # of history.jsonl, the oldest first
    errors: Mapping[str, Errors] = field(default_factory=dict)  # by process
    silent_s: float = 0.0  # since the status was written
    alive: bool | None = None  # the coordinator's process; None: it is on another machine
    checkpoint_minutes: float = 0.0
    checkpoint_steps: int = 0
    silence_expected: bool = False  # it is asked directly, and answers
    stands_since: float = 0.0  # the status has been seen with these steps; 0: not known


def findings(evidence: Evidence) -> list[Finding]:
    """The worst first, and of those the causes before what follows from them."""
    found = [finding for rule in RULES for finding in limited(list(rule(evidence)))]
    return sorted(found, key=lambda finding: ORDER.index(finding.level))


def limited(found: list[Finding]) -> list[Finding]:
    if len(found) <= SHOWN:
        return found
    rest = found[SHOWN - 1 :]
    more = Finding(
        kind=rest[0].kind,
        level=rest[0].level,
        what=f"The same of {names([each.member for each in rest if each.member], 6)}.",
        number=f"{len(rest)} more",
        page=rest[0].page,
        query={},
    )
    return [*found[: SHOWN - 1], more]


# -- what ended it, or holds it up ---------------------------------------------------------------------------


def failed_scripts(e: Evidence) -> Iterator[Finding]:
    failures = sorted(since_the_first(e.status).failures, key=lambda each: each.failure.at)
    for place, each in enumerate(failures):
        failure = each.failure
        text = first_line(failure.text)
        where = f" in {failure.file.rpartition('/')[2]}, line {failure.line}" if failure.file else ""
        yield Finding(
            kind="failed",
            level="bad" if e.status.state == "FAILED" else "warn",
            what=f"The script of {each.member} failed{where}: {failure.kind}{': ' + text if text else ''}"
            + (" (the first to fail: the cause)" if place == 0 and len(failures) > 1 else ""),
            number=f"step {failure.step}" if failure.step >= 0 else "before the first step",
            page="overview",
            member=each.member,
        )


def no_news(e: Evidence) -> Iterator[Finding]:
    if e.status.over or e.silence_expected:
        return
    if e.alive is False:
        yield Finding(
            kind="silent",
            level="bad",
            what="The coordinator's process is gone, and the run is not over. Workers and shards train on for a"
            " while; start it again, or resume the run from its checkpoint.",
            number=f"silent for {about(e.silent_s)}",
            page="events",
        )
    elif e.silent_s > SILENT_S and e.status.state == "RUNNING" and not any(standing(e)):
        yield Finding(
            kind="silent",
            level="warn",
            what="Nothing has been reported for a while: no worker makes steps, or the coordinator cannot write to"
            " the run directory.",
            number=f"silent for {about(e.silent_s)}",
            page="logs",
        )


def waiting(e: Evidence) -> Iterator[Finding]:
    if e.status.over:
        return
    begun = any(member.steps > 0 for member in e.status.of("worker"))
    late = e.now - e.status.started_at > STARTING_S
    for whom in e.status.waiting_for:
        running = e.status.state == "RUNNING" and (begun or late)  # everybody waits a little at the beginning
        yield Finding(
            kind="waiting",
            level="warn" if running else "note",
            what=f"The job is {whom}." if whom.startswith("waiting") else f"The job waits for {whom}.",
            number=f"state {e.status.state}",
            page="events",
        )


def standing(e: Evidence) -> Iterator[Finding]:
    if e.status.state != "RUNNING" or e.status.waiting_for or e.alive is False:
        return
    if not e.rows:
        yield from not_begun(e)
        return
    newest = e.rows[-1]
    if e.status.steps > newest.steps or e.status.samples > newest.samples:  # rows may be minutes apart
        began = e.stands_since or e.now
    else:
        began = newest.at
        for row in reversed(e.rows):
            if (row.steps, row.samples) != (newest.steps, newest.samples):
                break
            began = row.at
    still_s = e.now - began
    steps = max(newest.steps, e.status.steps) + e.status.steps_before
    usual = [rate.step_s for rate in e.lately.workers.values()]
    patience = max(STANDING_S, STANDING_STEPS * max(usual, default=0.0))
    if still_s > patience:
        yield Finding(
            kind="standing",
            level="bad",
            what=f"No step has been finished since step {steps:,}. `zml stack` shows where a worker hangs.",
            number=f"for {about(still_s)}",
            page="steps",
        )


def not_begun(e: Evidence) -> Iterator[Finding]:
    waited_s = e.now - e.status.started_at
    if e.status.started_at and waited_s > FIRST_S and e.status.steps <= 0 and e.status.samples <= 0:
        yield Finding(
            kind="standing",
            level="warn",
            what="No step has been finished yet. Loading and compiling may take long; `zml stack` shows what workers"
            " do.",
            number=f"for {about(waited_s)}",
            page="workers",
        )


def stuck(e: Evidence) -> Iterator[Finding]:
    """Workers that are heard and make no step, while others do: there where nobody waits for them."""
    if e.status.state != "RUNNING" or e.alive is False:
        return
    still = {
        member.member: e.lately.still[member.member]
        for member in e.status.of("worker")
        if alive(member) and member.member in e.lately.still
    }
    late = {
        worker
        for worker, each in still.items()
        if each.seconds > (max(STUCK_S, STANDING_STEPS * each.step_s) if each.steps else FIRST_S)
    }
    heard_of = {
        m.member for m in e.status.of("worker") if 0 <= m.heard_s and not unheard(m.heard_s, m.every_s)
    }
    if len(late) == len(still):  # nobody advances: `standing` tells
        return
    for worker in sorted(late & heard_of, key=lambda name: -still[name].seconds):
        after = (
            f"after step {still[worker].steps + e.status.steps_before:,}"
            if still[worker].steps
            else "not even a first"
        )
        yield Finding(
            kind="stuck",
            level="bad",
            what=f"{worker} makes no step while others do: it hangs, or does something else for long."
            f" `zml stack {worker}` shows where it is.",
            number=f"none for {about(still[worker].seconds)}, {after}",
            page="workers",
            query={"worker": worker},
            member=worker,
        )


# -- members ---------------------------------------------------------------------------------------------------


def gone(e: Evidence) -> Iterator[Finding]:
    """Dead and lost members; and those that have begun anew, which is no more than worth knowing."""
    for member in since_the_first(e.status).members:
        shard = member.role == "shard"
        page = "shards" if shard else "workers"
        if member.state in ("lost", "fenced", "failed"):
            because = f": {printable(member.because)}" if member.because else ""
            verb = {"lost": "was lost", "fenced": "was fenced", "failed": "has failed"}[member.state]
            yield Finding(
                kind="lost",
                level="note"
                if e.status.state == "SUCCEEDED"
                else "bad"
                if shard or e.status.state == "FAILED"
                else "warn",
                what=f"{role(member)} {member.member} {verb}{because}."
                + (" Its chunks wait for it to come back, or move." if shard and not e.status.over else ""),
                number=f"last step {member.steps:,}" if member.steps >= 0 else heard(member),
                page=page,
                member=member.member,
            )
        elif (
            alive(member)
            and not e.status.over
            and unheard(member.heard_s, member.every_s)
            and not e.silent_s > SILENT_S
        ):
            yield Finding(
                kind="lost",
                level="warn",
                what=f"{role(member)} {member.member} has gone quiet.",
                number=heard(member),
                page=page,
                member=member.member,
            )


def restarted(e: Evidence) -> Iterator[Finding]:
    again = [m for m in e.status.members if m.incarnation > 1 and m.state not in ("lost", "fenced", "failed")]
    for member in again:
        yield Finding(
            kind="restarted",
            level="note",
            what=f"{role(member)} {member.member} was started again and is back.",
            number=f"{member.incarnation} starts",
            page="shards" if member.role == "shard" else "workers",
            member=member.member,
        )
    if e.status.boots > 1:
        yield Finding(
            kind="restarted",
            level="note",
            what="The coordinator was started again; training went on meanwhile.",
            number=f"{e.status.boots} starts",
            page="events",
        )


# -- where the time goes ---------------------------------------------------------------------------------------


def slow_workers(e: Evidence) -> Iterator[Finding]:
    found = stragglers(e.lately.phases)
    for worker, slow in sorted(found.items(), key=lambda one: -one[1].ratio):
        rate = e.lately.workers[worker]
        because = {
            "data": "its data loader is slow",
            "compute": "its computing is slow (a shared, hot or smaller machine?)",
            "encode": "compressing is slow there (too few processor cores?)",
            "apply": "writing parameters back is slow there",
        }[slow.phase]
        held = " All others wait for it." if e.status.mode == "sync" else ""
        yield Finding(
            kind="straggler",
            level=slow.level,
            what=f"{worker} is a straggler: {because}.{held}",
            number=f"{slow.ratio:.1f} x the median, {milliseconds(rate.busy_s)} of work a step",
            page="workers",
            query={"worker": worker},
            member=worker,
        )


def starving(e: Evidence) -> Iterator[Finding]:
    rates = e.lately.workers
    share = shares(list(rates.values())).get("data", 0.0)
    if share >= STARVING:
        seconds = sum(rate.phases["data"] for rate in rates.values()) / len(rates)
        yield Finding(
            kind="starving",
            level="bad" if share >= STARVED else "warn",
            what="Workers starve: they wait for their data loader. More `num_workers`, `prefetch_factor` or faster"
            " storage help.",
            number=f"{share:.0%} of the time, {milliseconds(seconds)} a step",
            page="workers",
        )
        return
    for worker, own in hungry(e.lately.phases, stragglers(e.lately.phases)).items():
        yield Finding(
            kind="starving",
            level="warn",
            what=f"{worker} starves: it waits for its data loader.",
            number=f"{own:.0%} of its time, {milliseconds(rates[worker].phases['data'])} a step",
            page="workers",
            query={"worker": worker},
            member=worker,
        )


# -- numbers that are none -------------------------------------------------------------------------------------


def not_finite(e: Evidence) -> Iterator[Finding]:
    latest: dict[str, float | None] = {}  # a status need not have every value that was logged
    for row in e.rows:
        latest.update(row.values)
    latest.update(e.status.values)
    for name, value in latest.items():
        if value is not None:
            continue
        since = None
        for row in reversed(e.rows):
            if name in row.values and row.values[name] is not None:
                break
            if name in row.values:
                since = row.steps + e.status.steps_before
        yield Finding(
            kind="not-finite",
            level="bad",
            what=f"{printable(name)} is not finite (NaN or infinite). The learning rate, the data or the precision is"
            " the usual cause; a checkpoint from before is whole.",
            number=f"since step {since:,}" if since is not None else "now",
            page="overview",
            query={"value": name},
        )
    for name in dict.fromkeys(name for row in e.rows for name in row.values):
        bad = [
            row.steps + e.status.steps_before
            for row in e.rows
            if name in row.values and row.values[name] is None
        ]
        if bad and latest[name] is not None:
            yield Finding(
                kind="not-finite",
                level="warn",
                what=f"{printable(name)} was not finite for a while, and is again.",
                number=f"steps {bad[0]:,} to {bad[-1]:,}" if bad[0] != bad[-1] else f"step {bad[0]:,}",
                page="overview",
                query={"value": name},
            )
    for member in e.status.of("worker"):
        count = member.figures.left_out if member.figures is not None else 0
        if count:
            steps = max(1, member.figures.steps if member.figures is not None else 1)
            yield Finding(
                kind="not-finite",
                level="bad" if count > 0.05 * steps else "warn",
                what=f"Gradients of {member.member} were not finite; those steps were left out.",
                number=f"{counted(count, 'step')} of {steps:,}",
                page="workers",
                query={"worker": member.member},
                member=member.member,
            )


# -- shards, checkpoints, data, logs ---------------------------------------------------------------------------


def uneven_shards(e: Evidence) -> Iterator[Finding]:
    held = {
        member.member: member.shard
        for member in e.status.of("shard")
        if member.shard is not None and member.state not in ("lost", "fenced")
    }
    chunks = sum(figures.chunks for figures in held.values())
    if len(held) > 1 and chunks >= 2 * len(held):  # fewer cannot be even
        ratio, fullest = imbalance({name: figures.parameter_bytes for name, figures in held.items()})
        if ratio >= UNEVEN:
            yield Finding(
                kind="imbalance",
                level="warn",
                what=f"Shard {fullest} holds far more than its share of the parameters, and sets the pace of all.",
                number=f"{ratio:.1f} x an even share",
                page="shards",
                member=fullest,
            )
    for name, figures in held.items():
        waiting = figures.parked + figures.staged
        if waiting > DEEP * max(1, len(e.status.of("worker"))):
            yield Finding(
                kind="queue",
                level="warn",
                what=f"Shard {name} does not keep up: pushes and pulls wait there.",
                number=f"{waiting:,} waiting",
                page="shards",
                member=name,
            )


def imbalance(sizes: Mapping[str, int]) -> tuple[float, str]:
    """The largest against an even share, and whose it is."""
    whole = sum(sizes.values())
    if not whole:
        return 1.0, ""
    fullest = max(sizes, key=sizes.__getitem__)
    return sizes[fullest] * len(sizes) / whole, fullest


def checkpoints(e: Evidence) -> Iterator[Finding]:
    last = e.status.checkpoint
    if last.because:
        yield Finding(
            kind="checkpoint",
            level="warn" if e.status.state == "SUCCEEDED" else "bad",
            what=f"The newest checkpoint failed: {printable(last.because)}.",
            number=f"{last.failed} of {last.taken + last.failed} failed",
            page="checkpoints",
        )
    if e.status.state != "RUNNING":
        return
    interval_s = e.checkpoint_minutes * 60
    since = last.at or e.status.started_at
    if interval_s > 0 and since and e.now - since > OVERDUE * interval_s:
        yield Finding(
            kind="checkpoint",
            level="warn",
            what="The newest checkpoint is overdue." if last.path else "No checkpoint has been taken yet.",
            number=f"{about(e.now - since)} old, every {about(interval_s)} is asked for",
            page="checkpoints",
        )
    behind = e.status.steps + e.status.steps_before - max(e.status.steps_before, last.step)
    if e.checkpoint_steps > 0 and behind > OVERDUE * e.checkpoint_steps:
        yield Finding(
            kind="checkpoint",
            level="warn",
            what="The newest checkpoint is many steps back.",
            number=f"{behind:,} steps ago, every {e.checkpoint_steps:,} is asked for",
            page="checkpoints",
        )


def data(e: Evidence) -> Iterator[Finding]:
    if e.status.data.skipped:
        yield Finding(
            kind="data",
            level="warn",
            what="Batches were left out because they killed their workers.",
            number=f"{counted(e.status.data.skipped, 'batch').replace('batchs', 'batches')} in this epoch",
            page="data",
        )


def log_errors(e: Evidence) -> Iterator[Finding]:
    for process, errors in sorted(e.errors.items(), key=lambda one: -one[1].count):
        yield Finding(
            kind="errors",
            level="note" if e.status.state == "SUCCEEDED" else "warn",
            what=f"{printable(process)} logs errors; the newest: {printable(first_line(errors.newest))}",
            number=counted(errors.count, "error"),
            page="logs",
            query={"member": process, "level": "error"},
            member=process,
        )


RULES: tuple[Callable[[Evidence], Iterator[Finding]], ...] = (
    failed_scripts,
    not_finite,
    gone,
    no_news,
    standing,
    stuck,
    waiting,
    slow_workers,
    starving,
    uneven_shards,
    checkpoints,
    data,
    log_errors,
    restarted,
)


# -- words -------------------------------------------------------------------------------------------------------


def about(seconds: float) -> str:
    """About how long, in one unit that a person would use."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h".replace(".0 h", " h")
    return f"{round(seconds / 86400)} days"


def alive(member: MemberStatus) -> bool:
    return member.state in ("joined", "active")


def role(member: MemberStatus) -> str:
    return "Shard" if member.role == "shard" else "Worker"


def heard(member: MemberStatus) -> str:
    return f"heard {about(member.heard_s)} ago" if member.heard_s >= 0 else "never heard"


def first_line(text: str, most: int = 160) -> str:
    line = printable(text.strip().partition("\n")[0])
    return line if len(line) <= most else line[: most - 1] + "…"


def milliseconds(seconds: float) -> str:
    return f"{number(seconds)} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
