"""TensorBoard: event files in RUN/tensorboard, for `tensorboard --logdir runs`, which lists every run below it.

Rule: a long run's files stay small. Of the first `EVENLY` sets of values all are written, of the next `EVENLY` places
every other, then every fourth, and so on: their number grows with the logarithm of the run's length. What is written
cannot be thinned out afterwards, as zml's own history is, because TensorBoard reads on from where it was.

A full disk ends nothing: half a record is cut off again, for a reader stops there for good, and the newest values are
tried with the next ones. Only a file that cannot be begun is an error.
"""

from __future__ import annotations

import errno
import os
import shlex
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO

import structlog

from ..text.ansi import printable
from . import RunInfo, Tracker
from .event_file import beginning, scalars, words

FOLDER = "tensorboard"
EVENLY = 4000  # at one every two seconds, the first two hours

log = structlog.get_logger()


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
        self.end_at = 0  # of the whole records
        self.failing = False  # the newest values could not be written
        self.cadence = Cadence()
        # The newest values, where they are not written.
        self.left: tuple[int, Mapping[str, float]] | None = None

    def begin(self, run: RunInfo) -> None:
        folder = run.folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{int(now):010}.{socket.gethostname()}.{os.getpid()}.zml"
        self.file = (folder / name).open("ab", buffering=0)
        self.end_at = self.file.tell()
        head = beginning(now)
        if not run.again:
            head += words(now, run.first_step, {"settings": settings(run)})
        self._append(head)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        due = self.cadence.keeps() or self.failing
        self.left = step, values
        if due:
            self._write()

    def end(self, status: str) -> None:
        """With the last values, whatever was left out before."""
        self._write()
        if self.file is not None:
            with suppress(OSError):  # some file systems tell only now that they are full
                self.file.close()

    def _write(self) -> None:
        """What is left, where there is room for it."""
        if self.left is None:
            return
        try:
            self._append(scalars(time.time(), *self.left))
        except OSError as error:
            if not self.failing:
                log.warning("TensorBoard's file lacks values", because=error.strerror or str(error))
            self.failing = True
        else:
            self.failing, self.left = False, None

    def _append(self, records: bytes) -> None:
        """All of it or nothing. Raises OSError."""
        assert self.file is not None, "begin() comes first"
        if self.failing:
            self.file.truncate(self.end_at)  # what could not be cut off before
        written = 0
        try:
            while written < len(records):  # a disk takes what it has room for, and refuses only the rest
                if not (taken := self.file.write(records[written:])):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                written += taken
        except OSError:
            with suppress(OSError):
                self.file.truncate(self.end_at)
            raise
        self.end_at += written


def settings(run: RunInfo) -> str:
    """What the run was asked for, as Markdown."""
    lines = ["| setting | value |", "|---|---|", f"| script | {cell(shlex.join([run.script, *run.args]))} |"]
    lines += [f"| {cell(name)} | {cell(str(value))} |" for name, value in run.settings.items()]
    return "\n".join(lines)


def cell(said: str) -> str:
    """Within a row of a table, as it is."""
    plain = printable(said).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`" if plain.strip() else ""
