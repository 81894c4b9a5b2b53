"""Where roles answer HTTP: bound early, served when somebody calls, closed to strangers, and nobody's trouble."""

import asyncio
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
import structlog
import uvloop
from aiohttp import web

from zml.address import PORT, any_port, host_and_port
from zml.cluster.node import NodeAgent, Place
from zml.cluster.wire import Work
from zml.config import Settings, resolve
from zml.errors import CONFIG, NO_TOKEN, PORT_IN_USE, UNREACHABLE, ZmlError
from zml.launch.local import environment
from zml.logs import outlets as logs
from zml.metrics.catalog import Role
from zml.metrics.endpoint import Endpoint, must_be_free, opened, own_name, reached_at
from zml.metrics.lag import Lag
from zml.metrics.points import Point, Target
from zml.metrics.process import disk, of_process
from zml.scheduler.cluster.resources import Resources

HERE = Settings(http="127.0.0.1:0")
TOKEN = "0123456789abcdef"


class Role_:
    """A shard that has not joined, or whatever a test makes of it."""

    def __init__(self, role: Role = "shard", targets: Sequence[Target] | None = None) -> None:
        self.role: Role = role
        self.told: dict[str, str] = {"joined": "it has not joined", "staying": ""}
        self.known = targets
        self.more: list[Point] = []

    async def points(self) -> Sequence[Point]:
        return [*of_process(Lag()), *self.more]

    def checks(self) -> Mapping[str, str]:
        return self.told

    def targets(self) -> Sequence[Target] | None:
        return self.known


class Asking:
    def __init__(self, endpoint: Endpoint, session: aiohttp.ClientSession) -> None:
        self.endpoint, self.session = endpoint, session

    async def __call__(self, path: str, **rest: Any) -> tuple[int, Any]:
        url = f"http://127.0.0.1:{self.endpoint.port}{path}"
        async with self.session.get(url, **rest) as response:
            as_json = response.content_type.endswith("json")
            return response.status, await (response.json() if as_json else response.text())


def run(
    test: Callable[[Asking], Awaitable[None]],
    settings: Settings = HERE,
    role: Role_ | None = None,
    mounts: Sequence[Callable[[web.Application], None]] = (),
) -> None:
    async def main() -> None:
        endpoint = opened(settings)
        try:
            endpoint.serve(role or Role_(), mounts)
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
                await test(Asking(endpoint, session))
        finally:
            await endpoint.close()
            await endpoint.close()

    uvloop.run(main())


def test_a_role_is_alive_before_it_is_ready_and_says_what_it_waits_for() -> None:
    role = Role_()

    async def test(ask: Asking) -> None:
        status, told = await ask("/livez")
        assert (status, told["alive"], told["pid"]) == (200, True, os.getpid())
        assert await ask("/healthz") == (status, told)
        assert await ask("/readyz") == (503, {"ready": False, "reasons": ["it has not joined"]})
        status, told = await ask("/readyz?verbose")
        assert told["checks"] == {"joined": "it has not joined", "staying": "ok"}
        role.told["joined"] = ""
        assert await ask("/readyz") == (200, {"ready": True})
        assert await ask("/readyz?verbose=1") == (
            200,
            {"ready": True, "checks": {"joined": "ok", "staying": "ok"}},
        )

    run(test, role=role)


def test_metrics_are_what_the_one_who_asks_prefers() -> None:
    async def test(ask: Asking) -> None:
        status, page = await ask("/metrics")
        assert status == 200 and "# TYPE zml_build_info gauge" in page
        async with ask.session.get(
            ask.endpoint.url + "/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"}
        ) as response:
            assert response.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
            assert response.headers["Content-Encoding"] in ("gzip", "deflate")
            assert (await response.text()).endswith("# EOF\n")

    run(test)


