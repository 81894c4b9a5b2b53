"""A standing coordinator asks Slurm for nodes when it has jobs, and lets them go when it has none."""

import json
import signal
import subprocess
import sys
import urllib.request
from typing import Any

import pytest

from tests.slurm.conftest import ENOUGH, Desk
from tests.uncompiled import PYTHONPATH

pytestmark = [pytest.mark.slurm, pytest.mark.soak, pytest.mark.timeout(400)]

POOL = """
backend = "slurm"
most = 2
cpus = 2
memory_mb = 3000
idle_s = 3
[options]
time = "10"
"""


def test_nodes_come_from_slurm_and_go(desk: Desk) -> None:
    (desk.folder / "pool.toml").write_text(POOL)
    here = desk.folder / "cluster" / "cluster.json"
    flags = [
        "--cluster",
        "cluster",
        "--pool",
        "pool.toml",
        "--http",
        "127.0.0.1:0",
        "--bind",
        "tcp://127.0.0.1:0",
    ]
    with (desk.folder / "coordinator.txt").open("wb") as out:
        coordinator = subprocess.Popen(
            [sys.executable, "-m", "zml", "coordinator", *flags],
            cwd=desk.folder,
            env={**desk.cluster.environment, "PYTHONPATH": PYTHONPATH},
            stdout=out,
            stderr=out,
        )
    try:
        desk.cluster.until(here.exists, "the coordinator listens", 60)
        server = json.loads(here.read_text())["http"]

        def jobs() -> list[dict[str, Any]]:
            with urllib.request.urlopen(f"{server}/api/v1/jobs", timeout=20) as answer:
                found: list[dict[str, Any]] = json.load(answer)["jobs"]
            return found

        for _ in range(2):
            asked = ["submit", "--server", server, "train.py", "--workers", "2", "--shards", "1"]
            desk.zml(*asked)
        desk.cluster.until(lambda: len(desk.cluster.jobs()) == 2, "two allocations", 60)
        over = lambda: len(jobs()) == 2 and all(job["ended_at"] for job in jobs())  # noqa: E731
        desk.cluster.until(over, "both jobs are over", 150)
        assert {job["state"] for job in jobs()} == {"SUCCEEDED"}, jobs()
        assert desk.model_error() < ENOUGH
        desk.cluster.until(lambda: not desk.cluster.jobs(), "the allocations are gone", 90)
    finally:
        coordinator.send_signal(signal.SIGINT)
        assert coordinator.wait(30) == 0
