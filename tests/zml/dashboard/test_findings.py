"""What a person should look at, out of numbers: each trouble is found, and a run that is well is left in peace."""

import dataclasses
from collections.abc import Sequence
from statistics import median

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.zml.dashboard.synthetic import Made, Shape
from zml.dashboard.findings import SHOWN, Errors, Evidence, findings
from zml.dashboard.members import workers
from zml.dashboard.overview import numbers
from zml.dashboard.rates import (
    Lately,
    Trim,
    WorkerTrim,
    lately,
    shares,
    worker_rate,
)
from zml.runs.history import MemberRow, Row
from zml.status import CheckpointStatus, JobStatus, MemberStatus
from zml.stragglers import stragglers, usual_of_others

NOW = 1_700_000_000.0


def trims(rows: Sequence[MemberRow]) -> list[Trim]:
    return [msgspec.json.decode(msgspec.json.encode(row), type=Trim) for row in rows]


def evidence_of(*troubles: str, over: bool = False, workers: int = 8) -> Evidence:
    shape = Shape(troubles=frozenset(troubles), over=over, workers=workers, ended_at=NOW)
    made = Made(shape)
    steps = made.steps_of(100)
    rows = trims([made.member_row(step) for step in steps])
    return Evidence(
        status=made.status(),
        now=NOW,
        lately=lately(rows, None if over else 30.0),
        rows=[made.row(step) for step in steps],
        checkpoint_minutes=10.0,
    )


def told(evidence: Evidence) -> list[tuple[str, str, str, str]]:
    return [(each.kind, each.level, each.member, each.page) for each in findings(evidence)]


BACK = ("restarted", "note", "w1", "workers")  # in every synthetic run


def test_a_run_that_is_well_is_left_in_peace() -> None:
    assert told(evidence_of()) == [BACK]
    assert told(evidence_of(over=True)) == [BACK]


@pytest.mark.parametrize(
    ("trouble", "found"),
    [
        ("straggler", [("straggler", "bad", "w4", "workers")]),
        ("starving", [("starving", "warn", "", "workers")]),
        ("nan", [("not-finite", "bad", "", "overview"), ("not-finite", "warn", "w0", "workers")]),
        ("dead-shard", [("lost", "bad", "p3", "shards")]),
        ("lost-worker", [("lost", "warn", "w7", "workers")]),
        ("uneven", [("imbalance", "warn", "p0", "shards")]),
        ("overdue", [("checkpoint", "warn", "", "checkpoints")]),
    ],
)
def test_each_trouble_is_found_and_leads_to_its_page(
    trouble: str, found: list[tuple[str, str, str, str]]
) -> None:
    assert told(evidence_of(trouble)) == [*found, BACK]


def test_a_straggler_is_told_with_its_cause_and_its_number() -> None:
    found = findings(evidence_of("straggler"))[0]
    assert "w4 is a straggler: its computing is slow" in found.what and "All others wait for it" in found.what
    assert "x the median" in found.number and found.query == {"worker": "w4"}


def test_a_value_that_is_not_finite_is_told_since_when() -> None:
    evidence = evidence_of("nan")
    first = next(row.steps for row in evidence.rows if row.values["loss"] is None)
    assert findings(evidence)[0].number == f"since step {first:,}"


def test_a_value_that_is_finite_again_is_only_a_warning() -> None:
    evidence = evidence_of()
    rows = list(evidence.rows)
    rows[40] = msgspec.structs.replace(rows[40], values={**rows[40].values, "loss": None})
    found = findings(dataclasses.replace(evidence, rows=rows))[0]
    assert (found.level, found.number) == ("warn", f"step {rows[40].steps:,}")


def test_the_first_script_to_fail_is_the_cause() -> None:
    evidence = evidence_of("failed", over=True)
    first = evidence.status.failures[0]
    later = msgspec.structs.replace(
        first, member="w3", failure=msgspec.structs.replace(first.failure, at=first.failure.at + 1)
    )
    status = msgspec.structs.replace(evidence.status, failures=[later, first])
    found = [f for f in findings(dataclasses.replace(evidence, status=status)) if f.kind == "failed"]
    assert [(f.member, "the cause" in f.what) for f in found] == [("w1", True), ("w3", False)]


