"""The dashboard over HTTP: every view, who may come in, hostile requests, bounds, and what changes."""

import asyncio
import gzip
import http.client
import json
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from tests.zml.dashboard.serving import QUICK, Dashboard, dashboard
from tests.zml.dashboard.synthetic import HOSTILE, Made, Shape, put_status, write
from tests.zml.web.desk import FakeDesk
from zml.cluster.jobs import NodeView, Submission
from zml.dashboard.mounting import of_run
from zml.dashboard.serving import CSP, assets
from zml.dashboard.sources import HubRuns, OneRun, RunsOf
from zml.runs import rundir
from zml.status import JobStatus
from zml.web.access import Door, Token
from zml.web.server import Limits as ServerLimits
from zml.web.server import Server

SMALL = Shape(workers=4, shards=2, steps=400, rows=60, member_rows=20, timeline_steps=50, log_lines=20)
PAGES = (
    "overview",
    "series",
    "workers",
    "shards",
    "data",
    "checkpoints",
    "events",
    "config",
    "steps",
    "logs",
)
TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    runs = tmp_path_factory.mktemp("dashboard") / "runs"
    write(runs / "one", SMALL)
    write(runs / "two", replace(SMALL, over=True, troubles=frozenset({"hostile"})))
    with dashboard(RunsOf(runs)) as found:
        yield found


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("run", ["one", "two"])
def test_every_page_of_every_run_is_json_with_all_its_headers(served: Dashboard, run: str, page: str) -> None:
    answer = served.ask(f"/view/run/{run}/{page}")
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    assert answer.headers["Content-Security-Policy"] == CSP and "unsafe" not in CSP
    assert (answer.headers["Cache-Control"], answer.headers["X-Content-Type-Options"]) == (
        "no-store",
        "nosniff",
    )
    assert answer.json


def test_the_first_view_says_what_is_here(served: Dashboard) -> None:
    assert served.ask("/view/about").json["kind"] == "runs"
    assert [run["name"] for run in served.ask("/view/runs").json["runs"]] == ["two", "one"]
    assert served.ask("/view/jobs").status == 404


def test_pages_are_served_as_they_lie_and_not_again(served: Dashboard) -> None:
    for name in assets():
        answer = served.ask(f"/static/{name}")
        assert answer.status == 200 and answer.body == assets()[name].body
        assert served.ask(f"/static/{name}", headers={"If-None-Match": answer.headers["ETag"]}).status == 304
    index = served.ask("/")
    assert index.headers["Content-Type"] == "text/html; charset=utf-8"
    assert b"<script>" not in index.body and b"style=" not in index.body and b"http" not in index.body


@pytest.mark.parametrize(
    "path",
    [
        "/static/../views.py",
        "/static/%2e%2e/views.py",
        "/static/..%2fviews.py",
        "/static/vendor/../../serving.py",
        "/static//etc/passwd",
        "/static/",
        "/view/run/../overview",
        "/view/run/%2e%2e/overview",
        "/view/run/..%2f..%2fetc/overview",
        "/view/run/one%00/overview",
        "/view/run/one/../../etc",
        "/view/run/one/nothing",
        "/view/run/nobody/overview",
        "/view/run/nobody/live",
        "/view/run/%3C%2Fscript%3E/overview",
        "/nothing",
    ],
)
def test_no_path_leads_out(served: Dashboard, path: str) -> None:
    answer = served.ask(path)
    assert answer.status == 404 and b"script>" not in answer.body


@pytest.mark.parametrize(
    "query", ["clock=-1", "clock=x", "clock=1e9", "clock=" + "9" * 400, "clock=%00", "clock=\uff11"]
)
def test_a_step_that_is_no_number_is_refused(served: Dashboard, query: str) -> None:
    answer = served.ask("/view/run/one/steps?" + query.replace("\uff11", "%EF%BC%91"))
    assert answer.status == 400 and answer.json["detail"]


def test_a_step_beyond_the_last_is_the_last(served: Dashboard) -> None:
    assert served.ask("/view/run/one/steps?clock=999999999").json["clock"] == 393


@pytest.mark.parametrize(
    "asked",
    [
        b"",
        b"[]",
        b"{not json",
        b'{"most": 0}',
        b'{"most": 1000000}',
        b'{"level": "loud"}',
        b'{"cursor": "../../etc"}',
        b'{"cursor": "\xf0\x9f\x98\x80"}',
        b'{"members": 3}',
        b'{"text": "' + b"x" * 300 + b'"}',
        b'{"until": "soon"}',
        b"\xff\xfe",
    ],
)
def test_what_asks_for_no_lines_is_refused(served: Dashboard, asked: bytes) -> None:
    answer = served.ask("/view/run/one/logs", method="POST", body=asked)
    assert answer.status == 400 and answer.headers["Content-Type"].startswith("application/problem+json")


