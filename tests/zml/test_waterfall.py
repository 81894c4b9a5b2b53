"""`zml timeline`: many steps of a worker, and one step of all."""

import json
from pathlib import Path

import msgspec
import pytest

from zml.commands import cli
from zml.runs.timeline import Step, read
from zml.text.waterfall import lanes, recorded, table, waterfall
from zml.worker.timeline import Timeline

# Seconds; bytes. Half a second of computing, and a wait until one second is over.
USUAL = Step(
    7, 1.0, compute=0.5, encode=0.1, wait=0.3, apply=0.1, send=0.1, pull=0.2, bytes_up=1000, bytes_down=2000
)


def step(clock: int = 7, began: float = 100.0, **changes: float) -> Step:
    return msgspec.structs.replace(USUAL, clock=clock, began=began, **changes)


def drawn(steps: dict[str, Step], width: int = 80) -> list[str]:
    return [line.plain for line in waterfall(7, steps, (), width)]


def test_workers_stand_on_one_axis_with_their_exchange_below() -> None:
    late = step(began=100.5, compute=0.7, wait=0.1)
    assert drawn({"w0": step(), "w1": late}, 49)[:7] == [
        "step 7 of 2 workers",
        "the longest without waiting: w1, 900.0 ms",
        "                  |0          800.0 ms     1.60 s",
        "  w0       1.00 s |ccccccccceewwwwwwaa",
        "                  |           >><<<<",
        "  w1       1.00 s |         ccccccccccccccewwaa",
        "                  |                        >><<<<",
    ]


def test_files_without_the_time_and_workers_far_apart_begin_together_and_say_why() -> None:
    alone, because = lanes({"w0": step(began=0.0), "w1": step(began=0.0)})
    assert [lane.start for lane in alone] == [0.0, 0.0] and "do not say when" in because
    apart, because = lanes({"w0": step(), "w1": step(began=130.0)})
    assert [lane.start for lane in apart] == [0.0, 0.0] and "up to 30.00 s apart" in because
    near, because = lanes({"w0": step(), "w1": step(began=104.0)})
    assert [lane.start for lane in near] == [0.0, 4.0] and because == ""


def test_means_and_last_steps_fit_into_eighty_columns() -> None:
    lines = [line.plain for line in table("w0", [step(clock) for clock in range(1, 21)], 2, 80)]
    assert lines == [
        "w0: 20 steps of 1000.0 ms on average",
        "  data 0.0 ms (0%)  compute 500.0 ms (50%)  encode 100.0 ms (10%)",
        "    wait 300.0 ms (30%)  apply 100.0 ms (10%)",
        "  beside it: send 100.0 ms  pull 200.0 ms  up 1.0 kB  down 2.0 kB",
        "       19   1000.0 ms |" + "c" * 29 + "e" * 5 + "w" * 17 + "a" * 6,
        "       20   1000.0 ms |" + "c" * 29 + "e" * 5 + "w" * 17 + "a" * 6,
    ]
    assert [line.plain for line in table("w0", [], 2, 80)] == ["w0: no steps yet"]


def test_which_steps_are_recorded_is_said_in_ranges() -> None:
    assert recorded([3, 1, 2, 2, 5]) == "1 to 3, 5"
    assert recorded([*range(1, 40, 2)]) == "1, 3, 5, 7, 9 and others up to 39"
    assert recorded([]) == ""


def test_what_a_worker_measures_says_when_its_steps_began(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "w0.jsonl")
    for clock in range(4):
        timeline.open()
        timeline.close(clock)
    timeline.write()
    steps = read(tmp_path / "w0.jsonl")
    assert [step.clock for step in steps] == [1, 2]  # the first has no beginning, the last is not complete
    assert steps[1].began - steps[0].began == pytest.approx(steps[1].at - steps[0].at, abs=0.05)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "timeline"
    folder.mkdir()
    for worker, began in (("w0", 100.0), ("w1", 100.2), ("w10", 100.1)):
        steps = [step(clock, began + clock) for clock in range(1, 4 if worker == "w10" else 9)]
        (folder / f"{worker}.jsonl").write_bytes(
            b"".join(msgspec.json.encode(each) + b"\n" for each in steps)
        )
    return tmp_path


def test_the_command_shows_one_step_of_all_workers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["timeline", str(run), "--step", "7"]) == 0
    said = capsys.readouterr().out
    assert "step 7 of 2 workers" in said and "not recorded of w10" in said
    assert all(len(line) <= 80 for line in said.splitlines()) and "\x1b" not in said and "\r" not in said

    assert cli.run(["timeline", str(run), "--step", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 2 and list(found["workers"]) == ["w0", "w1", "w10"]
    assert found["workers"]["w1"] == msgspec.to_builtins(step(2, 102.2))


def test_the_command_says_what_there_is_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["timeline", str(run), "--step", "70"]) == 2
    assert capsys.readouterr().err == (
        "error: step 70 is not recorded of any worker [ZML-E101]\n  Recorded are 1 to 8.\n"
    )
    (run / "none").mkdir()
    (run / "none" / "config.json").write_text("{}")
    assert cli.run(["timeline", str(run / "none")]) == 2
    assert "no steps are recorded in" in capsys.readouterr().err
    assert cli.run(["timeline", str(run / "nowhere")]) == 2
    assert "there is no run" in capsys.readouterr().err


def test_every_recorded_step_is_there_for_machines(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["timeline", str(run), "--worker", "w10", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "worker": "w10",
        "steps": [msgspec.to_builtins(step(clock, 100.1 + clock)) for clock in range(1, 4)],
    }
