"""The page of a real run in a real browser: it tells who was killed, and outlives the coordinator that serves it."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests.e2e.harness import Playground
from tests.zml.dashboard.browsing import browser

pytestmark = [pytest.mark.cluster, pytest.mark.chromium, pytest.mark.timeout(180)]


def test_the_page_of_a_run_tells_what_was_killed_and_outlives_its_coordinator(
    place: Playground, tmp_path: Path
) -> None:
    run = place.start(
        *["run", "-w", "2", "-p", "1", "--http", "127.0.0.1:0", "train.py"],
        *["--epochs", "1000", "--pause", "0.02"],
    )
    said = place.until(
        lambda: re.search(r"metrics: (http://127\.0\.0\.1:\d+)/metrics", run.text), "its address"
    )
    place.until(lambda: place.live()["state"] == "RUNNING", "it trains")
    with browser(tmp_path / "chromium") as chrome:
        chrome.open(said[1])
        chrome.until("document.documentElement.dataset.link === 'live'")
        chrome.js("void (window.kept = true)")
        for words, sentence in (
            ((" ps ", "--shard"), "Shard p0 was started again and is back."),
            (
                (" coordinator ", "--run-dir"),
                "The coordinator was started again; training went on meanwhile.",
            ),
        ):
            (pid,) = place.pids(*words)
            os.kill(pid, signal.SIGKILL)
            chrome.waits_for(sentence)
        chrome.until("document.documentElement.dataset.link === 'live'")
        steps = place.live()["steps"]
        chrome.until(
            f"Number((document.body.innerText.match(/step ([\\d,]+)/) ?? ['', '0'])[1].replace(/,/g, '')) > {steps}",
            "more steps",
        )
        assert chrome.js("window.kept") is True, "nobody has loaded it again"
    run.send(signal.SIGINT)
    assert run.wait() == 130
