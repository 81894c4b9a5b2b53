"""Time to the same loss: one model on the same samples under zml and under torch.distributed, over slow links.

    python bench/train.py                         at 1 Gbit/s and 100 Mbit/s, about a quarter of an hour
    python bench/train.py --quick                 a look, some minutes
    python bench/train.py --zml "topk:1%" --zml "topk:1% --staleness 1" --peers ddp,powersgd:4 --link 1gbit
    python bench/train.py --plot loss.png --markdown table.md --json runs.json

Four workers, each in a network namespace of its own; see `links.py` for what a link is, and `trainee.py` for the script
that they train. A zml shard sits beside each worker, the coordinator beside the first: nobody gets a machine more than
torch.distributed has. zml goes over tcp and encrypts (CURVE), which it demands beyond one machine; torch.distributed
does not encrypt. Every process computes with one thread.

target     the validation loss (mean of the last five evaluations) that one process has reached after --target-step
           steps on the same samples
time       from the moment when the last worker is ready for its first step; start-up stands beside it
bytes      that left any of the machines until then, counted by the kernel on the links
~          not run to its end: every step of it takes as long as any other and computes what it computed on the faster
           link. So some of its steps were timed, and its loss at each step is taken from there. --whole runs it all.
"""

import json
import math
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import click
import links
from links import Machines, Traffic

HERE = Path(__file__).resolve().parent
SMOOTH = 5  # evaluations
COORDINATOR_PORT, STORE_PORT = 7077, 29500
POLL_S = 0.1
PEERS = "one process,ddp,ddp fp16,ddp powersgd:4,local sgd:8"
ZML = ("none", "bf16", "topk:1%")
HOOKS = ("ddp fp16", "ddp bf16", "ddp powersgd")  # what the best hook is chosen from


@dataclass(frozen=True)
class Plan:
    """What is the same for all systems."""

    workers: int
    steps: int
    target_step: int
    trainee: tuple[str, ...]  # arguments of the script, but for the number of steps
    budget_s: float  # a run that would take longer on a slower link is timed for some steps only
    stall_s: float  # a run that makes no step for so long hangs
    timed_steps: int


@dataclass(frozen=True)
class System:
    name: str

    @property
    def is_zml(self) -> bool:
        return self.name.startswith("zml ")

    @property
    def in_step(self) -> bool:
        """Does it compute the same whatever the link? Then its losses on one link are those on another."""
        return not any(word in self.name for word in ("--staleness", "--async"))

    @property
    def flags(self) -> list[str]:
        """Of the trainee, or of the coordinator."""
        if self.is_zml:
            return ["--compress", *self.name.removeprefix("zml ").split()]
        kind, _, number = self.name.partition(":")
        match kind:
            case "one process":
                return ["--way", "alone"]
            case "ddp":
                return ["--way", "torch"]
            case "ddp fp16" | "ddp bf16":
                return ["--way", "torch", "--hook", kind.removeprefix("ddp ")]
            case "ddp powersgd":
                return ["--way", "torch", "--hook", "powersgd", "--powersgd-rank", number or "4", "--bucket-mb", "1000"]
            case "local sgd":
                return ["--way", "torch", "--hook", "local", "--period", number or "8"]
        raise click.BadParameter(f"there is no peer {self.name}")


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
    steps_timed: int = 0
    step_ms: float = 0.0  # without the first three
    step_mb: float = 0.0
    projected: bool = False
    points: list[Point] = field(default_factory=list)

    def reached(self, target: float) -> Point | None:
        return next((point for point in self.points[SMOOTH - 1 :] if point.smooth <= target), None)


# -- processes ---------------------------------------------------------------------------------------------------


