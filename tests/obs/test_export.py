"""`zml obs export`: all files or none, nobody's edits lost, and each in the form that its reader takes."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.obs.prometheus import promtool
from zml.commands.cli import run
from zml.obs import collector, export
from zml.obs.machines import DASHBOARDS
from zml.runs import rundir

KIT = [
    "prometheus.yml",
    "rules/zml.yml",
    "grafana/provisioning/datasources/zml.yml",
    "grafana/provisioning/dashboards/zml.yml",
    *(f"grafana/dashboards/{each.uid}.json" for each in DASHBOARDS),
    "otel-collector.yaml",
    *(path.name for path in sorted(Path(export.__file__).parent.glob("*.conf"))),
    "README.txt",
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(path: str) -> Any:
    return yaml.safe_load(Path(path).read_text())


def found(folder: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


def contents(folder: str) -> dict[str, bytes]:
    return {name: Path(folder, name).read_bytes() for name in found(folder)}


def test_it_writes_and_tells_every_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["obs", "export", "kit"]) == 0
    out = capsys.readouterr().out
    assert found("kit") == sorted(KIT)
    lines = out.splitlines()
    assert lines[0] == "kit, for http://127.0.0.1:7078:"
    assert [line.split()[0] for line in lines[1 : 1 + len(KIT)]] == KIT
    assert lines[-2:] == [
        "Start: prometheus --config.file=kit/prometheus.yml",
        "kit/README.txt says the rest.",
    ]
    assert all(len(line) <= 80 for line in lines) and "\r" not in out and "\x1b" not in out


def test_it_tells_machines_the_same(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert run(["obs", "export", "kit", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(here / "kit"), "files": KIT}


def test_the_same_call_writes_the_same_bytes() -> None:
    assert run(["obs", "export", "kit"]) == 0
    first = contents("kit")
    assert run(["obs", "export", "kit", "--force"]) == 0
    assert contents("kit") == first


def test_files_that_are_there_stay(capsys: pytest.CaptureFixture[str]) -> None:
    Path("kit/rules").mkdir(parents=True)
    Path("kit/rules/zml.yml").write_text("mine\n")
    Path("kit/prometheus.yml").write_text("mine, too\n")
    Path("kit/other.txt").write_text("not of the kit\n")
    before = contents("kit")
    assert run(["obs", "export", "kit"]) == 2
    said = capsys.readouterr()
    assert (
        said.out == "" and "already holds prometheus.yml, rules/zml.yml" in said.err and "--force" in said.err
    )
    assert contents("kit") == before
    assert run(["obs", "export", "kit", "--force"]) == 0
    assert Path("kit/rules/zml.yml").read_text() != "mine\n"
    assert Path("kit/other.txt").read_text() == "not of the kit\n"


def test_a_link_that_leads_nowhere_counts_as_a_file_that_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    Path("kit").mkdir()
    Path("kit/prometheus.yml").symlink_to("/nowhere/prometheus.yml")
    assert run(["obs", "export", "kit"]) == 2
    assert found("kit") == []


def test_nothing_is_left_half_written(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full after three files."""
    assert run(["obs", "export", "kit"]) == 0
    Path("kit/prometheus.yml").write_text("mine\n")
    before = contents("kit")
    written = []
    really = Path.write_text

    def full(path: Path, text: str, **how: Any) -> int:
        written.append(path)
        if len(written) > 3:
            raise OSError(28, "No space left on device")
        return really(path, text, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert run(["obs", "export", "kit", "--force"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert contents("kit") == before and not list(Path("kit").glob(".*"))


@pytest.mark.parametrize(
    ("blocked", "because"),
    [("kit", "File exists"), ("kit/rules", "File exists"), ("kit/prometheus.yml/x", "is a folder")],
)
def test_what_stands_in_the_way_is_named(
    blocked: str, because: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(blocked).parent.mkdir(parents=True, exist_ok=True)
    Path(blocked).write_text("x")
    assert run(["obs", "export", "kit", "--force"]) == 2
    assert because in capsys.readouterr().err
    assert [name for name in found(".") if name != blocked] == []


@pytest.mark.parametrize(
    "url",
    ["7078", "localhost:7078", "tcp://127.0.0.1:7077", "http://", "http://h:x", "http://h:0", "http://h:99999",
     "http://user:secret@h:1", "http://h:1?x=1", ""],
)  # fmt: skip
def test_what_is_no_address_is_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--coordinator-http", "--prometheus"):
        assert run(["obs", "export", "kit", flag, url]) == 2
        assert flag in capsys.readouterr().err
    assert found(".") == []


def test_prometheus_asks_every_coordinator(here: Path) -> None:
    urls = ["http://a:7078/", "https://b.example/zml", "http://[::1]:9"]
    flags = [part for url in urls for part in ("--coordinator-http", url)]
    assert run(["obs", "export", "kit", *flags]) == 0
    (scrape,) = load("kit/prometheus.yml")["scrape_configs"]
    assert [each["url"] for each in scrape["http_sd_configs"]] == [
        "http://a:7078/api/sd",
        "https://b.example/zml/api/sd",
        "http://[::1]:9/api/sd",
    ]
    assert scrape["job_name"] == "zml" and scrape["honor_labels"] is True and "authorization" not in scrape


def test_without_an_address_the_run_that_goes_on_here_is_asked(here: Path) -> None:
    folder = here / "runs" / "2026-03-01T12-30-00-train-1a2b"
    folder.mkdir(parents=True)
    here_it_is = rundir.Listening(["tcp://127.0.0.1:1"], os.getpid(), "job", "http://127.0.0.1:45123")
    (folder / rundir.COORDINATOR).write_text(json.dumps({
        "addresses": here_it_is.addresses, "pid": here_it_is.pid, "job": here_it_is.job, "http": here_it_is.http,
    }))  # fmt: skip
    assert run(["obs", "export", "kit"]) == 0
    (scrape,) = load("kit/prometheus.yml")["scrape_configs"]
    assert scrape["http_sd_configs"][0]["url"] == "http://127.0.0.1:45123/api/sd"


def test_the_token_is_shown_to_the_coordinator_and_to_the_members(here: Path) -> None:
    Path("token").write_text("0123456789abcdef0123456789abcdef\n")
    Path("token").chmod(0o600)
    assert run(["obs", "export", "kit", "--token-file", "token"]) == 0
    (scrape,) = load("kit/prometheus.yml")["scrape_configs"]
    shown = {"type": "Bearer", "credentials_file": str(here / "token")}
    assert scrape["authorization"] == shown
    assert [each["authorization"] for each in scrape["http_sd_configs"]] == [shown]
    assert all(b"0123456789abcdef" not in text for text in contents("kit").values())


@pytest.mark.parametrize(
    ("text", "mode", "because"),
    [
        ("ann 0123456789abcdef0123456789abcdef\n", 0o600, "more than one token"),
        ("0123456789abcdef\n0123456789abcdeg\n", 0o600, "more than one token"),
        ("0123456789abcdef\n", 0o644, "others than its owner"),
        ("", 0o600, "no token"),
        (None, 0, "cannot be read"),
    ],
)
def test_a_file_that_prometheus_could_not_send_is_refused(
    text: str | None, mode: int, because: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        Path("token").write_text(text)
        Path("token").chmod(mode)
    assert run(["obs", "export", "kit", "--token-file", "token"]) == 3
    assert because in capsys.readouterr().err
    assert not Path("kit").exists()


def test_grafana_finds_the_dashboards_and_its_source(here: Path) -> None:
    assert run(["obs", "export", "kit", "--prometheus", "http://prometheus:9090"]) == 0
    (provider,) = load("kit/grafana/provisioning/dashboards/zml.yml")["providers"]
    where = Path(provider["options"]["path"])
    assert sorted(path.name for path in where.iterdir()) == sorted(f"{each.uid}.json" for each in DASHBOARDS)
    for path in where.iterdir():
        assert json.loads(path.read_text())["uid"] == path.stem
    (source,) = load("kit/grafana/provisioning/datasources/zml.yml")["datasources"]
    assert source["type"] == "prometheus" and source["url"] == "http://prometheus:9090"


def test_the_collector_has_a_pipeline_for_each_signal(here: Path) -> None:
    assert run(["obs", "export", "kit"]) == 0
    made = load("kit/otel-collector.yaml")
    used: dict[str, set[str]] = {"receivers": set(), "processors": set(), "exporters": set()}
    for pipeline in made["service"]["pipelines"].values():
        for part, names in used.items():
            names.update(pipeline[part])
    assert {
        part: set(made[part]) for part in used
    } == used  # nothing is used that is not there, or the other way
    assert made["service"]["pipelines"].keys() == {"traces", "metrics", "logs"}
    runs = f"${{env:ZML_RUNS:-{here}/runs}}"
    assert made["receivers"]["filelog"]["include"] == [
        f"{runs}/*/logs/*.jsonl",
        f"{runs}/slurm-*/attempt-*/logs/*.jsonl",
        f"{runs}/jobs/*/*/logs/*.jsonl",
    ]


def test_the_collector_takes_no_path_of_ours_for_a_variable() -> None:
    made = collector.config(["http://h:1"], Path("/a$b/token"), Path("/c${d}/runs"))
    (scrape,) = made["receivers"]["prometheus"]["config"]["scrape_configs"]
    assert scrape["authorization"]["credentials_file"] == "/a$$b/token"
    assert "/c$${d}/runs" in made["receivers"]["filelog"]["include"].value[0]


def test_the_readme_says_how_to_start_each_where_it_is(here: Path) -> None:
    assert run(["obs", "export", "a kit"]) == 0
    text = Path("a kit/README.txt").read_text()
    assert f"prometheus --config.file='{here}/a kit/prometheus.yml'" in text
    for word in ("grafana server", "otelcol-contrib", *(name for name in KIT if name.startswith("fluent"))):
        assert word in text
    prose = [line for line in text.splitlines() if not line.startswith(" ")]
    assert max(map(len, prose)) <= 90


def test_files_are_for_everybody_to_read(here: Path) -> None:
    """Prometheus and Grafana run as users of their own."""
    before = os.umask(0o022)
    try:
        assert run(["obs", "export", "kit"]) == 0
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in Path("kit").rglob("*") if path.is_file()}
    assert modes == {0o644}
    assert {stat.S_IMODE(path.stat().st_mode) for path in Path("kit").rglob("*") if path.is_dir()} == {0o755}


@pytest.mark.prometheus
@pytest.mark.parametrize("folder", ["kit", "a kit: with 'quotes' # and more"])
def test_promtool_takes_the_configuration_and_the_rules(folder: str) -> None:
    Path("token").write_text("0123456789abcdef0123456789abcdef\n")
    Path("token").chmod(0o600)
    assert run(["obs", "export", folder, "--token-file", "token"]) == 0
    assert promtool("check", "config", f"{folder}/prometheus.yml") == ""
    assert promtool("check", "rules", f"{folder}/rules/zml.yml") == ""


def test_the_kit_says_which_token_to_scrape_with() -> None:
    kit = export.Kit(folder=Path("/k"), coordinators=["http://h:1"])
    assert (
        "a line `prometheus TOKEN` in the file of tokens, without `admin`" in export.files(kit)["README.txt"]
    )
