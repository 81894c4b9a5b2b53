"""`zml resume RUN`: what a run was asked for, and the checkpoint that it goes on from.

The new run is one of its own, with a directory of its own, so that what the first one did stays readable. Whatever is
given on the command line wins over what the first run was asked for: other numbers of workers and shards above all.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.finding import find, load_from
from ..checkpoint.manifest import RUN_ENDED, Manifest
from ..config import KINDS, Resolved, resolve
from ..errors import USAGE, ZmlError
from .rundir import CHECKPOINTS, CONFIG, newest_status

# What belongs to one run and not to the next.
OWN = frozenset({"run_dir", "bind", "coordinator", "resume"})


class Again(NamedTuple):
    """A run to begin. `folder` is where the first one was started; `checkpoint` in words; `cpu`: without GPUs."""

    resolved: Resolved
    script: str
    args: list[str]
    folder: str
    checkpoint: str
    cpu: bool


def again(run: Path, given: Mapping[str, Any], environment: Mapping[str, str]) -> Again:
    """Read a run and find its newest checkpoint that verifies. Raises ZmlError."""
    place = find(run)
    checkpoint = load_from(place)
    config = place.root.parent / CONFIG if place.root.name == CHECKPOINTS else run / CONFIG
    try:
        about = json.loads(config.read_text())
        settings, origins = about["settings"], about["origins"]
        script, args, folder = str(about["script"]), [str(arg) for arg in about["args"]], str(about["folder"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ZmlError(
            USAGE,
            f"{config} does not say what the run was: {error}",
            "Start it with `zml run --resume CHECKPOINT SCRIPT ...`.",
        ) from None
    flags = {
        key: "async" if key == "staleness" and value is None else value
        for key, value in settings.items()
        if key in KINDS
        and key not in OWN
        and origins.get(key) != "default"
        # What the environment of the first run asked for, this one's may not.
        and not str(origins.get(key)).startswith("OTEL_")
    }
    if (
        "lr_scaling" in flags and "workers" in given
    ):  # the script's rate is still meant for what was asked for first
        flags.setdefault("lr_base_workers", settings["workers"])
    flags |= {**given, "resume": str(checkpoint.path.absolute())}
    last = newest_status(config.parent)
    words = in_words(checkpoint.manifest, last.epochs if last is not None else 0)
    return Again(resolve(flags, environment), script, args, folder, words, about.get("cpu") is True)


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
