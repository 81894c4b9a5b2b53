"""Public workloads, where somebody has them: `pytest tests/zml/simulate --pollux adaptdl/simulator`."""

from pathlib import Path

import pytest

from zml.scheduler.cluster.policies import POLICIES, RANKS
from zml.simulate import engine, measured, report, workloads


@pytest.fixture
def simulator(request: pytest.FixtureRequest) -> Path:
    """The artifact's folder of that name."""
    folder = request.config.getoption("--pollux")
    if folder is None:
        pytest.skip("needs --pollux FOLDER, of Pollux' artifact (README, Which policy)")
    return Path(folder)


@pytest.mark.timeout(600)
def test_policies_come_in_the_order_that_is_published(simulator: Path) -> None:
    """Goodput before attained service before first come, first served; every job ends."""
    library = measured.Library(simulator / "traces")
    asked = workloads.read(simulator / "workloads" / "workload-1.csv")
    means = {}
    for policy in ("zml", "las", "fifo"):
        jobs = workloads.jobs(asked, library, adapts=policy == "zml")
        rules = engine.Rules()
        simulation = engine.Simulation(jobs, POLICIES[policy], 16, rules, rank=RANKS[policy])
        simulation.run()
        outcome = report.sum_up(simulation, "workload-1", policy, 0, 16)
        assert outcome.unfinished == 0
        means[policy] = outcome.mean_s
    assert means["zml"] < 0.9 * means["las"] and means["las"] < 0.9 * means["fifo"], means


def test_a_hundred_jobs_of_a_real_cluster_are_played_to_their_end(simulator: Path) -> None:
    asked = workloads.read(simulator / "traces" / "philly.csv", 100)
    jobs = workloads.jobs(asked, None, adapts=False)
    rules = engine.Rules(round_s=600.0)  # one of them runs for two months
    engine.Simulation(jobs, POLICIES["las"], 300, rules, rank=RANKS["las"]).run()
    assert all(job.ended is not None for job in jobs)
