"""The HTTP API, over a desk in memory: every route, who is let in, what is refused, and what has an end."""

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.zml.web.desk import FakeDesk
from zml.cluster.jobs import NAME_IN_WORDS, Explanation, JobView, NodeView, Submission
from zml.errors import ARCHIVE, BAD_JOB, NO_JOB, NO_TOKEN, NOT_ALLOWED, PORT_IN_USE, USAGE, ZmlError
from zml.web import openapi
from zml.web.bodies import Alive, ErrorPage, Jobs, Logs, Nodes, ProblemDetails
from zml.web.routes import ROUTES
from zml.web.server import Limits, Server, serve

API = "/api/v1"
JOB: dict[str, Any] = {"script": "train.py", "folder": "/shared/code", "workers": "1..4"}


class Got(NamedTuple):
    status: int
    body: bytes
    headers: Mapping[str, str]

    @property
    def problem(self) -> ProblemDetails:
        assert self.headers["Content-Type"].startswith("application/problem+json")
        found = msgspec.json.decode(self.body, type=ProblemDetails)
        assert found.status == self.status and found.title and found.detail
        return found

    def read(self, kind: type[Any]) -> Any:
        return msgspec.json.decode(self.body, type=kind)


class Asking:
    """A server, its desk, and a client of it."""

    def __init__(self, desk: FakeDesk, server: Server, session: aiohttp.ClientSession) -> None:
        self.desk, self.server, self.session = desk, server, session

    async def __call__(self, method: str, path: str, **rest: Any) -> Got:
        async with self.session.request(method, self.server.url + path, **rest) as response:
            return Got(response.status, await response.read(), response.headers)

    async def submit(self, user: str = "ann", **changes: Any) -> JobView:
        got = await self("POST", f"{API}/jobs", json={**JOB, **changes}, headers={"Zml-User": user})
        assert got.status == 201, got.body
        job = got.read(JobView)
        assert isinstance(job, JobView)
        return job


