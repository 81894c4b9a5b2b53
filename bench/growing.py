"""What does it cost that a shard joins? One training, and another shard's process in the midst of it.

    python bench/growing.py                            about two minutes
    python bench/growing.py -- --width 640

`zml run -w 1 -p 1 --sync` trains `examples/char_lm.py`; what follows `--` goes to it. When it has made some steps
`zml ps --shard 1` is started, and gets its share: half of the buckets, one portion after another.

held     how long a portion had training stand still, from the first order to the last answer, as the coordinator has it
copy     the time of a plain copy of as many bytes as a portion has, with its optimizer state, into new memory
step     the usual one: the median of those before the shard came
during   all steps from the first portion to the last, against as many usual ones
after    the steps behind the last portion, the median, against the usual one: with half as much on each shard, and one
         process more on the same processors
"""

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import click
from checkpoints import EXAMPLE, HERE, PATIENCE_S, WARM_UP, copy_ms

from zml.layout import CHUNK
from zml.runs.rundir import TIMELINE

BEFORE = 40  # steps, before the shard is started
STATES = 3  # a parameter and what AdamW keeps of it


def moves(run_dir: Path) -> list[tuple[float, float, list[int]]]:
    """When each portion had moved, how long that held, and which buckets they were."""
    found = []
    for line in (run_dir / "logs" / "coordinator.jsonl").read_text().splitlines():
        said: dict[str, Any] = json.loads(line)
        if said["message"] == "moved":
            end = datetime.fromisoformat(said["time"].replace("Z", "+00:00")).timestamp()
            found.append((end, said["held_s"], said["buckets"]))
    return found


def coordinator_of(run_dir: Path) -> str:
    addresses = json.loads((run_dir / "coordinator.json").read_text())["addresses"]
    return next(address for address in addresses if address.startswith("tcp://"))


def until(condition: Any, what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise click.ClickException(f"waited {PATIENCE_S} s for {what}")
        time.sleep(0.1)


def train(steps: int, arguments: tuple[str, ...]) -> tuple[list[float], list[tuple[float, float, list[int]]]]:
    """When each step ended, on the wall clock, and what moved."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ZML_")}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    environment["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run_dir, output = folder / "run", folder / "output.txt"
        example = ["--epochs", "1", "--batch-size", "8", "--samples", str(8 * steps), *arguments]
        script = [str(HERE / "stopwatch.py"), str(folder / "steps.json"), str(EXAMPLE), *example]
        zml = [sys.executable, "-m", "zml"]
        flags = ["-w", "1", "-p", "1", "--sync", "--keep-output", "none", "--run-dir", str(run_dir)]
        with output.open("w") as file:
            running = subprocess.Popen(
                [*zml, "run", *flags, *script], env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        steps_made, joined = run_dir / TIMELINE / "w0.jsonl", None

        def trained() -> bool:
            if running.poll() is not None:
                raise click.ClickException(f"zml run ended too early:\n{output.read_text()}")
            return steps_made.exists() and len(steps_made.read_text().splitlines()) >= BEFORE

        try:
            until(trained, "the first steps")
            with (folder / "joined.txt").open("w") as file:
                join = ["ps", "--shard", "1", "--coordinator", coordinator_of(run_dir)]
                joined = subprocess.Popen(
                    [*zml, *join], env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=folder
                )
            if running.wait(PATIENCE_S):
                raise click.ClickException(f"zml run ended with {running.returncode}:\n{output.read_text()}")
        finally:
            for process in (running, joined):
                if process is not None and process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    process.wait(60)
        if not moves(run_dir):
            raise click.ClickException(f"nothing has moved:\n{(folder / 'joined.txt').read_text()[-2000:]}")
        offset = time.time() - time.perf_counter()  # one clock for all processes of a machine
        ends = [end + offset for end, _ in json.loads((folder / "steps.json").read_text())]
        return ends[WARM_UP - 1 :], moves(run_dir)


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--steps", type=click.IntRange(2 * BEFORE), default=800, show_default=True)
@click.argument("arguments", nargs=-1)
def main(steps: int, arguments: tuple[str, ...]) -> None:
    load = os.getloadavg()[0]
    ends, moved = train(steps, arguments or ("--width", "256"))
    times = [(end, end - start) for start, end in itertools.pairwise(ends)]
    first, last = moved[0][0] - moved[0][1], moved[-1][0]
    usual = statistics.median(took for end, took in times if end < first)
    during = [took for end, took in times if first <= end - took <= last]
    after = [took for end, took in times if end - took > last]
    held = [1e3 * each for _, each, _ in moved]
    buckets = sum(len(each) for *_, each in moved)
    portion = 4 * STATES * 8 * CHUNK * max(len(each) for *_, each in moved)
    click.echo(f"{buckets} buckets in {len(moved)} portions, {last - first:.1f} s from the first to the last")
    click.echo(
        f"held: {statistics.median(held):.0f} ms, at most {max(held):.0f} ms; "
        f"copy of {portion / 1e6:.0f} MB: {copy_ms(portion):.1f} ms; step: {1e3 * usual:.0f} ms"
    )
    click.echo(f"during: {sum(during) / (len(during) * usual):.2f} of the usual, {len(during)} steps")
    if after:
        click.echo(f"after: {statistics.median(after) / usual:.2f} of the usual, {len(after)} steps")
    click.echo(f"load when it began: {load:.1f}")


if __name__ == "__main__":
    main()
