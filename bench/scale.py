"""How far do more workers help? 1 to 64 workers that compute for a stated time, with real pushes and pulls, in sync.

    python bench/scale.py                        dense and topk:1%, 2 shards, about three minutes on two busy cores
    python bench/scale.py --plot scale.png --json

Shards and workers are zml's own (`scale_roles.py`), their messages go over tcp on loopback. Computing is a sleep, so
that 64 workers fit on a few cores; encoding and decoding, which each worker's own machine does, is left out. All share
this machine's cores: what is measured is the least that a cluster reaches whose shards have as much to themselves.

step      median seconds from the last worker's end of one step to the last worker's end of the next
efficiency    (throughput) / (workers x throughput of one) = step of one worker / step of so many
model     compute + a + b workers / shards, fitted to the points marked *, and its error on all

Further out the formula is that of `scale_model.py`, with the CPU time that shards took for each push, commit and pull,
measured with one shard and with several, and a network card for each node (--gbit).
"""

import json
import os
import select
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from scale_model import Far, errors, fit, split

HERE = Path(__file__).resolve().parent
WORKERS = (1, 2, 4, 8, 16, 32, 64)
FITTED = (1, 4, 16)
PROCESSES = 2  # in which the workers live
CALIBRATED = 16  # workers, with one shard
WARM_UP = 2
PATIENCE_S = 180  # the first sparse run on a machine compiles kernels
FAR_WORKERS, FAR_SHARDS = (64, 256, 1000), (8, 32, 128)


class Roles:
    """A process of `scale_roles.py`."""

    def __init__(self, role: str, **given: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "scale_roles.py"), role, json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, **asked: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()

    def hear(self) -> Any:
        assert self.process.stdout is not None
        here, _, _ = select.select([self.process.stdout], [], [], PATIENCE_S)
        if not here:
            raise click.ClickException(f"a process of the benchmark has said nothing for {PATIENCE_S} s")
        if not (line := self.process.stdout.readline()):
            raise click.ClickException(f"a process of the benchmark ended with {self.process.wait(10)}")
        return json.loads(line)

    def ask(self, **asked: Any) -> Any:
        self.tell(**asked)
        return self.hear()

    def __enter__(self) -> "Roles":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


class Cluster:
    """Shards, and the processes of all workers that will be; one generation of workers after another."""

    def __init__(self, stack: ExitStack, elements: int, compress: str, shards: int, most: int) -> None:
        common = {"elements": elements, "compress": compress}
        self.shards = [
            stack.enter_context(Roles("shard", index=index, shards=shards, **common))
            for index in range(shards)
        ]
        addresses = {f"p{index}": shard.hear() for index, shard in enumerate(self.shards)}
        each = -(-most // PROCESSES)
        self.crews = [
            stack.enter_context(
                Roles("workers", first=first, count=min(each, most - first), addresses=addresses, **common)
            )
            for first in range(0, most, each)
        ]
        self.up = max([crew.hear() for crew in self.crews])
        self.generation = 0

    def measure(self, workers: int, steps: int, compute_s: float) -> dict[str, float]:
        self.generation += 1
        asked = {"workers": workers, "generation": self.generation}
        for shard in self.shards:
            shard.ask(**asked)
        self.all(**asked)
        before = [shard.ask() for shard in self.shards]
        found = self.all(**asked, steps=steps, compute_s=compute_s)
        after = [shard.ask() for shard in self.shards]
        ends = [max(each) for each in zip(*(e for crew in found for e in crew["ends"]), strict=True)]
        taken = [later - earlier for earlier, later in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)]
        updates = after[0]["updates"] - before[0]["updates"]
        if updates != steps:
            raise click.ClickException(
                f"{workers} workers made {steps} steps in sync, and a shard {updates} updates"
            )
        cpu = sum(b["cpu_s"] - a["cpu_s"] for a, b in zip(before, after, strict=True))
        return {
            "step_s": statistics.median(taken),
            "least_s": min(taken),
            "down": sum(crew["came"] for crew in found) / (workers * steps),
            "shard_cpu_s": cpu / (workers * steps * len(self.shards)),
            "worker_cpu_s": sum(crew["cpu_s"] for crew in found) / (workers * steps),
        }

    def all(self, **asked: Any) -> list[Any]:
        """All crews at once."""
        for crew in self.crews:
            crew.tell(**asked)
        return [crew.hear() for crew in self.crews]


