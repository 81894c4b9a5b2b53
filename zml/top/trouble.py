"""What a person should look at, in words: members that are gone, slow, starving or quiet, and numbers that are none.
Who is slow and who starves is judged in `zml.stragglers`."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from ..status import JobStatus, MemberStatus
from ..stragglers import STARVING, Slow, data_share, starving, stragglers, unheard
from ..text.console import HERE, TROUBLED, duration, names
from .paces import WorkerPace

QUIET_S = 15.0  # without a step, where steps are shorter than a tenth of that


def slow(paces: Mapping[str, WorkerPace]) -> dict[str, Slow]:
    """Stragglers among those that have made steps lately."""
    return stragglers({name: pace.phases for name, pace in paces.items() if pace.own_s is not None})


def quiet(pace: WorkerPace) -> float | None:
    """How long it has made no step, where that is long."""
    return pace.quiet_s if pace.quiet_s >= max(QUIET_S, 10 * (pace.step_s or 0.0)) else None


def note(
    member: MemberStatus,
    pace: WorkerPace | None,
    straggles: Mapping[str, Slow],
    *,
    running: bool,
) -> tuple[str, str]:
    """What is to be said of a member, and in which style; the gravest first. Empty: it is well."""
    if member.state in TROUBLED:
        because = f": {member.because}" if member.because else ""
        return f"{member.state}{because}", "bold red"
    if member.state not in HERE:
        return member.state, "dim"
    if unheard(member.heard_s, member.every_s):
        return f"silent for {duration(member.heard_s)}", "red"
    if pace is not None and running:
        if (lasting := quiet(pace)) is not None:
            return f"no step for {duration(lasting)}", "red"
        if member.member in straggles:
            found = straggles[member.member]
            return f"slow {found.ratio:.1f}x, {found.phase}", "bold yellow"
        if (share := data_share(pace.phases)) >= STARVING:
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
        if unheard(member.heard_s, member.every_s):
            found.append((f"{member.role} {member.member} is silent for {duration(member.heard_s)}", "red"))
    active = {m.member: paces[m.member] for m in well if m.member in paces}
    for name, pace in active.items():
        if (lasting := quiet(pace)) is not None:
            found.append((f"{name} has made no step for {duration(lasting)}", "red"))
    straggles = slow(active)
    for name, how in straggles.items():
        found.append(
            (
                f"{name} is slow: {how.ratio:.1f} times what the others take, most of it in {how.phase}",
                "yellow",
            )
        )
    hungry = starving({name: pace.phases for name, pace in active.items()}, straggles)
    if hungry:
        share = median(hungry.values())
        verb = "waits" if len(hungry) == 1 else "wait"
        found.append(
            (
                f"{names(list(hungry))} {verb} for data {share:.0%} of the time: more loader workers help",
                "yellow",
            )
        )
    if status.checkpoint.because:
        found.append((f"the last checkpoint failed: {status.checkpoint.because}", "red"))
    return found
