"""The main job with real processes: what comes out is what plain Python gives, and comes out again."""

import json
import re
import signal
from pathlib import Path

import pytest

from tests.e2e.harness import Playground, same_model
from tests.soaking import soak
from zml.runs import rundir
from zml.runs.timeline import read

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


@pytest.mark.parametrize(
    "args",
    [
        *soak([["--optimizer", "SGD", "--schedule", "step"]]),
        *soak([["--optimizer", "SGD", "--schedule", "cosine", "--clip", "0.5"]]),
        ["--optimizer", "AdamW", "--schedule", "cosine", "--clip", "0.5"],
        *soak([["--optimizer", "SGD", "--accumulate", "3"]]),
        *soak([["--optimizer", "AdamW", "--odd", "--loaders", "1"]]),
    ],
    ids=["sgd", "sgd clipped", "adamw clipped", "gradients of three passes", "parameters without gradients"],
)
def test_one_synchronous_worker_gives_the_bits_of_plain_python(place: Playground, args: list[str]) -> None:
    place.plain(*args, "--save", "plain.safetensors")
    code, text = place.run("run", "-w", "1", "-p", "1", "--sync", "train.py", *args)
    assert code == 0, text
    assert same_model(place.folder / "plain.safetensors", place.folder / "model.safetensors")


@pytest.mark.soak
def test_two_synchronous_runs_of_three_workers_give_the_same_bits(place: Playground) -> None:
    for name in ("one", "two"):
        code, text = place.run(
            "run", "-w", "3", "-p", "2", "train.py", "--save", f"{name}.safetensors", "--epochs", "1"
        )
        assert code == 0, text
    assert same_model(place.folder / "one.safetensors", place.folder / "two.safetensors")


@pytest.mark.parametrize(
    "mode",
    [
        *soak([["--staleness", "2"], ["--async"]]),
        *soak([["--compress", "bf16"], ["--compress", "topk:5%"]]),
        ["--compress", "topk:5%:2bit", "--staleness", "1", "--local-steps", "5"],
        *soak([["--compress", "topk:5%", "--async", "--optimizer-on", "shard"]]),
        *soak([["--compress", "auto", "--async"], ["--compress", "auto"]]),
    ],
    ids=" ".join,
)
def test_every_mode_trains_every_batch_once(place: Playground, mode: list[str]) -> None:
    code, text = place.run("run", "-w", "2", "-p", "2", *mode, "train.py", "--epochs", "2")
    assert code == 0, text
    steps = [int(place.script_lines(f"w{rank}").rpartition("steps ")[2].split()[0]) for rank in range(2)]
    assert sum(steps) == 2 * 24
    assert place.status()["samples"] == 2 * 192


@pytest.mark.soak
@pytest.mark.parametrize(
    "mode",
    [["--sync"], ["--staleness", "3"], ["--async"], ["--async", "--local-steps", "5"]],
    ids=" ".join,
)
def test_with_topk_all_workers_end_with_the_saved_model(place: Playground, mode: list[str]) -> None:
    warm_up = "20" if "--local-steps" in mode else "4"  # four exchanges
    code, text = place.run(
        *("run", "-w", "3", "-p", "2", "--compress", "topk:2%", "--warm-up-steps", warm_up, *mode),
        *("train.py", "--epochs", "2", "--keep", "own"),
    )
    assert code == 0, text
    for rank in range(3):
        assert same_model(place.folder / "model.safetensors", place.folder / f"own-w{rank}.safetensors")
    pushed = [step.bytes_up for step in read(place.run_dir() / "timeline" / "w1.jsonl")]
    assert pushed[0] > pushed[-2], "the density falls"


@pytest.mark.soak
def test_two_sparse_synchronous_runs_give_the_same_bits_and_little_traffic(place: Playground) -> None:
    for name in ("one", "two"):
        code, text = place.run(
            *("run", "-w", "3", "-p", "2", "--compress", "topk:2%", "train.py"),
            *("--save", f"{name}.safetensors", "--epochs", "1"),
        )
        assert code == 0, text
    assert same_model(place.folder / "one.safetensors", place.folder / "two.safetensors")
    code, text = place.run("timeline", "--worker", "w1", "--last", "3")
    assert code == 0 and "w1: " in text and "w0: " not in text, text
    assert re.search(r"\|d*c", text), text


