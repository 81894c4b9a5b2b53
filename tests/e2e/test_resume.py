"""Checkpoints of real runs: taken beside the training, gone on from with any numbers, and the same model at the end."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.e2e.harness import Playground, Process
from zml.checkpoint import newest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


def samples_of(run: Path) -> int:
    return int(json.loads((run / "status.json").read_text())["samples"])


def killed_after(place: Playground, steps: int, *args: str) -> Path:
    """A run that is killed, all of it at once, when it has a checkpoint of so many steps; its directory."""
    run = place.start("run", *args)

    def far_enough() -> bool:
        folders = place.folder.glob("runs/*/checkpoints/step-*")
        return any(int(folder.name[5:14]) >= steps for folder in folders)

    place.until(far_enough, f"a checkpoint of {steps} steps")
    return killed(place, run)


def killed(place: Playground, run: Process) -> Path:
    """All of it at once; its directory."""
    for pid in [run.process.pid, *place.pids("zml")]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    run.wait()
    place.until(lambda: not place.pids("zml"), "nothing is left of it", 20)
    return place.run_dir()


# `test_streams` does as much each time, and counts the samples in the model itself.
@pytest.mark.soak
@pytest.mark.parametrize("numbers", [["-w", "3", "-p", "1"], ["-w", "1", "-p", "3"]])
def test_a_run_that_was_killed_whole_goes_on_and_every_sample_counts_once(
    place: Playground, numbers: list[str]
) -> None:
    args = ["--epochs", "4", "--samples", "960", "--pause", "0.02"]
    first = killed_after(place, 50, "-w", "2", "-p", "2", "--checkpoint-steps", "10", "train.py", *args)
    found, _ = newest(first / "checkpoints")
    assert found is not None
    done = 120 * found.manifest.epoch + sum(b - a + 1 for a, b in found.ledger["committed"])
    assert 0 < done < 480
    code, text = place.run("resume", str(first), *numbers)
    assert code == 0, text
    assert f"resuming at step {found.manifest.step:,}, in epoch {found.manifest.epoch + 1}" in text
    (second,) = [folder.parent for folder in place.folder.glob("runs/*/status.json")]
    assert samples_of(second) == 8 * (480 - done)
    at_end, _ = newest(second / "checkpoints")
    assert at_end is not None and at_end.ledger["committed"] == [[0, 119]]
    assert at_end.manifest.step > found.manifest.step


def test_a_run_without_a_checkpoint_that_was_killed_whole_goes_on_where_it_stood(place: Playground) -> None:
    args = ["--epochs", "3", "--samples", "320", "--pause", "0.08"]
    run = place.start("run", "--checkpoint-minutes", "0", "train.py", *args)

    def steps() -> int:
        now = next(iter(place.folder.glob("runs/*/now.json")), None)
        return int(json.loads(now.read_text())["steps"]) if now is not None else 0

    place.until(lambda: steps() > 45, "it is in the second of three epochs")
    first = killed(place, run)
    code, text = place.run("resume", first.name)
    assert code == 0, text
    assert f"resuming {first.name} where it was cut off" in text
    assert place.run_dir() == first, "there is no other run"
    code, text = place.run("data", "audit", first.name)
    assert code == 0 and "every batch counted once" in text
    (shard,) = [member["shard"] for member in place.status()["members"] if member["role"] == "shard"]
    assert shard["updates"] == 120, "each of 3 epochs of 40 batches, once"


@pytest.mark.soak
def test_a_checkpoint_of_another_model_is_refused_with_the_names_that_differ(place: Playground) -> None:
    code, text = place.run("run", "train.py", "--epochs", "1", "--samples", "64")
    assert code == 0, text
    (place.folder / "other.py").write_text(
        (place.folder / "train.py")
        .read_text()
        .replace("Linear(16, 32)", "Linear(16, 24)")
        .replace("32, 2", "24, 2")
    )
    code, text = place.run("run", "--resume", str(place.run_dir()), "other.py")
    assert code != 0
    assert "does not fit: the models differ in 0.bias" in text
    assert not place.pids("zml")


def test_a_run_without_a_checkpoint_cannot_be_resumed_and_says_so(place: Playground) -> None:
    code, text = place.run("resume", "nowhere")
    assert code == 2 and "there is no run nowhere" in text
