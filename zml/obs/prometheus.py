"""Where Prometheus finds the processes of a cluster, and how their series are labelled.

The coordinator knows who is here, and says so at `/api/sd` (https://prometheus.io/docs/prometheus/latest/http_sd/),
each process with its labels `role`, `member`, `job_id` and `node`. Nothing is relabelled. zml's job is `job_id`, so
that Prometheus' own `job` stays what people know, the name of the scrape configuration; `instance` stays the address,
which tells a process from the one that took its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .emit import Said

EVERY = "10s"  # figures are at most 2 s old; four of these are what a rate is taken over
JOB = "zml"
RULES = "rules/zml.yml"
DISCOVERY = "/api/sd"

HEAD = """Prometheus for zml. Start it with

    prometheus --config.file=prometheus.yml

or copy the scrape configuration below, and the file with the rules, to where yours are."""
FOLLOWS = """The coordinator says who is here. It is asked as often as members are scraped, for they come and go; as
long as it does not answer, what it said last holds."""
HONOR = """What a coordinator counts of a job has the job's job_id, and the coordinator of one job has the same
among its labels: the series' own one is kept, instead of becoming exported_job_id."""
ALERTING = """Where alerts go:
alerting:
  alertmanagers:
    - static_configs:
        - targets: ["127.0.0.1:9093"]"""


def scrape(coordinators: Sequence[str], token_file: Path | None) -> dict[str, Any]:
    """The scrape configuration. `coordinators` are http://HOST:PORT."""
    # Prometheus 2.42 sends the token alone to where it asks for targets, unless the type is said.
    bearer = {"type": "Bearer", "credentials_file": str(token_file)}
    allowed = {"authorization": bearer} if token_file is not None else {}
    return {
        "job_name": JOB,
        "honor_labels": Said(HONOR, True),
        **allowed,
        "http_sd_configs": Said(
            FOLLOWS,
            [{"url": f"{where}{DISCOVERY}", "refresh_interval": EVERY, **allowed} for where in coordinators],
        ),
    }


def config(coordinators: Sequence[str], token_file: Path | None) -> dict[str, Any]:
    """prometheus.yml."""
    return {
        "global": {"scrape_interval": EVERY, "evaluation_interval": EVERY},
        "rule_files": [RULES],
        "scrape_configs": Said(ALERTING, [scrape(coordinators, token_file)]),
    }
