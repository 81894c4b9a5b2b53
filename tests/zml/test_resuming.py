"""What `zml resume` goes on from: where a run stood, or a checkpoint."""

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from zml.config import resolve
from zml.errors import HELD, ZmlError
from zml.hold import hold
from zml.runs import resume, rundir
from zml.runs.rundir import Listening, boot_id


def cut_off(folder: Path, *, shards: int = 2, boot: str = "", **settings: Any) -> Path:
    """A run directory as `kill -9` of everything leaves it."""
    given = {"workers": 2, "shards": shards, "run_dir": str(folder), **settings}
    rundir.create(resolve(given, {}), "train.py", ["--lr", "0.1"], cpu=True)
    for name in ("launcher", "coordinator", *(f"p{shard}" for shard in range(shards))):
        (folder / rundir.STATE / name).mkdir(parents=True)
    here = Listening(["tcp://127.0.0.1:7077"], 4711, "job", boot=boot or boot_id())
    rundir.write(folder / rundir.COORDINATOR, msgspec.json.encode(here))
    return folder


def test_a_run_that_was_cut_off_goes_on_as_it_was_asked_for(tmp_path: Path) -> None:
    run = cut_off(tmp_path / "run", compress="bf16", staleness="async")
    found = resume.again(run, {"http": "off"}, {}, print)
    assert found.cut_off == run
    settings = found.resolved.settings
    assert (settings.run_dir, settings.workers, settings.shards) == (str(run), 2, 2)
    assert (settings.compress, settings.staleness, settings.http) == ("bf16", None, "off")
    assert (found.script, found.args, found.cpu) == ("train.py", ["--lr", "0.1"], True)
    assert found.words == "run where it was cut off, from its journal and push logs"


def test_a_relative_name_is_the_same_run_wherever_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = cut_off(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    found = resume.again(Path("run"), {}, {}, print)
    assert (found.cut_off, found.resolved.settings.run_dir) == (run, str(run))


@pytest.mark.parametrize(
    "given",
    [
        {"workers": 2},
        {"shards": 3},
        {"compress": "none"},
        {"staleness": "async"},
        {"run_dir": "new"},
        {"job": "other"},
    ],
)
def test_who_asks_for_another_job_gets_a_new_run_from_a_checkpoint(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    run = cut_off(tmp_path / "run")
    assert resume.why_not_there(run, given) == f"{next(iter(given))} is asked for anew"
    with pytest.raises(ZmlError, match="has no checkpoint") as caught:
        resume.again(run, given, {}, print)
    assert caught.value.fix == f"Nor can it go on where it stood: {next(iter(given))} is asked for anew."


def test_only_what_is_whole_is_gone_on_with(tmp_path: Path) -> None:
    over = cut_off(tmp_path / "over")
    (over / rundir.STATUS).write_text("{}")
    assert resume.why_not_there(over, {}) == "it came to its end"
    logless = cut_off(tmp_path / "logless")
    (logless / rundir.STATE / "p1").rmdir()
    assert "push log" in resume.why_not_there(logless, {})
    grown = cut_off(tmp_path / "grown")
    (grown / rundir.STATE / "p2").mkdir()
    assert "more than were asked for" in resume.why_not_there(grown, {})
    rebooted = cut_off(tmp_path / "rebooted", boot="another")
    assert "started anew" in resume.why_not_there(rebooted, {})
    fresh = tmp_path / "fresh"
    rundir.create(resolve({"run_dir": str(fresh)}, {}), "train.py", [])
    assert resume.why_not_there(fresh, {}) == "its coordinator has left nothing"
    by_hand = cut_off(tmp_path / "by_hand")
    (by_hand / rundir.LAUNCHER_STATE).rmdir()
    assert "not `zml run`" in resume.why_not_there(by_hand, {})
    before = cut_off(tmp_path / "before")  # by a version that did not tell of the machine's start
    file = before / rundir.COORDINATOR
    told = json.loads(file.read_text())
    del told["boot"]
    file.write_text(json.dumps(told))
    assert "started anew" in resume.why_not_there(before, {})


@pytest.mark.parametrize("event", ["Drain", "Stop", "Finish"])
def test_a_job_that_was_being_stopped_does_not_begin_to_end_again(tmp_path: Path, event: str) -> None:
    run = cut_off(tmp_path / "run")
    (run / rundir.EVENTS).write_text(json.dumps({"at": 1.0, "event": event, "job": "job"}) + "\n")
    assert "being stopped" in resume.why_not_there(run, {})
    assert resume.advice(run, saved=False) == ""
    assert resume.advice(run, saved=True) == "`zml resume run` goes on from the newest checkpoint."


def test_what_a_person_can_do_is_said(tmp_path: Path) -> None:
    assert resume.advice(cut_off(tmp_path / "run"), saved=True) == "`zml resume run` goes on where it stood."


@pytest.mark.parametrize("part", ["launcher", "coordinator", "p1"])
def test_a_run_of_which_something_lives_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(resume, "GOING_S", 0.1)
    run = cut_off(tmp_path / "run")
    lock = hold(run / rundir.STATE / part, HELD, "", "")
    with pytest.raises(ZmlError, match=f"goes on: its {part} is process {os.getpid()}"):
        resume.again(run, {}, {}, print)
    os.close(lock)
    assert resume.again(run, {}, {}, print).cut_off == run
