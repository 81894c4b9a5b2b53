"""Shards as real processes with backups: killed one after the other, and training goes on with the same bits."""

import json
import os
import signal
import socket
from functools import partial

import pytest

from tests.e2e.harness import Playground, Process, same_model

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def last_epoch(place: Playground) -> int:
    return place.script_lines("w0").count("done")


def has_gone_on(place: Playground, seen: int) -> bool:
    return last_epoch(place) > seen + 1


def copies(place: Playground) -> dict[str, list[int]]:
    """Of each shard, which copies have been in step; the last one still is, or the list ends with 0."""
    found: dict[str, list[int]] = {"p0": [], "p1": []}
    for line in (place.run_dir() / "logs" / "coordinator.jsonl").read_text().splitlines():
        said = json.loads(line)
        if said["message"] in ("backup in step", "without a backup"):
            found[said["shard"]].append(said["copy"] if said["message"] == "backup in step" else 0)
    return found


def all_backed_up(place: Playground, more_than: dict[str, list[int]]) -> bool:
    """Since then, and still."""
    now = copies(place)
    return all(len(now[name]) > len(more_than[name]) and now[name][-1] for name in now)


@pytest.mark.soak
@pytest.mark.parametrize("push_log", ["on", "off"])
def test_shards_are_killed_one_after_the_other_and_nothing_is_lost(place: Playground, push_log: str) -> None:
    args = ["--epochs", "60", "--samples", "64", "--pause", "0.05"]
    address = f"tcp://127.0.0.1:{free_port()}"

    def shard(number: int) -> Process:
        return place.start(
            "ps", "--shard", str(number), "--coordinator", address, ZML_PUSH_LOG=push_log, ZML_SHARDS="2"
        )

    coordinator = place.start(
        "coordinator", "-w", "2", "-p", "2", "--replicas", "1", "--bind", address, "train.py", *args
    )
    shards = [shard(0), shard(1)]
    for _ in range(2):
        place.start("worker", "--cpu", "--coordinator", address)
    place.until(lambda: last_epoch(place) > 0, "training goes on")
    known: dict[str, list[int]] = {"p0": [], "p1": []}
    for dies in (0, 1, 0):
        place.until(partial(all_backed_up, place, known), "both shards have a backup")
        known = copies(place)
        os.kill(shards[dies].process.pid, signal.SIGKILL)
        shards[dies].wait()
        seen = last_epoch(place)
        place.until(partial(has_gone_on, place, seen), "training goes on without it", 30)
        shards[dies] = shard(dies)
    assert coordinator.wait() == 0, coordinator.text
    assert "all 2 workers finished" in (place.run_dir() / "status.json").read_text()
    calm = place.start("run", "-w", "2", "-p", "2", "train.py", *args[:4], "--save", "calm.safetensors")
    assert calm.wait() == 0, calm.text
    assert same_model(place.folder / "model.safetensors", place.folder / "calm.safetensors")
