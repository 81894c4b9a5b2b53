"""What else happens to a job of Slurm in its life. Each takes half a minute or more: they are for a soak."""

import json
import os
import sys

import pytest

from tests.slurm.conftest import ENOUGH, SMALL, Desk
from tests.slurm.test_provider import PATIENT, keeps_the_contract
from zml.slurm.provider import SlurmProvider
from zml.slurm.shape import Needs

pytestmark = [pytest.mark.slurm, pytest.mark.soak, pytest.mark.timeout(400)]
LONG = ("train.py", "--epochs", "16", "--pause", "0.05")


def is_trained(desk: Desk, job: str, attempt: int) -> None:
    assert desk.status(job, attempt)["state"] == "SUCCEEDED"
    assert desk.zml("data", "audit", str(desk.run(job) / f"attempt-{attempt}")).returncode == 0
    assert desk.model_error() < ENOUGH


def test_a_script_that_fails_ends_the_job_with_its_exit_code_and_no_requeue(desk: Desk) -> None:
    job = desk.submit("-N", "1", "-w", "1", *SMALL, "train.py", "--fail")
    desk.until_state("FAILED", job)
    about = desk.cluster.about(job)
    assert (about["ExitCode"], about["Restarts"]) == ("1:0", "0")
    assert "ValueError" in desk.log(job) and "as asked" in desk.log(job)


def test_a_job_that_slurm_requeues_goes_on(desk: Desk) -> None:
    job = desk.submit("-N", "2", "-w", "2", *SMALL, "--checkpoint-steps", "10", *LONG)
    desk.until_said("epoch 4 done", job)
    desk.cluster.command("scontrol", "requeue", job)
    desk.until_said("resuming attempt-0", job)
    desk.until_state("COMPLETED", job)
    assert desk.log(job).count("epoch 0 done") == 1
    is_trained(desk, job, 1)


def test_a_preempted_job_makes_room_and_comes_back(desk: Desk) -> None:
    job = desk.submit("-N", "2", "-w", "2", *SMALL, *LONG)
    desk.until_said("epoch 2 done", job)
    urgent = desk.cluster.command(
        "sbatch",
        "--parsable",
        "-p",
        "urgent",
        "-N4",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "sleep 1",
    )
    desk.until_state("COMPLETED", urgent, 60)
    desk.until_said("resuming attempt-0", job)
    desk.until_state("COMPLETED", job)
    assert desk.status(job, 0)["exit_code"] == 75
    is_trained(desk, job, 1)


def test_before_the_time_limit_a_job_takes_its_checkpoint_and_comes_back(desk: Desk) -> None:
    # Slurm looks at time limits about once a minute, and warns up to a minute early.
    small = [*SMALL[:-1], "2"]
    words = ["--sbatch=--signal=B:TERM@60", "-N", "2", "-w", "1", *small, "train.py", "--epochs", "100"]
    job = desk.submit(*words, "--pause", "0.05")
    desk.until_said("SIGTERM: draining", job, seconds=150)
    desk.until_said("resuming attempt-0", job)
    assert desk.status(job, 0)["exit_code"] == 75
    desk.cluster.command("scancel", job)


def test_without_requeue_a_job_that_is_told_to_go_ends_with_75(desk: Desk) -> None:
    job = desk.submit("--no-requeue", "-N", "2", "-w", "1", *SMALL, *LONG)
    desk.until_said("epoch 1 done", job)
    desk.cluster.command("scancel", "--signal=TERM", "--batch", job)
    desk.until_state("FAILED", job)
    assert desk.cluster.about(job)["ExitCode"] == "75:0"
    assert list((desk.run(job) / "attempt-0/checkpoints").glob("step-*/MANIFEST.json"))


def test_where_scontrol_is_missing_a_job_says_so_and_ends_with_75(desk: Desk) -> None:
    few = desk.folder / "bin"
    few.mkdir()
    for name in ("srun", "squeue"):
        (few / name).symlink_to(f"/usr/bin/{name}")
    job = desk.submit(
        "--setup", f"export PATH={few}", "-N", "2", "-w", "1", *SMALL, "--interface", "lo", *LONG
    )
    desk.until_said("epoch 1 done", job)
    desk.cluster.command("scancel", "--signal=TERM", "--batch", job)
    desk.until_state("FAILED", job)
    assert desk.cluster.about(job)["ExitCode"] == "75:0"
    assert "there is no command scontrol" in desk.log(job)


def test_scancel_leaves_no_process_and_no_half_written_file(desk: Desk) -> None:
    job = desk.submit("-N", "3", "-w", "2", *SMALL, "--checkpoint-steps", "5", *LONG)
    desk.until_said("epoch 1 done", job)
    desk.cluster.command("scancel", job)
    desk.until_state("CANCELLED", job)
    desk.cluster.until(lambda: not desk.cluster.tasks(), "no process is left", 15.0)
    for checkpoint in (desk.run(job) / "attempt-0/checkpoints").glob("step-*"):
        assert desk.zml("ckpt", "verify", str(checkpoint)).returncode == 0


def test_when_the_first_node_dies_the_job_starts_again_elsewhere(desk: Desk) -> None:
    words = ["-N", "2", "-w", "2", *SMALL, "--checkpoint-steps", "10", "--config", "zml.toml"]
    (desk.folder / "zml.toml").write_text("coordinator_away_s = 5.0\n")
    job = desk.submit(*words, *LONG)
    desk.until_said("epoch 4 done", job)
    desk.cluster.kill_node("n1")
    desk.until_said("resuming attempt-0", job, seconds=120)
    desk.until_state("COMPLETED", job)
    assert desk.cluster.about(job)["Restarts"] == "1"
    is_trained(desk, job, 1)