Test = Callable[[Asking], Awaitable[None]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    def runner(test: Test, bind: str = "127.0.0.1:0", **rest: Any) -> None:
        async def main() -> None:
            desk = FakeDesk(tmp_path)
            server = await serve(desk, bind, **rest)
            try:
                async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
                    await test(Asking(desk, server, session))
            finally:
                await server.stop()

        uvloop.run(main())

    return runner


Run = Callable[..., None]


# -- jobs ----------------------------------------------------------------------------------------------------


def test_a_job_is_submitted_shown_and_listed(run: Run) -> None:
    async def test(ask: Asking) -> None:
        got = await ask("POST", f"{API}/jobs", json=JOB, headers={"Zml-User": "ann"})
        job = got.read(JobView)
        assert (got.status, got.headers["Location"]) == (201, f"{API}/jobs/j1")
        assert (job.id, job.user, job.state, job.workers_min, job.workers_max) == (
            "j1",
            "ann",
            "QUEUED",
            1,
            4,
        )
        other = await ask.submit("bob", name="second")
        ask.desk.move("j1", "STARTING")

        shown = (await ask("GET", f"{API}/jobs/j2")).read(JobView)
        assert shown.submission == Submission(**JOB, name="second") and shown.name == other.name

        async def ids(query: str) -> list[str]:
            return [each.id for each in (await ask("GET", f"{API}/jobs{query}")).read(Jobs).jobs]

        assert await ids("") == ["j1", "j2"]
        assert await ids("?user=bob") == ["j2"]
        assert await ids("?state=STARTING&state=RUNNING") == ["j1"]
        assert await ids("?newest=1") == ["j2"]
        assert await ids("?user=nobody") == []

    run(test)


def test_a_submission_that_is_sent_again_is_the_same_job(run: Run) -> None:
    async def test(ask: Asking) -> None:
        key = {"Idempotency-Key": "k1", "Zml-User": "ann"}
        first = await ask("POST", f"{API}/jobs", json=JOB, headers=key)
        again = await ask("POST", f"{API}/jobs", json=JOB, headers=key)
        bobs = await ask("POST", f"{API}/jobs", json=JOB, headers={**key, "Zml-User": "bob"})
        assert first == again._replace(headers=first.headers) and bobs.read(JobView).id == "j2"
        other = await ask("POST", f"{API}/jobs", json={**JOB, "gpus": 1}, headers=key)
        assert (other.status, other.problem.code) == (422, BAD_JOB)
        for bad in ("", "x" * 256, "a b"):
            got = await ask("POST", f"{API}/jobs", json=JOB, headers={"Idempotency-Key": bad})
            assert got.status == 400, bad
        assert len(ask.desk.views) == 2

    run(test)


def test_a_job_is_cancelled_paused_resumed_and_scaled(run: Run) -> None:
    async def test(ask: Asking) -> None:
        await ask.submit()
        user = {"Zml-User": "bob"}
        paused = await ask("POST", f"{API}/jobs/j1/pause", json={"because": "my turn"}, headers=user)
        assert (paused.read(JobView).state, paused.read(JobView).because) == (
            "PAUSED",
            "paused by bob: my turn",
        )
        assert (await ask("POST", f"{API}/jobs/j1/resume")).read(JobView).state == "QUEUED"
        scaled = (await ask("POST", f"{API}/jobs/j1/scale", json={"workers": "2..8"})).read(JobView)
        assert (scaled.workers_min, scaled.workers_max) == (2, 8)
        for _ in range(2):  # twice is the same as once
            cancelled = (await ask("POST", f"{API}/jobs/j1/cancel", headers=user)).read(JobView)
            assert (cancelled.state, cancelled.because) == ("CANCELLED", "cancelled by bob")
        late = await ask("POST", f"{API}/jobs/j1/scale", json={"workers": 3})
        assert (late.status, late.problem.detail) == (409, "j1 is over: CANCELLED")

    run(test)


def test_a_job_explains_itself(run: Run) -> None:
    async def test(ask: Asking) -> None:
        for _ in range(3):
            await ask.submit()
        found = (await ask("GET", f"{API}/jobs/j3/explain")).read(Explanation)
        assert (found.job.id, found.ahead, found.ahead_count) == ("j3", ["j1", "j2"], 2)
        assert [each.what for each in found.decisions] == ["QUEUED"]

    run(test)


def test_nodes_errors_and_life_are_shown(run: Run) -> None:
    async def test(ask: Asking) -> None:
        node = NodeView(
            id="n1", state="UP", rack="r1", gpus=4, cpus=8, memory_mb=100, gpus_free=1, cpus_free=2,
            memory_mb_free=50,
        )  # fmt: skip
        ask.desk.machines.append(node)
        assert (await ask("GET", f"{API}/nodes")).read(Nodes).nodes == [node]
        assert (await ask("GET", f"{API}/livez")).read(Alive).zml
        page = (await ask("GET", f"{API}/errors/{NO_JOB}")).read(ErrorPage)
        assert (page.code, page.title) == (NO_JOB, "there is no such job")
        for nothing in ("ZML-E999", "x"):
            assert (await ask("GET", f"{API}/errors/{nothing}")).status == 404

    run(test)


# -- waiting -------------------------------------------------------------------------------------------------


def test_a_long_poll_answers_when_the_job_changes_and_not_before(run: Run) -> None:
    async def test(ask: Asking) -> None:
        await ask.submit()
        waiting = asyncio.Event()
        ask.desk.on_wait = lambda job: waiting.set()
        seen = (await ask("GET", f"{API}/jobs/j1")).headers["ETag"]
        asked = asyncio.create_task(ask("GET", f"{API}/jobs/j1?wait=30", headers={"If-None-Match": seen}))
        await waiting.wait()
        waiting.clear()
        ask.desk.tick("j1")  # worker-seconds are no news
        await waiting.wait()
        assert not asked.done()
        ask.desk.move("j1", "STARTING")
        got = await asked
        assert (got.status, got.read(JobView).state) == (200, "STARTING")
        assert got.headers["ETag"] != seen

        # What changed before the question is told at once: nothing is missed between two polls.
        ask.desk.move("j1", "RUNNING")
        late = await ask("GET", f"{API}/jobs/j1?wait=30", headers={"If-None-Match": got.headers["ETag"]})
        assert late.read(JobView).state == "RUNNING"

    run(test)


def test_a_long_poll_over_which_nothing_happens_is_304(run: Run) -> None:
    async def test(ask: Asking) -> None:
        await ask.submit()
        seen = (await ask("GET", f"{API}/jobs/j1")).headers["ETag"]
        got = await ask("GET", f"{API}/jobs/j1?wait=0.05", headers={"If-None-Match": seen})
        assert (got.status, got.body, got.headers["ETag"]) == (304, b"", seen)
        ask.desk.cancel("j1", "")
        over = (await ask("GET", f"{API}/jobs/j1")).headers["ETag"]
        got = await ask("GET", f"{API}/jobs/j1?wait=60", headers={"If-None-Match": over})
        assert got.status == 304  # at once: what is over does not change

    run(test)


def test_a_server_that_stops_breaks_off_those_that_wait(run: Run) -> None:
    async def test(ask: Asking) -> None:
        await ask.submit()
        waiting = asyncio.Event()
        ask.desk.on_wait = lambda job: waiting.set()
        asked = asyncio.create_task(ask("GET", f"{API}/jobs/j1?wait=60"))
        await waiting.wait()
        async with asyncio.timeout(10):
            await ask.server.stop()
        with pytest.raises(aiohttp.ClientError):
            await asked
        await ask.server.stop()

    run(test)


# -- logs ----------------------------------------------------------------------------------------------------


def test_what_processes_print_is_listed_and_read(run: Run) -> None:
    async def test(ask: Asking) -> None:
        await ask.submit()
        assert (await ask("GET", f"{API}/jobs/j1/logs")).read(Logs) == Logs(0, [])
        ask.desk.move("j1", "STARTING")
        ask.desk.write("j1", "w0.out", "one\ntwo\nthree\nfour")
        ask.desk.write("j1", "w1.out", "")
        found = (await ask("GET", f"{API}/jobs/j1/logs")).read(Logs)
        assert (found.attempt, {each.name: each.bytes for each in found.files}) == (
            1,
            {"w0.out": 18, "w1.out": 0},
        )
        for query, begin, text in (
            ("", "0", b"one\ntwo\nthree\nfour"),
            ("?tail=2", "8", b"three\nfour"),
            ("?tail=0", "18", b""),
            ("?tail=99", "0", b"one\ntwo\nthree\nfour"),
            ("?offset=4", "4", b"two\nthree\nfour"),
            ("?offset=99", "18", b""),
            ("?attempt=1", "0", b"one\ntwo\nthree\nfour"),
        ):
            got = await ask("GET", f"{API}/jobs/j1/logs/w0.out{query}")
            assert (got.status, got.body, got.headers["Zml-Offset"]) == (200, text, begin), query
            assert (got.headers["Zml-Attempt"], got.headers["Content-Type"]) == (
                "1",
                "text/plain; charset=utf-8",
            )
        for path, fix in (("w0.ou", "Did you mean w0.out?"), ("xyz", "There is w0.out, w1.out.")):
            got = await ask("GET", f"{API}/jobs/j1/logs/{path}")
            assert (got.status, got.problem.fix) == (404, fix)
        assert (await ask("GET", f"{API}/jobs/j1/logs/w0.out?attempt=2")).status == 404
        assert (await ask("GET", f"{API}/jobs/j1/logs/w0.out?tail=1&offset=1")).status == 400

    run(test)


def test_a_log_that_grows_is_followed_to_its_end(run: Run) -> None:
    async def test(ask: Asking) -> None:
        await ask.submit()
        ask.desk.move("j1", "STARTING")
        ask.desk.write("j1", "w0.out", "old\nnew\n")
        url = f"{ask.server.url}{API}/jobs/j1/logs/w0.out?follow&tail=1"
        async with ask.session.get(url) as response:
            assert await response.content.readexactly(4) == b"new\n"
            ask.desk.move("j1", "RUNNING")
            path = ask.desk.write("j1", "w0.out", "step 1\n")
            assert await response.content.readline() == b"step 1\n"
            os.rename(path, f"{path}.1")  # rotated: what was written last comes before the new file
            with open(f"{path}.1", "a") as file:
                file.write("step 2\n")
            ask.desk.write("j1", "w0.out", "step 3\n")
            assert await response.content.readexactly(14) == b"step 2\nstep 3\n"
            path.write_text("4\n")  # cut, and begun again
            assert await response.content.readline() == b"4\n"
            ask.desk.write("j1", "w0.out", "the end\n")
            ask.desk.move("j1", "SUCCEEDED")
            assert await response.read() == b"the end\n"

    run(test, limits=Limits(poll_s=0.01))


def test_a_follower_of_an_attempt_that_is_over_is_let_go(run: Run) -> None:
    async def test(ask: Asking) -> None:
        await ask.submit()
        ask.desk.move("j1", "STARTING")
        ask.desk.write("j1", "w0.out", "first\n")
        ask.desk.move("j1", "QUEUED")
        assert (await ask("GET", f"{API}/jobs/j1/logs/w0.out?follow=true")).body == b"first\n"
        ask.desk.move("j1", "STARTING")
        ask.desk.write("j1", "w0.out", "second\n")
        assert (await ask("GET", f"{API}/jobs/j1/logs/w0.out?follow=1&attempt=1")).body == b"first\n"

    run(test, limits=Limits(poll_s=0.01))


def test_a_follower_stays_while_processes_of_an_attempt_that_has_ended_are_left(run: Run) -> None:
    """Their nodes may still be sending what they have printed."""

    async def test(ask: Asking) -> None:
        await ask.submit()
        ask.desk.move("j1", "STARTING", nodes=["n1"])
        ask.desk.write("j1", "w0.out", "first\n")
        ask.desk.move("j1", "QUEUED")  # its end is known, and nobody has left yet
        async with ask.session.get(f"{ask.server.url}{API}/jobs/j1/logs/w0.out?follow") as response:
            assert await response.content.readline() == b"first\n"
            ask.desk.write("j1", "w0.out", "last\n")
            assert await response.content.readline() == b"last\n"
            ask.desk.move("j1", "CANCELLED")
            assert await response.read() == b""

    run(test, limits=Limits(poll_s=0.01))


def test_a_follower_is_let_go_after_a_while_and_can_go_on_from_there(run: Run) -> None:
    async def test(ask: Asking) -> None:
        await ask.submit()
        ask.desk.move("j1", "STARTING")
        ask.desk.write("j1", "w0.out", "abc\n")
        got = await ask("GET", f"{API}/jobs/j1/logs/w0.out?follow=1")
        assert got.body == b"abc\n"
        ask.desk.write("j1", "w0.out", "def\n")
        assert (await ask("GET", f"{API}/jobs/j1/logs/w0.out?follow=1&offset=4")).body == b"def\n"

    run(test, limits=Limits(poll_s=0.01, follow_s=0.1))


def test_a_large_log_travels_in_pieces(run: Run, tmp_path: Path) -> None:
    async def test(ask: Asking) -> None:
        await ask.submit()
        ask.desk.move("j1", "STARTING")
        text = "".join(f"line {number}\n" for number in range(200_000))
        ask.desk.write("j1", "w0.out", text)
        assert (await ask("GET", f"{API}/jobs/j1/logs/w0.out")).body == text.encode()
        tail = await ask("GET", f"{API}/jobs/j1/logs/w0.out?tail=50000")
        assert tail.body == "".join(f"line {number}\n" for number in range(150_000, 200_000)).encode()

    run(test)


def test_nothing_but_a_job_s_own_plain_files_can_be_read(run: Run, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("password")

    async def test(ask: Asking) -> None:
        await ask.submit()
        ask.desk.move("j1", "STARTING")
        out = ask.desk.write("j1", "w0.out", "x")
        out.with_name("link.out").symlink_to(secret)
        os.mkfifo(out.with_name("pipe.out"))
        out.with_name("folder.out").mkdir()
        for name in (
            "..%2f..%2fsecret", "%2e%2e", "..", ".", "%2fetc%2fpasswd", "w0.out%00", "w0.out%0a", "....//secret",
            "link.out", "pipe.out", "folder.out", "%ff%fe",
        ):  # fmt: skip
            for query in ("", "?follow=1", "?tail=1"):
                got = await ask("GET", f"{API}/jobs/j1/logs/{name}{query}")
                assert got.status in (404, 405) and b"password" not in got.body, name
        for name in ("..%2f..%2fx", "%00", "a%0a", "%20", "x" * 300):
            assert (await ask("GET", f"{API}/jobs/{name}")).status == 404
        listed = (await ask("GET", f"{API}/jobs/j1/logs")).read(Logs).files
        assert [each.name for each in listed] == ["w0.out"]

    run(test)


# -- archives ------------------------------------------------------------------------------------------------


def test_an_archive_is_taken_once_and_given_back(run: Run) -> None:
    async def test(ask: Asking) -> None:
        data = os.urandom(700_000)
        sha256 = hashlib.sha256(data).hexdigest()
        path = f"{API}/archives/{sha256}"
        assert (await ask("HEAD", path)).status == (await ask("GET", path)).status == 404
        lacking = await ask("POST", f"{API}/jobs", json={"script": "t.py", "archive": sha256})
        assert (lacking.status, lacking.problem.code) == (409, ARCHIVE)
        for _ in range(2):
            assert (await ask("PUT", path, data=data)).status == 204
        assert (await ask("HEAD", path)).status == 200
        assert (await ask("GET", path)).body == data
        assert (await ask("POST", f"{API}/jobs", json={"script": "t.py", "archive": sha256})).status == 201
        wrong = await ask("PUT", f"{API}/archives/{'0' * 64}", data=data)
        assert (wrong.status, wrong.problem.code) == (422, ARCHIVE)
        for name in ("0" * 63, "0" * 65, "G" * 64, "..%2f" + "0" * 64, "0" * 64 + "%0a"):
            assert (await ask("PUT", f"{API}/archives/{name}", data=data)).status == 404

    run(test)


def test_an_archive_that_is_too_large_is_refused_whatever_it_says_of_itself(run: Run) -> None:
    async def test(ask: Asking) -> None:
        path = f"{API}/archives/{'0' * 64}"
        said = await ask("PUT", path, data=b"x" * 2001)
        assert (said.status, said.problem.code) == (413, ARCHIVE)

        async def unsaid() -> Any:
            for _ in range(3):
                yield b"x" * 1000

        assert (await ask("PUT", path, data=unsaid())).status == 413
        assert not ask.desk.has_archive("0" * 64)

    run(test, limits=Limits(archive_bytes=2000))


def test_an_upload_that_stalls_is_given_up_and_its_place_is_free_again(run: Run) -> None:
    async def test(ask: Asking) -> None:
        never = asyncio.Event()

        async def stalls() -> Any:
            yield b"x"
            await never.wait()

        data = b"abc"
        path = f"{API}/archives/{hashlib.sha256(data).hexdigest()}"
        asked = asyncio.create_task(ask("PUT", path, data=stalls()))
        got = await asked
        assert (got.status, got.problem.detail) == (408, "the archive came too slowly, or stopped coming")
        assert (await ask("PUT", path, data=data)).status == 204

    run(test, limits=Limits(stall_s=0.1, uploads=1))


def test_no_more_uploads_at_once_than_allowed(run: Run) -> None:
    async def test(ask: Asking) -> None:
        go, begun = asyncio.Event(), asyncio.Event()

        async def slow() -> Any:
            yield b"ab"
            begun.set()
            await go.wait()
            yield b"c"

        path = f"{API}/archives/{hashlib.sha256(b'abc').hexdigest()}"
        first = asyncio.create_task(ask("PUT", path, data=slow()))
        await begun.wait()
        while not (second := await ask("PUT", path, data=b"abc")).status == 503:
            pass  # the first is on its way
        assert second.headers["Retry-After"] == "1"
        go.set()
        assert (await first).status == 204

    run(test, limits=Limits(uploads=1))


# -- who is let in -------------------------------------------------------------------------------------------

ANN, BOB, ROOT, SHARED = (name * 8 for name in ("ann-", "bob-", "root", "any-"))


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    path = tmp_path / "tokens"
    path.write_text(f"# who may come in\nann {ANN}\nbob {BOB}\n\nboss {ROOT} admin\n{SHARED}\n")
    path.chmod(0o600)
    return str(path)


def test_with_tokens_nobody_comes_in_without_and_the_token_says_who_it_is(run: Run, tokens: str) -> None:
    async def test(ask: Asking) -> None:
        def bearer(token: str, **more: str) -> dict[str, str]:
            return {"Authorization": f"Bearer {token}", "Zml-User": "mallory", **more}

        for headers in (
            {},
            bearer("x" * 32),
            bearer(""),
            bearer(ANN + "x"),
            {"Authorization": f"Basic {ANN}"},
        ):
            for method, path in (
                ("GET", "/jobs"),
                ("POST", "/jobs"),
                ("PUT", "/archives/" + "0" * 64),
                ("GET", "/x"),
            ):
                got = await ask(method, API + path, headers=headers)
                assert (got.status, got.problem.code) == (401, NO_TOKEN)
                assert got.headers["WWW-Authenticate"].startswith("Bearer")
                assert ANN not in got.body.decode()
        for path in ("/livez", "/openapi.json", f"/errors/{NO_TOKEN}"):
            assert (await ask("GET", API + path)).status == 200
        users = [
            (await ask("POST", f"{API}/jobs", json=JOB, headers=bearer(token))).read(JobView).user
            for token in (ANN, BOB, ROOT, SHARED)
        ]
        assert users == ["ann", "bob", "boss", "mallory"]

        refused = await ask("POST", f"{API}/jobs/j1/cancel", headers=bearer(BOB))
        assert (refused.status, refused.problem.code) == (403, NOT_ALLOWED)
        assert refused.problem.detail == "j1 belongs to ann, and you are bob"
        assert ask.desk.views["j1"].state == "QUEUED"
        for order in ("pause", "resume", "scale"):
            body = {"json": {"workers": 1}} if order == "scale" else {}
            assert (await ask("POST", f"{API}/jobs/j1/{order}", headers=bearer(BOB), **body)).status == 403
            assert (await ask("POST", f"{API}/jobs/j1/{order}", headers=bearer(ANN), **body)).status == 200
        assert (await ask("POST", f"{API}/jobs/j1/cancel", headers=bearer(ROOT))).status == 200
        assert (await ask("DELETE", f"{API}/jobs/j1", headers=bearer(BOB))).status == 403
        assert (await ask("DELETE", f"{API}/jobs/j1", headers=bearer(ANN))).status == 200
        assert (await ask("GET", f"{API}/jobs/j1", headers=bearer(ANN))).status == 404

    run(test, tokens=tokens)


@pytest.mark.parametrize(
    ("text", "mode", "says"),
    [
        ("a" * 32, 0o644, "others than its owner may read"),
        ("a" * 32, 0o640, "others than its owner may read"),
        ("", 0o600, "there is no token"),
        ("short", 0o600, "16 or more"),
        ("ann " + "a" * 32 + " root", 0o600, "is not USER TOKEN"),
        ("an/n " + "a" * 32, 0o600, "no user's name"),
        ("a" * 20 + "\x01", 0o600, "16 or more"),
    ],
)
def test_a_file_of_tokens_that_is_not_safe_is_refused(
    run: Run, tmp_path: Path, text: str, mode: int, says: str
) -> None:
    path = tmp_path / "tokens"
    path.write_text(text)
    path.chmod(mode)

    async def test(ask: Asking) -> None:
        raise AssertionError("it must not begin")

    with pytest.raises(ZmlError, match=says) as refused:
        run(test, tokens=str(path))
    assert refused.value.code == NO_TOKEN and (not text or text not in str(refused.value))


def test_the_variables_of_a_job_are_shown_to_whom_it_belongs(run: Run, tokens: str) -> None:
    async def test(ask: Asking) -> None:
        def bearer(token: str) -> dict[str, dict[str, str]]:
            return {"headers": {"Authorization": f"Bearer {token}"}}

        await ask("POST", f"{API}/jobs", json={**JOB, "environment": {"KEY": "secret"}}, **bearer(ANN))
        for path in ("/jobs/j1", "/jobs/j1/explain"):
            for token, sees in ((ANN, True), (ROOT, True), (BOB, False)):
                got = await ask("GET", API + path, **bearer(token))
                assert (got.status, b"secret" in got.body, b"KEY" in got.body) == (200, sees, True)

    run(test, tokens=tokens)


def test_no_spelling_of_a_path_leads_past_the_tokens(run: Run, tokens: str) -> None:
    async def test(ask: Asking) -> None:
        port = int(ask.server.url.rpartition(":")[2])
        for path in (
            "/api/v1/livez/../jobs", "/api/v1/errors/../jobs", "/api/v1/errors/..%2fjobs", "//api/v1/jobs",
            "/api/v1/livez%2f..%2fjobs", "/api/v1/livez/%2e%2e/jobs", "http://localhost/api/v1/livez/../jobs",
            "/api/v1/jobs;/livez", "/api/v1/jobs?/api/v1/livez", "/api/v1/./jobs", "/API/V1/JOBS",
        ):  # fmt: skip
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answered = await reader.read()
            assert answered.split()[1] in (b"401", b"404", b"400"), path
            assert b'"jobs"' not in answered, path
            writer.close()

    run(test, tokens=tokens)


def test_beyond_loopback_it_does_not_begin_without_tokens(run: Run, tokens: str, tmp_path: Path) -> None:
    async def never(ask: Asking) -> None:
        raise AssertionError("it must not begin")

    for bind in ("0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.org:0"):
        with pytest.raises(ZmlError) as refused:
            run(never, bind)
        assert refused.value.code == NO_TOKEN
    for bind, code in (("nonsense", USAGE), ("127.0.0.1:99999", USAGE), (":1", USAGE)):
        with pytest.raises(ZmlError) as refused:
            run(never, bind)
        assert refused.value.code == code

    async def test(ask: Asking) -> None:
        url = ask.server.url.replace("0.0.0.0", "127.0.0.1")
        for headers, status in (({}, 401), ({"Authorization": f"Bearer {ANN}", "Host": "any.example"}, 200)):
            async with ask.session.get(f"{url}{API}/jobs", headers=headers) as response:
                assert response.status == status

    run(test, "0.0.0.0:0", tokens=tokens)


def test_a_browser_is_not_led_here(run: Run) -> None:
    async def test(ask: Asking) -> None:
        port = ask.server.url.rpartition(":")[2]
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1.evil.example",
            "",
            "[",
            "127.0.0.1@evil",
        ):
            got = await ask("GET", f"{API}/jobs", headers={"Host": host})
            assert got.status in (400, 421), host
        for host in (f"localhost:{port}", "localhost", f"127.0.0.1:{port}", f"[::1]:{port}"):
            assert (await ask("GET", f"{API}/jobs", headers={"Host": host})).status == 200
        for headers in (
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://127.0.0.1:1"},
            {"Sec-Fetch-Site": "cross-site"},
        ):
            got = await ask("POST", f"{API}/jobs", json=JOB, headers=headers)
            assert (got.status, got.problem.code) == (403, NOT_ALLOWED)
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
            got = await ask("POST", f"{API}/jobs", data=json.dumps(JOB), headers={"Content-Type": kind})
            assert got.status == 415  # which a page could send without asking
        assert ask.desk.views == {}
        answered = await ask("OPTIONS", f"{API}/jobs", headers={"Origin": ask.server.url})
        assert answered.status == 405 and not any(
            name.startswith("Access-Control") for name in answered.headers
        )

    run(test)


def test_a_user_that_is_no_name_is_refused(run: Run) -> None:
    async def test(ask: Asking) -> None:
        for user in ("a b", "../x", "x" * 65, "", "é"):
            assert (await ask("GET", f"{API}/jobs", headers={"Zml-User": user})).status == 400
        assert (await ask("POST", f"{API}/jobs", json=JOB)).read(JobView).user == "anonymous"

    run(test)


# -- limits --------------------------------------------------------------------------------------------------


def test_there_is_an_end_to_connections_and_a_refused_one_is_told(run: Run) -> None:
    async def test(ask: Asking) -> None:
        host, port = "127.0.0.1", int(ask.server.url.rpartition(":")[2])
        held = [await asyncio.open_connection(host, port) for _ in range(2)]
        for reader, writer in held:
            writer.write(b"GET /api/v1/livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        reader, writer = await asyncio.open_connection(host, port)
        assert (await reader.readline()) == b"HTTP/1.1 503 Service Unavailable\r\n"
        assert b"as many connections" in await reader.read()
        for _, each in (*held, (reader, writer)):
            each.close()
            await each.wait_closed()
        while (await ask("GET", f"{API}/livez")).status != 200:
            pass

    run(test, limits=Limits(connections=2))


def test_a_connection_that_says_nothing_is_closed(run: Run) -> None:
    async def test(ask: Asking) -> None:
        host, port = "127.0.0.1", int(ask.server.url.rpartition(":")[2])
        for said in (b"", b"GET /api/v1/jobs HTTP/1.1\r\nHost: loc"):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(said)
            async with asyncio.timeout(20):
                assert await reader.read() == b""
            writer.close()

    run(test, limits=Limits(idle_s=0.1))


def test_a_body_that_is_too_large_or_never_comes_is_refused(run: Run) -> None:
    async def test(ask: Asking) -> None:
        large = await ask("POST", f"{API}/jobs", json={**JOB, "args": ["x" * 4000] * 3})
        assert (large.status, large.problem.detail) == (413, "the body is larger than the server takes")
        reader, writer = await asyncio.open_connection("127.0.0.1", int(ask.server.url.rpartition(":")[2]))
        writer.write(
            b"POST /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")
        writer.close()

    run(test, limits=Limits(body_bytes=10_000, deadline_s=0.2))


@pytest.mark.soak
def test_a_reader_that_takes_nothing_is_hung_up_on(run: Run) -> None:
    async def test(ask: Asking) -> None:
        await ask.submit()
        ask.desk.move("j1", "STARTING")
        path = ask.desk.write("j1", "w0.out", "")
        os.truncate(path, 64 << 20)
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", int(ask.server.url.rpartition(":")[2]), limit=1024
        )
        writer.write(b"GET /api/v1/jobs/j1/logs/w0.out HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        async with asyncio.timeout(20):
            while len(ask.server.runner.server.connections) > 1:  # type: ignore[union-attr]  # the session's own
                await asyncio.sleep(0.01)
        taken = 0
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(1 << 20):
                taken += len(piece)
        assert taken < 64 << 20
        writer.close()

    run(test, limits=Limits(stall_s=0.1))


def test_whoever_hangs_up_is_waited_for_no_longer(run: Run) -> None:
    async def test(ask: Asking) -> None:
        await ask.submit()
        waiting = asyncio.Event()
        ask.desk.on_wait = lambda job: waiting.set()
        _, writer = await asyncio.open_connection("127.0.0.1", int(ask.server.url.rpartition(":")[2]))
        writer.write(b"GET /api/v1/jobs/j1?wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await waiting.wait()
        assert len(ask.desk.waiters["j1"]) == 1
        writer.close()
        async with asyncio.timeout(20):
            while ask.desk.waiters["j1"]:
                await asyncio.sleep(0.01)

    run(test)


def test_a_desk_that_fails_is_a_500_that_tells_nothing(run: Run) -> None:
    async def test(ask: Asking) -> None:
        def fails() -> Any:
            raise RuntimeError("the secret of the house")

        ask.desk.nodes = fails  # type: ignore[method-assign]
        got = await ask("GET", f"{API}/nodes")
        assert (got.status, got.problem.detail) == (500, "the server has failed; its log says how")
        assert b"secret" not in got.body
        assert (await ask("GET", f"{API}/jobs")).status == 200

    run(test)


def test_an_address_in_use_is_an_error_for_people(run: Run) -> None:
    async def test(ask: Asking) -> None:
        with pytest.raises(ZmlError) as refused:
            await serve(ask.desk, ask.server.url)
        assert refused.value.code == PORT_IN_USE

    run(test)


# -- wrong input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("GET", "/nowhere", 404, "there is nothing at /api/v1/nowhere"),
        ("DELETE", "/jobs", 405, "DELETE means nothing at /api/v1/jobs"),
        ("GET", "/jobs/j9", 404, "there is no job j9"),
        ("GET", "/jobs/j9?wait=1", 404, "there is no job j9"),
        ("GET", "/jobs/j9/explain", 404, "there is no job j9"),
        ("GET", "/jobs/j9/logs", 404, "there is no job j9"),
        ("GET", "/jobs/j9/logs/w0.out", 404, "there is no job j9"),
        ("POST", "/jobs/j9/cancel", 404, "there is no job j9"),
        ("GET", "/jobs?statt=RUNNING", 400, "the query has an unknown name statt"),
        ("GET", "/jobs?state=ASLEEP", 400, "state = 'ASLEEP': invalid enum value 'ASLEEP'"),
        ("GET", "/jobs?newest=0", 400, "newest = '0': expected int >= 1"),
        ("GET", "/jobs?newest=1&newest=2", 400, "newest is there 2 times"),
        ("GET", "/jobs/j9?wait=nan", 400, "wait = 'nan': expected float >= 0.0"),
        ("GET", "/jobs/j9?wait=3600", 400, "wait = '3600': expected float <= 60.0"),
        ("GET", "/nodes?x=1", 400, "the query has an unknown name x"),
        ("POST", "/jobs", 415, "the body is application/octet-stream"),
    ],
)
def test_what_is_wrong_is_told(run: Run, method: str, path: str, status: int, says: str) -> None:
    async def test(ask: Asking) -> None:
        got = await ask(method, API + path)
        assert (got.status, got.problem.detail) == (status, says)

    run(test)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"script": ""}, "script = ''"),
        ({"scirpt": "x"}, "object contains unknown field scirpt"),
        ({"workers": "4..2"}, "workers = 4..2"),
        ({"workers": 0}, "workers = 0"),
        ({"workers": "many"}, "workers = many"),
        ({"workers": "1..99999"}, "workers = 1..99999"),
        ({"workers": "2\n"}, r"workers = '2\n'"),
        ({"shards": 1001}, "shards = 1,001"),
        ({"replicas": 1}, "replicas = 1 with shards = 1"),
        ({"folder": "code"}, "folder = 'code'"),
        ({"folder": ""}, "neither folder nor archive"),
        ({"archive": "0" * 64}, "both folder and archive"),
        ({"archive": "0" * 64, "folder": "", "script": "../x"}, "script = '../x'"),
        ({"archive": "0" * 64 + "\n", "folder": ""}, None),
        ({"args": ["a\0b"]}, "args with a zero byte"),
        ({"environment": {"A=B": "x"}}, "environment: 'A=B'"),
        ({"environment": {"ZML_KEYS": "x"}}, "environment: ZML_KEYS"),
        ({"settings": {"compres": "none"}}, "settings has an unknown key compres"),
        ({"settings": {"staleness": -1}}, "settings: staleness = -1: expected int >= 0"),
        ({"settings": {"bind": "tcp://0.0.0.0:1"}}, "settings: bind is no setting of one job"),
        ({"gpus": 2**63}, None),
        ({"time_limit_s": 1e300}, "time_limit_s = 1e+300"),
        ({"name": "a/b"}, f"expected {NAME_IN_WORDS} at name"),
        ({"name": "ab\n"}, f"expected {NAME_IN_WORDS} at name"),
    ],
)
def test_a_submission_that_makes_no_sense_is_not_taken(
    run: Run, changes: dict[str, Any], says: str | None
) -> None:
    async def test(ask: Asking) -> None:
        got = await ask("POST", f"{API}/jobs", json={**JOB, **changes})
        assert (got.status, got.problem.code) == (422, BAD_JOB)
        assert says is None or got.problem.detail == says
        assert ask.desk.views == {}

    run(test)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.dictionaries(st.sampled_from(Submission.__struct_fields__), JSON, max_size=6)
