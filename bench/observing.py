"""What does it cost to look? `examples/char_lm.py` with everything on beside the same with everything off.

    python bench/observing.py            400 pairs of turns of five steps, about a quarter of an hour on two cores
    python bench/observing.py --json     the same as JSON
    python bench/observing.py -w 1 -- --batch-size 48

What follows `--` goes to the example. On: every process is scraped, once in --scrape seconds, as Prometheus does it;
log lines of level info; TensorBoard's files; and traces of 1 % of the steps, sent to a receiver here.
Off: no HTTP, no log lines but errors, no trackers, no traces. What each process counts is counted either way: what that
takes of a step is measured by itself, in the last line.

Two whole clusters train and take turns of a few steps, so that both live through the same seconds of a machine that
others may use, too; who has no turn is stopped (SIGSTOP), so that nothing of it goes on in the other's. All that a
cluster does by the second is therefore in its own turns, and rather too often: what became due meanwhile is done at
once when it goes on. Turns shorter than a second are no measurement of that, and nothing is decided by them.

A pair is a turn for each, in random order. Told are the mean time of a step and the CPU time that all processes of a
cluster took for one, the ratio of the means (on / off), where it lies with 95 % (bootstrap over the pairs), and the
median of the ratios of the pairs. The target is a cost of at most 1 %.

At the end both wait for a while, side by side, and only what comes by the second goes on: heartbeats, figures, history,
scrapes. What processes take then is hardly disturbed by what others compute; it is told as a share of one processor.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
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
from zml.proc import children

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE.parent / "examples" / "char_lm.py"
TARGET = 1.01
BEGIN_S = 180.0
SETTLE_S = 5.0
TURN_S = 60.0
LEAST_TURN_S = 1.0  # for what comes by the second
ALONE_S = 5.0  # for the other workers to make as many steps
FIND_S = 60.0
IDLE_S = 30.0  # in which nobody trains
TICKS = os.sysconf("SC_CLK_TCK")
OFF = {"http": "off", "log_level": "error", "trackers": "none", "trace": "off"}
# A cluster that is stopped again and again, on a busy machine, must not take its members for lost.
BOTH = {"lease_s": "60"}
ON = {"http": "127.0.0.1:0", "log_level": "info", "trackers": "tensorboard", "trace": "1/100"}

SCRIPT = """
import mmap, os, runpy, struct, sys, time
from zml.worker.script import current
from torch.optim.optimizer import register_optimizer_step_post_hook
folder = sys.argv[1]
worker = os.environ["ZML_SEAT"].split('"worker":"')[1].split('"')[0]
steps = open(os.path.join(folder, worker), "wb", buffering=0)
with open(os.path.join(os.path.dirname(folder), "allowed", worker), "rb") as file:
    allowed = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)
made, began = 0, time.monotonic()
def step_ended(*_):
    global made, began
    steps.write(struct.pack("=dd", began, time.monotonic()))
    made += 1
    poll_s = 0.001
    while int.from_bytes(allowed[:], "little") <= made:
        time.sleep(poll_s)
        poll_s = min(0.02, 1.1 * poll_s)
    if poll_s > 0.001:
        current().timeline.pause()  # or the next step would seem slow, and all of those are traced
    began = time.monotonic()
register_optimizer_step_post_hook(step_ended)
del sys.argv[:2]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass
class Turn:
    """A few steps of each worker, in which their cluster had the machine."""

    steps: dict[str, range]
    cpu_s: float = 0.0
    whole: bool = True  # every worker made as many; at the end of an epoch one may have none left


