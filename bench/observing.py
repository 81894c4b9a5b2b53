"""What does it cost to look? `examples/char_lm.py` with everything on beside the same with everything off.

    python bench/observing.py            40 pairs of slices of 3 s, about five minutes on two cores
    python bench/observing.py --json     the same as JSON
    python bench/observing.py -w 1 -- --batch-size 48

What follows `--` goes to the example. On: every process is scraped, once in --scrape seconds, as Prometheus does it;
log lines of level info; TensorBoard's files; and traces of 1 % of the steps, sent to a receiver here.
Off: no HTTP, no log lines but errors, no trackers, no traces. What each process counts is counted either way: what that
takes of a step is measured by itself, in the last line.

Two whole clusters train and take turns: at the end of each step a script waits until it is its cluster's turn, so that
both live through the same minutes of a machine that others may use, too. A pair is a slice of time for each, in random
order; its ratio is (on / off) of the mean time of a step, of the steps that lie inside the slice, and of the CPU time
that all processes of a cluster took for one. Told are the median over the pairs, and the interval in which the ratio of
the means lies with 95 % (bootstrap over the pairs). The target is a cost of at most 1 %; on a machine that others keep
busy it takes many pairs, or steps that are short, to decide it.

At the end both wait for a while, side by side, and only what comes by the second goes on: heartbeats, figures, history,
scrapes. What processes take then is hardly disturbed by what others compute; it is told as a share of one processor.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import click

from zml.config import KINDS

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parent / "examples" / "char_lm.py"
TARGET = 1.01
BEGIN_S = 180.0
SETTLE_S = 1.0  # of a slice, before it counts
FIND_S = 60.0
IDLE_S = 30.0  # in which nobody trains
TICKS = os.sysconf("SC_CLK_TCK")
OFF = {"http": "off", "log_level": "error", "trackers": "none", "trace": "off"}
ON = {"http": "127.0.0.1:0", "log_level": "info", "trackers": "tensorboard", "trace": "1/100"}

SCRIPT = """
import mmap, os, runpy, struct, sys, time
from torch.optim.optimizer import register_optimizer_step_post_hook
folder, me = sys.argv[1], int(sys.argv[2])
worker = os.environ["ZML_SEAT"].split('"worker":"')[1].split('"')[0]
ends = open(os.path.join(folder, worker), "wb", buffering=0)
with open(os.path.join(os.path.dirname(os.path.dirname(folder)), "turn"), "rb") as file:
    turn = mmap.mmap(file.fileno(), 1, prot=mmap.PROT_READ)
def step_ended(*_):
    ends.write(struct.pack("=d", time.monotonic()))
    while turn[0] != me:
        time.sleep(0.002)
register_optimizer_step_post_hook(step_ended)
del sys.argv[:3]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TURNS = {"on": 1, "off": 2}


@dataclass
class Slice:
    """A while in which one cluster had the machine."""

    since: float
    until: float
    cpu_s: float


