"""One panel as Grafana's JSON: what it asks for, how it draws the answer, and what it makes of tables before."""

from __future__ import annotations

from typing import Any

from .panels import Panel, Place, Query

Json = dict[str, Any]

SOURCE = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
TYPES = {
    "number": "stat",
    "lines": "timeseries",
    "stack": "timeseries",
    "heat": "heatmap",
    "table": "table",
    "bars": "barchart",
    "list": "table",
}
# A phase has one colour wherever it is shown. Chosen to be told apart by the colour-blind: Okabe and Ito,
# "Color Universal Design", 2008.
PHASE_COLOURS = {
    "data": "#E69F00",
    "compute": "#009E73",
    "encode": "#56B4E9",
    "wait": "#D55E00",
    "apply": "#CC79A7",
}


def grid(place: Place) -> Json:
    return {"x": place.x, "y": place.y, "w": place.w, "h": place.h}


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
            {"color": colour, "value": None if number == 0 else start}
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
