"""Workers and shards as tables, and one of them in full."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

from ..figures import APPLY_BOUNDS_S, BESIDE, PHASES, STALENESS_BOUNDS, STEP_BOUNDS_S
from ..status import JobStatus, MemberStatus
from ..stragglers import Slow
from ..text import bars
from ..text.ansi import printable
from ..text.console import HERE, TROUBLED
from ..text.tables import size
from .known import Known, numbered
from .paces import ShardPace, WorkerPace
from .table import Column
from .trouble import note, slow

LABEL = 14


@dataclass(frozen=True, slots=True)
class Worker:
    member: MemberStatus
    pace: WorkerPace
    note: tuple[str, str]
    longest_s: float  # of all workers' steps: bars have one scale


@dataclass(frozen=True, slots=True)
class Shard:
    member: MemberStatus
    pace: ShardPace
    note: tuple[str, str]


def workers(known: Known) -> list[Worker]:
    if known.status is None:
        return []
    paces, _ = known.paces()
    here = {
        m.member: paces[m.member] for m in known.status.of("worker") if m.member in paces and m.state in HERE
    }
    straggles = slow(here)
    longest = max((pace.step_s or 0.0 for pace in here.values()), default=0.0)
    return [
        Worker(
            m,
            paces.get(m.member, WorkerPace()),
            _note(known.status, m, here.get(m.member), straggles),
            longest,
        )
        for m in known.status.of("worker")
    ]


def shards(known: Known) -> list[Shard]:
    if known.status is None:
        return []
    _, paces = known.paces()
    return [
        Shard(m, paces.get(m.member, ShardPace()), _note(known.status, m, None, {}))
        for m in known.status.of("shard")
    ]


def _note(
    status: JobStatus, member: MemberStatus, pace: WorkerPace | None, straggles: dict[str, Slow]
) -> tuple[str, str]:
    return note(member, pace, straggles, running=status.state in ("RUNNING", "DRAINING"))


def kept(rows: Sequence[Worker | Shard], needle: str) -> list[str]:
    """The names of those in which the filter occurs: in name, state, node, device or what is said of them."""
    found = []
    for row in rows:
        m = row.member
        text = " ".join((m.member, m.state, m.node, m.device, row.note[0], m.because))
        if needle.lower() in text.lower():
            found.append(m.member)
    return found


# -- cells ---------------------------------------------------------------------------------------------------


def lasting(seconds: float | None) -> str:
    """12.3 ms, 1.23 s"""
    if seconds is None:
        return "-"
    if seconds < 0.00995:
        return f"{1e3 * seconds:.2f} ms"
    return f"{1e3 * seconds:,.0f} ms" if seconds < 0.9995 else f"{seconds:,.3g} s"


def per_second(rate: float | None) -> str:
    if rate is None:
        return "-"
    return f"{rate:,.1f}" if rate < 99.95 else f"{rate:,.0f}"


def share(part: float | None) -> str:
    """What compression saved: 97.3 %"""
    if part is None:
        return "-"
    return f"{part:.1%}" if part < 0.9995 else f"{part:.2%}"


def rate_of(count: float) -> str:
    return f"{size(count)}/s"


def name(member: MemberStatus) -> str:
    return member.member if member.incarnation <= 1 else f"{member.member}#{member.incarnation}"


def _noted(row: Worker | Shard, _width: int) -> Text:
    return Text(printable(row.note[0]), style=row.note[1])


def _bar(row: Worker, width: int) -> Text:
    return bars.phases(row.pace.phases, row.longest_s, width)


def _gpu(row: Worker, _width: int) -> str:
    gpu = row.member.figures.gpu if row.member.figures is not None else None
    if gpu is None:
        return "-"
    used = f"{gpu.utilization:.0%}" if gpu.utilization is not None else ""
    return f"{used} {size(gpu.memory_used_bytes) if gpu.memory_used_bytes is not None else ''}".strip() or "-"


def _memory(member: MemberStatus) -> int:
    if member.figures is not None:
        return member.figures.memory_bytes
    return member.shard.memory_bytes if member.shard is not None else 0


def _heard(member: MemberStatus) -> str:
    return f"{member.heard_s:.1f} s" if member.heard_s >= 0 and member.state in HERE else "-"


W: list[Column[Worker]] = [
    Column("worker", 7, 0, lambda r, w: Text(name(r.member), style=_style(r.member)),
           lambda r: numbered(r.member.member)),
    Column("step", 7, 5, lambda r, w: f"{r.member.steps:,}" if r.member.steps >= 0 else "-",
           lambda r: r.member.steps, right=True),
    Column("time", 8, 2, lambda r, w: lasting(r.pace.step_s), lambda r: r.pace.step_s, right=True, title="a step"),
    Column("samples/s", 10, 4, lambda r, w: per_second(r.pace.samples_per_s), lambda r: r.pace.samples_per_s,
           right=True),
    Column("staleness", 6, 6, lambda r, w: str(r.member.staleness), lambda r: r.member.staleness, right=True,
           title="stale"),
    Column("own time", 14, 3, _bar, lambda r: r.pace.own_s, most=70, title="where it goes"),
    Column("memory", 7, 7, lambda r, w: size(_memory(r.member)) if _memory(r.member) else "-",
           lambda r: _memory(r.member), right=True),
    Column("gpu", 12, 8, _gpu, right=True),
    Column("heard", 6, 9, lambda r, w: _heard(r.member), lambda r: r.member.heard_s, right=True),
    Column("node", 16, 10, lambda r, w: r.member.node),
    Column("device", 7, 11, lambda r, w: r.member.device),
    Column("note", 18, 1, _noted, most=60, title=""),
]  # fmt: skip


def _queue(row: Shard) -> int | None:
    return row.member.shard.parked + row.member.shard.staged if row.member.shard is not None else None


def _held(row: Shard, _width: int) -> str:
    figures = row.member.shard
    return size(figures.parameter_bytes + figures.optimizer_bytes) if figures is not None else "-"


def _saved(row: Shard, _width: int) -> str:
    if row.pace.saved_in is None and row.pace.saved_out is None:
        return "-"
    return f"{share(row.pace.saved_in)} / {share(row.pace.saved_out)}"


S: list[Column[Shard]] = [
    Column("shard", 6, 0, lambda r, w: Text(name(r.member), style=_style(r.member)),
           lambda r: numbered(r.member.member)),
    Column("updates/s", 10, 2, lambda r, w: per_second(r.pace.updates_per_s), lambda r: r.pace.updates_per_s,
           right=True),
    Column("apply", 7, 3, lambda r, w: lasting(r.pace.apply_s), lambda r: r.pace.apply_s, right=True),
    Column("queue", 6, 4, lambda r, w: "-" if _queue(r) is None else str(_queue(r)), _queue, right=True),
    Column("in", 9, 5, lambda r, w: rate_of(r.pace.received_per_s) if r.member.shard else "-",
           lambda r: r.pace.received_per_s, right=True),
    Column("out", 9, 6, lambda r, w: rate_of(r.pace.sent_per_s) if r.member.shard else "-",
           lambda r: r.pace.sent_per_s, right=True),
    Column("saved", 15, 7, _saved, lambda r: r.pace.saved_in, right=True, title="saved in / out"),
    Column("holds", 7, 8, _held, lambda r: r.member.shard.parameter_bytes if r.member.shard else None, right=True),
    Column("push log", 8, 9, lambda r, w: size(r.member.shard.log_bytes) if r.member.shard else "-",
           lambda r: r.member.shard.log_bytes if r.member.shard else None, right=True),
    Column("memory", 7, 10, lambda r, w: size(_memory(r.member)) if _memory(r.member) else "-",
           lambda r: _memory(r.member), right=True),
    Column("chunks", 7, 11, lambda r, w: f"{r.member.shard.chunks:,}" if r.member.shard else "-",
           lambda r: r.member.shard.chunks if r.member.shard else None, right=True),
    Column("heard", 6, 12, lambda r, w: _heard(r.member), lambda r: r.member.heard_s, right=True),
    Column("node", 16, 13, lambda r, w: r.member.node),
    Column("note", 8, 1, _noted, most=70, title=""),
]  # fmt: skip


def _style(member: MemberStatus) -> str:
    if member.state in TROUBLED:
        return "red"
    return "" if member.state in HERE else "dim"


# -- one of them in full -------------------------------------------------------------------------------------


def details(known: Known, chosen: str, width: int, *, unicode: bool) -> Iterator[Text]:
    """Everything that is known of a member."""
    found = next((m for m in known.status.members if m.member == chosen), None) if known.status else None
    if found is None:
        yield Text(f"{printable(chosen)} is not here any more", style="yellow")
        return
    workers_, shards_ = known.paces()
    because = f": {found.because}" if found.because else ""
    yield Text(printable(f"{found.role} {name(found)} is {found.state}{because}"), style="bold")
    yield fact("node", f"{found.node}, process {found.pid}" if found.pid else found.node)
    if found.role == "worker":
        yield fact("device", found.device)
        if found.steps >= 0:
            yield fact("step", f"{found.steps:,}, {found.samples:,} samples, epoch {max(0, found.epoch) + 1}")
        yield fact("staleness", f"{found.staleness}")
    if found.heard_s >= 0:
        yield fact("heard", f"{found.heard_s:.1f} s ago")
    if found.metrics:
        yield fact("metrics", found.metrics)
    if found.figures is not None:
        yield from _of_worker(found, workers_.get(chosen, WorkerPace()), width, unicode=unicode)
    elif found.shard is not None:
        yield from _of_shard(found, shards_.get(chosen, ShardPace()), width, unicode=unicode)
    else:
        yield fact("figures", "it has told none yet")


def _of_worker(member: MemberStatus, pace: WorkerPace, width: int, *, unicode: bool) -> Iterator[Text]:
    figures = member.figures
    assert figures is not None
    if figures.memory_bytes:
        yield fact("memory", size(figures.memory_bytes))
    if (gpu := figures.gpu) is not None:
        said = [
            *([f"{gpu.utilization:.0%} busy"] if gpu.utilization is not None else []),
            *([f"{size(gpu.memory_used_bytes)} used"] if gpu.memory_used_bytes is not None else []),
            *([f"of {size(gpu.memory_bytes)}"] if gpu.memory_bytes is not None else []),
            *([f"{gpu.power_w:.0f} W"] if gpu.power_w is not None else []),
        ]
        yield fact("GPU", ", ".join(said) or "its driver does not say")
    if figures.learning_rate is not None:
        yield fact("learning rate", f"{figures.learning_rate:.4g}")
    if figures.compress:
        yield fact("compress", f"auto: {figures.compress}")
    if figures.left_out:
        yield fact("left out", f"{figures.left_out:,} steps: their gradient was not finite")
    yield fact("samples/s", per_second(pace.samples_per_s))
    yield from traffic(
        ("sent", pace.sent_per_s, figures.sent_bytes, figures.dense_sent_bytes),
        ("received", pace.received_per_s, figures.received_bytes, figures.dense_received_bytes),
    )
    if pace.step_s:
        yield Text()
        yield Text.assemble((f"a step takes {lasting(pace.step_s)}", "bold"), f" (mean of {pace.steps:,})")
        for phase in PHASES:
            if phase in pace.phases:
                yield _phase(phase, pace.phases[phase], pace.step_s, width)
        beside = [f"{each} {lasting(pace.phases[each])}" for each in BESIDE if each in pace.phases]
        if beside:
            yield fact("beside it", ", ".join(beside))
    yield from _histogram(
        "steps, by duration", figures.step_s, STEP_BOUNDS_S, lasting, width, unicode=unicode
    )
    yield from _histogram(
        "steps, by staleness", figures.staleness, STALENESS_BOUNDS, lambda bound: f"{bound:.0f}", width,
        unicode=unicode,
    )  # fmt: skip


def _of_shard(member: MemberStatus, pace: ShardPace, width: int, *, unicode: bool) -> Iterator[Text]:
    figures = member.shard
    assert figures is not None
    yield fact("updates", f"{figures.updates:,}, {per_second(pace.updates_per_s)} per second")
    yield fact("apply", lasting(pace.apply_s))
    yield fact(
        "parameters",
        f"{size(figures.parameter_bytes)} in {figures.chunks:,} chunks, version {figures.version:,}",
    )
    yield fact("optimizer", size(figures.optimizer_bytes))
    yield fact("push log", size(figures.log_bytes))
    yield fact("memory", size(figures.memory_bytes))
    yield fact("queue", f"{figures.parked:,} pulls wait, {figures.staged:,} pushes are staged")
    yield fact(
        "pushes",
        f"{figures.pushes:,} taken, {figures.duplicates:,} had counted before, {figures.refused:,} refused",
    )
    yield fact("pulls", f"{figures.pulls:,}")
    yield from traffic(
        ("received", pace.received_per_s, figures.received_bytes, figures.dense_received_bytes),
        ("sent", pace.sent_per_s, figures.sent_bytes, figures.dense_sent_bytes),
    )
    yield from _histogram(
        "updates, by duration", figures.apply_s, APPLY_BOUNDS_S, lasting, width, unicode=unicode
    )


def fact(key: str, text: str) -> Text:
    return Text.assemble((f"  {key:<{LABEL}} ", "bold"), printable(text))


def traffic(*ways: tuple[str, float, int, int]) -> Iterator[Text]:
    for way, rate, whole, dense in ways:
        less = f", {share(1 - whole / dense)} less than dense" if dense > whole > 0 else ""
        yield fact(way, f"{rate_of(rate)}, {size(whole)} in all{less}")


def _phase(phase: str, seconds: float, whole: float, width: int) -> Text:
    told = f"  {phase:<{LABEL}} {lasting(seconds):>9} {seconds / whole:>4.0%}  "
    bar = phase[0] * round((width - len(told)) * min(1.0, seconds / whole))
    return Text.assemble(told, (bar, bars.STYLES.get(phase, bars.PLAIN)))


def _histogram(
    title: str,
    classes: Sequence[int],
    bounds: Sequence[float],
    word: Callable[[float], str],
    width: int,
    *,
    unicode: bool,
) -> Iterator[Text]:
    """From the first class that is not empty to the last."""
    filled = [index for index, count in enumerate(classes) if count]
    if not filled or len(classes) != len(bounds) + 1:
        return
    yield Text()
    yield Text(title, style="bold")
    most = max(classes)
    for index in range(filled[0], filled[-1] + 1):
        what = f"up to {word(bounds[index])}" if index < len(bounds) else f"above {word(bounds[-1])}"
        told = f"  {what:<{LABEL}} {classes[index]:>9,}  "
        yield Text(told + ("█" if unicode else "#") * round((width - len(told)) * classes[index] / most))
