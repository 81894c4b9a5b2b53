"""An OpenTelemetry collector between zml and a store of traces, metrics and logs: https://opentelemetry.io/docs/collector/

It takes the spans that processes send, scrapes what Prometheus would, reads the logs of runs, and hands everything on
by OTLP over HTTP. It needs the distribution `contrib`, which has `prometheus` and `filelog`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .emit import Said
from .prometheus import EVERY, scrape

HEAD = """An OpenTelemetry collector for zml, of the distribution contrib:

    ZML_OTLP=http://STORE:4318 otelcol-contrib --config otel-collector.yaml

Then start zml with OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318 for traces. Without ZML_OTLP, what
comes is handed to http://127.0.0.1:14318."""
PATHS = "A file of JSON lines per process. ZML_RUNS names another folder than the one that was exported for."


def config(coordinators: Sequence[str], token_file: Path | None, runs: Path) -> dict[str, Any]:
    """otel-collector.yaml. `runs` is the folder with the run directories."""
    store = "${env:ZML_OTLP:-http://127.0.0.1:14318}"
    folder = f"${{env:ZML_RUNS:-{_dollars(str(runs))}}}"
    return {
        "receivers": {
            "otlp": {"protocols": {"http": {"endpoint": "127.0.0.1:4318"}}},
            "prometheus": {
                "config": {
                    "scrape_configs": [
                        {**_dollars(scrape(coordinators, token_file)), "scrape_interval": EVERY}
                    ]
                }
            },
            "filelog": {
                "include": Said(
                    PATHS, [f"{folder}/{run}/logs/*.jsonl" for run in ("*", "slurm-*/attempt-*", "jobs/*/*")]
                ),
                "start_at": "beginning",
                "operators": [
                    {
                        "type": "json_parser",
                        "timestamp": {
                            "parse_from": "attributes.time",
                            "layout_type": "gotime",
                            "layout": "2006-01-02T15:04:05.999999Z07:00",
                        },
                        "severity": {
                            "parse_from": "attributes.level",
                            "mapping": {"warn": "warning", "fatal": "critical"},
                        },
                    },
                    {
                        "type": "trace_parser",
                        "if": "attributes.trace_id != nil",
                        "trace_id": {"parse_from": "attributes.trace_id"},
                        "span_id": {"parse_from": "attributes.span_id"},
                    },
                    {
                        "type": "move",
                        "if": "attributes.message != nil",
                        "from": "attributes.message",
                        "to": "body",
                    },
                ],
            },
        },
        "processors": {
            "memory_limiter": {"check_interval": "1s", "limit_mib": 512},
            "batch": {},
            "resource": {"attributes": [{"key": "service.namespace", "value": "zml", "action": "upsert"}]},
        },
        "exporters": {"otlphttp": {"endpoint": store}},
        "service": {
            "pipelines": {
                signal: {
                    "receivers": [receiver],
                    "processors": ["memory_limiter", "resource", "batch"],
                    "exporters": ["otlphttp"],
                }
                for signal, receiver in (("traces", "otlp"), ("metrics", "prometheus"), ("logs", "filelog"))
            }
        },
    }


def _dollars(value: Any) -> Any:
    """A $ of ours doubled: the collector would take it for one of its own variables."""
    match value:
        case Said():
            return Said(value.comment, _dollars(value.value))
        case str():
            return value.replace("$", "$$")
        case Mapping():
            return {key: _dollars(inner) for key, inner in value.items()}
        case list():
            return [_dollars(inner) for inner in value]
        case _:
            return value
