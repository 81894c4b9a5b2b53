"""Log lines: JSON in a file always, words on a terminal, and no local variables anywhere."""

import json
import logging
import os
import pty
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from zml import logs

ROOT = Path(logs.__file__).resolve().parent.parent


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
from zml import logs
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
from zml import logs
logs.configure_script("w0", folder="logs", job="j", level="info")
before = logging.getLogger().handlers
from zml import board
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
