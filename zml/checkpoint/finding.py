"""From what a person names to a checkpoint: a run, its `checkpoints` folder, or one checkpoint in it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..errors import NO_CHECKPOINT, USAGE, ZmlError
from ..runs.rundir import CHECKPOINTS, CONFIG
from .folder import MANIFEST, entries, entry
from .reading import Checkpoint, Skipped, read, whole

Skip = Callable[[Skipped], object]


class Place(NamedTuple):
    """A `checkpoints` folder, and which one in it, if one was named."""

    root: Path
    one: Path | None = None


def find(path: Path) -> Place:
    """Raises ZmlError where there are no checkpoints."""
    if (path / MANIFEST).is_file() or (entry(path.name) is not None and path.is_dir()):
        return Place(path.parent, path)
    for root in (path / CHECKPOINTS, path):
        if root.is_dir() and (root.name == CHECKPOINTS or entries(root)):
            return Place(root)
    if (path / CONFIG).is_file():
        raise ZmlError(NO_CHECKPOINT, f"the run {path} has no checkpoint", "Its events say what it did.")
    raise ZmlError(
        USAGE, f"{path} is neither a run nor a checkpoint", "`zml runs` lists the runs of this folder."
    )


def load_from(place: Place, skip: Skip, deep: bool = True) -> Checkpoint:
    """The checkpoint that is named, or the newest that verifies; `skip` is told which newer ones do not, for whoever
    goes on from it is to know.

    Raises BadCheckpoint for the one that is named, and ZmlError if none verifies.
    """
    if place.one is not None:
        return read(place.one, deep)
    skipped: list[Skipped] = []
    found = next(whole(place.root, skipped, deep), None)
    for each in skipped:
        skip(each)
    if found is not None:
        return found
    count = len(skipped)
    why = f"none of the {count} checkpoints in {place.root} is whole" if count else f"{place.root} is empty"
    raise ZmlError(NO_CHECKPOINT, why)
