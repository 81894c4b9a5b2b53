"""The dashboards: of the catalog's metrics and of nothing else, placed without overlap, and in the form that Grafana
documents. Grafana itself is not run."""

import itertools
import json
import re
from typing import Any

import pytest

from zml.metrics import catalog
from zml.obs import grafana, promql
from zml.obs.machines import DASHBOARDS
from zml.obs.panels import ALL, SHOWN, Dashboard, Panel, Query, names, unit

# The part of Grafana's list of units that is used here: packages/grafana-data/src/valueFormats/categories.ts
UNITS = {"short", "s", "bytes", "binBps", "percentunit", "watt"}
PANELS = [panel for dashboard in DASHBOARDS for panel in dashboard.panels]
each = pytest.mark.parametrize("described", DASHBOARDS, ids=[each.uid for each in DASHBOARDS])


def queries(described: Dashboard) -> list[Query]:
    asked = [query for panel in described.panels for query in panel.queries]
    return asked + list(grafana.annotation_queries(described).values())


def test_every_metric_of_the_catalog_is_shown_somewhere() -> None:
    shown = {metric.name for panel in PANELS for query in panel.queries for metric in query.metrics}
    assert shown == set(catalog.METRICS)


def test_a_query_cannot_name_what_is_not_measured() -> None:
    with pytest.raises(KeyError, match="zml_worker_speed"):
        names('rate(zml_worker_speed{worker="zml_x"}[5m])')
    with pytest.raises(KeyError, match="zml_job_steps_bucket"):
        names("zml_job_steps_bucket")
    with pytest.raises(AssertionError, match="no label"):
        SHOWN.rate(catalog.STEPS, phase="data")
    with pytest.raises(AssertionError, match="is a gauge"):
        SHOWN.rate(catalog.JOB_STEPS)
    assert names("histogram_quantile(0.5, zml_loop_lag_seconds_bucket)") == ["zml_loop_lag_seconds"]


def test_numbers_and_addresses_are_one_of_a_kind() -> None:
    assert len({panel.number for panel in PANELS}) == len(PANELS)
    assert len({each.uid for each in DASHBOARDS}) == len(DASHBOARDS)
    assert all(len(each.uid) <= 40 for each in DASHBOARDS)  # Grafana's limit


def test_numbers_of_panels_stay() -> None:
    """Alerts and bookmarks point at them. A new panel gets a new number; that of one that is gone is not used again."""
    assert {
        "Staleness": 16,
        "Own time per step": 103,
        "Balance": 208,
        "Waiting for data, by worker": 305,
    }.items() <= {panel.title: panel.number for panel in PANELS}.items()


@each
def test_a_dashboard_asks_only_for_variables_that_it_has(described: Dashboard) -> None:
    used = {
        found
        for query in queries(described)
        for found in re.findall(r"\$\{?([a-zA-Z_]+)", query.expr)
        if not found.startswith("__")
    }
    assert used == set(described.variables)


@each
def test_the_json_is_the_same_every_time(described: Dashboard) -> None:
    assert json.dumps(grafana.dashboard(described)) == json.dumps(grafana.dashboard(described))


@each
def test_nothing_overlaps(described: Dashboard) -> None:
    made = grafana.dashboard(described)["panels"]
    for place in (panel["gridPos"] for panel in made):
        assert place["x"] >= 0 and place["w"] >= 1 and place["h"] >= 1
        assert place["x"] + place["w"] <= 24
    for one, other in itertools.combinations(made, 2):
        a, b = one["gridPos"], other["gridPos"]
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, f"{one['title']} and {other['title']}"


@each
def test_rows_are_full(described: Dashboard) -> None:
    """No holes: in each line of panels these are 24 columns wide together, and equally high."""
    lines: dict[int, list[tuple[int, int]]] = {}
    for panel in grafana.dashboard(described)["panels"]:
        place = panel["gridPos"]
        lines.setdefault(place["y"], []).append((place["w"], place["h"]))
    uneven = {
        y: line for y, line in lines.items() if sum(w for w, _ in line) != 24 or len({h for _, h in line}) > 1
    }
    assert uneven == {}


