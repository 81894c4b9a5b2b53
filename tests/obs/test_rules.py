"""Each alert fires in its situation, for whom it should and with words that name them, and no other alert does.

promtool of real Prometheus evaluates the rules over generated series: `promtool test rules`.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.obs.situations import (
    EVERY_S,
    LONG,
    Job,
    freeze,
    gone,
    growing,
    healthy,
    nothing,
    series,
    steady,
    stops,
    target,
    then,
)
from zml.metrics import catalog as c
from zml.obs import rules
from zml.obs.emit import to_yaml
from zml.obs.machines import DASHBOARDS
from zml.obs.panels import names

ALERTS = {alert.name: alert for alert in rules.ALERTS}
J = {"job": "zml", "job_id": "mnist"}
MINUTE = 60 // EVERY_S


@dataclass(frozen=True)
class Fires:
    """An alert, for these labels beside the job's, with this summary."""

    alert: str
    summary: str
    labels: dict[str, str]
    at: str = "30m"


def process(role: str, member: str, **more: str) -> dict[str, str]:
    return {"role": role, "member": member, **more}


Situation = tuple[str, Callable[[Job], object], list[Fires]]


def straggler(job: Job) -> None:
    """In sync: all make half a step a second, and three of them wait for the fourth."""
    for worker in ("w0", "w1", "w2", "w3"):
        job.of_worker(c.STEPS, growing(0.5), worker)
        job.phases(worker, compute=0.2, wait=0.6)
    job.phases("w2", compute=0.75, wait=0.05)


def slower_of_two(job: Job) -> None:
    job.all = {name: values for name, values in job.all.items() if '"w2"' not in name and '"w3"' not in name}
    job.members("worker", 2, 0, 2)
    for worker in ("w0", "w1"):
        job.of_worker(c.STEPS, growing(0.5), worker)
    job.phases("w0", compute=0.2, wait=0.6)
    job.phases("w1", compute=0.75, wait=0.05)


def two_kinds(job: Job) -> None:
    """Half of the machines are older: nothing is wrong with any of them."""
    straggler(job)
    job.phases("w1", compute=0.75, wait=0.05)


def shard_dies(job: Job) -> None:
    """At 26 minutes."""
    at = 26 * MINUTE
    job.put("up", then(at, steady(1), steady(0)), "shard", "p1")
    job.everywhere(
        lambda name, values: (
            gone(at, values) if 'member="p1"' in name and not name.startswith("up") else values
        )
    )
    job.of_job(c.HEARD, then(at, steady(0.1), growing(1, from_=-at * EVERY_S)), member_role="shard", id="p1")
    job.of_job(c.MEMBERS, then(at, steady(2), steady(1)), member_role="shard", state="active")
    job.of_job(c.MEMBERS, then(at, steady(0), steady(1)), member_role="shard", state="lost")
    freeze(job, at)


def worker_dies(job: Job, replaced: bool) -> None:
    """At 20 minutes, and another one may have come for it."""
    at = 20 * MINUTE
    job.all = {name: values for name, values in job.all.items() if 'member="w3"' not in name}
    job.of_job(c.HEARD, then(at, steady(0.1), growing(1, from_=-at * EVERY_S)), member_role="worker", id="w3")
    here = 4 if replaced else 3
    job.of_job(c.MEMBERS, then(at, steady(4), steady(here)), member_role="worker", state="active")
    job.of_job(c.MEMBERS, then(at, steady(0), steady(1)), member_role="worker", state="lost")


