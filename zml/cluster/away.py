"""Where the files of attempts lie on a node that does not see the coordinator's folder.

    CLUSTER/marks/3f2a9c04b1d7e865/                          made once, by the coordinator, and by nobody else
    RUNS/away/3f2a9c04b1d7e865/NODE/jobs/j13/2/logs/...      the run directory of attempt 2 of j13 on such a node

Rule: whoever sees the mark sees the folder. The run directory itself says nothing: it may not be made yet, and a path
of that name may be another one's. What lies here goes a day after the last process of its attempt.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Set
from contextlib import suppress
from pathlib import Path

import structlog

from ..checkpoint.folder import is_seen
from ..errors import USAGE, ZmlError
from ..hold import hold
from ..runs import rundir

MARKS = "marks"
AWAY = "away"
KEPT_S = 24 * 3600.0

log = structlog.get_logger()


def mark_of(folder: Path) -> str:
    """The path of this coordinator's mark; empty where none can be made, and then every node counts as one that sees
    the folder."""
    marks = folder / MARKS
    try:
        marks.mkdir(parents=True, exist_ok=True)
        for name in sorted(os.listdir(marks)):
            if re.fullmatch(r"[0-9a-f]{16}", name):
                return str(marks / name)
        made = marks / secrets.token_hex(8)
        made.mkdir()
        return str(made)
    except OSError as error:
        log.warning("no mark", folder=str(folder), because=str(error))
        return ""


class Away:
    """Of one node, all of it blocking. `shared`: it may see the coordinator's folder."""

    def __init__(self, runs: Path, node: str, *, shared: bool) -> None:
        self.folder = runs.absolute() / AWAY
        self.node = node
        self.shared = shared
        self.held: dict[Path, int] = {}  # what nobody else may tidy up, and the lock on it

    def run_dir(self, attempt: str, there: str, mark: str) -> Path:
        """The coordinator's own, if it is seen; else a folder of this node, which is then made. Raises OSError."""
        if not mark or (self.shared and is_seen(Path(mark))):
            return Path(there)
        home = self.folder / Path(mark).name / self.node
        job, _, number = attempt.rpartition(".")
        path = home / "jobs" / job / number
        (path / rundir.LOGS).mkdir(parents=True, exist_ok=True)
        if home not in self.held:
            with suppress(ZmlError, OSError):  # a former self may still be about to end
                self.held[home] = hold(home, USAGE, "a node's own folder", "Give one of them another --name.")
        self.touch(path)
        return path

    def touch(self, path: Path) -> None:
        """It counts from now on."""
        with suppress(OSError):
            os.utime(path)

    def tidy(self, busy: Set[Path], now: float | None = None) -> None:
        """Delete what has lain long enough, of this node and of those that live no more."""
        before = (time.time() if now is None else now) - KEPT_S
        for home in self.folder.glob("*/*"):
            mine = home in self.held
            try:
                lock = -1 if mine else hold(home, USAGE, "a node's own folder", "")
            except (ZmlError, OSError):
                continue
            try:
                for path in home.glob("jobs/*/*"):
                    if path not in busy and path.stat().st_mtime < before:
                        shutil.rmtree(path, ignore_errors=True)
                        with suppress(OSError):
                            path.parent.rmdir()  # unless other attempts lie there
            except OSError as error:
                log.warning("not tidied up", folder=str(home), because=str(error))
            finally:
                if lock >= 0:
                    os.close(lock)

    def close(self) -> None:
        while self.held:
            os.close(self.held.popitem()[1])
