"""Final losses and bytes: the two examples under zml's compressions beside the dense run, same seeds, same steps.

    python bench/converge.py                                            # everything, an hour and a half on two cores
    python bench/converge.py --example char-lm --optimizer sgd --seeds 1 --zml none --zml topk:1%

Workers are network namespaces of their own, shards and coordinator another; bytes are those that the kernel counts
between them, both ways, CURVE and heartbeats included (without root: all that passes the loopback interface). Losses
are those on held-out data that the example prints at the end of each epoch. "bytes" is what had passed when the run
first reached the loss at which the dense run of the same seed ended, against the dense run's whole traffic; "steps" is
how many steps that took, against the dense run's. "bits up" is what one worker pushes per parameter in its median
exchange, frames and all. Every finished run is a line of --results, and is not run again.
"""

import json
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import checkout  # noqa: F401  (puts this checkout on the path)
import click
import links
from train import CannotStart, Crowd, crowd, free_port, interrupted

from zml.runs.timeline import read

HERE = Path(__file__).parent
CHAR_LM = re.compile(r"epoch (\d+)/\d+: validation loss ([\d.naif]+)")
EXAMPLES = {
    "char-lm": (
        "char_lm.py",
        "--layers 2 --width 64 --context 64 --batch-size 16 --samples 3072 --epochs 30".split(),
        CHAR_LM,
    ),
    "char-lm, long": (
        "char_lm.py",
        "--layers 2 --width 64 --context 64 --batch-size 16 --samples 12288 --epochs 20".split(),
        CHAR_LM,
    ),
    "char-lm, wide": (
        "char_lm.py",
        "--layers 2 --width 256 --context 64 --batch-size 8 --samples 1536 --epochs 5".split(),
        CHAR_LM,
    ),
    "fashion-mnist": (
        "mnist_distributed.py",
        "--epochs 8".split(),
        re.compile(r"epoch (\d+)/\d+: test loss ([\d.naif]+), accuracy ([\d.]+)%"),
    ),
}
SHARDS = 2
STALL_S = 120.0
LISTEN_S = 30.0


@dataclass
class Run:
    example: str
    optimizer: str
    zml: str  # --compress, and further flags
    seed: int
    workers: int
    losses: list[float] = field(default_factory=list)  # by epoch
    accuracies: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)  # that had passed at the end of each epoch
    seconds: float = 0.0
    bits_up: float = 0.0
    failure: str = ""

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        return self.example, self.optimizer, self.zml, self.seed, self.workers


def measure(run: Run, net: links.Machines) -> None:
    """Train once; what fails is told in the run."""
    file, arguments, pattern = EXAMPLES[run.example]
    script = [str(HERE.parent / "examples" / file), *arguments]
    script += ["--optimizer", run.optimizer, "--seed", str(run.seed)]
    with tempfile.TemporaryDirectory(prefix="zml-converge-") as scratch, crowd(Path(scratch)) as made:
        made.start("meter", net.meter())
        began = time.monotonic()
        try:
            start(made, net, run, script)
            ends = watch(made, run, pattern)
        except CannotStart as error:
            run.failure = str(error)
            return
        traffic = links.Traffic.read(made.folder / "meter.txt")
        run.megabytes = [round(traffic.between(began, end) / 1e6, 3) for end in ends]
        run.seconds = round(ends[-1] - began, 1)
        run.bits_up = bits_up(made.folder)


def bits_up(folder: Path) -> float:
    """Of w0's pushes, per parameter, in the median exchange."""
    (log,) = folder.glob("runs/*/logs/w0.script.jsonl")
    joined = next(line for line in map(json.loads, log.read_text().splitlines()) if "parameters" in line)
    (file,) = folder.glob("runs/*/timeline/w0.jsonl")
    pushed = statistics.median(step.bytes_up for step in read(file))
    return float(round(8 * pushed / joined["parameters"], 4))


def start(made: Crowd, net: links.Machines, run: Run, script: Sequence[str]) -> None:
    zml = [sys.executable, "-m", "zml"]
    made.start("keys", [*zml, "keys", "keys"])
    if made.started["keys"].wait():
        raise CannotStart(made.said("keys"))
    at = f"tcp://{net.address(0)}:{4747 if net.shaped else free_port()}"
    asked, _, more = run.zml.partition(" -- ")
    compress, *flags = asked.split()
    script = [*script, *more.split()]
    job = ["-w", str(run.workers), "-p", str(SHARDS), "--compress", compress, *flags]
    made.start(
        "coordinator", [*net.on(0), *zml, "coordinator", *job, "--bind", at, "--keys", "keys", *script]
    )
    member = ["--keys", "keys", "--coordinator", at]
    for index in range(SHARDS):
        bind = ["--bind", f"tcp://{net.address(0)}:0"]
        made.start(f"p{index}", [*net.on(0), *zml, "ps", "--shard", str(index), *bind, *member])
    for index in range(run.workers):
        command = [*net.on(1 + index), *zml, "worker", "--cpu", "--name", f"w{index}", *member]
        made.start(f"w{index}", command)


