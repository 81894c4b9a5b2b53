"""Log lines: JSON in a file always, words on a terminal, and no local variables anywhere."""

import contextlib
import functools
import gc
import io
import json
import logging
import os
import pty
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from zml.logs import outlets as logs
from zml.logs import repeats

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    logs.close()
    logging.captureWarnings(False)
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_says_when_who_and_what(tmp_path: Path) -> None:
    path = logs.configure("shard", "p3", folder=tmp_path / "logs", job="j")
    structlog.get_logger().info("applied", apply_s=0.25)
    assert path == tmp_path / "logs" / "p3.jsonl"
    (line,) = lines(path)
    assert list(line)[:3] == ["time", "level", "message"]
    assert (line["level"], line["message"], line["apply_s"]) == ("info", "applied", 0.25)
    assert (line["job"], line["role"], line["id"], line["pid"]) == ("j", "shard", "p3", os.getpid())
    assert line["time"].endswith("Z")


def test_other_libraries_loggers_take_the_same_way(tmp_path: Path) -> None:
    path = logs.configure("worker", "w0", folder=tmp_path)
    logging.getLogger("library.something").warning("%d devices", 2, extra={"devices": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("careful", stacklevel=1)
    first, second = lines(path)
    assert (first["level"], first["message"], first["devices"]) == ("warning", "2 devices", 2)
    assert "careful" in second["message"]


def test_an_exception_is_logged_without_the_values_of_variables(tmp_path: Path) -> None:
    path = logs.configure("worker", "w0", folder=tmp_path)
    patient = "row 4711"
    try:
        raise ValueError(len(patient))
    except ValueError:
        structlog.get_logger().exception("failed")
    assert lines(path)[0]["exception"][0]["exc_type"] == "ValueError"
    assert "4711" not in path.read_text()


SECRET = "row 4711"


class Odd:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


def fail_with(secret: str) -> None:
    held = {"inner": [secret]}
    raise ValueError(f"{len(held)} wrong")


def test_no_way_of_logging_an_exception_writes_what_variables_hold(tmp_path: Path) -> None:
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):
        path = logs.configure("worker", "w0", folder=tmp_path, terminal=True)
        for log in (
            structlog.get_logger().exception,
            logging.getLogger("user").exception,
            functools.partial(logging.getLogger("user").warning, exc_info=True, stack_info=True),
            functools.partial(structlog.get_logger().warning, exc_info=True, stack_info=True),
        ):
            try:
                fail_with(SECRET)
            except ValueError:
                log("failed")
        logs.close()
    assert len(lines(path)) == 4
    assert SECRET not in path.read_text() + stream.getvalue()
    assert "fail_with" in stream.getvalue()
    frames = lines(path)[0]["exception"][0]["frames"]
    assert [frame["name"] for frame in frames][-1] == "fail_with"
    assert all(not frame.get("locals") for frame in frames)


def test_a_line_names_its_run_and_what_is_bound_where_it_is_written(tmp_path: Path) -> None:
    path = logs.configure("shard", "p0", folder=tmp_path / "runs" / "r1" / "logs", job="j")
    logs.at_step(7, "ab" * 16, "cd" * 8)
    try:
        structlog.get_logger().info("applied")
        logging.getLogger("library").info("theirs")
        logs.at_step(8)
        structlog.get_logger().info("without a trace")
    finally:
        structlog.contextvars.clear_contextvars()
    structlog.get_logger().info("later")
    first, second, untraced, third = lines(path)
    assert untraced["step"] == 8 and "trace_id" not in untraced
    for line in (first, second):
        assert (line["run"], line["step"], line["trace_id"], line["span_id"]) == (
            "r1",
            7,
            "ab" * 16,
            "cd" * 8,
        )
    assert "step" not in third
    keys = ["time", "level", "message", "run", "job", "role", "id", "host", "pid"]
    assert list(first) == [*keys, "step", "trace_id", "span_id"]


@pytest.mark.parametrize(
    ("folder", "run"),
    [
        ("runs/r/logs", "r"),
        ("runs/slurm-7/attempt-1/logs", "slurm-7/attempt-1"),
        ("jobs/j3/2/logs", "j3/2"),
        ("runs/r/logs/join-9", "r"),
        ("runs/nodes", ""),
    ],
)
def test_the_run_is_where_the_logs_lie(folder: str, run: str) -> None:
    assert logs.run_of(Path(folder)) == run


def test_within_a_span_of_opentelemetry_a_line_says_which(tmp_path: Path) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    path = logs.configure("shard", "p0", folder=tmp_path)
    context = trace.SpanContext(5, 6, is_remote=False, trace_flags=trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(context)):
        structlog.get_logger().info("inside")
    structlog.get_logger().info("outside")
    inside, outside = lines(path)
    assert (inside["trace_id"], inside["span_id"]) == (f"{5:032x}", f"{6:016x}")
    assert "trace_id" not in outside


def test_every_line_is_json_whatever_is_logged(tmp_path: Path) -> None:
    path = logs.configure("worker", "w0", folder=tmp_path)
    log = structlog.get_logger()
    log.info("odd", loss=float("nan"), big=2**70, nested={"x": [float("inf")]}, odd={1, 2}, path=Path("/a"))
    log.info("half a pair \ud800", name="\udcff")
    log.info("unspeakable", what=Odd())
    logging.getLogger("user").warning("%s", Odd())
    logging.getLogger("user").warning("%d of these", "no number")
    log.info("long", text="x" * 10**6, parts=["y" * 1000] * 1000)
    logs.close()
    found = [
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
        for line in path.read_text().splitlines()
    ]
    assert len(found) == 6
    assert (found[0]["loss"], found[0]["big"], found[0]["path"]) == ("nan", 2**70, repr(Path("/a")))
    assert found[1]["message"] == "half a pair \\ud800"
    assert [(line["message"], line["logger"]) for line in found[3:5]] == [
        ("a line that cannot be written out", "user")
    ] * 2
    assert max(map(len, path.read_text().splitlines())) <= logs.LINE_BYTES
    assert found[-1]["shortened_bytes"] > 10**6 and found[-1]["text"].startswith("xxx")


def test_a_line_that_comes_again_and_again_is_counted_and_the_count_is_told_at_the_end(
    tmp_path: Path,
) -> None:
    path = logs.configure("shard", "p0", folder=tmp_path)
    log = structlog.get_logger()
    for _ in range(312 + repeats.SAME[0]):
        log.warning("push refused", peer="w0")
        logging.getLogger("zmq").warning("%d retries", 5)
    log.info("push refused", peer="w0")
    logs.close()
    *told, first, second = lines(path)
    assert [line["message"] for line in told[:-1]] == ["push refused", "5 retries"] * repeats.SAME[0]
    assert (told[-1]["message"], told[-1]["level"]) == ("push refused", "info")
    message = "repeated 312 times: push refused"
    assert (first["message"], first["repeated"], first["level"], first["peer"]) == (
        message,
        312,
        "warning",
        "w0",
    )
    assert second["message"] == "repeated 312 times: 5 retries"


def test_a_message_about_many_things_is_told_for_long_and_then_counted_with_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "monotonic", lambda: 0.0)
    path = logs.configure("coordinator", "coordinator", folder=tmp_path)
    for number in range(repeats.ALIKE[0] + 5):
        structlog.get_logger().info("job over", number=number)
    logs.close()
    *told, last = lines(path)
    assert [line["number"] for line in told] == list(range(repeats.ALIKE[0]))
    assert (last["message"], last["number"]) == ("repeated 5 times: job over", repeats.ALIKE[0] + 4)


