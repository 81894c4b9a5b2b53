"""What a person should look at, in words: members that are gone, slow, starving or quiet, and numbers that are none.

Rule: a straggler is who takes long itself. In sync all steps last equally long, and the one that is waited for is the
one that does not wait: so workers are compared without their waiting.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from ..figures import PHASES
from ..status import JobStatus, MemberStatus
from ..text.console import HERE, TROUBLED, duration, names
from .paces import WorkerPace, busy

SLOW = 1.5  # times what the others take
NOTICED_S = 0.005  # by which it must be more, or nobody would notice
STARVING = 0.3  # share of a step that waits for the loader
QUIET_S = 15.0  # without a step, where steps are shorter than a tenth of that
SILENT_S = 3.0  # without a sign of life


def slow(paces: Mapping[str, WorkerPace]) -> dict[str, tuple[float, str]]:
    """Stragglers: how many times as long as the median of the others they take, and in which phase mostly."""
    own = busy(paces)
    found = {}
    for name, seconds in own.items():
        others = [paces[other] for other in own if other != name]
        if not others:
            continue
        usual = median(own[other] for other in own if other != name)
        if seconds < SLOW * usual or seconds - usual < NOTICED_S:
            continue
        more = {
            phase: paces[name].phases.get(phase, 0.0) - median(pace.phases.get(phase, 0.0) for pace in others)
            for phase in PHASES
            if phase != "wait"
        }
        found[name] = (
            seconds / usual if usual > 0 else float("inf"),
            max(more, key=lambda phase: more[phase]),
        )
    return found


def starving(pace: WorkerPace) -> float | None:
    """The share of its steps that waits for the loader, where that is much."""
    if not pace.step_s:
        return None
    share = pace.phases.get("data", 0.0) / pace.step_s
    return share if share >= STARVING else None


def quiet(pace: WorkerPace) -> float | None:
    """How long it has made no step, where that is long."""
    return pace.quiet_s if pace.quiet_s >= max(QUIET_S, 10 * (pace.step_s or 0.0)) else None


def note(
    member: MemberStatus,
    pace: WorkerPace | None,
    straggles: Mapping[str, tuple[float, str]],
    *,
    running: bool,
) -> tuple[str, str]:
    """What is to be said of a member, and in which style; the gravest first. Empty: it is well."""
    if member.state in TROUBLED:
        because = f": {member.because}" if member.because else ""
        return f"{member.state}{because}", "bold red"
    if member.state not in HERE:
        return member.state, "dim"
    if member.heard_s >= SILENT_S:
        return f"silent for {duration(member.heard_s)}", "red"
    if pace is not None and running:
        if (lasting := quiet(pace)) is not None:
            return f"no step for {duration(lasting)}", "red"
        if member.member in straggles:
            times, phase = straggles[member.member]
            return f"slow {times:.1f}x, {phase}", "bold yellow"
        if (share := starving(pace)) is not None:
            return f"starving, data {share:.0%}", "yellow"
    if member.figures is not None and member.figures.left_out:
        return f"left out {member.figures.left_out:,} steps", "yellow"
    return ("joined", "dim") if member.state == "joined" else ("", "")


def sentences(status: JobStatus, paces: Mapping[str, WorkerPace]) -> list[tuple[str, str]]:
    """All of it about the job, the gravest first, each with its style."""
    found: list[tuple[str, str]] = []
    running = status.state in ("RUNNING", "DRAINING")
    for member in status.members:
        if member.state in TROUBLED:
            because = f": {member.because}" if member.because else ""
            found.append((f"{member.role} {member.member} is {member.state}{because}", "bold red"))
    bad = [name for name, value in status.values.items() if value is None]
    if bad:
        found.append(
            (f"{names(bad)} {'is' if len(bad) == 1 else 'are'} not finite (NaN or infinite)", "bold red")
        )
    left_out = sum(m.figures.left_out for m in status.members if m.figures is not None)
    if left_out:
        found.append((f"{left_out:,} steps were left out: their gradient was not finite", "red"))
    if not running:
        return found
    well = [member for member in status.members if member.state in HERE]
    for member in well:
        if member.heard_s >= SILENT_S:
            found.append((f"{member.role} {member.member} is silent for {duration(member.heard_s)}", "red"))
    active = {m.member: paces[m.member] for m in well if m.member in paces}
    for name, pace in active.items():
        if (lasting := quiet(pace)) is not None:
            found.append((f"{name} has made no step for {duration(lasting)}", "red"))
    straggles = slow(active)
    for name, (times, phase) in straggles.items():
        found.append(
            (f"{name} is slow: {times:.1f} times what the others take, most of it in {phase}", "yellow")
        )
    hungry = [
        name
        for name, pace in active.items()
        if starving(pace) is not None and straggles.get(name, (0.0, ""))[1] != "data"
    ]
    if hungry:
        share = median(starving(active[name]) or 0.0 for name in hungry)
        verb = "waits" if len(hungry) == 1 else "wait"
        found.append(
            (f"{names(hungry)} {verb} for data {share:.0%} of the time: more loader workers help", "yellow")
        )
    if status.checkpoint.because:
        found.append((f"the last checkpoint failed: {status.checkpoint.because}", "red"))
    return found
