"""A real Prometheus for a test, and what else of a cluster there is for it to see.

It scrapes every second, with what `zml obs export` wrote; only the intervals are other ones.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from zml.metrics.catalog import METRICS, Metric, Role
from zml.metrics.exposition import text
from zml.metrics.points import Classes, Point

WAIT = threading.Event()  # never set
DEADLINE_S = 90.0
# Nothing is wrong with a cluster under test; this one rule lets the panels of alerts have something to show.
FIRES = {"alert": "ZmlTest", "expr": "vector(1)", "labels": {"severity": "warning"}}


class Prometheus:
    """One that runs. Whatever it is asked goes to its HTTP API."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, output: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.output = output

    def get(self, path: str, **params: str) -> Any:
        query = urllib.parse.urlencode(params)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 503:
                    raise ConnectionError("it starts") from None
                raise AssertionError(f"{params}: {json.load(error)['error']}") from None

    def query(self, expr: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("query", query=expr)["result"]
        return found

    def targets(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("targets")["activeTargets"]
        return found

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Polls; what it came to is returned."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                if found := condition():
                    return found
            except OSError:  # it does not listen yet
                pass
            assert self.process.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, (
                f"{what}, after {DEADLINE_S:g} s:\n{self.output.read_text()[-3000:]}"
            )
            WAIT.wait(0.1)


@contextmanager
def prometheus(kit: Path, scratch: Path) -> Iterator[Prometheus]:
    """Runs on the configuration in the folder `kit`, in a hurry."""
    config = yaml.safe_load((kit / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for scrape in config["scrape_configs"]:
        for discovery in scrape["http_sd_configs"]:
            discovery["refresh_interval"] = "1s"
    rules = yaml.safe_load((kit / "rules/zml.yml").read_text())
    rules["groups"].append({"name": "test", "rules": [FIRES]})
    (scratch / "rules").mkdir(parents=True)
    (scratch / "rules/zml.yml").write_text(json.dumps(rules))
    (scratch / "prometheus.yml").write_text(json.dumps(config))
    port = free_port()
    output = scratch / "output.txt"
    command = [
        "prometheus",
        f"--config.file={scratch}/prometheus.yml",
        f"--storage.tsdb.path={scratch}/data",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield Prometheus(process, port, output)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(scratch / "data", ignore_errors=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def promtool(*args: str, given: bytes = b"", folder: Path | None = None) -> str:
    """What it has to say; empty where it is content."""
    ran = subprocess.run(["promtool", *args], input=given, cwd=folder, capture_output=True, timeout=60)
    said = ran.stderr.decode()
    return said if ran.returncode == 0 else f"{said}{ran.stdout.decode()}exit code {ran.returncode}"


# -- a coordinator of many jobs that is not there ------------------------------------------------------------------

VALUES = {
    "state": ("RUNNING",),
    "phase": ("data", "compute", "encode", "wait", "apply", "push", "pull"),
    "level": ("info", "warning", "error"),
    "member_role": ("worker", "shard"),
    "result": ("taken", "failed"),
}
OWN = {"state": {"zml_members": ("active",), "zml_cluster_nodes": ("UP",)}}


def points(role: Role, job_id: str, member: str) -> list[Point]:
    """Every metric of a role, with what a label may be; counters grow."""
    found = []
    for metric in METRICS.values():
        if role in metric.roles:
            found += [Point(metric, labels, value(metric)) for labels in combinations(metric, job_id, member)]
    return found


def combinations(metric: Metric, job_id: str, member: str) -> Sequence[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [()]
    for label in metric.labels:
        known = {"job_id": (job_id,), "worker": (member,), "shard": (member,)}.get(label)
        values = known or OWN.get(label, {}).get(metric.name) or VALUES.get(label, ("one",))
        rows = [(*row, each) for row in rows for each in values]
    return rows


def value(metric: Metric) -> float | Classes:
    now = time.time()
    if metric.kind == "histogram":
        return Classes([int(now) % 1_000_000] * (len(metric.bounds) + 1), now)
    return now if metric.kind == "counter" else 1.0


@contextmanager
def many_jobs(job_id: str, token: str) -> Iterator[str]:
    """A hub, a shard and a worker of one of its jobs, with everything that the catalog has, GPUs and all; they answer
    nobody without the token. Yields the hub's address."""
    roles: dict[str, Role] = {"hub": "hub", "p0": "shard", "w0": "worker"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Authorization") != f"Bearer {token}":
                self.send_error(401)
                return
            _, name, *_ = urllib.parse.urlsplit(self.path).path.split("/")
            if name == "api":
                body, kind = json.dumps(groups).encode(), "application/json"
            else:
                body, kind = text(
                    roles[name], points(roles[name], job_id, name), self.headers.get("Accept", "")
                )
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    here = f"127.0.0.1:{server.server_port}"
    groups = [
        {
            "targets": [here],
            "labels": {
                "role": role,
                "member": name,
                "job_id": "" if role == "hub" else job_id,
                "node": "gpu03",
                "__metrics_path__": f"/{name}/metrics",
            },
        }
        for name, role in roles.items()
    ]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://{here}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