BODIES = st.one_of(
    st.binary(max_size=64),
    JSON.map(lambda value: json.dumps(value).encode()),
    FIELDS.map(lambda value: json.dumps({**JOB, **value}).encode()),
    FIELDS.map(lambda value: json.dumps({"settings": value, **JOB}).encode()),
    st.sampled_from(
        [b"[" * 100_000, b'{"settings":{"a":' + b"[" * 50_000, b'"\\ud800"', b'{"script":"\xff"}', b"1e999"]
    ),
)


def test_whatever_a_body_holds_the_answer_is_not_that_the_server_failed(run: Run) -> None:
    async def test(ask: Asking) -> None:
        loop = asyncio.get_running_loop()

        async def send(path: str, body: bytes) -> None:
            got = await ask("POST", API + path, data=body, headers={"Content-Type": "application/json"})
            assert 200 <= got.status < 500, got.body
            if got.status >= 400:
                assert got.problem.detail

        @settings(
            max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
        )
        @given(st.sampled_from(["/jobs", "/jobs/j1/scale", "/jobs/j1/pause", "/jobs/j1/cancel"]), BODIES)
        def always(path: str, body: bytes) -> None:
            asyncio.run_coroutine_threadsafe(send(path, body), loop).result(30)

        await ask.submit()
        await asyncio.to_thread(always)

    run(test)


