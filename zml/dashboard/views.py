"""What the pages are given, one struct for each: this file is the contract between the pages and what makes them.

Times are seconds; `at` and `began` count from the Unix epoch. Nothing is None that is known; a number that is not known
is None and shown as such. Texts come from scripts, peers and file names: the pages write them as text, whatever is in
them.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Level = Literal["bad", "warn", "note"]
Tone = Literal["good", "warn", "bad", "quiet", "busy"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a person should look at: the sentence, the number it rests on, and the page that shows more."""

    kind: str
    level: Level
    what: str
    number: str
    page: str
    query: dict[str, str] = {}  # how that page should begin: its filter
    member: str = ""


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What is served here."""

    kind: Literal["run", "runs", "hub"]
    version: str
    run: str = ""  # the name of the only one
    title: str = ""
    live: bool = True  # False: a file, which will not change


class RunLine(msgspec.Struct, frozen=True, kw_only=True):
    """One run in a list."""

    name: str
    script: str
    state: str
    tone: Tone
    because: str
    began: float
    at: float
    steps: int
    progress: float | None
    values: dict[str, float | None]
    workers: int
    silent_s: float = 0.0  # of a run that is not over, where that is long


class Runs(msgspec.Struct, frozen=True, kw_only=True):
    runs: list[RunLine]
    left_out: int  # older ones


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """Which run, and how it is, in words."""

    name: str
    script: str
    state: str
    tone: Tone
    headline: str
    because: str
    over: bool
    mode: str
    folder: str
    began: float
    at: float  # of the newest news
    silent_s: float  # since then; 0 where it is over
    job: str
    generation: int
    boots: int
    exit_code: int | None


class Numbers(msgspec.Struct, frozen=True, kw_only=True):
    steps: int
    epoch: int
    epochs: int
    epoch_progress: float
    progress: float | None
    samples: int
    samples_per_s: float | None
    peak_samples_per_s: float | None
    step_s: float | None  # mean over the workers, lately
    eta_s: float | None
    elapsed_s: float
    staleness: int
    staleness_bound: int | None  # None: not bound
    learning_rate: float | None
    values: dict[str, float | None]
    sent_bytes: int
    received_bytes: int
    dense_bytes: int  # what both would be uncompressed


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One worker or shard, as a mark in a row of them."""

    member: str
    role: str
    state: str
    tone: Tone
    because: str
    node: str
    steps: int
    heard_s: float
    incarnation: int


class LastCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    step: int
    at: float
    bytes: int
    held_s: float
    took_s: float
    taken: int
    failed: int
    because: str


class DataNow(msgspec.Struct, frozen=True, kw_only=True):
    batches: int
    batch_size: int
    committed: int
    skipped: int
    leased: int
    reissued: int


class Event(msgspec.Struct, frozen=True, kw_only=True):
    at: float
    what: str
    member: str
    because: str
    tone: Tone
    kind: str = ""


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """How a script failed: the user's own frame."""

    member: str
    kind: str
    text: str
    file: str
    line: int
    source: list[str]
    first_source_line: int
    step: int
    batch: str
    log: str
    at: float


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """Each field is sent again only when it has changed."""

    head: Head
    numbers: Numbers
    findings: list[Finding]
    members: list[Member]
    phases: dict[str, float]  # share of the workers' time, lately
    checkpoint: LastCheckpoint
    data: DataNow
    events: list[Event]
    failures: list[Script]
    versions: dict[str, str]  # of what the other pages show: another one means that there is more


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    """One curve. `y` None: not finite, or not told."""

    name: str
    step: list[int]
    at: list[float]
    y: list[float | None]


class Series(msgspec.Struct, frozen=True, kw_only=True):
    values: list[Chart]
    samples_per_s: Chart
    staleness: Chart
    learning_rate: Chart
    workers: Chart
    marks: list[Event]  # what happened, for the time axis


class WorkerLine(msgspec.Struct, frozen=True, kw_only=True):
    """One worker lately. Seconds are of a step, on average."""

    member: str
    state: str
    tone: Tone  # a straggler's is that of how far behind it is
    because: str
    node: str
    device: str
    incarnation: int
    steps: int
    samples: int
    staleness: int
    heard_s: float
    step_s: float | None
    busy_s: float | None  # of it, all but waiting
    ratio: float | None  # busy_s against the median of all
    straggler: bool
    why_slow: str  # the phase that makes it one
    phases: dict[str, float]
    beside: dict[str, float]
    samples_per_s: float | None
    sent_bytes: int
    received_bytes: int
    dense_bytes: int
    left_out: int
    memory_bytes: int
    learning_rate: float | None
    gpu_utilization: float | None
    gpu_memory_used: int | None
    gpu_memory: int | None
    gpu_power_w: float | None


class Workers(msgspec.Struct, frozen=True, kw_only=True):
    window_s: float
    whole: bool  # the window is the whole run
    workers: list[WorkerLine]
    median_step_s: float | None
    median_busy_s: float | None
    at: list[float]
    step_s: dict[str, list[float | None]]  # by worker, over time
    phases: dict[str, list[float | None]]  # mean over the workers, seconds of a step, over time


