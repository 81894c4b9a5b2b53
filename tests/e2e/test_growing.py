"""Shards as real processes that join a running job, and are killed later: training goes on with the same bits."""

import json
import os
import signal
from functools import partial

import pytest

from tests.e2e.harness import Playground, Process, same_model
from tests.e2e.test_replicas import free_port, has_gone_on, last_epoch

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

SCRIPT = """
import argparse, time, torch, zml
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int)
parser.add_argument("--pause", type=float, default=0.0)
parser.add_argument("--save", default="model.safetensors")
a = parser.parse_args()
torch.set_num_threads(1)  # the same bits, however many of them a worker may have
torch.manual_seed(0)
model = torch.nn.Linear(600, 600)  # six chunks
opt = torch.optim.Adam(model.parameters(), lr=1e-3)
data = zml.join(model, opt, DataLoader(TensorDataset(torch.randn(32, 600)), batch_size=4))
for epoch in zml.epochs(a.epochs):
    for (x,) in data:
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
        time.sleep(a.pause)
    print("done", flush=True)
zml.save(a.save)
"""


def moved(place: Playground) -> list[dict[str, object]]:
    lines = (place.run_dir() / "logs" / "coordinator.jsonl").read_text().splitlines()
    return [said for said in map(json.loads, lines) if said["message"] == "moved"]


def test_a_shard_that_joins_is_given_its_share_and_is_killed_like_any_other(place: Playground) -> None:
    (place.folder / "train.py").write_text(SCRIPT)
    address, small = f"tcp://127.0.0.1:{free_port()}", {"ZML_BUCKET_CHUNKS": "1"}

    def shard(number: int) -> Process:
        return place.start("ps", "--shard", str(number), "--coordinator", address, **small)

    args = ["--epochs", "14"]
    coordinator = place.start(
        "coordinator", "-w", "2", "-p", "2", "--bind", address, "train.py", *args, "--pause", "0.1", **small
    )
    shards = [shard(0), shard(1)]
    for _ in range(2):
        place.start("worker", "--cpu", "--coordinator", address, **small)
    place.until(lambda: last_epoch(place) > 0, "training goes on")
    shards.append(shard(2))
    place.until(lambda: len(moved(place)) == 2, "it has two of the six")
    place.until(partial(has_gone_on, place, last_epoch(place)), "training goes on with it", 30)
    os.kill(shards[2].process.pid, signal.SIGKILL)
    shards[2].wait()
    shard(2)
    assert coordinator.wait() == 0, coordinator.text
    assert place.status()["shards"] == 3
    calm = place.start("run", "-w", "2", "-p", "1", "train.py", *args, "--save", "calm.safetensors", **small)
    assert calm.wait() == 0, calm.text
    assert same_model(place.folder / "model.safetensors", place.folder / "calm.safetensors")
