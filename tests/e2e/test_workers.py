"""The life of a worker: it leaves in order, comes back when it was killed or frozen, and is not dead while busy."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Playground, Process
from tests.soaking import soak

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


class ByHand:
    """A job whose processes are started one by one, as on several machines."""

    def __init__(self, place: Playground, workers: int, shards: int, *flags: str, script: list[str]) -> None:
        self.place = place
        self.coordinator = place.start(
            *("coordinator", "-w", str(workers), "-p", str(shards), "--bind", "tcp://127.0.0.1:0"),
            *(*flags, "train.py", *script),
        )
        files = lambda: list(place.folder.glob("runs/*/coordinator.json"))  # noqa: E731
        file = place.until(files, "the coordinator listens")[0]
        (self.address,) = json.loads(file.read_text())["addresses"]
        self.run_dir: Path = file.parent
        at = ["--coordinator", self.address, "--run-dir", str(self.run_dir)]
        self.shards = [place.start("ps", "--shard", str(k), *at, name=f"p{k}") for k in range(shards)]
        self.workers = [
            place.start("worker", "--cpu", "--name", f"w{k}", *at, name=f"w{k}") for k in range(workers)
        ]

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "events.jsonl").read_text().splitlines()]

    def log(self, name: str) -> list[dict[str, Any]]:
        """What one process has logged."""
        lines = (self.run_dir / "logs" / f"{name}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def lines(self, worker: int) -> str:
        return self.workers[worker].text

    def until_epoch(self, worker: int, epoch: int) -> None:
        self.place.until(lambda: f"epoch {epoch} done" in self.lines(worker), f"epoch {epoch} is over")

    def script(self, worker: int) -> int:
        """The process id of a worker's script."""
        agent = self.workers[worker].process.pid
        pids = lambda: [p for p in self.place.pids("zml.agent.runner") if parent(p) == agent]  # noqa: E731
        (found,) = self.place.until(pids, f"w{worker} runs its script")
        return int(found)

    def end(self) -> tuple[int, dict[str, Any]]:
        code = self.coordinator.wait()
        return code, self.place.status()


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def states(status: dict[str, Any]) -> dict[str, tuple[str, int]]:
    return {m["member"]: (m["state"], m["incarnation"]) for m in status["members"] if m["role"] == "worker"}


def steps(process: Process) -> int:
    return int(process.text.rpartition("steps ")[2].split()[0])


LONG = ["--epochs", "6", "--pause", "0.03"]


@pytest.mark.parametrize("mode", ["--sync", *soak(["--async"])])
def test_a_worker_that_is_terminated_leaves_in_order_and_nothing_of_it_is_lost(
    place: Playground, mode: str
) -> None:
    job = ByHand(
        place, 3, 1, "--compress", "topk:1%", "--warm-up-steps", "0", mode, script=[*LONG, "--evaluate"]
    )
    job.until_epoch(1, 1)
    job.workers[1].send(signal.SIGTERM)
    assert job.workers[1].wait() == 75, job.lines(1)
    code, status = job.end()
    assert code == 0, job.coordinator.text
    assert [worker.wait() for worker in (job.workers[0], job.workers[2])] == [0, 0]
    assert states(status) == {"w0": ("done", 1), "w1": ("left", 1), "w2": ("done", 1)}
    assert not [event for event in job.events() if event["event"] == "Fence"], "nobody waited for its lease"
    assert sum(map(steps, job.workers)) == 6 * 24, "what it has done is not done again, what it has not is"
    for worker in range(3):  # also the one that leaves in the middle of an epoch, and by itself then
        assert set(re.findall(r"evaluated (\d+)", job.lines(worker))) == {"192"}
        assert job.lines(worker).count("evaluated") == job.lines(worker).count("done")
    left = [line for line in job.log("w1.script") if line["message"] == "left the job"]
    assert [line["steps"] for line in left] == [steps(job.workers[1])]
    assert "model.safetensors" in {path.name for path in place.folder.iterdir()}
    assert not (job.run_dir / "drained.safetensors").exists()


@pytest.mark.soak
def test_a_job_whose_workers_all_leave_is_saved_by_the_last_and_safe_to_run_again(place: Playground) -> None:
    job = ByHand(
        place, 2, 1, "--compress", "topk:1%", "--async", script=["--epochs", "500", "--pause", "0.03"]
    )
    job.until_epoch(0, 0)
    for worker, number in zip(job.workers, (signal.SIGUSR1, signal.SIGINT), strict=True):
        worker.send(number)
    assert [worker.wait() for worker in job.workers] == [75, 130]
    code, status = job.end()
    assert (code, status["state"]) == (75, "CANCELLED"), job.coordinator.text
    assert states(status) == {"w0": ("left", 1), "w1": ("left", 1)}
    assert (job.run_dir / "drained.safetensors").exists()
    assert not (place.folder / "model.safetensors").exists(), "what is half trained does not look finished"
    current = re.findall(r"steps (\d+)", job.lines(0) + job.lines(1))
    assert len(current) == 2, "both scripts came to their own end"


@pytest.mark.soak
def test_a_worker_that_cannot_finish_its_step_is_stopped_after_its_time_or_a_second_signal(
    place: Playground,
) -> None:
    script = ["--epochs", "3", "--pause", "0.05", "--trouble", "hang", "--at", "4", "--on", "w1"]
    job = ByHand(place, 2, 1, "--async", script=script)
    place.until(lambda: "hanging" in job.lines(1), "w1 hangs")
    job.workers[1].send(signal.SIGTERM)
    place.until(lambda: any(e["message"].startswith("asking") for e in job.log("w1")), "w1 is asked to leave")
    job.workers[1].send(signal.SIGTERM)
    assert job.workers[1].wait(20) == 75
    code, status = job.end()
    assert (code, states(status)) == (0, {"w0": ("done", 1), "w1": ("left", 1)}), job.coordinator.text
    assert steps(job.workers[0]) + 4 >= 3 * 24


