"""Dashboards as Grafana reads them: its classic JSON model, which can be provisioned from files and imported by hand.

The model: https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/

The data source is the variable DS_PROMETHEUS: where files are provisioned it is chosen at the top of the dashboard, and
where a file is imported Grafana asks for it, because it stands in `__inputs` under the same name.
"""

from __future__ import annotations

from ..metrics import catalog as c
from ..metrics.catalog import Metric
from .grafana_panels import SOURCE, TYPES, Json, grid, panel
from .panels import ALARM, ALL, Dashboard, Query, places
from .prometheus import EVERY

SCHEMA = 41  # Grafana 12; older ones from 10 on take what is used here, newer ones migrate it
TAG = "zml"


def dashboard(described: Dashboard) -> Json:
    """One dashboard. The same description gives the same JSON."""
    panels: list[Json] = []
    for number, (row, title, stand) in enumerate(places(described), 1):
        panels.append(
            {
                "id": row_id(described, number),
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": grid(title),
                "panels": [],
            }
        )
        panels += [panel(each, place) for each, place in stand]
    types = sorted({TYPES[each.kind] for each in described.panels})
    return {
        "__inputs": [
            {
                "name": "DS_PROMETHEUS",
                "label": "Prometheus",
                "description": "The one that scrapes zml.",
                "type": "datasource",
                "pluginId": "prometheus",
                "pluginName": "Prometheus",
            }
        ],
        "__requires": [
            {"type": "grafana", "id": "grafana", "name": "Grafana", "version": "10.0.0"},
            {"type": "datasource", "id": "prometheus", "name": "Prometheus", "version": "1.0.0"},
            *({"type": "panel", "id": kind, "name": kind, "version": ""} for kind in types),
        ],
        "id": None,
        "uid": described.uid,
        "title": described.title,
        "description": described.says,
        "tags": [TAG],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one cross-hair on all panels
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timepicker": {},
        "fiscalYearStartMonth": 0,
        "annotations": {"list": happenings(described)},
        "templating": {"list": variables(described)},
        "links": [
            {
                "type": "dashboards",
                "title": "zml",
                "tags": [TAG],
                "asDropdown": False,
                "icon": "external link",
                "includeVars": True,
                "keepTime": True,
                "targetBlank": False,
                "tooltip": "",
                "url": "",
            }
        ],
        "panels": panels,
    }


def row_id(described: Dashboard, number: int) -> int:
    """Rows have numbers, too: above those of all panels, so that neither moves the other."""
    return 10_000 + min(each.number for each in described.panels) // 100 * 100 + number


# -- variables and annotations -----------------------------------------------------------------------------------


def variables(described: Dashboard) -> list[Json]:
    source: Json = {
        "type": "datasource",
        "name": "DS_PROMETHEUS",
        "label": "Prometheus",
        "query": "prometheus",
        "regex": "",
        "refresh": 1,
        "hide": 0,
        "multi": False,
        "includeAll": False,
        "current": {},
        "options": [],
    }
    return [source, *(variable(name) for name in described.variables)]


def values(name: str) -> tuple[str, str]:
    """The series whose label a variable takes its values from, and the label."""
    of: dict[str, tuple[Metric, str]] = {
        "job": (c.STATE, "job_id"),
        "worker": (c.STEPS, "worker"),
        "shard": (c.UPDATES, "shard"),
    }
    metric, label = of[name]
    return (metric.name if name == "job" else ALL.of(metric)), label


def variable(name: str) -> Json:
    series, label = values(name)
    query = f"label_values({series}, {label})"
    one = name == "job"  # a state or a progress of several jobs at once says nothing
    return {
        "type": "query",
        "name": name,
        "label": name.capitalize(),
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": "Variable", "qryType": 1},
        "refresh": 2,  # when the time range changes, too: jobs come and go
        "sort": 7,  # by number where there is one: w2 before w10
        "regex": "",
        "hide": 0,
        "skipUrlSync": False,
        "multi": not one,
        "includeAll": not one,
        "allValue": None if one else ".+",
        "current": {} if one else {"selected": True, "text": ["All"], "value": ["$__all"]},
        "options": [],
    }


def annotation_queries(described: Dashboard) -> dict[str, Query]:
    if "job" not in described.variables:
        return {}
    return {
        "Alerts": Query(ALARM, "{{alertname}}", rare=True),
        "Starts": Query(f"changes({ALL.of(c.LIVES)}[$__interval]) > 0", "{{id}} started again", rare=True),
        "Checkpoints": Query(f"{ALL.of(c.CHECKPOINT_AT)} * 1000", "checkpoint"),
    }


def happenings(described: Dashboard) -> list[Json]:
    """What happened, as lines across all panels."""
    colours = {"Alerts": "red", "Starts": "orange", "Checkpoints": "blue"}
    built_in: Json = {
        "builtIn": 1,
        "datasource": {"type": "grafana", "uid": "-- Grafana --"},
        "enable": True,
        "hide": True,
        "iconColor": "rgba(0, 211, 255, 1)",
        "name": "Annotations & Alerts",
        "type": "dashboard",
    }
    ours: list[Json] = [
        {
            "datasource": SOURCE,
            "enable": True,
            "hide": False,
            "iconColor": colours[name],
            "name": name,
            "expr": query.expr,
            "titleFormat": query.legend,
            "textFormat": "",
            "tagKeys": "severity,worker,shard,member,id",
            "step": "10s",
            # The value of a checkpoint's series is the time at which it was complete.
            "useValueForTime": name == "Checkpoints",
        }
        for name, query in annotation_queries(described).items()
    ]
    return [built_in, *ours]


# -- provisioning ------------------------------------------------------------------------------------------------


def data_sources(prometheus: str) -> Json:
    return {
        "apiVersion": 1,
        "datasources": [
            {
                "name": "zml Prometheus",
                "uid": "zml-prometheus",
                "type": "prometheus",
                "access": "proxy",
                "url": prometheus,
                # Grafana takes rates over four of these at least: as often as prometheus.yml scrapes.
                "jsonData": {"timeInterval": EVERY, "httpMethod": "POST"},
            }
        ],
    }


def providers(folder: str) -> Json:
    return {
        "apiVersion": 1,
        "providers": [
            {
                "name": "zml",
                "folder": "zml",
                "type": "file",
                "disableDeletion": False,
                "allowUiUpdates": True,
                "updateIntervalSeconds": 30,
                "options": {"path": folder},
            }
        ],
    }
