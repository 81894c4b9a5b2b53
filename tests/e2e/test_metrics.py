"""A run of real processes is scraped as Prometheus does: found by the coordinator, whoever dies."""

import json
import os
import re
import signal
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.harness import Playground
from zml.figures import PHASES
from zml.metrics.catalog import METRICS

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


def get(url: str) -> tuple[int, str]:
    """0 where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()
    except OSError:
        return 0, ""


def scrape(target: str) -> dict[str, float]:
    """Values by name and labels; what a dead process would have said is nothing."""
    status, page = get(f"http://{target}/metrics")
    if status != 200:
        return {}
    families = text_string_to_metric_families(page)
    return {
        f"{sample.name}{sorted(sample.labels.values())}": sample.value
        for family in families
        for sample in family.samples
        if "le" not in sample.labels
    }


def is_ready(target: str) -> bool:
    return get(f"http://{target}/readyz")[0] == 200


def script_of(worker: str, place: Playground) -> int:
    """The process that an agent has started."""
    (agent,) = place.pids(" worker ", f"--name {worker} ")
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return next(
        int(child) for child in children if b"zml.agent.runner" in Path(f"/proc/{child}/cmdline").read_bytes()
    )


def test_all_roles_of_a_run_are_found_and_scraped_whoever_is_killed(place: Playground) -> None:
    run = place.start(
        *["run", "-w", "1", "-p", "1", "--async", "--http", "127.0.0.1:0", "train.py"],
        *["--epochs", "100", "--pause", "0.02"],
    )
    said = place.until(
        lambda: re.search(r"metrics: (http://127\.0\.0\.1:\d+)/metrics", run.text), "its address"
    )
    url = said[1]
    place.until(lambda: get(f"{url}/readyz")[0] == 200, "the job is ready")

    def targets() -> dict[str, str]:
        status, told = get(f"{url}/api/sd")
        assert status in (0, 200)
        groups: list[dict[str, Any]] = json.loads(told) if told else []
        return {group["labels"]["member"]: group["targets"][0] for group in groups}

    place.until(lambda: targets().keys() == {"coordinator", "w0", "p0"}, "all are found")
    found = targets()
    roles = {"coordinator": "coordinator", "w0": "worker", "p0": "shard"}
    for member, role in roles.items():
        place.until(partial(is_ready, found[member]), f"{member} is ready")
        _, page = get(f"http://{found[member]}/metrics")
        declared = set(re.findall(r"^# TYPE (\S+) ", page, re.MULTILINE))
        assert declared == {name for name, metric in METRICS.items() if role in metric.roles}, member

    steps, lost = "zml_worker_steps_total['w0']", "zml_worker_restarts_total['w0']"
    place.until(lambda: scrape(found["w0"])[steps] > 5, "w0 makes steps")
    before = scrape(found["w0"])
    phases = [before[f"zml_worker_phase_seconds_total{sorted(['w0', phase])}"] for phase in PHASES]
    assert sum(phases) > 0.9 * before["zml_worker_step_duration_seconds_sum['w0']"] > 0
    assert before["zml_resident_memory_bytes[]"] > 100e6, "its script has loaded torch"

    os.kill(script_of("w0", place), signal.SIGKILL)
    place.until(lambda: scrape(found["w0"]).get(lost) == 1, "it was started again, by the same agent")
    again = scrape(found["w0"])
    assert again[steps] >= before[steps], "counters go on where they were"
    place.until(lambda: scrape(found["w0"])[steps] > again[steps] + 5, "and grow")

    (coordinator,) = place.pids(" coordinator ", "--run-dir")
    os.kill(coordinator, signal.SIGKILL)
    boots = f"zml_coordinator_boots{[place.run_dir().name]}"  # nobody has named the job
    place.until(lambda: scrape(found["coordinator"]).get(boots) == 2, "it is back")
    place.until(lambda: targets() == found, "and knows everybody")
    run.send(signal.SIGINT)
    assert run.wait() == 130
