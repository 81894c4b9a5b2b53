"""What trackers are told: a job's status as numbers by name, and the step at which they stand. Pure."""

from __future__ import annotations

import math

import msgspec

from ..figures import PHASES
from ..status import JobStatus
from ..text.console import HERE

OURS = "zml/"
MOST = 200  # of the script's
KEPT = 100  # checkpoints


class Axis(msgspec.Struct):
    """The step axis of a run: it begins where the runs before ended, and never falls.

    Scripts count their own steps, from 0 in each process. So where their count falls, because all were started again or
    the fastest has gone, the axis goes on from where it is and grows by what the count grows.
    """

    step: int = 0
    seen: int = 0  # the scripts' count at `step`
    # Where it was when a checkpoint was complete, by the checkpoint's own number, which counts updates: without sync
    # each worker's gradient is one. The newest KEPT; a run that goes on from one begins there.
    checkpoints: dict[int, int] = {}

    def advance(self, steps: int) -> int:
        """The scripts have made so many steps now."""
        self.step += max(0, steps - self.seen)
        self.seen = steps
        return self.step

    def checkpointed(self, number: int) -> bool:
        """That checkpoint is the newest; whether it was not known."""
        if number < 0 or number in self.checkpoints:
            return False
        kept = sorted(self.checkpoints)[-(KEPT - 1) :]
        self.checkpoints = {**{each: self.checkpoints[each] for each in kept}, number: self.step}
        return True


def steps(status: JobStatus) -> int:
    """Of the worker that has made the most; when none is active any more, of those that were."""
    return status.steps or max((member.steps for member in status.of("worker")), default=0)


def numbers(status: JobStatus) -> dict[str, float]:
    """The script's own by their names, and ours."""
    told = {name: math.nan if value is None else value for name, value in list(status.values.items())[:MOST]}
    ours: dict[str, float] = {
        "epoch": status.epoch + status.epoch_progress,
        "samples": status.samples,
        "samples_per_s": status.samples_per_s,
        "staleness": status.staleness,
        "workers": sum(member.state in HERE for member in status.of("worker")),
        "shards": sum(member.state in HERE for member in status.of("shard")),
        "batches_dealt_again": status.data.reissued,
    }
    if status.rate is not None:
        ours["learning_rate_factor"] = status.rate.factor * status.rate.damping
    if status.noise.scale is not None:
        ours["gradient_noise_scale"] = status.noise.scale
    # What is of now comes from those that are here; what was counted is of all, or it would fall where one goes.
    counted = [
        (member.figures, member.state in HERE) for member in status.of("worker") if member.figures is not None
    ]
    figures = [each for each, _ in counted]
    rates = (each.learning_rate for each, here in counted if here)
    rate = next((each for each in rates if each is not None), None)
    if rate is not None:
        ours["learning_rate"] = rate
    if made := sum(each.steps for each in figures):
        for phase in PHASES:
            if any(phase in each.phases for each in figures):
                spent = sum(each.phases.get(phase, 0.0) for each in figures)
                ours[f"phase_{phase}_s"] = spent / made  # of a mean step, since the scripts began
        ours["left_out_steps"] = sum(each.left_out for each in figures)
        ours["sent_bytes"] = sum(each.sent_bytes for each in figures)
        ours["received_bytes"] = sum(each.received_bytes for each in figures)
    return told | {OURS + name: float(value) for name, value in ours.items()}