def test_a_coordinator_that_is_gone_is_bad_and_one_that_is_silent_a_warning() -> None:
    evidence = evidence_of()
    gone = findings(dataclasses.replace(evidence, alive=False, silent_s=40.0))[0]
    quiet = findings(dataclasses.replace(evidence, alive=True, silent_s=40.0))[0]
    assert (gone.kind, gone.level, gone.number) == ("silent", "bad", "silent for 40 s")
    assert (quiet.kind, quiet.level) == ("silent", "warn")
    asked = dataclasses.replace(evidence, silent_s=40.0, silence_expected=True)
    assert told(asked) == [BACK], "it answers: there is only nothing new"


@pytest.mark.parametrize(("every_s", "level"), [(0.0, "warn"), (3.0, "warn"), (8.0, "")])
def test_a_member_is_quiet_once_it_was_to_speak(every_s: float, level: str) -> None:
    evidence = evidence_of()
    members = list(evidence.status.members)
    members[0] = msgspec.structs.replace(members[0], heard_s=12.0, every_s=every_s)
    status = msgspec.structs.replace(evidence.status, members=members)
    found = [f for f in findings(dataclasses.replace(evidence, status=status)) if f.kind == "lost"]
    assert [(f.member, f.level) for f in found] == ([(members[0].member, level)] if level else [])


def test_who_is_waited_for_is_told() -> None:
    status = msgspec.structs.replace(evidence_of().status, waiting_for=["waiting for shard p1 to come back"])
    found = findings(dataclasses.replace(evidence_of(), status=status))[0]
    assert (found.kind, found.what) == ("waiting", "The job is waiting for shard p1 to come back.")


def test_at_the_beginning_nobody_worries_about_who_is_waited_for() -> None:
    waiting = ["waiting for the first script to show its model"]
    status = JobStatus(job="j", state="RUNNING", started_at=NOW, waiting_for=waiting)
    assert [findings(Evidence(status, NOW + wait))[0].level for wait in (10.0, 1000.0)] == ["note", "warn"]


def test_a_run_in_which_no_step_is_made_is_found() -> None:
    evidence = evidence_of()
    found = findings(dataclasses.replace(evidence, now=NOW + 1000.0))[0]
    assert (found.kind, found.level, found.number) == ("standing", "bad", "for 17 min")


def test_errors_in_logs_lead_to_them() -> None:
    evidence = dataclasses.replace(evidence_of(), errors={"p0": Errors(3, "the disk is full\nand more")})
    found = findings(evidence)[0]
    assert (found.number, found.query) == ("3 errors", {"member": "p0", "level": "error"})
    assert found.what.endswith("the disk is full")


def test_a_checkpoint_that_failed_is_bad() -> None:
    status = msgspec.structs.replace(
        evidence_of().status, checkpoint=CheckpointStatus(because="no room", taken=3, failed=1, at=NOW)
    )
    found = findings(dataclasses.replace(evidence_of(), status=status))[0]
    assert (found.level, found.number, found.page) == ("bad", "1 of 4 failed", "checkpoints")


def test_many_of_one_kind_are_counted() -> None:
    members = [MemberStatus(member=f"w{n}", role="worker", state="lost") for n in range(40)]
    found = findings(Evidence(JobStatus(job="j", state="RUNNING", members=members), NOW))
    assert len(found) == SHOWN and found[-1].number == "36 more" and found[-1].what.endswith("and 30 more.")


def test_texts_of_peers_cannot_move_a_cursor() -> None:
    member = MemberStatus(member="w0", role="worker", state="lost", because="\x1b[2J\x00\u202e")
    found = findings(Evidence(JobStatus(job="j", state="RUNNING", members=[member]), NOW))
    assert all(each.what.isprintable() for each in found)


# -- rates -------------------------------------------------------------------------------------------------------


