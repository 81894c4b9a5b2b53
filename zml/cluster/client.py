"""Asking the coordinator over HTTP: what `zml submit`, `zml jobs` and their like stand on.

One connection, kept open. What broke on the way is asked again for a while, which is safe because everything here may
happen twice: a submission carries a key. It uses the standard library alone, so that commands begin at once; what the
server refuses, and what cannot be reached, is raised as a ZmlError for people.
"""

from __future__ import annotations

import difflib
import http.client
import re
import secrets
import ssl
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import msgspec

from ..errors import BAD_JOB, BOOK, NO_JOB, NO_TOKEN, NOT_ALLOWED, REFUSED, UNREACHABLE, USAGE, ZmlError
from ..web.bodies import (
    ATTEMPT_HEADER,
    KEY_HEADER,
    OFFSET_HEADER,
    PORT,
    PREFIX,
    USER_HEADER,
    Bounds,
    Jobs,
    Logs,
    Nodes,
    ProblemDetails,
    Reason,
)
from .jobs import Explanation, JobView, NodeView, Submission

T = TypeVar("T")

DEFAULT_SERVER = f"http://127.0.0.1:{PORT}"
START_ONE = "Start one with `zml coordinator --cluster FOLDER`, or name another with --server or ZML_SERVER."
TIMEOUT_S = 40.0  # of one answer; a long poll takes as long as it waits on top
CONNECT_S = 5.0
AGAIN_S = (0.2, 0.5, 1.0)  # pauses before a request is sent again
WAIT_S = 30.0  # one long poll
STALL_S = 600.0  # that a followed log may have nothing new, until the client looks for itself
BIGGEST = 64 * 2**20  # of an answer that is read whole
PIECE = 64 * 1024
LOOKED_THROUGH = 1_000  # jobs, the newest, for one that may be meant

CODES = {401: NO_TOKEN, 403: NOT_ALLOWED, 404: NO_JOB, 421: NOT_ALLOWED, 422: BAD_JOB}


class Gone(Exception):
    """No answer came. The request may have been carried out."""


class Log(NamedTuple):
    """A log as it arrives. `pieces` raises Gone where the connection breaks."""

    attempt: int
    offset: int  # of the first piece
    pieces: Iterator[bytes]