def test_a_flood_hides_no_other_error(tmp_path: Path) -> None:
    path = logs.configure("shard", "p0", folder=tmp_path)
    log = structlog.get_logger()
    for number in range(300):
        try:
            raise KeyError("again") if number != 200 else KeyError("the one")
        except KeyError:
            log.exception("failed")
    log.error("failed otherwise")
    logs.close()
    text = path.read_text()
    assert "the one" in text and "failed otherwise" in text
    assert lines(path)[-1]["message"] == f"repeated {299 - repeats.SAME[0]} times: failed"


def test_what_is_only_counted_keeps_nothing_alive(tmp_path: Path) -> None:
    logs.configure("shard", "p0", folder=tmp_path)

    class Tensor:
        pass

    def flood(held: Tensor) -> None:
        for _ in range(repeats.SAME[0] + 3):
            try:
                raise ValueError
            except ValueError:
                structlog.get_logger().exception("failed")
                logging.getLogger("user").error("failed with %s", held, exc_info=True)

    tensor = Tensor()
    alive = weakref.ref(tensor)
    flood(tensor)
    del tensor
    gc.collect()
    assert alive() is None


def test_a_full_disk_costs_lines_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w0.jsonl").symlink_to("/dev/full")
    path = logs.configure("worker", "w0", folder=tmp_path)
    for number in range(3):
        structlog.get_logger().info("hello", number=number)
    assert capsys.readouterr().err.count("No space left on device") == 1
    path.unlink()
    logs.configure("worker", "w0", folder=tmp_path)
    structlog.get_logger().info("again")
    assert [line["message"] for line in lines(path)] == ["again"]


def test_what_a_message_is_about_does_not_pass_for_the_process(tmp_path: Path) -> None:
    path = logs.configure("shard", "p0", folder=tmp_path, job="j")
    structlog.get_logger().info("a backup", host="p1", id="x", pid=3, job="j2")
    (line,) = lines(path)
    assert (line["id"], line["pid"], line["job"]) == ("p0", os.getpid(), "j2")
    assert (line["its_host"], line["its_id"], line["its_pid"]) == ("p1", "x", 3)