def test_a_worker_that_began_anew_counts_from_then() -> None:
    before = WorkerTrim(steps=100, samples=6400, phases={"compute": 50.0})
    now = WorkerTrim(steps=10, samples=640, phases={"compute": 2.0, "wait": 1.0})
    rate = worker_rate(before, now, 4.0)
    assert rate is not None and (rate.steps, round(rate.step_s, 3), rate.samples_per_s) == (10, 0.3, 160.0)
    assert worker_rate(now, now, 4.0) is None, "it made no step"


def test_lately_is_the_newest_rows_and_the_whole_run_all_of_them() -> None:
    def row(at: float, steps: int, compute: float) -> Trim:
        return Trim(at, {"w0": WorkerTrim(steps, steps, 0, {"compute": compute})})

    rows = [row(100.0, 100, 10.0), row(200.0, 200, 20.0), row(240.0, 220, 40.0)]
    near, whole = lately(rows, 30.0), lately(rows, None)
    assert (near.window_s, near.workers["w0"].step_s) == (40.0, 1.0)
    assert whole.whole and round(whole.workers["w0"].step_s, 4) == round(40 / 220, 4)
    assert lately([], 30.0) == Lately(0.0, False, {}, {})


def test_of_two_workers_the_slow_one_is_the_straggler() -> None:
    def rate(compute: float, wait: float) -> WorkerTrim:
        return WorkerTrim(10, 10, 0, {"compute": compute, "wait": wait})

    rows = [Trim(10.0), Trim(20.0, {"w0": rate(1.0, 3.0), "w1": rate(4.0, 0.0)})]
    found = stragglers(lately(rows, 30.0).phases)
    assert {worker: (slow.ratio, slow.phase) for worker, slow in found.items()} == {"w1": (4.0, "compute")}
    assert shares(list(lately(rows, 30.0).workers.values()))["wait"] == 3 / 8


def test_a_microsecond_makes_no_straggler() -> None:
    rows = [
        Trim(
            20.0, {f"w{n}": WorkerTrim(10, 10, 0, {"compute": 0.001 * (1 + 9 * (n == 1))}) for n in range(3)}
        )
    ]
    assert stragglers(lately(rows, 30.0).phases) == {}


# -- long runs, where rows are minutes apart ----------------------------------------------------------------------


def test_a_status_that_is_ahead_of_the_rows_is_no_standing_run() -> None:
    evidence = dataclasses.replace(evidence_of(), now=NOW + 1000.0)
    status = msgspec.structs.replace(evidence.status, steps=evidence.rows[-1].steps + 1)
    moving = dataclasses.replace(evidence, status=status)
    assert [found.kind for found in findings(moving) if found.kind == "standing"] == []
    seen = dataclasses.replace(moving, stands_since=NOW + 400.0)
    assert [found.number for found in findings(seen) if found.kind == "standing"] == ["for 10 min"]


def test_a_run_stands_since_the_first_row_with_its_steps() -> None:
    evidence = evidence_of()
    last = evidence.rows[-1]
    rows = [*evidence.rows, *(msgspec.structs.replace(last, at=NOW + wait) for wait in (100.0, 200.0))]
    found = findings(dataclasses.replace(evidence, rows=rows, now=NOW + 600.0))[0]
    assert (found.kind, found.number) == ("standing", "for 10 min")


def test_a_run_without_a_first_step_is_told_after_a_while() -> None:
    status = JobStatus(job="j", state="RUNNING", started_at=NOW)
    assert findings(Evidence(status, NOW + 200.0)) == []
    assert [(f.kind, f.level) for f in findings(Evidence(status, NOW + 400.0))] == [("standing", "warn")]


def moving(hung: str, seconds: int, every: int = 2) -> list[Trim]:
    """w0 to w2 make a step in two seconds; one of them none any more from second 10 on."""

    def figures(worker: str, at: int) -> WorkerTrim:
        steps = (min(at, 10) if worker == hung else at) // 2
        return WorkerTrim(steps=steps, phases={"compute": 2.0 * steps}, step_sum_s=2.0 * steps)

    return [
        Trim(NOW + at, {f"w{n}": figures(f"w{n}", at) for n in range(3)}) for at in range(0, seconds, every)
    ]


