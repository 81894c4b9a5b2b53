"""Shards as real processes that are told to leave, and come again: what they have moves to another and back."""

import json
import signal
from functools import partial

import pytest

from tests.e2e.harness import Playground, Process, same_model
from tests.e2e.test_replicas import free_port, has_gone_on, last_epoch

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]


def has_its_chunks(place: Playground, number: int) -> bool:
    lines = (
        json.loads(line)
        for log in place.folder.glob(f"runs/*/logs/p{number}.jsonl")
        for line in log.read_text().splitlines()
        if line.endswith("}")
    )
    return any(line["message"] == "promoted" and line["shard"] == f"p{number}" for line in lines)


@pytest.mark.soak
@pytest.mark.parametrize("leaving", [[1], [1, 0]], ids=str)
def test_a_shard_that_is_terminated_hands_over_and_gets_its_chunks_back_when_it_is_started_again(
    place: Playground, leaving: list[int]
) -> None:
    args = ["--epochs", str(20 * len(leaving)), "--samples", "64", "--pause", "0.05"]
    address = f"tcp://127.0.0.1:{free_port()}"

    def shard(number: int) -> Process:
        return place.start("ps", "--shard", str(number), "--coordinator", address, ZML_SHARDS="2")

    coordinator = place.start("coordinator", "-w", "2", "-p", "2", "--bind", address, "train.py", *args)
    shards = [shard(0), shard(1)]
    for _ in range(2):
        place.start("worker", "--cpu", "--coordinator", address)
    place.until(lambda: last_epoch(place) > 0, "training goes on")
    for leaves in leaving:
        shards[leaves].send(signal.SIGTERM)
        assert shards[leaves].wait() == 75, shards[leaves].text
        place.until(partial(has_gone_on, place, last_epoch(place)), "training goes on without it", 30)
        shards[leaves] = shard(leaves)
        place.until(partial(has_its_chunks, place, leaves), "it has its chunks again")
    assert coordinator.wait() == 0, coordinator.text
    calm = place.start("run", "-w", "2", "-p", "1", "train.py", *args[:4], "--save", "calm.safetensors")
    assert calm.wait() == 0, calm.text
    assert same_model(place.folder / "model.safetensors", place.folder / "calm.safetensors")