def test_who_else_can_be_scraped_is_for_coordinators_to_say() -> None:
    known = [Target(["10.0.0.1:9"], {"role": "worker", "member": "w0", "job_id": "j", "node": "n"})]

    async def with_(ask: Asking) -> None:
        labels = {"role": "worker", "member": "w0", "job_id": "j", "node": "n"}
        assert await ask("/api/sd") == (200, [{"targets": ["10.0.0.1:9"], "labels": labels}])

    async def without(ask: Asking) -> None:
        status, told = await ask("/api/sd")
        assert status == 404 and told["detail"] == "there is nothing at /api/sd"
        status, told = await ask("/api/v1/jobs")
        assert (status, told["code"]) == (404, UNREACHABLE)
        assert "not of a cluster" in told["detail"] and "--server" in told["fix"]

    run(with_, role=Role_("coordinator", known))
    run(without)


def test_what_others_mount_is_answered_beside_it() -> None:
    async def hello(request: web.Request) -> web.Response:
        return web.Response(text="a dashboard")

    async def test(ask: Asking) -> None:
        assert await ask("/") == (200, "a dashboard")
        assert (await ask("/livez"))[0] == 200

    def mount(app: web.Application) -> None:
        app.router.add_get("/", hello)

    run(test, mounts=[mount])


