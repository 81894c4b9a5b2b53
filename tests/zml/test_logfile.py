"""A file of lines: whole, rotated, and never worth the process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zml.logs.logfile import LogFile


def file(path: Path, rotate_bytes: int = 1000, kept: int = 2) -> LogFile:
    return LogFile(
        path,
        rotate_bytes=rotate_bytes,
        kept=kept,
        notice=lambda lost, because: f"{lost} lost: {because}\n".encode(),
    )


def test_a_full_file_makes_way_and_so_many_stay(tmp_path: Path) -> None:
    log = file(tmp_path / "w0.jsonl", rotate_bytes=20)
    for number in range(8):
        log.write(f"line {number}\n".encode())
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "w0.jsonl": "line 6\nline 7\n",
        "w0.jsonl.1": "line 4\nline 5\n",
        "w0.jsonl.2": "line 2\nline 3\n",
    }


def test_a_line_larger_than_a_file_goes_there_whole_and_leaves_no_small_files(tmp_path: Path) -> None:
    log = file(tmp_path / "a", rotate_bytes=30)
    for text in (b"x" * 50 + b"\n", b"short\n", b"y" * 50 + b"\n"):
        log.write(text)
    assert (tmp_path / "a.1").read_bytes() == b"x" * 50 + b"\n"
    assert (tmp_path / "a").read_bytes() == b"short\n" + b"y" * 50 + b"\n"


def test_it_goes_on_where_a_former_process_ended(tmp_path: Path) -> None:
    file(tmp_path / "a").write(b"one\n")
    file(tmp_path / "a").write(b"two\n")
    assert (tmp_path / "a").read_text() == "one\ntwo\n"
    (tmp_path / "a").write_text("one\nhal")
    file(tmp_path / "a").write(b"two\n")
    assert (tmp_path / "a").read_text() == "one\nhal\ntwo\n"


def test_the_file_comes_with_its_first_line(tmp_path: Path) -> None:
    log = file(tmp_path / "logs" / "a")
    log.close()
    assert list(tmp_path.iterdir()) == []
    log.write(b"one\n")
    log.close()
    log.close()
    assert (tmp_path / "logs" / "a").read_text() == "one\n"


def test_a_full_disk_costs_lines_and_says_how_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a"
    path.symlink_to("/dev/full")
    log = file(path)
    for _ in range(3):
        log.write(b"gone\n")
    log.write(b"gone\ngone\n", 2)
    assert capsys.readouterr().err == (
        f"zml: cannot write {path}: No space left on device; lines of it are lost\n"
    )
    log.close()
    path.unlink()
    log.write(b"here\n")
    log.write(b"again\n")
    assert path.read_text() == "5 lost: No space left on device\nhere\nagain\n"
    assert capsys.readouterr().err == ""


def test_a_torn_line_ends_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = file(tmp_path / "a")
    log.write(b"one\n")
    write, room = os.write, [3]

    def full(number: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        written = write(number, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", full)
    log.write(b"torn\n")
    monkeypatch.undo()
    log.write(b"three\n")
    assert (tmp_path / "a").read_text() == "one\ntor\n1 lost: No space left on device\nthree\n"


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file")
    log = file(tmp_path / "logs" / "a")
    log.write(b"one\n")
    log.write(b"two\n")
    assert log.lost == 2


def test_of_two_that_write_one_rotates_and_the_other_follows(tmp_path: Path) -> None:
    one, two = file(tmp_path / "a", rotate_bytes=20), file(tmp_path / "a", rotate_bytes=20)
    for log in (one, two, one, two, one, two):
        log.write(b"12345678\n")
    text = "".join(path.read_text() for path in tmp_path.iterdir())
    assert text == "12345678\n" * 6
    assert {path.name for path in tmp_path.iterdir()} <= {"a", "a.1", "a.2"}


FORK = """
import os, signal, threading
from pathlib import Path
from zml.logs.logfile import LogFile
log = LogFile(Path("a"), rotate_bytes=1000, kept=1)
held, over = threading.Event(), threading.Event()
def hold():
    with log._lock:
        held.set()
        over.wait()
threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(10)
    log.write(b"child\\n")
    os._exit(0)
status = os.waitpid(child, 0)[1]
over.set()
assert status == 0, status
"""


def test_a_forked_child_writes_though_a_thread_of_its_parent_was_writing(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        timeout=30,
    )
    assert ended.returncode == 0
    assert (tmp_path / "a").read_text() == "child\n"
