"""What does zml cost a step? `python examples/char_lm.py` beside `zml run -w 1 -p 1 --sync examples/char_lm.py`.

    python bench/overhead.py            five pairs of runs, about five minutes on two idle cores
    python bench/overhead.py --json     the same as JSON
    python bench/overhead.py --threads 1 --batch-size 48 -- --optimizer sgd

What follows `--` goes to the example. Both sides get the same arguments, environment and number of torch's threads,
and `stopwatch.py` around the same script. Each repetition runs both in random order; a ratio is (zml / alone) of
one repetition. The target is a median of at most 1.05 for steps of 100 ms or more, with shard and coordinator on the
same machine.

step    the median time from the end of one optimizer step to the end of the next
quick   the fastest tenth of them: on a machine that others use, this compares the steps that they did not disturb
all     the time of all measured steps together: what now and then takes long shows here and not in the median
cpu     CPU time of the script's process, of all its threads: less disturbed by what else the machine does
"""

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import click

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parent / "examples" / "char_lm.py"
TARGET, FROM_MS = 1.05, 100.0
WARM_UP = 10  # steps that are not counted: first allocations, torch's own choices
PATIENCE_S = 900


class Run(NamedTuple):
    """One run of the example, per step."""

    step_ms: float
    quick_ms: float
    all_ms: float
    cpu_ms: float


def command(way: str, folder: Path, arguments: list[str]) -> list[str]:
    script = [str(HERE / "stopwatch.py"), str(folder / "steps.json"), str(EXAMPLE), *arguments]
    if way == "alone":
        return [sys.executable, *script]
    flags = ["-w", "1", "-p", "1", "--sync", "--keep-output", "none", "--run-dir", str(folder / "run")]
    return [sys.executable, "-m", "zml", "run", *flags, *script]


def measure(way: str, arguments: list[str], environment: dict[str, str]) -> Run:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        done = subprocess.run(
            command(way, folder, arguments),
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        if done.returncode:
            raise click.ClickException(f"{way} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        ends = json.loads((folder / "steps.json").read_text())[WARM_UP - 1 :]
    walls = [1e3 * (after[0] - before[0]) for before, after in itertools.pairwise(ends)]
    cpu_ms = 1e3 * (ends[-1][1] - ends[0][1]) / len(walls)
    return Run(statistics.median(walls), statistics.quantiles(walls, n=10)[0], statistics.mean(walls), cpu_ms)


def summary(pairs: list[dict[str, Run]]) -> dict[str, dict[str, float]]:
    figures = {}
    for field in Run._fields:
        alone, with_zml = ([getattr(pair[way], field) for pair in pairs] for way in ("alone", "zml"))
        ratios = [b / a for a, b in zip(alone, with_zml, strict=True)]
        figures[field.removesuffix("_ms")] = {
            "alone_ms": statistics.median(alone),
            "zml_ms": statistics.median(with_zml),
            "ratio_min": min(ratios),
            "ratio": statistics.median(ratios),
            "ratio_max": max(ratios),
        }
    return figures


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--repetitions", type=click.IntRange(1), default=5, show_default=True)
@click.option("--steps", type=click.IntRange(WARM_UP + 2), default=80, show_default=True)
@click.option(
    "--batch-size", type=click.IntRange(1), default=24, show_default=True, help="Sets the length of a step."
)
@click.option(
    "--threads", type=click.IntRange(1), help="OMP_NUM_THREADS of both.  [default: what torch chooses]"
)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides who goes first in each pair.")
@click.option("--json", "as_json", is_flag=True)
@click.argument("arguments", nargs=-1)
def main(
    repetitions: int,
    steps: int,
    batch_size: int,
    threads: int | None,
    seed: int,
    as_json: bool,
    arguments: tuple[str, ...],
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ZML_")}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    example = [
        "--epochs",
        "1",
        "--batch-size",
        str(batch_size),
        "--samples",
        str(steps * batch_size),
        *arguments,
    ]
    order, pairs = random.Random(seed), []
    load = os.getloadavg()[0]
    if load > 0.5:
        click.echo(f"other processes are busy here (load {load:.1f}): look at quick and cpu, too", err=True)
    for number in range(repetitions):
        ways = order.sample(["alone", "zml"], 2)
        pairs.append({way: measure(way, example, environment) for way in ways})
        if not as_json:
            alone, with_zml = pairs[-1]["alone"].step_ms, pairs[-1]["zml"].step_ms
            click.echo(f"{number + 1}/{repetitions}  alone {alone:.1f} ms  zml {with_zml:.1f} ms", err=True)
    figures = summary(pairs)
    if as_json:
        how = {"arguments": example, "threads": threads, "repetitions": repetitions, "load_before": load}
        click.echo(json.dumps(how | figures))
        return
    click.echo("        alone ms    zml ms     ratio  (min .. max)")
    for name, f in figures.items():
        click.echo(
            f"{name:6}{f['alone_ms']:10.1f}{f['zml_ms']:10.1f}{f['ratio']:10.3f}"
            f"  ({f['ratio_min']:.3f} .. {f['ratio_max']:.3f})"
        )
    step = figures["step"]
    if step["alone_ms"] < FROM_MS:
        click.echo(f"The target is for steps of {FROM_MS:g} ms or more: give a larger --batch-size.")
    else:
        click.echo(f"target: ratio of step <= {TARGET}: {'reached' if step['ratio'] <= TARGET else 'missed'}")


if __name__ == "__main__":
    main()
