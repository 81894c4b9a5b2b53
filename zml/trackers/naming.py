"""Trackers by name: those that zml brings, and others' as package.module:Class.

Rule: a name is code that will run, so it comes only from whoever starts the coordinator: its flags, variables and
zml.toml. What a submitted job says never gets here (`cluster.jobfile`).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from collections.abc import Sequence

from ..errors import CONFIG, TRACKER, ZmlError
from . import Tracker

OWN = {
    "tensorboard": "zml.trackers.tensorboard:TensorBoard",
    "wandb": "zml.trackers.wandb:WandB",
    "mlflow": "zml.trackers.mlflow:MLflow",
}
NEEDS = {
    "wandb": "wandb",
    "mlflow": "mlflow",
}  # the module that must be there, and the distribution that brings it
NONE = "none"
PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def checked(names: Sequence[str], place: str, code: str = CONFIG) -> list[str]:
    """The names, each once; "none" alone is no tracker at all. Raises ZmlError for what is no name of a tracker."""
    if list(names) == [NONE]:
        return []
    for name in names:
        if name in OWN or PATH.fullmatch(name):
            continue
        near = difflib.get_close_matches(name, [*OWN, NONE], n=1, cutoff=0.5)
        if name == NONE:
            fix = f"Write {NONE} alone."
        else:
            fix = (
                f"Did you mean {near[0]}?"
                if near
                else f"Choose {', '.join(OWN)}, {NONE} or package.module:Class."
            )
        raise ZmlError(code, f"{place}: there is no tracker {name[:60]!r}", fix)
    return list(dict.fromkeys(names))


def must_be_here(names: Sequence[str]) -> None:
    """Raises ZmlError where one needs a package that is not installed. Imports nothing of theirs."""
    for name in names:
        module = NEEDS.get(name)
        if module is not None and importlib.util.find_spec(module) is None:
            what = f"the tracker {name} needs the package {module}, which is not installed here"
            raise ZmlError(
                TRACKER, what, f"Install it beside zml with `pip install {module}`, or leave it out."
            )


def make(names: Sequence[str]) -> list[tuple[str, Tracker]]:
    """One of each. Raises ZmlError where one cannot be had: at the start, and not hours into a run."""
    must_be_here(names)
    return [(name, _made(name)) for name in names]


def _made(name: str) -> Tracker:
    module, _, called = OWN.get(name, name).partition(":")
    try:
        kind = getattr(importlib.import_module(module), called)
        found = kind()
    except Exception as error:  # whatever a stranger's module may raise
        what = f"the tracker {name} cannot be made: {type(error).__name__}: {error}"
        raise ZmlError(
            TRACKER, what, "Install its package beside zml, or add its folder to PYTHONPATH, or leave it out."
        ) from None
    lacking = [each for each in ("begin", "log", "end") if not callable(getattr(found, each, None))]
    if lacking:
        what = f"the tracker {name} has no method {lacking[0]}"
        raise ZmlError(TRACKER, what, "Derive it from zml.trackers.Tracker.")
    made: Tracker = found
    return made