class Crowd:
    """Processes that end with their measurement, whatever happens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ZML_")}
        path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = {
            **kept,
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
            "TRAINEE_BEGAN": str(folder),
        }

    def start(self, name: str, command: Sequence[str], **more: str) -> None:
        with (self.folder / f"{name}.txt").open("wb") as output:
            self.started[name] = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment | more,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def said(self, name: str) -> str:
        """The line of its output that says most."""
        text = (self.folder / f"{name}.txt").read_text(errors="replace")
        lines = [line.strip(" │\t") for line in text.splitlines() if line.strip(" │╭╰─╮╯\t")]
        errors = [line for line in lines if line.startswith("error")]
        return f"{name}: {(errors or lines or ['nothing'])[-1][:200]}"

    def wait(self, names: Sequence[str], progress: Path, stall_s: float) -> str:
        """Until all of these have ended; what went wrong, or nothing."""
        moved, seen = time.monotonic(), -1
        while True:
            codes = {name: self.started[name].poll() for name in names}
            if bad := [name for name, code in codes.items() if code]:
                time.sleep(1.0)  # the first to fail may not be the first to be seen
                bad = [name for name in names if self.started[name].poll()] or bad
                return self.said(bad[0])
            if all(code == 0 for code in codes.values()):
                return ""
            size = progress.stat().st_size if progress.exists() else 0
            if size != seen:
                moved, seen = time.monotonic(), size
            elif time.monotonic() - moved > stall_s:
                done = len(progress.read_text().splitlines()) if progress.exists() else 0
                return f"hung: no step within {stall_s:g} s after step {done}"
            time.sleep(POLL_S)

    def end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            alive = [process for process in self.started.values() if process.poll() is None]
            for process in alive:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            deadline = time.monotonic() + 3
            while any(process.poll() is None for process in alive) and time.monotonic() < deadline:
                time.sleep(POLL_S)


@contextmanager
def crowd(folder: Path) -> Iterator[Crowd]:
    made = Crowd(folder)
    try:
        yield made
    finally:
        made.end()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_torch(made: Crowd, system: System, net: Machines, plan: Plan, script: Sequence[str]) -> list[str]:
    port = STORE_PORT if net.shaped else free_port()
    master = ["--master", f"{net.address(0)}:{port}", "--patience", str(plan.stall_s + 30)]
    for rank in range(plan.workers):
        command = [*net.on(rank), *script, *system.flags, *master, "--rank", str(rank)]
        record = {"TRAINEE_RECORD": str(made.folder)} if rank == 0 else {}
        made.start(f"rank{rank}", command, GLOO_SOCKET_IFNAME=net.interface, **record)
    return [f"rank{rank}" for rank in range(plan.workers)]


def start_zml(made: Crowd, system: System, net: Machines, plan: Plan, script: Sequence[str]) -> list[str]:
    zml = [sys.executable, "-m", "zml"]
    subprocess.run([*zml, "keys", "keys"], cwd=made.folder, env=made.environment, check=True, capture_output=True)
    port = COORDINATOR_PORT if net.shaped else free_port()
    at = f"tcp://{net.address(0)}:{port}"
    count, keys = str(plan.workers), ["--keys", "keys"]
    job = ["-w", count, "-p", count, *system.flags, "--bind", at, *keys, *script[1:], "--way", "zml"]
    made.start("coordinator", [*net.on(0), *zml, "coordinator", *job])
    for index in range(plan.workers):
        member = [*keys, "--coordinator", at]
        bind = ["--bind", f"tcp://{net.address(index)}:0"]
        made.start(f"p{index}", [*net.on(index), *zml, "ps", "--shard", str(index), *bind, *member])
        record = {"TRAINEE_RECORD": str(made.folder)} if index == 0 else {}
        worker = [*net.on(index), *zml, "worker", "--cpu", "--name", f"w{index}", *member]
        made.start(f"w{index}", worker, **record)
    return [f"w{index}" for index in range(plan.workers)] + ["coordinator"]


def measure(
    system: System, link: str, net: Machines, plan: Plan, steps: int, keep: Path | None = None
) -> Run:
    """Run it for so many steps. What fails is told in the run."""
    run = Run(system.name, link)
    with tempfile.TemporaryDirectory(prefix="zml-train-") as scratch:
        folder = Path(scratch)
        shutil.copy(HERE / "trainee.py", folder)
        shutil.copy(HERE / "checkout.py", folder)
        script = [sys.executable, str(HERE / "trainee.py"), *plan.trainee, "--steps", str(steps)]
        begin = time.monotonic()
        with crowd(folder) as made:
            made.start("meter", net.meter())
            if system.name == "one process":
                made.start("rank0", [*script, *system.flags], TRAINEE_RECORD=str(folder))
                names = ["rank0"]
            else:
                names = (start_zml if system.is_zml else start_torch)(made, system, net, plan, script)
            run.failure = made.wait(names, folder / "steps.txt", plan.stall_s)
        if keep:
            shutil.copytree(folder, keep / f"{link} {system.name}".replace(" ", "_"), dirs_exist_ok=True)
        if not run.failure:
            evaluate(run, folder, begin)
    return run


def evaluate(run: Run, folder: Path, begin: float) -> None:
    """Fill in the run from what the processes have left in the folder."""
    result = json.loads((folder / "result.json").read_text())
    traffic = Traffic.read(folder / "meter.txt")
    ready = max(float(file.read_text()) for file in folder.glob("began-*.txt"))
    ends, losses = result["ends"], result["losses"]
    run.start_s = ready - begin
    run.steps_timed = len(ends)
    first = min(3, len(ends) - 2)
    run.step_ms = 1e3 * (ends[-1] - ends[first]) / (len(ends) - 1 - first)
    run.step_mb = traffic.between(ends[first], ends[-1]) / 1e6 / (len(ends) - 1 - first)
    for number, (step, loss) in enumerate(losses):
        when = ends[step - 1] if step else ready
        smooth = statistics.mean(each for _, each in losses[max(0, number - SMOOTH + 1) : number + 1])
        run.points.append(Point(step, when - ready, traffic.between(ready, when) / 1e6, loss, smooth))


def project(short: Run, whole: Run) -> Run:
    """The losses of `whole` at the pace of `short`, which is the same system on a slower link."""
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


def expected_step_s(fast: Run, rate: str, workers: int) -> float:
    """Of the same system on a slower link, at the least."""
    return max(fast.step_ms / 1e3, fast.step_mb * 8e6 / workers / links.bits_per_s(rate))


# -- tables ------------------------------------------------------------------------------------------------------

COLUMNS = (
    *("system", "time to target s", "of DDP's", "of the best hook's", "steps", "MB until target", "of DDP's bytes"),
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
    figure, panels = plt.subplots(1, len(by_link), figsize=(6.4 * len(by_link), 4.6), sharey=True, squeeze=False)
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
            "target", (1, target), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
        panel.set_xscale("log")
        panel.set_xlabel("seconds since the first step (log)")
        panel.set_title(link)
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.legend(fontsize=7.5, frameon=False)
    panels[0][0].set_ylabel("validation loss, mean of 5 evaluations")
    panels[0][0].set_ylim(top=max(4 * target, 1.0), bottom=0.8 * target)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


# -- the whole ---------------------------------------------------------------------------------------------------


def interrupted(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def target_of(alone: Run, step: int) -> float:
    """What one process has reached, rounded up: other orders of addition give other last digits."""
    lowest = min(point.smooth for point in alone.points[SMOOTH - 1 :] if point.step <= step)
    return math.ceil(1000 * lowest) / 1000


def say(run: Run) -> None:
    if run.failure:
        text = run.failure
    else:
        text = f"{run.step_ms:7.0f} ms a step, {run.step_mb:6.1f} MB a step, loss {run.points[-1].smooth:.4f}"
    click.echo(f"{run.link:9} {run.system:28} {text}", err=True)


def measure_all(
    systems: Sequence[System], rates: Sequence[str], net: Machines, plan: Plan, keep: Path | None, whole: bool
) -> dict[str, list[Run]]:
    """Fastest link first. Each run by itself: one that fails does not end the others."""
    alone = measure(System("one process"), "no link", net, plan, plan.steps, keep)
    say(alone)
    if alone.failure:
        raise click.ClickException(f"one process alone fails: {alone.failure}")
    names = sorted(rates, key=links.bits_per_s, reverse=True) if net.shaped else ["unshaped"]
    by_link: dict[str, list[Run]] = {name: [alone] for name in names}
    fast: dict[str, Run] = {}
    for name in names:
        if net.shaped:
            net.shape(name)
        for system in systems:
            before = fast.get(system.name)
            if before is not None and before.failure:
                run = replace(before, link=name, failure=f"not tried: {before.failure}")
            elif before is None or whole or not system.in_step:
                run = measure(system, name, net, plan, plan.steps, keep)
            else:
                step_s = expected_step_s(before, name, plan.workers)
                if step_s * plan.steps <= plan.budget_s:
                    run = measure(system, name, net, plan, plan.steps, keep)
                else:
                    run = measure(system, name, net, plan, min(plan.steps, plan.timed_steps), keep)
                    run = run if run.failure else project(run, before)
            say(run)
            by_link[name].append(run)
            fast.setdefault(system.name, run)
    return by_link


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--zml", "ours", multiple=True, default=ZML, show_default=True, metavar="COMPRESS [FLAGS]")
@click.option("--peers", default=PEERS, show_default=True, help="Comma-separated; may be empty.")
@click.option("--link", "rates", multiple=True, default=("1gbit", "100mbit"), show_default=True)
@click.option("--workers", type=click.IntRange(2), default=4, show_default=True)
@click.option("--steps", type=click.IntRange(24), default=160, show_default=True)
@click.option("--target-step", type=click.IntRange(16), default=120, show_default=True)
@click.option("--batch-size", type=int, default=32, show_default=True, help="Of one worker.")
@click.option("--width", type=int, default=2048, show_default=True, help="Of the hidden layers.")
@click.option("--optimizer", type=click.Choice(["sgd", "adamw"]), default="sgd", show_default=True)
@click.option("--lr", type=float, help="[default: 0.05 for sgd, 5e-4 for adamw]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--data", type=click.Path(file_okay=False, path_type=Path), help="Folder of the four idx files.")
@click.option("--budget", type=float, default=75.0, show_default=True, help="See ~; seconds.")
@click.option("--timed-steps", type=int, default=12, show_default=True, help="See ~.")
@click.option("--whole", is_flag=True, help="Run everything to its end.")
@click.option("--stall", type=float, default=60.0, show_default=True, help="Seconds without a step: it hangs.")
@click.option("--quick", is_flag=True, help="Fewer steps, one link.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--markdown", "markdown_file", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), metavar="FILE", help="A PNG.")
@click.option("--keep", type=click.Path(path_type=Path), metavar="FOLDER", help="Keep what the processes left.")
def main(
    ours: tuple[str, ...],
    peers: str,
    rates: tuple[str, ...],
    workers: int,
    steps: int,
    target_step: int,
    batch_size: int,
    width: int,
    optimizer: str,
    lr: float | None,
    seed: int,
    data: Path | None,
    budget: float,
    timed_steps: int,
    whole: bool,
    stall: float,
    quick: bool,
    json_file: Path | None,
    markdown_file: Path | None,
    plot_file: Path | None,
    keep: Path | None,
) -> None:
    if quick:
        steps, target_step, rates = min(steps, 48), min(target_step, 40), rates[:1]
    lr = lr or (0.05 if optimizer == "sgd" else 5e-4)
    trainee = {"workers": workers, "batch-size": batch_size, "width": width, "optimizer": optimizer, "lr": lr, "seed": seed}
    arguments = [text for name, value in trainee.items() for text in (f"--{name}", str(value))]
    arguments += ["--data", str(data.resolve())] if data else []
    plan = Plan(workers, steps, target_step, tuple(arguments), budget, stall, timed_steps)
    wanted = [name.strip() for name in peers.split(",") if name.strip() and name.strip() != "one process"]
    systems = [System(name) for name in (*wanted, *(f"zml {flags}" for flags in ours))]
    for system in systems:
        system.flags  # noqa: B018  a name that is wrong is told before anything runs
    for rate in rates:
        links.bits_per_s(rate)
    signal.signal(signal.SIGTERM, interrupted)
    load = os.getloadavg()[0]
    with links.machines(workers) as net:
        if not net.shaped:
            click.echo("not root: all on the loopback interface, nothing is shaped", err=True)
        by_link = measure_all(systems, rates, net, plan, keep, whole)
    target = target_of(next(iter(by_link.values()))[0], target_step)
    head = (
        f"{workers} workers, {batch_size} images each a step, {optimizer} lr {lr:g}, seed {seed}, {steps} steps; target: "
        f"validation loss {target:.3f}, which one process has reached by step {target_step}"
    )
    sections = []
    for link, runs in by_link.items():
        table = [list(COLUMNS), *rows(runs, target)]
        where = f"links of {link}" if net.shaped else "loopback, not shaped (not root)"
        click.echo(f"\n{where}: {head}\n{text_table(table)}")
        sections.append(f"{where[0].upper()}{where[1:]}: {head}.\n\n{markdown_table(table)}\n")
    if markdown_file:
        markdown_file.write_text("\n".join(sections))
    if json_file:
        about = {"machine": platform.platform(), "cores": os.cpu_count(), "load_before": load, "target": target}
        runs_as_json = {link: [asdict(run) for run in runs] for link, runs in by_link.items()}
        json_file.write_text(json.dumps({**about, "plan": asdict(plan), "links": runs_as_json}, indent=1))
    if plot_file:
        draw(plot_file, by_link, target)


if __name__ == "__main__":
    main()