class ShardLine(msgspec.Struct, frozen=True, kw_only=True):
    member: str
    state: str
    tone: Tone
    because: str
    node: str
    incarnation: int
    heard_s: float
    version: int
    updates: int
    updates_per_s: float | None
    apply_s: float | None
    chunks: int
    parameter_bytes: int
    optimizer_bytes: int
    log_bytes: int
    memory_bytes: int
    pushes: int
    duplicates: int
    refused: int
    pulls: int
    parked: int
    staged: int
    received_bytes: int
    sent_bytes: int
    dense_received_bytes: int
    dense_sent_bytes: int


class Shards(msgspec.Struct, frozen=True, kw_only=True):
    window_s: float
    whole: bool
    shards: list[ShardLine]
    imbalance: float | None  # the largest share of parameters against an even one
    at: list[float]
    received_per_s: list[float | None]  # of all shards together
    sent_per_s: list[float | None]
    queue: list[float | None]


class EpochLine(msgspec.Struct, frozen=True, kw_only=True):
    epoch: int
    batches: int
    samples: int | None
    committed: int
    reissued: int
    skipped: int
    duplicates: int
    missing: int
    unleased: int
    to_go: int
    closed: bool
    sound: bool
    faults: list[str]
    left_out: list[str]


class Data(msgspec.Struct, frozen=True, kw_only=True):
    """The proof, and how far it reaches."""

    state: Literal["proved", "wrong", "unknown"]
    says: str
    at: float  # when it was made
    epochs: list[EpochLine]
    now: DataNow


class CheckpointLine(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    step: int | None
    epoch: int | None
    created: str
    because: str
    bytes: int | None
    files: int | None
    parameters: int | None
    newest: bool
    state: Literal["complete", "wrong", "being written"]
    wrong: str


class Checkpoints(msgspec.Struct, frozen=True, kw_only=True):
    folder: str
    checkpoints: list[CheckpointLine]
    last: LastCheckpoint
    every_minutes: float
    every_steps: int


class Bar(msgspec.Struct, frozen=True, kw_only=True):
    """One worker's step."""

    worker: str
    phases: dict[str, float]
    beside: dict[str, float]
    whole_s: float
    start_s: float  # after the first of them
    bytes_up: int
    bytes_down: int


class Waterfall(msgspec.Struct, frozen=True, kw_only=True):
    clock: int  # the one that is shown; -1: there is none
    first: int
    last: int
    bars: list[Bar]
    lacking: list[str]  # workers whose file does not have it
    slow: list[int]  # clocks of the slowest steps among those in `step`
    step: list[int]
    whole_s: list[float | None]  # of the slowest worker
    apart: str = ""  # why the bars begin each at its own beginning, where they do


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    at: float
    level: str
    member: str
    role: str
    message: str
    details: list[str] = []  # KEY=VALUE of what it is about
    failure: list[str] = []  # an exception: its frames, and what was raised
    step: int | None = None


class Logs(msgspec.Struct, frozen=True, kw_only=True):
    """The lines that are wanted, the oldest first. `cursor` asks for what comes after all there is now."""

    lines: list[LogLine]
    cursor: str
    complete: bool  # False: there is more than was looked at
    members: list[str]


class Events(msgspec.Struct, frozen=True, kw_only=True):
    events: list[Event]
    left_out: bool  # older ones


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    value: str
    origin: str


class Config(msgspec.Struct, frozen=True, kw_only=True):
    settings: list[Setting]
    about: list[tuple[str, str]]  # versions, script, arguments, folder
    nodes: list[tuple[str, str]]


class JobLine(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    name: str
    user: str
    state: str
    tone: Tone
    why: str
    because: str
    submitted_at: float
    began_at: float | None
    ended_at: float | None
    priority: int
    workers: int
    workers_min: int
    workers_max: int
    shards: int
    nodes: list[str]
    attempts: int
    opens: bool  # its newest attempt has something to show


class NodeLine(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    state: str
    tone: Tone
    rack: str
    gpus: int
    gpus_free: int
    cpus: int
    cpus_free: int
    memory_mb: int
    memory_mb_free: int
    jobs: list[str]
    heard_s: float


class Jobs(msgspec.Struct, frozen=True, kw_only=True):
    jobs: list[JobLine]
    nodes: list[NodeLine]
    counts: dict[str, int]
    left_out: int


class JobWhy(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job has what it has."""

    id: str
    ahead: list[str]
    ahead_count: int
    decisions: list[Event]


TONES: dict[str, Tone] = {
    "FORMING": "busy",
    "STARTING": "busy",
    "RUNNING": "good",
    "DRAINING": "busy",
    "FINISHING": "busy",
    "QUEUED": "quiet",
    "PAUSED": "quiet",
    "SUCCEEDED": "good",
    "FAILED": "bad",
    "TIMED_OUT": "bad",
    "CANCELLED": "warn",
    "joined": "busy",
    "active": "good",
    "done": "quiet",
    "stopped": "quiet",
    "resting": "busy",
    "left": "quiet",
    "lost": "bad",
    "fenced": "bad",
    "failed": "bad",
    "UP": "good",
    "LEAVING": "warn",
}


def tone_of(state: str) -> Tone:
    return TONES.get(state, "warn")
