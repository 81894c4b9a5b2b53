"""Many jobs on nodes, with real processes: what is submitted runs, is drained and goes on, and survives who dies."""

import json
import os
import signal
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Playground, Process, same_model

pytestmark = pytest.mark.cluster


class Cluster:
    """A coordinator of many jobs and its nodes, asked over HTTP."""

    def __init__(self, place: Playground, *flags: str) -> None:
        self.place = place
        self.flags = flags
        self.folder = place.folder / "cluster"
        self.coordinator = self.start()
        self.nodes: list[Process] = []

    def start(self) -> Process:
        before = self.here()
        flags = ["--cluster", "cluster", "--bind", "tcp://127.0.0.1:0", "--http", "127.0.0.1:0", *self.flags]
        process = self.place.start("coordinator", *flags)
        self.coordinator = process
        mine = lambda: (found := self.here()) and found["pid"] == process.process.pid  # noqa: E731
        self.place.until(mine, f"the coordinator listens (before: {before})")
        return process

    def here(self) -> dict[str, Any]:
        file = self.folder / "cluster.json"
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return found

    def node(self, name: str, cpus: int = 2, prefix: Sequence[str] = ()) -> Process:
        (address,) = self.here()["addresses"]
        flags = ["--coordinator", address, "--name", name, "--cpus", str(cpus), "--memory-mb", "4000"]
        process = self.place.start("node", *flags, name=f"node-{name}-{len(self.nodes)}", prefix=prefix)
        self.nodes.append(process)
        is_there = lambda: any(node["id"] == name for node in self.ask("nodes")["nodes"])  # noqa: E731
        self.place.until(is_there, f"node {name} is there")
        return process

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(f"{self.here()['http']}/api/v1/{path}", data)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=20) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def submit(self, *args: str, workers: str = "1", **more: Any) -> str:
        asked = {"script": "train.py", "args": args, "folder": str(self.place.folder), "workers": workers}
        return str(self.ask("jobs", asked | more)["id"])

    def job(self, job: str) -> dict[str, Any]:
        return self.ask(f"jobs/{job}")

    def until(self, job: str, condition: Callable[[dict[str, Any]], Any], what: str) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def holds() -> bool:
            nonlocal found
            found = self.job(job)
            return bool(condition(found))

        try:
            self.place.until(holds, what)
        except AssertionError as error:
            log = self.folder / "logs" / "cluster.jsonl"
            raise AssertionError(
                f"{error}\n{json.dumps(found, indent=1)}\n{log.read_text()[-4000:]}"
            ) from None
        return found

    def until_state(self, job: str, state: str) -> dict[str, Any]:
        return self.until(job, lambda view: view["state"] == state, f"{job} is {state}")

    def until_trains(self, job: str, attempt: int = 1) -> None:
        """Some batches of its first epoch are in the parameters."""
        file = self.folder / "jobs" / job / str(attempt) / "timeline" / "w0.jsonl"
        self.place.until(lambda: file.exists() and file.stat().st_size > 0, f"{job} makes steps")

    def audit(self, job: str, attempt: int) -> None:
        """By the ledger, with the attempts that it went on from: every batch counts once."""
        code, text = self.place.run("data", "audit", str(self.folder / "jobs" / job / str(attempt)))
        assert code == 0 and "every batch counted once" in text, text

    def members(self) -> list[int]:
        return [*self.place.pids("zml worker"), *self.place.pids("zml ps"), *self.place.pids("train.py")]


@pytest.fixture
def cluster(place: Playground) -> Cluster:
    return Cluster(place)


def is_over(view: dict[str, Any]) -> bool:
    return view["ended_at"] is not None


@pytest.mark.soak
def test_jobs_run_in_turn_and_leave_nothing(cluster: Cluster) -> None:
    """Room for one at a time: the second begins when the first is gone; one that fails says why."""
    cluster.node("n1", cpus=1)
    first = cluster.submit("--save", "one.safetensors")
    second = cluster.submit("--trouble", "raise", after=[first])
    third = cluster.submit("--save", "never.safetensors", after=[second])
    assert cluster.job(second)["why"] == "AFTER"

    ends = {job: cluster.until(job, is_over, f"{job} is over") for job in (first, second, third)}

    assert (ends[first]["state"], ends[first]["exit_code"]) == ("SUCCEEDED", 0)
    assert (ends[second]["state"], ends[second]["exit_code"]) == ("FAILED", 1)
    assert "odd" in ends[second]["because"] or "script" in ends[second]["because"], ends[second]
    assert (ends[third]["state"], ends[third]["attempts"]) == ("CANCELLED", [])
    assert (cluster.place.folder / "one.safetensors").exists()
    cluster.place.until(lambda: not cluster.members(), "nothing is left")


