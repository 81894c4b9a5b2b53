"""What is going on, as data: what the coordinator answers, the console draws and `zml status --json` prints.

Everything a person asks about a job is here in words and numbers, with `because` beside each state. It is
JSON on the wire and in `status.json` of a finished run; unknown fields are ignored, so that an older viewer
reads a newer job.
"""

from collections.abc import Mapping

import msgspec

from .figures import ShardFigures, WorkerFigures
from .messages import Failure


class MemberStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A worker or a shard. `heard_s` is how many seconds ago it was heard; -1 is never. `every_s` is how often it
    speaks where that is so seldom that one must know: many jobs share a coordinator, or it was asked for; else 0."""

    member: str
    role: str  # "worker" or "shard"
    state: str  # e.g. "joined", "active", "done", "lost", "failed", "stopped"
    because: str = ""
    incarnation: int = 1
    node: str = ""
    device: str = "cpu"
    steps: int = -1  # in this run
    samples: int = 0
    heard_s: float = -1.0
    every_s: float = 0.0
    pid: int = 0  # 0: not told
    metrics: str = ""  # http://HOST:PORT of its /metrics, empty where it has none
    epoch: int = -1
    staleness: int = 0
    figures: WorkerFigures | None = None  # of a worker, as it told them last; None before
    shard: ShardFigures | None = None  # of a shard, likewise


class DataStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the batches of the open epoch."""

    batches: int = 0  # in the epoch; 0: not known yet
    batch_size: int = 0
    committed: int = 0
    skipped: int = 0
    leased: int = 0  # to workers, and in no step that counts yet
    reissued: int = 0  # given to another worker, in all epochs


class CheckpointStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The newest that is complete, and how taking them went. `at` is seconds since the Unix epoch."""

    path: str = ""  # empty: none yet
    step: int = -1
    at: float = 0.0
    bytes: int = 0
    held_s: float = 0.0  # that training stood still
    took_s: float = 0.0  # from the order to the manifest
    taken: int = 0  # by this coordinator
    failed: int = 0
    because: str = ""  # the last one failed


class EventLine(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened, for people. `at` is seconds since the Unix epoch."""

    at: float
    what: str
    member: str = ""
    because: str = ""


class MemberFailure(msgspec.Struct, frozen=True, kw_only=True):
    """How one member's script failed; of several, the first by `failure.at` is the cause."""

    member: str
    failure: Failure


class RateStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the shards multiply the script's learning rate with."""

    scaling: str = "none"  # with the number of workers: none, linear, sqrt
    base_workers: int = 1  # that the script's rate is meant for
    factor: float = 1.0  # of the newest update
    because: str = ""
    staleness: float = 0.0  # updates that the newest gradients came late, on average, where that is damped
    damping: float = 1.0  # and what they were multiplied with for that, on average


class NoiseStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The gradient noise scale, as `noise` defines it: batches much larger than `scale` gain little."""

    scale: float | None = None  # samples; None: not known, and `because` says why
    because: str = ""
    updates: int = 0  # that were measured
    square: float | None = None  # |G|^2, smoothed
    variance: float | None = None  # tr(Sigma) of one sample's gradient, smoothed


class StepTime(msgspec.Struct, frozen=True, kw_only=True):
    """How long a step takes with so many workers, as a shard saw it: what a throughput model is fitted to."""

    workers: int
    step_s: float  # the median of the newest steps within an epoch
    steps: int  # seen
    batch_size: int = 0  # of one worker; 0: not known


class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A job at one moment. Times are seconds; `started_at` and `at` count from the Unix epoch."""

    job: str
    state: str  # FORMING, RUNNING, DRAINING, FINISHING, SUCCEEDED, FAILED, CANCELLED
    because: str = ""
    script: str = ""
    mode: str = "sync"
    workers: int = 1  # asked for
    shards: int = 1
    generation: int = 0
    epoch: int = 0  # the one that is open, from 0
    epochs: int = 0  # 0: not known yet
    epoch_progress: float = 0.0  # share of the open epoch's batches that are applied, 0 to 1
    steps: int = 0  # of the worker that has made the most, in this run
    steps_before: int = 0  # that the runs had made of which this one is the continuation
    values: Mapping[str, float | None] = {}  # what the script logged, mean over the workers; None: not finite
    samples: int = 0
    samples_per_s: float = 0.0
    staleness: int = 0  # the largest seen lately
    eta_s: float | None = None
    started_at: float = 0.0
    at: float = 0.0
    members: list[MemberStatus] = []
    registered: bool = True  # a script has called zml.join, and shown its model
    rate: RateStatus | None = None  # None: the script's learning rate is used as it is
    noise: NoiseStatus = NoiseStatus()
    step_times: list[StepTime] = []  # by number of workers
    data: DataStatus = DataStatus()
    checkpoint: CheckpointStatus = CheckpointStatus()
    boots: int = 1  # processes that have been this job's coordinator
    metrics: str = ""  # http://HOST:PORT of the coordinator's own /metrics, and of the dashboard
    waiting_for: list[str] = []
    events: list[EventLine] = []  # the latest few
    failures: list[MemberFailure] = []
    exit_code: int | None = None  # set when the job is over
    run_dir: str = ""

    @property
    def over(self) -> bool:
        return self.state in ("SUCCEEDED", "FAILED", "CANCELLED")

    @property
    def apart(self) -> bool:
        """It is over, and whatever its scripts did, they did not do it together."""
        return self.state == "SUCCEEDED" and not self.registered

    @property
    def progress(self) -> float | None:
        """Share of the whole job that is done, None while the number of epochs is not known."""
        if self.epochs <= 0:
            return None
        return min(1.0, (self.epoch + self.epoch_progress) / self.epochs)

    def of(self, role: str) -> list[MemberStatus]:
        return [member for member in self.members if member.role == role]


def since_the_first(status: JobStatus) -> JobStatus:
    """As people count steps, who compare them with checkpoints: the runs before count too. Twice is as once."""
    before = status.steps_before
    if not before:
        return status
    return msgspec.structs.replace(
        status,
        steps_before=0,
        steps=status.steps + before,
        members=[
            msgspec.structs.replace(each, steps=each.steps + before) if each.steps >= 0 else each
            for each in status.members
        ],
        failures=[
            msgspec.structs.replace(
                each, failure=msgspec.structs.replace(each.failure, step=each.failure.step + before)
            )
            if each.failure.step >= 0
            else each
            for each in status.failures
        ],
    )


def encode(status: JobStatus) -> bytes:
    return msgspec.json.encode(status)


def decode(data: bytes) -> JobStatus:
    """Raises msgspec.MsgspecError for what is no status. JSON has no infinity: such values come back as None."""
    return msgspec.json.decode(data, type=JobStatus)
