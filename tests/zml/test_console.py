"""What people see of a job: a pure function of its status, on a terminal and off."""

import io
import os
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from zml.figures import WorkerFigures
from zml.messages import Failure
from zml.status import (
    CheckpointStatus,
    DataStatus,
    EventLine,
    JobStatus,
    MemberFailure,
    MemberStatus,
    NoiseStatus,
    RateStatus,
    decode,
    encode,
    since_the_first,
)
from zml.text import console

NOON = 1_700_000_000.0


def member(name: str, state: str = "active", **more: Any) -> MemberStatus:
    role = "worker" if name.startswith("w") else "shard"
    return MemberStatus(member=name, role=role, state=state, node="gpu03", heard_s=0.1, **more)


def status(**changes: Any) -> JobStatus:
    normal: dict[str, Any] = {
        "job": "job",
        "state": "RUNNING",
        "script": "examples/train.py",
        "mode": "staleness 4",
        "workers": 2,
        "shards": 1,
        "epoch": 1,
        "epochs": 5,
        "epoch_progress": 0.25,
        "steps": 1200,
        "values": {"loss": 2.10432},
        "samples": 12345,
        "samples_per_s": 1234.5,
        "staleness": 3,
        "eta_s": 70.0,
        "started_at": NOON,
        "at": NOON + 83,
        "members": [member("w0", steps=1201), member("w1", steps=1200), member("p0")],
    }
    return JobStatus(**(normal | changes))


def drawn(shown: JobStatus, width: int = 80, *, unicode: bool = True) -> list[str]:
    out = io.StringIO()
    screen = Console(file=out, width=width, force_terminal=False, color_system=None)
    screen.print(console.block(shown, width, unicode=unicode))
    return out.getvalue().splitlines()


def test_a_running_job_is_one_block() -> None:
    assert drawn(status()) == [
        "train.py · staleness 4 · 2 workers, 1 shard                        running  1:23",
        "epoch 2/5 ━━━━━━━━━━━━━━────────────────────────────────────────  25 %  eta 1:10",
        "loss 2.104   1,234 samples/s   step 1,200   staleness 3",
        "  w0    active   step 1,201     cpu     gpu03            heard 0.1 s ago",
        "  w1    active   step 1,200     cpu     gpu03            heard 0.1 s ago",
        "  p0    active                  cpu     gpu03            heard 0.1 s ago",
    ]


def test_steps_go_on_from_where_the_run_before_was() -> None:
    lines = drawn(status(steps_before=3000))
    assert lines[2:4] == [
        "loss 2.104   1,234 samples/s   step 4,200   staleness 3",
        "  w0    active   step 4,201     cpu     gpu03            heard 0.1 s ago",
    ]
    assert "step 4,200" in console.progress_line(status(steps_before=3000))
    failure = MemberFailure(member="w0", failure=Failure(kind="ValueError", at=NOON, step=2))
    whole = since_the_first(status(steps_before=3000, failures=[failure]))
    assert (whole.steps, whole.failures[0].failure.step, whole.members[2].steps) == (4200, 3002, -1)
    assert since_the_first(whole) == whole


def test_whoever_looks_once_is_told_of_time_data_and_checkpoints() -> None:
    figures = WorkerFigures(steps=10, phases={"data": 0.1, "compute": 0.6, "wait": 0.3, "push": 5.0})
    figures = msgspec.structs.replace(figures, compress="topk:1%:int4")
    full = status(
        members=[member("w0", steps=10, figures=figures), member("w1"), member("p0")],
        data=DataStatus(batches=64, committed=16, leased=2, skipped=1, reissued=3),
        checkpoint=CheckpointStatus(
            path="checkpoints/1", step=1000, at=NOON + 23, because="the disk is full"
        ),
    )
    out = io.StringIO()
    Console(file=out, width=80, color_system=None).print(console.block(full, 80, full=True))
    assert out.getvalue().splitlines()[3:7] == [
        "a step takes 100.0 ms: data 10%, compute 60%, wait 30%",
        "compress auto: topk:1%:int4",
        "data 16 of 64 batches applied, 2 with workers, 1 skipped, 3 dealt again",
        "checkpoint step 1,000, 1:00 ago; the last one failed: the disk is full",
    ]
    assert drawn(full) == drawn(status(members=full.members)), "a job that is run here keeps its short block"
    assert console.data(DataStatus()) == console.checkpoint(status()) == console.step_time(status()) == ""
    assert console.compress(status()) == ""


