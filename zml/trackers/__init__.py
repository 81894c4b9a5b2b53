"""Trackers: where the numbers of a run go beside zml's own files. TensorBoard by default; W&B, MLflow, and others'.

A tracker is three methods. It is made and called in a thread of its own beside the coordinator, never in a worker, and
nothing waits for it: where it is slow it is told less, where it raises it is told nothing more, and the run goes on.

    class Printer(zml.trackers.Tracker):                  # trackers = ["my_package.printer:Printer"] in zml.toml
        def log(self, step, values):
            print(step, values["loss"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """The run that is tracked."""

    name: str  # of its run directory
    key: str  # the same whenever this run's coordinator is started again, and of no other run
    folder: Path  # its run directory
    script: str = ""
    args: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)  # of zml, as in config.json
    first_step: int = 0  # that the runs before had made, of which this one is the continuation
    again: bool = False  # it had begun before: its coordinator was started again


class Tracker:
    """What a tracker may do; each method may be left out. It is made without arguments."""

    def begin(self, run: RunInfo) -> None:
        """Before anything else, once."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers as they stand after `step` steps, which never falls, also not where a run is resumed. What the script
        logs has the script's names, the rest begins with "zml/". NaN stands for whatever is not finite."""

    def end(self, status: str) -> None:
        """The job has ended so: SUCCEEDED, FAILED or CANCELLED; or the coordinator has, and may come again: then
        `status` is another state, such as RUNNING. Nothing comes after it."""