def test_nothing_is_loaded_for_those_who_are_never_called() -> None:
    program = """
import asyncio, sys
from zml.config import Settings
from zml.metrics.endpoint import opened
async def main():
    endpoint = opened(Settings(http="127.0.0.1:0"))
    endpoint.serve(None)
    assert endpoint.url.startswith("http://127.0.0.1:") and endpoint.port
    await asyncio.sleep(0)
    await endpoint.close()
    print(sorted({"aiohttp", "prometheus_client", "torch"} & sys.modules.keys()))
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_port_that_is_taken_stops_no_member_and_no_job_that_goes_on() -> None:
    async def main() -> None:
        first = opened(HERE)
        first_port = first.port
        second = opened(replace(HERE, http=f"127.0.0.1:{first.port}"))
        assert (second.url, second.port) == ("", 0)
        named = replace(HERE, http=f"127.0.0.1:{first.port}")
        for ask in (must_be_free, lambda settings: opened(settings, must=True)):
            with pytest.raises(ZmlError, match=f"the HTTP address {named.http} is in use") as refused:
                ask(named)
            assert refused.value.code == PORT_IN_USE, "whoever names a port will look there"
        must_be_free(HERE)
        must_be_free(replace(HERE, http="off"))
        second.serve(Role_())
        await second.close()
        third = opened(HERE, preferred=first.port)
        assert third.url and third.port != first.port, "of port 0, any will do"
        await first.close()
        again = opened(HERE, preferred=first_port)
        assert again.port == first_port, "a process that comes back is where it was"
        await third.close()
        await again.close()

    asyncio.run(main())


def test_off_is_off() -> None:
    async def main() -> None:
        endpoint = opened(replace(HERE, http="off"))
        endpoint.serve(Role_())
        assert (endpoint.url, endpoint.port) == ("", 0)
        await endpoint.close()

    asyncio.run(main())


def test_the_disk_that_is_told_of_is_that_on_which_the_log_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    real = os.statvfs

    def statvfs(path: Any) -> os.statvfs_result:
        asked.append(str(path))
        return real(path)

    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.setattr(os, "statvfs", statvfs)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alone").mkdir()
    try:
        disk()
        logs.configure("worker", "w", folder="alone", terminal=False, alone=True)
        free, there = disk()
        (tmp_path / "run" / "logs").mkdir(parents=True)
        logs.move("w3", str(tmp_path / "run"), "j")
        disk()
    finally:
        logs.close()
        logging.captureWarnings(False)
        root.handlers, root.level = handlers, level
        structlog.reset_defaults()
    assert logs.folder() is None
    assert asked == [".", str(tmp_path / "alone"), str(tmp_path / "run" / "logs")]
    assert 0 < free < there


# -- beyond this machine -----------------------------------------------------------------------------------


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    path = tmp_path / "tokens"
    path.write_text(f"prometheus {TOKEN}\n")
    path.chmod(0o600)
    return str(path)


def test_beyond_this_machine_nobody_is_answered_without_a_token(tokens: str) -> None:
    async def test(ask: Asking) -> None:
        assert ask.endpoint.url == f"http://{socket.gethostname()}:{ask.endpoint.port}"
        status, told = await ask("/metrics")
        assert (status, told["code"]) == (401, NO_TOKEN)
        assert (await ask("/api/sd"))[0] == 401
        assert (await ask("/metrics", headers={"Authorization": f"Bearer {TOKEN}"}))[0] == 200
        assert [(await ask(path))[0] for path in ("/livez", "/healthz", "/readyz")] == [200, 200, 503]

    run(test, Settings(http="0.0.0.0:0", http_tokens=tokens), Role_("coordinator", []))


@pytest.mark.parametrize("http", ["0.0.0.0:0", "[::]:0", "10.0.0.1:80", "somewhere:0"])
def test_an_open_door_is_refused(http: str) -> None:
    with pytest.raises(ZmlError) as refused:
        opened(Settings(http=http), must=True)
    assert refused.value.code == NO_TOKEN and "--http-tokens" in refused.value.fix


@pytest.mark.parametrize("http", ["127.0.0.1:0", "0.0.0.0:0"])
def test_a_member_starts_without_http_where_its_machine_has_no_such_file(tmp_path: Path, http: str) -> None:
    settings = Settings(http=http, http_tokens=str(tmp_path / "missing"))
    with structlog.testing.capture_logs() as lines:
        endpoint = opened(settings)
    assert (endpoint.url, endpoint.port) == ("", 0)
    (line,) = lines
    assert line["log_level"] == "warning" and "missing" in line["because"]
    with pytest.raises(ZmlError) as refused:
        opened(settings, must=True)
    assert refused.value.code == NO_TOKEN


def test_children_are_told_the_file_of_tokens_by_a_path_that_holds_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings(http_tokens="tokens", runs=str(tmp_path))
    work = Work(run_dir="", coordinator=[], settings={}, environment={}, script="t.py", args=[], folder="")
    node = NodeAgent(settings, "n1", Resources(cpus=1))
    told = node._environment(Place("j1.1", "w0", work, None, cast(Any, None)), Settings())
    assert told["ZML_HTTP_TOKENS"] == str(tmp_path / "tokens")
    assert environment({}, settings, None)["ZML_HTTP_TOKENS"] == str(tmp_path / "tokens")
    assert environment({}, Settings(), None)["ZML_HTTP_TOKENS"] == ""


def test_a_page_of_another_name_does_not_reach_it() -> None:
    async def test(ask: Asking) -> None:
        for path in ("/metrics", "/livez", "/readyz"):
            assert (await ask(path, headers={"Host": "evil.example"}))[0] == 421
            assert (await ask(path, headers={"Origin": "http://evil.example"}))[0] == 403

    run(test)


def test_by_which_name_others_reach_a_machine() -> None:
    assert own_name(["ipc:///tmp/x", "tcp://127.0.0.1:7077", "tcp://0.0.0.0:1"]) == socket.gethostname()
    assert own_name([]) == socket.gethostname()
    assert reached_at("http://10.0.0.1:80", []) == "http://10.0.0.1:80"
    assert reached_at("http://0.0.0.0:80", []) == f"http://{socket.gethostname()}:80"
    assert reached_at("http://[::]:80", []) == f"http://{socket.gethostname()}:80"


# -- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("http", ["7078", "localhost", "127.0.0.1:", "127.0.0.1:70000", ":80", "a:b:c"])
def test_what_is_no_address_is_said_when_settings_are_read(http: str) -> None:
    with pytest.raises(ZmlError) as refused:
        resolve({}, {"ZML_HTTP": http}, "/dev/null")
    assert refused.value.code == CONFIG and "ZML_HTTP" in refused.value.what


def test_addresses_and_those_beside_them() -> None:
    assert host_and_port("[::1]:80") == ("::1", 80)
    assert [any_port(http) for http in ("127.0.0.1:7078", "[::1]:5", "off")] == [
        "127.0.0.1:0",
        "[::1]:0",
        "off",
    ]
    assert PORT == 7078
    assert resolve({"http": "off"}, {}, "/dev/null").settings.http == "off"
