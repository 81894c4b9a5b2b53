"""The end of a run: the one box about the cause, and how it went."""

import io
from typing import Any

from rich.console import Console

from zml.messages import Failure
from zml.status import CheckpointStatus, JobStatus, MemberFailure, MemberStatus
from zml.text import report

NOON = 1_700_000_000.0


def failed(member: str, at: float, kind: str = "ValueError", **more: Any) -> MemberFailure:
    return MemberFailure(member=member, failure=Failure(kind=kind, at=NOON + at, **more))


def status(state: str, failures: list[MemberFailure], **more: Any) -> JobStatus:
    members = [MemberStatus(member=f"w{number}", role="worker", state="stopped") for number in range(3)]
    normal: dict[str, Any] = {
        "script": "train.py",
        "started_at": NOON,
        "at": NOON + 83,
        "members": members,
        "run_dir": "runs/x",
    }
    return JobStatus(job="job", state=state, failures=failures, **(normal | more))


def printed(ended: JobStatus, width: int = 80) -> list[str]:
    out = io.StringIO()
    report.print_report(
        ended, Console(file=out, width=width, highlight=False, markup=False, color_system=None)
    )
    return out.getvalue().splitlines()


RAISED = failed(
    "w1",
    3,
    text="bad value [loss]",
    file="/home/me/train.py",
    line=41,
    source=["for x, y in train:", "    if loss > 3:", "        raise ValueError(loss)", "", "opt.step()"],
    first_source_line=39,
    step=3,
    log="runs/x/logs/w1.out",
)


def test_a_failure_is_one_box_with_worker_step_exception_frame_and_log() -> None:
    assert printed(status("FAILED", [RAISED], because="w1: its script raised ValueError")) == [
        "╭─ w1 failed at step 3 ────────────────────────────────────────────────────────╮",
        "│  ValueError: bad value [loss]                                                │",
        "│                                                                              │",
        "│  /home/me/train.py, line 41                                                  │",
        "│      39  for x, y in train:                                                  │",
        "│      40      if loss > 3:                                                    │",
        "│  >   41          raise ValueError(loss)                                      │",
        "│      42                                                                      │",
        "│      43  opt.step()                                                          │",
        "│                                                                              │",
        "│  w0, w2 stopped because of w1                                                │",
        "│                                                                              │",
        "│  log: runs/x/logs/w1.out                                                     │",
        "╰──────────────────────────────────────────────────────────────────────────────╯",
        "train.py failed after 1:23",
        "w1: its script raised ValueError",
        "run directory: runs/x",
    ]


def test_the_first_failure_by_time_is_the_cause() -> None:
    later = failed("w0", 5, "KeyError")
    assert report.cause([later, RAISED]) == RAISED
    assert sum("╭" in line for line in printed(status("FAILED", [later, RAISED]))) == 1


def test_a_worker_that_was_killed_before_is_not_the_cause_of_another_ones_exception() -> None:
    killed = failed("w2", 0, "SIGKILL")
    assert report.cause([killed, RAISED]) == RAISED
    assert report.cause([killed, failed("w0", 9, "SIGSEGV")]) == killed
    assert report.cause([]) is None


def test_a_script_that_could_not_say_why_is_quoted() -> None:
    lines = printed(status("FAILED", [failed("w0", 0, "SIGSEGV", text="epoch 1", step=7)]))
    assert lines[0].startswith("╭─ w0 was killed by SIGSEGV at step 7 ─")
    assert "it last printed: epoch 1" in lines[1]
    lines = printed(status("FAILED", [failed("w0", 0, "exit code 3")]))
    assert lines[0].startswith("╭─ w0 ended with exit code 3 ─")
    assert "it said nothing" in lines[1]
    crash = failed("w0", 0, "SIGSEGV", text="Extension modules: numpy (total: 1)", log="w0.out")
    assert "it said nothing" in printed(status("FAILED", [crash]))[1]