@pytest.mark.soak
def test_two_jobs_at_once_do_not_hear_each_other(cluster: Cluster) -> None:
    """Both have a w0 and a p0, and the same coordinator."""
    cluster.node("n1", cpus=2)
    jobs = [cluster.submit("--pause", "0.02", "--save", f"{name}.safetensors") for name in ("one", "two")]
    for job in jobs:
        done = cluster.until(job, is_over, f"{job} is over")
        assert (done["state"], len(done["attempts"])) == ("SUCCEEDED", 1), done
        cluster.audit(job, 1)
    log = (cluster.folder / "logs" / "cluster.jsonl").read_text()
    assert "started anew" not in log
    assert same_model(*(cluster.place.folder / f"{name}.safetensors" for name in ("one", "two")))


@pytest.mark.soak
def test_a_job_that_is_paused_goes_on_from_its_checkpoint(cluster: Cluster) -> None:
    cluster.node("n1")
    job = cluster.submit("--epochs", "3", "--pause", "0.05")
    cluster.until_trains(job)

    cluster.ask(f"jobs/{job}/pause", {})
    paused = cluster.until_state(job, "PAUSED")
    assert [each["state"] for each in paused["attempts"]] == ["DRAINED"]
    cluster.place.until(lambda: not cluster.members(), "its processes are gone")
    cluster.ask(f"jobs/{job}/resume", {})
    done = cluster.until(job, is_over, f"{job} is over")

    assert [each["state"] for each in done["attempts"]] == ["DRAINED", "SUCCEEDED"]
    cluster.audit(job, 2)


@pytest.mark.soak
def test_a_cancelled_job_is_gone(cluster: Cluster) -> None:
    cluster.node("n1")
    job = cluster.submit("--epochs", "50", "--pause", "0.05", workers="2")
    cluster.until_trains(job)
    cluster.ask(f"jobs/{job}/cancel", {"because": "not needed"})
    done = cluster.until(job, is_over, f"{job} is over")

    assert done["state"] == "CANCELLED" and done["because"].endswith("not needed"), done
    cluster.place.until(lambda: not cluster.members(), "nothing is left")


@pytest.mark.soak
def test_a_job_whose_time_is_over_is_drained(cluster: Cluster) -> None:
    cluster.node("n1")
    job = cluster.submit("--epochs", "500", "--pause", "0.05", time_limit_s=3)
    done = cluster.until(job, is_over, f"{job} is over")

    assert (done["state"], done["exit_code"]) == ("TIMED_OUT", 124)
    assert list((cluster.folder / "jobs" / job / "1" / "checkpoints").glob("step-*")), "with a checkpoint"
    cluster.place.until(lambda: not cluster.members(), "nothing is left")


def test_the_coordinator_is_killed_and_jobs_train_on(cluster: Cluster) -> None:
    cluster.node("n1", cpus=2)
    job = cluster.submit("--epochs", "4", "--pause", "0.05", workers="2", settings={"lease_s": 3.0})
    waits = cluster.submit("--save", "later.safetensors", workers="2")
    cluster.until_trains(job)

    cluster.coordinator.send(signal.SIGKILL)
    cluster.coordinator.wait()
    cluster.start()
    done = cluster.until(job, is_over, f"{job} is over")
    later = cluster.until(waits, is_over, f"{waits} is over")

    assert (done["state"], len(done["attempts"])) == ("SUCCEEDED", 1), done
    assert (later["state"], len(later["attempts"])) == ("SUCCEEDED", 1), later
    cluster.audit(job, 1)


