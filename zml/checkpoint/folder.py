"""What lies in a `checkpoints` folder and what it is called.

    checkpoints/
        LATEST                              the name of the newest, for people and scripts; nothing here believes it
        step-000001200/                     a checkpoint: it has a manifest, and the manifest verifies
            MANIFEST.json                   written last
            layout.json                     the model: parameters, groups, optimizer
            ledger.json  job.json           the data ledger at the cut; settings, clock, epoch, mode, workers
            shard-0000.safetensors          chunks of one shard: `CHUNK/w`, `CHUNK/exp_avg` ...; float32
            worker.safetensors  worker.json     where a script's own optimizer runs: its state
            streams.json                    where the data are a stream: states of it, by part and position
        step-000001200.2/                   the same step a second time, after a resume from before it
        .step-000001600.TOKEN.partial/      being written
        .step-000000400.TOKEN.dropped/      being deleted

Names that begin with a dot are nobody's checkpoint. Newer is the higher step, and of one step the higher attempt.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

LATEST = "LATEST"
MANIFEST = "MANIFEST.json"
LAYOUT = "layout.json"
LEDGER = "ledger.json"
JOB = "job.json"
TENSORS, ABOUT = "worker.safetensors", "worker.json"  # what a script keeps of its optimizer
MOST_STEP = 10**15

SHARD = re.compile(r"shard-\d{4,9}\.safetensors")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ENTRY = re.compile(r"step-(\d{9,16})(?:\.([1-9]\d{0,8}))?")
_HIDDEN = re.compile(r"\.step-[\d.]+\.([0-9a-f]{8})[0-9a-f]*\.(partial|dropped)")


class Entry(NamedTuple):
    """One checkpoint by its name. Entries compare by age."""

    step: int
    attempt: int = 1

    @property
    def name(self) -> str:
        return f"step-{self.step:09}" + (f".{self.attempt}" if self.attempt > 1 else "")


class Hidden(NamedTuple):
    """A folder that is no checkpoint: not yet, or no more. `process` is the token of the process that made it."""

    name: str
    process: str
    kind: str  # partial or dropped


def entry(name: str) -> Entry | None:
    """What a folder's name says; None for what is not called like a checkpoint."""
    found = _ENTRY.fullmatch(name)
    if found is None:
        return None
    read = Entry(int(found[1]), int(found[2] or 1))
    return read if read.name == name else None


def hidden(name: str) -> Hidden | None:
    found = _HIDDEN.fullmatch(name)
    return Hidden(name, found[1], found[2]) if found else None


def hidden_name(which: str, process: str, rest: str, kind: str) -> str:
    return f".{which}.{process}{rest}.{kind}"


def entries(root: Path) -> list[Entry]:
    """All that are called like checkpoints, the oldest first; none where there is no such folder."""
    try:
        found = [entry(each.name) for each in root.iterdir() if each.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(each for each in found if each is not None)


def is_seen(folder: Path) -> bool:
    """Is this folder on this machine? False too where that cannot be found out; `Path.is_dir` would raise then."""
    return os.path.isdir(folder)


def is_file_name(name: str) -> bool:
    """May a file of a checkpoint be called this? No separators, no dot in front, nothing that needs quoting."""
    return _FILE.fullmatch(name) is not None
