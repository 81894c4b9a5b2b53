"""How many jobs does one coordinator hold? Thousands at once, with members that only talk, over real sockets.

    python bench/jobs.py                  1,000 jobs, one to two minutes on two cores
    python bench/jobs.py --jobs 5000      takes 15,512 open files (ulimit -Hn)
    python bench/jobs.py --json FILE      the same as JSON too

One process is `zml coordinator --cluster`, as anybody starts it; two more play the nodes and, of every job, a worker
and a shard (`crowd.py`). Jobs come in over HTTP, become RUNNING when their members have joined, are heard at the
interval that the coordinator asks for, and end. Then it is counted.

submit      jobs sent as fast as they are taken, over a few connections that stay open; until all of them run
steady      more jobs at a steady rate, with room for each: from submission to the decision to start it; how long rounds
            over all jobs take, and how long they hold everybody else up (`held`)
idle        everybody runs and nothing happens but heartbeats: what that costs
recovery    kill -9, start again: until every member of every job has been heard by the new process
end         every script comes to its end: nothing may be lost, or left

Both ends share the machine's cores: wall-clock figures are those of a machine that is busy with the crowd too. How fast
it is at the moment is said beside them: how long a plain loop of a million additions takes, before and after.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import checkout  # noqa: F401
import click
import msgspec
from peer import quiet

from zml import records

HERE = Path(__file__).resolve().parent
TICKS = os.sysconf("SC_CLK_TCK")
CROWDS = 2
CPUS = 16  # of each node
CONNECTIONS = 8
STEADY = 400  # of the jobs, at most: so that the 99th of a hundred is not one job's luck
STEADY_PER_S = 20.0
WAIT_S = 120.0
LOG = "logs/cluster.jsonl"  # of the coordinator, in its folder
END_S = 30.0
MB = 1e6


class Failed(click.ClickException):
    """The run cannot go on; what is not measured is not reported."""


# -- the processes -----------------------------------------------------------------------------------------------


class Coordinator:
    """`zml coordinator --cluster`, and what the system says of its process."""

    def __init__(self, folder: Path, policy: str) -> None:
        self.folder = folder
        self.command = [
            *[sys.executable, "-m", "zml", "coordinator", "--cluster", str(folder), "--policy", policy],
            *["--bind", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0"],
        ]
        self.process: subprocess.Popen[bytes] | None = None
        self.http = ""
        self.address = ""

    async def start(self) -> float:
        """Returns when it listens: seconds from the start of the process."""
        begin = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # who starts it again has compiled it before
        self.process = subprocess.Popen(
            self.command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        here: dict[str, Any] = {}
        while here.get("pid") != self.process.pid:
            if self.process.poll() is not None:
                assert self.process.stderr is not None
                raise Failed(f"the coordinator ended: {self.process.stderr.read().decode()[-2000:]}")
            await asyncio.sleep(0.02)
            try:
                here = json.loads((self.folder / "cluster.json").read_text())
            except (OSError, ValueError):
                continue
        self.http, self.address = here["http"], here["addresses"][0]
        asyncio.get_running_loop().run_in_executor(None, self._read, self.process)
        return time.monotonic() - begin

    @staticmethod
    def _read(process: subprocess.Popen[bytes]) -> None:
        """So that it never waits for somebody to read what it says."""
        assert process.stderr is not None
        for _ in process.stderr:
            pass

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def rss_mb(self) -> float:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize() / MB

    def peak_mb(self) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1e3

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    async def figures(self) -> dict[str, Any]:
        """What it says of itself when it is asked with a signal: the rounds since it was asked last."""
        before = self.logged()
        os.kill(self.pid, signal.SIGUSR1)
        return await self.says("figures", before)

    def logged(self) -> int:
        """Bytes of its log."""
        return (self.folder / LOG).stat().st_size

    async def says(self, what: str, since: int) -> dict[str, Any]:
        """The line of this message that follows so many bytes of its log, once it is there."""
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            await asyncio.sleep(0.02)
            with (self.folder / LOG).open("rb") as file:
                file.seek(since)
                for line in file:
                    if line.endswith(b"\n") and f'"{what}"'.encode() in line:
                        found: dict[str, Any] = json.loads(line)
                        return found
        raise Failed(f"the coordinator's log does not say {what!r}")

    def journal_mb(self) -> tuple[float, float]:
        """The cluster's own, and those of all attempts together."""
        own = sum(path.stat().st_size for path in (self.folder / "state").rglob("*") if path.is_file())
        attempts = (self.folder / "jobs").glob("*/*/state/coordinator/*")
        return own / MB, sum(path.stat().st_size for path in attempts if path.is_file()) / MB


