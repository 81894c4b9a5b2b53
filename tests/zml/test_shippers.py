"""The configurations for Fluentd and Fluent Bit fit what zml writes, as far as that can be told without them."""

import json
import re
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

import pytest

from zml.cluster.attempts import Attempts
from zml.config import Settings, resolve
from zml.logs import outlets as logs
from zml.logs.printed import Piece, Printed
from zml.obs import collector
from zml.runs import rundir
from zml.slurm.folder import JobFolder

ALWAYS = ["time", "level", "message", "run", "job", "role", "id", "host", "pid"]


def conf(name: str) -> str:
    return (resources.files("zml") / "obs" / name).read_text()


def block(text: str, opening: str, closing: str, holding: str) -> dict[str, str]:
    """Keys and values of the block in which a text stands."""
    (found,) = [
        each for each in re.findall(rf"^\s*{opening}$(.*?){closing}", text, re.M | re.S) if holding in each
    ]
    lines = [
        line.split(None, 1) for line in found.splitlines() if line.strip() and line.strip()[0] not in "<#["
    ]
    return {key.lower(): value.strip() for key, value in lines}


@pytest.fixture
def line(tmp_path: Path) -> dict[str, object]:
    """As it lies in the file of a script's output."""
    folder = tmp_path / "runs" / "r" / "logs"
    printed = Printed(folder / "w3.out", logs.about("script", "w3", "job", logs.run_of(folder)))
    printed.write("stderr", [Piece("loss 2.5 \x1b[31mübrig\x1b[0m".encode())], step=7)
    (text,) = (folder / "w3.out.jsonl").read_text().splitlines()
    found: dict[str, object] = json.loads(text)
    return found


def test_a_line_has_the_keys_that_the_files_name(line: dict[str, object]) -> None:
    assert list(line) == [*ALWAYS, "step", "stream"]
    assert {key: line[key] for key in ("level", "message", "run", "job", "role", "id", "step", "stream")} == {
        "level": "info",
        "message": "loss 2.5 übrig",
        "run": "r",
        "job": "job",
        "role": "script",
        "id": "w3",
        "step": 7,
        "stream": "stderr",
    }
    for name in ("fluentd.conf", "fluent-bit.conf"):
        said = conf(name).split("\n\n")[0]
        assert all(
            re.search(rf"\b{key}\b", said) for key in [*ALWAYS, "step", "stream", "trace_id", "span_id"]
        )


def test_fluentd_reads_the_time(line: dict[str, object]) -> None:
    source = block(conf("fluentd.conf"), "<parse>", "</parse>", "time_type string")
    assert source["@type"] == "json"
    assert source["time_format"] == "%Y-%m-%dT%H:%M:%S.%N%z"
    form = source["time_format"].replace("%N", "%f")  # Ruby's name of the fraction
    then = datetime.strptime(str(line[source["time_key"]]), form)
    assert abs((datetime.now(UTC) - then).total_seconds()) < 60
    assert re.search(r"\.\d{6}Z$", str(line["time"]))


def test_fluent_bit_reads_the_time(line: dict[str, object]) -> None:
    parser = block(conf("parsers.conf"), r"\[PARSER\]", r"(?=\[PARSER\]|\Z)", "Time_Key    time")
    assert (parser["format"], parser["time_key"]) == ("json", "time")
    then = datetime.strptime(str(line["time"]), parser["time_format"].replace("%L", "%f"))
    assert abs((datetime.now(UTC) - then).total_seconds()) < 60
    bit = conf("fluent-bit.conf")
    assert set(re.findall(r"Parser +(\S+)", bit)) == set(re.findall(r"Name +(\S+)", conf("parsers.conf")))
    assert "Parsers_File      parsers.conf" in bit


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder with a run directory of each kind, each made by whoever makes it, and their names in it."""
    runs = tmp_path / "runs"
    alone = rundir.create(resolve({"runs": str(runs)}, {}, "/dev/null"), "train.py", [])
    slurm = JobFolder.of(runs, {"SLURM_JOB_ID": "7"})
    attempt = slurm.next_attempt()
    attempt.mkdir(parents=True)
    slurm.point_at(attempt)
    of_many = Attempts(runs, Settings(), pytest.fail, lambda event: None).run_dir("j7", 2)
    for run in (alone, attempt, of_many):
        (run / rundir.LOGS).mkdir(parents=True, exist_ok=True)
        (run / rundir.EVENTS).touch()
        for name in ("p0.jsonl", "w3.out", "w3.out.jsonl", "w3.out.jsonl.1"):
            (run / rundir.LOGS / name).touch()
    return runs, [str(run.relative_to(runs)) for run in (alone, attempt, of_many)]


def patterns(name: str) -> list[list[str]]:
    """Of logs and of events, with the folder of all runs as ${ZML_RUNS}."""
    if name == "otel-collector.yaml":
        include = collector.config([], None, Path("/data/runs"))["receivers"]["filelog"]["include"].value
        return [[each.replace("${env:ZML_RUNS:-/data/runs}", "${ZML_RUNS}") for each in include]]
    text = conf(name).replace("#{ENV['ZML_RUNS'] || '/data/runs'}", "${ZML_RUNS}")
    return [found.strip('"').split(",") for found in re.findall(r"^ +path +(\S+)$", text, re.I | re.M)]


@pytest.mark.parametrize("name", ["fluentd.conf", "fluent-bit.conf", "otel-collector.yaml"])
def test_the_patterns_find_the_files_of_all_runs_and_none_twice(
    name: str, made: tuple[Path, list[str]]
) -> None:
    runs, all_runs = made
    found = [
        sorted(
            str(path.relative_to(runs))
            for pattern in each
            for path in runs.glob(pattern.removeprefix("${ZML_RUNS}/"))
        )
        for each in patterns(name)
    ]
    logs_of_all = sorted(f"{run}/logs/{file}" for run in all_runs for file in ("p0.jsonl", "w3.out.jsonl"))
    events_of_all = sorted(f"{run}/events.jsonl" for run in all_runs)
    assert found == [logs_of_all, events_of_all][: len(found)]
    assert len(found) == (1 if name == "otel-collector.yaml" else 2)


def test_a_line_fits_the_buffers(tmp_path: Path) -> None:
    sizes = {"k": 2**10, "M": 2**20}
    buffers = [
        int(number) * sizes[unit]
        for number, unit in re.findall(r"Buffer_Max_Size +(\d+)([kM])", conf("fluent-bit.conf"))
    ]
    line = logs.encode({"message": "ü\x00" * 200_000, "more": ["x" * 9000] * 900})
    assert len(line) <= logs.LINE_BYTES < min(buffers)
    json.loads(line)
