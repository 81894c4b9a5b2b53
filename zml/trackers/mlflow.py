"""MLflow, where its package is installed (mlflow-skinny will do). Its own variables hold: MLFLOW_TRACKING_URI,
MLFLOW_EXPERIMENT_NAME and the others (mlflow.org/docs/latest, "mlflow.environment_variables"). Without a server it
writes to files of the working folder.

A coordinator that is started again goes on with the same MLflow run, whose id stands in RUN/state/mlflow.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ..runs import rundir
from . import RunInfo, Tracker

RUN_ID = f"{rundir.STATE}/mlflow"
FORBIDDEN = re.compile(r"[^\w\-./ :]")  # in a metric's name
LONGEST = 250  # characters of a name
LONGEST_VALUE = 500  # of a parameter, in every version
ENDS = {"SUCCEEDED": "FINISHED", "FAILED": "FAILED", "CANCELLED": "KILLED"}


class MLflow(Tracker):
    def __init__(self) -> None:
        self.module: Any = importlib.import_module("mlflow")

    def begin(self, run: RunInfo) -> None:
        path = run.folder / RUN_ID
        former = ""
        with suppress(OSError):  # of the file alone: where the server cannot be reached, nothing new begins
            former = path.read_text().strip()
        if former:
            self.module.start_run(run_id=former)
            return
        tags = {"zml.run_dir": str(run.folder), "zml.script": run.script}
        started = self.module.start_run(run_name=run.name, tags=tags)
        params = {**run.settings, "args": " ".join(run.args)}
        self.module.log_params({name: str(value)[:LONGEST_VALUE] for name, value in params.items()})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{started.info.run_id}\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.module.log_metrics({named(name): value for name, value in values.items()}, step=step)

    def end(self, status: str) -> None:
        """Where only the coordinator ends, the run is left open for the next."""
        if status in ENDS:
            self.module.end_run(ENDS[status])


def named(name: str) -> str:
    """As MLflow takes it."""
    return FORBIDDEN.sub("_", name)[:LONGEST]
