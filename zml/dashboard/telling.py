"""Lines of events.jsonl as people read them: the same words that the console uses, with the reason beside."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from ..files import open_regular
from .views import Event, Events, Tone

MOST = 2000  # shown
MOST_BYTES = 4 * 2**20  # of the file's end
TONE: dict[str, Tone] = {
    "Admit": "good",
    "Refuse": "warn",
    "Fence": "bad",
    "Drain": "warn",
    "Place": "quiet",
    "Announce": "quiet",
    "Initialise": "quiet",
    "Stop": "quiet",
}


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
        if not follows(str(said.get("event", ""))):
            events.append(event(said))
    return Events(events=events[-MOST:], left_out=begin > 0 or len(events) > MOST)


def follows(kind: str) -> bool:
    """An order that only follows from another, as `runs.events.told` has it: people are not told. Notes are
    sentences."""
    return kind.isidentifier() and kind[:1].isupper() and kind not in TONE and kind != "Finish"


def event(said: dict[str, Any]) -> Event:
    kind = str(said.get("event", ""))[:200]
    member = said.get("member") or said.get("worker") or ""
    because = said.get("because")
    at = said.get("at")
    tone = TONE.get(kind, "quiet")
    state = str(said.get("state", "")).rpartition(".")[2]
    if kind == "Finish":
        tone = {"SUCCEEDED": "good", "CANCELLED": "warn"}.get(state, "bad")  # type: ignore[assignment]
    elif kind == "Admit" and number(said.get("incarnation")) > 1:
        tone = "warn"
    return Event(
        at=float(at) if isinstance(at, int | float) else 0.0,
        what=words(kind, said, state),
        member=str(member)[:80],
        because=str(because)[:2000] if because else "",
        tone=tone,
        kind=kind if kind in TONE or kind == "Finish" else "",
    )


def number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def words(kind: str, said: dict[str, Any], state: str) -> str:
    match kind:
        case "Admit":
            again = number(said.get("incarnation"))
            return f"joined again, as incarnation {again}" if again > 1 else "joined"
        case "Refuse":
            return f"{str(said.get('peer', 'somebody'))[:80]} was refused"
        case "Announce":
            seats = said.get("seats")
            count = len(seats) if isinstance(seats, list) else 0
            return f"generation {number(said.get('generation'))}: {count} worker{'' if count == 1 else 's'}"
        case "Place":
            return "chunks were placed on shards"
        case "Initialise":
            return "brings the first parameters"
        case "Fence":
            return "was fenced"
        case "Stop":
            return "is told to stop"
        case "Drain":
            return "draining"
        case "Finish":
            return state.lower().replace("_", " ") or "over"
    return kind
