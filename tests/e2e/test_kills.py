"""Any process is killed while a real training runs: it finishes, and every batch counted once."""

import json
import os
import random
import signal
from functools import partial

import pytest

from tests.e2e.harness import Playground, Process

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]


def process(place: Playground, member: str) -> list[int]:
    words = {
        "c": ("zml coordinator",),
        "p": (f"--shard {member[1:]} ",),
        "w": ("worker", f"--name {member} "),
    }
    return place.pids(*words[member[0]])


def script_of(place: Playground, agent: int) -> list[int]:
    return [pid for pid in place.pids("zml.agent.runner") if parent(pid) == agent]


def parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


def said(run: Process, text: str) -> bool:
    return text in run.text


def progress(place: Playground) -> int:
    return sum(len(place.script_lines(worker)) for worker in ("w0", "w1"))


def further(place: Playground, before: int, run: Process | None = None) -> bool:
    return progress(place) > before or (run is not None and run.process.poll() is not None)


def reasons(place: Playground) -> set[str]:
    """Why checkpoints were taken."""
    manifests = place.folder.glob("runs/*/checkpoints/*/MANIFEST.json")
    return {json.loads(file.read_text())["because"] for file in manifests}


def sound(place: Playground, epochs: int, batches: int) -> None:
    code, text = place.run("data", "audit", "--json", str(place.run_dir()))
    assert code == 0, text
    rows = json.loads(text)
    accounts = [(row["epoch"], row["committed"], row["missing"], row["duplicates"]) for row in rows]
    assert accounts == [(epoch, batches, 0, 0) for epoch in range(epochs)]
    assert place.status()["samples"] == sum(row["samples"] for row in rows), (
        "what is told last is what counted"
    )


@pytest.mark.parametrize(
    ("mode", "compress"),
    [("--sync", "none"), pytest.param("--staleness=2", "topk:10%", marks=pytest.mark.soak)],
)
def test_a_shard_that_is_killed_is_started_again_with_all_that_it_had_acknowledged(
    place: Playground, mode: str, compress: str
) -> None:
    args = ["--epochs", "6", "--samples", "480", "--pause", "0.02"]
    run = place.start("run", "-w", "2", "-p", "2", mode, "--compress", compress, "train.py", *args)
    place.until(lambda: "epoch 0 done" in place.script_lines("w0"), "training goes on")
    (coordinator,) = process(place, "coordinator")
    os.kill(coordinator, signal.SIGUSR2)
    place.until(lambda: "SIGUSR2 at the coordinator" in reasons(place), "a checkpoint is taken")
    for number in (0, 1):
        (shard,) = process(place, f"p{number}")
        os.kill(shard, signal.SIGKILL)
        place.until(partial(said, run, f"p{number} joined again, as incarnation 2"), "it is back")
        place.until(partial(further, place, progress(place)), "training goes on")
    assert run.wait() == 0, run.text
    sound(place, 6, 60)


@pytest.mark.soak
def test_a_training_outlives_kills_of_whatever_there_is(place: Playground) -> None:
    seed = int(os.environ.get("ZML_KILL_SEED", random.randrange(1 << 30)))
    print(f"ZML_KILL_SEED={seed}")
    dice = random.Random(seed)
    args = ["--epochs", "30", "--samples", "480", "--pause", "0.05"]
    limits = {"ZML_WORKER_RESTARTS": "100", "ZML_SHARD_RESTARTS": "100", "ZML_COORDINATOR_RESTARTS": "100"}
    run = place.start(
        "run",
        "-w",
        "2",
        "-p",
        "2",
        "--compress",
        "topk:10%",
        "train.py",
        *args,
        **limits,
        ZML_BAD_BATCH_KILLS="99",
    )
    place.until(lambda: "epoch 0 done" in place.script_lines("w0"), "training goes on")
    for _ in range(8):
        what = dice.choice(["coordinator", "p0", "p1", "w0", "w1", "script of w0", "script of w1"])
        place.until(partial(process, place, what.split()[-1]), f"{what} is there")
        victims = process(place, what.split()[-1])
        if what.startswith("script"):
            place.until(partial(script_of, place, victims[0]), f"{what} is there")
            victims = script_of(place, victims[0])
        print("killing", what)
        os.kill(victims[0], signal.SIGKILL)
        before = progress(place)
        place.until(partial(further, place, before, run), "training goes on")
        if run.process.poll() is not None:
            break
    assert run.wait(240) == 0, run.text
    sound(place, 30, 60)
