"""Jobs, nodes and reasons for the eyes: views in, lines out. Pure, but for `print_*`, which print tables."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import click

from ..cluster.jobfile import command
from ..cluster.jobs import Explanation, JobView, NodeView
from ..web.bodies import ENDS
from .ansi import printable
from .console import counted, duration, names
from .job_words import STATES, bounds, sentence, state, wanted, why
from .tables import print_table


def clock(at: float | None, now: float | None = None) -> str:
    """12:03:11 of today, else with the day."""
    if at is None:
        return ""
    then = time.localtime(at)
    today = time.localtime(now if now is not None else time.time())
    same = (then.tm_year, then.tm_yday) == (today.tm_year, today.tm_yday)
    return time.strftime("%H:%M:%S" if same else "%Y-%m-%d %H:%M", then)


def lasted(job: JobView, now: float) -> str:
    """How long it has waited, or has run."""
    if job.began_at is None:
        return duration((job.ended_at or now) - job.submitted_at)
    return duration((job.ended_at or now) - job.began_at)


def event(job: JobView) -> str:
    """A change of its state, as a line."""
    said = f"{job.id} {state(job.state)}"
    if job.workers and job.state not in ENDS:
        said += f", {counted(job.workers, 'worker')} on {names(job.nodes)}" if job.nodes else ""
    if job.state in ENDS and job.exit_code:
        said += f", exit code {job.exit_code}"
    because = sentence(job)
    return printable(said + (f": {because}" if because else ""))


# -- tables --------------------------------------------------------------------------------------------------


def print_jobs(jobs: Sequence[JobView], now: float) -> None:
    rows = [
        [
            job.id,
            shortened(job.name, 16),
            shortened(job.user, 10),
            state(job.state),
            f"{job.workers} of {bounds(job)}" if job.state not in ENDS else bounds(job),
            lasted(job, now),
            sentence(job),
        ]
        for job in jobs
    ]
    print_table(("job", "name", "user", "state", "workers>", "time>", "because"), rows, "because")


def print_nodes(nodes: Sequence[NodeView]) -> None:
    rows = [
        [
            node.id,
            node.state.lower(),
            node.rack,
            f"{node.gpus_free}/{node.gpus}",
            f"{node.cpus_free}/{node.cpus}",
            f"{gigabytes(node.memory_mb_free)}/{gigabytes(node.memory_mb)}",
            duration(node.heard_s),
            names(node.jobs, 6),
        ]
        for node in nodes
    ]
    columns = ("node", "state", "rack", "gpus free>", "cpus free>", "GB free>", "heard>", "jobs")
    print_table(columns, rows, "jobs")


def gigabytes(megabytes: int) -> str:
    return f"{megabytes / 1024:.3g}"


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def print_job(job: JobView, now: float) -> None:
    for key, text in facts(job, now):
        click.echo(f"{key:<10} {printable(text)}")
    if job.attempts:
        click.echo()
        rows = [
            [
                str(each.number),
                clock(each.began_at, now),
                duration((each.ended_at or now) - each.began_at),
                state(each.state) or "goes on",
                "" if each.exit_code is None else str(each.exit_code),
                each.run_dir,
            ]
            for each in job.attempts
        ]
        print_table(
            ("attempt>", "began", "lasted>", "ended", "exit>", "run directory"), rows, "run directory"
        )


def facts(job: JobView, now: float) -> Iterator[tuple[str, str]]:
    yield "job", f"{job.id}, called {job.name}, of {job.user}"
    yield (
        "state",
        f"{state(job.state)}, {'ran' if job.began_at else 'waited'} {lasted(job, now)}",
    )
    because = sentence(job)
    if because:
        yield "because", because
    if job.exit_code is not None:
        yield "exit code", str(job.exit_code)
    yield "workers", f"{job.workers} of {wanted(job)}" if job.state not in ENDS else wanted(job)
    if job.nodes:
        yield "nodes", names(job.nodes, 8)
    yield "submitted", clock(job.submitted_at, now)
    if job.priority:
        yield "priority", str(job.priority)
    if job.submission is None:
        return
    asked = job.submission
    yield "script", command(asked)
    yield "code", asked.folder or f"archive {(asked.archive or '')[:12]}"
    needs = [
        counted(asked.cpus, "CPU"),
        *([counted(asked.gpus, "GPU")] if asked.gpus else []),
        *([f"{asked.memory_mb:,} MB"] if asked.memory_mb else []),
    ]
    yield "a worker", ", ".join(needs)
    for key, said in (
        ("after", ", ".join(asked.after)),
        ("retries", str(asked.retries or "")),
        ("limit", duration(asked.time_limit_s) if asked.time_limit_s else ""),
        ("settings", ", ".join(f"{key} = {value}" for key, value in asked.settings.items())),
        ("variables", ", ".join(asked.environment)),
    ):
        if said:
            yield key, said


def explanation(found: Explanation, now: float) -> Iterator[str]:
    """What `zml explain JOB` says."""
    job = found.job
    reason = why(job)
    what = STATES.get(job.state, f"is {state(job.state)}")
    yield printable(f"{job.id} ({job.name}) {what}" + (f": {reason}." if reason else "."))
    if job.because and job.because != reason:
        yield printable(f"  {job.because}")
    if job.state not in ENDS:
        has = counted(job.workers, "worker") if job.workers else "no worker"
        yield printable(f"  It asks for {wanted(job)}, and has {has}.")
    if found.ahead_count:
        goes = "job goes" if found.ahead_count == 1 else "jobs go"
        shown = ", ".join(found.ahead[:8])
        more = found.ahead_count - len(found.ahead[:8])
        yield printable(
            f"  {found.ahead_count:,} {goes} before it: {shown}" + (f" and {more:,} more" if more else "")
        )
    if found.decisions:
        yield ""
        yield "decided:"
    for each in found.decisions:
        what = state(each.what)
        yield printable(f"  {clock(each.at, now)}  {what}" + (f": {each.because}" if each.because else ""))
