"""What alerts and dashboards rely on in what processes show: who is missed, how a job is told, where the disk is."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from zml.metrics import catalog as c
from zml.metrics import process, sources
from zml.metrics.catalog import METRICS
from zml.metrics.lag import Lag
from zml.metrics.roles import CoordinatorSource
from zml.status import JobStatus, MemberStatus


def test_who_ended_in_order_is_missed_by_nobody() -> None:
    states = ("active", "joined", "lost", "failed", "done", "left", "stopped")
    members = [
        MemberStatus(member=f"w{number}", role="worker", state=state, heard_s=3.0)
        for number, state in enumerate(states)
    ]
    points = list(sources.of_members(JobStatus(job="j", state="RUNNING", members=members)))
    heard = [states[int(point.labels[2][1:])] for point in points if point.metric is c.HEARD]
    assert heard == ["active", "joined", "lost", "failed"]
    assert len([point for point in points if point.metric is c.LIVES]) == len(states)


@pytest.mark.parametrize(
    ("job", "run_dir", "told"),
    [
        ("job", "/data/runs/2026-03-01T12-30-00-train-1a2b", "2026-03-01T12-30-00-train-1a2b"),
        ("mnist", "/data/runs/2026-03-01T12-30-00-train-1a2b", "mnist"),
        ("job", "", "job"),
    ],
)
def test_a_job_without_a_name_is_told_by_its_run(job: str, run_dir: str, told: str) -> None:
    coordinator = SimpleNamespace(
        job=job,
        run_dir=run_dir,
        status=lambda: JobStatus(job=job, state="RUNNING"),
        docket=SimpleNamespace(running=None),
        board=SimpleNamespace(cards={}),
    )
    source = CoordinatorSource(cast(Any, coordinator), Lag(), "http://10.0.0.1:7078")
    (target,) = source.targets()
    assert target.targets == ["10.0.0.1:7078"] and target.labels["job_id"] == told


def test_a_disk_that_does_not_answer_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_path: Any) -> os.statvfs_result:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "statvfs", gone)
    shown = {point.metric for point in process.of_process(Lag())}
    assert c.MEMORY in shown and not {c.DISK, c.DISK_FREE} & shown


def test_no_label_is_one_of_prometheus() -> None:
    wrong = {
        metric.name: metric.labels for metric in METRICS.values() if {"job", "instance"} & {*metric.labels}
    }
    assert wrong == {}
