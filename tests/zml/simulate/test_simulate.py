"""The simulator: a trace worked out by hand, conservation, determinism, files that are wrong, the command."""

import builtins
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zml.commands.cli import main, run
from zml.commands.simulate import NAMES
from zml.errors import BAD_TRACE, NO_MATPLOTLIB, ZmlError
from zml.scheduler.cluster.autoscale import Bounds
from zml.scheduler.cluster.order import RankOf
from zml.scheduler.cluster.policies import DEFAULT, POLICIES, RANKS
from zml.simulate import engine, measured, plot, report, workloads
from zml.simulate.work import Countdown

HEAD = "timestamp,duration,num_gpus\n"


def timed(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "timed.csv"
    path.write_text(HEAD + "".join(f"2017-10-09 00:{line}\n" for line in lines))
    return path


def model(folder: Path, epochs: int = 3) -> Path:
    """A model whose step takes (batch / 10 + sync) s; sync is 0 alone, 1 s on several workers, 2 s on several nodes.
    Its gradients are noise alone: a batch twice as large is worth twice as much."""
    made = folder / "traces" / "toy"
    made.mkdir(parents=True)
    lines = ["placement,local_bsz,step_time,sync_time"]
    for placement in ("1", "2", "4", "11", "12", "22", "44"):
        sync = 0 if placement == "1" else 1 if len(placement) == 1 else 2
        lines += [f"{placement},{batch},{batch / 10 + sync},{sync}" for batch in (10, 40)]
    (made / "placements.csv").write_text("\n".join(lines) + "\n")
    for batch in (10, 80):
        rows = [f"{100 * (e + 1)},{100 * (e + 1)},0.5,0.0,1.0" for e in range(epochs)]
        (made / f"validation-{batch}.csv").write_text(
            "progress,iteration,metric,grad_sqr,grad_var\n" + "\n".join(rows) + "\n"
        )
    return made.parent


def workload(folder: Path, *lines: str) -> Path:
    path = folder / "workloads" / "w.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_text("name,time,application,num_replicas,batch_size\n" + "\n".join(lines) + "\n")
    return path


def simulate(path: Path, policy: str, nodes: int, profiles: Path | None = None) -> engine.Simulation:
    library = measured.Library(profiles) if profiles else None
    jobs = workloads.jobs(workloads.read(path), library, adapts=policy == "zml")
    simulation = engine.Simulation(jobs, POLICIES[policy], nodes, engine.Rules())
    simulation.run()
    return simulation


def test_a_trace_worked_out_by_hand(tmp_path: Path) -> None:
    """One node of 4 GPUs. At 60 s the first takes 3 GPUs, stands still for 30 s and works 100 s, until 190. The second
    needs 2 and waits for the round at 240 s. The third takes what is left, from the round after it came at 61 s."""
    path = timed(tmp_path, "00:00,100,3", "00:30,60,2", "01:01,15,1")
    simulation = simulate(path, "fifo", 1)
    ends = {job.request.job: (job.began, job.ended) for job in simulation.jobs}
    assert ends == {"job-0": (60, 190), "job-1": (240, 330), "job-2": (120, 165)}
    assert simulation.tally.allocated_s == pytest.approx((3 * 130 + 2 * 90 + 45) / 4)
    outcome = report.sum_up(simulation, "timed", "fifo", 0, 1)
    assert outcome.mean_s == pytest.approx((190 + 300 + 104) / 3) and outcome.median_s == 190
    assert outcome.makespan_s == 330 and outcome.unfinished == 0


def test_a_measured_job_worked_out_by_hand(tmp_path: Path) -> None:
    """Two workers on one node, 40 samples together: 20 each, 3 s a step; a step is worth 40 / 10 of progress, so that
    300 take 75 steps."""
    path = workload(tmp_path, "a,0,toy,2,40")
    simulation = simulate(path, "las", 1, model(tmp_path))
    (job,) = simulation.jobs
    assert job.work.alone_s() == pytest.approx(225)
    assert job.ended == pytest.approx(60 + 30 + 225)


def test_a_job_that_adapts_grows_and_learns_of_itself(tmp_path: Path) -> None:
    path = workload(tmp_path, "a,0,toy,2,40")
    profiles = model(tmp_path, epochs=30)
    simulation = simulate(path, "zml", 2, profiles)
    (job,) = simulation.jobs
    assert job.ended is not None and job.changes >= 1
    assert job.attained_s > job.ended - 60  # it had more than one worker
    profile = job.work.profile
    assert profile is not None and profile.model.grad.b == pytest.approx(0.1, rel=0.05)


def test_noise_has_a_seed(tmp_path: Path) -> None:
    path, library = workload(tmp_path, "a,0,toy,2,40", "b,70,toy,2,40"), measured.Library(model(tmp_path, 30))

    def ends(seed: int, noise: float) -> list[float | None]:
        jobs = workloads.jobs(workloads.read(path), library, True, seed=seed, noise=noise)
        engine.Simulation(jobs, POLICIES["zml"], 2, engine.Rules()).run()
        return [job.ended for job in jobs]

    assert ends(1, 0.5) == ends(1, 0.5)
    assert ends(1, 0.0) == ends(2, 0.0)


arrivals = st.lists(
    st.tuples(st.integers(0, 2_000), st.integers(1, 5_000), st.integers(1, 8)), min_size=1, max_size=12
)


@settings(max_examples=30, deadline=None)
@given(asked=arrivals, policy=st.sampled_from(sorted(POLICIES)))
def test_the_work_that_was_asked_for_is_done_and_no_more(
    asked: list[tuple[int, int, int]], policy: str
) -> None:
    entries = [
        workloads.Asked(f"j{i}", float(at), gpus, duration_s=float(lasts))
        for i, (at, lasts, gpus) in enumerate(asked)
    ]
    jobs = workloads.jobs(entries, None, adapts=False)
    simulation = engine.Simulation(jobs, POLICIES[policy], 2, engine.Rules())
    tally = simulation.run()
    for entry, job in zip(entries, jobs, strict=True):
        assert isinstance(job.work, Countdown) and job.work.did_s == pytest.approx(entry.duration_s)
        stood = job.attained_s / entry.workers - entry.duration_s
        assert 0 <= stood <= 30 * (job.changes + 1) + 1e-6
        assert job.ended is not None and job.began is not None
        assert job.began >= entry.submitted and job.ended >= job.began + entry.duration_s
    assert tally.allocated_s == pytest.approx(sum(job.attained_s for job in jobs) / 4)
    assert tally.allocated_s <= tally.provisioned_s + 1e-6


longer = st.lists(
    st.tuples(st.integers(0, 200_000), st.integers(1, 150_000), st.integers(1, 8)), min_size=1, max_size=12
)


@settings(max_examples=15, deadline=None)
@given(asked=longer, policy=st.sampled_from(sorted(POLICIES)), comes_and_goes=st.booleans())
def test_a_round_that_is_not_planned_would_have_changed_nothing(
    asked: list[tuple[int, int, int]], policy: str, comes_and_goes: bool
) -> None:
    def played(rank: RankOf | None) -> tuple[list[object], int]:
        entries = [
            workloads.Asked(f"j{i}", float(at), gpus, duration_s=float(lasts))
            for i, (at, lasts, gpus) in enumerate(asked)
        ]
        jobs = workloads.jobs(entries, None, adapts=False)
        fleet = engine.Autoscaler(Bounds(least=1, most=2), gpus_per_node=4) if comes_and_goes else None
        rules = engine.Rules(round_s=300.0)
        simulation = engine.Simulation(jobs, POLICIES[policy], 2, rules, fleet, rank)
        tally = simulation.run()
        told: list[object] = [
            (job.request.job, job.began, job.ended, job.attained_s, job.changes, job.since) for job in jobs
        ]
        return [*told, tally.provisioned_s, tally.allocated_s, tally.nodes], len(tally.rounds_s)

    all_of_them, planned = played(None)
    the_same, fewer = played(RANKS[policy])
    assert the_same == all_of_them
    assert fewer <= planned


def test_a_job_that_runs_for_days_alone_is_planned_once(tmp_path: Path) -> None:
    jobs = workloads.jobs(workloads.read(timed(tmp_path, "00:00,864000,3")), None, adapts=False)
    simulation = engine.Simulation(jobs, POLICIES["las"], 1, engine.Rules(), rank=RANKS["las"])
    assert len(simulation.run().rounds_s) <= 3
    assert jobs[0].ended == 60 + 30 + 864_000


def test_nodes_come_and_go_with_the_jobs(tmp_path: Path) -> None:
    path = timed(tmp_path, *[f"0{i}:00,900,4" for i in range(6)])
    jobs = workloads.jobs(workloads.read(path), None, adapts=False)
    bounds = Bounds(least=1, most=5, idle_s=120)
    simulation = engine.Simulation(
        jobs, POLICIES["zml"], 1, engine.Rules(), engine.Autoscaler(bounds, gpus_per_node=4)
    )
    tally = simulation.run()
    assert max(count for _, count, _ in tally.nodes) == 5
    assert tally.nodes[-1][1] < 5
    assert all(job.ended is not None for job in jobs)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "is no workload"),
        (HEAD, "has no jobs"),
        (HEAD + "never,1,1\n", "is no time"),
        (HEAD + "2017-10-09 00:00:00,x,1\n", "is no number"),
        (HEAD + "2017-10-09 00:00:00,1,0\n", "no whole number of 1 or more"),
        (HEAD + "2017-10-09 00:00:00,1\n", "too few columns"),
        ("name,time,application,num_replicas,batch_size\na,0,toy,1,10\na,0,toy,1,10\n", "two jobs called a"),
    ],
)
def test_a_file_that_is_no_workload_is_told_so(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "w.csv"
    path.write_text(text)
    with pytest.raises(ZmlError, match=said) as caught:
        workloads.read(path)
    assert caught.value.code == BAD_TRACE and str(path) in caught.value.what


def test_the_command_compares_policies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = workload(tmp_path, "a,0,toy,2,40", "b,70,toy,4,80")
    model(tmp_path)
    file = tmp_path / "out.json"
    assert (
        run(
            [
                "simulate",
                str(path.parent),
                "--policy",
                "las",
                "--policy",
                "zml",
                "--nodes",
                "1",
                "--json",
                str(file),
            ]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [["las", "w", "1"], ["zml", "w", "1"]]
    runs = json.loads(file.read_text())["runs"]
    assert [(r["policy"], r["unfinished"], len(r["jobs"])) for r in runs] == [("las", 0, 2), ("zml", 0, 2)]


def test_a_job_that_is_too_big_ends_the_run_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = timed(tmp_path, "00:00,100,9", "00:00,100,1")
    asked = ["simulate", str(path), "--policy", "las", "--nodes", "1"]
    assert run(asked) == 0
    told = "1 job of timed never ended under las: it asks for more than there is.\n"
    assert capsys.readouterr().err == told
    timed(tmp_path, "00:00,100,9", "00:00,100,1", "00:00,100,7")
    assert run(asked) == 0
    assert "2 jobs of timed never ended under las: they ask for" in capsys.readouterr().err


def test_nodes_are_paid_for_until_the_last_job_has_ended(tmp_path: Path) -> None:
    """Whatever else still waits for what never comes; and also while nobody is there between two jobs."""
    never = simulate(timed(tmp_path, "00:00,100,1", "01:00,500,9", "01:01,60,4"), "las", 2)
    assert [job.ended for job in never.jobs] == [190, None, 210]
    assert never.tally.provisioned_s == pytest.approx(2 * 210)
    assert never.tally.allocated_s == pytest.approx((130 * 1 + 90 * 4) / 4)
    gap = simulate(timed(tmp_path, "00:00,100,1", "59:59,60,4"), "las", 2)
    assert [job.ended for job in gap.jobs] == [190, 3_690]
    assert gap.tally.provisioned_s == pytest.approx(2 * 3_690)
    alone = simulate(timed(tmp_path, "00:00,100,9"), "las", 2)
    assert (alone.tally.provisioned_s, alone.tally.allocated_s) == (0, 0)


@pytest.mark.parametrize(
    "argv", [["nowhere.csv"], ["w.csv", "--autoscale", "1"], ["w.csv", "--seeds", "x"], ["w.csv"]]
)
def test_wrong_use_is_one_line(
    tmp_path: Path, argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.csv").write_text("name,time,application,num_replicas,batch_size\na,0,toy,1,10\n")
    assert run(["simulate", *argv]) in (2, 5)
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("flag", "file", "said", "fix"),
    [
        ("--json", "nowhere/x.json", "there is no folder nowhere", "Name a file that can be written."),
        ("--json", ".", "it is a folder", "Name a file that can be written."),
        ("--json", "", "it is a folder", "Name a file that can be written."),
        ("--json", "w.csv/x", "there is no folder w.csv", "Name a file that can be written."),
        ("--plot", "nowhere/x.png", "there is no folder nowhere", "Name a file that can be written."),
        ("--plot", "x.foo", ".foo is no kind of picture", "Name a .png, .svg or .pdf file."),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, flag: str, file: str, said: str, fix: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zml.commands.simulate.run_all", lambda *given: pytest.fail("it has begun"))
    (tmp_path / "w.csv").write_text(HEAD + "2017-10-09 00:00:00,1,1\n")
    assert run(["simulate", "w.csv", flag, file]) == 2
    assert capsys.readouterr() == ("", f"error: {flag} {file}: {said} [ZML-E101]\n  {fix}\n")
    assert [each.name for each in tmp_path.iterdir()] == ["w.csv"]


def test_what_may_not_be_written_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.json").touch()
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    for file, said in (("old.json", "it may not be written"), ("new.json", ". may not be written to")):
        assert run(["simulate", "w.csv", "--json", file]) == 2
        assert capsys.readouterr().err.startswith(f"error: --json {file}: {said} [ZML-E101]\n")


def test_the_files_that_are_named_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("w.csv").write_text(HEAD + "2017-10-09 00:00:00,1,1\n")
    Path("there.json").write_text("older, and longer than what comes" * 1_000)
    for more in (["--json", "there.json"], ["--json", "new.json", "--plot", "new.SVG"], ["--plot", "bare"]):
        assert run(["simulate", "w.csv", "--nodes", "1", *more]) == 0
    for file in ("there.json", "new.json"):
        (told,) = json.loads(Path(file).read_text())["runs"]
        assert told["makespan_s"] == 91
    assert b"<svg" in Path("new.SVG").read_bytes() and Path("bare.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ZmlError) as caught:
        plot.headless_pyplot()
    assert caught.value.code == NO_MATPLOTLIB


def test_the_policies_that_flags_name_are_those_that_there_are() -> None:
    assert sorted(NAMES) == sorted(POLICIES) == sorted(RANKS)
    (flag,) = [each for each in main.commands["coordinator"].params if each.name == "policy"]
    said = getattr(flag, "help", "").rpartition(": ")[2]
    assert sorted(re.findall(r"\w+", said.replace("(default)", "").replace(" or ", " "))) == sorted(POLICIES)
    assert f"{DEFAULT} (default)" in said