def ends_well(job: Job) -> None:
    """At 10 minutes; the coordinator is still asked."""
    at = 10 * MINUTE
    freeze(job, at)
    job.of_job(c.STATE, then(at, steady(1), steady(0)), state="RUNNING")
    job.of_job(c.STATE, then(at, steady(0), steady(1)), state="SUCCEEDED")
    job.of_job(c.CHECKPOINT_AT, stops(at, lambda now: now * EVERY_S // 300 * 300))


def all_end(job: Job) -> None:
    """At 20 minutes. Nobody can tell Prometheus that they are not coming back."""
    at = 20 * MINUTE
    job.everywhere(
        lambda name, values: then(at, steady(1), steady(0)) if name.startswith("up{") else gone(at, values)
    )


def coordinator_dies(job: Job) -> None:
    """At 20 minutes. The others go on without it."""
    at = 20 * MINUTE
    job.everywhere(
        lambda name, values: (
            gone(at, values) if 'member="coordinator"' in name and not name.startswith("up{") else values
        )
    )
    job.put("up", then(at, steady(1), steady(0)), "coordinator", "coordinator")


def hub_dies(job: Job) -> None:
    labels = {"job": "zml", "instance": "hub:7078", "role": "hub", "member": "hub", "node": "head"}
    job.all[series("up", **labels)] = steady(0)


def restarted_coordinator(job: Job) -> None:
    """Each process has an address, and with it series, of its own; in between there are none."""
    del job.all[next(name for name in job.all if name.startswith(c.BOOTS.name))]
    for life in range(4):
        begin, end = (10 + 4 * life) * MINUTE, (13 + 4 * life) * MINUTE
        labels = {**target("coordinator", "coordinator"), "instance": f"coordinator:900{life}"}
        until = LONG + 1 if life == 3 else end
        job.all[series(c.BOOTS.name, **labels)] = then(begin, nothing, then(until, steady(life + 1), nothing))


SITUATIONS: list[Situation] = [
    ("all is well", lambda job: None, []),
    ("it is over", ends_well, []),
    ("it is over, and all of its processes with it", all_end, []),
    ("sync: staleness is 0, as its bound", lambda job: (
        job.of_job(c.SPREAD, steady(0)), job.of_job(c.BOUND, steady(0))
    ), []),
    ("async: there is no bound", lambda job: (
        job.of_job(c.SPREAD, steady(900)), job.of_job(c.BOUND, steady(float("inf")))
    ), []),
    ("two kinds of machines", two_kinds, []),
    ("a worker was lost and another has come", lambda job: worker_dies(job, replaced=True), []),
    ("a small model on two shards", lambda job: (
        job.of_shard(c.SHARD_SENT, growing(1e3), "p0"), job.of_shard(c.SHARD_RECEIVED, growing(1e3), "p0"),
        job.of_shard(c.SHARD_SENT, growing(9e3), "p1"), job.of_shard(c.SHARD_RECEIVED, growing(9e3), "p1"),
    ), []),
    ("a model of one chunk on two shards", lambda job: (
        job.of_shard(c.SHARD_SENT, growing(0), "p0"), job.of_shard(c.SHARD_RECEIVED, growing(0), "p0"),
        job.of_shard(c.CHUNKS, steady(0), "p0"), job.of_shard(c.CHUNKS, steady(1), "p1"),
    ), []),
    ("one batch of a slow job was dealt again", lambda job: (
        job.of_job(c.REISSUED, then(26 * MINUTE, steady(2), steady(3))),
        [job.of_worker(c.STEPS, growing(0.005), worker) for worker in ("w0", "w1", "w2", "w3")],
    ), []),
    ("no step", lambda job: freeze(job, 20 * MINUTE), [
        Fires("ZmlNoStep", "mnist has made no step for 5 minutes", {}, at="28m"),
    ]),
    ("a straggler", straggler, [
        Fires("ZmlStraggler", "w2 of mnist takes 2.375 times as long as the median", {"worker": "w2"}),
    ]),
    ("the slower of two", slower_of_two, [
        Fires("ZmlStraggler", "w1 of mnist takes 2.375 times as long as the median", {"worker": "w1"}),
    ]),
    ("a worker starved by its loader", lambda job: job.phases("w1", data=0.6, compute=0.3, wait=0.0), [
        Fires("ZmlDataStarved", "w1 of mnist waits for its data 60% of the time", {"worker": "w1"}),
    ]),
    ("staleness at its bound", lambda job: job.of_job(c.SPREAD, steady(4)), [
        Fires("ZmlStalenessAtBound", "the workers of mnist are as far apart as they may be: 4 steps", {}),
    ]),
    ("checkpoints stop", lambda job: job.of_job(
        c.CHECKPOINT_AT, stops(16 * MINUTE, lambda at: at * EVERY_S // 300 * 300)
    ), [
        Fires("ZmlCheckpointOld", "the newest checkpoint of mnist is 15m 0s old", {}),
    ]),
    ("a checkpoint fails", lambda job: job.of_job(
        c.CHECKPOINTS, then(25 * MINUTE, steady(0), steady(1)), result="failed"
    ), [
        Fires("ZmlCheckpointFailed", "a checkpoint of mnist failed", {}),
    ]),
    ("the loss is NaN", lambda job: job.of_job(
        c.FINITE, then(26 * MINUTE, steady(1), steady(0)), name="loss"
    ), [
        Fires("ZmlValueNotFinite", "loss of mnist is not finite", {"name": "loss"}),
    ]),
    ("a gradient is not finite", lambda job: job.of_worker(
        c.LEFT_OUT, then(26 * MINUTE, steady(1), steady(3)), "w0"
    ), [
        Fires("ZmlStepsLeftOut", "w0 of mnist leaves steps out: their gradient is not finite", {"worker": "w0"}),
    ]),
    ("a shard dies", shard_dies, [
        Fires("ZmlShardLost", "shard p1 of mnist was not heard for 4m 0s", {"id": "p1"}),
        Fires("ZmlTargetDown", "shard p1 of mnist does not answer Prometheus",
              process("shard", "p1", instance="p1:9000", node="head")),
    ]),
    ("a worker dies", lambda job: worker_dies(job, replaced=False), [
        Fires("ZmlWorkerLost", "worker w3 of mnist was not heard for 10m 0s", {"id": "w3"}),
    ]),
    ("a shard dies again and again", lambda job: job.of_job(
        c.LIVES, lambda at: 1 + at // (8 * MINUTE), member_role="shard", id="p0"
    ), [
        Fires("ZmlMemberRestarts", "shard p0 of mnist has started 3 more times in 30 minutes",
              {"member_role": "shard", "id": "p0"}),
    ]),
    ("the coordinator dies again and again", restarted_coordinator, [
        Fires("ZmlCoordinatorRestarts", "the coordinator of mnist has started 3 more times in 30 minutes", {}),
    ]),
    ("workers do not stay", lambda job: job.of_job(c.REISSUED, growing(0.4)), [
        Fires("ZmlBatchesReissued", "10% of the batches of mnist are dealt again", {}),
    ]),
    ("an event loop is held up", lambda job: job.lag("coordinator", "coordinator", late=0.02), [
        Fires("ZmlLoopLag", "coordinator coordinator of mnist answers 175ms late",
              process("coordinator", "coordinator")),
    ]),
    ("one shard has nearly all", lambda job: (
        job.of_shard(c.SHARD_SENT, growing(1e6), "p0"), job.of_shard(c.SHARD_RECEIVED, growing(1e6), "p0"),
        job.of_shard(c.SHARD_SENT, growing(9e6), "p1"), job.of_shard(c.SHARD_RECEIVED, growing(9e6), "p1"),
    ), [
        Fires("ZmlShardImbalance", "shard p1 of mnist moves 1.8 times the mean", {"shard": "p1"}),
    ]),
    ("a process does not answer", lambda job: job.put("up", steady(0), "worker", "w0"), [
        Fires("ZmlTargetDown", "worker w0 of mnist does not answer Prometheus",
              process("worker", "w0", instance="w0:9000", node="gpu00")),
    ]),
    ("the coordinator does not answer", coordinator_dies, [
        Fires("ZmlTargetDown", "coordinator coordinator of mnist does not answer Prometheus",
              process("coordinator", "coordinator", instance="coordinator:9000", node="head")),
    ]),
    ("the coordinator of many jobs does not answer", hub_dies, [
        Fires("ZmlTargetDown", "hub hub does not answer Prometheus",
              process("hub", "hub", instance="hub:7078", node="head", job_id="")),
    ]),
    ("a worker logs errors", lambda job: job.put(
        c.LINES, then(26 * MINUTE, steady(1), steady(4)), "worker", "w2", level="error"
    ), [
        Fires("ZmlLogErrors", "worker w2 of mnist logs errors", process("worker", "w2")),
    ]),
    ("a disk is full", lambda job: job.put(c.DISK_FREE, steady(3e10), "worker", "w1"), [
        Fires("ZmlDiskFull", "3% of the disk of gpu01 is free", {"node": "gpu01", "job_id": ""}),
    ]),
    ("a disk fills", lambda job: job.put(c.DISK_FREE, growing(-5e7, from_=5e11), "shard", "p0"), [
        Fires("ZmlDiskFilling", "the disk of head is full within 4 hours if it goes on like this",
              {"node": "head", "job_id": ""}),
    ]),
]  # fmt: skip


def test_every_alert_has_its_situation() -> None:
    assert {fires.alert for _, _, all_ in SITUATIONS for fires in all_} == set(ALERTS)


def test_alerts_ask_for_metrics_of_the_catalog_and_point_at_panels_that_show_them() -> None:
    for alert in rules.ALERTS:
        dashboard, panel = alert.shown
        assert dashboard in DASHBOARDS and panel in dashboard.panels, alert.name
        asked = set(names(alert.value))
        shown = {metric.name for query in panel.queries for metric in query.metrics}
        assert asked <= shown, f"{alert.name}: {panel.title} shows {shown}"


def test_alerts_speak_to_people() -> None:
    for alert in rules.ALERTS:
        assert re.fullmatch(r"Zml([A-Z][a-z]+)+", alert.name)
        assert re.fullmatch(r"\d+[sm]", alert.for_)
        assert alert.says.endswith(".") and not alert.summary.endswith(".")
        assert "$labels" in alert.summary  # it names whom


def expected(fires: Fires, at: str) -> dict[str, Any]:
    """What Prometheus makes of the rule; the summary is written out in the situation."""
    alert = ALERTS[fires.alert]
    labels = {name: value for name, value in (J | fires.labels).items() if value}
    annotations = dict(rules.rule(alert)["annotations"], summary=fires.summary)
    filled = {
        name: re.sub(r"{{ \$labels\.(\w+) }}", lambda label: labels.get(label[1], ""), text)
        for name, text in annotations.items()
    }
    return {"exp_labels": {**labels, "severity": alert.severity}, "exp_annotations": filled}


def unit_test(situation: Situation) -> dict[str, Any]:
    title, change, all_ = situation
    job = healthy()
    change(job)
    at = all_[0].at if all_ else "30m"
    return {
        "name": title,
        "interval": f"{EVERY_S}s",
        "input_series": job.input(),
        "alert_rule_test": [
            {
                "eval_time": at,
                "alertname": name,
                "exp_alerts": [expected(fires, at) for fires in all_ if fires.alert == name],
            }
            for name in ALERTS
        ],
    }


@pytest.mark.prometheus
def test_each_alert_fires_in_its_situation_and_no_other_does(tmp_path: Path) -> None:
    (tmp_path / "zml.yml").write_text(to_yaml(rules.rule_file()))
    tests = {
        "rule_files": ["zml.yml"],
        "evaluation_interval": "2m",  # often enough to tell the situations apart
        "tests": [unit_test(situation) for situation in SITUATIONS],
    }
    (tmp_path / "tests.yml").write_text(json.dumps(tests))
    ran = subprocess.run(
        ["promtool", "test", "rules", "tests.yml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.prometheus
def test_an_alert_that_is_not_expected_is_seen(tmp_path: Path) -> None:
    """The test above can fail: promtool is asked whether a healthy job has a straggler."""
    (tmp_path / "zml.yml").write_text(to_yaml(rules.rule_file()))
    wrong = unit_test(("wrong", lambda job: None, [Fires("ZmlStraggler", "w2", {"worker": "w2"})]))
    tests = {"rule_files": ["zml.yml"], "evaluation_interval": "2m", "tests": [wrong]}
    (tmp_path / "tests.yml").write_text(json.dumps(tests))
    ran = subprocess.run(
        ["promtool", "test", "rules", "tests.yml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 1 and "alertname: ZmlStraggler" in ran.stdout + ran.stderr
