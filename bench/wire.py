"""How fast is the wire? zml's transport beside raw TCP, memcpy, grpc.aio and gloo, in one run, on one machine.

    python bench/wire.py            everything, about four minutes
    python bench/wire.py --quick    a look, under 40 seconds
    python bench/wire.py --json     the same as JSON

Two processes on loopback. What is compared runs in random order within each repetition, and a ratio is the median
over repetitions of (this way / raw TCP of the same repetition): absolute figures are this machine's, and vary; ratios
less so, and CPU seconds per GB (both processes, user and system) the least.

bulk     acknowledged pushes of tensors of 64 KB to 64 MB
small    60 bytes there and back, one after the other; beside raw TCP with its ends on different cores, as they are
         on different machines (on one core it has nobody to wake), and beside ZeroMQ's sockets alone
control  small messages on the control connection while a tensor stream runs on the bulk connection
swarm    1,000 and 4,000 peers that each send one heartbeat a second to one endpoint
"""

import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import click
import rivals
import routes
import swarm
import zml_routes
from peer import cpu_s, quiet

from zml.transport import CONTROL

HERE = Path(__file__).resolve().parent
KB, MB = 1 << 10, 1 << 20
SECTIONS = ("bulk", "small", "control", "swarm")
RAW = "raw TCP"
RAW_APART = "raw TCP, two cores"


@dataclass(frozen=True)
class Plan:
    """How much is measured: the full run and a quick look differ in nothing else."""

    sizes: tuple[int, ...]
    repetitions: int
    push_s: float  # how long one way pushes tensors of one size, in one repetition
    round_trips: int  # per repetition
    control_windows: int
    control_s: float  # each
    swarms: tuple[int, ...]
    swarm_s: float


FULL = Plan((64 * KB, MB, 4 * MB, 16 * MB, 64 * MB), 7, 0.25, 1000, 7, 2.0, (1000, 4000), 12.0)
QUICK = Plan((MB, 4 * MB, 64 * MB), 5, 0.12, 300, 3, 1.0, (1000,), 4.0)


Ways = list[routes.Route]