def test_ctrl_c_drains_saves_and_leaves_nothing_behind(place: Playground) -> None:
    run = place.start("run", "-w", "2", "-p", "1", "train.py", "--epochs", "500", "--pause", "0.02")
    place.until(lambda: "epoch 1 done" in place.script_lines("w0"), "training goes on")
    run.send(signal.SIGINT)
    assert run.wait() == 130, run.text
    assert (place.run_dir() / "drained.safetensors").exists()
    assert (place.folder / "model.safetensors").exists(), "the script came to its own end"
    assert "draining" in run.text
    said = run.text.splitlines()
    assert "train.py was stopped by Ctrl-C after" in run.text and ": at step " in run.text, run.text
    assert "SIGINT at zml run: all 2 workers stopped in order" in said
    assert f"to go on from it: zml resume {place.run_dir().name[20:]}" in said
    ended = rundir.last_status(place.run_dir())
    assert ended is not None and ended.exit_code == 130, "as the shell was told"
    assert ended.because == "SIGINT at zml run: all 2 workers stopped in order"
    assert not place.pids("zml")


def test_a_run_whose_scripts_never_join_ends_well_and_is_warned_of(place: Playground) -> None:
    (place.folder / "alone.py").write_text("print('hello')\n")
    code, text = place.run("run", "-w", "2", "alone.py")
    assert code == 0, text
    assert "no script called zml.join [ZML-E507]" in text and "all 2 workers did the same" in text
    code, text = place.run("status", place.run_dir().name)
    assert code == 0 and "no script called zml.join [ZML-E507]" in text


def test_a_second_ctrl_c_stops_at_once(place: Playground) -> None:
    run = place.start("run", "-w", "1", "-p", "1", "train.py", "--epochs", "500", "--pause", "5")
    place.until(lambda: "brings the first parameters" in run.text, "the script has begun")
    run.send(signal.SIGINT)
    place.until(lambda: "draining" in run.text, "the drain begins")
    run.send(signal.SIGINT)
    assert run.wait(30) == 130, run.text
    assert not place.pids("zml")


def test_nothing_is_left_when_the_launcher_itself_is_killed(place: Playground) -> None:
    run = place.start("run", "-w", "2", "-p", "1", "train.py", "--epochs", "500", "--pause", "0.05")
    place.until(lambda: len(place.pids("zml.agent.runner")) == 2, "both scripts run")
    run.send(signal.SIGKILL)
    run.wait()
    place.until(lambda: not place.pids("zml"), "every process is gone")


def test_off_a_terminal_there_are_plain_lines_and_the_run_directory_tells_how_it_went(
    place: Playground,
) -> None:
    code, text = place.run("run", "-w", "2", "-p", "1", "train.py")
    assert code == 0, text
    assert "\r" not in text and "\x1b" not in text
    folder: Path = place.run_dir()
    assert {"config.json", "events.jsonl", "status.json", "logs"} <= {path.name for path in folder.iterdir()}
    status = place.status()
    assert status["state"] == "SUCCEEDED" and status["exit_code"] == 0
    assert {member["member"]: member["state"] for member in status["members"]} == {
        "w0": "done",
        "w1": "done",
        "p0": "stopped",
    }
    code, shown = place.run("status", str(folder))
    assert code == 0 and "finished" in shown
    code, text = place.run("logs", "--json", "-n", "all", folder.name[-9:])
    assert code == 0, text
    lines = [json.loads(line) for line in text.splitlines()]
    assert {line["id"] for line in lines} >= {"coordinator", "p0", "w0", "w1"}
    assert {line["run"] for line in lines} == {folder.name}
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    printed = [line for line in lines if "stream" in line]
    assert (
        "".join(f"{line['message']}\n" for line in printed if line["id"] == "w0")
        == (folder / "logs" / "w0.out").read_text()
    )
    assert place.run("events", "-n", "1", folder.name)[1].endswith("succeeded: all 2 workers finished\n")
    code, text = place.run("ckpt", "export", str(folder), "-o", "exported.safetensors")
    assert code == 0, text
    assert same_model(place.folder / "model.safetensors", place.folder / "exported.safetensors")