def test_a_process_started_by_hand_writes_where_its_run_is_once_it_knows(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r"
    own = logs.configure("worker", "worker", folder=tmp_path / "own" / "logs", alone=True)
    log = structlog.get_logger()
    log.info("before")
    logs.move("w5", str(run), "j")  # which this machine does not see
    log.info("named")
    (run / "logs").mkdir(parents=True)
    logs.move("w5", str(run), "j")
    log.info("there")
    logs.move("w6", str(tmp_path / "other"), "j")  # as its next incarnation: it stays
    log.info("still there")
    assert [line["message"] for line in lines(own)] == ["before"]
    (named,) = lines(own.with_name("w5.jsonl"))
    assert (named["id"], named["run"], named["job"]) == ("w5", "own", "j")
    found = lines(run / "logs" / "w5.jsonl")
    assert [(line["message"], line["id"], line["run"]) for line in found] == [
        ("there", "w5", "r"),
        ("still there", "w5", "r"),
    ]


def test_a_process_that_was_told_where_its_run_is_stays(tmp_path: Path) -> None:
    path = logs.configure("worker", "w0", folder=tmp_path / "a" / "logs")
    (tmp_path / "b" / "logs").mkdir(parents=True)
    logs.move("w1", str(tmp_path / "b"), "j")
    structlog.get_logger().info("here")
    assert [line["id"] for line in lines(path)] == ["w0"]


def test_below_the_level_nothing_is_written(tmp_path: Path) -> None:
    path = logs.configure("worker", "w0", folder=tmp_path, level="warning")
    structlog.get_logger().info("quiet")
    logging.getLogger("user").info("quiet")
    structlog.get_logger().warning("loud")
    assert [line["message"] for line in lines(path)] == ["loud"]


def test_configured_again_the_lines_go_to_the_new_file_only(tmp_path: Path) -> None:
    first = logs.configure("worker", "worker", folder=tmp_path)
    logger = structlog.get_logger()
    logger.info("before")
    second = logs.configure("worker", "w5", folder=tmp_path)
    logger.info("after")
    assert [line["message"] for line in lines(first)] == ["before"]
    assert [(line["message"], line["id"]) for line in lines(second)] == [("after", "w5")]


PROGRAM = """
import structlog
from zml.logs import outlets as logs
logs.configure("shard", "p0", folder="logs")
structlog.get_logger().info("hello", answer=42)
"""


def test_off_a_terminal_nothing_is_printed(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")
    assert lines(tmp_path / "logs" / "p0.jsonl")[0]["answer"] == 42


def test_on_a_terminal_people_get_words_and_no_color_is_honoured(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, stderr=theirs, timeout=60
    )
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert ended.returncode == 0
    assert "hello" in shown and "answer=42" in shown
    assert "\x1b[3" not in shown  # no foreground colour


SCRIPT = """
import logging, sys, structlog
from zml.logs import outlets as logs
logs.configure_script("w0", folder="logs", job="j", level="info")
before = logging.getLogger().handlers
from zml.coordinator import board
import zml.launch.tether
code = "import structlog; structlog.get_logger().{}('from zml', x=1)"
for method in ("debug", "warning"):
    compiled = compile(code.format(method), board.__file__, "exec")
    __builtins__.exec(compiled, {})
structlog.get_logger().info("from the script")
assert logging.getLogger().handlers == before == []
"""


def test_in_a_scripts_process_our_lines_go_to_a_file_and_the_scripts_lines_are_its_own(
    tmp_path: Path,
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "from the script" in ended.stdout and "from zml" not in ended.stdout
    (line,) = lines(tmp_path / "logs" / "w0.script.jsonl")
    assert (line["level"], line["message"], line["x"], line["role"]) == ("warning", "from zml", 1, "script")
    assert "pathname" not in line


FLOOD = """
import structlog
from zml.coordinator import board
from zml.logs import outlets as logs
at = 0
logs.configure_script("w0", folder="runs/r/logs", step=lambda: at)
ours = compile("import structlog; structlog.get_logger().warning('from zml', x=n)", board.__file__, "exec")
for n in range(100):
    at = n
    __builtins__.exec(ours, {"n": 1})
"""


def test_in_a_scripts_process_lines_know_the_step_and_a_count_is_told_when_it_ends(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FLOOD],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, "", "")
    *told, last = lines(tmp_path / "runs" / "r" / "logs" / "w0.script.jsonl")
    assert [line["step"] for line in told] == list(range(repeats.SAME[0]))
    message = f"repeated {100 - repeats.SAME[0]} times: from zml"
    assert (last["message"], last["step"], last["run"]) == (message, 99, "r")
