"""How many jobs can be submitted over HTTP? The server and the client in front of a desk that only remembers.

    python bench/api.py             about 20 seconds
    python bench/api.py --json

Server and clients are processes of their own, on one machine. Submissions on one connection that stays open, one after
the other; on 16 that are used at once; and by zml's own client, which is what `zml submit` uses. Beside them, what a
question costs: a list of 1,000 jobs, and one long poll that 256 connections hold while others ask. What the desk does
itself, scheduling and writing to disk, is not in it: `bench/jobs.py` has that.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import click

URL_LINE = "listening on "
JOB = {"script": "train.py", "args": ["--lr", "0.1"], "folder": "/shared/code", "workers": "1..4", "gpus": 1}


def server() -> None:
    """Serve until standard input ends; the first line printed says where."""
    import uvloop

    from tests.zml.web.desk import FakeDesk
    from zml.web.server import serve

    async def main() -> None:
        with tempfile.TemporaryDirectory() as folder:
            serving = await serve(FakeDesk(Path(folder)), "127.0.0.1:0")
            print(URL_LINE + serving.url, flush=True)
            await asyncio.to_thread(sys.stdin.read)
            print(time.process_time(), flush=True)
            await serving.stop()

    uvloop.run(main())


async def submissions(url: str, connections: int, seconds: float) -> dict[str, Any]:
    import aiohttp

    times: list[float] = []
    until = time.perf_counter() + seconds

    async def one(session: aiohttp.ClientSession) -> None:
        while (begun := time.perf_counter()) < until:
            async with session.post(f"{url}/api/v1/jobs", json=JOB) as response:
                await response.read()
                assert response.status == 201, response.status
            times.append(time.perf_counter() - begun)

    connector = aiohttp.TCPConnector(limit=connections)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(one(session) for _ in range(connections)))
    return figures(times, seconds)


def by_client(url: str, seconds: float) -> dict[str, Any]:
    from zml.cluster.client import Client
    from zml.cluster.jobs import Submission

    client, submission, times = Client(url, user="bench"), Submission(**JOB), []  # type: ignore[arg-type]
    until = time.perf_counter() + seconds
    while (begun := time.perf_counter()) < until:
        client.submit(submission)
        times.append(time.perf_counter() - begun)
    client.close()
    return figures(times, seconds)


async def lists(url: str, seconds: float) -> dict[str, Any]:
    """1,000 jobs at a time, while 256 connections wait for a job to change."""
    import aiohttp

    times: list[float] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=300)) as session:
        for _ in range(1_000):
            async with session.post(f"{url}/api/v1/jobs", json=JOB) as response:
                assert response.status == 201
        waiting = [asyncio.create_task(session.get(f"{url}/api/v1/jobs/j1?wait=60")) for _ in range(256)]
        until = time.perf_counter() + seconds
        while (begun := time.perf_counter()) < until:
            async with session.get(f"{url}/api/v1/jobs?newest=1000") as response:
                await response.read()
            times.append(time.perf_counter() - begun)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    return figures(times, seconds)


def figures(times: list[float], seconds: float) -> dict[str, Any]:
    ordered = sorted(times)
    return {
        "per_s": len(times) / seconds,
        "p50_ms": 1e3 * statistics.median(ordered),
        "p99_ms": 1e3 * ordered[int(0.99 * (len(ordered) - 1))],
    }


@click.command()
@click.option("--seconds", default=4.0, help="For each.")
@click.option("--json", "as_json", is_flag=True)
def main(seconds: float, as_json: bool) -> None:
    found: dict[str, dict[str, Any]] = {}
    ways = {
        "1,000 jobs, 256 waiting": lambda url: asyncio.run(lists(url, seconds)),
        "submit, 1 connection": lambda url: asyncio.run(submissions(url, 1, seconds)),
        "submit, 16 connections": lambda url: asyncio.run(submissions(url, 16, seconds)),
        "submit, zml's client": lambda url: by_client(url, seconds),
    }
    with subprocess.Popen(
        [sys.executable, __file__, "server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as serving:
        assert serving.stdout is not None and serving.stdin is not None
        url = serving.stdout.readline().removeprefix(URL_LINE).strip()
        for name, way in ways.items():
            found[name] = way(url)
        serving.stdin.close()
        cpu_s = float(serving.stdout.readline())
    if as_json:
        print(json.dumps(found | {"server": {"cpu_s": cpu_s}}, indent=2))
        return
    print(f"{'':<24} {'per s':>8} {'p50':>9} {'p99':>9}")
    for name, each in found.items():
        print(f"{name:<24} {each['per_s']:>8,.0f} {each['p50_ms']:>6.2f} ms {each['p99_ms']:>6.2f} ms")
    print(f"the server took {cpu_s:.1f} CPU seconds in all")


if __name__ == "__main__":
    server() if sys.argv[1:] == ["server"] else main()