@dataclass
class Cluster:
    """`zml run` and all that it started."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]
    slices: list[Slice] = field(default_factory=list)

    def pids(self) -> list[int]:
        """The launcher and everybody below it."""
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    children.setdefault(parent, []).append(int(entry.name))
        found = [self.process.pid]
        for pid in found:
            found += children.get(pid, [])
        return found

    def send(self, number: int) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def cpu_s(self) -> float:
        ticks = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / TICKS

    def ends(self) -> dict[str, list[float]]:
        """When each worker's steps were over."""
        found = {}
        for file in sorted((self.folder / "steps").iterdir()):
            data = file.read_bytes()
            found[file.name] = list(memoryview(data[: len(data) // 8 * 8]).cast("d"))
        return found

    def must_run(self) -> None:
        if self.process.poll() is not None:
            said = (self.folder / "out.txt").read_text(errors="replace")
            raise click.ClickException(f"{self.name} ended with {self.process.returncode}:\n{said[-3000:]}")

    def url(self) -> str:
        said = (self.folder / "out.txt").read_text(errors="replace")
        return said.partition("http://")[2].partition("/")[0]


def begin(
    name: str, folder: Path, workers: int, shards: int, arguments: list[str], more: dict[str, str]
) -> Cluster:
    (folder / "steps").mkdir(parents=True)
    (folder / "script.py").write_text(SCRIPT)
    settings = ON if name == "on" else OFF
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ZML_", "OTEL_"))}
    environment |= {f"ZML_{key.upper()}": value for key, value in settings.items() if key in KINDS}
    environment |= {"PYTHONPATH": str(HERE.parent), **(more if name == "on" else {})}
    # Two threads that wait for each other while others have the processors would be all that is measured.
    environment["OMP_NUM_THREADS"] = "1"
    flags = ["-w", str(workers), "-p", str(shards), "--keep-output", "none", "--run-dir", str(folder / "run")]
    script = [str(folder / "script.py"), str(folder / "steps"), str(TURNS[name]), str(EXAMPLE), *arguments]
    with (folder / "out.txt").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "zml", "run", *flags, *script],
            env=environment,
            cwd=folder,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Cluster(name, folder, process)


class Scraper(threading.Thread):
    """Asks every process again and again while it may, as Prometheus does: over connections that stay open, and only
    once in a minute who there is."""

    def __init__(self, url: str, every_s: float) -> None:
        super().__init__(daemon=True)
        self.every_s = every_s
        self.url = url
        self.go = threading.Event()
        self.open: dict[str, http.client.HTTPConnection] = {}
        self.targets: list[str] = []
        self.found_at = -math.inf
        self.pages = self.bytes = self.failed = 0

    def run(self) -> None:
        while True:
            self.go.wait()
            due = time.monotonic() + self.every_s
            try:
                if time.monotonic() - self.found_at > FIND_S:
                    groups = json.loads(self._get(self.url, "/api/sd"))
                    self.targets = [target for group in groups for target in group["targets"]]
                    self.found_at = time.monotonic()
                for target in self.targets:
                    self.bytes += len(self._get(target, "/metrics"))
                    self.pages += 1
            except (OSError, http.client.HTTPException):
                self.failed += 1
                self.open.clear()
            time.sleep(max(0.0, due - time.monotonic()))

    def _get(self, target: str, path: str) -> bytes:
        if target not in self.open:
            self.open[target] = http.client.HTTPConnection(target, timeout=10.0)
        self.open[target].request("GET", path)
        return self.open[target].getresponse().read()


class Receiver(http.server.BaseHTTPRequestHandler):
    """Takes traces, and keeps none."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def receiver() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


def steps_of(cluster: Cluster, part: Slice) -> list[float]:
    """Seconds of the steps that lie inside."""
    return [
        later - before
        for ends in cluster.ends().values()
        for before, later in itertools.pairwise(ends)
        if part.since <= before and later <= part.until
    ]


def take_turn(cluster: Cluster, turn: Path, seconds: float, scraper: Scraper) -> None:
    with turn.open("r+b") as file:
        file.write(bytes([TURNS[cluster.name]]))
    if cluster.name == "on":
        scraper.go.set()
    time.sleep(SETTLE_S)
    since, cpu_s = time.monotonic(), cluster.cpu_s()
    time.sleep(seconds)
    cluster.slices.append(Slice(since, time.monotonic(), cluster.cpu_s() - cpu_s))
    scraper.go.clear()
    cluster.must_run()


def idle(on: Cluster, off: Cluster, turn: Path, scraper: Scraper) -> dict[str, float]:
    """What each takes of a processor while nobody trains, and the first is scraped."""
    with turn.open("r+b") as file:
        file.write(b"\0")
    scraper.go.set()
    time.sleep(SETTLE_S)
    began = {each.name: (time.monotonic(), each.cpu_s()) for each in (on, off)}
    time.sleep(IDLE_S)
    shares = {}
    for each in (on, off):
        since, cpu_s = began[each.name]
        shares[each.name] = (each.cpu_s() - cpu_s) / (time.monotonic() - since)
        each.must_run()
    scraper.go.clear()
    return shares


def summary(pairs: list[tuple[float, float]], dice: random.Random) -> dict[str, float]:
    """Of (on, off): the median of the ratios, the ratio of the means, and where that lies with 95 %."""
    ratios = sorted(on / off for on, off in pairs)

    def of_means(some: list[tuple[float, float]]) -> float:
        return sum(on for on, _ in some) / sum(off for _, off in some)

    again = sorted(of_means(dice.choices(pairs, k=len(pairs))) for _ in range(2000))
    return {
        "on": statistics.mean(on for on, _ in pairs),
        "off": statistics.mean(off for _, off in pairs),
        "median": statistics.median(ratios),
        "ratio": of_means(pairs),
        "low": again[50],
        "high": again[-51],
    }


def measuring_us() -> dict[str, float]:
    """What counting takes of one step of a worker, with eight buckets, and of one push at a shard."""
    from zml.shard.counts import Counts
    from zml.worker.reporting import Meter
    from zml.worker.timeline import Timeline

    timeline, counts = Timeline(), Counts(dense={0: 4})
    meter, rounds, payload = Meter(timeline), 5_000, memoryview(b"1234")

    def step(clock: int) -> None:
        for _ in timeline.reading(iter((1,))):
            pass
        for _ in range(8):
            with timeline.measure("encode"):
                pass
            timeline.sent(1, 4)
        for _ in range(8):
            timeline.turn("apply")
            timeline.came(1, 4)
            timeline.turn("wait")
        timeline.turn("compute")
        timeline.ended(timeline.open())
        timeline.close(clock)
        meter.stepped(0)

    def push(clock: int) -> None:
        counts.pushed(0, payload)
        counts.pulled(0, payload)
        with counts.applying():
            pass

    found = {}
    for name, work in (("step", step), ("push", push)):
        best = float("inf")
        for _ in range(5):
            began = time.process_time()
            for clock in range(rounds):
                work(clock)
            best = min(best, time.process_time() - began)
        found[name] = 1e6 * best / rounds
    return found


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--pairs", type=click.IntRange(2), default=40, show_default=True)
@click.option("--seconds", type=click.FloatRange(1.0), default=3.0, show_default=True, help="Of a slice.")
@click.option(
    "--scrape",
    type=click.FloatRange(0.1),
    default=1.0,
    show_default=True,
    help="Seconds from one to the next.",
)
@click.option("-w", "--workers", type=click.IntRange(1), default=2, show_default=True)
@click.option("-p", "--shards", type=click.IntRange(1), default=1, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Decides who goes first in each pair.")
@click.option("--json", "as_json", is_flag=True)
@click.argument("arguments", nargs=-1)
def main(
    pairs: int,
    seconds: float,
    scrape: float,
    workers: int,
    shards: int,
    seed: int,
    as_json: bool,
    arguments: tuple[str, ...],
) -> None:
    dice = random.Random(seed)
    example = ["--epochs", "1000", "--samples", "20000", "--batch-size", "16", *arguments]
    load = os.getloadavg()[0]
    clusters: dict[str, Cluster] = {}
    with tempfile.TemporaryDirectory() as scratch, receiver() as traces:
        more = {"OTEL_EXPORTER_OTLP_ENDPOINT": traces}
        try:
            turn = Path(scratch, "turn")
            turn.write_bytes(b"\0")
            for name in ("on", "off"):
                clusters[name] = begin(name, Path(scratch, name), workers, shards, example, more)
            on, off = clusters["on"], clusters["off"]
            end = time.monotonic() + BEGIN_S
            while any(len(list((each.folder / "steps").iterdir())) < workers for each in (on, off)):
                on.must_run()
                off.must_run()
                if time.monotonic() > end:
                    raise click.ClickException(f"no steps within {BEGIN_S:g} s")
                time.sleep(0.5)
            time.sleep(5 * SETTLE_S)  # each waits at the end of its first step
            scraper = Scraper(on.url(), scrape)
            scraper.start()
            for number in range(pairs):
                for name in dice.sample(["on", "off"], 2):
                    take_turn(clusters[name], turn, seconds, scraper)
                if not as_json and (number + 1) % 10 == 0:
                    click.echo(f"{number + 1}/{pairs} pairs", err=True)
            waiting = idle(on, off, turn, scraper)
            walls, cpus, steps = [], [], 0
            for one, other in zip(on.slices, off.slices, strict=True):
                a, b = steps_of(on, one), steps_of(off, other)
                if a and b:
                    steps += len(a) + len(b)
                    walls.append((1e3 * statistics.mean(a), 1e3 * statistics.mean(b)))
                    cpus.append((1e3 * one.cpu_s / len(a), 1e3 * other.cpu_s / len(b)))
        finally:
            for each in clusters.values():
                each.send(signal.SIGKILL)
                each.process.wait()
    figures = {"step": summary(walls, dice), "cpu": summary(cpus, dice)}
    micro = measuring_us()
    switched = sorted(key for key in ON if key in KINDS)
    about = {
        "pairs": len(walls),
        "steps": steps,
        "load_before": load,
        "switched": switched,
        "arguments": example,
    }
    about |= {
        "pages": scraper.pages,
        "page_bytes": scraper.bytes // max(1, scraper.pages),
        "measuring_us": micro,
        "idle_cpus": waiting,
    }
    if as_json:
        click.echo(json.dumps({**about, **figures}))
        return
    click.echo(
        f"{len(walls)} pairs, {steps} steps, {scraper.pages} pages of {about['page_bytes']:,} bytes; load {load:.1f}"
    )
    click.echo(f"switched: {', '.join(switched)}")
    click.echo("        off ms     on ms    median     ratio  (95 %)")
    for name, f in figures.items():
        click.echo(
            f"{name:5}{f['off']:9.1f}{f['on']:10.1f}{f['median']:10.4f}{f['ratio']:10.4f}"
            f"  ({f['low']:.4f} .. {f['high']:.4f})"
        )
    click.echo(
        f"idle {100 * waiting['off']:9.2f}%{100 * waiting['on']:9.2f}%    of one processor, for a cluster that waits"
    )
    ratio = figures["step"]
    verdict = "reached" if ratio["high"] <= TARGET else "missed" if ratio["low"] > TARGET else "not decided"
    click.echo(f"target: ratio of step <= {TARGET}: {verdict}")
    click.echo(
        f"counting: {micro['step']:.1f} us of a worker's step with 8 buckets, {micro['push']:.1f} us a push and pull"
    )


if __name__ == "__main__":
    main()
