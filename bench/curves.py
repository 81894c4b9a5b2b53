"""How long do a real training's steps take with 1 to 4 workers? A file of curves for `zml simulate --curves`.

    python bench/curves.py --into bench/curves/char_lm.json             some minutes
    python bench/curves.py --workers 1,2,4 --batches 16,32 -- examples/char_lm.py --width 128

Each point is a run of its own under `zml run`: its script is asked for a batch size, its members' figures say what a
step took and how much of it was computing. Steps of the first row of figures are left out: they are slow. The gradient
noise scale comes from the longest run. All workers share this machine's cores, so that computing becomes slower with
more of them: what a formula fitted to that is worth, `zml simulate` says.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import checkout  # noqa: F401
import click
import msgspec

from zml.simulate.curves import Calibrated, Curves, Point

ROOT = Path(__file__).resolve().parent.parent
RUN_S = 600.0
COMPUTE = ("data", "compute")
NOISE_STEPS = (
    320  # the noise scale is looked for in every 32nd step, and says nothing before it has eight of them
)


def train(script: list[str], workers: int, shards: int, batch: int, steps: int, folder: Path) -> None:
    """One run of so many steps, in one epoch."""
    program, *args = script
    samples = steps * workers * batch
    asked = ["--epochs", "1", "--batch-size", str(batch), "--samples", str(samples)]
    command = [
        sys.executable,
        "-m",
        "zml",
        "run",
        "-w",
        str(workers),
        "-p",
        str(shards),
        "--cpu",
        "--http",
        "off",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--run-dir", str(folder), program, *args, *asked],
        env=environment,
        capture_output=True,
        timeout=RUN_S,
        check=False,
    )
    if done.returncode:
        raise click.ClickException(f"the run with {workers} workers failed: {done.stderr.decode()[-1000:]}")


def point(folder: Path, workers: int, shards: int, batch: int) -> Point:
    rows = [json.loads(line)["workers"] for line in (folder / "members.jsonl").read_text().splitlines()]
    rows = [row for row in rows if len(row) == workers and all(w["steps"] for w in row.values())]
    last, first = rows[-1], rows[0]
    steps = sum(w["steps"] for w in last.values()) - sum(w["steps"] for w in first.values())

    def between(value: str) -> float:
        def of(row: dict[str, dict[str, dict[str, float]]]) -> float:
            return sum(w["phases"].get(value, 0.0) for w in row.values())

        return (of(last) - of(first)) / steps

    if steps < 10 * workers:
        raise click.ClickException(f"only {steps} steps with {workers} workers: give more --steps")
    step_s = sum(w["step_sum_s"] for w in last.values()) - sum(w["step_sum_s"] for w in first.values())
    compute_s = sum(between(name) for name in COMPUTE)
    step_s /= steps
    return Point(
        workers=workers,
        shards=shards,
        batch=batch,
        steps=steps // workers,
        step_s=round(step_s, 6),
        compute_s=round(compute_s, 6),
        wire_s=round(max(0.0, step_s - compute_s), 6),
    )


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--workers", default="1,2,3,4", show_default=True)
@click.option("--batches", default="8,16", show_default=True, help="Samples of one worker's step.")
@click.option("--shards", default=1, show_default=True)
@click.option("--steps", default=120, show_default=True, help="Of each run.")
@click.option("--runs", default=1, show_default=True, help="Of each point: the fastest counts.")
@click.option("--epochs", default=20, show_default=True, help="That a job of it trains.")
@click.option("--samples", default=3072, show_default=True, help="In each of those.")
@click.option("--into", type=click.Path(dir_okay=False, path_type=Path), help="Write the curves there.")
@click.argument("script", nargs=-1, type=click.UNPROCESSED)
def main(
    workers: str,
    batches: str,
    shards: int,
    steps: int,
    runs: int,
    epochs: int,
    samples: int,
    into: Path | None,
    script: tuple[str, ...],
) -> None:
    chosen = list(script) or [str(ROOT / "examples" / "char_lm.py"), "--width", "64", "--layers", "2"]
    counts, sizes = ([int(part) for part in text.split(",")] for text in (workers, batches))
    points, noise = [], None
    with tempfile.TemporaryDirectory(prefix="zml-curves-") as scratch:
        for batch in sizes:
            for count in counts:
                tried = []
                for again in range(runs):
                    folder = Path(scratch) / f"{count}-{batch}-{again}"
                    longest = (
                        not again and batch == sizes[0] and count == min(c for c in [*counts, 2] if c > 1)
                    )
                    train(chosen, count, shards, batch, max(steps, NOISE_STEPS) if longest else steps, folder)
                    tried.append(point(folder, count, shards, batch))
                    noise = noise or json.loads((folder / "status.json").read_text())["noise"]["scale"]
                points.append(min(tried, key=lambda each: each.step_s))
                click.echo(f"{points[-1]}", err=True)
    if noise is None:
        raise click.ClickException("no run has shown a gradient noise scale: give more --steps")
    name = Path(chosen[0]).stem
    curves = Curves(
        model=name,
        about=f"bench/curves.py, {os.cpu_count()} cores, {platform.machine()}: {' '.join([name, *chosen[1:]])}",
        samples=samples,
        epochs=epochs,
        noise=round(noise, 2),
        points=points,
    )
    click.echo(Calibrated(curves))
    if into is not None:
        into.parent.mkdir(parents=True, exist_ok=True)
        into.write_bytes(msgspec.json.format(msgspec.json.encode(curves), indent=1) + b"\n")


if __name__ == "__main__":
    main()
