"""All files of the kit: made in memory, then written so that a folder has all of them or none.

A file that is there is somebody's: it is not replaced without being told to. Nothing is written until everything is
made, and nothing is moved into place until everything is written.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .. import __version__
from ..errors import USAGE, ZmlError
from . import collector, grafana, prometheus, rules
from .emit import to_yaml
from .machines import DASHBOARDS

README = "README.txt"
MOST_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Kit:
    """What the files are made for. All paths are absolute: programs that read them are started anywhere."""

    folder: Path
    coordinators: Sequence[str]  # http://HOST:PORT
    token_file: Path | None = None
    prometheus: str = "http://127.0.0.1:9090"
    runs: Path = Path("/")


def files(kit: Kit) -> dict[str, str]:
    """Path below the folder -> contents, in the order in which they are told."""
    grafana_head = (
        "Read by Grafana at its start, from its folder of provisioning.\n"
        "https://grafana.com/docs/grafana/latest/administration/provisioning/"
    )
    where = grafana.providers(str(kit.folder / "grafana" / "dashboards"))
    made = {
        "prometheus.yml": to_yaml(prometheus.config(kit.coordinators, kit.token_file), prometheus.HEAD),
        prometheus.RULES: to_yaml(rules.rule_file(), rules.HEAD),
        "grafana/provisioning/datasources/zml.yml": to_yaml(
            grafana.data_sources(kit.prometheus), grafana_head
        ),
        "grafana/provisioning/dashboards/zml.yml": to_yaml(where, grafana_head),
    }
    for described in DASHBOARDS:
        text = json.dumps(grafana.dashboard(described), indent=2, ensure_ascii=False)
        made[f"grafana/dashboards/{described.uid}.json"] = text + "\n"
    made["otel-collector.yaml"] = to_yaml(
        collector.config(kit.coordinators, kit.token_file, kit.runs), collector.HEAD
    )
    made |= {path.name: path.read_text() for path in sorted(Path(__file__).parent.glob("*.conf"))}
    made[README] = readme(kit, made)
    return made


ABOUT = {
    "prometheus.yml": "where Prometheus finds the processes",
    prometheus.RULES: "alerts",
    "grafana/provisioning/datasources/zml.yml": "which Prometheus Grafana asks",
    "grafana/provisioning/dashboards/zml.yml": "where Grafana finds the dashboards",
    "otel-collector.yaml": "an OpenTelemetry collector",
    "fluentd.conf": "the logs of runs, for Fluentd",
    "fluent-bit.conf": "the logs of runs, for Fluent Bit",
    "parsers.conf": "how Fluent Bit reads them",
    README: "how to start each",
} | {f"grafana/dashboards/{each.uid}.json": f"dashboard {each.title}" for each in DASHBOARDS}


def readme(kit: Kit, made: Mapping[str, str]) -> str:
    """How to start each program, with the paths as they are here."""
    path = {name: shlex.quote(str(kit.folder / name)) for name in (*made, "grafana/provisioning")}
    runs = shlex.quote(str(kit.runs))
    sections = [
        f"""What other programs need to show and watch zml, made by zml {__version__}. `zml obs export`
makes it anew. Edit it as you like: it is not replaced without --force.""",
        f"""Prometheus collects what every process counts, and decides when to alert

    prometheus --config.file={path["prometheus.yml"]}

It asks {" and ".join(kit.coordinators)} who is here.
http://127.0.0.1:9090/targets shows what it found, and http://127.0.0.1:9090/alerts
what fires. To be told of alerts, name an Alertmanager in prometheus.yml. To check
what you have edited: promtool check config prometheus.yml

The token that it sends, to every process that it is told of, should be one of its own:
a line `prometheus TOKEN` in the file of tokens, without `admin`. A token without a
name may change everybody's jobs; that one may see them, and change none but its own.""",
        f"""Grafana shows it; its data source is {kit.prometheus}

    GF_PATHS_PROVISIONING={path["grafana/provisioning"]} \\
        grafana server --homepath /usr/share/grafana

Begin with "zml: Overview", and go on by the links at its top. To put the dashboards
into a Grafana that runs: Dashboards, New, Import, and one of the files in
grafana/dashboards; it asks for the data source. If you move this folder, or Grafana
runs in a container, correct the path in grafana/provisioning/dashboards/zml.yml.""",
        f"""An OpenTelemetry collector takes traces, metrics and logs, and hands them on

    ZML_OTLP=http://STORE:4318 \\
        otelcol-contrib --config {path["otel-collector.yaml"]}

Then start zml with OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318.""",
    ]
    if "fluentd.conf" in made:
        sections.append(
            f"""Fluentd reads the logs of runs, and remembers how far in ZML_POSITIONS

    ZML_RUNS={runs} ZML_POSITIONS=/var/lib/fluentd \\
        fluentd -c {path["fluentd.conf"]}"""
        )
    if "fluent-bit.conf" in made:
        sections.append(
            f"""Fluent Bit does the same with less

    ZML_RUNS={runs} fluent-bit -c {path["fluent-bit.conf"]}"""
        )
    return "\n\n\n".join(sections) + "\n"


def write(folder: Path, made: Mapping[str, str], *, force: bool = False) -> list[Path]:
    """Write the files below `folder`; returns their paths. Raises ZmlError, and then nothing is changed."""
    there = [name for name in made if os.path.lexists(folder / name)]
    if there and not force:
        named = ", ".join(there[:MOST_NAMED]) + (
            f" and {len(there) - MOST_NAMED} more" if there[MOST_NAMED:] else ""
        )
        raise ZmlError(
            USAGE, f"{folder} already holds {named}", "Choose another folder, or replace them with --force."
        )
    scratch: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".zml-obs-", dir=folder))  # the same disk: a rename is enough
        for name, text in made.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_text(text, encoding="utf-8")
        for name in made:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if (folder / name).is_dir():
                raise IsADirectoryError(0, f"{name} is a folder")
        for name in made:
            os.replace(scratch / name, folder / name)
    except OSError as error:
        what = f"cannot write to {folder}: {error.strerror}"
        raise ZmlError(USAGE, what, "Choose another folder.") from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return [folder / PurePosixPath(name) for name in made]