@pytest.mark.soak
def test_a_script_that_is_terminated_itself_leaves_in_order_too_unless_it_has_a_handler(
    place: Playground,
) -> None:
    job = ByHand(place, 2, 1, "--async", script=LONG)
    job.until_epoch(1, 0)
    os.kill(job.script(1), signal.SIGTERM)
    assert job.workers[1].wait() == 75, job.lines(1)
    code, status = job.end()
    assert (code, states(status)) == (0, {"w0": ("done", 1), "w1": ("left", 1)}), job.coordinator.text
    assert sum(map(steps, job.workers)) == 6 * 24


@pytest.mark.soak
def test_a_script_that_is_killed_is_started_again_and_the_epochs_are_complete(place: Playground) -> None:
    job = ByHand(place, 2, 1, script=LONG)
    job.until_epoch(1, 0)
    os.kill(job.script(1), signal.SIGKILL)
    code, status = job.end()
    assert code == 0, job.coordinator.text
    assert [worker.wait() for worker in job.workers] == [0, 0]
    assert states(status) == {"w0": ("done", 1), "w1": ("done", 2)}
    assert "joined again, as incarnation 2" in {event["what"] for event in status["events"]}
    assert status["epoch"] == 5 and status["epoch_progress"] == 1.0


@pytest.mark.soak
def test_the_only_worker_may_come_back(place: Playground) -> None:
    job = ByHand(place, 1, 1, script=["--epochs", "4", "--pause", "0.03"])
    job.until_epoch(0, 0)
    os.kill(job.script(0), signal.SIGKILL)
    code, status = job.end()
    assert (code, states(status)) == (0, {"w0": ("done", 2)}), job.coordinator.text
    assert "epoch 3 done" in job.lines(0)


@pytest.mark.soak
@pytest.mark.soak
def test_a_script_that_always_dies_ends_its_worker_after_as_many_restarts_as_are_allowed(
    place: Playground,
) -> None:
    trouble = ["--trouble", "kill", "--at", "-1"]
    code, text = place.run("run", "-w", "1", "-p", "1", "--worker-restarts", "2", "train.py", *trouble)
    assert code == 137, text
    assert place.status()["members"][0]["incarnation"] == 3


@pytest.mark.soak
def test_an_exception_ends_the_job_unless_a_restart_is_asked_for(place: Playground) -> None:
    trouble = ["--epochs", "1", "--trouble", "raise once", "--at", "4", "--on", "w0"]
    code, text = place.run("run", "-w", "1", "-p", "1", "--restart-on-error", "train.py", *trouble)
    assert code == 0, text
    assert place.status()["members"][0]["incarnation"] == 2


def freeze(job: ByHand, worker: int, seconds: float) -> None:
    """As a machine that is suspended: agent and script stand still."""
    script, agent = job.script(worker), job.workers[worker].process.pid
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in (script, agent) if number == signal.SIGSTOP else (agent, script):
            os.kill(pid, number)
        if number == signal.SIGSTOP:
            time.sleep(seconds)  # what is tested is that time passes


@pytest.mark.parametrize("mode", ["--sync", *soak(["--async"])])
def test_a_worker_that_is_frozen_for_half_a_lease_keeps_its_place(place: Playground, mode: str) -> None:
    job = ByHand(place, 2, 1, mode, script=LONG)
    for epoch in range(3):
        job.until_epoch(1, epoch)  # and it was heard after the last time
        freeze(job, 1, 0.75)
    code, status = job.end()
    assert (code, states(status)) == (0, {"w0": ("done", 1), "w1": ("done", 1)}), job.coordinator.text
    assert sum(map(steps, job.workers)) == 6 * 24


@pytest.mark.parametrize("mode", ["--sync", *soak(["--async"])])
@pytest.mark.soak
def test_a_worker_that_is_frozen_for_longer_is_fenced_and_comes_back(place: Playground, mode: str) -> None:
    job = ByHand(place, 2, 1, mode, script=["--epochs", "30", "--pause", "0.03"])
    job.until_epoch(1, 0)
    freeze(job, 1, 4.0)
    place.until(lambda: "steps" in job.lines(1), "w1 trains to the end")
    code, status = job.end()
    assert (code, states(status)) == (0, {"w0": ("done", 1), "w1": ("done", 2)}), job.coordinator.text
    (again,) = [line for line in job.log("w1") if line["message"] == "joining again"]
    assert "was fenced: " in again["because"] or "was over before" in again["because"]


@pytest.mark.soak
def test_nobody_seems_dead_while_all_cores_are_busy_for_a_minute(place: Playground) -> None:
    job = ByHand(place, 3, 2, "--async", script=["--epochs", "4000", "--pause", "0.01"])
    job.until_epoch(0, 0)
    busy = "import numpy as np, time\nend = time.time() + 60\na = np.random.rand(600, 600)\n"
    busy += "while time.time() < end: a @ a"
    hogs = [
        Process(place.folder, f"hog{k}", [sys.executable, "-c", busy], dict(os.environ))
        for k in range(2 * len(os.sched_getaffinity(0)))
    ]
    place.processes += hogs
    for hog in hogs:
        assert hog.wait(120) == 0, hog.text
    assert not [event for event in job.events() if event["event"] == "Fence"]
    job.coordinator.send(signal.SIGINT)
    assert job.coordinator.wait() == 75, job.coordinator.text
