"""Weights & Biases, where its package is installed. Its own variables hold: WANDB_PROJECT, WANDB_MODE=offline,
WANDB_DIR, WANDB_API_KEY and the others (docs.wandb.ai/guides/track/environment-variables).

A coordinator that is started again goes on with the same W&B run.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from . import RunInfo, Tracker

WRONG = ("FAILED", "CANCELLED")


class WandB(Tracker):
    def __init__(self) -> None:
        self.module: Any = importlib.import_module("wandb")
        self.run: Any = None

    def begin(self, run: RunInfo) -> None:
        # Its console capture would take the coordinator's standard output away.
        quiet = self.module.Settings(console="off", silent=True)
        self.run = self.module.init(
            id=run.key,
            name=run.name,
            resume="allow",
            config={**run.settings, "script": run.script, "args": list(run.args), "run_dir": str(run.folder)},
            settings=quiet,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def end(self, status: str) -> None:
        """Where only the coordinator ends, nothing has gone wrong."""
        self.run.finish(exit_code=1 if status in WRONG else 0)