def test_a_body_that_is_too_large_is_refused(served: Dashboard) -> None:
    answer = served.ask("/view/run/one/logs", method="POST", body=b"x" * (2**20 + 1))
    assert answer.status == 413


def logs(served: Dashboard, run: str = "one", **asked: Any) -> Any:
    answer = served.ask(f"/view/run/{run}/logs", method="POST", body=json.dumps(asked).encode())
    assert answer.status == 200
    return answer.json


def test_logs_are_filtered_bounded_and_followed(served: Dashboard, tmp_path: Path) -> None:
    write(tmp_path / "run", SMALL)
    with dashboard(OneRun(tmp_path / "run")) as own:
        page = logs(own, "run", members=["w1"], most=5)
        assert [line["member"] for line in page["lines"]] == ["w1"] * 5 and not page["complete"]
        older = logs(own, "run", members=["w1"], most=50, until=page["lines"][0]["at"])
        assert len(older["lines"]) == 15 and older["complete"]
        assert logs(own, "run", cursor=page["cursor"])["lines"] == []
        with (tmp_path / "run" / rundir.LOGS / "w2.jsonl").open("a") as file:
            file.write('{"time": "2030-01-01T00:00:00Z", "level": "error", "message": "late"}\n')
        found = logs(own, "run", cursor=page["cursor"])
        assert [(line["member"], line["message"]) for line in found["lines"]] == [("w2", "late")]
        assert [line["message"] for line in logs(own, "run", level="error")["lines"]] == ["late"]
        assert logs(own, "run", text="LATE")["lines"] == found["lines"]
        query = own.ask("/view/run/run/logs?member=w2&level=error&most=3").json
        assert query["lines"] == found["lines"]


def test_hostile_lines_come_back_as_they_are_without_what_moves_a_cursor(served: Dashboard) -> None:
    said = {line["message"] for line in logs(served, "two", most=2000)["lines"]}
    assert HOSTILE[0] in said and HOSTILE[1] in said
    assert not any(ord(sign) < 32 and sign not in "\n\t" for text in said for sign in text)


def test_answers_are_compressed_for_whoever_takes_it(served: Dashboard) -> None:
    plain = served.ask("/view/run/two/overview")
    for coding, undo in (("gzip", gzip.decompress), ("deflate", zlib.decompress)):
        answer = served.ask("/view/run/two/overview", headers={"Accept-Encoding": coding})
        assert answer.headers["Content-Encoding"] == coding and len(answer.body) < len(plain.body) / 2
        assert json.loads(undo(answer.body))["head"] == plain.json["head"]


# -- who may come in ----------------------------------------------------------------------------------------------


def test_a_name_that_was_rebound_to_this_machine_is_refused(served: Dashboard) -> None:
    for path in ("/", "/static/main.js", "/view/about", "/view/run/one/live"):
        answer = served.ask(path, headers={"Host": "evil.example"})
        assert answer.status == 421, path


def test_a_page_of_another_origin_is_refused(served: Dashboard) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}):
        assert served.ask("/view/run/one/overview", headers=headers).status == 403


def test_with_tokens_the_page_is_open_and_what_it_shows_is_not(tmp_path: Path) -> None:
    write(tmp_path / "run", SMALL)
    with dashboard(OneRun(tmp_path / "run"), (TOKEN,)) as served:
        assert served.ask("/").status == served.ask("/static/main.js").status == 200
        for path in ("/view/about", "/view/runs", *(f"/view/run/run/{page}" for page in (*PAGES, "live"))):
            assert served.ask(path).status == 401, path
            assert served.ask(path, headers={"Authorization": f"Bearer {TOKEN}x"}).status == 401, path
            assert served.ask(f"{path}?token={TOKEN}").status == 401, "a token in an address would be logged"
        assert served.ask("/view/about", headers={"Authorization": f"Bearer {TOKEN}"}).json["run"] == "run"


# -- what changes -------------------------------------------------------------------------------------------------


class Stream:
    """Server-sent events, one at a time."""

    def __init__(self, served: Dashboard, path: str) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
        self.connection.request("GET", path)
        self.answer = self.connection.getresponse()

    def next(self) -> tuple[str, Any]:
        event, data = "", b""
        while line := self.answer.readline().rstrip(b"\n"):
            if line.startswith(b"event: "):
                event = line[7:].decode()
            elif line.startswith(b"data: "):
                data = line[6:]
            elif line.startswith(b":"):
                event = "still here"
        return event, json.loads(data) if data else None

    def close(self) -> None:
        self.connection.close()


