"""A job in an allocation of a real Slurm, on four virtual nodes: it trains, is told to go, loses a node, and goes
on."""

import pytest

from tests.slurm.conftest import ENOUGH, SMALL, Desk

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(240)]


def test_a_job_that_is_told_to_go_takes_a_checkpoint_and_goes_on_from_it(desk: Desk) -> None:
    job = desk.submit("-N", "2", "-w", "2", *SMALL, "train.py", "--epochs", "10", "--pause", "0.05")
    desk.until_said("epoch 3 done", job)
    desk.cluster.command(
        "scancel", "--signal=TERM", job
    )  # as a preemption: to all steps, not to the batch script
    desk.until_said("resuming attempt-0", job)
    desk.until_state("COMPLETED", job)

    assert desk.cluster.about(job)["Restarts"] == "1"
    first, second = desk.status(job, 0), desk.status(job, 1)
    assert (first["exit_code"], second["exit_code"]) == (75, 0)
    assert second["state"] == "SUCCEEDED"
    assert desk.log(job).count("epoch 1 done") == 1  # what was done is not done again
    assert desk.zml("data", "audit", str(desk.run(job) / "attempt-1")).returncode == 0
    assert (desk.run(job) / "keys").stat().st_mode & 0o777 == 0o700
    assert desk.model_error() < ENOUGH


@pytest.mark.soak
def test_a_job_goes_on_without_a_node_that_dies(desk: Desk) -> None:
    job = desk.submit("-N", "4", "-w", "2", *SMALL, "train.py", "--epochs", "20", "--pause", "0.05")
    desk.until_said("epoch 1 done", job)
    desk.cluster.kill_node("n2")  # where the shard is: n3 and n4 have the workers
    desk.until_said("starting it again on n1", job)
    desk.until_state("COMPLETED", job)

    assert desk.cluster.about(job)["Restarts"] == "0"
    assert desk.status(job)["state"] == "SUCCEEDED"
    assert desk.zml("data", "audit", str(desk.run(job) / "now")).returncode == 0
    assert desk.model_error() < ENOUGH
