"""Who asks for traces and lacks what they take is told at once; who does not ask loads nothing of it."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from zml import tracing
from zml.agent.seat import Seat
from zml.commands.cli import run
from zml.config import resolve
from zml.errors import BOOK, LOST, NO_TRACES, ZmlError
from zml.runs import resume
from zml.runs.rundir import CHECKPOINTS, CONFIG
from zml.tracing import process
from zml.tracing.span import Span, parse
from zml.tracing.steps import UNTRACED
from zml.tracing.trees import Recoveries, Tree, part


def test_while_tracing_is_off_nothing_of_opentelemetry_is_loaded() -> None:
    code = """
import sys
import zml, zml.commands.cli, zml.coordinator.coordinating, zml.cluster.serving, zml.agent.agent, zml.worker.timeline
import zml.tracing.shards
from zml.runs.rundir import CHECKPOINTS, CONFIG
from zml.agent.seat import Seat
from zml.tracing import process
process.begin("off", "worker", "w0", "job")
process.begin_script(Seat(job="job", worker="w0", incarnation=1, coordinator=[]))
process.end()
print([name for name in sys.modules if name.startswith(("opentelemetry", "requests", "google"))])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.fixture
def lacks(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if the extra were not installed."""
    monkeypatch.delitem(sys.modules, "zml.tracing.otlp", raising=False)
    monkeypatch.delattr(tracing, "otlp", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_TRACES_EXPORTER"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "command", [["run", "train.py"], ["coordinator"], ["ps", "--shard", "0"], ["worker", "--cpu"]]
)
def test_a_missing_extra_is_said_at_the_start_with_what_to_do(
    lacks: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: list[str]
) -> None:
    lacks.chdir(tmp_path)
    Path("train.py").write_text("")
    name, *rest = command
    assert run([name, "--trace", "1/100", *rest]) == BOOK[NO_TRACES].exit_code
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: traces need OpenTelemetry: ") and lines[0].endswith("[ZML-E105]")
    assert lines[1] == "  Run pip install 'zml-train[otel]', or go without traces: --trace off."
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"], "nothing has begun"


def test_an_endpoint_in_the_environment_asks_for_it_too(
    lacks: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lacks.chdir(tmp_path)
    lacks.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert run(["worker", "--cpu"]) == BOOK[NO_TRACES].exit_code
    assert "[ZML-E105]" in capsys.readouterr().err
    assert run(["config", "show"]) == 0, "who only looks needs no extra"
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trace ")]
    assert line.split() == ["trace", "1/100", "OTEL_EXPORTER_OTLP_ENDPOINT"]


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "Set it to http/protobuf"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json", "Set it to http/protobuf"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "Set it to otlp"),
    ],
)
def test_what_zml_does_not_speak_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, fix: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ZmlError) as refused:
        process.require("1/100")
    assert refused.value.code == NO_TRACES
    assert f"{name} = {value}" in refused.value.what
    assert refused.value.fix.startswith(fix)
    process.require("off")


def test_the_protocol_of_traces_goes_before_the_one_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    process.require("1/100")


@pytest.mark.parametrize(
    ("asked_by", "expected"), [("flag", "1/7"), ("OTEL_EXPORTER_OTLP_ENDPOINT", "off"), ("default", "off")]
)
def test_a_run_that_goes_on_is_traced_as_it_was_asked_for_and_not_as_its_environment_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked_by: str, expected: str
) -> None:
    resolved = resolve({}, {}).as_json()
    resolved["settings"]["trace"], resolved["origins"]["trace"] = "1/7", asked_by
    about = {**resolved, "script": "train.py", "args": [], "folder": str(tmp_path)}
    (tmp_path / CONFIG).write_text(json.dumps(about))
    checkpoint = SimpleNamespace(
        path=tmp_path / "c", manifest=SimpleNamespace(step=54, epoch=1, because="run ended")
    )
    monkeypatch.setattr(resume, "find", lambda run: SimpleNamespace(root=tmp_path / CHECKPOINTS))
    monkeypatch.setattr(resume, "load_from", lambda place, skip: checkpoint)
    monkeypatch.chdir(tmp_path)
    found = resume.again(tmp_path, {}, {}, print)
    assert found.resolved.settings.trace == expected
    assert found.words == "at step 54, in epoch 2 (checkpoint taken when the run ended)"


def test_a_script_without_tracing_has_no_trace() -> None:
    seat = Seat(job="job", worker="w0", incarnation=1, coordinator=[])
    assert process.begin_script(seat) is UNTRACED


def test_a_span_says_of_an_exception_what_it_is_and_not_what_data_it_names() -> None:
    assert process.why(KeyError("patient 17")) == "KeyError"
    assert process.why(ZmlError(LOST, "p0 is away")) == f"{LOST}: p0 is away"


def test_a_checkpoint_is_a_tree_of_its_own_with_the_shards_part_in_it() -> None:
    found: list[Span] = []
    tracing.into(found.extend)
    try:
        tree = Tree("zml.checkpoint", job="job")
        with tree.within("zml.checkpoint.hold"):
            pass
        with tree.within("zml.checkpoint.write"):
            header = tree.header()
            with pytest.raises(OSError), part(header, "zml.ps.write", shard="p0"):
                raise OSError("the disk is full")
        tree.end(step=7)
    finally:
        tracing.into(None)
    names = {span.context.span_id: span.name for span in found}
    assert [(span.name, names.get(span.parent_id or 0), span.error) for span in found] == [
        ("zml.ps.write", "zml.checkpoint.write", "OSError"),
        ("zml.checkpoint", None, ""),
        ("zml.checkpoint.hold", "zml.checkpoint", ""),
        ("zml.checkpoint.write", "zml.checkpoint", ""),
    ]
    assert found[1].attributes == {"zml.job": "job", "zml.step": 7}
    assert (context := parse(header)) is not None
    assert {span.context.trace_id for span in found} == {context.trace_id}
    assert Tree("zml.checkpoint").header() == "", "off: nothing travels"


def test_a_shard_that_was_away_is_a_recovery_unless_the_job_ended() -> None:
    found: list[Span] = []
    tracing.into(found.extend)
    try:
        recoveries = Recoveries("job")
        recoveries.look({"p0"})
        recoveries.look({"p0", "p1"})
        recoveries.look({"p1"})
        recoveries.look(None)
        recoveries.look(set())
    finally:
        tracing.into(None)
    assert [(span.name, dict(span.attributes)) for span in found] == [
        ("zml.recover", {"zml.job": "job", "zml.shard": "p0"})
    ]
