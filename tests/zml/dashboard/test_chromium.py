"""The dashboard in a real browser: every page, live and over, dark and light, hostile, large, cut off, as a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from tests.zml.dashboard.browsing import Browser, browser
from tests.zml.dashboard.serving import Dashboard, dashboard
from tests.zml.dashboard.synthetic import BIG, HOSTILE, Made, Shape, log_line, put_status, write
from tests.zml.web.desk import FakeDesk
from zml.cluster.jobs import NodeView, Submission
from zml.dashboard.page import bake
from zml.dashboard.run import Run
from zml.dashboard.serving import Limits
from zml.dashboard.sources import HubRuns, OneRun, RunsOf, Source
from zml.runs import rundir
from zml.web.access import Door, Token

pytestmark = [pytest.mark.chromium, pytest.mark.timeout(180)]

PAGES = ("overview", "workers", "shards", "data", "checkpoints", "logs", "events", "steps", "config")
SMALL = Shape(workers=6, shards=3, steps=2000, rows=200, member_rows=60, timeline_steps=100, log_lines=300)
TROUBLE = frozenset({"straggler", "nan", "dead-shard", "starving", "errors"})
TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, chrome: Browser) -> Iterator[Dashboard]:
    folder = tmp_path_factory.mktemp("runs")
    write(folder / "live", SMALL)
    write(folder / "over", replace(SMALL, over=True))
    write(folder / "failed", replace(SMALL, over=True, troubles=frozenset({"failed"})))
    write(folder / "trouble", replace(SMALL, troubles=TROUBLE))
    write(
        folder / "hostile",
        replace(SMALL, troubles=frozenset({"hostile"}), values=("loss", HOSTILE[0], HOSTILE[1])),
    )
    write(
        folder / "big",
        replace(BIG, troubles=frozenset({"straggler"}), member_rows=300, timeline_steps=500, log_lines=500),
    )
    with dashboard(RunsOf(folder)) as found:
        yield found


@contextmanager
def looked_at(chrome: Browser, source: Source, tokens: tuple[str, ...] = ()) -> Iterator[Dashboard]:
    """A dashboard that the browser has left when it ends."""
    with dashboard(source, tokens) as served:
        yield served
        chrome.driver.get("about:blank")


@pytest.fixture(autouse=True)
def nothing_foreign(chrome: Browser, request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test: the console is silent, no script of a run ran, and nothing was asked of anybody else."""
    chrome.size(1440)
    chrome.prefers("light")
    yield
    assert not chrome.js("document.documentElement.dataset.owned"), "a text of the run was run"
    complaints = chrome.complaints()
    if (
        "cut_off" not in request.node.name and "token" not in request.node.name
    ):  # these are refused, and say so
        assert complaints == []
    for url in chrome.asked_for():
        assert url.startswith(("http://127.0.0.1:", "data:", "about:", "file:", "chrome:")), url


def test_every_page_renders_at_every_width_in_both_themes(chrome: Browser, runs: Dashboard) -> None:
    for run, width, scheme in (("trouble", 1440, "light"), ("trouble", 390, "dark"), ("over", 800, "dark")):
        chrome.size(width)
        chrome.prefers(scheme)
        chrome.open(f"{runs.url}#/{run}/overview", f"{run}/overview")
        assert chrome.js("document.documentElement.dataset.theme") == scheme
        for page in PAGES:
            chrome.go(f"#/{run}/{page}", f"{run}/{page}")
            assert chrome.js("document.documentElement.scrollWidth <= innerWidth"), (
                f"{page} is wider than {width}"
            )
            assert len(chrome.js("document.querySelector('main').innerText")) > 80, page
        assert chrome.js("document.querySelectorAll('canvas').length") == 0, "the last page's charts are gone"


def test_each_trouble_is_seen_on_the_first_page_and_leads_to_its_own(
    chrome: Browser, runs: Dashboard
) -> None:
    chrome.open(f"{runs.url}#/trouble/overview", "trouble/overview")
    for sentence, page, shows in (
        ("is a straggler", "workers", "compute"),
        ("Shard p2 was lost", "shards", "its process was killed by SIGKILL"),
        ("Workers starve", "workers", "wait for data"),
        ("loss is not finite", "overview", "not finite"),
        ("logs errors", "logs", "the disk is full"),
    ):
        chrome.go("#/trouble/overview", "trouble/overview")
        chrome.waits_for(sentence)
        chrome.click("a.finding", sentence)
        chrome.until(f"document.documentElement.dataset.shown === 'trouble/{page}'")
        chrome.waits_for(shows)
    assert "✖" in chrome.js("document.title")


