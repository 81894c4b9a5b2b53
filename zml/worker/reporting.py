"""What a worker's script counts of itself, and how it says so: to the coordinator and to its agent, every half second.

A step costs two additions and two searches in a dozen numbers; everything else is read when a report is due, and what
asks the system for something (how much memory the process takes) does so in the I/O thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from .. import gpu
from ..agent.tally import ScriptTally
from ..figures import STALENESS_BOUNDS, STEP_BOUNDS_S, WorkerFigures, count, none_yet
from ..iothread import IoThread
from ..metrics.process import cpu_seconds, open_files, resident_bytes
from .auto import Auto
from .client import Client
from .script import number
from .timeline import Timeline

if TYPE_CHECKING:
    import torch

REPORT_S = 0.5
VALUES_BYTES = 2000  # of what a script logs, in a report; its header has 4,096, and figures take up to 950

log = structlog.get_logger()


class Meter:
    """Of one script's process, from its start. Belongs to the training thread."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.steps = 0  # clocks also count the steps of an epoch that others made
        self.samples = 0
        self.left_out = 0
        self.step_s = none_yet(STEP_BOUNDS_S)
        self.step_sum_s = 0.0
        self.staleness = none_yet(STALENESS_BOUNDS)
        self.staleness_sum = 0

    def stepped(self, staleness: int) -> None:
        """The script's optimizer has made a step; with local steps, each of them counts."""
        self.steps += 1
        now, before = time.perf_counter(), self.timeline.stepped_at
        self.timeline.stepped_at = now
        if before is not None:
            self.step_sum_s += now - before
            count(self.step_s, STEP_BOUNDS_S, now - before)
        self.staleness_sum += staleness
        count(self.staleness, STALENESS_BOUNDS, staleness)

    def figures(self, learning_rate: float | None, compress: str = "") -> WorkerFigures:
        """Of now, but for what the process takes."""
        timeline = self.timeline
        return WorkerFigures(
            steps=self.steps,
            samples=self.samples,
            left_out=self.left_out,
            phases=timeline.phases,
            step_s=list(self.step_s),
            step_sum_s=self.step_sum_s,
            staleness=list(self.staleness),
            staleness_sum=self.staleness_sum,
            sent_bytes=timeline.up,
            received_bytes=timeline.down,
            dense_sent_bytes=timeline.dense_up,
            dense_received_bytes=timeline.dense_down,
            learning_rate=learning_rate,
            compress=compress,
        )


class Reports:
    """One script's. `values` is what it has logged last."""

    def __init__(self, client: Client, io: IoThread, tally: ScriptTally, timeline: Timeline) -> None:
        self.client = client
        self.io = io
        self.tally = tally
        self.timeline = timeline
        self.meter = Meter(timeline)
        self.gpu = gpu.Watch(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        self.optimizer: torch.optim.Optimizer | None = None
        self.auto: Auto | None = None
        self.values: Mapping[str, Any] = {}
        self.samples = 0  # that were told
        self.crowded = False  # more was logged than a report holds, and that was said
        self.at = time.monotonic()

    def begin(self, optimizer: torch.optim.Optimizer, auto: Auto | None = None) -> None:
        """The script is in the job: its agent learns so, before the first step."""
        self.optimizer, self.auto = optimizer, auto
        self.io.post(self._tell, self._figures(), None)

    @property
    def due(self) -> bool:
        return time.monotonic() - self.at >= REPORT_S

    def make(self, epoch: int, epochs: int, staleness: int) -> None:
        self.at = time.monotonic()
        self.timeline.write()
        samples, self.samples = self.meter.samples - self.samples, self.meter.samples
        fields: dict[str, Any] = {
            "steps": self.meter.steps,
            "epoch": epoch,
            "epochs": epochs,
            "samples": samples,
            "staleness": staleness,
            "values": self._values(),
        }
        self.io.post(self._tell, self._figures(), fields)

    def _figures(self) -> WorkerFigures:
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return self.meter.figures(learning_rate(groups), str(self.auto.setting) if self.auto else "")

    def _tell(self, figures: WorkerFigures, fields: dict[str, Any] | None) -> None:
        """In the I/O thread."""
        whole = msgspec.structs.replace(
            figures,
            memory_bytes=resident_bytes(),
            cpu_s=round(cpu_seconds(), 3),
            open_files=open_files(),
            gpu=self.gpu.now,
        )
        self.tally.tell(whole)
        if fields is not None:
            self.client.report(figures=whole, **fields)

    def _values(self) -> dict[str, float]:
        values = {str(name): number(name, value) for name, value in self.values.items()}
        told = fitting(values)
        if len(told) < len(values) and not self.crowded:
            self.crowded = True
            left_out = len(values) - len(told)
            log.warning(
                "more is logged than a report holds", worker=self.client.seat.worker, left_out=left_out
            )
        return told


def learning_rate(groups: Sequence[Mapping[str, Any]]) -> float | None:
    """Of the first parameter group."""
    try:
        return float(groups[0]["lr"])
    except (IndexError, KeyError, TypeError, ValueError, RuntimeError):
        return None  # an optimizer of the script's own may have none


def fitting(values: Mapping[str, float]) -> dict[str, float]:
    """As many of the values that a script logs, the first ones, as fit into a report."""
    left, kept = VALUES_BYTES, {}
    for name, value in values.items():
        left -= len(name.encode()) + 12  # the number, and how long the name is
        if left < 0:
            break
        kept[name] = value
    return kept
