"""Dashboards as Grafana reads them: its classic JSON model, which can be provisioned from files and imported by hand.

https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/ describes the model. The
data source is the variable DS_PROMETHEUS: where files are provisioned it is chosen at the top of the dashboard, and where
a file is imported Grafana asks for it, because it stands in `__inputs` under the same name.
"""

from __future__ import annotations

from typing import Any

from ..metrics import catalog as c
from ..metrics.catalog import Metric
from .panels import ALARM, ALL, Dashboard, Panel, Place, Query, places

SCHEMA = 41  # Grafana 12; older ones from 10 on take what is used here, newer ones migrate it
SOURCE = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
TAG = "zml"
TYPES = {
    "number": "stat",
    "lines": "timeseries",
    "stack": "timeseries",
    "heat": "heatmap",
    "table": "table",
    "bars": "barchart",
    "list": "table",
}
COLOURS = {"yellow": "#EAB839"}
# A phase has one colour wherever it is shown. Chosen to be told apart by the colour-blind: Okabe and Ito,
# "Color universal design", 2008.
PHASE_COLOURS = {
    "data": "#E69F00",
    "compute": "#009E73",
    "encode": "#56B4E9",
    "wait": "#D55E00",
    "apply": "#CC79A7",
}

Json = dict[str, Any]


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
        "annotations": {"list": annotations(described)},
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


def grid(place: Place) -> Json:
    return {"x": place.x, "y": place.y, "w": place.w, "h": place.h}


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


def annotations(described: Dashboard) -> list[Json]:
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
            "useValueForTime": "on" if name == "Checkpoints" else False,
        }
        for name, query in annotation_queries(described).items()
    ]
    return [built_in, *ours]


# -- panels ------------------------------------------------------------------------------------------------------


def panel(described: Panel, place: Place) -> Json:
    made: Json = {
        "id": described.number,
        "type": TYPES[described.kind],
        "title": described.title,
        "description": described.says,
        "datasource": SOURCE,
        "gridPos": grid(place),
        "targets": [target(described, query, number) for number, query in enumerate(described.queries)],
        "fieldConfig": {"defaults": defaults(described), "overrides": overrides(described)},
        "options": options(described),
    }
    if steps := transformations(described):
        made["transformations"] = steps
    return made


def target(described: Panel, query: Query, number: int) -> Json:
    """One query; refIds are A, B, C and so on."""
    at_once = described.kind in ("table", "bars", "list", "number")
    shape = {"heat": "heatmap", "table": "table", "bars": "table", "list": "table"}
    return {
        "refId": chr(ord("A") + number),
        "datasource": SOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend or "__auto",
        "format": shape.get(described.kind, "time_series"),
        "instant": at_once,
        "range": not at_once,
    }


def defaults(described: Panel) -> Json:
    steps: list[Json] = [{"color": "green" if described.kind != "number" else "text", "value": None}]
    if described.steps:
        steps = [
            {"color": COLOURS.get(colour, colour), "value": None if number == 0 else start}
            for number, (start, colour) in enumerate(described.steps)
        ]
    made: Json = {
        "unit": described.unit,
        "color": {"mode": "thresholds" if described.kind == "number" else "palette-classic"},
        "thresholds": {"mode": "absolute", "steps": steps},
        "mappings": [],
    }
    if described.least is not None:
        made["min"] = described.least
    if described.most is not None:
        made["max"] = described.most
    if described.kind in ("lines", "stack"):
        stacked = described.kind == "stack"
        made["custom"] = {
            "drawStyle": "line",
            "lineInterpolation": "linear",
            "lineWidth": 1,
            "fillOpacity": 70 if stacked else 0,
            "gradientMode": "none",
            "showPoints": "never",
            "spanNulls": False,
            "axisPlacement": "auto",
            "axisLabel": "",
            "scaleDistribution": {"type": "linear"},
            "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
            "thresholdsStyle": {"mode": "dashed" if described.steps and described.kind == "lines" else "off"},
        }
    if described.kind == "bars":
        made["custom"] = {"lineWidth": 0, "fillOpacity": 85, "axisPlacement": "auto", "axisLabel": ""}
    return made


