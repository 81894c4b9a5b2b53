"""Small checkpoints for tests, made the way a coordinator and its shards make them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zml.checkpoint import Disk, Writer, shard_file, shard_metadata, write_shard_file
from zml.hyper import Hyper, OptimizerSpec
from zml.layout import Layout, Registration

Array = NDArray[np.float32]
Chunks = dict[int, dict[str, Array]]

ADAM: Hyper = {"amsgrad": False, "decoupled_weight_decay": True}
DESCRIBED = [
    ("embed.weight", (5, 3), 0),
    ("body.weight", (2, 4), 0),
    ("body.bias", (2,), 1),
    ("scale", (), 1),
]
NOW = 1_770_000_000.0
LEDGER = {"epoch": 1, "done": [[0, 12]], "seed": 7}
JOB = {"clock": 6, "mode": "sync", "workers": 2, "lr": 0.1}


class Quick(Disk):
    """Waits for no disk: what depends on syncs is in test_checkpoint_faults, where they are counted."""

    def fsync(self, handle: int) -> None:
        pass


QUICK = Quick()


def registration(chunk_elements: int = 8, described: Sequence[Any] = DESCRIBED) -> Registration:
    """AdamW in two groups, and one frozen group that is empty."""
    groups = 2
    return Registration(
        Layout.build(described, groups, chunk_elements), OptimizerSpec("AdamW", (ADAM,) * groups)
    )


def numbers(model: Registration, seed: int = 0) -> Chunks:
    """w and AdamW's state of every chunk; the last chunk has made no step and has no state."""
    rng = np.random.default_rng(seed)
    found: Chunks = {}
    for chunk in model.layout.chunks:
        parts = {"w": rng.standard_normal(chunk.size, np.float32)}
        if chunk is not model.layout.chunks[-1]:
            parts["exp_avg"] = rng.standard_normal(chunk.size, np.float32)
            parts["exp_avg_sq"] = rng.random(chunk.size, np.float32)
            parts["step"] = np.full(len(chunk.segments), 6, np.float32)
            parts["stepped"] = np.ones(len(chunk.segments), np.float32)
        found[chunk.index] = parts
    return found


def write_shard(path: Path, chunks: Chunks, held: Sequence[int], disk: Disk = QUICK) -> tuple[int, str]:
    tensors = {f"{index}/{part}": array for index in held for part, array in chunks[index].items()}
    return write_shard_file(path, tensors, shard_metadata(dict.fromkeys(held, 6)), disk)


def fill(writer: Writer, chunks: Chunks, shards: int = 2, disk: Disk = QUICK) -> None:
    """Each shard writes its own file, which the writer adopts; but the last one's arrives in pieces."""
    for shard in range(shards):
        held = [index for index in chunks if index % shards == shard]
        name = shard_file(shard)
        if shard < shards - 1:
            writer.adopt(name, *write_shard(writer.folder / name, chunks, held, disk))
            continue
        elsewhere = writer.root.parent / f"sent-{name}"
        size, digest = write_shard(elsewhere, chunks, held)
        data = elsewhere.read_bytes()
        elsewhere.unlink()
        for at in range(0, size, 300):
            writer.piece(name, at, data[at : at + 300])
        writer.adopt(name, size, digest)


def make(
    root: Path,
    step: int,
    *,
    model: Registration | None = None,
    chunks: Chunks | None = None,
    shards: int = 2,
    disk: Disk = QUICK,
) -> Path:
    model = registration() if model is None else model
    with Writer(root, step, disk) as writer:
        fill(writer, numbers(model, step) if chunks is None else chunks, shards, disk)
        return writer.seal(model, ledger=LEDGER, job=JOB, epoch=1, because=f"at step {step}", now=NOW)
