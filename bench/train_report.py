"""What `train.py` has measured, as tables and as a plot."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

SMOOTH = 5  # evaluations
HOOKS = ("ddp fp16", "ddp bf16", "ddp powersgd")  # what the best hook is chosen from
SAME = 0.01  # how far two losses of one computation may be apart: other orders of addition
BUSY = 0.2  # cores that others use, from which on a figure says so


@dataclass
class Point:
    """An evaluation."""

    step: int
    seconds: float  # since the first step began
    megabytes: float  # that had left the machines
    loss: float
    smooth: float


@dataclass
class Run:
    """One system on one link."""

    system: str
    link: str
    failure: str = ""
    start_s: float = 0.0
    wall_s: float = 0.0  # all of it: start, steps, evaluation, end
    steps_timed: int = 0
    step_ms: float = 0.0  # without the first three
    step_mb: float = 0.0
    others: float = 0.0  # cores that other processes of this machine used meanwhile
    projected: bool = False
    points: list[Point] = field(default_factory=list)

    def reached(self, target: float) -> Point | None:
        return next((point for point in self.points[SMOOTH - 1 :] if point.smooth <= target), None)


def smoothed(losses: Sequence[float]) -> list[float]:
    return [statistics.mean(losses[max(0, end - SMOOTH) : end]) for end in range(1, len(losses) + 1)]


def agree(one: Run, other: Run) -> bool:
    """Have both computed the same, as far as both went?"""
    pairs = zip(one.points, other.points, strict=False)
    return all(abs(a.loss - b.loss) <= SAME * b.loss for a, b in pairs)


def project(short: Run, whole: Run) -> Run:
    """The losses of `whole` at the pace of `short`, which computes the same."""
    first, last = short.points[1], short.points[-1]
    steps = last.step - first.step
    pace_s, pace_mb = (last.seconds - first.seconds) / steps, (last.megabytes - first.megabytes) / steps
    points = [
        replace(
            point,
            seconds=max(0.0, first.seconds + (point.step - first.step) * pace_s),
            megabytes=max(0.0, first.megabytes + (point.step - first.step) * pace_mb),
        )
        for point in whole.points
    ]
    return replace(short, points=points, projected=True)


COLUMNS = (
    *(
        "system",
        "time to target s",
        "of DDP's",
        "of the best hook's",
        "steps",
        "MB until target",
        "of DDP's bytes",
    ),
    *("ms a step", "loss at the end", "start-up s", ""),
)


def rows(runs: Sequence[Run], target: float) -> list[list[str]]:
    """One per system of one link, as text."""
    found = {run.system: (run, run.reached(target)) for run in runs}
    ddp = found.get("ddp", (None, None))[1]
    hooks = [point for name, (_, point) in found.items() if point and name.startswith(HOOKS)]
    best = min(hooks, key=lambda point: point.seconds, default=None)
    table = []
    for run, point in found.values():
        if run.failure:
            table.append([run.system, *["-"] * 9, run.failure])
            continue
        about = "~" if run.projected else ""
        local = run.system == "one process"
        cells = [run.system, "-", "-", "-", "-", "-", "-"]
        note = "" if point else f"target not reached; lowest {min(each.smooth for each in run.points):.3f}"
        if point:
            cells[1], cells[4] = f"{about}{point.seconds:.1f}", str(point.step)
            cells[2] = f"{point.seconds / ddp.seconds:.2f}" if ddp else "-"
            cells[3] = f"{point.seconds / best.seconds:.2f}" if best else "-"
            if not local:
                cells[5] = f"{about}{point.megabytes:,.0f}"
                cells[6] = f"{100 * point.megabytes / ddp.megabytes:.1f} %" if ddp else "-"
        if run.others > BUSY:
            note = f"others used {run.others:.1f} cores. {note}".strip()
        if run.projected:
            note = f"{run.steps_timed} steps timed. {note}".strip()
        cells += [f"{run.step_ms:,.0f}", f"{run.points[-1].smooth:.4f}", f"{run.start_s:.0f}", note]
        table.append(cells)
    return table


def text_table(table: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, len(COLUMNS) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    )


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    head, *body = table
    marks = ["---", *["---:"] * (len(COLUMNS) - 2), "---"]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, marks, *body))


def draw(file: Path, by_link: dict[str, list[Run]], target: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(run.system for runs in by_link.values() for run in runs if run.points))
    peers, ours = [n for n in names if not n.startswith("zml ")], [n for n in names if n.startswith("zml ")]
    shades = {name: plt.cm.Greys(0.35 + 0.55 * i / max(1, len(peers) - 1)) for i, name in enumerate(peers)}
    shades |= {name: plt.cm.tab10(i) for i, name in enumerate(ours)}
    dashes = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
    figure, panels = plt.subplots(
        1, len(by_link), figsize=(6.4 * len(by_link), 4.6), sharey=True, squeeze=False
    )
    top = 3 * target
    for panel, (link, runs) in zip(panels[0], by_link.items(), strict=True):
        for run in runs:
            points = run.points[1:]
            if not points:
                continue
            style: Any = "-" if run.system in ours else dashes[peers.index(run.system) % len(dashes)]
            label = run.system + (" (projected)" if run.projected else "")
            panel.plot(
                [p.seconds for p in points],
                [p.smooth for p in points],
                linestyle=style,
                linewidth=2.0 if run.system in ours else 1.3,
                color=shades[run.system],
                label=label,
            )
        panel.axhline(target, color="black", linewidth=0.6)
        panel.annotate(
            "target ", (1, target), xycoords=("axes fraction", "data"), ha="right", va="top", fontsize=8
        )
        shown = [point.seconds for run in runs for point in run.points[1:] if point.smooth <= top]
        panel.set_xscale("log")
        panel.set_xlim(left=0.8 * min(shown, default=1.0))
        panel.set_xlabel("seconds since the first step (log)")
        panel.set_title(link)
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.legend(fontsize=7.5, frameon=False)
    panels[0][0].set_ylabel("validation loss, mean of five evaluations (log)")
    panels[0][0].set_yscale("log")
    panels[0][0].set_ylim(top=top, bottom=0.95 * target)
    panels[0][0].yaxis.set_major_formatter("{x:.2g}")
    panels[0][0].yaxis.set_minor_formatter("{x:.2g}")
    figure.tight_layout()
    figure.savefig(file, dpi=150)