def test_with_a_staleness_bound_workers_may_compress_differently_and_each_is_named() -> None:
    told = {"w0": "fp32", "w1": "topk:1%:int4", "w2": ""}
    members = [member(name, figures=WorkerFigures(compress=setting)) for name, setting in told.items()]
    assert console.compress(status(members=members)) == "auto: w0 fp32, w1 topk:1%:int4"


def test_a_job_that_is_over_is_not_shown_as_if_it_went_on() -> None:
    over = status(
        state="CANCELLED",
        data=DataStatus(batches=80, committed=40, leased=20),
        checkpoint=CheckpointStatus(path="checkpoints/1", step=1200, at=NOON + 82.5),
    )
    assert console.data(over.data, over=True) == "40 of 80 batches applied, 40 not done"
    assert console.checkpoint(over) == "step 1,200, at the end"
    assert console.checkpoint(
        status(state="FAILED", checkpoint=CheckpointStatus(path="c", step=9, at=NOON))
    ) == ("step 9, 1:23 before the end")
    assert re.fullmatch(r"2023-11-\d\d \d\d:\d\d:43", console.ended(over)) and not console.ended(status())


def test_a_terminal_without_unicode_gets_a_bar_of_letters() -> None:
    assert (
        drawn(status(), unicode=False)[1].startswith("epoch 2/5 =====")
        and "---" in drawn(status(), unicode=False)[1]
    )


def test_while_the_cluster_forms_it_says_who_is_here_and_who_is_missing() -> None:
    forming = status(
        state="FORMING",
        epochs=0,
        steps=0,
        values={},
        samples_per_s=0.0,
        members=[member("w1")],
        waiting_for=["w0", "p0"],
    )
    assert drawn(forming) == [
        "train.py · staleness 4 · 2 workers, 1 shard                        forming  1:23",
        "1 of 2 workers and 0 of 1 shard here",
        "  w1    active                  cpu     gpu03            heard 0.1 s ago",
        "waiting for w0, p0",
    ]


def test_trouble_is_shown_before_the_well_and_with_its_reason() -> None:
    many = [member(f"w{number}") for number in range(20)]
    many[17] = member("w17", "lost", because="silent for 1.5 s", steps=9)
    lines = drawn(status(members=many))
    assert "  w17   lost     step 9         silent for 1.5 s" in lines
    assert "  and 12 more that are well" in lines
    assert len(lines) == 3 + console.ROWS + 1


def test_a_name_is_never_a_command_to_the_terminal() -> None:
    lines = drawn(
        status(
            script="a\x1b[2J.py",
            because="\x1b[31m",
            members=[member("w0", "lost", because="\x1b]0;x\x07\r\n")],
            events=[EventLine(at=NOON, what="joined\x1b[1m", member="w0")],
            values={"lo\x1bss": 1.0},
        )
    )
    assert not [line for line in lines if re.search(r"[\x00-\x1f\x7f]", line)]


