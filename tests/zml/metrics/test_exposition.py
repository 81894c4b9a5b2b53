"""What is scraped: every metric of the catalog from its roles and nothing else, as a strict parser reads it."""

import asyncio
import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_plain

from tests.simulation import simulate
from tests.zml.cluster import Cluster
from tests.zml.hub import FakeCluster
from tests.zml.test_reporting import largest
from zml.figures import ShardFigures, WorkerFigures
from zml.messages import JobSpec
from zml.metrics import catalog, sources
from zml.metrics.catalog import METRICS, Role
from zml.metrics.exposition import text
from zml.metrics.lag import Lag
from zml.metrics.points import Classes, Point
from zml.metrics.process import of_process
from zml.metrics.roles import CoordinatorSource, HubSource, ShardSource, WorkerSource, is_short
from zml.status import CheckpointStatus, JobStatus, MemberStatus, RateStatus
from zml.transport.memory import MemoryNetwork

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
ROLES: tuple[Role, ...] = ("coordinator", "shard", "worker", "hub")
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scraped(role: Role, points: Iterable[Point]) -> Series:
    """Every series with its value, the same in both formats, and none twice."""
    points = list(points)
    plain, kind = text(role, points)
    assert kind.startswith("text/plain")
    found: Series = {}
    families = list(read_plain(plain.decode()))
    for sample in (sample for family in families for sample in family.samples):
        series = (sample.name, tuple(sorted(sample.labels.items())))
        assert series not in found
        found[series] = sample.value
    body, kind = text(role, points, OPENMETRICS)
    assert kind.startswith("application/openmetrics-text") and body.endswith(b"# EOF\n")
    # Its parser refuses what is out of order, twice, not cumulative or without its sum.
    again = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in read_openmetrics(body.decode())  # type: ignore[no-untyped-call]
        for sample in family.samples
    }
    assert {key: value for key, value in again.items() if not math.isnan(value)} == {
        key: value for key, value in found.items() if not math.isnan(value)
    }
    declared = {name for name, metric in METRICS.items() if role in metric.roles}
    names = {line.split()[2] for line in plain.decode().splitlines() if line.startswith("# TYPE")}
    assert names == declared, "what a role has, also where there is no value now, and nothing else"
    return found


def names(found: Series) -> set[str]:
    """Of metrics: histograms have their own endings."""
    ends = ("_bucket", "_count", "_sum")
    return {
        next((name.removesuffix(end) for end in ends if name.removesuffix(end) in METRICS), name)
        for name, _ in found
    }


STATUS = JobStatus(
    job="job",
    state="RUNNING",
    mode="staleness 4",
    workers=2,
    shards=1,
    epochs=2,
    epoch_progress=0.5,
    values={"loss": 0.5, "broken": None},
    eta_s=5.0,
    rate=RateStatus(factor=2.0),
    members=[
        MemberStatus(member="w0", role="worker", state="active", heard_s=0.1, incarnation=2),
        MemberStatus(member="w1", role="worker", state="lost"),
        MemberStatus(member="p0", role="shard", state="active", heard_s=0.2),
    ],
    checkpoint=CheckpointStatus(path="/c", step=10, at=1e9, bytes=1 << 30, held_s=0.1, took_s=2.0, taken=3),
)
FULL: dict[Role, list[Point]] = {
    "worker": [*of_process(Lag(), 5), *sources.of_worker("w0", largest(WorkerFigures), 3)],
    "shard": [*of_process(Lag()), *sources.of_shard("p0", largest(ShardFigures))],
    "coordinator": [*of_process(Lag()), *sources.of_job(STATUS)],
    "hub": [
        *of_process(Lag()),
        *sources.of_job(STATUS),
        *sources.of_cluster({"RUNNING": 1}, {"UP": 2}, (8, 3), (64, 60)),
    ],
}


@pytest.mark.parametrize("role", ROLES)
def test_every_metric_of_the_catalog_is_shown_by_its_roles_and_nothing_else(role: Role) -> None:
    found = scraped(role, FULL[role])
    assert names(found) == {name for name, metric in METRICS.items() if role in metric.roles}


def test_a_job_is_told_in_numbers() -> None:
    found = scraped("coordinator", FULL["coordinator"])
    job = ("job_id", "job")
    assert found["zml_job_state", (job, ("state", "RUNNING"))] == 1
    assert sum(value for (name, _), value in found.items() if name == "zml_job_state") == 1
    assert math.isnan(found["zml_train_value", (job, ("name", "broken"))])
    assert found["zml_train_value_finite", (job, ("name", "broken"))] == 0
    assert found["zml_job_staleness_bound_steps", (job,)] == 4
    assert found["zml_job_progress_ratio", (job,)] == 0.25
    assert found["zml_members", (job, ("member_role", "worker"), ("state", "lost"))] == 1
    assert ("zml_member_heard_seconds", (("id", "w1"), job, ("member_role", "worker"))) not in found
    assert found["zml_checkpoint_duration_seconds", (job, ("phase", "held"))] == 0.1


