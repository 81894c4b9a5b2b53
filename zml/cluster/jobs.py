"""What the HTTP API and `zml submit` speak of: a job as it is asked for, and as it is shown.

A `Submission` is also what a job.toml holds, key for key; `Desk` is what answers, and knows nothing of HTTP.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import PurePosixPath
from typing import Annotated, Any, Protocol

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
Number = Annotated[int, msgspec.Meta(ge=0)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
# To Python alone, $ is also the place before a last newline; (?!\n) says the same to every reader of a pattern.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$(?!\n)"
NAME_IN_WORDS = "1 to 64 of A-Z, a-z, 0-9, dot, dash and underscore, the first a letter or digit"
Name = Annotated[str, msgspec.Meta(pattern=NAME)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
# 4, or "1..4". The types take more than the schema says, so that `jobfile.sound` can say in words what is wrong.
Workers = (
    Annotated[int, msgspec.Meta(extra_json_schema={"minimum": 1, "maximum": 10_000})]
    | Annotated[
        str,
        msgspec.Meta(max_length=64, extra_json_schema={"pattern": r"^[0-9]{1,5}(\.\.[0-9]{1,5})?$(?!\n)"}),
    ]
)
BOUNDS = re.compile(r"([0-9]{1,5})(?:\.\.([0-9]{1,5}))?")


class Submission(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A job that somebody wants to run. Its code is at `folder`, a path that leads there on every node, or in the
    archive with that checksum, which was sent before."""

    script: Text
    args: Annotated[list[Text], msgspec.Meta(max_length=10_000)] = []
    folder: Text = ""
    archive: Sha256 | None = None
    name: Name | None = None  # for people; `name_of` says it where it is not given
    workers: Workers = 1
    shards: Count = 1
    replicas: Number = 0
    gpus: Number = 0  # of each worker
    cpus: Number = 1
    memory_mb: Number = 0
    shard_memory_mb: Number = 0
    priority: Annotated[int, msgspec.Meta(ge=-100, le=100)] = 0
    after: list[str] = []  # ids of jobs
    retries: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0
    time_limit_s: Annotated[float, msgspec.Meta(gt=0)] | None = None
    preemptible: bool = True
    environment: dict[str, Text] = {}
    settings: dict[str, Any] = {}  # of the training, as in zml.toml: staleness, compress, ...

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the most workers. Raises ValueError."""
        found = BOUNDS.fullmatch(str(self.workers))
        if found is None:
            raise ValueError(f"workers = {self.workers!r}")
        least, most = found.groups()
        return int(least), int(most or least)


def name_of(submission: Submission) -> str:
    """Its name, or one that is made of the script's: what no name may have in it becomes a dash."""
    made = re.sub(r"[^A-Za-z0-9._-]+", "-", PurePosixPath(submission.script).stem)
    return submission.name or made.lstrip("._-")[:64] or "job"


def why_not_named(node: str) -> str:
    """Why no node can have this name; empty if one can."""
    if re.fullmatch(NAME, node):
        return ""
    return f"{node[:40]!r} is no name of a node: it takes {NAME_IN_WORDS}"


def plain(error: Exception) -> str:
    """What msgspec says of a field, for people: without its quotes, and in words what a name may be."""
    text = str(error).replace("`", "").replace(f"str matching regex {NAME!r}", NAME_IN_WORDS)
    return text[0].lower() + text[1:]


class AttemptView(msgspec.Struct, frozen=True, kw_only=True):
    """One time that a job ran, from its placement to its end."""

    number: int  # from 1
    run_dir: str
    began_at: float  # seconds since 1970, as all times here
    ended_at: float | None = None
    state: str = ""  # how it ended: SUCCEEDED, FAILED, LOST, DRAINED, STOPPED, CANCELLED, TIMED_OUT
    because: str = ""
    exit_code: int | None = None


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job as it is shown: state QUEUED, STARTING, RUNNING, DRAINING, PAUSED, or SUCCEEDED, FAILED, CANCELLED,
    TIMED_OUT, which are the ends."""

    id: str
    name: str
    user: str
    state: str
    why: str  # a `Why` by name, or empty
    because: str  # the sentence of the latest decision
    submitted_at: float
    began_at: float | None = None
    ended_at: float | None = None
    exit_code: int | None = None
    priority: int = 0
    workers: int = 0  # that it has now
    workers_min: int = 1
    workers_max: int = 1
    shards: int = 1
    nodes: list[str] = []
    attained_s: float = 0.0  # worker-seconds
    attempts: list[AttemptView] = []
    submission: Submission | None = None  # only where one job is asked for


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """A node as it is shown."""

    id: str
    state: str  # UP, LEAVING
    rack: str
    gpus: int
    cpus: int
    memory_mb: int
    gpus_free: int
    cpus_free: int
    memory_mb_free: int
    jobs: list[str] = []
    heard_s: float = 0.0  # since it was last heard


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided about a job, when and why: what `zml explain JOB` tells."""

    at: float
    what: str
    because: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why a job has what it has."""

    job: JobView
    ahead: list[str] = []  # jobs that go before it, first the first; at most 20
    ahead_count: int = 0
    decisions: list[Decision] = []  # the latest, the oldest first


class Problem(Exception):
    """The desk says no, and nothing has changed. `status` is HTTP's; `code` of zml's own errors, or empty."""

    def __init__(self, status: int, what: str, fix: str = "", code: str = "") -> None:
        super().__init__(what)
        self.status, self.what, self.fix, self.code = status, what, fix, code


class Desk(Protocol):
    """What can be asked about jobs. Everything raises Problem; a method that changes something returns when the change
    is on disk, and doing it twice is the same as once."""

    def submit(self, submission: Submission, user: str, *, key: str = "") -> JobView:
        """Take a job. The same `key` from the same user again is the same job: a request that is sent again after a
        broken connection does not submit twice."""
        ...

    def jobs(self, *, states: frozenset[str] = frozenset(), user: str = "", newest: int = 0) -> list[JobView]:
        """The jobs there are, in order of submission; those over are kept for a while. `newest`: only so many."""
        ...

    def job(self, job: str) -> JobView: ...

    def explain(self, job: str) -> Explanation: ...

    def cancel(self, job: str, because: str) -> JobView: ...

    def pause(self, job: str, because: str) -> JobView: ...

    def resume(self, job: str) -> JobView: ...

    def scale(self, job: str, least: int, most: int) -> JobView: ...

    def delete(self, job: str, because: str) -> JobView:
        """Forget a job that is over, and delete its files; refused where another needs it. Returns what it was."""
        ...

    def nodes(self) -> list[NodeView]: ...

    def has_archive(self, sha256: str) -> bool: ...

    async def take_archive(self, sha256: str, data: AsyncIterator[bytes]) -> None:
        """Keep an archive (tar.gz) whose content has this checksum; refused where it has not."""
        ...

    def archive(self, sha256: str) -> str:
        """The path of the file, for a node that fetches it."""
        ...

    def log_files(self, job: str, attempt: int | None = None) -> dict[str, str]:
        """Paths of what the processes of an attempt printed and logged, by name such as "w0.out"; the latest attempt
        where none is named."""
        ...

    async def changed(self, job: str, within_s: float) -> JobView:
        """Wait until something about this job changes, so long at most."""
        ...