def scaled(
    compress: str, workers: list[int], shards: int, elements: int, steps: int, compute_s: float, gbit: float
) -> dict[str, Any]:
    """One way of sending: measured, fitted, and carried on."""
    with ExitStack() as stack:
        cluster = Cluster(stack, elements, compress, shards, max(workers))
        points = {count: cluster.measure(count, steps, compute_s) for count in workers}
    calibrated = min(CALIBRATED, max(workers))
    with ExitStack() as stack:
        alone = Cluster(stack, elements, compress, 1 if shards > 1 else 2, calibrated)
        other = alone.measure(calibrated, steps, compute_s)["shard_cpu_s"]
    took = {count: point["step_s"] for count, point in points.items()}
    fitted = [count for count in FITTED if count in took] or workers
    model = fit({count: took[count] for count in fitted}, compute_s, shards)
    nearest = points[min(points, key=lambda count: abs(count - calibrated))]["shard_cpu_s"]
    pairs = sorted([(shards, nearest), (1 if shards > 1 else 2, other)])
    message_s, bytes_s = split(pairs)
    far = Far(
        compute_s,
        model.a,
        message_s,
        bytes_s,
        cluster.up,
        points[max(workers)]["down"],
        gbit * 1e9 / 8,
    )
    first = min(workers)
    wrong = errors(model, took)
    rows = [
        {
            "workers": count,
            **points[count],
            "efficiency": took[first] / took[count],
            "model_s": model.step_s(count),
            "error": wrong[count],
            "fitted": count in fitted,
        }
        for count in workers
    ]
    held_out = [abs(row["error"]) for row in rows if not row["fitted"]]
    return {
        "compress": compress,
        "rows": rows,
        "a_s": model.a,
        "b_s": model.b,
        "held_out": {"mean": statistics.fmean(held_out), "most": max(held_out)} if held_out else None,
        "message_s": message_s,
        "bytes_s": bytes_s,
        "up_bytes": far.up,
        "down_bytes": far.down,
        "far": [
            {
                "workers": count,
                "shards": across,
                "step_s": far.step_s(count, across),
                "efficiency": far.efficiency(count, across),
            }
            for count in FAR_WORKERS
            for across in FAR_SHARDS
        ],
    }


def show(found: dict[str, Any], shards: int, compute_s: float, gbit: float) -> None:
    click.echo(
        f"\n--compress {found['compress']}: {found['up_bytes'] / 1e3:,.1f} kB up and "
        f"{found['down_bytes'] / 1e3:,.1f} kB down per worker and step"
    )
    click.echo(
        f"{'workers':>8} {'step ms':>9} {'efficiency':>11} {'model ms':>9} {'error':>7}   CPU ms: shard, worker"
    )
    for row in found["rows"]:
        name = f"{row['workers']}{'*' if row['fitted'] else ' '}"
        click.echo(
            f"{name:>8} {1e3 * row['step_s']:9.1f} {100 * row['efficiency']:9.1f} % {1e3 * row['model_s']:9.1f} "
            f"{100 * row['error']:+6.1f}%   {1e3 * row['shard_cpu_s']:.3f}, {1e3 * row['worker_cpu_s']:.3f}"
        )
    click.echo(
        f"this machine, {shards} shards: T = {1e3 * compute_s:g} + {1e3 * found['a_s']:.2f} + "
        f"{1e3 * found['b_s']:.3f} workers / shards  (ms)"
    )
    if found["held_out"]:
        mean, most = found["held_out"]["mean"], found["held_out"]["most"]
        click.echo(
            f"error on the points without *: {100 * mean:.1f} % on average, {100 * most:.1f} % at most"
        )
    click.echo(
        f"further out: T = {1e3 * compute_s:g} + {1e3 * found['a_s']:.2f} + workers ({1e3 * found['message_s']:.3f} + "
        f"{1e3 * found['bytes_s']:.3f} / shards) + link at {gbit:g} Gbit/s  (ms)"
    )
    click.echo(f"{'workers':>8}" + "".join(f"{f'{across} shards':>22}" for across in FAR_SHARDS))
    for count in FAR_WORKERS:
        cells = [row for row in found["far"] if row["workers"] == count]
        click.echo(
            f"{count:8}"
            + "".join(f"{1e3 * c['step_s']:12,.0f} ms {100 * c['efficiency']:4.0f} %" for c in cells)
        )