def running(rows: Sequence[Trim], heard_s: float = 1.0) -> Evidence:
    members = [MemberStatus(member=f"w{n}", role="worker", state="active", heard_s=heard_s) for n in range(3)]
    status = JobStatus(job="j", state="RUNNING", mode="async", members=members, started_at=NOW, steps=1)
    return Evidence(status, rows[-1].at, lately=lately(rows, 30.0), stands_since=rows[-1].at)


def test_a_worker_that_hangs_while_others_go_on_is_told_by_name() -> None:
    found = [f for f in findings(running(moving("w1", 202))) if f.kind == "stuck"]
    assert [(f.level, f.member, f.page, f.number) for f in found] == [
        ("bad", "w1", "workers", "none for 3 min, after step 5")
    ]
    assert "`zml stack w1`" in found[0].what


@pytest.mark.parametrize(
    "evidence",
    [
        running(moving("w1", 40)),  # not for long
        running(moving("nobody", 202)),
        running(moving("w1", 202), heard_s=30.0),  # it is not heard: that is said
    ],
)
def test_no_worker_is_called_stuck_that_is_not(evidence: Evidence) -> None:
    assert [f for f in findings(evidence) if f.kind == "stuck"] == []


def test_a_worker_whose_step_is_longer_than_the_window_has_a_rate() -> None:
    rate = lately(moving("w1", 202), 30.0).workers["w1"]
    assert (rate.step_s, rate.steps) == (2.0, 1)


def test_the_ratio_on_the_page_is_the_one_that_is_told() -> None:
    evidence = evidence_of("straggler", workers=2)
    ratios = stragglers(evidence.lately.phases)
    shown = {line.member: line.ratio for line in workers(evidence.status, evidence.lately, []).workers}
    assert ratios and {name: round(slow.ratio, 2) for name, slow in ratios.items()} == {
        name: round(shown[name] or 0.0, 2) for name in ratios
    }


def test_a_straggler_has_the_tone_on_its_page_that_the_finding_has() -> None:
    evidence = evidence_of("straggler")
    found = findings(evidence)[0]
    tones = {line.member: line.tone for line in workers(evidence.status, evidence.lately, []).workers}
    assert (tones["w4"], set(tones.values())) == (found.level, {found.level, "good"})


@given(st.lists(st.floats(0.0, 10.0), min_size=2, max_size=9))
def test_the_usual_of_others_is_their_median(busy: list[float]) -> None:
    own = {f"w{n}": each for n, each in enumerate(busy)}
    expected = {f"w{n}": median([*busy[:n], *busy[n + 1 :]]) for n in range(len(busy))}
    assert usual_of_others(own) == pytest.approx(expected)


def test_a_value_that_the_status_lacks_is_as_in_the_newest_row() -> None:
    evidence = evidence_of("nan")
    status = msgspec.structs.replace(evidence.status, values={})
    found = findings(dataclasses.replace(evidence, status=status))[0]
    assert (found.kind, found.level, found.query) == ("not-finite", "bad", {"value": "loss"})


def test_after_success_what_was_lost_is_only_worth_knowing() -> None:
    evidence = evidence_of("dead-shard", over=True)
    status = msgspec.structs.replace(evidence.status, state="SUCCEEDED")
    found = findings(dataclasses.replace(evidence, status=status, errors={"p0": Errors(1, "x")}))
    assert {f.kind for f in found} == {"lost", "errors", "restarted"}
    assert {f.level for f in found} == {"note"}


def test_a_rate_of_one_report_is_none() -> None:
    status = JobStatus(job="j", state="SUCCEEDED", started_at=NOW, at=NOW + 3.0)
    shown = numbers(Evidence(status, NOW, rows=[Row(at=NOW + 3.0, steps=1)]), None)
    assert (shown.samples_per_s, shown.peak_samples_per_s) == (None, None)