def watch(made: Crowd, run: Run, pattern: re.Pattern[str]) -> list[float]:
    """Until the job is over; the times at which w0's epochs ended."""
    ends: list[float] = []
    output = made.folder / "w0.txt"
    moved = time.monotonic()
    while True:
        over = made.started["coordinator"].poll()
        found = pattern.findall(output.read_text(errors="replace"))
        for epoch in found[len(ends) :]:
            moved = time.monotonic()
            ends.append(moved)
            run.losses.append(float(epoch[1]))
            if len(epoch) > 2:
                run.accuracies.append(float(epoch[2]))
        if over is not None:
            if over or not ends:
                raise CannotStart(made.said("coordinator"))
            return ends
        if time.monotonic() - moved > STALL_S:
            raise CannotStart(f"no epoch ended within {STALL_S:g} s")
        time.sleep(0.05)


# -- tables ------------------------------------------------------------------------------------------------------


def reached(run: Run, loss: float) -> int | None:
    """The first epoch (from 0) that ended with at most this loss."""
    return next((epoch for epoch, each in enumerate(run.losses) if each <= loss), None)


def mean(numbers: Sequence[float], digits: int = 4) -> str:
    if not numbers:
        return ""
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}"


def rows(runs: Sequence[Run]) -> Iterator[list[str]]:
    groups: dict[tuple[str, str, str, int], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.example, run.optimizer, run.zml, run.workers), []).append(run)
    dense = {
        (run.example, run.optimizer, run.seed): run for run in runs if run.zml == "none" and not run.failure
    }
    for (example, optimizer, zml, workers), group in groups.items():
        fine = [run for run in group if not run.failure]
        pairs = [
            (run, dense[run.example, run.optimizer, run.seed])
            for run in fine
            if (run.example, run.optimizer, run.seed) in dense
        ]
        apart = [100 * (run.losses[-1] / base.losses[-1] - 1) for run, base in pairs]
        until = [(reached(run, base.losses[-1]), run, base) for run, base in pairs]
        there = [(epoch, run, base) for epoch, run, base in until if epoch is not None]
        share = [100 * run.megabytes[epoch] / base.megabytes[-1] for epoch, run, base in there]
        whole = [100 * run.megabytes[-1] / base.megabytes[-1] for run, base in pairs]
        steps = [100 * (epoch + 1) / len(base.losses) for epoch, _, base in there]
        yield [
            example,
            optimizer,
            f"{zml}, {workers} workers",
            str(len(fine)) + (f" ({len(group) - len(fine)} failed)" if len(fine) < len(group) else ""),
            mean([run.losses[-1] for run in fine]),
            mean(apart, 2) + " %" if apart and zml != "none" else "",
            mean([run.accuracies[-1] for run in fine if run.accuracies], 2),
            mean([run.megabytes[-1] for run in fine], 1),
            f"{statistics.mean(whole):.2f} %" if whole and zml != "none" else "",
            f"{statistics.mean(share):.2f} % ({len(there)} of {len(pairs)})"
            if share and zml != "none"
            else "",
            f"{statistics.mean(steps):.0f} %" if steps and zml != "none" else "",
            f"{statistics.median(run.bits_up for run in fine):.3g}" if fine else "",
        ]


HEAD = [
    "example",
    "optimizer",
    "zml",
    "seeds",
    "final loss",
    "against dense",
    "accuracy %",
    "MB",
    "of dense's bytes",
]
HEAD += ["bytes until dense's final loss", "steps until then", "bits up"]


def table(runs: Sequence[Run]) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *rows(runs)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@click.command(context_settings={"max_content_width": 100, "show_default": True})
@click.option(
    "--example",
    "examples",
    type=click.Choice(list(EXAMPLES)),
    multiple=True,
    default=["char-lm", "fashion-mnist"],
)
@click.option(
    "--optimizer", "optimizers", type=click.Choice(["sgd", "adamw"]), multiple=True, default=["sgd", "adamw"]
)
@click.option(
    "--zml",
    "systems",
    multiple=True,
    default=["none", "topk:1%"],
    metavar="COMPRESS [FLAGS] [-- SCRIPT'S FLAGS]",
)
@click.option("--seeds", type=int, default=3)
@click.option("--workers", type=int, default=4)
@click.option("--results", type=click.Path(path_type=Path), default=Path("converge.jsonl"))
@click.option("--table-only", is_flag=True, help="Print the table of what --results holds.")
def main(
    examples: Sequence[str],
    optimizers: Sequence[str],
    systems: Sequence[str],
    seeds: int,
    workers: int,
    results: Path,
    table_only: bool,
) -> None:
    """Train the examples and print a table in Markdown."""
    done: list[Run] = []
    if results.exists():
        done = [Run(**json.loads(line)) for line in results.read_text().splitlines()]
    wanted = [
        Run(example, optimizer, system, seed, workers)
        for seed in range(seeds)
        for example in examples
        for optimizer in optimizers
        for system in systems
    ]
    known = {run.key for run in done if not run.failure}
    wanted = [] if table_only else [run for run in wanted if run.key not in known]
    signal.signal(signal.SIGTERM, interrupted)  # so that processes and namespaces end with this one
    with links.machines(1 + workers) as net:
        net.shape(None)
        for number, run in enumerate(wanted, start=1):
            measure(run, net)
            done.append(run)
            with results.open("a") as file:
                file.write(json.dumps(asdict(run)) + "\n")
            said = (
                run.failure or f"loss {run.losses[-1]:.4f}  {run.megabytes[-1]:.1f} MB  {run.seconds:.0f} s"
            )
            click.echo(
                f"{number}/{len(wanted)}  {run.example} {run.optimizer} {run.zml} seed {run.seed}: {said}",
                err=True,
            )
    click.echo(table(done))


if __name__ == "__main__":
    main()
