"""How long things take in an allocation of Slurm: from sbatch to the first step, from SIGTERM to the next one after a
requeue, and from the death of a node until training goes on.

    python bench/slurm.py           as root, with Debian's slurmctld, slurmd, slurm-client and munge; four minutes
    python bench/slurm.py --rounds 3

It starts a Slurm of its own with four virtual nodes on this machine, and trains a model of five numbers with two
workers and a shard, so that what is measured is zml, Slurm and the start of processes that load torch. A script
writes down the time of each of its steps. Slurm notices a dead node here after 5 to 15 s and holds a requeued job for
5 s; by default that is 300 s and 120 s. zml waits for the first of them nowhere, and for the second always.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import checkout  # noqa: F401
import click

from tests.slurm.cluster import Slurm, lacking, slurm

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import json, os, time
import torch, zml
from torch.utils.data import DataLoader, TensorDataset
model = torch.nn.Linear(4, 1)
opt = torch.optim.SGD(model.parameters(), lr=0.01)
data = TensorDataset(torch.randn(480, 4), torch.randn(480, 1))
train = zml.join(model, opt, DataLoader(data, batch_size=8, shuffle=True))
out = open(f"steps-{os.environ['SLURM_JOB_ID']}-{json.loads(os.environ['ZML_SEAT'])['worker']}", "a", buffering=1)
for epoch in zml.epochs(400):
    for x, y in train:
        loss = torch.nn.functional.mse_loss(model(x), y)
        opt.zero_grad(); loss.backward(); opt.step()
        out.write(f"{time.time()}\\n")
        time.sleep(0.02)
"""
WAIT_S = 120.0


class Bench:
    def __init__(self, cluster: Slurm, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        (folder / "train.py").write_text(SCRIPT)
        self.environment = {**cluster.environment, "PYTHONPATH": str(ROOT)}

    def submit(self, nodes: int) -> str:
        words = [
            "-N",
            str(nodes),
            "-w",
            "2",
            "--mem-per-worker",
            "1G",
            "--mem-per-shard",
            "1G",
            "--time",
            "60",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "zml", "slurm", "submit", *words, "train.py"],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()[1]

    def steps(self, job: str) -> list[float]:
        """When steps were made, by any worker."""
        lines = [
            line for file in self.folder.glob(f"steps-{job}-*") for line in file.read_text().split("\n")[:-1]
        ]
        return sorted(map(float, lines))

    def until(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + WAIT_S
        while not condition():
            if time.monotonic() > end:
                raise click.ClickException(f"{what}: not within {WAIT_S:g} s; see {self.folder}")
            time.sleep(0.1)

    def step_after(self, job: str, at: float) -> float:
        """Seconds from `at` to the first step after it."""
        self.until(lambda: [step for step in self.steps(job) if step > at], "a step")
        return min(step for step in self.steps(job) if step > at) - at

    def end(self, job: str) -> None:
        self.cluster.command("scancel", job)
        self.until(lambda: not self.cluster.jobs(), "the job ends")

    # -- what is measured ----------------------------------------------------------------------------------

    def requeue(self, job: str) -> tuple[float, float, float]:
        """From SIGTERM to the last step and to the first one after it; and of that what Slurm held the job."""
        told = time.time()
        self.cluster.command("scancel", "--signal=TERM", job)
        attempt = self.folder / "runs" / f"slurm-{job}" / "attempt-1" / "config.json"
        self.until(attempt.exists, "the next attempt")
        began = json.loads(attempt.read_text())["started_at"]
        resumed = began + self.step_after(job, began)
        last = max(step for step in self.steps(job) if step < began)
        return last - told, resumed - told, began - last

    def node_dies(self, job: str, node: str, for_s: float = 10.0) -> float:
        """The longest pause of all workers from then until they have trained on for a while."""
        at = time.time()
        self.cluster.kill_node(node)
        time.sleep(2.0)
        resumed = time.time() + self.step_after(job, time.time())
        time.sleep(for_s)
        steps = [step for step in self.steps(job) if at - 1.0 < step < resumed + for_s]
        pauses = [later - earlier for earlier, later in pairwise(steps)]
        self.cluster.until(lambda: node not in self.cluster.usable(), f"{node} is down")
        self.cluster.start_node(node)
        self.cluster.until(lambda: node in self.cluster.usable(), f"{node} is up")
        return max(pauses)


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=1)
def main(rounds: int) -> None:
    if missing := lacking():
        raise click.ClickException(missing)
    found: dict[str, list[float]] = {}

    def note(what: str, seconds: float) -> None:
        found.setdefault(what, []).append(seconds)
        click.echo(f"{what}: {seconds:.1f} s")

    with slurm() as cluster, tempfile.TemporaryDirectory() as name:
        bench = Bench(cluster, Path(name))
        for _ in range(rounds):
            at = time.time()
            job = bench.submit(2)
            note("from sbatch to the first step", bench.step_after(job, at))
            time.sleep(2)
            last, resumed, held = bench.requeue(job)
            note("from SIGTERM to the last step before the checkpoint", last)
            note("from SIGTERM to the first step after the requeue", resumed)
            note("  of that, from the last step until Slurm runs the job again", held)
            bench.end(job)
            for whose, node in (("a worker", "n3"), ("the shard", "n2")):
                job = bench.submit(4)
                bench.step_after(job, 0.0)
                time.sleep(2)
                note(f"pause of all when the node of {whose} dies", bench.node_dies(job, node))
                bench.end(job)
    click.echo(f"\n{rounds} round(s), load {os.getloadavg()[0]:.1f}; medians")
    for what, values in found.items():
        click.echo(f"{what}: {statistics.median(values):.1f} s")


if __name__ == "__main__":
    main()
