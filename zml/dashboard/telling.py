"""Lines of events.jsonl as people read them: in the words that stand there, which the console uses too, with the reason
beside and a tone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from ..files import open_regular
from ..runs.events import WITHOUT_REASON
from .views import Event, Events, Tone

MOST = 2000  # shown
MOST_BYTES = 4 * 2**20  # of the file's end
TONE: dict[str, Tone] = {
    "Admit": "good",
    "Refuse": "warn",
    "Grow": "good",
    "Fence": "bad",
    "Drain": "warn",
    "Place": "quiet",
    "Announce": "quiet",
    "Initialise": "quiet",
    "Stop": "quiet",
}
FINISH: dict[str, Tone] = {"SUCCEEDED": "good", "CANCELLED": "warn"}


def read(path: Path) -> Events:
    """The newest, the oldest first."""
    try:
        file = open_regular(str(path))
    except OSError:
        return Events(events=[], left_out=False)
    try:
        size = os.fstat(file).st_size
        begin = max(0, size - MOST_BYTES)
        lines = os.pread(file, size - begin, begin).split(b"\n")
    finally:
        os.close(file)
    events = []
    for line in lines[1 if begin else 0 :]:
        try:
            said = msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError):
            continue
        if (told := event(said)).what:
            events.append(told)
    return Events(events=events[-MOST:], left_out=begin > 0 or len(events) > MOST)


def event(said: dict[str, Any]) -> Event:
    """Without words where it only follows from another, and people are not told. A note is a sentence itself."""
    kind = str(said.get("event", ""))[:200]
    what = said.get("what", kind)
    member = said.get("member") or said.get("worker") or ""
    because = "" if kind in WITHOUT_REASON else said.get("because")
    at = said.get("at")
    return Event(
        at=float(at) if isinstance(at, int | float) else 0.0,
        what=str(what or "")[:200],
        member=str(member)[:80],
        because=str(because)[:2000] if because else "",
        tone=tone(kind, said),
        kind=kind if kind in TONE or kind == "Finish" else "",
    )


def tone(kind: str, said: dict[str, Any]) -> Tone:
    incarnation = said.get("incarnation")
    if kind == "Finish":
        state = str(said.get("state", "")).rpartition(".")[2]
        return FINISH.get(state, "bad")
    if kind == "Admit" and isinstance(incarnation, int) and incarnation > 1:
        return "warn"
    return TONE.get(kind, "quiet")
