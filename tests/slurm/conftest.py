"""One Slurm for all tests of this folder, and a folder for each test with a script to train.

The script fits a line whose slope it is told: that the saved model is the trained one, its numbers say.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Slurm, lacking, slurm
from tests.uncompiled import PYTHONPATH

SCRIPT = """
import argparse, os, time
import torch
import zml
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--pause", type=float, default=0.0)
parser.add_argument("--fail", action="store_true")
a = parser.parse_args()
torch.manual_seed(1)
x = torch.randn(240, 4)
y = x @ torch.tensor([[1.0], [-2.0], [3.0], [0.5]])
model = torch.nn.Linear(4, 1, bias=False)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
train = zml.join(model, opt, DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True))
print("gpu", os.environ.get("CUDA_VISIBLE_DEVICES", "none"), "on", os.environ["SLURMD_NODENAME"], flush=True)
for epoch in zml.epochs(a.epochs):
    for bx, by in train:
        loss = torch.nn.functional.mse_loss(model(bx), by)
        opt.zero_grad(); loss.backward(); opt.step()
        zml.log(loss=loss)
        time.sleep(a.pause)
        if a.fail and epoch:
            raise ValueError("as asked")
    print(f"epoch {epoch} done", flush=True)
name = os.environ.get("SLURM_ARRAY_TASK_ID", "")
zml.save(f"model{name}.safetensors")
"""
ENOUGH = 0.05  # the line is fitted when its slopes are that close
SMALL = ("--mem-per-worker", "1G", "--mem-per-shard", "1G", "--cpus-per-worker", "1", "--time", "30")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = lacking()
    for item in items:
        if item.get_closest_marker("slurm") and missing:
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Slurm]:
    with slurm() as found:
        yield found


class Desk:
    """A user's folder on this cluster."""

    def __init__(self, cluster: Slurm, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        (folder / "train.py").write_text(SCRIPT)
        self.submitted: list[str] = []

    def zml(self, *words: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "zml", *words],
            cwd=self.folder,
            env={**self.cluster.environment, "PYTHONPATH": PYTHONPATH, "NO_COLOR": "1", **env},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def submit(self, *words: str) -> str:
        """The id of the new job."""
        text = self.zml("slurm", "submit", *words).stdout
        job = text.split()[1]
        self.submitted.append(job)
        return job

    def log(self, job: str, task: str = "") -> str:
        found = self.folder / (f"train-{job}_{task}.out" if task else f"train-{job}.out")
        return found.read_text(errors="replace") if found.exists() else ""

    def script_lines(self, job: str, member: str) -> str:
        file = self.run(job) / "now/logs" / f"{member}.out"
        return file.read_text(errors="replace") if file.exists() else ""

    def run(self, job: str) -> Path:
        """The job's folder."""
        return self.folder / "runs" / f"slurm-{job}"

    def status(self, job: str, attempt: int = 0) -> dict[str, Any]:
        file = self.run(job) / f"attempt-{attempt}" / "status.json"
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return found

    def until(self, condition: Any, what: str, job: str, seconds: float = 90.0) -> Any:
        try:
            return self.cluster.until(condition, what, seconds)
        except AssertionError as error:
            logs = "\n".join(
                f"--- {file}\n{file.read_text(errors='replace')[-2000:]}"
                for file in sorted(self.run(job).rglob("logs/*.log"))
            )
            raise AssertionError(f"{error}\n--- log of {job}\n{self.log(job)}\n{logs}") from None

    def until_said(self, words: str, job: str, times: int = 1, seconds: float = 90.0) -> None:
        self.until(lambda: self.log(job).count(words) >= times, f"{words!r} in the log", job, seconds)

    def until_state(self, state: str, job: str, seconds: float = 90.0) -> None:
        self.until(lambda: self.cluster.state(job) == state, f"job {job} is {state}", job, seconds)

    def model_error(self, task: str = "") -> float:
        """How far the saved model is from the line that it was to fit."""
        import torch
        from safetensors.torch import load_file

        weights = load_file(self.folder / f"model{task}.safetensors")["weight"]
        return float((weights - torch.tensor([[1.0, -2.0, 3.0, 0.5]])).abs().max())

    def clean_up(self) -> None:
        for job in {*self.submitted, *self.cluster.jobs()}:
            self.cluster.command("scancel", "--quiet", job, check=False)
        self.cluster.until(lambda: not self.cluster.jobs(), "all jobs have ended", 40.0)


@pytest.fixture
def desk(cluster: Slurm, tmp_path: Path) -> Iterator[Desk]:
    for node in cluster.nodes:  # a test may have killed one
        if cluster.daemons[node].poll() is not None:
            cluster.start_node(node)
    cluster.until(lambda: len(cluster.usable()) == len(cluster.nodes), "all nodes are up")
    found = Desk(cluster, tmp_path.resolve())
    yield found
    found.clean_up()
    cluster.until(lambda: not cluster.tasks(), "no process of a job is left", 20.0)