def test_a_stream_tells_all_then_what_changes_then_that_it_is_over(tmp_path: Path) -> None:
    made = write(tmp_path / "run", SMALL)
    with dashboard(OneRun(tmp_path / "run")) as served:
        stream = Stream(served, "/view/run/run/live")
        assert stream.answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        event, view = stream.next()
        assert event == "overview" and view["numbers"]["steps"] == 400
        put_status(
            tmp_path / "run", msgspec.structs.replace(made.status(), steps=431, members=made.members(431))
        )
        changed: dict[str, Any] = {}
        while changed.get("numbers", {}).get("steps") != 431:
            event, said = stream.next()
            changed = said or {}
        assert "checkpoint" not in changed and "failures" not in changed, "only what has changed"
        over = Made(replace(SMALL, over=True)).status()
        put_status(tmp_path / "run", over)
        while event != "over":
            event, said = stream.next()
            changed = {**changed, **(said or {})}
        assert changed["head"]["over"] and changed["head"]["headline"].startswith("Finished")
        stream.close()


def test_streams_are_bounded_and_a_place_is_free_when_one_ends(tmp_path: Path) -> None:
    write(tmp_path / "run", SMALL)
    with dashboard(OneRun(tmp_path / "run"), limits=replace(QUICK, streams=2)) as served:
        one, two = (Stream(served, "/view/run/run/live") for _ in range(2))
        one.next()
        two.next()
        assert served.ask("/view/run/run/live").status == 503
        assert served.ask("/view/run/run/overview").status == 200
        one.close()
        two.close()
        for _ in range(100):
            again = Stream(served, "/view/run/run/live")
            if again.answer.status == 200:
                break
            again.close()
        assert again.next()[0] == "overview"
        again.close()


# -- a hub --------------------------------------------------------------------------------------------------------


def test_a_hub_shows_its_jobs_why_they_wait_and_what_they_run(tmp_path: Path) -> None:
    desk = FakeDesk(tmp_path)
    job = desk.submit(Submission(script="train.py", folder="/", name="lm"), "ada")
    waiting = desk.submit(Submission(script=f"{HOSTILE[0]}.py", folder="/"), "bob")
    desk.move(job.id, "STARTING")
    write(Path(desk.job(job.id).attempts[-1].run_dir), SMALL)
    with dashboard(HubRuns(desk, "cluster")) as served:
        found = served.ask("/view/jobs").json
        assert {line["id"]: line["opens"] for line in found["jobs"]} == {job.id: True, waiting.id: False}
        assert [node["id"] for node in found["nodes"]] == [node.id for node in desk.nodes()]
        assert served.ask(f"/view/run/{job.id}/overview").json["numbers"]["steps"] == 400
        assert served.ask(f"/view/run/{waiting.id}/overview").status == 404
        assert served.ask(f"/view/jobs/{waiting.id}").json["id"] == waiting.id
        assert served.ask("/view/jobs/nobody").status == 404


def test_a_node_is_shown_with_all_that_it_says() -> None:
    from zml.dashboard.sources import node_line

    node = NodeView(
        id="n1",
        state="UP",
        rack="a",
        gpus=8,
        cpus=64,
        memory_mb=1,
        gpus_free=2,
        cpus_free=3,
        memory_mb_free=1,
    )
    assert (node_line(node).tone, node_line(node).gpus_free) == ("good", 2)


def test_on_a_server_that_is_there_anyway_its_door_decides(tmp_path: Path) -> None:
    write(tmp_path / "run", SMALL)

    async def main() -> dict[str, int]:
        status = JobStatus(job="j", state="RUNNING", steps=7)
        server = Server(
            None,
            Door("127.0.0.1", (Token(TOKEN),)),
            ServerLimits(),
            [of_run(tmp_path / "run", lambda: status)],
        )
        await server.start("127.0.0.1", 0, None)
        found = {}
        try:
            async with aiohttp.ClientSession(server.url) as session:
                for path in ("/", "/static/main.js", "/view/about", "/view/run/run/overview"):
                    async with session.get(path) as answer:
                        found[path] = answer.status
                async with session.get(
                    "/view/run/run/overview", headers={"Authorization": f"Bearer {TOKEN}"}
                ) as answer:
                    found["steps"] = (await answer.json())["numbers"]["steps"]
        finally:
            await server.stop()
        return found

    assert asyncio.run(main()) == {
        "/": 200,
        "/static/main.js": 200,
        "/view/about": 401,
        "/view/run/run/overview": 401,
        "steps": 7,
    }