names = st.text(max_size=30)
members = st.builds(
    MemberStatus,
    member=names,
    role=st.sampled_from(["worker", "shard"]),
    state=st.sampled_from(["active", "lost", "done"]),
    because=names,
    incarnation=st.integers(1, 99),
    node=names,
    device=names,
    steps=st.integers(-1, 10**9),
    heard_s=st.floats(-1, 1e6),
)
statuses = st.builds(
    JobStatus,
    job=names,
    state=st.sampled_from(
        ["FORMING", "RUNNING", "DRAINING", "FINISHING", "SUCCEEDED", "FAILED", "CANCELLED"]
    ),
    because=names,
    script=names,
    workers=st.integers(1, 10**4),
    epoch=st.integers(0, 100),
    epochs=st.integers(0, 100),
    epoch_progress=st.floats(0, 1),
    steps=st.integers(0, 10**9),
    values=st.dictionaries(names, st.floats(allow_nan=True, allow_infinity=True), max_size=5),
    samples_per_s=st.floats(0, 1e9),
    staleness=st.integers(0, 10**6),
    eta_s=st.none() | st.floats(0, 1e9),
    started_at=st.floats(0, 2e9),
    at=st.floats(0, 2e9),
    members=st.lists(members, max_size=12),
    waiting_for=st.lists(names, max_size=6),
    events=st.lists(
        st.builds(EventLine, at=st.floats(0, 2e9), what=names, member=names, because=names), max_size=5
    ),
)


@settings(max_examples=60, deadline=None)
@given(statuses, st.integers(40, 120))
def test_whatever_the_status_the_block_fits_its_width_and_moves_no_cursor(
    any_status: JobStatus, width: int
) -> None:
    for line in console.block_lines(any_status, width):
        assert line.cell_len <= width
        assert not re.search(r"[\x00-\x1f\x7f]", line.plain)


@pytest.mark.parametrize(("eta_s", "ends"), [(60.0, "  9 %  eta 1:00"), (3.6e8, "  9 %")])
def test_an_end_too_far_away_to_fit_is_not_told(eta_s: float, ends: str) -> None:
    far = JobStatus(job="job", state="RUNNING", mode="sync", epoch=9, epochs=100, eta_s=eta_s)
    line = list(console.block_lines(far, 40))[1]
    assert line.plain.endswith(ends) and line.cell_len == 40


@settings(max_examples=60, deadline=None)
@given(st.lists(statuses, max_size=5))
def test_off_a_terminal_there_is_never_a_carriage_return(several: list[JobStatus]) -> None:
    lines = console.Lines()
    for each in several:
        for line in lines.update(each):
            assert not re.search(r"[\x00-\x1f\x7f]", line)


def test_off_a_terminal_a_line_comes_on_change_and_else_every_30_seconds() -> None:
    lines = console.Lines()
    forming = status(state="FORMING", members=[], epoch=0, epoch_progress=0.0, at=NOON)
    assert lines.update(forming) == [
        "train.py · staleness 4 · 2 workers, 1 shard",
        "0 of 2 workers and 0 of 1 shard here",
    ]
    assert lines.update(msgspec.structs.replace(forming, at=NOON + 1)) == []
    running = status(epoch=0, epoch_progress=0.0, at=NOON + 2, because="all members are here")
    assert lines.update(running) == ["running: all members are here"]
    assert lines.update(msgspec.structs.replace(running, at=NOON + 20)) == []
    assert lines.update(msgspec.structs.replace(running, at=NOON + 33)) == [
        "[0:33] epoch 1/5, 0 %, loss 2.104, 1,234 samples/s, step 1,200, staleness 3, 2 workers, eta 1:10"
    ]
    assert lines.update(msgspec.structs.replace(running, at=NOON + 50)) == []


