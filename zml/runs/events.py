"""The run's events: what was decided and why, one JSON line each, in the order in which it happened."""

from __future__ import annotations

import json
import time
from collections import deque
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..scheduler.actions import (
    Action,
    Admit,
    Announce,
    Drain,
    Fence,
    Finish,
    Grow,
    Ignored,
    Initialise,
    Place,
    Refuse,
    Stop,
)
from ..scheduler.explain import counted
from ..status import EventLine

RECENT = 50
ITS_SCRIPT = "its script "  # how a reason begins that is the member's own end
WITHOUT_REASON = frozenset({"Admit"})  # actions whose reason tells people nothing more
_ENCODE = json.JSONEncoder(default=str).encode


class EventLog:
    """Appends to `events.jsonl`; keeps the last few for whoever looks. Without a path it only keeps. Beside an
    action and its fields a line says `what` happened in words; these are empty where it is not worth telling.

    Lines are rare, and a coordinator of many jobs has many of these: the file is open only while one is written."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path is not None:
            path.open("a").close()  # an OSError here is for whoever begins
        self.recent: deque[EventLine] = deque(maxlen=RECENT)
        self.written = 0

    def write(self, action: Action) -> None:
        """`at` is in seconds since the Unix epoch, as in every file of the run directory."""
        if isinstance(action, Ignored):
            return
        at = time.time()
        named = {each.name: getattr(action, each.name) for each in fields(action) if each.name != "placement"}
        line = told(action, at)
        words = {"what": line.what, "member": line.member} if line is not None else {"what": ""}
        self._append({"at": at, "event": type(action).__name__, **named, **words})
        if line is not None:
            self.recent.append(line)

    def note(self, what: str, because: str) -> None:
        """Something that no action says."""
        at = time.time()
        self._append({"at": at, "event": what, "because": because})
        self.recent.append(EventLine(at=at, what=what, because=because))

    def _append(self, line: dict[str, Any]) -> None:
        """Nothing is decided by these lines: a full disk keeps nobody from acting."""
        self.written += 1
        if self.path is not None:
            # Without a buffer, and not as text: a third of the time, and a job that begins writes many.
            with suppress(OSError), open(self.path, "ab", buffering=0) as file:
                file.write(_ENCODE(line).encode() + b"\n")

    def close(self) -> None:
        """Nothing more is written."""
        self.path = None


def told(action: Action, at: float) -> EventLine | None:
    """An action as an event for people; None for those that only follow from another."""
    match action:
        case Admit():
            again = f" again, as incarnation {action.incarnation}" if action.incarnation > 1 else ""
            return EventLine(at=at, what=f"joined{again}", member=action.member)
        case Refuse():
            return EventLine(at=at, what=f"{action.peer} was refused", because=action.because)
        case Announce():
            what = f"generation {action.generation}: {counted(len(action.seats), 'worker')}"
            return EventLine(at=at, what=what, because=action.because)
        case Place():
            chunks, shards = len(action.placement), len(set(action.placement))
            what = f"{counted(chunks, 'chunk')} placed on {counted(shards, 'shard')}"
            return EventLine(at=at, what=what)
        case Grow():
            return EventLine(at=at, what="is one more shard", member=action.shard, because=action.because)
        case Initialise():
            return EventLine(at=at, what="brings the first parameters", member=action.worker)
        case Fence():
            return EventLine(at=at, what="was fenced", member=action.member, because=action.because)
        case Stop() if action.because.startswith(ITS_SCRIPT):
            return None  # it has ended already: whoever tells of it is Announce, or Finish
        case Stop():
            return EventLine(at=at, what="is told to stop", member=action.member, because=action.because)
        case Drain():
            return EventLine(at=at, what="draining", because=action.because)
        case Finish():
            return EventLine(at=at, what=action.state.name.lower(), because=action.because)
    return None
