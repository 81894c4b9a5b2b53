"""What dies, what raises, what cannot start: each says so, ends with its exit code, and leaves nothing behind."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.harness import Playground, same_model
from tests.soaking import soak_cases

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(180)]


def steps_of(place: Playground, *workers: str) -> int:
    return sum(int(place.script_lines(worker).rpartition("steps ")[2].split()[0]) for worker in workers)


@pytest.mark.soak
def test_the_others_finish_when_a_script_is_killed(place: Playground) -> None:
    args = ["--epochs", "2", "--trouble", "kill", "--at", "4", "--on", "w1"]
    code, text = place.run("run", "-w", "3", "-p", "2", "--worker-restarts", "0", "train.py", *args)
    assert code == 0, text
    assert "2 of 3 workers finished" in text and "w1 was lost" in text and "SIGKILL" in text
    # Two batches at most are computed again: what w1 had taken and not yet reported.
    assert steps_of(place, "w0", "w2") >= 2 * 24 - 4
    assert not place.pids("zml")


@pytest.mark.soak
def test_a_script_ends_when_it_ends_whatever_it_has_started_and_printed(place: Playground) -> None:
    (place.folder / "odd.py").write_text(
        "import subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)  # zml straggler'])\n"
        "print(len(sys.argv), 'x' * 9000)\n"  # more than fits into a message's header
        "sys.exit(3)\n"
    )
    code, text = place.run("run", "-w", "1", "-p", "1", "odd.py", *[f"file{k:06}" for k in range(600)])
    assert code == 3, text
    assert "w0 ended with exit code 3" in text and "601 xxx" in text
    assert not place.pids("zml")


@pytest.mark.soak
def test_the_others_finish_when_a_whole_worker_is_killed(place: Playground) -> None:
    args = ["-w", "3", "-p", "1", "--staleness", "2", "train.py", "--epochs", "4", "--pause", "0.03"]
    run = place.start("run", *args, ZML_WORKER_RESTARTS="0")
    place.until(lambda: "epoch 0 done" in place.script_lines("w1"), "training goes on")
    (agent,) = place.pids("worker", "--name w1")
    (script,) = [pid for pid in place.pids("zml.agent.runner") if parent(pid) == agent]
    os.kill(agent, signal.SIGKILL)
    place.until(lambda: not Path(f"/proc/{script}").exists(), "the script of a dead agent dies with it", 10)
    assert run.wait() == 0, run.text
    assert "w1 was lost: its process ended by SIGKILL" in run.text
    assert "2 of 3 workers finished" in run.text


@pytest.mark.soak
@pytest.mark.soak
def test_a_late_worker_joins_a_job_that_goes_on_and_contributes(place: Playground) -> None:
    run = place.start("run", "-w", "2", "-p", "1", "train.py", "--epochs", "40", "--pause", "0.02")
    place.until(lambda: "epoch 1 done" in place.script_lines("w0"), "training goes on")
    here = json.loads((place.run_dir() / "coordinator.json").read_text())
    (address,) = [a for a in here["addresses"] if a.startswith("tcp:")]
    late = place.start("worker", "--cpu", "--coordinator", address)
    place.until(lambda: "done" in late.text, "the late worker trains")
    assert run.wait() == 0, run.text
    assert late.wait() == 0, late.text
    assert "all 3 workers finished" in run.text
    assert "epoch 0 done" not in late.text, "it begins in the epoch in which the job is"
    assert "epoch 39 done" in late.text


@pytest.mark.soak
def test_a_lost_shard_that_does_not_come_back_and_has_no_log_ends_the_job_and_says_so(
    place: Playground,
) -> None:
    (place.folder / "zml.toml").write_text('shard_restarts = 0\nreturn_s = 3\npush_log = "off"\n')
    run = place.start("run", "-w", "2", "-p", "2", "train.py", "--epochs", "500", "--pause", "0.03")
    place.until(lambda: "epoch 0 done" in place.script_lines("w0"), "training goes on")
    (shard,) = place.pids("ps", "--shard 1")
    os.kill(shard, signal.SIGKILL)
    assert run.wait() == 4, run.text
    said = " ".join(run.text.split())
    assert "p1 was lost" in said and "p0 cannot read the log of p1" in said, run.text
    assert not place.pids("zml")


@pytest.mark.soak
def test_a_lost_shard_that_does_not_come_back_is_taken_over_by_another_that_sees_its_log(
    place: Playground,
) -> None:
    (place.folder / "zml.toml").write_text("shard_restarts = 0\nreturn_s = 3\n")
    args = ["-w", "2", "-p", "2", "train.py", "--epochs", "16", "--samples", "64", "--pause", "0.03"]
    run = place.start("run", *args)
    place.until(lambda: "epoch 0 done" in place.script_lines("w0"), "training goes on")
    (shard,) = place.pids("ps", "--shard 1")
    os.kill(shard, signal.SIGKILL)
    assert run.wait() == 0, run.text
    calm = place.start("run", *args, "--save", "calm.safetensors")
    assert calm.wait() == 0, calm.text
    assert same_model(place.folder / "model.safetensors", place.folder / "calm.safetensors")


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (
            ["--trouble", "raise", "--at", "-1"],
            1,
            ["ValueError", "the data of this batch are odd", "train.py, line"],
        ),
        (
            ["--trouble", "raise", "--at", "3", "--on", "w1"],
            1,
            ["w1 failed at step", "w0 stopped because of w1"],
        ),
        *soak_cases(
            [
                (["--trouble", "exit", "--at", "2", "--on", "w0"], 7, ["w0 failed", "exit code 7"]),
                (["--trouble", "nan", "--at", "3"], 1, ["ZML-E502", "is not finite", "opt.step()"]),
                (["--no-such-flag"], 2, ["exit code 2"]),
            ]
        ),
    ],
    ids=["at import", "on one worker", "sys.exit", "nan", "bad argument"],
)
def test_a_script_that_fails_is_told_of_in_one_box(
    place: Playground, args: list[str], code: int, said: list[str]
) -> None:
    ended, text = place.run("run", "-w", "2", "-p", "1", "train.py", *args)
    assert ended == code, text
    for words in said:
        assert words in " ".join(text.split()), (words, text)
    assert text.count("╭") == 1, "one box, not one per worker"
    assert "/zml/" not in text, "frames of the launcher are hidden"
    assert not place.pids("zml")


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["run", "-w", "0", "train.py"], 2, "workers"),
        (["run", "--sync", "--async", "train.py"], 2, "exclude each other"),
        (["run", "nowhere.py"], 2, "ZML-E103"),
        (["run", "--no-such-flag", "train.py"], 2, "--no-such-flag"),
        (["worker", "--gpu", "97"], 2, "ZML-E104"),
        (["coordinator", "--bind", "tcp://0.0.0.0:0", "train.py"], 3, "ZML-E203"),
        (
            ["ps", "--shard", "0", "--coordinator", "tcp://127.0.0.1:1", "--config", "quick.toml"],
            4,
            "ZML-E202",
        ),
        (["run", "--config", "odd.toml", "train.py"], 3, "lease_s"),
    ],
    ids=[
        "no workers",
        "two modes",
        "no script",
        "no flag",
        "no gpu",
        "open bind",
        "no coordinator",
        "odd key",
    ],
)
def test_a_mistake_is_one_error_with_its_exit_code(
    place: Playground, command: list[str], code: int, said: str
) -> None:
    (place.folder / "odd.toml").write_text("leases_s = 2.0\n")
    (place.folder / "quick.toml").write_text("join_timeout_s = 1.0\n")
    ended, text = place.run(*command)
    assert ended == code, text
    assert said in text
    assert "Traceback" not in text
    assert not place.pids("zml")


def test_a_port_in_use_is_told_with_the_fix(place: Playground) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        code, text = place.run("coordinator", "--bind", address, "train.py")
    assert code == 4
    assert "ZML-E201" in text and address in text and "port 0" in text


@pytest.mark.soak
def test_three_roles_started_by_hand_train_like_the_launcher(place: Playground) -> None:
    coordinator = place.start("coordinator", "-w", "2", "-p", "2", "--bind", "tcp://127.0.0.1:0", "train.py")
    file = place.until(lambda: list(place.folder.glob("runs/*/coordinator.json")), "the coordinator listens")[
        0
    ]
    (address,) = json.loads(file.read_text())["addresses"]
    members = [place.start("ps", "--shard", str(k), "--coordinator", address) for k in range(2)]
    members += [place.start("worker", "--cpu", "--name", f"w{k}", "--coordinator", address) for k in range(2)]
    assert [member.wait() for member in members] == [0, 0, 0, 0], [member.text for member in members]
    assert coordinator.wait() == 0, coordinator.text
    by_hand = place.folder / "by_hand.safetensors"
    (place.folder / "model.safetensors").rename(by_hand)
    code, text = place.run("run", "-w", "2", "-p", "2", "train.py")
    assert code == 0, text
    assert same_model(by_hand, place.folder / "model.safetensors")


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_full_disk_under_a_shard_is_told_and_waited_out(place: Playground) -> None:
    small = place.folder / "runs" / "r" / "state" / "p0"
    small.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root to mount a small tmpfs")
    try:
        args = ["--epochs", "3", "--samples", "1920"]
        run = place.start(
            *("run", "-w", "2", "--run-dir", "runs/r", "train.py", *args), ZML_PATIENCE_S="2", ZML_LEASE_S="5"
        )
        because = f"p0 has no room for its push log in {small}"
        place.until(lambda: because in run.text, "it is told")
        time.sleep(6)  # three times their patience
        assert place.live("r")["waiting_for"] == [f"waiting for room: {because}/log"]
        assert "waiting for room" in place.run("status", "r")[1]
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        assert run.wait() == 0, run.text
        assert steps_of(place, "w0", "w1") == 3 * 240
    finally:
        place.clean_up()
        subprocess.run(["umount", small], check=True)
