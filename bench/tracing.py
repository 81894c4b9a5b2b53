"""What does tracing cost a step? The hooks alone, and `zml run --trace 1/100` beside `--trace off`.

    python bench/tracing.py                 three pairs of runs of examples/char_lm.py, some minutes on two idle cores
    python bench/tracing.py --pairs 0       the hooks alone: seconds
    python bench/tracing.py --json

hooks     one worker and its shards in this process do, step after step, exactly what they do for tracing and nothing
          else, with a receiver of OTLP in another process. CPU time of all threads, so that what the exporting thread
          takes is in it. Beside it, the same calls while tracing is off. The ratio is to a step of --step-ms.
runs      the median step and the CPU time of a step of the script's process, as `overhead.py` measures them, in random
          order within each pair; ratios are (traced / off) of one pair.

The target: 1 % of steps traced cost at most 1 % of a step.
"""

import itertools
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import click

from zml.tracing import shards, steps

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parent / "examples" / "char_lm.py"
WARM_UP = 10
PATIENCE_S = 900
TARGET = 1.01


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def receive(told: Connection) -> None:
    server = HTTPServer(("127.0.0.1", 0), Handler)
    told.send(server.server_port)
    server.serve_forever()


# -- the hooks ---------------------------------------------------------------------------------------------


def worker_and_shards(every: int | None, count: int) -> tuple[steps.Untraced, dict[str, shards.Untraced]]:
    """None: tracing is off."""
    names = [f"p{index}" for index in range(count)]
    if every is None:
        return steps.UNTRACED, dict.fromkeys(names, shards.UNTRACED)
    from zml import tracing

    origin = steps.Origin("run", "job", "w0", 1)
    worker = steps.StepTrace(origin, every, tracing.emit)
    worker.pause()
    return worker, {name: shards.ShardTrace(name, tracing.emit) for name in names}


def step_of(worker: steps.Untraced, ps: dict[str, shards.Untraced], buckets: int) -> Callable[[int], None]:
    """The calls of one step, in sync, with so many buckets per shard."""

    def step(clock: int) -> None:
        now = time.perf_counter()
        worker.phase("data", now, now)
        for _ in range(buckets):
            for name, shard in ps.items():
                worker.at(clock)
                worker.phase("encode", now, now)
                worker.pushing(clock, name, 1 << 20)
                shard.pushed("w0", clock, 1 << 20)
        for name, shard in ps.items():
            header = worker.committing(clock, name, 0)
            with shard.counting("w0", clock, header, buckets), shard.applying(clock, ["w0"]):
                pass
            worker.counted(clock, name)
        for bucket in range(buckets):
            for name, shard in ps.items():
                header = worker.pulling(clock, name)
                shard.pulling("w0", header, bucket, parked=True)
                shard.pulled("w0", header, bucket, 1 << 20)
                worker.pulled(clock, name, 1 << 20)
                worker.phase("wait", now, now)
                worker.phase("apply", now, now)
        worker.close(clock, buckets << 20, buckets << 20)

    return step


def hooks(every: int | None, count: int, shard_count: int, buckets: int) -> float:
    """CPU microseconds of a step."""
    from zml.tracing import process

    if every is not None:
        process.begin(f"1/{every}", "worker", "w0", "job")
    step = step_of(*worker_and_shards(every, shard_count), buckets)
    for clock in range(200):
        step(clock)
    began = time.process_time()
    for clock in range(200, 200 + count):
        step(clock)
        if every is not None and clock % 100 == 0:
            time.sleep(0.001)  # steps take time: let the other thread do its part
    process.end(30.0)
    return 1e6 * (time.process_time() - began) / count


# -- whole runs --------------------------------------------------------------------------------------------