def test_what_is_not_there_yet_is_no_zero() -> None:
    found = scraped("coordinator", [*of_process(Lag()), *sources.of_job(JobStatus(job="j", state="FORMING"))])
    assert not names(found) & {
        "zml_checkpoint_last_success_timestamp_seconds",
        "zml_job_progress_ratio",
        "zml_job_remaining_seconds",
        "zml_train_value",
    }


@pytest.mark.parametrize(("mode", "most"), [("sync", 0.0), ("staleness 7", 7.0), ("async", math.inf)])
def test_the_bound_is_that_of_the_mode(mode: str, most: float) -> None:
    asked = {"sync": 0, "async": None}.get(mode, 7)
    assert JobSpec(staleness=asked).mode == mode and sources.bound(mode) == most


HOSTILE = ['a"b', "a\\b", "a\nb", "}", '{x="y"} 1\n# EOF\n', "\udcff", "é" * 500, "\x00\r\x1b", "\u2028", ""]


@given(st.lists(st.one_of(st.sampled_from(HOSTILE), st.text()), max_size=8))
def test_no_name_that_a_script_gives_breaks_the_page(given_: list[str]) -> None:
    values: dict[str, float | None] = dict.fromkeys(given_, 1.0)
    status = msgspec.structs.replace(STATUS, job='j"\n\\', values=values)
    found = scraped("coordinator", [*of_process(Lag()), *sources.of_job(status)])
    shown = {dict(labels)["name"] for name, labels in found if name == "zml_train_value"}
    assert shown == {name[:120].encode("utf-8", "replace").decode() for name in values}


def test_names_that_are_the_same_once_they_are_cut_are_one_series() -> None:
    values: dict[str, float | None] = {"x" * 120 + "1": 1.0, "x" * 120 + "2": 2.0}
    status = msgspec.structs.replace(STATUS, values=values)
    found = scraped("coordinator", [*of_process(Lag()), *sources.of_job(status)])
    assert [value for (name, _), value in found.items() if name == "zml_train_value"] == [1.0]


@pytest.mark.parametrize(
    "accept", ["", "*/*", "text/html", OPENMETRICS, "application/openmetrics-text;version=x", ";;,"]
)
def test_whatever_a_client_accepts_it_gets_a_page(accept: str) -> None:
    body, kind = text("worker", FULL["worker"], accept)
    assert b"zml_worker_steps_total" in body and kind.partition(";")[0] in (
        "text/plain",
        "application/openmetrics-text",
    )


def test_buckets_are_cumulative_and_a_value_on_a_bound_is_in_it() -> None:
    point = Point(catalog.STALENESS, ("w0",), Classes([5, 1, 0, 0, 0, 0, 0, 2], 99))
    found = scraped("worker", [point])
    ends = {dict(labels)["le"]: value for (name, labels), value in found.items() if name.endswith("_bucket")}
    assert ends == {"0.0": 5, "1.0": 6, "2.0": 6, "4.0": 6, "8.0": 6, "16.0": 6, "32.0": 6, "+Inf": 8} | {
        end: value for end, value in ends.items() if end not in ("0.0", "1.0")
    }
    assert (ends["32.0"], ends["+Inf"]) == (6, 8)


# -- of roles that run -------------------------------------------------------------------------------------


