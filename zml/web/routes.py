"""The table of what can be asked over HTTP: the server takes its paths from it, and `openapi` its description.

A route's `name` is the method of `handlers.Handlers` that answers it. What a query may hold is typed here, and checked
before the handler is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias

import msgspec

from ..cluster.jobs import NAME, Explanation, JobView, Name, Sha256, Submission
from .bodies import (
    ATTEMPT_HEADER,
    KEY_HEADER,
    OFFSET_HEADER,
    Alive,
    Bounds,
    End,
    ErrorPage,
    Jobs,
    Live,
    Logs,
    Nodes,
    Reason,
)

State: TypeAlias = Live | End
MOST_JOBS = 10_000
LONGEST_WAIT_S = 60.0

NewestCount = Annotated[int, msgspec.Meta(ge=1, le=MOST_JOBS)]
WaitSeconds = Annotated[float, msgspec.Meta(ge=0, le=LONGEST_WAIT_S)]
Lines = Annotated[int, msgspec.Meta(ge=0, le=100_000)]
Offset = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Attempt = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
Key = Annotated[str, msgspec.Meta(pattern=r"^[!-~]{1,255}$(?!\n)")]
JobId = Annotated[str, msgspec.Meta(pattern=NAME)]
LogName = Annotated[str, msgspec.Meta(pattern=NAME)]
ErrorCode = Annotated[str, msgspec.Meta(pattern=r"^ZML-E[0-9]{3}$(?!\n)")]


@dataclass(frozen=True, slots=True)
class Query:
    """One name behind the question mark. A `list` may be repeated."""

    type: Any
    about: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One thing that can be asked."""

    method: str
    path: str
    name: str
    about: str
    path_types: Mapping[str, Any] = field(default_factory=dict)
    query: Mapping[str, Query] = field(default_factory=dict)
    headers: Mapping[str, Query] = field(default_factory=dict)
    body: Any = None  # a struct that arrives as JSON; bytes is a stream
    optional_body: bool = False
    answers: Mapping[int, Any]  # a struct that leaves as JSON; str and bytes are streams; None is no content
    answer_headers: Mapping[str, str] = field(default_factory=dict)
    refusals: tuple[int, ...] = ()  # beside those with which every route may refuse
    anybody: bool = False  # it tells no secret, and needs no token
    patient: bool = False  # it waits or streams, and keeps its own deadlines


ONE_JOB: dict[str, Any] = {"job": JobId}
ATTEMPT = Query(Attempt, "Which attempt, from 1; the latest where none is named.")

