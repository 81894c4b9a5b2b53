"""The coordinator is killed: training goes on without it, another takes its place, and the job ends as it should."""

import json
import os
import shutil
import signal
from typing import Any

import pytest

from tests.e2e.harness import Playground, same_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


def listening(place: Playground) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place.run_dir() / "coordinator.json").read_text())
    return found


def steps(place: Playground, worker: str) -> int:
    """That its timeline shows; it is written every half second."""
    path = place.run_dir() / "timeline" / f"{worker}.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def just_took(place: Playground, worker: str) -> bool:
    """Batches are taken 16 at a time: has it many of them left?"""
    return steps(place, worker) >= 16 and 1 <= steps(place, worker) % 16 <= 6


def test_nothing_is_lost_when_the_coordinator_is_killed(place: Playground) -> None:
    args = ["--epochs", "2", "--samples", "640", "--keep", "model"]
    code, text = place.run("run", "-w", "2", "-p", "1", "train.py", *args)
    assert code == 0, text
    calm = (place.folder / "model.safetensors").rename(place.folder / "calm")
    shutil.rmtree(place.run_dir())

    run = place.start("run", "-w", "2", "-p", "2", "train.py", *args, "--pause", "0.1")
    place.until(
        lambda: place.pids("ps", "--shard 1") and list(place.folder.glob("runs/*/timeline")), "it begins"
    )
    place.until(lambda: just_took(place, "w0"), "training goes on")
    before, done = listening(place), steps(place, "w0")
    os.kill(before["pid"], signal.SIGKILL)
    place.until(lambda: listening(place)["pid"] != before["pid"], "another coordinator listens")
    assert steps(place, "w0") > done, "it has computed without a coordinator"
    assert run.wait() == 0, run.text
    assert "coordinator ended by SIGKILL; starting it again (1 of 5)" in run.text
    assert "all 2 workers finished" in run.text
    assert listening(place)["addresses"] == before["addresses"]
    assert same_model(calm, place.folder / "model.safetensors")
    assert same_model(calm, place.folder / "model-w1.safetensors")
    status = place.status()
    assert (status["state"], status["exit_code"]) == ("SUCCEEDED", 0)
    assert not place.pids("zml")


@pytest.mark.soak
def test_a_worker_that_is_killed_comes_again(place: Playground) -> None:
    run = place.start("run", "-w", "2", "-p", "1", "train.py", "--epochs", "4", "--pause", "0.05")
    place.until(lambda: "epoch 0 done" in place.script_lines("w1"), "training goes on")
    (agent,) = place.pids("worker", "--name w1")
    os.kill(agent, signal.SIGKILL)
    assert run.wait() == 0, run.text
    assert "w1 ended by SIGKILL; starting it again (1 of 3)" in run.text
    members = {member["member"]: member for member in place.status()["members"]}
    assert (members["w1"]["incarnation"], members["w1"]["state"]) == (2, "done")
    assert not place.pids("zml")


@pytest.mark.soak
def test_by_hand_a_coordinator_is_started_again_with_its_run_directory(place: Playground) -> None:
    bind = ["--bind", "tcp://127.0.0.1:0"]
    first = place.start(
        "coordinator", "-w", "1", "-p", "1", "--run-dir", "r", *bind, "train.py", "--pause", "0.1"
    )
    place.until(lambda: (place.folder / "r" / "coordinator.json").exists(), "the coordinator listens")
    (address,) = json.loads((place.folder / "r" / "coordinator.json").read_text())["addresses"]
    shard = place.start("ps", "--shard", "0", "--coordinator", address)
    worker = place.start("worker", "--cpu", "--coordinator", address)
    place.until(lambda: "epoch 0 done" in worker.text, "training goes on")
    code, text = place.run("coordinator", "--run-dir", "r")
    assert code == 4 and "ZML-E412" in text and f"process {first.process.pid} on" in text
    first.send(signal.SIGKILL)
    first.wait()
    code, text = place.run("coordinator", "--run-dir", "r", "other.py")
    assert code == 2 and "train.py" in text
    second = place.start("coordinator", "--run-dir", "r")
    place.until(lambda: place.live("--coordinator", address).get("state") == "RUNNING", "it goes on")
    assert [p.wait() for p in (second, shard, worker)] == [0, 0, 0], second.text + shard.text + worker.text
    code, text = place.run("coordinator", "--run-dir", "r")
    assert code == 2 and "is over: SUCCEEDED" in text
    assert not place.pids("zml")
