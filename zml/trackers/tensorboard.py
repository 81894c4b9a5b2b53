"""TensorBoard: event files in RUN/tensorboard, for `tensorboard --logdir runs`, which lists every run below it.

Rule: a long run's files stay small. Of the first `EVENLY` sets of values all are written, of the next `EVENLY` places
every other, then every fourth, and so on: their number grows with the logarithm of the run's length. What is written
cannot be thinned out afterwards, as zml's own history is, because TensorBoard reads on from where it was.
"""

from __future__ import annotations

import os
import shlex
import socket
import time
from collections.abc import Mapping
from io import FileIO

from . import RunInfo, Tracker
from .event_file import beginning, scalars, words

FOLDER = "tensorboard"
EVENLY = 4000  # at one every two seconds, the first two hours


class Cadence:
    """Which of many things to keep: all of the first, and ever fewer."""

    def __init__(self, evenly: int = EVENLY) -> None:
        self.evenly = evenly
        self.every = 1
        self.came = self.kept = 0

    def keeps(self) -> bool:
        self.came += 1
        keep = self.came % self.every == 0
        self.kept += keep
        if self.kept >= self.evenly:
            self.every, self.kept, self.came = self.every * 2, 0, 0
        return keep


class TensorBoard(Tracker):
    """One event file for each process that is the run's coordinator; TensorBoard reads them as one."""

    def __init__(self) -> None:
        self.file: FileIO | None = None
        self.cadence = Cadence()
        self.left: tuple[int, Mapping[str, float]] | None = (
            None  # the newest values, where they were not written
        )

    def begin(self, run: RunInfo) -> None:
        folder = run.folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{int(now):010}.{socket.gethostname()}.{os.getpid()}.zml"
        self.file = (folder / name).open("ab", buffering=0)
        self.file.write(beginning(now))
        if not run.again:
            self.file.write(words(now, run.first_step, {"settings": settings(run)}))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self.cadence.keeps():
            self._write(step, values)
            self.left = None
        else:
            self.left = step, values

    def end(self, status: str) -> None:
        """With the last values, whatever was left out before."""
        if self.left is not None:
            self._write(*self.left)
            self.left = None
        if self.file is not None:
            self.file.close()

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        assert self.file is not None, "begin() comes first"
        self.file.write(scalars(time.time(), step, values))


def settings(run: RunInfo) -> str:
    """What the run was asked for, as Markdown."""
    lines = ["| setting | value |", "|---|---|", f"| script | {cell(shlex.join([run.script, *run.args]))} |"]
    lines += [f"| {cell(name)} | {cell(str(value))} |" for name, value in run.settings.items()]
    return "\n".join(lines)


def cell(said: str) -> str:
    """Within a row of a table, as it is."""
    plain = "".join(c if c.isprintable() else " " for c in said).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`" if plain.strip() else ""
