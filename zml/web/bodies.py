"""What travels over HTTP beside the structs of zml.cluster.jobs. Client and server both read it; it knows no HTTP."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import msgspec

from ..address import PORT as PORT
from ..cluster.jobs import JobView, NodeView, Text, Workers

Live: TypeAlias = Literal["QUEUED", "STARTING", "RUNNING", "DRAINING", "PAUSED"]
End: TypeAlias = Literal["SUCCEEDED", "FAILED", "CANCELLED", "TIMED_OUT"]
LIVE: tuple[str, ...] = get_args(Live)
ENDS: tuple[str, ...] = get_args(End)

PREFIX = "/api/v1"
USER_HEADER = "Zml-User"
KEY_HEADER = "Idempotency-Key"
ATTEMPT_HEADER = "Zml-Attempt"  # whose output it is
OFFSET_HEADER = "Zml-Offset"  # where in the file the answer begins, in bytes


class Jobs(msgspec.Struct, frozen=True):
    """Jobs in order of submission."""

    jobs: list[JobView]


class Nodes(msgspec.Struct, frozen=True):
    """The nodes that are here or were. `pool`: what is said of those that come and go, where there is a pool."""

    nodes: list[NodeView]
    pool: str = ""


class LogFile(msgspec.Struct, frozen=True):
    """What one process printed or logged."""

    name: str
    bytes: int


class Logs(msgspec.Struct, frozen=True):
    """What there is to read of one attempt."""

    attempt: int  # 0: it has not begun
    files: list[LogFile]


class Reason(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why somebody does something; may be empty."""

    because: Text = ""


class Bounds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many workers a job may have from now on: 4, or "1..4"."""

    workers: Workers


class Alive(msgspec.Struct, frozen=True):
    """The server answers."""

    zml: str  # its version


class ErrorPage(msgspec.Struct, frozen=True):
    """What `zml explain` says of an error."""

    code: str
    title: str
    explanation: str
    exit_code: int


class ProblemDetails(msgspec.Struct, frozen=True, omit_defaults=True):
    """A refusal, as RFC 9457 writes it. `type` leads to the error's page, where it has one."""

    status: int
    title: str
    detail: str
    type: str = "about:blank"
    code: str = ""
    fix: str = ""