class Client:
    """Speaks with one server. Not for several threads."""

    def __init__(self, server: str = DEFAULT_SERVER, *, token: str = "", user: str = "") -> None:
        """`token` is the secret itself. Raises ZmlError where `server` is no address."""
        parts = urlsplit(server if "://" in server else f"http://{server}")
        try:
            self.host, self.port = parts.hostname or "", parts.port
        except ValueError:
            self.host = ""
        if parts.scheme not in ("http", "https") or not self.host:
            raise ZmlError(USAGE, f"{server} is no address of a server", f"Write {DEFAULT_SERVER}.")
        self.secure = parts.scheme == "https"
        self.server = f"{parts.scheme}://{parts.netloc}"
        self.base = parts.path.rstrip("/") + PREFIX
        self.headers = {"Accept": "application/json"}
        if user:
            self.headers[USER_HEADER] = (
                re.sub(r"[^A-Za-z0-9._-]", "-", user).lstrip("._-")[:64] or "anonymous"
            )
        if token:
            self.headers["Authorization"] = f"Bearer {token}"
        self.connection: http.client.HTTPConnection | None = None

    # -- jobs ----------------------------------------------------------------------------------------------

    def submit(self, submission: Submission, *, key: str = "") -> JobView:
        """Take a job. It is taken once, however often the request has to be sent."""
        headers = {KEY_HEADER: key or secrets.token_hex(16)}
        return self._ask("POST", "/jobs", JobView, body=submission, headers=headers)

    def jobs(self, *, states: tuple[str, ...] = (), user: str = "", newest: int = 0) -> list[JobView]:
        query: list[tuple[str, Any]] = [("state", each) for each in states]
        query += [("user", user)] if user else []
        query += [("newest", newest)] if newest else []
        return self._ask("GET", "/jobs", Jobs, query=query).jobs

    def job(self, job: str) -> JobView:
        return self._ask("GET", f"/jobs/{quote(job, safe='')}", JobView, job=job)

    def changes(self, job: str, wait_s: float = WAIT_S) -> Iterator[JobView | None]:
        """The job as it is, and then each time that it has changed; None whenever nothing did for `wait_s`."""
        path, tag = f"/jobs/{quote(job, safe='')}", ""
        while True:
            query = [("wait", wait_s)] if tag else []
            headers = {"If-None-Match": tag} if tag else {}
            response, raw = self._request(
                "GET", path, query=query, headers=headers, timeout_s=TIMEOUT_S + wait_s, job=job
            )
            tag = response.headers.get("ETag", "")
            yield None if response.status == 304 else self._decode(raw, JobView)

    def explain(self, job: str) -> Explanation:
        return self._ask("GET", f"/jobs/{quote(job, safe='')}/explain", Explanation, job=job)

    def cancel(self, job: str, because: str = "") -> JobView:
        return self._order(job, "cancel", Reason(because))

    def pause(self, job: str, because: str = "") -> JobView:
        return self._order(job, "pause", Reason(because))

    def resume(self, job: str) -> JobView:
        return self._order(job, "resume", None)

    def scale(self, job: str, workers: str) -> JobView:
        return self._order(job, "scale", Bounds(workers))

    def delete(self, job: str) -> JobView:
        return self._ask("DELETE", f"/jobs/{quote(job, safe='')}", JobView, job=job)

    def _order(self, job: str, what: str, body: Any) -> JobView:
        return self._ask("POST", f"/jobs/{quote(job, safe='')}/{what}", JobView, body=body, job=job)

    def nodes(self) -> list[NodeView]:
        return self.nodes_and_pool().nodes

    def nodes_and_pool(self) -> Nodes:
        return self._ask("GET", "/nodes", Nodes)

    # -- logs ----------------------------------------------------------------------------------------------

    def logs(self, job: str, attempt: int = 0) -> Logs:
        query = [("attempt", attempt)] if attempt else []
        return self._ask("GET", f"/jobs/{quote(job, safe='')}/logs", Logs, query=query, job=job)

    def log(
        self,
        job: str,
        name: str,
        *,
        attempt: int = 0,
        follow: bool = False,
        tail: int | None = None,
        offset: int | None = None,
    ) -> Log:
        """What a process printed. The connection is this log's until its pieces are read or closed."""
        query: list[tuple[str, Any]] = [("attempt", attempt)] if attempt else []
        query += [("follow", "true")] if follow else []
        query += [("tail", tail)] if tail is not None else []
        query += [("offset", offset)] if offset is not None else []
        path = f"/jobs/{quote(job, safe='')}/logs/{quote(name, safe='')}"
        response = self._open("GET", path, query=query, timeout_s=STALL_S if follow else TIMEOUT_S)
        if response.status != 200:
            raise self._refusal(response, response.read(BIGGEST), job)
        attempt = int(response.headers.get(ATTEMPT_HEADER, attempt))
        return Log(attempt, int(response.headers.get(OFFSET_HEADER, 0)), self._pieces(response))

    def _pieces(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        try:
            while piece := response.read1(PIECE):
                yield piece
        except (OSError, http.client.HTTPException) as error:
            raise Gone(reason(error)) from None
        finally:
            self.close()  # it may be left in mid-answer

    # -- archives ------------------------------------------------------------------------------------------

    def has_archive(self, sha256: str) -> bool:
        response, _ = self._request("HEAD", f"/archives/{sha256}", may_lack=True)
        return response.status == 200

    def send_archive(self, path: Path, sha256: str) -> bool:
        """Send a file, unless the server has it; whether it was sent."""
        if self.has_archive(sha256):
            return False
        self._request("PUT", f"/archives/{sha256}", file=path, timeout_s=900.0)
        return True

    # -- requests ------------------------------------------------------------------------------------------

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        self.connection = None

    def _ask(self, method: str, path: str, kind: type[T], **rest: Any) -> T:
        _, raw = self._request(method, path, **rest)
        return self._decode(raw, kind)

    def _decode(self, raw: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(raw, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise self._stranger() from None

    def _stranger(self) -> ZmlError:
        what = f"what answers at {self.server} does not speak as a coordinator of this version does"
        return ZmlError(UNREACHABLE, what, START_ONE)

    def _request(
        self, method: str, path: str, *, job: str = "", may_lack: bool = False, **rest: Any
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """A request and its whole answer, where that is good. Raises ZmlError."""
        for pause in (*AGAIN_S, None):
            try:
                response = self._open(method, path, **rest)
                raw = response.read(BIGGEST)
            except (Gone, OSError, http.client.HTTPException) as error:
                self.close()
                if pause is None:
                    raise self._lost(error) from None
                time.sleep(pause)
                continue
            if response.status == 503 and pause is not None:
                time.sleep(pause)
                continue
            if response.status < 400 or (may_lack and response.status == 404):
                return response, raw
            raise self._refusal(response, raw, job)
        raise AssertionError

    def _open(
        self,
        method: str,
        path: str,
        *,
        query: list[tuple[str, Any]] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        file: Path | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> http.client.HTTPResponse:
        """Send a request; its answer has begun. Raises ZmlError where nobody listens, Gone where it broke."""
        said = {**self.headers, **(headers or {})}
        raw: Any = None
        if body is not None:
            raw, said["Content-Type"] = msgspec.json.encode(body), "application/json"
        url = self.base + path + (f"?{urlencode(query)}" if query else "")
        connection = self.connection
        if connection is None or connection.sock is None:  # the server may have closed it behind an answer
            connection = self._connect()
        assert connection.sock is not None
        connection.sock.settimeout(timeout_s)
        try:
            if file is not None:
                with file.open("rb") as raw:
                    said["Content-Length"] = str(file.stat().st_size)
                    self._send(connection, method, url, raw, said)
            else:
                self._send(connection, method, url, raw, said)
            return connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise Gone(reason(error)) from None

    def _send(
        self, connection: http.client.HTTPConnection, method: str, url: str, raw: Any, said: dict[str, str]
    ) -> None:
        try:
            connection.request(method, url, body=raw, headers=said)
        except BrokenPipeError:
            pass  # a server that refuses a body may say so before it has read all of it

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=CONNECT_S)
        try:
            connection.connect()
        except ssl.SSLError as error:
            raise ZmlError(
                UNREACHABLE, f"{self.server}: {reason(error)}", "Check the server's certificate."
            ) from None
        except OSError as error:
            raise ZmlError(
                UNREACHABLE, f"no coordinator answers at {self.server}: {reason(error)}", START_ONE
            ) from None
        self.connection = connection
        return connection

    def _lost(self, error: Exception) -> ZmlError:
        return ZmlError(
            UNREACHABLE,
            f"the coordinator at {self.server} gave no whole answer: {reason(error)}",
            "Ask again; its log says what it was doing.",
        )

    def _refusal(self, response: http.client.HTTPResponse, raw: bytes, job: str) -> ZmlError:
        try:
            problem = msgspec.json.decode(raw, type=ProblemDetails)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return self._stranger()
        code = problem.code if problem.code in BOOK else CODES.get(problem.status, REFUSED)
        fix = self._meant(job, problem.fix) if code == NO_JOB and job else problem.fix
        return ZmlError(code, problem.detail, fix)

    def _meant(self, job: str, fix: str) -> str:
        """What to do, and before it which job may have been meant where there is none of this name. Where there is,
        something else of it is missing."""
        try:
            found, _ = self._request("GET", f"/jobs/{quote(job, safe='')}", may_lack=True)
            if found.status != 404:
                return fix
            there = self.jobs(newest=LOOKED_THROUGH)
        except ZmlError:
            return fix
        if called := [each.id for each in there if each.name == job]:
            return f"Did you mean {called[-1]}, which is called {job}? {fix}".rstrip()
        if near := difflib.get_close_matches(job, [each.id for each in there], n=1):
            return f"Did you mean {near[0]}? {fix}".rstrip()
        return fix or "`zml jobs --all` lists the jobs."


def reason(error: Exception) -> str:
    """In a few words, where the system has them."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text[0].lower() + text[1:]
