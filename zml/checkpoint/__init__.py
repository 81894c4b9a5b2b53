"""Checkpoints on disk: a folder of safetensors and JSON that is whole or not there, and no pickle.

    with Writer(root, step) as writer:              read(path), newest(root)        -> Checkpoint
        write_shard_file(writer.folder / ..., ...)  checkpoint.chunk(index)         -> w and the optimizer's state
        writer.adopt(name, bytes, xxh3)             diff(a, b), export(checkpoint, path), prune(root, ...)
        writer.seal(registration, ...)

`folder` says what lies where, `writing` in which order it gets there. Who takes the numbers from running shards, and
when, is not decided here. Nothing here imports torch, and numpy only where numbers are read.
"""

from .comparing import Difference, diff
from .disk import DISK, Disk, Written
from .exporting import export
from .folder import Entry, entries, entry
from .manifest import Manifest
from .reading import BadCheckpoint, Checkpoint, Skipped, newest, read, read_manifest
from .retention import prune, to_drop
from .tensors import shard_file, shard_metadata, write_shard_file
from .writing import Gap, Refused, Writer

__all__ = [
    "DISK",
    "BadCheckpoint",
    "Checkpoint",
    "Difference",
    "Disk",
    "Entry",
    "Gap",
    "Manifest",
    "Refused",
    "Skipped",
    "Writer",
    "Written",
    "diff",
    "entries",
    "entry",
    "export",
    "newest",
    "prune",
    "read",
    "read_manifest",
    "shard_file",
    "shard_metadata",
    "to_drop",
    "write_shard_file",
]