@each
def test_it_is_what_grafana_documents(described: Dashboard) -> None:
    made: dict[str, Any] = grafana.dashboard(described)
    assert made["id"] is None and made["uid"] == described.uid and made["schemaVersion"] == 41
    assert {
        "title",
        "tags",
        "time",
        "timepicker",
        "refresh",
        "templating",
        "annotations",
        "links",
    } <= made.keys()
    ids = [panel["id"] for panel in made["panels"]]
    assert len(ids) == len(set(ids)) and all(isinstance(number, int) and number > 0 for number in ids)
    sources = {json.dumps(source) for source in found(made, "datasource") if source["type"] == "prometheus"}
    assert sources == {json.dumps({"type": "prometheus", "uid": "${DS_PROMETHEUS}"})}
    # The same name for the input, by which an import asks, and for the variable, which a provisioned file uses.
    assert [each["name"] for each in made["__inputs"]] == ["DS_PROMETHEUS"]
    assert made["templating"]["list"][0]["name"] == "DS_PROMETHEUS"
    assert [each["name"] for each in made["templating"]["list"][1:]] == list(described.variables)
    kinds = {panel["type"] for panel in made["panels"]} - {"row"}
    assert kinds == {each["id"] for each in made["__requires"] if each["type"] == "panel"}
    assert kinds <= {"stat", "timeseries", "heatmap", "table", "barchart"}
    for panel in made["panels"]:
        if panel["type"] == "row":
            assert panel["panels"] == [] and panel["collapsed"] is False
            continue
        assert panel["description"] and panel["targets"]
        refs = [target["refId"] for target in panel["targets"]]
        assert refs == sorted(set(refs)) and refs[0] == "A"
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        assert steps[0]["value"] is None  # the base
        assert [step["value"] for step in steps[1:]] == sorted(step["value"] for step in steps[1:])
        for target in panel["targets"]:
            assert target["format"] in ("time_series", "table", "heatmap")
            assert target["instant"] is not target["range"]
            assert panel["type"] not in ("table", "barchart") or target["format"] == "table"
            assert panel["type"] != "heatmap" or target["format"] == "heatmap"


def found(data: Any, key: str) -> list[Any]:
    if isinstance(data, dict):
        here = [data[key]] if key in data else []
        return here + [each for value in data.values() for each in found(value, key)]
    return [each for value in data for each in found(value, key)] if isinstance(data, list) else []


def test_the_legend_names_labels_that_the_answer_has() -> None:
    for panel in PANELS:
        for query in panel.queries:
            by = re.search(r"by \(([a-z_, ]+)\)", query.expr)
            for label in re.findall(r"{{(\w+)}}", query.legend):
                kept = by[1].split(", ") if by else list(query.metrics[0].labels)
                assert label in kept, f"{panel.title}: {query.expr}"


def test_units_come_from_the_names() -> None:
    assert [unit(catalog.METRICS[name]) for name in ("zml_job_remaining_seconds", "zml_gpu_power_watts")] == [
        "s",
        "watt",
    ]
    assert unit(catalog.CPU, rate=True) == "percentunit"  # seconds per second
    assert unit(catalog.SHARD_SENT, rate=True) == "binBps"
    assert unit(catalog.STEPS, rate=True) == unit(catalog.STEPS) == "short"
    assert unit(catalog.PROGRESS) == "percentunit"


def test_a_lone_jobs_coordinator_and_that_of_many_are_shown_with_the_job() -> None:
    assert ALL.of(catalog.MEMORY) == 'zml_resident_memory_bytes{job_id=~"${job:regex}|"}'
    assert ALL.of(catalog.JOB_STEPS) == 'zml_job_steps{job_id="$job"}'
    assert ALL.of(catalog.JOBS) == "zml_cluster_jobs"
    assert SHOWN.of(catalog.PHASE, phase="!~push|pull") == (
        'zml_worker_phase_seconds_total{job_id="$job", worker=~"$worker", phase!~"push|pull"}'
    )


def test_long_expressions_are_broken_into_lines_and_stay_the_same() -> None:
    for panel in PANELS:
        for query in panel.queries:
            lines = promql.readable(query.expr, 60)
            assert re.sub(r"\s+", "", lines) == re.sub(r"\s+", "", query.expr)
    assert (
        promql.readable('sum by (a) (x{b="1 + ("}) / y and z', 20)
        == 'sum by (a) (\n  x{b="1 + ("}\n)\n/ y and z'
    )


def test_every_panel_says_what_it_shows() -> None:
    silent: list[Panel] = [panel for panel in PANELS if not panel.says.endswith(".")]
    assert silent == []