def test_a_cluster_that_trains_shows_what_it_does_and_no_counter_goes_back(tmp_path: Path) -> None:
    counters = {name for name, metric in METRICS.items() if metric.kind in ("counter", "histogram")}

    async def main() -> list[dict[str, Series]]:
        cluster = Cluster(MemoryNetwork(3), JobSpec(workers=2, shards=2), folder=tmp_path)
        await cluster.start()
        scripts = [cluster.script(f"w{number}", batches=40) for number in range(2)]
        looks = []

        async def look() -> None:
            while True:
                await asyncio.sleep(0.4)
                found = {
                    "c": scraped(
                        "coordinator", await CoordinatorSource(cluster.coordinator, Lag(), "").points()
                    )
                }
                for number, ps in cluster.shards.items():
                    found[f"p{number}"] = scraped("shard", await ShardSource(ps, Lag()).points())
                looks.append(found)

        looking = asyncio.ensure_future(look())
        assert await cluster.finish() == 0, [script.error for script in scripts]
        looking.cancel()
        return looks

    looks = simulate(main())
    assert len(looks) >= 3
    for before, later in itertools.pairwise(looks):
        for role, series in later.items():
            for key, value in series.items():
                if key[0] in counters or key[0].endswith(("_bucket", "_count")):
                    assert value >= before[role].get(key, 0.0), (role, key)
    last = looks[-1]

    def of(shard: str, name: str, **labels: str) -> float:
        return last[shard][name, tuple(sorted({"shard": shard, **labels}.items()))]

    for shard in ("p0", "p1"):
        assert of(shard, "zml_ps_updates_total") > 20
        assert of(shard, "zml_ps_version") == of(shard, "zml_ps_updates_total")
        assert of(shard, "zml_ps_apply_duration_seconds_count") == of(shard, "zml_ps_updates_total")
        assert of(shard, "zml_ps_pushes_total", result="taken") > of(shard, "zml_ps_updates_total")
        assert of(shard, "zml_ps_pushes_total", result="refused") == 0
        assert of(shard, "zml_ps_received_bytes_total") > of(shard, "zml_ps_dense_received_bytes_total") > 0
        assert of(shard, "zml_ps_sent_bytes_total") > 0 and of(shard, "zml_ps_push_log_bytes") > 0
    # 12 * 10 + 10 + 10 * 4 + 4 parameters in fp32, and a momentum for each.
    assert sum(of(shard, "zml_ps_parameter_bytes") for shard in ("p0", "p1")) == 4 * 174
    momentum = sum(of(shard, "zml_ps_optimizer_bytes") for shard in ("p0", "p1"))
    assert momentum == pytest.approx(4 * 174, rel=0.05), "it is told of each shard as its first chunk has it"
    assert last["c"]["zml_members", (("job_id", "job"), ("member_role", "worker"), ("state", "active"))] == 2


def test_a_hub_counts_jobs_and_shows_those_that_have_an_attempt(tmp_path: Path) -> None:
    async def main() -> tuple[Series, Series, list[str]]:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        source = HubSource(cluster.hub, Lag(), "http://h:1")
        empty = scraped("hub", await source.points())
        cluster.metrics = {"w0": "http://10.0.0.7:9", "w1": "http://evil.example:9"}
        cluster.node("n1", cpus=4)
        first, second = cluster.submit(workers=2), cluster.submit(workers=3)
        await cluster.until_state(first, "RUNNING")
        found = scraped("hub", await source.points())
        waiting = cluster.desk.job(second).state
        targets = [target.targets[0] for target in source.targets()]
        await cluster.close()
        assert waiting == "QUEUED"
        return empty, found, targets

    empty, found, targets = simulate(main())
    assert empty["zml_cluster_jobs", (("state", "RUNNING"),)] == 0
    assert [found["zml_cluster_jobs", (("state", state),)] for state in ("RUNNING", "QUEUED")] == [1, 1]
    assert found["zml_cluster_nodes", (("state", "UP"),)] == 1
    assert {labels for name, labels in found if name == "zml_job_steps"} == {(("job_id", "j1"),)}
    assert found["zml_members", (("job_id", "j1"), ("member_role", "worker"), ("state", "active"))] == 2
    assert (
        found["zml_cluster_cpus", (("state", "used"),)] + found["zml_cluster_cpus", (("state", "free"),)] == 4
    )
    assert targets == ["h:1", "10.0.0.7:9"], "the other member named a host that is not its node's"


def test_of_many_jobs_a_hub_shows_what_each_is_as_a_whole() -> None:
    found = scraped("hub", filter(is_short, FULL["hub"]))
    single = {"zml_member_heard_seconds", "zml_member_incarnation"}
    assert names(scraped("hub", FULL["hub"])) - names(found) == single
    assert [value for (name, _), value in found.items() if name == "zml_job_state"] == [1]


def test_an_agent_shows_its_scripts_together() -> None:
    class Standing:
        name, scripts, figures = "w3", 2, WorkerFigures(steps=12, memory_bytes=77, cpu_s=5.5, open_files=9)

    source = WorkerSource(cast(Any, Standing()), Lag())
    found = scraped("worker", asyncio.run(cast(Any, source.points())))
    me = (("worker", "w3"),)
    assert (found["zml_worker_steps_total", me], found["zml_worker_restarts_total", me]) == (12, 1)
    assert found["zml_resident_memory_bytes", ()] == 77
    assert (found["zml_cpu_seconds_total", ()], found["zml_open_files", ()]) == (5.5, 9), "of its script"
    assert "zml_gpu_memory_bytes" not in names(found) and "zml_worker_learning_rate" not in names(found)

    class Joining(Standing):
        name = ""

    found = scraped("worker", asyncio.run(cast(Any, WorkerSource(cast(Any, Joining()), Lag()).points())))
    assert "zml_worker_steps_total" not in names(found)