class Crowd:
    """Nodes and members, in a process of their own."""

    def __init__(self, address: str, first: int, nodes: int) -> None:
        command = [sys.executable, str(HERE / "crowd.py"), address, str(first), str(nodes), str(CPUS)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"a crowd ended with {self.process.wait(10)}")
        found: dict[str, Any] = json.loads(line)
        return found


class Crowds:
    """All of them, as one."""

    def __init__(self, address: str, nodes: int) -> None:
        share = -(-nodes // CROWDS)
        self.all = [Crowd(address, first, min(share, nodes - first)) for first in range(0, nodes, share)]

    async def ask(self, what: str = "stats") -> dict[str, Any]:
        """Numbers are sums; `last_pulse` is the latest, `late_s` the most."""
        answers = await asyncio.gather(*(asyncio.to_thread(crowd.ask, what) for crowd in self.all))
        found: Counter[str] = Counter()
        for answer in answers:
            found.update({name: value for name, value in answer.items() if isinstance(value, int | float)})
        lists = {
            name: [each for answer in answers for each in answer[name]] for name in ("replies_ms", "errors")
        }
        most = {name: max(answer[name] for answer in answers) for name in ("last_pulse", "late_s")}
        return {**Counter(), **found, **lists, **most}

    async def until(self, condition: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        until = time.monotonic() + WAIT_S
        while True:
            found = await self.ask()
            if condition(found):
                return found
            if time.monotonic() > until:
                found.pop("replies_ms")
                raise Failed(f"not within {WAIT_S:g} s: {what}. The crowd says {found}")
            await asyncio.sleep(0.1)

    def close(self) -> None:
        for crowd in self.all:
            crowd.process.kill()
            crowd.process.communicate()


# -- what the coordinator is asked, and what it wrote ---------------------------------------------------------------


async def send(session: aiohttp.ClientSession, http: str, number: int) -> None:
    asked = {"script": "train.py", "folder": "/", "workers": 1, "cpus": 1, "name": f"job-{number}"}
    async with session.post(f"{http}/api/v1/jobs", json=asked) as answer:
        if answer.status != 201:
            raise Failed(f"job {number} was not taken: {answer.status} {await answer.text()}")
        await answer.read()


async def states(session: aiohttp.ClientSession, http: str) -> Counter[str]:
    async with session.get(f"{http}/api/v1/jobs?newest=10000") as answer:
        answer.raise_for_status()
        return Counter(job["state"] for job in (await answer.json())["jobs"])


def journal(folder: Path) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Kind, time and fields of all that the cluster's journal holds."""
    for _, body in records.read(folder / "state" / "history", folder / "state"):
        yield msgspec.msgpack.decode(body, type=tuple[str, float, dict[str, Any]])


def decided_ms(folder: Path) -> dict[str, float]:
    """From a job's submission to the decision to start it."""
    submitted: dict[str, float] = {}
    found: dict[str, float] = {}
    for kind, at, fields in journal(folder):
        if kind == "event.Submitted":
            submitted[fields["request"]["job"]] = at
        elif kind == "event.Started" and fields["job"] not in found:
            found[fields["job"]] = 1e3 * (at - submitted[fields["job"]])
    return found


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else float("nan")


# -- the parts -------------------------------------------------------------------------------------------------------


class Run:
    """One run: each part leaves its figures in `report`."""

    def __init__(self, folder: Path, jobs: int, idle_s: float, policy: str) -> None:
        self.folder = folder
        self.jobs = jobs
        self.steady = max(10, min(STEADY, 2 * jobs // 5))
        self.idle_s = idle_s
        self.report: dict[str, Any] = {}
        self.coordinator = Coordinator(folder, policy)
        self.crowds: Crowds | None = None
        self.session: aiohttp.ClientSession | None = None

    async def all(self) -> dict[str, Any]:
        coordinator = self.coordinator
        self.report["start_s"] = await coordinator.start()
        nodes = -(-(self.jobs + CPUS) // CPUS)
        self.crowds = Crowds(coordinator.address, nodes)
        self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONNECTIONS))
        try:
            await self.crowds.until(lambda found: found["nodes"] == nodes, "all nodes are taken")
            self.report["nodes"] = nodes
            self.report["empty"] = {"files": coordinator.files(), "rss_mb": coordinator.rss_mb()}
            parts: list[tuple[str, Callable[[], Awaitable[dict[str, Any]]]]] = [
                ("submit", self.submit),
                ("steady", self.steadily),
                ("idle", self.idle),
                ("recovery", self.recover),
                ("after", self.idle),
                ("end", self.end),
            ]
            for name, part in parts:
                click.echo(f"{name} ...", err=True)
                self.report[name] = await part()
        except Failed:
            click.echo(f"So far: {json.dumps(self.report, indent=1)}", err=True)
            raise
        finally:
            await self.session.close()
            self.crowds.close()
            if coordinator.process is not None and coordinator.process.poll() is None:
                coordinator.process.kill()
                coordinator.process.wait()
        return self.report

    async def until_running(self, jobs: int) -> float:
        """When the last of so many jobs was RUNNING, as HTTP says; asked seldom, for the answer is long."""
        assert self.session is not None and self.crowds is not None
        await self.crowds.until(lambda found: found["launched"] == jobs, f"{jobs} workers are told to begin")
        until = time.monotonic() + WAIT_S
        while (found := await states(self.session, self.coordinator.http))["RUNNING"] != jobs:
            if time.monotonic() > until:
                raise Failed(f"not all jobs run: {dict(found)}")
            await asyncio.sleep(0.1)
        return time.monotonic()

    async def submit(self) -> dict[str, Any]:
        assert self.session is not None
        session, coordinator = self.session, self.coordinator
        count = self.jobs - self.steady
        numbers = iter(range(count))
        cpu, begin = coordinator.cpu_s(), time.monotonic()

        async def sender() -> None:
            for number in numbers:
                await send(session, coordinator.http, number)

        await asyncio.gather(*(sender() for _ in range(CONNECTIONS)))
        taken_s = time.monotonic() - begin
        taken_cpu_s = coordinator.cpu_s() - cpu
        running_s = await self.until_running(count) - begin
        return {
            "jobs": count,
            "per_s": count / taken_s,
            "cpu_s": taken_cpu_s,
            "all_running_s": running_s,
            "all_running_cpu_s": coordinator.cpu_s() - cpu,
        }

    async def steadily(self) -> dict[str, Any]:
        assert self.session is not None
        await asyncio.sleep(1.0)  # whatever the former part has left to do
        await self.coordinator.figures()
        begin = time.monotonic()
        sent: list[asyncio.Task[None]] = []
        for number in range(self.steady):
            await asyncio.sleep(max(0.0, begin + number / STEADY_PER_S - time.monotonic()))
            sent.append(asyncio.ensure_future(send(self.session, self.coordinator.http, number)))
        await asyncio.gather(*sent)
        await self.until_running(self.jobs)
        rounds = await self.coordinator.figures()
        by_job = decided_ms(self.folder)
        mine = [by_job[f"j{number + 1}"] for number in range(self.jobs - self.steady, self.jobs)]
        return {
            "jobs": self.steady,
            "per_s": STEADY_PER_S,
            "decision_p50_ms": quantile(mine, 0.5),
            "decision_p99_ms": quantile(mine, 0.99),
            "decision_most_ms": max(mine),
            "rounds": rounds["rounds"],
            "round_p50_ms": rounds["round_p50_ms"],
            "round_p99_ms": rounds["round_p99_ms"],
            "round_most_ms": rounds["round_most_ms"],
            "held_most_ms": rounds["held_most_ms"],
        }

    async def idle(self) -> dict[str, Any]:
        assert self.crowds is not None
        await asyncio.sleep(2.0)
        coordinator = self.coordinator
        before, cpu, begin = await self.crowds.ask(), coordinator.cpu_s(), time.monotonic()
        await asyncio.sleep(self.idle_s)
        after, cpu_s, took = await self.crowds.ask(), coordinator.cpu_s() - cpu, time.monotonic() - begin
        beats = after["beats"] - before["beats"]
        own, attempts = coordinator.journal_mb()
        return {
            "heartbeats_per_s": beats / took,
            "answered_per_s": (after["pulses"] - before["pulses"]) / took,
            "core": cpu_s / took,
            "us_per_heartbeat": 1e6 * cpu_s / beats,
            "reply_p50_ms": quantile(after["replies_ms"], 0.5),
            "reply_p99_ms": quantile(after["replies_ms"], 0.99),
            "rss_mb": coordinator.rss_mb(),
            "peak_mb": coordinator.peak_mb(),
            "files": coordinator.files(),
            "threads": coordinator.threads(),
            "journal_mb": own,
            "attempts_journals_mb": attempts,
            "crowd_core": (after["cpu_s"] - before["cpu_s"]) / took,
        }

    async def recover(self) -> dict[str, Any]:
        assert self.crowds is not None and self.session is not None
        members = 2 * self.jobs
        os.kill(self.coordinator.pid, signal.SIGKILL)
        assert self.coordinator.process is not None
        self.coordinator.process.wait()
        await self.crowds.ask("again")
        begin, before = time.monotonic(), self.coordinator.logged()
        listens_s = await self.coordinator.start()
        await self.coordinator.says("attempts are back", before)
        recovered_s = time.monotonic() - begin
        found = await self.crowds.until(lambda found: found["heard"] == members, "all members are heard")
        await self.crowds.until(lambda found: found["nodes"] == self.report["nodes"], "all nodes are back")
        nodes_s, cpu_s = time.monotonic() - begin, self.coordinator.cpu_s()
        await asyncio.sleep(5.0)  # whoever was given up would be by now
        counted = await states(self.session, self.coordinator.http)
        restarts = sum(kind == "event.Started" for kind, _, _ in journal(self.folder)) - self.jobs
        return {
            "listens_s": listens_s,
            "recovered_s": recovered_s,
            "all_heard_s": found["last_pulse"] - begin,
            "all_nodes_back_s": nodes_s,
            "cpu_s": cpu_s,
            "running": counted["RUNNING"],
            "attempts_restarted": restarts,
            "wrong": found.get("wrong", 0),
        }

    async def end(self) -> dict[str, Any]:
        assert self.crowds is not None and self.session is not None
        coordinator = self.coordinator
        begin = time.monotonic()
        await self.crowds.ask("end")
        found = await self.crowds.until(
            lambda found: found["members"] == 0 and found["unanswered"] == 0, "everybody has left"
        )
        took = time.monotonic() - begin
        until = time.monotonic() + END_S
        while (counted := await states(self.session, coordinator.http)).total() != counted["SUCCEEDED"]:
            if time.monotonic() > until:
                raise Failed(f"not all jobs are over: {dict(counted)}")
            await asyncio.sleep(0.1)
        figures: dict[str, Any] = {}
        while time.monotonic() < until:
            figures = await coordinator.figures()
            if not figures["attempts"] and figures["tasks"] <= 20:
                break
            await asyncio.sleep(0.5)
        await self.session.close()
        while (more := coordinator.files() - self.report["empty"]["files"]) > 0 and time.monotonic() < until:
            await asyncio.sleep(0.1)
        rss_mb = coordinator.rss_mb()
        parts = [
            str(path.relative_to(self.folder))
            for path in self.folder.rglob("*")
            if path.suffix in (".part", ".tmp") or path.name.startswith(".")
        ]
        lost = sorted(
            job.name for job in (self.folder / "jobs").iterdir() if not (job / "1" / "status.json").exists()
        )
        assert coordinator.process is not None
        coordinator.process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(coordinator.process.wait, 30)
        return {
            "took_s": took,
            "succeeded": counted["SUCCEEDED"],
            "lost": self.jobs - counted["SUCCEEDED"],
            "without_status": len(lost),
            "attempts": figures["attempts"],
            "tasks": figures["tasks"],
            "files_left": more,
            "rss_mb": rss_mb,
            "half_written": parts,
            "exit_code": code,
            "wrong": found.get("wrong", 0),
            "errors": found["errors"][:5],
        }


# -- the report -------------------------------------------------------------------------------------------------------


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    submit, steady, idle = report["submit"], report["steady"], report["idle"]
    recovery, end, jobs = report["recovery"], report["end"], report["jobs"]

    def judge(what: str, value: float, wanted: float, *, least: bool = False) -> None:
        met = value >= wanted if least else value <= wanted
        found.append({"what": what, "value": value, "wanted": wanted, "least": least, "met": met})

    judge("submissions per second", submit["per_s"], 100, least=True)
    judge("decision p99, ms", steady["decision_p99_ms"], 50)
    judge(f"a round over {jobs:,} jobs, the longest, s", steady["round_most_ms"] / 1e3, 1)
    judge("heartbeats answered per second", idle["answered_per_s"], 1000, least=True)
    judge("CPU with all jobs running, cores", idle["core"], 1)
    judge("memory, the most, MB", max(idle["peak_mb"], report["after"]["peak_mb"]), 1024)
    judge("restart until every job goes on from its journal, s", recovery["recovered_s"], 5)
    judge("restart until every member is heard again, s", recovery["all_heard_s"], 5)
    judge("attempts started again by it", recovery["attempts_restarted"], 0)
    judge("jobs lost", end["lost"] + (jobs - recovery["running"]), 0)
    left = end["attempts"] + len(end["half_written"]) + max(0, end["files_left"])
    judge("attempts, files and half-written files left", left, 0)
    return found


def tables(report: dict[str, Any]) -> str:
    lines = []
    for part in ("submit", "steady", "idle", "recovery", "after", "end"):
        title = "idle, after the recovery" if part == "after" else part
        lines.append(title)
        for name, value in report[part].items():
            shown = f"{value:,.2f}" if isinstance(value, float) else str(value)
            lines.append(f"    {name:24}{shown:>14}")
    lines.append("")
    lines.append(f"{'target':54}{'wanted':>10}{'found':>12}")
    for each in targets(report):
        wanted = f"{'>=' if each['least'] else '<='} {each['wanted']:g}"
        verdict = "met" if each["met"] else "MISSED"
        lines.append(f"{each['what']:54}{wanted:>10}{each['value']:12,.2f}  {verdict}")
    return "\n".join(lines)


def loop_ms() -> float:
    """How long Python takes for a million additions now: others may have the same cores."""
    begin, total = time.perf_counter(), 0
    for number in range(1_000_000):
        total += number
    return 1e3 * (time.perf_counter() - begin)


def enough_files(jobs: int) -> None:
    """Raises Failed where the system lets no process have as many open files as this takes."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = 3 * jobs + jobs // CPUS + 200  # two connections, a journal
    if hard < needed:
        raise Failed(f"{jobs:,} jobs take {needed:,} open files in one process, and {hard:,} are allowed")


@click.command(help=__doc__.split("\n")[0])
@click.option("--jobs", default=1000, show_default=True, type=click.IntRange(20, 10_000))
@click.option("--idle-s", default=10.0, show_default=True, help="How long heartbeats are counted.")
@click.option("--policy", default="las", show_default=True)
@click.option(
    "--json", "into", type=click.Path(dir_okay=False, path_type=Path), help="Write the report there."
)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Keep the cluster's files in this new folder."
)
def main(jobs: int, idle_s: float, policy: str, into: Path | None, folder: Path | None) -> None:
    quiet()
    enough_files(jobs)
    scratch = Path(tempfile.mkdtemp(prefix="zml-jobs-"))
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    begin, before_ms = time.monotonic(), loop_ms()
    try:
        report = asyncio.run(Run(folder or scratch / "cluster", jobs, idle_s, policy).all())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    report |= {
        "jobs": jobs,
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "load_per_core_before": round(load, 2),
        "million_additions_ms": [round(before_ms, 1), round(loop_ms(), 1)],
        "took_s": time.monotonic() - begin,
    }
    report["targets"] = targets(report)
    click.echo(f"{jobs:,} jobs, {report['nodes']} nodes, {report['cores']} cores, {report['took_s']:.0f} s")
    first_ms, last_ms = report["million_additions_ms"]
    click.echo(f"load per core before: {report['load_per_core_before']}")
    click.echo(f"a million additions before and after: {first_ms} ms, {last_ms} ms\n\n" + tables(report))
    if into is not None:
        into.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