def test_a_step_that_is_killed_is_started_again_and_one_that_is_told_to_go_is_not(desk: Desk) -> None:
    words = ["-N", "3", "-w", "2", "-p", "2", *SMALL, "train.py", "--epochs", "40", "--pause", "0.05"]
    job = desk.submit(*words)
    desk.until_said("epoch 1 done", job)
    steps = desk.cluster.steps(job)
    assert set(steps) == {"coordinator", "p0", "p1", "w0", "w1", "batch"}
    desk.cluster.command("scancel", steps["w1"])  # SIGKILL, without a word before
    desk.until_said("w1 ended", job)
    desk.cluster.command("scancel", steps["p1"])
    desk.until_said("p1 ended", job)
    desk.cluster.command("scancel", steps["coordinator"])
    desk.until_said("coordinator ended", job)
    desk.until(lambda: set(desk.cluster.steps(job)) == set(steps), "all steps are there again", job)
    said = desk.log(job).count("epoch")
    desk.until_said("epoch", job, said + 4)
    # Slurm 22.05 passes the signal on, and says all the same that there is no such job.
    desk.cluster.command("scancel", "--signal=TERM", desk.cluster.steps(job)["w0"], check=False)
    desk.until(lambda: {"p0"} <= set(desk.cluster.steps(job)) <= set(steps) - {"w0"}, "w0 has left", job)
    desk.cluster.command("scancel", "--signal=TERM", steps["p0"], check=False)
    left = set(steps) - {"w0", "p0"}
    desk.until(lambda: {"p1"} <= set(desk.cluster.steps(job)) <= left, "p0 has handed over", job)
    desk.until_state("COMPLETED", job, 200)
    assert "w0 ended" not in desk.log(job) and "p0 ended" not in desk.log(job)
    is_trained(desk, job, 0)


def test_every_task_of_an_array_is_a_job_of_its_own(desk: Desk) -> None:
    small = [*SMALL, "--cpus-per-shard", "1", "--array", "0-7%2"]
    job = desk.submit("-N", "1", "-w", "1", *small, "train.py", "--epochs", "4")
    desk.until(lambda: job not in " ".join(desk.cluster.jobs()), "all tasks have ended", job, 300)
    for task in map(str, range(8)):
        assert "finished" in desk.log(job, task)
        assert desk.model_error(task) < ENOUGH
        assert (desk.folder / "runs" / f"slurm-{job}_{task}" / "attempt-0/status.json").exists()


def test_a_requeued_task_of_an_array_goes_on_alone(desk: Desk) -> None:
    words = ["-N", "1", "-w", "1", *SMALL, "--array", "4", *LONG]
    job = desk.submit(*words)
    desk.until(lambda: "epoch 2 done" in desk.log(job, "4"), "it trains", job)
    desk.cluster.command("scancel", "--signal=TERM", f"{job}_4")
    desk.until(lambda: "resuming attempt-0" in desk.log(job, "4"), "it goes on", job)
    desk.until(lambda: desk.status(f"{job}_4", 1), "it ends", job)
    assert desk.status(f"{job}_4", 1)["state"] == "SUCCEEDED"


def test_an_allocation_of_its_own_brings_further_workers(desk: Desk) -> None:
    job = desk.submit("-N", "2", "-w", "1", *SMALL, "train.py", "--epochs", "90", "--pause", "0.05")
    desk.until_said("epoch 1 done", job)
    more = desk.submit("--join", f"runs/slurm-{job}", "-N", "1", "-w", "2", *SMALL)
    desk.until_said("w1 joined", job)
    desk.until_said("w2 joined", job)
    desk.until_said("3 workers", job)
    folder = f"runs/slurm-{job}"
    status = desk.zml("status", "--json", "--keys", f"{folder}/keys", f"{folder}/now")
    assert {each["member"] for each in json.loads(status.stdout)["members"]} == {"p0", "w0", "w1", "w2"}
    # A script that is still starting would just end.
    desk.until(
        lambda: all("epoch" in desk.script_lines(job, each) for each in ("w1", "w2")), "they train", job
    )
    desk.cluster.command(
        "scancel", "--signal=TERM", "--batch", more
    )  # and they are requeued: the job goes on
    desk.until_said("w1 left", job)
    desk.cluster.command("scancel", more)
    desk.until_state("COMPLETED", job, 180)
    is_trained(desk, job, 0)


def test_each_worker_has_the_gpu_that_slurm_gave_it(desk: Desk) -> None:
    tool = desk.folder / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho '0, Test, 100'\necho '1, Test, 100'\n")
    tool.chmod(0o755)
    words = ["--setup", f"export PATH={tool.parent}:$PATH", "-N", "1", "-w", "2", "--gpus-per-worker", "1"]
    job = desk.submit(*words, *SMALL, "--keep-output", "all", "train.py", "--epochs", "2")
    desk.until_state("COMPLETED", job)
    assert {f"gpu {number} on n1" in desk.log(job) for number in (0, 1)} == {True}


def test_what_sbatch_refuses_is_said(desk: Desk) -> None:
    done = desk.zml("slurm", "submit", "--partition", "nowhere", "train.py", check=False)
    assert done.returncode == 4
    assert "ZML-E231" in done.stderr and "invalid partition" in done.stderr


def test_allocations_by_the_piece_keep_the_contract(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", desk.cluster.environment["SLURM_CONF"])
    monkeypatch.chdir(desk.folder)
    command = [sys.executable, "-c", PATIENT]
    one = SlurmProvider(f"pool{os.getpid()}", command, Needs(cpus=1, memory_mb=200))
    keeps_the_contract(one)