ROUTES: tuple[Route, ...] = (
    Route(
        method="POST",
        path="/jobs",
        name="submit",
        about="Submit a job. With an Idempotency-Key, a request that is sent again does not submit it twice.",
        headers={KEY_HEADER: Query(Key, "The same key from the same user again is the same job.")},
        body=Submission,
        answers={201: JobView},
        answer_headers={"Location": "Where the job is."},
        refusals=(404, 409, 413, 415, 422),
    ),
    Route(
        method="GET",
        path="/jobs",
        name="jobs",
        about="The jobs, in order of submission.",
        query={
            "state": Query(list[State], "Only those in this state; may be repeated."),
            "user": Query(Name, "Only those of this user."),
            "newest": Query(NewestCount, "At most so many, the newest.  1,000 where it is not said."),
        },
        answers={200: Jobs},
    ),
    Route(
        method="GET",
        path="/jobs/{job}",
        name="job",
        about="One job. With `wait` and the ETag of the last answer in If-None-Match, the answer comes when the job "
        "has changed, or is 304 when the time is over.",
        path_types=ONE_JOB,
        query={"wait": Query(WaitSeconds, "Wait so many seconds, at most, for something to change.")},
        headers={"If-None-Match": Query(str, "The ETag of what the client has seen.")},
        answers={200: JobView, 304: None},
        answer_headers={"ETag": "Of this state of the job; worker-seconds do not count."},
        refusals=(404,),
        patient=True,
    ),
    Route(
        method="GET",
        path="/jobs/{job}/explain",
        name="explain",
        about="Why a job has what it has: who is ahead, and what was decided.",
        path_types=ONE_JOB,
        answers={200: Explanation},
        refusals=(404,),
    ),
    Route(
        method="GET",
        path="/jobs/{job}/logs",
        name="logs",
        about="What there is to read of one attempt, by name.",
        path_types=ONE_JOB,
        query={"attempt": ATTEMPT},
        answers={200: Logs},
        refusals=(404,),
    ),
    Route(
        method="GET",
        path="/jobs/{job}/logs/{name}",
        name="log",
        about="What one process printed. A file that grows is followed until the attempt is over.",
        path_types={**ONE_JOB, "name": LogName},
        query={
            "attempt": ATTEMPT,
            "follow": Query(
                bool, "Go on as the file grows, for an hour at most; go on from there by `offset`."
            ),
            "tail": Query(Lines, "Begin with the last so many lines."),
            "offset": Query(Offset, "Begin at this byte."),
        },
        answers={200: str},
        answer_headers={
            ATTEMPT_HEADER: "Whose output it is.",
            OFFSET_HEADER: "The byte at which the answer begins.",
        },
        refusals=(404,),
        patient=True,
    ),
    Route(
        method="POST",
        path="/jobs/{job}/cancel",
        name="cancel",
        about="End a job: what runs is drained, what waits never begins.",
        path_types=ONE_JOB,
        body=Reason,
        optional_body=True,
        answers={200: JobView},
        refusals=(404, 409, 413, 415, 422),
    ),
    Route(
        method="POST",
        path="/jobs/{job}/pause",
        name="pause",
        about="Drain a job, or let it wait, until it is resumed.",
        path_types=ONE_JOB,
        body=Reason,
        optional_body=True,
        answers={200: JobView},
        refusals=(404, 409, 413, 415, 422),
    ),
    Route(
        method="POST",
        path="/jobs/{job}/resume",
        name="resume",
        about="Let a paused job go on, when its turn comes.",
        path_types=ONE_JOB,
        answers={200: JobView},
        refusals=(404, 409),
    ),
    Route(
        method="POST",
        path="/jobs/{job}/scale",
        name="scale",
        about="Change how many workers a job may have.",
        path_types=ONE_JOB,
        body=Bounds,
        answers={200: JobView},
        refusals=(404, 409, 413, 415, 422),
    ),
    Route(
        method="DELETE",
        path="/jobs/{job}",
        name="delete",
        about="Forget a job that is over, and delete its files. What another job needs stays.",
        path_types=ONE_JOB,
        answers={200: JobView},
        refusals=(404, 409),
    ),
    Route(method="GET", path="/nodes", name="nodes", about="The nodes.", answers={200: Nodes}),
    Route(
        method="PUT",
        path="/archives/{sha256}",
        name="put_archive",
        about="Send an archive (tar.gz) with this checksum. Sending it again changes nothing.",
        path_types={"sha256": Sha256},
        body=bytes,
        answers={204: None},
        refusals=(404, 408, 409, 413, 422),
        patient=True,
    ),
    Route(
        method="HEAD",
        path="/archives/{sha256}",
        name="has_archive",
        about="Is an archive there?",
        path_types={"sha256": Sha256},
        answers={200: None},
        refusals=(404,),
    ),
    Route(
        method="GET",
        path="/archives/{sha256}",
        name="get_archive",
        about="An archive, for a node that lacks it.",
        path_types={"sha256": Sha256},
        answers={200: bytes},
        refusals=(404,),
        patient=True,
    ),
    Route(
        method="GET",
        path="/errors/{code}",
        name="error",
        about="More about an error: where the `type` of a problem leads.",
        path_types={"code": ErrorCode},
        answers={200: ErrorPage},
        refusals=(404,),
        anybody=True,
    ),
    Route(
        method="GET",
        path="/openapi.json",
        name="openapi",
        about="This description.",
        answers={200: dict[str, Any]},
        anybody=True,
    ),
    Route(
        method="GET",
        path="/livez",
        name="livez",
        about="Does the server answer?",
        answers={200: Alive},
        anybody=True,
    ),
)