def test_an_error_of_zml_keeps_its_own_words() -> None:
    text = "ZML-E502: the gradient of net.0.weight is not finite\n  Lower the learning rate."
    lines = printed(status("FAILED", [failed("w0", 0, "ZmlError", text=text, step=2)]))
    assert "ZML-E502: the gradient of net.0.weight is not finite" in lines[1]
    assert "ZmlError" not in "".join(lines)


def test_a_failure_before_the_first_step_says_so() -> None:
    assert printed(status("FAILED", [failed("w0", 0, "ImportError", text="no module x")]))[0].startswith(
        "╭─ w0 failed before its first step ─"
    )


def test_nothing_in_a_message_moves_the_cursor_or_is_markup() -> None:
    evil = failed(
        "w0",
        0,
        text="\x1b[2J[red]x[/red]",
        file="a\x1b.py",
        line=1,
        source=["\x1b]0;t\x07"],
        first_source_line=1,
    )
    text = "\n".join(printed(status("FAILED", [evil], because="\x1b[31m")))
    assert "\x1b" not in text and "\x07" not in text
    assert "[red]x[/red]" in text


def test_a_job_that_succeeded_says_how_it_went_and_who_was_lost() -> None:
    members = [
        MemberStatus(member="w0", role="worker", state="done"),
        MemberStatus(member="w1", role="worker", state="lost", steps=120, because="silent for 1.5 s"),
    ]
    ended = status(
        "SUCCEEDED",
        [failed("w1", 1, "SIGKILL")],
        members=members,
        because="1 worker finished",
        epochs=5,
        samples=12345,
        values={"loss": 1.83},
    )
    assert printed(ended) == [
        "train.py finished after 1:23: 5 epochs, 12,345 samples, loss 1.83",
        "1 worker finished",
        "w1 was lost at step 120: silent for 1.5 s",
        "run directory: runs/x",
    ]


def test_a_run_that_was_stopped_says_where_and_how_to_go_on() -> None:
    because = "SIGINT at zml run: all 3 workers stopped in order"
    kept = CheckpointStatus(path="runs/x/checkpoints/step-000001080", step=1080, at=NOON)
    run = "runs/2026-03-01T12-30-00-train-1a2b"
    more: dict[str, Any] = {"epoch": 2, "epochs": 9, "steps": 1080, "because": because, "checkpoint": kept}
    assert printed(status("CANCELLED", [], run_dir=run, **more), 120) == [
        "train.py was stopped by Ctrl-C after 1:23: at step 1,080, in epoch 3 of 9",
        because,
        "newest checkpoint: step 1,080, runs/x/checkpoints/step-000001080",
        "to go on from it: zml resume train-1a2b",
        f"run directory: {run}",
    ]
    lines = printed(status("FAILED", [RAISED], run_dir="/else/where", **more | {"because": "w1 failed"}), 120)
    assert "to go on from it: zml resume /else/where" in lines
    lines = printed(status("CANCELLED", [], epochs=9, because="SIGTERM at the coordinator"))
    assert lines[0] == "train.py was stopped after 1:23: in epoch 1 of 9"
    assert not [line for line in lines if "resume" in line], "there is nothing to go on from"


def test_a_job_that_nobody_joined_is_warned_of_and_has_succeeded() -> None:
    alone = status("SUCCEEDED", [], workers=2, registered=False, because="all 2 workers finished")
    lines = printed(alone)
    assert lines[0].startswith("╭─ no script called zml.join [ZML-E507] ─")
    assert "all 2 workers did the same" in lines[1]
    for other in (status("SUCCEEDED", [], workers=2), status("CANCELLED", [], registered=False)):
        assert "╭" not in "\n".join(printed(other))


def test_what_the_reason_of_the_job_says_is_not_said_again() -> None:
    members = [MemberStatus(member="w0", role="worker", state="lost", because="killed by SIGSEGV")]
    ended = status(
        "FAILED", [], members=members, because="0 of 1 worker finished; w0 was lost: killed by SIGSEGV"
    )
    assert sum("SIGSEGV" in line for line in printed(ended)) == 1


def test_off_a_terminal_long_lines_are_not_broken() -> None:
    because = "a reason " * 30
    assert because.strip() in [line.strip() for line in printed(status("SUCCEEDED", [], because=because))]
