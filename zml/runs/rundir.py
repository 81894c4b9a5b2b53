"""The run directory: one folder per run that holds its settings, events, logs and end.

    runs/2026-03-01T12-30-00-train-1a2b/
        config.json         every setting with its origin, the script and its arguments
        coordinator.json    where the coordinator listens, while it does
        events.jsonl        what was decided and why
        now.json            what it is doing, a few seconds ago at most, while it does
        status.json         how it ended
        history.jsonl       how it went: steps, the script's values, rates
        members.jsonl       and what each worker and shard counted
        logs/               one file of JSON lines per process, and what scripts printed
        timeline/           where the time of each worker's steps went
        tensorboard/        the run's numbers as TensorBoard reads them, where that tracker is on
        state/              what lets a process that dies go on: the coordinator's journal, a push log per shard
        checkpoints/        see zml/checkpoint/folder.py

It can be read at any time, by people and by `zml status`. Only `state` is needed to run, and `checkpoints` to resume.
"""

import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from .. import __version__, status
from ..config import Resolved
from ..errors import USAGE, ZmlError
from ..files import read_regular
from ..status import JobStatus

CONFIG = "config.json"
COORDINATOR = "coordinator.json"
EVENTS = "events.jsonl"
NOW = "now.json"
STATUS = "status.json"
LOGS = "logs"
TIMELINE = "timeline"
STATE = "state"
COORDINATOR_STATE = f"{STATE}/coordinator"
# Held by `zml run`, as the other folders in `state` are by their processes.
LAUNCHER_STATE = f"{STATE}/launcher"
CHECKPOINTS = "checkpoints"


class Listening(msgspec.Struct, frozen=True):
    """coordinator.json."""

    addresses: list[str]
    pid: int
    job: str = ""
    http: str = ""  # http://HOST:PORT
    boot: str = ""  # of the machine, as `boot_id` has it


def new_name(script: str, now: float) -> str:
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(script).stem) or "run"
    return f"{time.strftime('%Y-%m-%dT%H-%M-%S', time.localtime(now))}-{stem[:40]}-{secrets.token_hex(2)}"


def create(resolved: Resolved, script: str, args: Sequence[str], *, cpu: bool = False) -> Path:
    """A fresh folder, absolute: the one in the settings, else a new one below `runs`. Raises ZmlError."""
    settings = resolved.settings
    folder = Path(settings.run_dir or Path(settings.runs, new_name(script, time.time()))).absolute()
    if (folder / CONFIG).exists():
        raise ZmlError(USAGE, f"{folder} already holds a run", "Choose another --run-dir, or leave it out.")
    try:
        (folder / LOGS).mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = {
            "zml": __version__,
            "python": sys.version.split()[0],
            "started_at": time.time(),
            "folder": os.getcwd(),
            "script": script,
            "args": list(args),
            "cpu": cpu,
            **resolved.as_json(),
        }
        (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
    except OSError as error:
        raise ZmlError(
            USAGE, f"cannot write to {folder}: {error.strerror}", "Choose another folder with --run-dir."
        ) from None
    return folder


def discard(folder: Path) -> None:
    """Delete a folder that `create` has made for a run that did not begin. What has begun stays."""
    if not (folder / COORDINATOR).exists() and not (folder / STATUS).exists():
        shutil.rmtree(folder, ignore_errors=True)


def shard_state(run_dir: str, shard: int) -> Path:
    """Where a shard keeps its push log: in the run directory, or in one of that name below `runs` where the run
    directory is not on this machine."""
    folder = Path(run_dir)
    if not folder.is_dir():
        folder = Path("runs", folder.name).absolute()
    return folder / STATE / f"p{shard}"


def listening(folder: Path) -> Listening | None:
    """Where the run's coordinator listens; None before it does."""
    try:
        return msgspec.json.decode(read_regular(folder / COORDINATOR), type=Listening)
    except (OSError, ValueError, RecursionError):  # not there, or half written
        return None


def last_status(folder: Path) -> JobStatus | None:
    """How the run ended; None if it has not."""
    return _status(folder / STATUS)


def current_status(folder: Path) -> JobStatus | None:
    """What it was doing a moment ago; None if it has not begun."""
    return _status(folder / NOW)


def newest_status(folder: Path) -> JobStatus | None:
    """How the run ended, or else what it was doing a moment ago; None if it has not begun."""
    return last_status(folder) or current_status(folder)


def _status(path: Path) -> JobStatus | None:
    try:
        return status.decode(read_regular(path))
    except (OSError, ValueError, RecursionError):  # not there, or none of ours
        return None


def write(path: Path, data: bytes) -> None:
    """Whole or not at all, whoever reads meanwhile."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(data)
    os.replace(scratch, path)


def launcher_state(folder: Path) -> Path:
    """Made, if it is not there. Raises ZmlError."""
    try:
        (folder / LAUNCHER_STATE).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZmlError(USAGE, f"cannot write to {folder}: {error.strerror}", "Make room there.") from None
    return folder / LAUNCHER_STATE


def forget_addresses(folder: Path) -> None:
    """Of a coordinator that is gone: the next one finds others."""
    if (here := listening(folder)) is not None:
        gone = msgspec.structs.replace(here, addresses=[], http="")
        write(folder / COORDINATOR, msgspec.json.encode(gone))


def boot_id() -> str:
    """Another one each time that a machine starts (random(4)); empty where that is not told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
