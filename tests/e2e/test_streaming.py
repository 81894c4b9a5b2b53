"""Real processes without a shared folder: checkpoints get to the coordinator, and a job goes on from them."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.e2e.harness import Playground, Process, same_model
from tests.e2e.test_resume import killed_after, samples_of
from zml.checkpoint import newest, read

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


def said(run: Path, what: str) -> set[str]:
    """The shards whose logs have such a line."""
    return {log.stem for log in (run / "logs").glob("p*.jsonl") if what in log.read_text()}


def holds_the_model(place: Playground, run: Path) -> bool:
    """Is the last checkpoint what the script has saved, to the bit?"""
    found, skipped = newest(run / "checkpoints")
    assert found is not None and not skipped and found.manifest.because == "run ended"
    code, text = place.run("ckpt", "export", str(run), "-o", "exported.safetensors", "--force")
    assert code == 0, text
    return same_model(place.folder / "exported.safetensors", place.folder / "model.safetensors")


@pytest.mark.soak
def test_a_killed_run_whose_shards_sent_their_parts_goes_on_with_shards_that_fetch_them(
    place: Playground,
) -> None:
    (place.folder / "zml.toml").write_text('shared_folder = "no"\n')
    args = ["--epochs", "3", "--samples", "960", "--pause", "0.02"]
    first = killed_after(place, 50, "-w", "2", "-p", "2", "--checkpoint-steps", "20", "train.py", *args)
    assert said(first, '"a checkpoint is sent"') == {"p0", "p1"}
    found, skipped = newest(first / "checkpoints")
    assert found is not None and not skipped
    done = 120 * found.manifest.epoch + sum(b - a + 1 for a, b in found.ledger["committed"])
    code, text = place.run("resume", str(first), "-w", "2", "-p", "3")
    assert code == 0, text
    (second,) = [folder.parent for folder in place.folder.glob("runs/*/status.json")]
    holding = {log.stem for log in (second / "logs").glob("p*.jsonl")}
    assert said(second, '"a checkpoint is fetched"') == holding == {"p0", "p1", "p2"}
    assert samples_of(second) == 8 * (360 - done)
    assert holds_the_model(place, second)


def elsewhere(folder: Path) -> Sequence[str]:
    """A command on a machine that has an empty folder of this name."""
    hidden = 'mount -t tmpfs none "$0" && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", hidden, str(folder)]


def by_hand(place: Playground, number: int, *args: str) -> Path:
    """A job whose shards have another `runs` than its coordinator, to its end; its run directory."""
    run = place.folder / "runs" / f"number-{number}"
    coordinator = place.start(
        "coordinator", "-w", "2", "-p", "2", "--bind", "tcp://127.0.0.1:0", "--run-dir", str(run), *args
    )
    file = run / "coordinator.json"
    place.until(file.exists, "the coordinator listens")
    at = ["--coordinator", json.loads(file.read_text())["addresses"][0]]
    members: list[Process] = [
        place.start("ps", "--shard", str(k), *at, prefix=elsewhere(place.folder / "runs")) for k in range(2)
    ]
    members += [place.start("worker", "--cpu", *at) for _ in range(2)]
    assert coordinator.wait() == 0, coordinator.text
    assert [member.wait() for member in members] == [0] * 4, "\n".join(member.text for member in members)
    assert not said(run, "joined"), "shards have written nothing here"
    return run


@pytest.mark.soak
@pytest.mark.root
@pytest.mark.skipif(not shutil.which("unshare"), reason="needs the `unshare` command")
def test_shards_with_another_file_system_send_and_fetch(place: Playground) -> None:
    os.mkdir(place.folder / "runs")
    # Slow enough for the checkpoint to be cut in the middle: the coordinator hears of steps twice a second.
    script = ["train.py", "--epochs", "2", "--samples", "192", "--pause", "0.2"]
    first = by_hand(place, 1, "--checkpoint-steps", "10", *script)
    assert holds_the_model(place, first)
    half = read(min((first / "checkpoints").glob("step-*")))
    done = 24 * half.manifest.epoch + sum(b - a + 1 for a, b in half.ledger["committed"])
    assert 0 < done < 48
    second = by_hand(place, 2, "--resume", str(half.path), *script)
    assert holds_the_model(place, second)
    assert samples_of(second) == 8 * (48 - done)
