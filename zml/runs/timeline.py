"""The steps that workers have written to `timeline/` of the run directory, one JSON line each: where its time went.
`worker.timeline` measures and writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from ..figures import PHASES

TOO_FAR = 5.0  # steps; where workers began a step further apart, one axis would show nothing else


class Step(msgspec.Struct, frozen=True):
    """One line of the file. Seconds and bytes; `at` is seconds since the worker's first step, and `began` the same
    moment since the Unix epoch, by the clock of the worker's machine; 0 in files that do not have it."""

    clock: int
    at: float
    compute: float
    encode: float
    wait: float
    apply: float
    send: float
    pull: float
    bytes_up: int
    bytes_down: int
    data: float = 0.0  # older files have it in `compute`

    began: float = 0.0  # seconds since the Unix epoch; older files do not say

    @property
    def whole(self) -> float:
        return sum(self.thread().values())

    def thread(self) -> dict[str, float]:
        """Seconds of the training thread, by phase."""
        return {phase: getattr(self, phase) for phase in PHASES}


def starts(began: Mapping[str, float], longest: float) -> tuple[dict[str, float], str]:
    """Where each worker's step lies on one axis, in seconds from the first, and why they are on none, if so. `began` is
    in seconds since the Unix epoch, by worker; `longest` is the longest of these steps."""
    first = min(began.values(), default=0.0)
    apart = max(began.values(), default=0.0) - first
    if first <= 0:
        return dict.fromkeys(began, 0.0), "these files do not say when steps began"
    if apart > TOO_FAR * longest:
        return dict.fromkeys(began, 0.0), f"they began up to {span(apart)} apart"
    return {worker: at - first for worker, at in began.items()}, ""


def span(seconds: float) -> str:
    """12.3 ms, 1.23 s"""
    return f"{1e3 * seconds:,.1f} ms" if seconds < 0.99995 else f"{seconds:,.2f} s"


def read(path: Path) -> list[Step]:
    """The steps of a file; a torn last line is passed over."""
    steps = []
    for line in path.read_bytes().splitlines():
        try:
            steps.append(msgspec.json.decode(line, type=Step))
        except msgspec.MsgspecError:
            continue
    return steps