class Peer:
    """The other process, and the routes to it."""

    def __init__(self, ways: Sequence[str], largest: int, folder: str) -> None:
        gloo_port = routes.free_port()
        order = {"ways": ways, "largest": largest, "gloo_port": gloo_port, "folder": folder}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "peer.py"), json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.addresses: dict[str, Any] = self._read()

    def cpu_s(self) -> float:
        return float(self.ask("cpu"))

    def ask(self, what: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException(f"the other process ended with {self._process.wait(10)}")
        return json.loads(line)

    def close(self) -> None:
        try:
            self._process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()


@dataclass
class Figures:
    """One way at one size: what each repetition gave."""

    gb_per_s: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    cpu_s_per_gb: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        return {
            "gb_per_s": statistics.median(self.gb_per_s),
            "ratio": statistics.median(self.ratio),
            "ratio_low": min(self.ratio),
            "ratio_high": max(self.ratio),
            "cpu_s_per_gb": statistics.median(self.cpu_s_per_gb),
        }


def bulk(ways: Ways, peer: Peer, plan: Plan, order: random.Random) -> dict[str, Any]:
    tensor = memoryview(bytearray(order.randbytes(max(plan.sizes))))
    figures: dict[str, dict[int, Figures]] = {way.name: {} for way in ways}
    for size in plan.sizes:
        counts = {way.name: calibrate(way, tensor[:size], plan.push_s) for way in ways}
        for way in ways:
            figures[way.name][size] = Figures()
        for _ in range(plan.repetitions):
            speed: dict[str, float] = {}
            for way in order.sample(ways, len(ways)):
                gigabytes = counts[way.name] * size / 1e9
                cpu, start = cpu_s() + peer.cpu_s(), time.perf_counter()
                way.push(tensor[:size], counts[way.name])
                seconds = time.perf_counter() - start
                speed[way.name] = gigabytes / seconds
                used = cpu_s() + peer.cpu_s() - cpu
                figures[way.name][size].cpu_s_per_gb.append(used / gigabytes)
            for name, gb_per_s in speed.items():
                figures[name][size].gb_per_s.append(gb_per_s)
                figures[name][size].ratio.append(gb_per_s / speed[RAW])
    return {name: {size: f.summary() for size, f in by_size.items()} for name, by_size in figures.items()}


def calibrate(way: routes.Route, tensor: memoryview, seconds: float) -> int:
    """How many tensors this way pushes in about so many seconds; warms it up, too."""
    count = 2
    while True:
        start = time.perf_counter()
        way.push(tensor, count)
        taken = time.perf_counter() - start
        if taken > seconds / 3:
            return max(2, round(count * seconds / taken))
        count *= 2


def small(ways: Ways, peer: Peer, plan: Plan, order: random.Random) -> dict[str, Any]:
    p50: dict[str, list[float]] = {}
    p99: dict[str, list[float]] = {}
    cpu_us: dict[str, list[float]] = {}
    at_once: dict[str, list[float]] = {}
    for way in ways:
        way.round_trips(50)
    for _ in range(plan.repetitions):
        for way in order.sample(ways, len(ways)):
            cpu = cpu_s() + peer.cpu_s()
            seconds = way.round_trips(plan.round_trips)
            used = cpu_s() + peer.cpu_s() - cpu
            p50.setdefault(way.name, []).append(percentile(seconds, 50))
            p99.setdefault(way.name, []).append(percentile(seconds, 99))
            cpu_us.setdefault(way.name, []).append(1e6 * used / plan.round_trips)
            seconds_64 = way.round_trips_at_once(plan.round_trips * 4, 64)
            at_once.setdefault(way.name, []).append(plan.round_trips * 4 / seconds_64 if seconds_64 else 0.0)
    return {
        way.name: {
            "p50_us": 1e6 * statistics.median(p50[way.name]),
            "p99_us": 1e6 * statistics.median(p99[way.name]),
            "ratio": statistics.median(a / b for a, b in zip(p50[way.name], p50[RAW_APART], strict=True)),
            "per_s": 1 / statistics.median(p50[way.name]),
            "per_s_at_once": statistics.median(at_once[way.name]),
            "cpu_us": statistics.median(cpu_us[way.name]),
        }
        for way in ways
    }


def control(peer: Peer, plan: Plan) -> dict[str, Any]:
    """100 small messages a second on the control connection, alone and beside a stream that the other side adds up.

    Several windows of either kind, in turn: one disturbance from outside would be the p99 of a long one.
    """
    at = peer.addresses["zml"]
    own, bulk_thread = routes.LoopThread(), routes.LoopThread()
    small_way = zml_routes.Zml("control", "control", at["control"], CONTROL, own)
    stream = zml_routes.Zml("bulk", "bulk", at["bulk"], zml_routes.NO_MEMORY, bulk_thread)
    tensor = memoryview(bytearray(4 * MB))
    windows: dict[str, list[tuple[float, float, float, float]]] = {"alone": [], "beside a stream": []}
    try:
        count = calibrate(stream, tensor, plan.control_s)
        for _ in range(plan.control_windows):
            for name, found in windows.items():
                pushing, start = None, time.perf_counter()
                if name != "alone":
                    pushing = asyncio.run_coroutine_threadsafe(
                        stream.push_async(tensor, count), bulk_thread.loop
                    )
                replies = own.run(zml_routes.beats(small_way, 0.01, plan.control_s * 0.9))
                gb_per_s = 0.0
                if pushing is not None:
                    pushing.result(120)
                    gb_per_s = count * tensor.nbytes / 1e9 / (time.perf_counter() - start)
                found.append((percentile(replies, 50), percentile(replies, 99), max(replies), gb_per_s))
    finally:
        small_way.close()
        stream.close()
    return {
        name: {
            "p50_ms": 1e3 * statistics.median(w[0] for w in found),
            "p99_ms": 1e3 * statistics.median(w[1] for w in found),
            "p99_best_ms": 1e3 * min(w[1] for w in found),
            "max_ms": 1e3 * max(w[2] for w in found),
            "bulk_gb_per_s": statistics.median(w[3] for w in found),
        }
        for name, found in windows.items()
    }


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


@contextmanager
def two_processes(plan: Plan, notes: list[str]) -> Iterator[tuple[Ways, Ways, Peer]]:
    """Every way for bulk that can be tried here, every way for small messages, and the other process."""
    wanted = ["tcp", "zml"]
    for rival, module in (("grpc", "grpc"), ("gloo", "torch")):
        if routes.installed(module):
            wanted.append(rival)
        else:
            notes.append(f"{rival} is left out: {module} is not installed")
    largest = max(plan.sizes)
    with tempfile.TemporaryDirectory(prefix="zml-wire-") as folder:
        peer = Peer(wanted, largest, folder)
        ways: Ways = []
        only_small: Ways = []
        try:
            at, thread = peer.addresses, routes.LoopThread()
            ways.append(routes.Memcpy(largest))
            ways.append(routes.RawTcp(at["tcp"]))
            ways.append(routes.RawTcp(at["tcp"], tuned=True))
            only_small.append(routes.RawTcp(at["tcp"], apart=True))
            only_small.append(routes.ZmqAlone(at["zmq"], thread))
            for number, (name, _, limits) in enumerate(zml_routes.WAYS):
                zml = zml_routes.Zml(name, f"p{number}", at["zml"][name], limits, thread)
                ways.append(zml)
                if limits.slots and not zml.shares_memory:
                    notes.append(f"{name}: no shared memory between these processes")
            if "grpc" in wanted:
                ways.append(rivals.GrpcAio(at["grpc"], thread))
            if "gloo" in wanted:
                ways.append(rivals.Gloo(at["gloo"]))
                notes.append(
                    "gloo spins: on a machine without an idle core it is far slower than it could be"
                )
            yield ways, [*only_small, *ways[1:2], *ways[3:]], peer
        finally:
            for way in [*ways, *only_small]:
                way.close()
            peer.close()


def bulk_table(result: dict[str, Any], sizes: Sequence[int]) -> str:
    lines = [
        f"{'acknowledged pushes':19}" + "".join(f"{label(size):>16}" for size in sizes),
        f"{'':19}" + f"{'GB/s ratio s/GB':>16}" * len(sizes),
    ]
    for name, by_size in result.items():
        cells = "".join(
            f"{c['gb_per_s']:6.2f}{c['ratio']:5.{1 if c['ratio'] > 9.9 else 2}f}{c['cpu_s_per_gb']:5.2f}"
            for c in (by_size[size] for size in sizes)
        )
        lines.append(f"{name:19}{cells}")
    return "\n".join(lines)


def small_table(result: dict[str, Any]) -> str:
    lines = [
        f"{'60 bytes and back':24}{'p50 us':>9}{'ratio':>9}{'p99 us':>9}{'per s':>9}{'CPU us':>9}"
        f"{'per s, 64 at once':>20}"
    ]
    for name, r in result.items():
        at_once = f"{r['per_s_at_once']:20,.0f}" if r["per_s_at_once"] else ""
        lines.append(
            f"{name:24}{r['p50_us']:9.0f}{r['ratio']:9.2f}{r['p99_us']:9.0f}{r['per_s']:9,.0f}{r['cpu_us']:9.0f}"
            + at_once
        )
    return "\n".join(lines)


def control_table(result: dict[str, Any]) -> str:
    lines = [f"{'100 control messages a second':36}{'p50 ms':>9}{'p99 ms':>9}{'best p99':>10}{'max ms':>9}"]
    for name, r in result.items():
        stream = f" of {r['bulk_gb_per_s']:.1f} GB/s" if r["bulk_gb_per_s"] else ""
        lines.append(
            f"{name + stream:36}{r['p50_ms']:9.2f}{r['p99_ms']:9.2f}{r['p99_best_ms']:10.2f}{r['max_ms']:9.2f}"
        )
    return "\n".join(lines)


def swarm_table(result: dict[str, Any]) -> str:
    lines = [
        f"{'one heartbeat a second each':28}{'CPU % of a core':>16}{'p50 ms':>9}{'p99 ms':>9}{'unanswered':>12}"
        f"{'MB':>7}{'connected in s':>16}"
    ]
    for r in result.values():
        lines.append(
            f"{r['peers']:,} peers".ljust(28)
            + f"{r['cpu_percent']:16.1f}{r['p50_ms']:9.2f}{r['p99_ms']:9.2f}{r['unanswered']:12,}"
            + f"{r['rss_mb']:7.0f}{r['connect_s']:16.1f}"
        )
    return "\n".join(lines)


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the design asks of the wire, and what this run found. The worst size counts."""
    found: list[dict[str, Any]] = []

    def judge(what: str, value: float, wanted: float, *, least: bool) -> None:
        met = value >= wanted if least else value <= wanted
        found.append({"what": what, "value": value, "wanted": wanted, "least": least, "met": met})

    if "bulk" in report:
        large = {
            name: [by_size[size] for size in by_size if size >= MB]
            for name, by_size in report["bulk"].items()
        }
        worst = {name: min(cell["ratio"] for cell in cells) for name, cells in large.items()}
        judge("pushes of 1 MB and more over tcp, to raw TCP", worst["zml, tcp"], 0.85, least=True)
        judge("the same on one machine's fast path", worst["zml, one machine"], 2.5, least=True)
        for other, wanted in (("grpc.aio", 2.5), ("gloo", 0.8)):
            if other in large:
                pairs = zip(large["zml, tcp"], large[other], strict=True)
                value = min(ours["gb_per_s"] / theirs["gb_per_s"] for ours, theirs in pairs)
                judge(f"the same over tcp, to {other}", value, wanted, least=True)
    if "small" in report:
        judge("p50 of 60 bytes and back, to raw TCP", report["small"]["zml, tcp"]["ratio"], 2.0, least=False)
    if "control" in report:
        p99_ms = report["control"]["beside a stream"]["p99_ms"]
        judge("control p99 beside a stream, ms", p99_ms, 5.0, least=False)
    if 4000 in report.get("swarm", {}):
        swarm_4000 = report["swarm"][4000]
        judge("4,000 peers, % of a core", swarm_4000["cpu_percent"], 25.0, least=False)
        judge("4,000 peers, reply p99 ms", swarm_4000["p99_ms"], 10.0, least=False)
    return found


def targets_table(found: list[dict[str, Any]]) -> str:
    lines = [f"{'target':52}{'wanted':>10}{'found':>10}"]
    for t in found:
        sign = ">=" if t["least"] else "<="
        wanted = f"{sign} {t['wanted']:g}"
        lines.append(f"{t['what']:52}{wanted:>10}{t['value']:10.2f}  {'met' if t['met'] else 'MISSED'}")
    return "\n".join(lines)


def label(size: int) -> str:
    return f"{size // MB} MB" if size >= MB else f"{size // KB} KB"


@click.command(help=__doc__.split("\n")[0])
@click.option("--quick", is_flag=True, help="A look, under 40 seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--only", multiple=True, type=click.Choice(SECTIONS), help="Only this; may be given again.")
@click.option("--seed", type=int, default=None, help="Of the order within the repetitions.")
def main(quick: bool, as_json: bool, only: tuple[str, ...], seed: int | None) -> None:
    quiet()
    plan = QUICK if quick else FULL
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    order = random.Random(seed)
    sections = only or SECTIONS
    notes: list[str] = []
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    report: dict[str, Any] = {
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "load_per_core_before": round(load, 2),
        "seed": seed,
        "notes": notes,
    }

    def show(table: str) -> None:
        if not as_json:
            click.echo("\n" + table)

    if load > 0.3:
        notes.append(f"the machine is busy (load {load:.1f} per core): trust ratios and CPU seconds only")
    if {"bulk", "small", "control"} & set(sections):
        with two_processes(plan, notes) as (ways, small_ways, peer):
            if "bulk" in sections:
                report["bulk"] = bulk(ways, peer, plan, order)
                show(bulk_table(report["bulk"], plan.sizes))
            if "small" in sections:
                report["small"] = small(small_ways, peer, plan, order)
                show(small_table(report["small"]))
            if "control" in sections:
                report["control"] = control(peer, plan)
                show(control_table(report["control"]))
    if "swarm" in sections:
        report["swarm"] = {count: swarm.measure(count, plan.swarm_s) for count in plan.swarms}
        show(swarm_table(report["swarm"]))
    report["targets"] = targets(report)
    if report["targets"]:
        show(targets_table(report["targets"]))
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        click.echo("\n" + "\n".join(f"note: {note}" for note in notes))


if __name__ == "__main__":
    main()