def overrides(described: Panel) -> list[Json]:
    if described.kind == "table":
        return [
            {
                "matcher": {"id": "byName", "options": title},
                "properties": [{"id": "unit", "value": unit}, {"id": "decimals", "value": 2}],
            }
            for title, unit in described.columns
        ]
    phases = described.split == "phase" or any(query.legend == "{{phase}}" for query in described.queries)
    if not phases:
        return []
    return [
        {
            "matcher": {"id": "byName", "options": phase},
            "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
        }
        for phase, colour in PHASE_COLOURS.items()
    ]


def options(described: Panel) -> Json:
    latest = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    legend = {"showLegend": True, "displayMode": "list", "placement": "bottom", "calcs": []}
    match described.kind:
        case "number":
            return {
                "reduceOptions": latest,
                "colorMode": "value",
                "graphMode": "none",
                "justifyMode": "auto",
                "orientation": "auto",
                # The state is in the name of its series; the value of all of them is 1.
                "textMode": "name" if described.title == "State" else "auto",
                "wideLayout": True,
            }
        case "heat":
            return {
                "calculate": False,
                "cellGap": 1,
                "color": {
                    "mode": "scheme",
                    "scheme": "Oranges",
                    "fill": "dark-orange",
                    "exponent": 0.5,
                    "steps": 64,
                },
                "exemplars": {"color": "rgba(255,0,255,0.7)"},
                "filterValues": {"le": 1e-9},
                "legend": {"show": True},
                "rowsFrame": {"layout": "auto"},
                "tooltip": {"mode": "single", "yHistogram": False},
                "yAxis": {"axisPlacement": "left", "reverse": False, "unit": described.unit},
            }
        case "table":
            first = described.queries[0].legend
            return {
                "showHeader": True,
                "cellHeight": "sm",
                "footer": {"show": False, "reducer": ["sum"], "fields": ""},
                "sortBy": [{"displayName": first, "desc": True}],
            }
        case "list":
            return {
                "showHeader": True,
                "cellHeight": "sm",
                "footer": {"show": False, "reducer": ["sum"], "fields": ""},
            }
        case "bars":
            return {
                "xField": described.key,
                "orientation": "horizontal",
                "stacking": "normal",
                "showValue": "never",
                "barWidth": 0.9,
                "groupWidth": 0.7,
                "barRadius": 0,
                "xTickLabelRotation": 0,
                "xTickLabelMaxLength": 20,
                "xTickLabelSpacing": 0,
                "fullHighlight": False,
                "legend": {**legend, "placement": "right"},
                "tooltip": {"mode": "multi", "sort": "none"},
            }
        case _:
            return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}


def transformations(described: Panel) -> list[Json]:
    """What Grafana makes of tables before it draws them."""
    if described.kind == "bars":
        matrix = {
            "rowField": described.key,
            "columnField": described.split,
            "valueField": "Value",
            "emptyValue": "zero",
        }
        name = {f"{described.key}\\{described.split}": described.key}
        return [
            {"id": "groupingToMatrix", "options": matrix},
            {"id": "organize", "options": {"excludeByName": {}, "indexByName": {}, "renameByName": name}},
        ]
    if described.kind == "list":
        hidden = dict.fromkeys(("Time", "Value", "__name__", "alertstate", "job", "instance"), True)
        order = {"alertname": 0, "severity": 1, "job_id": 2, "worker": 3, "shard": 4, "member": 5, "id": 6}
        return [
            {"id": "organize", "options": {"excludeByName": hidden, "indexByName": order, "renameByName": {}}}
        ]
    if described.kind == "table":
        letters = [chr(ord("A") + number) for number in range(len(described.queries))]
        titles = {
            f"Value #{letter}": query.legend for letter, query in zip(letters, described.queries, strict=True)
        }
        if len(letters) == 1:
            titles = {"Value": described.queries[0].legend}
        order = {described.key: 0, **{value: number for number, value in enumerate(titles, 1)}}
        hidden = {"Time": True} if described.key == "job_id" else {"Time": True, "job_id": True}
        return [
            {"id": "merge", "options": {}},
            {
                "id": "organize",
                "options": {"excludeByName": hidden, "indexByName": order, "renameByName": titles},
            },
        ]
    return []


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
                "jsonData": {"timeInterval": "10s", "httpMethod": "POST"},
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