def plot(found: list[dict[str, Any]], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for index, way in enumerate(found):
        rows, colour = way["rows"], f"C{index}"
        counts = [row["workers"] for row in rows]
        axes.plot(
            counts,
            [row["efficiency"] for row in rows],
            "o",
            color=colour,
            label=f"{way['compress']}, measured",
        )
        modelled = [rows[0]["model_s"] / row["model_s"] for row in rows]
        axes.plot(counts, modelled, "-", color=colour, label=f"{way['compress']}, model")
        for style, across in zip((":", "-.", "--"), FAR_SHARDS, strict=True):
            far = [row for row in way["far"] if row["shards"] == across]
            axes.plot(
                [row["workers"] for row in far],
                [row["efficiency"] for row in far],
                style,
                color=colour,
                label=f"{way['compress']}, {across} shards, extrapolated",
            )
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("workers")
    axes.set_ylabel("efficiency")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=150)


CAVEATS = """
What is measured has shards and workers on the same cores; what lies further out is computed: it takes shards with a
core and a card each, workers that all need the same time, a network without congestion between the cards, and no
failures."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--workers", default=",".join(map(str, WORKERS)), show_default=True)
@click.option("--compress", "ways", multiple=True, default=("none", "topk:1%"), show_default=True)
@click.option("--shards", type=click.IntRange(1), default=2, show_default=True)
@click.option("--elements", type=float, default=2**19, show_default=True, help="Of the model.")
@click.option("--compute-ms", type=float, default=200.0, show_default=True)
@click.option("--steps", type=click.IntRange(WARM_UP + 2), default=12, show_default=True)
@click.option("--gbit", type=float, default=10.0, show_default=True, help="Of each card, further out.")
@click.option("--plot", "picture", metavar="FILE", help="A PNG of it.")
@click.option("--json", "as_json", is_flag=True)
def main(
    workers: str,
    ways: tuple[str, ...],
    shards: int,
    elements: float,
    compute_ms: float,
    steps: int,
    gbit: float,
    picture: str | None,
    as_json: bool,
) -> None:
    try:
        counts = sorted({int(word) for word in workers.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 1:
        raise click.BadParameter("numbers of workers, such as 1,4,16", param_hint="--workers")
    if elements < shards << 16:
        raise click.BadParameter(
            f"at least {shards << 16}: each shard holds whole chunks", param_hint="--elements"
        )
    began, load = time.monotonic(), os.getloadavg()[0]
    found = []
    for way in ways:
        found.append(scaled(way, counts, shards, int(elements), steps, compute_ms / 1e3, gbit))
        if not as_json:
            show(found[-1], shards, compute_ms / 1e3, gbit)
    if picture:
        plot(found, picture)
    if as_json:
        how = {
            "shards": shards,
            "elements": int(elements),
            "compute_ms": compute_ms,
            "steps": steps,
            "gbit": gbit,
        }
        click.echo(json.dumps({**how, "load_before": load, "cores": os.cpu_count(), "found": found}))
        return
    click.echo(CAVEATS)
    click.echo(f"{os.cpu_count()} cores, load {load:.1f} at the start, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