# -- the description -----------------------------------------------------------------------------------------


def test_the_description_has_every_route_and_nothing_else(run: Run) -> None:
    async def test(ask: Asking) -> None:
        got = await ask("GET", f"{API}/openapi.json")
        described = json.loads(got.body)
        assert described == json.loads(msgspec.json.encode(openapi.document()))
        served = {
            (resource.canonical, route.method)
            for resource in ask.server.runner.app.router.resources()
            for route in resource
        }
        told = {(path, method.upper()) for path, each in described["paths"].items() for method in each}
        assert told == served == {(API + route.path, route.method) for route in ROUTES}
        names = [each["operationId"] for path in described["paths"].values() for each in path.values()]
        assert sorted(names) == sorted(route.name for route in ROUTES)

        # Every reference leads somewhere, and every path parameter is described.
        text = got.body.decode()
        for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
            assert name in described["components"]["schemas"]
        for path, methods in described["paths"].items():
            inside = {part.split("}")[0] for part in path.split("{")[1:]}
            for each in methods.values():
                assert {p["name"] for p in each["parameters"] if p["in"] == "path"} == inside

    run(test)


def test_every_documented_answer_is_what_comes(run: Run) -> None:
    """Each route is asked, and its answer decodes as the struct that the table names."""

    async def test(ask: Asking) -> None:
        data = b"archive"
        sha256 = hashlib.sha256(data).hexdigest()
        await ask("PUT", f"{API}/archives/{sha256}", data=data)
        await ask.submit()
        ask.desk.move("j1", "STARTING")
        ask.desk.write("j1", "w0.out", "x\n")
        values = {"job": "j1", "name": "w0.out", "sha256": sha256, "code": NO_JOB}
        bodies: dict[str, Any] = {
            "submit": {"json": JOB},
            "scale": {"json": {"workers": 2}},
            "put_archive": {"data": data},
        }
        for route in ROUTES:
            if route.name == "delete":
                ask.desk.move("j1", "CANCELLED")
            got = await ask(route.method, API + route.path.format(**values), **bodies.get(route.name, {}))
            assert got.status in route.answers, (route.name, got)
            kind = route.answers[got.status]
            if kind in (str, bytes):
                assert got.body
            elif kind is None:
                assert got.body == b""
            else:
                msgspec.json.decode(got.body, type=kind)
            for header in route.answer_headers:
                assert header in got.headers
            assert got.headers["Cache-Control"] == "no-store"
            assert got.headers["X-Content-Type-Options"] == "nosniff"

    run(test)