def run(trace: str, arguments: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Milliseconds of a step: on the wall, and of CPU."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        script = [str(HERE / "stopwatch.py"), str(folder / "steps.json"), str(EXAMPLE), *arguments]
        flags = [
            "-w",
            "1",
            "-p",
            "1",
            "--trace",
            trace,
            "--keep-output",
            "none",
            "--run-dir",
            str(folder / "run"),
        ]
        command = [sys.executable, "-m", "zml", "run", *flags, *script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
        if done.returncode:
            raise click.ClickException(
                f"--trace {trace} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        ends = json.loads((folder / "steps.json").read_text())[WARM_UP - 1 :]
    walls = [1e3 * (after[0] - before[0]) for before, after in itertools.pairwise(ends)]
    return statistics.median(walls), 1e3 * (ends[-1][1] - ends[0][1]) / len(walls)


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--every", type=click.IntRange(1), default=100, show_default=True, help="One step in so many.")
@click.option(
    "--steps", "count", type=click.IntRange(100), default=20_000, show_default=True, help="Of the hooks."
)
@click.option("--shards", "shard_count", type=click.IntRange(1), default=2, show_default=True)
@click.option("--buckets", type=click.IntRange(1), default=4, show_default=True, help="Per shard: 2 MB each.")
@click.option(
    "--step-ms", type=float, default=100.0, show_default=True, help="That the hooks are compared to."
)
@click.option("--pairs", type=click.IntRange(0), default=3, show_default=True)
@click.option("--run-steps", type=click.IntRange(WARM_UP + 2), default=300, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides who goes first in each pair.")
@click.option("--json", "as_json", is_flag=True)
def main(
    every: int,
    count: int,
    shard_count: int,
    buckets: int,
    step_ms: float,
    pairs: int,
    run_steps: int,
    seed: int,
    as_json: bool,
) -> None:
    ours, theirs = multiprocessing.Pipe()
    receiver = multiprocessing.get_context("spawn").Process(target=receive, args=(theirs,), daemon=True)
    receiver.start()
    endpoint = f"http://127.0.0.1:{ours.recv()}"
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = endpoint
    try:
        off, on = hooks(None, count, shard_count, buckets), hooks(every, count, shard_count, buckets)
        figures: dict[str, Any] = {
            "every": every,
            "shards": shard_count,
            "buckets": buckets,
            "off_us": off,
            "on_us": on,
            "ratio_of_a_step": 1 + (on - off) / (1e3 * step_ms),
            "load": os.getloadavg()[0],
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ZML_")}
        environment["PYTHONPATH"] = str(HERE.parent)
        example = ["--epochs", "1", "--batch-size", "24", "--samples", str(24 * run_steps)]
        order, found = random.Random(seed), []
        for number in range(pairs):
            ways = order.sample(["off", f"1/{every}"], 2)
            pair = {way: run(way, example, environment) for way in ways}
            found.append((pair["off"], pair[f"1/{every}"]))
            if not as_json:
                click.echo(
                    f"{number + 1}/{pairs}  off {found[-1][0][0]:.1f} ms  traced {found[-1][1][0]:.1f} ms",
                    err=True,
                )
        for index, name in enumerate(("step", "cpu")) if found else ():
            ratios = sorted(traced[index] / plain[index] for plain, traced in found)
            figures[name] = {
                "off_ms": statistics.median(plain[index] for plain, _ in found),
                "ratio_min": ratios[0],
                "ratio": statistics.median(ratios),
                "ratio_max": ratios[-1],
            }
    finally:
        receiver.terminate()
    if as_json:
        click.echo(json.dumps(figures))
        return
    click.echo(
        f"hooks: {off:.1f} us of CPU per step off, {on:.1f} us with 1/{every} "
        f"({shard_count} shards of {buckets} buckets): "
        f"{figures['ratio_of_a_step']:.5f} of a step of {step_ms:g} ms"
    )
    for name in ("step", "cpu") if found else ():
        f = figures[name]
        click.echo(
            f"{name:5} off {f['off_ms']:.1f} ms   traced / off {f['ratio']:.4f}"
            f"  ({f['ratio_min']:.4f} .. {f['ratio_max']:.4f})"
        )
    reached = figures["ratio_of_a_step"] <= TARGET
    click.echo(f"target: hooks <= {TARGET} of a step: {'reached' if reached else 'missed'}")


if __name__ == "__main__":
    main()
