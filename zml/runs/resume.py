"""`zml resume RUN`: what a run was asked for, and what it goes on from.

A run that was cut off, all of its processes at once, goes on in its own directory: the coordinator's journal and the
shards' push logs have everything that was acknowledged. They lie in the memory of the machine until it writes them to
its disk, so that this holds until the machine itself is started anew.

Otherwise, and wherever something else is asked for, a new run with a directory of its own goes on from the newest
checkpoint that verifies, so that what the first one did stays readable. Whatever is given on the command line wins over
what the first run was asked for: other numbers of workers and shards above all.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.finding import Skip, find, load_from
from ..checkpoint.manifest import RUN_ENDED, Manifest
from ..config import KINDS, Resolved, resolve
from ..errors import NO_CHECKPOINT, USAGE, ZmlError
from ..hold import holder
from ..messages import JobSpec
from .rundir import (
    CHECKPOINTS,
    CONFIG,
    COORDINATOR_STATE,
    EVENTS,
    LAUNCHER_STATE,
    STATE,
    STATUS,
    boot_id,
    listening,
    newest_status,
)

# What belongs to one run and not to the next.
OWN = frozenset({"run_dir", "bind", "coordinator", "resume"})
# With another one of these it is another job, or another place.
ANEW = frozenset({*JobSpec.__struct_fields__, "job", "run_dir"})
# After these, processes that begin anew would not do what is left.
LAST = ('"event": "Drain"', '"event": "Stop"', '"event": "Finish"')
GOING_S = 5.0  # for processes to go whose launcher was killed


class Again(NamedTuple):
    """A run to begin, or to go on with. `folder` is where the first one was started; `cpu`: without GPUs."""

    resolved: Resolved
    script: str
    args: list[str]
    folder: str
    words: str  # what it goes on from
    cpu: bool
    cut_off: Path | None = None  # the directory of the run that goes on in it


def again(run: Path, given: Mapping[str, Any], environment: Mapping[str, str], skip: Skip) -> Again:
    """Read a run and find what it can go on from; `skip` is told of newer checkpoints. Raises ZmlError."""
    run = run.absolute()  # whoever begins it goes to another folder first
    because = ""
    if (run / CONFIG).is_file():  # else it is a checkpoint, or a folder of them
        if held := _still_held(run):
            fix = "End it; or name one of its checkpoints, for a new run from there."
            raise ZmlError(USAGE, f"{run} goes on: {held}", fix)
        if not (because := why_not_there(run, given)):
            return _where_it_stood(run, given, environment)
    try:
        place = find(run)
        checkpoint = load_from(place, skip)
    except ZmlError as error:
        if error.code == NO_CHECKPOINT and because:
            fix = f"Nor can it go on where it stood: {because}."
            raise ZmlError(NO_CHECKPOINT, error.what, fix) from None
        raise
    config = (place.root.parent if place.root.name == CHECKPOINTS else run) / CONFIG
    about = _About.read(config)
    flags = about.flags()
    if (
        "lr_scaling" in flags and "workers" in given
    ):  # the script's rate is still meant for what was asked for first
        flags.setdefault("lr_base_workers", about.settings["workers"])
    flags |= {**given, "resume": str(checkpoint.path.absolute())}
    last = newest_status(config.parent)
    words = in_words(checkpoint.manifest, last.epochs if last is not None else 0)
    return Again(resolve(flags, environment), about.script, about.args, about.folder, words, about.cpu)


def _where_it_stood(run: Path, given: Mapping[str, Any], environment: Mapping[str, str]) -> Again:
    about = _About.read(run / CONFIG)
    flags = {**about.flags(), **given, "run_dir": str(run), "resume": about.settings.get("resume", "")}
    words = f"{run.name} where it was cut off, from its journal and push logs"
    resolved = resolve(flags, environment)
    return Again(resolved, about.script, about.args, about.folder, words, about.cpu, cut_off=run)


def why_not_there(run: Path, given: Mapping[str, Any]) -> str:
    """Why a run cannot go on in its own directory, where it stood; empty if it can."""
    if (run / STATUS).exists():
        return "it came to its end"
    if changed := sorted(ANEW & given.keys()):
        return f"{changed[0]} is asked for anew"
    listened = listening(run)
    if listened is None or not (run / COORDINATOR_STATE).is_dir():
        return "its coordinator has left nothing"
    if not (run / LAUNCHER_STATE).is_dir():
        return "it was not `zml run` that had started it"
    events = _events(run)
    if any(last in events for last in LAST):
        return "it was being stopped, or some of it had come to its end"
    if listened.boot != boot_id() or not listened.boot:
        return "this machine was started anew since, or it was another one"
    shards = _About.read(run / CONFIG).settings["shards"]
    kept = {path.name for path in (run / STATE).glob("p*")}
    if kept != {f"p{shard}" for shard in range(shards)}:
        return "not each of its shards has left a push log there, or it had more than were asked for"
    return ""


def advice(run: Path, *, saved: bool) -> str:
    """What to do with a run whose processes are gone; empty where nothing is left of it."""
    if not why_not_there(run, {}):
        return f"`zml resume {run.name}` goes on where it stood."
    return f"`zml resume {run.name}` goes on from the newest checkpoint." if saved else ""


def _still_held(run: Path) -> str:
    """Which of its processes is alive, in words; those whose launcher was killed have a moment to go."""
    until = time.monotonic() + GOING_S
    while not (run / STATUS).exists():
        held = {folder.name: by for folder in (run / STATE).glob("*") if (by := holder(folder))}
        if not held:
            return ""
        if time.monotonic() > until:
            name, by = min(held.items())
            return f"its {name} is {by}"
        time.sleep(0.05)
    return ""


def _events(run: Path) -> str:
    try:
        return (run / EVENTS).read_text(errors="replace")
    except OSError:
        return ""


class _About(NamedTuple):
    """What config.json says of a run."""

    script: str
    args: list[str]
    folder: str
    cpu: bool
    settings: dict[str, Any]
    origins: dict[str, str]

    @classmethod
    def read(cls, config: Path) -> "_About":
        try:
            about = json.loads(config.read_text())
            args = [str(arg) for arg in about["args"]]
            return cls(
                str(about["script"]),
                args,
                str(about["folder"]),
                about.get("cpu") is True,
                dict(about["settings"]),
                dict(about["origins"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ZmlError(
                USAGE,
                f"{config} does not say what the run was: {error}",
                "Start it with `zml run --resume CHECKPOINT SCRIPT ...`.",
            ) from None

    def flags(self) -> dict[str, Any]:
        """What was asked for, as flags are given."""
        return {
            key: "async" if key == "staleness" and value is None else value
            for key, value in self.settings.items()
            if key in KINDS
            and key not in OWN
            and self.origins.get(key) != "default"
            # What the environment of the first run asked for, this one's may not.
            and not str(self.origins.get(key)).startswith("OTEL_")
        }


def in_words(manifest: Manifest, epochs: int = 0) -> str:
    """Where a run goes on: "at step 54, in epoch 2 of 200 (checkpoint taken when the run ended)"."""
    number, of = manifest.epoch + 1, f" of {epochs}" if epochs else ""
    where = f"in epoch {number}{of}" if not epochs or number <= epochs else f"after epoch {epochs}{of}"
    why = f": {manifest.because}"
    if manifest.because == RUN_ENDED:
        why = " when the run ended"
    elif manifest.because.startswith("every "):
        why = f" {manifest.because}"
    return f"at step {manifest.step:,}, {where} (checkpoint taken{why})"