def test_a_failed_script_is_shown_with_its_line(chrome: Browser, runs: Dashboard) -> None:
    chrome.open(f"{runs.url}#/failed/overview", "failed/overview")
    chrome.waits_for("expected 10 classes, found 11")
    assert "loss = criterion(model(x), y)" in chrome.js("document.querySelector('pre .hit').textContent")


def test_what_happens_arrives_without_a_reload(chrome: Browser, tmp_path: Path) -> None:
    made = write(tmp_path / "run", SMALL)
    with looked_at(chrome, OneRun(tmp_path / "run")) as served:
        chrome.open(served.url, "run/overview")
        chrome.until("document.documentElement.dataset.link === 'live'")
        chrome.js("void (window.kept = true)")
        put_status(
            tmp_path / "run", msgspec.structs.replace(made.status(), steps=2222, members=made.members(2222))
        )
        chrome.waits_for("step 2,222")
        chrome.go("#/run/logs", "run/logs")
        with (tmp_path / "run" / rundir.LOGS / "w0.jsonl").open("a") as file:
            file.write(log_line(made.at(2222), "error", "w0", "the lamp went out") + "\n")
        chrome.waits_for("the lamp went out")
        put_status(tmp_path / "run", Made(replace(SMALL, over=True)).status())
        chrome.until("document.documentElement.dataset.link === 'over'")
        chrome.go("#/run/overview", "run/overview")
        chrome.waits_for("Finished after")
        assert chrome.js("window.kept") is True


