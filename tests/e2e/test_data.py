"""Bad batches and evaluations with real processes."""

import json
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Playground
from tests.soaking import soak

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]

SCRIPT = """
import json, os, sys, time
import torch, torch.nn.functional as F
import zml
from torch.utils.data import DataLoader, Dataset

trouble, bad = sys.argv[1], int(sys.argv[2])
me = json.loads(os.environ.get("ZML_SEAT", "{}")).get("worker", "alone")

class Points(Dataset):
    def __len__(self):
        return 192
    def __getitem__(self, index):
        x = torch.randn(16, generator=torch.Generator().manual_seed(index))
        if index == bad and training:
            if trouble == "crash":
                os.kill(os.getpid(), 11)
            if trouble == "raise":
                raise ValueError(f"sample {index} is odd")
            if trouble == "nan":
                x = x * float("nan")
        return x, int(x.sum() > 0) if x.isfinite().all() else 0

training = True
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
train = zml.join(model, opt, DataLoader(Points(), batch_size=8, shuffle=True))
valid = DataLoader(Points(), batch_size=8)

@torch.no_grad()
def score(batch):
    x, y = batch
    if trouble == "evaluate":
        print("evaluating", flush=True)
        time.sleep(0.1)
    out = model(x)
    return {"loss": F.cross_entropy(out, y, reduction="sum"), "right": (out.argmax(1) == y).sum(), "n": len(x)}

for epoch in zml.epochs(2):
    for x, y in train:
        loss = F.cross_entropy(model(x), y)
        opt.zero_grad(); loss.backward(); opt.step()
    training = False
    found = zml.evaluate(score, valid)
    if trouble == "nan":  # every worker holds the same parameters: it would find the same by itself
        from zml.worker.evaluation import alone
        assert alone(score, valid) == found
    print("totals", epoch, json.dumps(found), flush=True)
    training = True
"""


def write(place: Playground) -> None:
    (place.folder / "points.py").write_text(SCRIPT)


def totals(place: Playground, worker: str) -> list[dict[str, float]]:
    found = [line for line in place.script_lines(worker).splitlines() if line.startswith("totals")]
    return [json.loads(line.split(maxsplit=2)[2]) for line in found]


def events(place: Playground) -> list[dict[str, Any]]:
    log = next(Path(place.run_dir(), "logs").glob("coordinator*.jsonl"), None)
    assert log is not None, list(Path(place.run_dir(), "logs").iterdir())
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_a_batch_that_crashes_two_scripts_stops_the_job_and_its_samples_are_named(place: Playground) -> None:
    write(place)
    code, text = place.run("run", "-w", "3", "-p", "1", "points.py", "crash", "37")
    words = " ".join(text.replace("│", " ").split())
    assert code == 5, text
    assert "ZML-E303" in words and "--on-bad-batch skip" in words, text
    named = re.search(r"batch \d+ of epoch 1 \(samples ([\d, ]+)\) was in hand when 2 scripts", words)
    assert named is not None, text
    assert "37" in named[1].split(", ") and len(named[1].split(", ")) == 8


@pytest.mark.parametrize("trouble", [*soak(["raise"]), "nan"])
def test_an_exception_names_the_samples_that_were_in_hand(place: Playground, trouble: str) -> None:
    write(place)
    code, text = place.run("run", "-w", "2", "-p", "1", "points.py", trouble, "37")
    words = " ".join(text.replace("│", " ").split())
    assert code == 1, text
    named = re.search(r"in hand: batch \d+ \(samples ([\d, ]+)\) of epoch 1", words)
    assert named is not None and "37" in named[1].split(", "), text


@pytest.mark.soak
@pytest.mark.parametrize("trouble", ["crash", "raise"])
def test_a_batch_that_crashes_two_scripts_is_skipped_where_the_user_said_so(
    place: Playground, trouble: str
) -> None:
    write(place)
    # Both epochs have the bad sample: two workers are lost in each.
    code, text = place.run("run", "-w", "5", "-p", "1", "--on-bad-batch", "skip", "points.py", trouble, "37")
    assert code == 0, text
    skipped = [event for event in events(place) if event["message"] == "batch skipped"]
    assert [event["epoch"] for event in skipped] == [0, 1]
    assert all(37 in event["samples"] and len(event["samples"]) == 8 for event in skipped)


@pytest.mark.soak
@pytest.mark.parametrize(
    "how",
    [[], ["--compress", "topk:10%"], ["--staleness", "2"]],
    ids=["sync", "topk", "ssp"],
)
def test_a_batch_without_a_finite_gradient_is_skipped_where_the_user_said_so(
    place: Playground, how: list[str]
) -> None:
    write(place)
    code, text = place.run(
        "run", "-w", "2", "-p", "1", *how, "--on-bad-batch", "skip", "points.py", "nan", "37"
    )
    assert code == 0, text
    skipped = [event for event in events(place) if event["message"] == "batch skipped"]
    assert [event["epoch"] for event in skipped] == [0, 1] and all(
        37 in event["samples"] for event in skipped
    )
    assert "is not finite" in skipped[0]["because"]
    assert all(math.isfinite(found["loss"]) for found in totals(place, "w0")), "the model stayed finite"


def test_every_worker_gets_the_same_totals_of_every_sample_though_one_dies_in_the_middle(
    place: Playground,
) -> None:
    write(place)
    run = place.start("run", "-w", "3", "-p", "1", "points.py", "evaluate", "0")
    place.until(lambda: "evaluating" in place.script_lines("w1"), "w1 evaluates")
    (agent,) = place.pids("worker", "--name w1")
    os.kill(agent, signal.SIGKILL)
    assert run.wait() == 0, run.text
    assert totals(place, "w0") == totals(place, "w2")
    assert [found["n"] for found in totals(place, "w0")] == [192.0, 192.0]
    assert "w1 ended by SIGKILL; starting it again" in run.text
    assert totals(place, "w1") in ([], totals(place, "w0")[1:]), (
        "it died in the first; the next has the second"
    )