@dataclass
class Cluster:
    """`zml run` and all that it started."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]
    turns: list[Turn] = field(default_factory=list)
    ran_s: float = 0.0
    since: float | None = field(default_factory=time.monotonic)  # None: it is stopped

    def made(self) -> dict[str, int]:
        """Steps that each worker has made."""
        return {file.name: file.stat().st_size // 16 for file in (self.folder / "steps").iterdir()}

    def allow(self, until: dict[str, int]) -> None:
        for worker, steps in until.items():
            with (self.folder / "allowed" / worker).open("r+b") as file:
                file.write(steps.to_bytes(8, "little"))

    def go_on(self) -> None:
        self.send(signal.SIGCONT)
        self.since = time.monotonic()

    def stop(self) -> None:
        self.ran_s = self.running_s()
        self.since = None
        self.send(signal.SIGSTOP)

    def running_s(self) -> float:
        since = self.since
        return self.ran_s + (time.monotonic() - since if since is not None else 0.0)

    def pids(self) -> list[int]:
        """The launcher and everybody below it."""
        return [self.process.pid, *children(self.process.pid)]

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

    def seconds(self, turn: Turn) -> list[float]:
        """Of each step of a turn, of all workers."""
        found = []
        for worker, steps in turn.steps.items():
            data = (self.folder / "steps" / worker).read_bytes()[16 * steps.start : 16 * steps.stop]
            times = list(memoryview(data).cast("d"))
            found += [end - began for began, end in zip(times[::2], times[1::2], strict=True)]
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
    (folder / "allowed").mkdir()
    for worker in range(workers):
        (folder / "allowed" / f"w{worker}").write_bytes((1).to_bytes(8, "little"))
    settings = BOTH | (ON if name == "on" else OFF)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ZML_", "OTEL_"))}
    environment |= {f"ZML_{key.upper()}": value for key, value in settings.items() if key in KINDS}
    environment |= {"PYTHONPATH": str(HERE.parent), **(more if name == "on" else {})}
    # Two threads that wait for each other while others have the processors would be all that is measured.
    environment["OMP_NUM_THREADS"] = "1"
    flags = ["-w", str(workers), "-p", str(shards), "--keep-output", "none", "--run-dir", str(folder / "run")]
    script = [str(folder / "script.py"), str(folder / "steps"), str(EXAMPLE), *arguments]
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
    """Asks every process again and again as long as the cluster runs, as Prometheus does: over connections that stay
    open, and only once in a minute who there is. Who stops the cluster holds `asking`."""

    def __init__(self, cluster: Cluster, every_s: float) -> None:
        super().__init__(daemon=True)
        self.cluster = cluster
        self.every_s = every_s
        self.url = cluster.url()
        self.asking = threading.Lock()
        self.open: dict[str, http.client.HTTPConnection] = {}
        self.targets: list[str] = []
        self.found_at = -math.inf
        self.pages = self.bytes = self.failed = 0
        self.trouble = ""

    def run(self) -> None:
        due = self.cluster.running_s()
        while True:
            time.sleep(0.005)
            with self.asking:
                if self.cluster.since is None or (now := self.cluster.running_s()) < due:
                    continue
                due = now + self.every_s
                self._ask_all(now)

    def _ask_all(self, now: float) -> None:
        try:
            if now - self.found_at > FIND_S:
                groups = json.loads(self._get(self.url, "/api/sd"))
                self.targets = [target for group in groups for target in group["targets"]]
                self.found_at = now
            for target in self.targets:
                self.bytes += len(self._get(target, "/metrics"))
                self.pages += 1
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.failed += 1
            self.trouble = str(error)
            self.open.clear()

    def _get(self, target: str, path: str) -> bytes:
        if target not in self.open:
            self.open[target] = http.client.HTTPConnection(target, timeout=10.0)
        self.open[target].request("GET", path)
        answer = self.open[target].getresponse()
        page = answer.read()
        if answer.status != http.HTTPStatus.OK:
            raise ValueError(f"{target}{path} answers {answer.status}")
        return page


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


def take_turn(cluster: Cluster, steps: int, scraper: Scraper) -> None:
    """Both are stopped before and afterwards; the CPU time is read when nothing moves."""
    made = cluster.made()
    turn = Turn({worker: range(begin, begin + steps) for worker, begin in made.items()})
    before_s, moved = cluster.cpu_s(), time.monotonic()
    cluster.go_on()
    cluster.allow({worker: each.stop for worker, each in turn.steps.items()})
    end = time.monotonic() + TURN_S
    while turn.whole and any(made[worker] < each.stop for worker, each in turn.steps.items()):
        time.sleep(0.002)
        now, last, made = time.monotonic(), made, cluster.made()
        if made != last:
            moved = now
        elif now > moved + ALONE_S:
            cluster.must_run()
            turn.whole = not any(made[worker] == each.stop for worker, each in turn.steps.items())
        if now > end:
            cluster.must_run()
            raise click.ClickException(f"{cluster.name}: no {steps} steps within {TURN_S:g} s")
    with scraper.asking:
        cluster.stop()
    turn.cpu_s = cluster.cpu_s() - before_s
    cluster.turns.append(turn)


def idle(on: Cluster, off: Cluster) -> dict[str, float]:
    """What each takes of a processor while nobody trains, and the first is scraped."""
    on.go_on()
    off.go_on()
    time.sleep(SETTLE_S)
    began = {each.name: (time.monotonic(), each.cpu_s()) for each in (on, off)}
    time.sleep(IDLE_S)
    shares = {}
    for each in (on, off):
        since, cpu_s = began[each.name]
        shares[each.name] = (each.cpu_s() - cpu_s) / (time.monotonic() - since)
        each.must_run()
    return shares


def summary(pairs: list[tuple[float, float]], dice: random.Random) -> dict[str, float]:
    """Of (on, off): the median of the ratios, the ratio of the means, and where that lies with 95 %."""

    def of_means(some: list[tuple[float, float]]) -> float:
        return sum(on for on, _ in some) / sum(off for _, off in some)

    again = sorted(of_means(dice.choices(pairs, k=len(pairs))) for _ in range(2000))
    return {
        "on": statistics.mean(on for on, _ in pairs),
        "off": statistics.mean(off for _, off in pairs),
        "median": statistics.median(on / off for on, off in pairs),
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
@click.option("--pairs", type=click.IntRange(2), default=400, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=5, show_default=True, help="Of a turn.")
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
    steps: int,
    scrape: float,
    workers: int,
    shards: int,
    seed: int,
    as_json: bool,
    arguments: tuple[str, ...],
) -> None:
    dice = random.Random(seed)
    example = ["--epochs", "1000", "--samples", "60000", "--batch-size", "16", *arguments]
    load = os.getloadavg()[0]
    clusters: dict[str, Cluster] = {}
    with tempfile.TemporaryDirectory() as scratch, receiver() as traces:
        more = {"OTEL_EXPORTER_OTLP_ENDPOINT": traces}
        try:
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
            time.sleep(SETTLE_S)  # each waits at the end of its first step
            scraper = Scraper(on, scrape)
            for each in (on, off):
                each.stop()
            scraper.start()
            for number in range(pairs):
                for name in dice.sample(["on", "off"], 2):
                    take_turn(clusters[name], steps, scraper)
                if not as_json and (number + 1) % 50 == 0:
                    click.echo(f"{number + 1}/{pairs} pairs", err=True)
            waiting = idle(on, off)
            if not scraper.is_alive() or scraper.failed > scraper.pages:
                raise click.ClickException(f"it was not scraped: {scraper.trouble}")
            turns = [(a, b) for a, b in zip(on.turns, off.turns, strict=True) if a.whole and b.whole]
            walls = [
                (1e3 * statistics.mean(on.seconds(a)), 1e3 * statistics.mean(off.seconds(b)))
                for a, b in turns
            ]
            if not turns:
                raise click.ClickException("in no pair did all workers make their steps")
            cpus = [(1e3 * a.cpu_s / steps, 1e3 * b.cpu_s / steps) for a, b in turns]
        finally:
            for each in clusters.values():
                each.send(signal.SIGKILL)
                each.process.wait()
    figures = {"step": summary(walls, dice), "cpu": summary(cpus, dice)}
    micro = measuring_us()
    switched = sorted(key for key in ON if key in KINDS)
    about = {
        "pairs": len(walls),
        "steps": 2 * steps * len(walls),
        "load_before": load,
        "switched": switched,
        "arguments": example,
    }
    about |= {
        "turn_s": statistics.median(sum(pair) for pair in walls) / 2e3 * steps,
        "pages": scraper.pages,
        "pages_failed": scraper.failed,
        "page_bytes": scraper.bytes // max(1, scraper.pages),
        "measuring_us": micro,
        "idle_cpus": waiting,
    }
    if as_json:
        click.echo(json.dumps({**about, **figures}))
        return
    click.echo(
        f"{len(walls)} pairs, {about['steps']} steps, {scraper.pages} pages of {about['page_bytes']:,} bytes; "
        f"load {load:.1f}"
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
    if about["turn_s"] < LEAST_TURN_S:
        verdict = f"not decided, turns of {about['turn_s']:.2f} s are too short (--steps)"
    click.echo(f"target: ratio of step <= {TARGET}: {verdict}")
    click.echo(
        f"counting: {micro['step']:.1f} us of a worker's step with 8 buckets, {micro['push']:.1f} us a push and pull"
    )


if __name__ == "__main__":
    main()