@pytest.mark.soak
def test_a_node_that_dies_takes_no_job_with_it(cluster: Cluster) -> None:
    """All of the job was there: its next attempt begins elsewhere, with what the shard's log or a checkpoint has."""
    first = cluster.node("n1", cpus=1)
    job = cluster.submit(
        "--epochs", "3", "--pause", "0.05", settings={"checkpoint_steps": 5, "return_s": 5.0}
    )
    cluster.until_trains(job)
    has_one = lambda: [*(cluster.folder / "jobs" / job / "1" / "checkpoints").glob("step-*")]  # noqa: E731
    cluster.place.until(has_one, "a checkpoint")
    cluster.node("n2", cpus=1)

    os.killpg(first.process.pid, signal.SIGKILL)
    done = cluster.until(job, is_over, f"{job} is over")

    assert done["state"] == "SUCCEEDED", done
    cluster.audit(job, len(done["attempts"]))


@pytest.mark.soak
def test_a_node_that_leaves_lets_its_workers_go_in_order(cluster: Cluster) -> None:
    """The workers of the other node go on: the job does not begin anew."""
    cluster.node("n1", cpus=1)
    job = cluster.submit("--epochs", "6", "--pause", "0.05", workers="1..2")
    cluster.until_trains(job)
    second = cluster.node("n2", cpus=1)
    cluster.until(job, lambda view: view["workers"] == 2, "it grows")
    worker = cluster.folder / "jobs" / job / "1" / "timeline" / "w1.jsonl"
    cluster.place.until(lambda: worker.exists() and worker.stat().st_size, "the new worker makes steps")

    second.send(signal.SIGTERM)
    assert second.wait() == 75
    done = cluster.until(job, is_over, f"{job} is over")

    assert (done["state"], len(done["attempts"])) == ("SUCCEEDED", 1), done
    cluster.audit(job, 1)


@pytest.mark.soak
def test_a_second_coordinator_on_the_folder_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    code, text = cluster.place.run("coordinator", "--cluster", "cluster", "--http", "127.0.0.1:0")
    assert code != 0 and "ZML-E" in text, text


def test_a_job_grows_to_four_workers_and_shrinks_to_two(place: Playground) -> None:
    """It never begins anew, every batch counts once, and what it learns goes on."""
    cluster = Cluster(place, "--policy", "las")
    cluster.node("n1", cpus=1)
    job = cluster.submit("--epochs", "12", "--samples", "384", "--pause", "0.05", workers="1..4")
    cluster.until_trains(job)
    assert cluster.job(job)["workers"] == 1

    cluster.node("n2", cpus=3)
    cluster.until(job, lambda view: view["workers"] == 4, "it has grown")
    steps = cluster.folder / "jobs" / job / "1" / "timeline"
    cluster.place.until(lambda: len([*steps.glob("w*.jsonl")]) == 4, "all four make steps")
    cluster.ask(f"jobs/{job}/scale", {"workers": "1..2"})
    cluster.until(job, lambda view: view["workers"] == 2, "it has shrunk")
    cluster.place.until(lambda: len(cluster.place.pids("zml worker")) == 2, "two have left")
    done = cluster.until(job, is_over, f"{job} is over")

    assert (done["state"], len(done["attempts"])) == ("SUCCEEDED", 1), done
    cluster.audit(job, 1)


@pytest.mark.soak
def test_a_job_that_takes_more_memory_than_it_asked_for_fails_alone(cluster: Cluster) -> None:
    cluster.node("n1")
    (cluster.place.folder / "greedy.py").write_text("import torch\nx = torch.zeros(1 << 30)\nprint(len(x))\n")
    job = cluster.submit(script="greedy.py", memory_mb=2000)
    done = cluster.until(job, is_over, f"{job} is over")
    assert done["state"] == "FAILED" and "memory" in done["because"].lower(), done


@pytest.mark.soak
def test_nodes_come_when_there_are_jobs_and_go_when_there_are_none(place: Playground) -> None:
    pool = 'backend = "local"\nmost = 2\ncpus = 1\nmemory_mb = 2000\nidle_s = 2\n'
    (place.folder / "pool.toml").write_text(pool)
    cluster = Cluster(place, "--pool", "pool.toml")
    jobs = [cluster.submit("--save", f"{name}.safetensors") for name in ("one", "two", "three")]

    place.until(lambda: len(cluster.ask("nodes")["nodes"]) == 2, "two nodes have come, and no more")
    for job in jobs:
        done = cluster.until(job, is_over, f"{job} is over")
        assert done["state"] == "SUCCEEDED", done
    place.until(lambda: cluster.ask("nodes")["nodes"] == [], "they are gone")
    place.until(lambda: not place.pids("zml node"), "and nothing of them is left")
