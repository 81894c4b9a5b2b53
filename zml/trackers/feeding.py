"""Feeding trackers: each has a thread and a short queue of its own, so that none waits for another, nor a run for any.

Rules: a full queue loses its oldest entry, and counts it. What a tracker raises is its last word: one line in the log
names it, and it is told nothing more. At the end each has `END_S` seconds to finish; whoever needs longer is left
behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import structlog

from ..runs import rundir
from ..status import JobStatus
from . import RunInfo, Tracker
from .values import Axis, numbers, steps

QUEUE = 64  # two minutes of a run
END_S = 15.0
AXIS = f"{rundir.STATE}/trackers.json"

log = structlog.get_logger()


class Feed:
    """One tracker's thread."""

    def __init__(self, name: str, tracker: Tracker, run: RunInfo) -> None:
        self.name = name
        self.tracker = tracker
        self.run = run
        self.waiting: deque[tuple[int, Mapping[str, float]]] = deque()  # not yet told, at most QUEUE
        self.dropped = 0
        self.status: str | None = None  # with which it ends; None: it does not yet
        self.failed = False
        self.turn = threading.Condition()
        self.thread = threading.Thread(target=self._main, name=f"tracker {name}", daemon=True)

    def tell(self, step: int, values: Mapping[str, float]) -> None:
        """Never waits for the tracker."""
        with self.turn:
            if self.failed or self.status is not None:
                return
            if len(self.waiting) >= QUEUE:
                self.waiting.popleft()
                self.dropped += 1
            self.waiting.append((step, values))
            self.turn.notify()

    def end(self, status: str) -> None:
        """After what waits. Twice is the same as once."""
        with self.turn:
            if self.status is None:
                self.status = status
            self.turn.notify()

    def _main(self) -> None:
        try:
            self.tracker.begin(self.run)
            while (entry := self._next()) is not None:
                self.tracker.log(*entry)
            self.tracker.end(self.status or "")
        except BaseException as error:  # SystemExit of a stranger, too
            with self.turn:
                self.failed = True
                self.waiting.clear()
            log.warning(
                "a tracker has failed and is told nothing more",
                tracker=self.name,
                because=f"{type(error).__name__}: {error}",
            )

    def _next(self) -> tuple[int, Mapping[str, float]] | None:
        with self.turn:
            while not self.waiting:
                if self.status is not None:
                    return None
                self.turn.wait()
            return self.waiting.popleft()


class Feeds:
    """All trackers of one run. `follow` is the recorder's."""

    def __init__(self, trackers: Sequence[tuple[str, Tracker]], run: RunInfo) -> None:
        self.run = run
        self.feeds = [Feed(name, tracker, run) for name, tracker in trackers]
        self.axis = read_axis(run.folder, run.first_step)
        self.last: tuple[int, Mapping[str, float | None]] = (-1, {})  # what was told, and at which step
        self.state = ""
        for feed in self.feeds:
            feed.thread.start()

    def follow(self, status: JobStatus) -> None:
        """A status of the job. Nothing is told before the first step, nor the same twice; but a script may
        log something more after its last step."""
        self.state = status.state
        made = steps(status)
        if not self.feeds or made <= 0:
            return
        step = self.axis.advance(made)
        another = self.axis.checkpointed(status.checkpoint.step)
        anything = self.last != (step, status.values)
        if anything or another:
            write_axis(self.run.folder, self.axis)
        if not anything:
            return
        self.last = step, status.values
        values = numbers(status)
        for feed in self.feeds:
            feed.tell(step, values)

    def stop(self, within_s: float = END_S) -> None:
        """End all, and wait so long at most. May be called twice."""
        until = time.monotonic() + within_s
        for feed in self.feeds:
            feed.end(self.state)
        for feed in self.feeds:
            feed.thread.join(max(0.0, until - time.monotonic()))
            if feed.thread.is_alive():
                log.warning(
                    "a tracker does not end, and is left behind", tracker=feed.name, waited_s=within_s
                )
            if feed.dropped:
                log.warning("a tracker was too slow for some values", tracker=feed.name, dropped=feed.dropped)


def read_axis(folder: Path, first_step: int) -> Axis:
    """Where it was when this run's coordinator was started before; else at its beginning."""
    with suppress(OSError, msgspec.MsgspecError):
        return msgspec.json.decode((folder / AXIS).read_bytes(), type=Axis)
    return Axis(step=first_step)


def first_step(checkpoint: str, number: int) -> int:
    """Where the axis of a run begins that goes on from this checkpoint, which has this number: there where the run
    before was. A checkpoint that was copied out of its run tells no more than its number; "" is none."""
    if not checkpoint:
        return 0
    return read_axis(Path(checkpoint).parent.parent, 0).checkpoints.get(number, number)


def write_axis(folder: Path, axis: Axis) -> None:
    with suppress(OSError):  # then a coordinator that is started again goes on a little before
        (folder / AXIS).parent.mkdir(parents=True, exist_ok=True)
        rundir.write(folder / AXIS, msgspec.json.encode(axis))


def run_info(folder: Path, first_step: int) -> RunInfo:
    """What config.json of a run directory says."""
    about: dict[str, object] = {}
    with suppress(OSError, ValueError):
        found = json.loads((folder / rundir.CONFIG).read_text())
        about = found if isinstance(found, dict) else {}
    settings, args = about.get("settings"), about.get("args")
    identity = f"{os.path.realpath(folder)} {about.get('started_at')}"
    return RunInfo(
        name=folder.name,
        key=f"{folder.name[:40]}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}",
        folder=folder,
        script=str(about.get("script", "")),
        args=[str(each) for each in args] if isinstance(args, list) else [],
        settings=settings if isinstance(settings, dict) else {},
        first_step=first_step,
        again=(folder / AXIS).exists(),
    )
