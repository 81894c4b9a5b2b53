"""What do checkpoints cost? The same training with one every few seconds and with none.

    python bench/checkpoints.py                        three pairs of runs, about ten minutes
    python bench/checkpoints.py --every 5 --json checkpoints.json
    python bench/checkpoints.py -- --width 384

`zml run -w 1 -p 2 --sync` (or `--mode async`) trains `examples/char_lm.py`; what follows `--` goes to it. Each
repetition makes both runs, in random order, and compares the mean step; on a machine that others use, most of what that
shows is the others. So the run with checkpoints is also compared with itself:

cost     how much longer the steps took together for those that ran while a checkpoint was taken or written: of each
         step beside a checkpoint its time less the median of the steps before and after that checkpoint. In percent of
         the training, from the first step to the last; the target is 2 % with one every 10 s
held     how long training stood still, as the shards measured it: while they were brought to the same place (in sync
         nothing is held for that) and marked what they had, and while updates waited for copies of what they change
copy     the time of a plain copy of as many bytes in this process, into new memory, as a shard holds
"""

import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import checkout  # noqa: F401
import click
import numpy as np

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parent / "examples" / "char_lm.py"
SHARDS = 2
WARM_UP = 10  # steps that are not counted
NEIGHBOURS = 15  # steps before and after a checkpoint that tell what is usual
PATIENCE_S = 1800


@dataclass
class Taken:
    """One checkpoint: when, on the wall clock, and what the coordinator says of it."""

    begin: float
    end: float
    held_s: float


@dataclass
class Run:
    step_ms: float  # the mean
    checkpoints: int = 0
    cost: float = 0.0  # of the time of all steps
    held_ms: float = 0.0  # the median
    held_most_ms: float = 0.0
    bytes: int = 0  # of one checkpoint, of both shards


def read_checkpoints(run_dir: Path) -> list[Taken]:
    found = []
    for line in (run_dir / "logs" / "coordinator.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["message"] == "checkpoint" and entry["because"] != "at the end":
            end = datetime.fromisoformat(entry["time"].replace("Z", "+00:00")).timestamp()
            found.append(Taken(end - entry["seconds"], end, entry["held_s"]))
    return found


def extra_s(ends: list[float], taken: list[Taken]) -> float:
    """How much longer the steps beside checkpoints took, all together. `ends` are on the wall clock."""
    steps = list(itertools.pairwise(ends))
    beside = [any(a < one.end and b > one.begin for one in taken) for a, b in steps]
    extra = 0.0
    for one in taken:
        during = [place for place, (a, b) in enumerate(steps) if a < one.end and b > one.begin]
        if not during:
            continue
        around = range(max(0, during[0] - NEIGHBOURS), min(len(steps), during[-1] + 1 + NEIGHBOURS))
        alone = [steps[place][1] - steps[place][0] for place in around if not beside[place]]
        if not alone:
            raise click.ClickException("no step ran beside no checkpoint: take them more seldom (--every)")
        usual = statistics.median(alone)
        extra += sum(steps[place][1] - steps[place][0] - usual for place in during)
    return extra


def measure(every: float, mode: str, arguments: list[str], environment: dict[str, str]) -> Run:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        script = [str(HERE / "stopwatch.py"), str(folder / "steps.json"), str(EXAMPLE), *arguments]
        flags = [
            "-w",
            "1",
            "-p",
            str(SHARDS),
            f"--{mode}",
            "--keep-output",
            "none",
            "--run-dir",
            str(folder / "run"),
        ]
        often = ["--checkpoint-minutes", str(every / 60), "--keep-last", "3"]
        command = [sys.executable, "-m", "zml", "run", *flags, *often, *script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
        if done.returncode:
            raise click.ClickException(f"zml run ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        offset = time.time() - time.perf_counter()  # one clock for all processes of a machine
        ends = [end + offset for end, _ in json.loads((folder / "steps.json").read_text())][WARM_UP - 1 :]
        run = Run(1e3 * (ends[-1] - ends[0]) / (len(ends) - 1))
        taken = [
            one for one in read_checkpoints(folder / "run") if ends[0] < one.begin and one.end < ends[-1]
        ]
        if taken:
            run.checkpoints = len(taken)
            run.cost = extra_s(ends, taken) / (ends[-1] - ends[0])
            run.held_ms = 1e3 * statistics.median(one.held_s for one in taken)
            run.held_most_ms = 1e3 * max(one.held_s for one in taken)
            newest = max((folder / "run" / "checkpoints").glob("step-*"))
            run.bytes = sum(file.stat().st_size for file in newest.glob("*.safetensors"))
        return run


def copy_ms(size: int) -> float:
    """Of `size` bytes to new memory, the median of nine."""
    source = np.ones(size, np.uint8)

    def once() -> float:
        begin = time.perf_counter()
        source.copy()
        return time.perf_counter() - begin

    return 1e3 * statistics.median(once() for _ in range(9))


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--repetitions", type=click.IntRange(1), default=3, show_default=True)
@click.option("--every", type=float, default=10.0, show_default=True, help="Seconds between two checkpoints.")
@click.option("--steps", type=click.IntRange(WARM_UP + 2), default=500, show_default=True)
@click.option("--mode", type=click.Choice(["sync", "async"]), default="sync", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides who goes first in each pair.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE")
@click.argument("arguments", nargs=-1)
def main(
    repetitions: int,
    every: float,
    steps: int,
    mode: str,
    seed: int,
    json_file: Path | None,
    arguments: tuple[str, ...],
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ZML_")}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    environment["OMP_NUM_THREADS"] = "1"
    example = [
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--samples",
        str(8 * steps),
        "--width",
        "256",
        *arguments,
    ]
    order, pairs, load = random.Random(seed), [], os.getloadavg()[0]
    for number in range(repetitions):
        seconds = order.sample([0.0, every], 2)
        pairs.append({each: measure(each, mode, example, environment) for each in seconds})
        none, some = pairs[-1][0.0], pairs[-1][every]
        click.echo(
            f"{number + 1}/{repetitions}  none {none.step_ms:.1f} ms  some {some.step_ms:.1f} ms", err=True
        )
    runs = [pair[every] for pair in pairs]
    ratios = [pair[every].step_ms / pair[0.0].step_ms for pair in pairs]
    size, count = max(run.bytes for run in runs), sum(run.checkpoints for run in runs)
    plain = copy_ms(size // SHARDS) if size else 0.0
    click.echo(f"{count} checkpoints of {size / 1e6:.1f} MB, one every {every:g} s")
    click.echo(
        f"mean step, with / without: {statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f})"
    )
    costs = [100 * run.cost for run in runs]
    click.echo(
        f"cost of the checkpoints: {statistics.median(costs):.2f} % ({min(costs):.2f} .. {max(costs):.2f})"
    )
    held = [run.held_ms for run in runs]
    most = max(run.held_most_ms for run in runs)
    click.echo(
        f"held: {statistics.median(held):.1f} ms, at most {most:.1f} ms; copy of a shard: {plain:.1f} ms"
    )
    if json_file:
        how = {
            "machine": platform.platform(),
            "cores": os.cpu_count(),
            "load_before": load,
            "every_s": every,
            "mode": mode,
        }
        found = {
            "arguments": example,
            "copy_ms": plain,
            "pairs": [[asdict(run) for run in p.values()] for p in pairs],
        }
        json_file.write_text(json.dumps({**how, **found}, indent=1))


if __name__ == "__main__":
    main()
