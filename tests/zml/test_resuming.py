"""What `zml resume` goes on from: where a run stood, or a checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from zml.config import resolve
from zml.errors import ZmlError
from zml.runs import resume, rundir
from zml.runs.rundir import Listening, boot_id


@pytest.fixture(scope="module")
def gone() -> int:
    """The number of a process that has been."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def cut_off(folder: Path, pid: int, *, shards: int = 2, boot: str = "", **settings: Any) -> Path:
    """A run directory as `kill -9` of everything leaves it."""
    given = {"workers": 2, "shards": shards, "run_dir": str(folder), **settings}
    rundir.create(resolve(given, {}), "train.py", ["--lr", "0.1"], cpu=True)
    for name in ("coordinator", *(f"p{shard}" for shard in range(shards))):
        (folder / rundir.STATE / name).mkdir(parents=True)
    here = Listening(["tcp://127.0.0.1:7077"], pid, "job", boot=boot or boot_id())
    rundir.write(folder / rundir.COORDINATOR, msgspec.json.encode(here))
    return folder


def test_a_run_that_was_cut_off_goes_on_as_it_was_asked_for(tmp_path: Path, gone: int) -> None:
    run = cut_off(tmp_path / "run", gone, compress="bf16", staleness="async")
    found = resume.again(run, {"http": "off"}, {}, print)
    assert found.cut_off == run
    settings = found.resolved.settings
    assert (settings.run_dir, settings.workers, settings.shards) == (str(run), 2, 2)
    assert (settings.compress, settings.staleness, settings.http) == ("bf16", None, "off")
    assert (found.script, found.args, found.cpu) == ("train.py", ["--lr", "0.1"], True)
    assert found.words == "run where it was cut off, from its journal and push logs"


@pytest.mark.parametrize(
    "given", [{"workers": 2}, {"shards": 3}, {"compress": "none"}, {"staleness": "async"}]
)
def test_who_asks_for_another_job_gets_a_new_run_from_a_checkpoint(
    tmp_path: Path, gone: int, given: dict[str, Any]
) -> None:
    run = cut_off(tmp_path / "run", gone)
    assert resume.why_not_there(run, given) == f"{next(iter(given))} is asked for anew"
    with pytest.raises(ZmlError, match="has no checkpoint") as caught:
        resume.again(run, given, {}, print)
    assert caught.value.fix == f"Nor can it go on where it stood: {next(iter(given))} is asked for anew."


def test_only_what_is_whole_is_gone_on_with(tmp_path: Path, gone: int) -> None:
    over = cut_off(tmp_path / "over", gone)
    (over / rundir.STATUS).write_text("{}")
    assert resume.why_not_there(over, {}) == "it came to its end"
    logless = cut_off(tmp_path / "logless", gone)
    (logless / rundir.STATE / "p1").rmdir()
    assert "push log" in resume.why_not_there(logless, {})
    grown = cut_off(tmp_path / "grown", gone)
    (grown / rundir.STATE / "p2").mkdir()
    assert "more than were asked for" in resume.why_not_there(grown, {})
    rebooted = cut_off(tmp_path / "rebooted", gone, boot="another")
    assert "started anew" in resume.why_not_there(rebooted, {})
    fresh = tmp_path / "fresh"
    rundir.create(resolve({"run_dir": str(fresh)}, {}), "train.py", [])
    assert resume.why_not_there(fresh, {}) == "its coordinator has left nothing"
    before = cut_off(tmp_path / "before", gone)  # by a version that did not tell of the machine's start
    file = before / rundir.COORDINATOR
    told = json.loads(file.read_text())
    del told["boot"]
    file.write_text(json.dumps(told))
    assert "started anew" in resume.why_not_there(before, {})


def test_a_run_whose_coordinator_lives_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resume, "GOING_S", 0.1)
    run = cut_off(tmp_path / "run", os.getpid())
    with pytest.raises(ZmlError, match=f"goes on: its coordinator is process {os.getpid()}"):
        resume.again(run, {}, {}, print)