def test_an_update_leaves_what_has_the_focus(chrome: Browser, tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = write(run, replace(SMALL, troubles=TROUBLE))
    with looked_at(chrome, OneRun(run)) as served:
        chrome.open(served.url, "run/overview")
        chrome.waits_for("is a straggler")
        chrome.until("document.documentElement.dataset.link === 'live'")
        for link in ("a.finding", ".marks a"):
            chrome.js(f"void (window.link = document.querySelector({link!r})).focus()")
            for steps in (2111, 2112):
                steps += 100 * (link == ".marks a")
                members = [
                    msgspec.structs.replace(each, heard_s=each.heard_s + steps / 1000)
                    for each in made.members(steps)
                ]
                put_status(run, msgspec.structs.replace(made.status(), steps=steps, members=members))
                chrome.waits_for(f"step {steps:,}")
            assert chrome.js("window.link.isConnected && document.activeElement === window.link"), link


def test_a_server_that_is_cut_off_and_comes_back_is_found_again(chrome: Browser, tmp_path: Path) -> None:
    made = write(tmp_path / "run", SMALL)
    with looked_at(chrome, OneRun(tmp_path / "run")) as served:
        chrome.open(served.url, "run/overview")
        chrome.until("document.documentElement.dataset.link === 'live'")
        served.stop()
        chrome.until("document.documentElement.dataset.link === 'lost'")
        assert "The server does not answer" in chrome.text() and "Training epoch" in chrome.text()
        put_status(
            tmp_path / "run", msgspec.structs.replace(made.status(), steps=2345, members=made.members(2345))
        )
        served.start()
        chrome.until("document.documentElement.dataset.link === 'live'")
        chrome.waits_for("step 2,345")
        assert "The server does not answer" not in chrome.text()


def test_a_stream_that_falls_silent_is_given_up_and_asked_for_again(chrome: Browser, tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = write(run, SMALL)
    sooner = "const later = setTimeout; setTimeout = (act, ms) => later(act, ms === 40000 ? 300 : ms);"
    script = chrome.cdp("Page.addScriptToEvaluateOnNewDocument", source=sooner)["identifier"]
    try:
        with dashboard(OneRun(run), limits=Limits(every_s=1.5, still_s=600)) as served:
            chrome.open(served.url, "run/overview")
            chrome.until("document.documentElement.dataset.link === 'lost'")
            put_status(run, msgspec.structs.replace(made.status(), steps=2345, members=made.members(2345)))
            chrome.until("document.documentElement.dataset.link === 'live'")
            chrome.waits_for("step 2,345")
            chrome.driver.get("about:blank")
    finally:
        chrome.cdp("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


def test_the_theme_follows_the_system_until_somebody_chooses(chrome: Browser, runs: Dashboard) -> None:
    chrome.open(f"{runs.url}#/live/overview", "live/overview")
    theme = "document.documentElement.dataset.theme"
    light = chrome.js("getComputedStyle(document.body).backgroundColor")
    chrome.prefers("dark")
    chrome.until(f"{theme} === 'dark'")
    assert chrome.js("getComputedStyle(document.body).backgroundColor") != light
    chrome.key("m")
    assert chrome.js(theme) == "light"
    chrome.open(f"{runs.url}#/live/overview", "live/overview")
    assert chrome.js(theme) == "light", "it is remembered"
    chrome.js("localStorage.clear()")


def test_keys_lead_everywhere(chrome: Browser, runs: Dashboard) -> None:
    chrome.open(f"{runs.url}#/live/overview", "live/overview")
    for key, page in (("w", "workers"), ("s", "shards"), ("l", "logs"), ("t", "steps"), ("e", "events")):
        chrome.key(key)
        chrome.until(f"document.documentElement.dataset.shown === 'live/{page}'")
    chrome.key("/")
    assert chrome.js("document.activeElement.type") == "search"
    chrome.key("w1 joined again")
    chrome.until("document.querySelectorAll('.events .event').length === 1")


def test_no_text_of_a_run_becomes_anything_but_text(chrome: Browser, runs: Dashboard) -> None:
    chrome.open(f"{runs.url}#/hostile/overview", "hostile/overview")
    for page in PAGES:
        chrome.go(f"#/hostile/{page}", f"hostile/{page}")
        assert chrome.js("document.querySelectorAll('img, iframe, main script').length") == 0, page
    chrome.go("#/hostile/logs", "hostile/logs")
    chrome.waits_for(HOSTILE[0])
    chrome.go("#/hostile/config", "hostile/config")
    chrome.waits_for(HOSTILE[1])
    chrome.go("#/hostile/overview", "hostile/overview")
    chrome.waits_for(HOSTILE[0])


def test_a_log_of_thousands_of_lines_has_only_rows_that_are_seen(chrome: Browser, runs: Dashboard) -> None:
    chrome.open(f"{runs.url}#/live/logs", "live/logs")
    said = "(/([0-9,]+) lines/.exec(document.querySelector('.title').innerText) || [0, '0'])[1]"
    lines = f"Number({said}.replace(',', ''))"
    assert chrome.until(lines) == 600 and chrome.js("document.querySelectorAll('.log .l').length") < 80
    chrome.js("void (document.querySelector('.log').scrollTop = 0)")
    chrome.until(f"{lines} === 1200")
    chrome.js("void document.querySelector('.log').focus()")
    chrome.key("j")
    chrome.until("document.querySelector('.detail:not([hidden])')")
    chrome.go("#/live/logs?member=w3&level=warning", "live/logs")
    chrome.until("[...document.querySelectorAll('.log .who')].every((each) => each.textContent === 'w3')")
    chrome.waits_for("3 lines")


@pytest.mark.soak
def test_a_log_holds_no_more_than_its_bound_and_has_no_hole(chrome: Browser, tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = write(run, replace(SMALL, log_lines=0))
    file = run / rundir.LOGS / "w0.jsonl"
    file.write_text(
        "".join(log_line(made.at(1) + 0.001 * at, "info", "w0", f"line {at}") + "\n" for at in range(20_900))
    )
    seen = "document.querySelector('.title').innerText"
    with looked_at(chrome, OneRun(run)) as served:
        chrome.open(f"{served.url}#/run/logs", "run/logs")
        chrome.until(
            f"(document.querySelector('.log').scrollTop = 0, {seen}.includes('newer lines: follow'))",
            "the bound",
        )
        assert "20,000 lines" in chrome.js(seen)
        with file.open("a") as more:
            more.write(log_line(made.at(1999), "info", "w0", "the newest line") + "\n")
        chrome.js("void (document.querySelector('.log').scrollTop = 1e9)")
        chrome.until("document.querySelectorAll('.log .what').length > 8")
        assert "the newest line" not in chrome.text() and "20,000 lines" in chrome.js(seen)
        chrome.click("button", "follow")
        chrome.waits_for("the newest line")
        assert "newer lines" not in chrome.js(seen)
        chrome.waits_for("line 20899")


def test_sixty_four_workers_and_a_hundred_thousand_steps(
    chrome: Browser, runs: Dashboard, record_property: Callable[[str, object], None]
) -> None:
    for page in ("overview", "workers", "steps", "shards", "logs"):
        chrome.open(f"{runs.url}#/big/{page}", f"big/{page}")
        took_s = chrome.js("Number(document.documentElement.dataset.took) / 1000")
        record_property(f"first_data_{page}_s", took_s)
        print(f"{page}: {took_s:.2f} s to the first data")
    chrome.go("#/big/workers", "big/workers")
    assert chrome.js("document.querySelectorAll('.rows .bar').length") == 64
    assert chrome.js("document.querySelectorAll('.rows .name.t-bad').length") == 1
    chrome.go("#/big/steps", "big/steps")
    chrome.click("button", "←")
    chrome.until("document.querySelectorAll('.rows .bar').length === 64")
    series = runs.ask("/view/run/big/series").json
    assert all(len(curve["y"]) <= 1000 for curve in series["values"])


def test_a_token_is_asked_for_once_and_kept_in_the_tab(chrome: Browser, tmp_path: Path) -> None:
    write(tmp_path / "run", SMALL)
    with looked_at(chrome, OneRun(tmp_path / "run"), (TOKEN,)) as served:
        chrome.open(served.url, "gate")
        chrome.key("wrong-token-0123456789\n")
        chrome.waits_for("does not know this token")
        chrome.key(TOKEN + "\n")
        chrome.until("document.documentElement.dataset.shown === 'run/overview'")
        chrome.until("document.documentElement.dataset.link === 'live'")
        chrome.open(served.url, "run/overview")
        assert chrome.js("document.cookie") == "" and chrome.js("localStorage.length") == 0
        chrome.js("sessionStorage.clear()")


def test_a_token_that_is_taken_back_is_asked_for_and_the_page_lives_on(
    chrome: Browser, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    made = write(run, SMALL)
    other = TOKEN[::-1]
    with looked_at(chrome, OneRun(run), (TOKEN,)) as served:
        chrome.open(served.url, "gate")
        chrome.key(TOKEN + "\n")
        chrome.until("document.documentElement.dataset.link === 'live'")
        served.stop()
        served.door = Door("127.0.0.1", (Token(other),))
        served.start()
        chrome.until("document.querySelector('.gate input')")
        chrome.js("void (window.field = document.querySelector('.gate input'))")
        chrome.key(other[:10])
        chrome.js("void (location.hash = '#/run/workers')")  # is refused as well
        chrome.key(other[10:])
        assert chrome.js("window.field.isConnected && window.field.value") == other
        chrome.key("\n")
        chrome.until("document.documentElement.dataset.shown === 'run/workers'")
        chrome.until("document.documentElement.dataset.link === 'live'")
        chrome.go("#/run/overview", "run/overview")
        put_status(run, msgspec.structs.replace(made.status(), steps=2345, members=made.members(2345)))
        chrome.waits_for("step 2,345")
        chrome.js("sessionStorage.clear()")


def test_a_hub_shows_queue_machines_and_the_run_behind_a_job(chrome: Browser, tmp_path: Path) -> None:
    desk = FakeDesk(tmp_path)
    desk.machines = [
        NodeView(
            id="gpu1",
            state="UP",
            rack="a",
            gpus=8,
            cpus=64,
            memory_mb=512_000,
            gpus_free=2,
            cpus_free=30,
            memory_mb_free=99_000,
            jobs=["j1"],
        )
    ]
    job = desk.submit(Submission(script="train.py", folder="/", name="lm"), "ada")
    waiting = desk.submit(Submission(script="x.py", folder="/"), "bob")
    desk.move(job.id, "STARTING")
    write(Path(desk.job(job.id).attempts[-1].run_dir), SMALL)
    with looked_at(chrome, HubRuns(desk, "cluster")) as served:
        chrome.open(served.url, "/")
        chrome.waits_for("2 of 8 GPUs free")
        assert chrome.js("document.querySelectorAll('.cells i.used').length") == 6
        chrome.click("tbody td", waiting.id)
        chrome.waits_for(f"Why {waiting.id} has what it has")
        chrome.click("tbody a", job.id)
        chrome.until(f"document.documentElement.dataset.shown === '{job.id}/overview'")
        chrome.waits_for("Training epoch")


def test_the_report_opens_from_a_file_with_every_page(chrome: Browser, tmp_path: Path) -> None:
    write(
        tmp_path / "run",
        replace(SMALL, over=True, troubles=frozenset({"hostile"}), values=("loss", HOSTILE[0])),
    )
    file = tmp_path / "report.html"
    file.write_bytes(bake(Run(tmp_path / "run")))
    chrome.asked_for()
    chrome.open(file.as_uri(), "run/overview")
    for page in PAGES:
        chrome.go(f"#/run/{page}", f"run/{page}")
        assert len(chrome.js("document.querySelector('main').innerText")) > 80, page
    chrome.go("#/run/steps", "run/steps")
    chrome.click("button", "←")
    chrome.go("#/run/logs?level=warning", "run/logs")
    chrome.waits_for(HOSTILE[0])
    assert {url.partition(":")[0] for url in chrome.asked_for()} <= {"file", "data", "about"}
