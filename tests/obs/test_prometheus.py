"""A real Prometheus, with what `zml obs export` writes, in sight of a cluster that trains: it finds every process, and
every panel and every alert has its data.

What that cluster cannot have, GPUs and many jobs, it sees of a second coordinator, which shows the whole catalog.
"""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.e2e.harness import Playground, playground
from tests.obs.prometheus import Prometheus, many_jobs, prometheus, promtool
from zml.metrics import catalog
from zml.obs import grafana
from zml.obs.machines import DASHBOARDS
from zml.obs.panels import ALARM, Query
from zml.obs.rules import ALERTS
from zml.runs import finding, rundir

JOB = "letters"
OTHER = "j7"
TOKEN = "0123456789abcdef0123456789abcdef"
GPU = {metric.name for metric in catalog.METRICS.values() if metric.name.startswith("zml_gpu_")}

# In one group, so that one process of pytest starts the cluster for all.
pytestmark = [pytest.mark.prometheus, pytest.mark.cluster, pytest.mark.xdist_group("prometheus")]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus").resolve()
    with ExitStack() as stack:
        place = stack.enter_context(playground(folder))
        other = stack.enter_context(many_jobs(OTHER, TOKEN))
        place.start(
            "run", "-w", "2", "-p", "1", "--http", "127.0.0.1:0", "--checkpoint-steps", "30",
            "train.py", "--epochs", "100000", "--pause", "0.02", name="run", ZML_JOB=JOB,
        )  # fmt: skip
        coordinator = place.until(lambda: answers(place), "the coordinator answers HTTP")
        kit = folder / "kit"
        token = folder / "token"
        token.touch(0o600)
        token.write_text(TOKEN + "\n")
        where = ("--coordinator-http", coordinator, "--coordinator-http", other)
        code, told = place.run("obs", "export", str(kit), *where, "--token-file", str(token))
        assert code == 0, told
        server = stack.enter_context(prometheus(kit, folder / "scratch"))
        server.until(lambda: [target["health"] for target in server.targets()] == ["up"] * 7, "all are found")
        yield server


def answers(place: Playground) -> str:
    """Where the run's coordinator does; empty before."""
    folder = finding.newest(place.folder / "runs")
    here = rundir.listening(folder) if folder is not None else None
    return here.http if here is not None else ""


def of(expr: str, job: str) -> str:
    """As Grafana fills in the variables."""
    named = expr.replace("${job:regex}", re.escape(job)).replace("$job", job)
    return (
        re.sub(r"\$(worker|shard)", ".+", named)
        .replace("$__rate_interval", "10s")
        .replace("$__interval", "10s")
    )


def queries() -> list[tuple[str, Query]]:
    """What is asked for, with where."""
    found = []
    for dashboard in DASHBOARDS:
        for panel in dashboard.panels:
            found += [(f"{dashboard.title} / {panel.title}", query) for query in panel.queries]
        for name, query in grafana.annotation_queries(dashboard).items():
            found.append((f"{dashboard.title} / annotation {name}", query))
        for name in dashboard.variables:
            found.append((f"{dashboard.title} / ${name}", Query(grafana.values(name)[0])))
    return found


class Asked:
    """Every query for one job. What has had an answer once is not asked again."""

    def __init__(self, live: Prometheus, job: str) -> None:
        self.live = live
        self.job = job
        # What shows only what is wrong has no answer here, but for the alerts, of which one always fires.
        self.open = {
            f"{where}: {query.expr}": query
            for where, query in queries()
            if not query.rare or ALARM in query.expr
        }

    def silent(self) -> set[str]:
        """Those that have had no answer with a number in it yet."""
        for where, query in list(self.open.items()):
            answer = self.live.query(of(query.expr, self.job))
            if any(each["value"][1] != "NaN" for each in answer):
                del self.open[where]
        return set(self.open)


def test_it_discovers_every_process(live: Prometheus) -> None:
    labels = [target["labels"] for target in live.targets()]
    assert sorted((each["job"], each.get("job_id", ""), each["role"], each["member"]) for each in labels) == [
        ("zml", "", "hub", "hub"),
        ("zml", OTHER, "shard", "p0"),
        ("zml", OTHER, "worker", "w0"),
        ("zml", JOB, "coordinator", "coordinator"),
        ("zml", JOB, "shard", "p0"),
        ("zml", JOB, "worker", "w0"),
        ("zml", JOB, "worker", "w1"),
    ]
    assert all(each["node"] and ":" in each["instance"] for each in labels)


def test_every_panel_has_data_from_a_cluster_that_trains(live: Prometheus) -> None:
    asked = Asked(live, JOB)
    # Those of GPUs have none: this is not a test of queries that ask for anything and get it.
    of_gpus = {where for where, query in asked.open.items() if GPU & {each.name for each in query.metrics}}
    live.until(lambda: asked.silent() == of_gpus, "every panel has data")


def test_every_panel_has_data_where_there_are_gpus_and_many_jobs(live: Prometheus) -> None:
    asked = Asked(live, OTHER)
    live.until(lambda: asked.silent() == set(), "every panel has data")


def test_no_label_was_renamed(live: Prometheus) -> None:
    """A label of ours that Prometheus has too would come back as exported_..."""
    live.until(lambda: live.query("zml_job_steps > 0"), "there are steps")
    names = live.get("labels")
    assert [name for name in names if name.startswith("exported_")] == []
    steps = live.query(f'zml_worker_steps_total{{job_id="{JOB}", worker="w0"}}')
    assert {name: steps[0]["metric"][name] for name in ("job", "job_id", "role", "member", "worker")} == {
        "job": "zml",
        "job_id": JOB,
        "role": "worker",
        "member": "w0",
        "worker": "w0",
    }


def test_every_alert_watches_something(live: Prometheus) -> None:
    """The value that an alert judges is there. Five minutes are not waited for."""

    def silent() -> list[str]:
        found = {alert.name: re.sub(r"offset \d+m", "offset 1s", alert.value) for alert in ALERTS}
        return [name for name, value in found.items() if not live.query(value)]

    live.until(lambda: silent() == [], "every alert has its value")


def test_every_rule_can_be_evaluated(live: Prometheus) -> None:
    def groups() -> list[dict[str, str]]:
        return [rule for group in live.get("rules")["groups"] for rule in group["rules"]]

    live.until(lambda: all(rule["health"] != "unknown" for rule in groups()), "rules were evaluated")
    assert [(rule["name"], rule.get("lastError")) for rule in groups() if rule["health"] != "ok"] == []
    assert {rule["name"] for rule in groups()} == {alert.name for alert in ALERTS} | {"ZmlTest"}


def test_promtool_finds_nothing_to_say_about_the_metrics_of_any_role(live: Prometheus) -> None:
    said = {}
    for target in live.targets():
        asked = urllib.request.Request(target["scrapeUrl"], headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(asked, timeout=10) as answer:
            said[target["labels"]["role"], target["labels"]["member"]] = promtool(
                "check", "metrics", given=answer.read()
            )
    assert said == dict.fromkeys(said, "") and len({role for role, _ in said}) == 4
