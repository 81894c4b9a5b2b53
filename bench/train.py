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
~          not run to its end, because its losses are known: what sends every gradient in full computes what one process
           computes (compared as far as it went), at the same pace in every step. Some steps were timed.
           --whole runs everything to its end.
"""

import json
import math
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import click
import links
from links import Machines, Traffic
from train_report import (
    COLUMNS,
    SMOOTH,
    Point,
    Run,
    agree,
    draw,
    markdown_table,
    project,
    rows,
    smoothed,
    text_table,
)

HERE = Path(__file__).resolve().parent
COORDINATOR_PORT, STORE_PORT = 7077, 29500
POLL_S = 0.1
INTERRUPTED = 130
PEERS = "one process,ddp,ddp fp16,ddp powersgd:4,local sgd:16"
ZML = ("none", "bf16", "auto", "topk:1%", "topk:1% --staleness 1", "topk:1% --local-steps 8")


@dataclass(frozen=True)
class Plan:
    """What is the same for all systems."""

    workers: int
    steps: int
    target_step: int
    trainee: tuple[str, ...]  # arguments of the script, but for the number of steps
    stall_s: float  # a run that makes no step for so long hangs
    timed_steps: int


@dataclass(frozen=True)
class System:
    name: str

    @property
    def is_zml(self) -> bool:
        return self.name.startswith("zml ")

    @property
    def exact(self) -> bool:
        """Does it compute what one process computes, but for the rounding of 16-bit gradients?"""
        return self.name in ("ddp", "ddp fp16", "ddp bf16", "zml none", "zml bf16")

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
                return [
                    "--way",
                    "torch",
                    "--hook",
                    "powersgd",
                    "--powersgd-rank",
                    number or "4",
                    "--bucket-mb",
                    "1000",
                ]
            case "local sgd":
                return ["--way", "torch", "--hook", "local", "--period", number or "8"]
        raise click.BadParameter(f"there is no peer {self.name}")


class Load:
    """User time of all processes of this machine, and of those that we started and have seen the end of."""

    def __init__(self) -> None:
        self.everybody, self.ours = self.now()

    @staticmethod
    def now() -> tuple[float, float]:
        user, nice = map(int, Path("/proc/stat").read_text().split()[1:3])
        own = (
            resource.getrusage(resource.RUSAGE_SELF).ru_utime
            + resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        )
        return (user + nice) / os.sysconf("SC_CLK_TCK"), own

    def others(self, seconds: float) -> float:
        everybody, ours = self.now()
        return max(0.0, everybody - self.everybody - (ours - self.ours)) / seconds


# -- processes ---------------------------------------------------------------------------------------------------


class CannotStart(Exception):
    """A process that others need has failed."""


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
        errors = [line for line in lines if line.startswith("error:") or "ZML-E" in line]
        return f"{name}: {(errors or lines or ['said nothing'])[-1][:200]}"

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
                lines = progress.read_text().splitlines() if progress.exists() else []
                done = len([line for line in lines if line != "evaluated"])
                return f"hung: nothing within {stall_s:g} s after step {done}"
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
    made.start("keys", [*zml, "keys", "keys"])
    if made.started["keys"].wait():
        raise CannotStart(made.said("keys"))
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
        script = [sys.executable, str(HERE / "trainee.py"), *plan.trainee, "--steps", str(steps)]
        begin, load = time.monotonic(), Load()
        with crowd(folder) as made:
            made.start("meter", net.meter())
            if system.name == "one process":
                made.start("rank0", [*script, *system.flags], TRAINEE_RECORD=str(folder))
                names = ["rank0"]
            else:
                try:
                    names = (start_zml if system.is_zml else start_torch)(made, system, net, plan, script)
                except CannotStart as error:
                    names, run.failure = [], str(error)
            run.failure = run.failure or made.wait(names, folder / "steps.txt", plan.stall_s)
        run.wall_s = time.monotonic() - begin
        run.others = load.others(run.wall_s)
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
    smooth = smoothed([loss for _, loss in losses])
    for (step, loss), mean in zip(losses, smooth, strict=True):
        when = ends[step - 1] if step else ready
        run.points.append(Point(step, when - ready, traffic.between(ready, when) / 1e6, loss, mean))


def compile_kernels() -> None:
    """What a machine does once, and what no figure is about: a job that ends at once."""
    script = [str(HERE / "trainee.py"), "--way", "zml", "--width", "64", "--steps", "4", "--batch-size", "8"]
    with tempfile.TemporaryDirectory(prefix="zml-train-") as scratch, crowd(Path(scratch)) as made:
        for name in ("first", "second"):  # compiling may take longer than members wait for each other
            made.start(name, [sys.executable, "-m", "zml", "run", "--cpu", "--compress", "topk:1%", *script])
            if not made.started[name].wait():
                return


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
        text += f", others {run.others:.1f} cores"
    text += f" ({run.wall_s:.0f} s)"
    click.echo(f"{run.link:9} {run.system:28} {text}", err=True)


def measure_one(
    system: System, link: str, net: Machines, plan: Plan, keep: Path | None, known: Run | None
) -> Run:
    """To its end, or some steps where the losses are known."""
    if known is not None:
        run = measure(system, link, net, plan, min(plan.steps, plan.timed_steps), keep)
        if run.failure or agree(run, known):
            return run if run.failure else project(run, known)
        click.echo(f"{link} {system.name}: not the losses of one process; run to its end", err=True)
    return measure(system, link, net, plan, plan.steps, keep)


def measure_all(
    systems: Sequence[System],
    rates: Sequence[str],
    net: Machines,
    plan: Plan,
    keep: Path | None,
    whole: bool,
    found: dict[str, list[Run]],
) -> None:
    """Each run by itself: one that fails does not end the others. What is measured is in `found` at once."""
    alone = measure(System("one process"), "no link", net, plan, plan.steps, keep)
    say(alone)
    if alone.failure:
        raise click.ClickException(f"one process alone fails: {alone.failure}")
    failed: dict[str, str] = {}
    for name in sorted(rates, key=links.bits_per_s, reverse=True) if net.shaped else ["unshaped"]:
        found[name] = [alone]
        if net.shaped:
            net.shape(name)
        for system in systems:
            if system.name in failed:
                run = Run(system.name, name, failure=f"not tried: {failed[system.name]}")
            else:
                known = alone if system.exact and not whole else None
                run = measure_one(system, name, net, plan, keep, known)
            say(run)
            found[name].append(run)
            if run.failure:
                failed[system.name] = run.failure


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--zml", "ours", multiple=True, default=ZML, show_default=True, metavar="COMPRESS [FLAGS]")
@click.option("--peers", default=PEERS, show_default=True, help="Comma-separated; may be empty.")
@click.option("--link", "rates", multiple=True, default=("1gbit", "100mbit"), show_default=True)
@click.option("--workers", type=click.IntRange(2), default=4, show_default=True)
@click.option("--steps", type=click.IntRange(24), default=300, show_default=True)
@click.option("--target-step", type=click.IntRange(16), default=240, show_default=True)
@click.option("--batch-size", type=int, default=16, show_default=True, help="Of one worker.")
@click.option("--width", type=int, default=2048, show_default=True, help="Of the hidden layers.")
@click.option("--optimizer", type=click.Choice(["sgd", "adamw"]), default="sgd", show_default=True)
@click.option("--lr", type=float, help="[default: 0.02 for sgd, 5e-4 for adamw]")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--data", type=click.Path(file_okay=False, path_type=Path), help="Folder of the four idx files."
)
@click.option("--timed-steps", type=click.IntRange(8), default=12, show_default=True, help="See ~.")
@click.option("--whole", is_flag=True, help="Run everything to its end.")
@click.option(
    "--stall", type=float, default=60.0, show_default=True, help="Seconds without a step: it hangs."
)
@click.option("--quick", is_flag=True, help="Fewer steps, one link.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--markdown", "markdown_file", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), metavar="FILE", help="A PNG.")
@click.option(
    "--keep", type=click.Path(path_type=Path), metavar="FOLDER", help="Keep what the processes left."
)
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
    lr = lr or (0.02 if optimizer == "sgd" else 5e-4)
    every = max(1, steps // 50)
    trainee = {
        "workers": workers,
        "every": every,
        "batch-size": batch_size,
        "width": width,
        "optimizer": optimizer,
        "lr": lr,
        "seed": seed,
    }
    arguments = [text for name, value in trainee.items() for text in (f"--{name}", str(value))]
    arguments += ["--data", str(data.resolve())] if data else []
    plan = Plan(workers, steps, target_step, tuple(arguments), stall, max(timed_steps, 2 * every))
    wanted = [name.strip() for name in peers.split(",") if name.strip() and name.strip() != "one process"]
    systems = [System(name) for name in (*wanted, *(f"zml {flags}" for flags in ours))]
    for system in systems:
        system.flags  # noqa: B018  a name that is wrong is told before anything runs
    for rate in rates:
        links.bits_per_s(rate)
    signal.signal(signal.SIGTERM, interrupted)
    load = os.getloadavg()[0]
    if any("topk" in flags or "auto" in flags for flags in ours):
        compile_kernels()
    by_link: dict[str, list[Run]] = {}
    interrupted_by_hand = False
    with links.machines(workers) as net:
        if not net.shaped:
            click.echo("not root: all on the loopback interface, nothing is shaped", err=True)
        try:
            measure_all(systems, rates, net, plan, keep, whole, by_link)
        except KeyboardInterrupt:
            interrupted_by_hand = True
            click.echo("interrupted; what there is so far:", err=True)
    if not by_link:
        sys.exit(INTERRUPTED)
    target = target_of(next(iter(by_link.values()))[0], target_step)
    head = (
        f"{workers} workers, {batch_size} images each a step, {optimizer} lr {lr:g}, seed {seed}, {steps} steps; "
        f"target: validation loss {target:.3f}, which one process has reached by step {target_step}"
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
        about = {
            "machine": platform.platform(),
            "cores": os.cpu_count(),
            "load_before": load,
            "target": target,
        }
        runs_as_json = {link: [asdict(run) for run in runs] for link, runs in by_link.items()}
        json_file.write_text(json.dumps({**about, "plan": asdict(plan), "links": runs_as_json}, indent=1))
    if plot_file:
        draw(plot_file, by_link, target)
    if interrupted_by_hand:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