def test_off_a_terminal_a_line_comes_at_every_twentieth_of_the_job() -> None:
    lines = console.Lines()
    said = []
    for batch in range(501):
        said += lines.update(
            status(epoch=batch // 100, epoch_progress=batch % 100 / 100, at=NOON + batch / 100)
        )
    progress = [line for line in said if line.startswith("[")]
    assert said[:2] == ["train.py · staleness 4 · 2 workers, 1 shard", "running"]
    assert 19 <= len(progress) <= 20


def test_off_a_terminal_every_event_is_told_once() -> None:
    lines = console.Lines()
    lost = EventLine(at=NOON + 5, what="fenced", member="w1", because="silent for 1.5 s")
    joined = EventLine(at=NOON + 9, what="joined", member="w1")
    lines.update(status())
    assert [line[9:] for line in lines.update(status(events=[lost]))] == ["w1 fenced: silent for 1.5 s"]
    assert [line[9:] for line in lines.update(status(events=[lost, joined]))] == ["w1 joined"]
    assert lines.update(status(events=[lost, joined])) == []


def test_a_change_of_state_that_an_event_has_told_is_not_told_again() -> None:
    lines = console.Lines()
    lines.update(status())
    asked = EventLine(at=NOON + 90, what="draining", because="SIGINT at zml run")
    draining = status(state="DRAINING", because="SIGINT at zml run", events=[asked])
    assert [line[9:] for line in lines.update(draining)] == ["draining: SIGINT at zml run"]


def test_who_is_waited_for_is_worth_a_line_only_after_a_while() -> None:
    lines = console.Lines()
    lines.update(status(waiting_for=["w1"], at=NOON + 83))
    assert lines.update(status(waiting_for=["w1"], at=NOON + 84)) == []
    assert lines.update(status(waiting_for=["w1"], at=NOON + 89)) == ["waiting for w1 (for 0:06)"]
    assert lines.update(status(waiting_for=["w1"], at=NOON + 95)) == []


def test_off_a_terminal_the_scripts_lines_and_ours_do_not_mix() -> None:
    out, err = io.StringIO(), io.StringIO()
    viewer = console.viewer(out, err)
    viewer.script_line("epoch 1: loss 2.1")
    viewer.say("draining")
    viewer.close()
    assert (out.getvalue(), err.getvalue()) == ("epoch 1: loss 2.1\n", "zml: draining\n")


def test_a_reader_that_goes_away_costs_its_lines_and_not_the_job() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as out:
        viewer = console.PlainViewer(out, io.StringIO())
        viewer.script_line("one")
        os.close(reader)
        viewer.script_line("two")
        viewer.script_line("three")  # no error now, and none when the file is closed


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (65.9, "1:05"), (3600, "1:00:00"), (-3, "0:00")])
def test_durations(seconds: float, shown: str) -> None:
    assert console.duration(seconds) == shown


def test_a_status_survives_its_json_and_an_older_viewer_reads_a_newer_job() -> None:
    whole = status(events=[EventLine(at=NOON, what="joined")])
    assert decode(encode(whole)) == whole
    diverged = decode(encode(status(values={"loss": float("inf"), "norm": float("nan"), "lr": 0.1})))
    assert diverged.values == {"loss": None, "norm": None, "lr": 0.1}
    assert "loss not finite   norm not finite   lr 0.1" in drawn(diverged)[2]
    newer = encode(whole)[:-1] + b',"new_field":{"a":[1]}}'
    assert decode(newer) == whole


def test_what_becomes_of_the_learning_rate_and_how_noisy_gradients_are_is_told() -> None:
    scaled = RateStatus(
        scaling="linear", base_workers=2, factor=1.5, because="3 workers where 2 were asked for, linear"
    )
    lines = drawn(status(mode="sync", rate=scaled, noise=NoiseStatus(scale=1234.6, updates=20)))
    assert lines[2] == "loss 2.104   1,234 samples/s   step 1,200   lr x 1.5"
    assert lines[3] == "learning rate x 1.5, 3 workers where 2 were asked for, linear"
    assert lines[4] == "gradient noise scale 1,235 samples"
    damped = RateStatus(staleness=3.4, damping=0.3125)
    assert console.rate(damped) == "learning rate x 0.312 on average, gradients are 3.4 updates late"
    assert console.rate(RateStatus(scaling="sqrt")) == "", "nothing is known yet"
    assert "lr x" not in "".join(drawn(status()))
