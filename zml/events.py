"""The run's events: what was decided and why, one JSON line each, in the order in which it happened."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .scheduler.actions import Action

RECENT = 50


class EventLog:
    """Appends to `events.jsonl`; keeps the last few for `zml status`. Without a path it only keeps."""

    def __init__(self, path: Path | None) -> None:
        self.file = path.open("a", buffering=1) if path is not None else None
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)

    def write(self, action: Action) -> None:
        fields = {name: value for name, value in asdict(action).items() if name != "placement"}
        line = {"time": now(), "event": type(action).__name__, **fields}
        self.recent.append(line)
        if self.file is not None:
            self.file.write(json.dumps(line, default=str) + "\n")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
