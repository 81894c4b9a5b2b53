"""The answers, one method for each route: read the request, ask the desk, write what it says. Decides nothing."""

from __future__ import annotations

import asyncio
import difflib
import hashlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from aiohttp import web

from .. import __version__
from ..cluster.jobfile import sound
from ..cluster.jobs import Desk, JobView, Problem, Submission
from ..errors import ARCHIVE, BOOK
from ..files import PIECE, Reader, size_of
from . import openapi
from .access import Visitor
from .asking import JSON, Asked, body
from .bodies import (
    ATTEMPT_HEADER,
    ENDS,
    KEY_HEADER,
    OFFSET_HEADER,
    PREFIX,
    Alive,
    Bounds,
    ErrorPage,
    Jobs,
    LogFile,
    Logs,
    Nodes,
    Reason,
)

if TYPE_CHECKING:
    from .server import Limits

T = TypeVar("T")
VISITOR = web.RequestKey("visitor", Visitor)
PLAIN = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}  # of every answer
NEWEST = 1_000  # jobs, unless more are asked for


class Handlers:
    """What is behind the routes."""

    def __init__(
        self, desk: Desk, limits: Limits, threads: ThreadPoolExecutor, pool: Callable[[], str]
    ) -> None:
        self.desk = desk
        self.pool = pool
        self.limits = limits
        self.threads = threads
        self.uploading = 0

    # -- jobs ----------------------------------------------------------------------------------------------

    async def submit(self, request: web.Request, asked: Asked) -> web.Response:
        submission = await body(request, Submission)
        sound(submission)
        job = self.desk.submit(submission, request[VISITOR].user, key=asked.get(KEY_HEADER, ""))
        response = answer(job, 201)
        response.headers["Location"] = f"{PREFIX}/jobs/{job.id}"
        return response

    async def jobs(self, request: web.Request, asked: Asked) -> web.Response:
        states = frozenset(asked.get("state", ()))
        found = self.desk.jobs(states=states, user=asked.get("user", ""), newest=asked.get("newest", NEWEST))
        return answer(Jobs(found))

    async def job(self, request: web.Request, asked: Asked) -> web.Response:
        name, seen = asked["job"], asked.get("If-None-Match", "")
        job = self.desk.job(name)
        # Between this look and the call of `changed` nothing else runs: no change is missed.
        if asked.get("wait") and (not seen or seen == tag(job)) and job.state not in ENDS:
            job = await self._changed(name, asked["wait"], seen)
        shown = request[VISITOR].may_see(job)
        response = web.Response(status=304) if seen == tag(job) else answer(shown)
        response.headers["ETag"] = tag(job)
        return response

    async def _changed(self, name: str, wait_s: float, seen: str) -> JobView:
        """The job when it differs from what was seen, or as it is when the time is over."""
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        while True:
            left = until - loop.time()
            if left <= 0:
                return self.desk.job(name)
            await self.desk.changed(name, left)
            job = self.desk.job(name)
            if not seen or tag(job) != seen:
                return job
            await asyncio.sleep(0)  # a desk that sees changes which we do not show must not hold the loop

    async def explain(self, request: web.Request, asked: Asked) -> web.Response:
        found = self.desk.explain(asked["job"])
        return answer(msgspec.structs.replace(found, job=request[VISITOR].may_see(found.job)))

    async def cancel(self, request: web.Request, asked: Asked) -> web.Response:
        reason = await body(request, Reason, empty=Reason())
        name = self._own(request, asked)
        return answer(self.desk.cancel(name, because(request, "cancelled", reason)))

    async def pause(self, request: web.Request, asked: Asked) -> web.Response:
        reason = await body(request, Reason, empty=Reason())
        name = self._own(request, asked)
        return answer(self.desk.pause(name, because(request, "paused", reason)))

    async def resume(self, request: web.Request, asked: Asked) -> web.Response:
        return answer(self.desk.resume(self._own(request, asked)))

    async def scale(self, request: web.Request, asked: Asked) -> web.Response:
        bounds = await body(request, Bounds)
        name = self._own(request, asked)
        wanted = Submission(script="x", folder="/", workers=bounds.workers)
        sound(wanted)
        return answer(self.desk.scale(name, *wanted.bounds))

    async def delete(self, request: web.Request, asked: Asked) -> web.Response:
        return answer(self.desk.delete(self._own(request, asked), because(request, "deleted", Reason())))

    def _own(self, request: web.Request, asked: Asked) -> str:
        """The job that is asked for, where the visitor may change it."""
        request[VISITOR].must_own(self.desk.job(asked["job"]))
        return str(asked["job"])

    async def nodes(self, request: web.Request, asked: Asked) -> web.Response:
        return answer(Nodes(self.desk.nodes(), self.pool()))

    # -- logs ----------------------------------------------------------------------------------------------

    async def logs(self, request: web.Request, asked: Asked) -> web.Response:
        name = asked["job"]
        job = self.desk.job(name)
        attempt = asked.get("attempt")
        paths = self.desk.log_files(name, attempt)
        sizes = await self._in_thread(lambda: {each: size_of(path) for each, path in paths.items()})
        files = [LogFile(each, size) for each, size in sizes.items() if size is not None]
        return answer(Logs(attempt or latest(job), files))

    async def log(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        name, file = asked["job"], asked["name"]
        if "tail" in asked and "offset" in asked:
            raise Problem(400, "tail and offset exclude each other", "Give one of them.")
        attempt = asked.get("attempt") or latest(self.desk.job(name))
        path = self._log_path(name, file, attempt)
        try:
            reader = await self._in_thread(lambda: Reader(path))
        except OSError as error:
            raise Problem(404, f"{file} cannot be read: {error.strerror or 'it is no file'}", "") from None
        try:
            begin = await self._in_thread(
                lambda: (
                    reader.seek_last(asked["tail"])
                    if "tail" in asked
                    else reader.seek(asked.get("offset", 0))
                )
            )
            response = web.StreamResponse(headers={ATTEMPT_HEADER: str(attempt), OFFSET_HEADER: str(begin)})
            response.content_type, response.charset = "text/plain", "utf-8"
            if asked.get("follow"):
                pieces = self._follow(reader, lambda: self._over(name, attempt))
            else:
                pieces = self._pieces(reader, reader.size)
            return await self._send(request, response, pieces)
        finally:
            self.threads.submit(reader.close)

    def _log_path(self, job: str, file: str, attempt: int) -> str:
        there = self.desk.log_files(job, attempt or None)
        if file in there:
            return there[file]
        near = difflib.get_close_matches(file, list(there), n=1, cutoff=0.4)
        fix = (
            f"Did you mean {near[0]}?"
            if near
            else f"There is {', '.join(sorted(there)[:8]) or 'nothing yet'}."
        )
        raise Problem(404, f"{job} has no output called {file[:64]}", fix)

    def _over(self, job: str, attempt: int) -> bool:
        """Whether nothing more will be written in this attempt."""
        try:
            view = self.desk.job(job)
        except Problem:
            return True
        if view.state in ENDS or latest(view) > attempt:
            return True
        if latest(view) == attempt and view.nodes:
            return False  # of processes that are still there the last words may be on their way
        return any(each.number == attempt and each.ended_at is not None for each in view.attempts)

    async def _pieces(self, reader: Reader, end: int) -> AsyncIterator[bytes]:
        while reader.position < end:
            piece = await self._in_thread(lambda: reader.read(min(PIECE, end - reader.position)))
            if not piece:
                return
            yield piece

    async def _follow(self, reader: Reader, over: Callable[[], bool]) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        until = loop.time() + self.limits.follow_s
        while loop.time() < until:
            last = over()  # asked before reading: what was written until then is read
            piece = await self._in_thread(reader.read)
            if piece:
                yield piece
            elif await self._in_thread(reader.begin_again):
                continue
            elif last:
                return
            else:
                await asyncio.sleep(self.limits.poll_s)

    async def _send(
        self, request: web.Request, response: web.StreamResponse, pieces: AsyncIterator[bytes]
    ) -> web.StreamResponse:
        """Piece by piece, each only when the former is on its way. Raises ConnectionError where it cannot be."""
        response.headers.update(PLAIN)
        await response.prepare(request)
        try:
            async for piece in pieces:
                async with asyncio.timeout(self.limits.stall_s):
                    await response.write(piece)
        except TimeoutError:
            raise ConnectionResetError("the reader is too slow") from None
        except OSError as error:  # too late to say so: what is cut short must not look whole
            raise ConnectionResetError(f"a file cannot be read further: {error}") from None
        await response.write_eof()
        return response

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, call)

    # -- archives ------------------------------------------------------------------------------------------

    async def put_archive(self, request: web.Request, asked: Asked) -> web.Response:
        sha256 = asked["sha256"]
        if (request.content_length or 0) > self.limits.archive_bytes:
            raise self._too_large()
        if self.uploading >= self.limits.uploads:
            raise Problem(503, f"{self.uploading} archives are arriving already", "Ask again in a moment.")
        self.uploading += 1
        try:
            async with asyncio.timeout(self.limits.upload_s):
                await self.desk.take_archive(sha256, self._arriving(request))
        except TimeoutError:
            raise Problem(408, "the archive came too slowly, or stopped coming", "Send it again.") from None
        finally:
            self.uploading -= 1
        return web.Response(status=204)

    async def _arriving(self, request: web.Request) -> AsyncIterator[bytes]:
        taken = 0
        while True:
            async with asyncio.timeout(self.limits.stall_s):
                piece = await request.content.readany()
            if not piece:
                return
            taken += len(piece)
            if taken > self.limits.archive_bytes:
                raise self._too_large()
            yield piece

    def _too_large(self) -> Problem:
        most = self.limits.archive_bytes // 2**20
        return Problem(413, f"an archive has at most {most:,} MB", "Leave data out of it.", ARCHIVE)

    async def has_archive(self, request: web.Request, asked: Asked) -> web.Response:
        sha256 = asked["sha256"]
        return web.Response(status=200 if self.desk.has_archive(sha256) else 404)

    async def get_archive(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        sha256 = asked["sha256"]
        if not self.desk.has_archive(sha256):
            raise Problem(404, f"there is no archive {sha256[:12]}...", "Send it by PUT.", ARCHIVE)
        path = self.desk.archive(sha256)
        try:
            reader = await self._in_thread(lambda: Reader(path))
        except OSError as error:
            raise Problem(404, f"the archive cannot be read: {error.strerror or 'it is no file'}") from None
        try:
            response = web.StreamResponse()
            response.content_type, response.content_length = "application/gzip", reader.size
            return await self._send(request, response, self._pieces(reader, reader.size))
        finally:
            self.threads.submit(reader.close)

    # -- the API itself ------------------------------------------------------------------------------------

    async def error(self, request: web.Request, asked: Asked) -> web.Response:
        code = asked["code"]
        if code not in BOOK:
            raise Problem(404, f"there is no error {code[:20]}", "`zml explain` lists all of them.")
        entry = BOOK[code]
        return answer(ErrorPage(code, entry.title, f"{entry.explanation} {entry.do}", entry.exit_code))

    async def openapi(self, request: web.Request, asked: Asked) -> web.Response:
        return web.Response(body=openapi.encoded(), content_type=JSON)

    async def livez(self, request: web.Request, asked: Asked) -> web.Response:
        return answer(Alive(__version__))


def because(request: web.Request, done: str, reason: Reason) -> str:
    return f"{done} by {request[VISITOR].user}" + (f": {reason.because}" if reason.because else "")


# -- writing answers -----------------------------------------------------------------------------------------


def answer(what: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(what), content_type=JSON)


def tag(job: JobView) -> str:
    """Of what is worth waiting for: worker-seconds grow all the time."""
    still = msgspec.structs.replace(job, attained_s=0.0)
    return f'"{hashlib.sha256(msgspec.json.encode(still)).hexdigest()[:24]}"'


def latest(job: JobView) -> int:
    return job.attempts[-1].number if job.attempts else 0
