"""Reading the logs of a run: merged by time, from their ends, through rotation, junk and malice."""

import contextlib
import itertools
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zml.logs import reading as logreading
from zml.logs.logfile import LogFile
from zml.logs.reading import BadCursor, Line, Wanted, after, files, newest, start
from zml.logs.reading.lines import parse
from zml.text import ansi

T0 = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()


def entry(at: float, message: str = "m", member: str = "w0", **more: Any) -> str:
    when = datetime.fromtimestamp(T0 + at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return json.dumps({"time": when, "level": "info", "message": message, "id": member, **more}) + "\n"


def put(folder: Path, name: str, *entries: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    with path.open("a") as file:
        file.write("".join(entries))
    return path


def said(lines: list[Line]) -> list[str]:
    return [line.message for line in lines]


def test_lines_of_all_processes_come_merged_by_time_the_newest_last(tmp_path: Path) -> None:
    put(tmp_path, "w0.jsonl", entry(0, "a"), entry(4, "e"))
    put(tmp_path, "w0.out.jsonl", entry(1, "b"), entry(3, "d"))
    put(tmp_path, "p0.jsonl", entry(2, "c"), entry(5, "f"))
    assert said(newest(tmp_path).lines) == list("abcdef")
    assert said(newest(tmp_path, most=2).lines) == list("ef")


def test_a_line_says_who_when_and_what(tmp_path: Path) -> None:
    put(
        tmp_path, "w3.script.jsonl", entry(1.5, "left", "w3", role="script", level="warning", step=7, run="r")
    )
    (line,) = newest(tmp_path).lines
    assert line == Line(T0 + 1.5, "warning", "w3", "script", "left", {"step": 7, "run": "r"})
    assert line.step == 7


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Wanted(members=frozenset({"w1"})), "bcd"),
        (Wanted(roles=frozenset({"script"})), "c"),
        (Wanted(level="warning"), "bd"),
        (Wanted(text="FULL"), "d"),
        (Wanted(text="disk=3"), "d"),
        (Wanted(since=T0 + 2), "cd"),
        (Wanted(until=T0 + 2), "ab"),
        (Wanted(steps=(5, 6)), "b"),
        (Wanted(level="error", members=frozenset({"w0"})), ""),
    ],
)
def test_filters(tmp_path: Path, wanted: Wanted, expected: str) -> None:
    put(tmp_path, "w0.jsonl", entry(0, "a", step=4))
    put(
        tmp_path,
        "w1.jsonl",
        entry(1, "b", "w1", level="warning", step=5),
        entry(2, "c", "w1", role="script", step=7),
        entry(3, "d", "w1", level="error", because="it is full", disk=3),
    )
    assert "".join(said(newest(tmp_path, wanted).lines)) == expected
    assert "".join(said(after(tmp_path, start(tmp_path), wanted).lines)) == expected


def test_older_text_in_rotated_files_is_read_too(tmp_path: Path) -> None:
    put(tmp_path, "w0.jsonl.10", entry(0, "a"))
    put(tmp_path, "w0.jsonl.2", entry(1, "b"))
    put(tmp_path, "w0.jsonl.1", entry(2, "c"))
    put(tmp_path, "w0.jsonl", entry(3, "d"))
    assert said(newest(tmp_path).lines) == list("abcd")
    assert said(after(tmp_path, start(tmp_path, T0 + 1)).lines) == list("bcd")


def test_following_goes_on_where_it_was_through_rotation_and_new_files(tmp_path: Path) -> None:
    path = put(tmp_path, "w0.jsonl", entry(0, "a"))
    page = newest(tmp_path)
    assert after(tmp_path, page.cursor).lines == []
    put(tmp_path, "w0.jsonl", entry(1, "b"))
    os.rename(path, tmp_path / "w0.jsonl.1")
    put(tmp_path, "w0.jsonl", entry(2, "c"))
    put(tmp_path, "p0.jsonl", entry(1.5, "new"))
    page = after(tmp_path, page.cursor)
    assert said(page.lines) == ["b", "new", "c"]
    assert said(after(tmp_path, page.cursor).lines) == []


def test_a_file_that_is_rotated_all_the_while_is_followed_line_by_line(tmp_path: Path) -> None:
    """The writer is the real one; it waits only where a file would go that the reader has not come to."""
    log = LogFile(tmp_path / "w0.jsonl", rotate_bytes=500, kept=8)
    followed: list[str] = []
    page, lines = newest(tmp_path), 1000
    came = threading.Condition()

    def near(number: int) -> Callable[[], bool]:
        return lambda: number - len(followed) < 20

    def write() -> None:
        for number in range(lines):
            with came:
                assert came.wait_for(near(number), timeout=60)
            log.write(entry(number, str(number)).encode())

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive() or page.lines:
        page = after(tmp_path, page.cursor)
        with came:
            followed += said(page.lines)
            came.notify()
    writer.join()
    followed += said(after(tmp_path, page.cursor).lines)
    assert followed == [str(number) for number in range(lines)]


def test_files_that_do_not_stand_still_are_left_for_the_next_page_which_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "w0.jsonl.1", entry(0, "a"))
    put(tmp_path, "w0.jsonl", entry(1, "b"))
    put(tmp_path, "w1.jsonl", entry(2, "c"))
    listed, count = files._listed, itertools.count()

    def moving(folder: Path) -> dict[str, list[tuple[int, files.Part]]]:
        found = listed(folder)
        if next(count) % 2:
            del found["w0.jsonl"][0]
        return found

    with monkeypatch.context() as patch:
        patch.setattr(files, "_listed", moving)
        page = after(tmp_path, start(tmp_path))
        assert (said(page.lines), page.complete) == (["c"], False)
    page = after(tmp_path, page.cursor)
    assert (said(page.lines), page.complete) == (["a", "b"], True)


@pytest.mark.parametrize("numbers", [(0, 1, 3), (2, 3), (0, 2)])
def test_files_that_lack_are_believed_to_lack_when_all_listings_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: tuple[int, ...]
) -> None:
    """While a file is on its way from one name to the next its number is lacking, too."""
    for number in range(4):
        put(tmp_path, f"w0.jsonl.{number}" if number else "w0.jsonl", entry(-number, str(number)))
    listed, count = files._listed, itertools.count()

    def lacking(folder: Path) -> dict[str, list[tuple[int, files.Part]]]:
        found = listed(folder)
        if next(count) < 3:
            found["w0.jsonl"] = [(number, part) for number, part in found["w0.jsonl"] if number in numbers]
        return found

    with monkeypatch.context() as patch:
        patch.setattr(files, "_listed", lacking)
        assert said(newest(tmp_path).lines) == list("3210")
    for number in {0, 1, 2, 3} - set(numbers):
        (tmp_path / (f"w0.jsonl.{number}" if number else "w0.jsonl")).unlink()
    assert said(newest(tmp_path).lines) == [str(number) for number in reversed(numbers)]
    assert said(after(tmp_path, start(tmp_path)).lines) == [str(number) for number in reversed(numbers)]


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_written_between_two_looks_at_files_no_line_is_passed_over_or_told_twice(
    tmp_path: Path, seed: int
) -> None:
    """Names come in any order, and before each is looked at up to four rotations run through the folder."""
    drawn = random.Random(seed)
    log = LogFile(tmp_path / "w0.jsonl", rotate_bytes=500, kept=8)
    followed: list[str] = []
    written, lines = 0, 150
    look = files._regular

    def write(most: int) -> None:
        nonlocal written
        for _ in range(min(most, 20 + len(followed) - written, lines - written)):
            log.write(entry(written, str(written)).encode())
            written += 1

    def interrupted(path: Path) -> Iterator[tuple[str, os.stat_result]]:
        names = sorted(name for name, _ in look(path))
        for name in drawn.sample(names, len(names)):
            write(drawn.choice([0, 0, 0, 3, 5, 20]))
            with contextlib.suppress(FileNotFoundError):
                yield name, os.stat(path / name)

    page = newest(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_regular", interrupted)
        while written < lines:
            write(1)
            page = after(tmp_path, page.cursor)
            followed += said(page.lines)
    while len(followed) < lines:
        page = after(tmp_path, page.cursor)
        assert page.lines, "it stands still"
        followed += said(page.lines)
    assert followed == [str(number) for number in range(lines)]


def test_what_has_no_end_yet_is_no_line(tmp_path: Path) -> None:
    path = put(tmp_path, "w0.jsonl", entry(0, "a"), entry(1, "b")[:-5])
    page = newest(tmp_path)
    assert said(page.lines) == ["a"]
    with path.open("a") as file:
        file.write(entry(1, "b")[-5:])
    assert said(after(tmp_path, page.cursor).lines) == ["b"]


def test_pages_of_after_make_the_whole(tmp_path: Path) -> None:
    for member in ("w0", "w1", "p0"):
        put(tmp_path, f"{member}.jsonl", *(entry(n, f"{member} {n}") for n in range(20)))
    cursor, whole = start(tmp_path), []
    while (page := after(tmp_path, cursor, most=7)).lines:
        whole += page.lines
        cursor = page.cursor
    assert whole == newest(tmp_path, most=1000).lines
    assert len(whole) == 60


def test_junk_is_shown_harmless_with_the_time_of_its_neighbour(tmp_path: Path) -> None:
    put(tmp_path, "w0.jsonl", entry(1, "a"))
    with (tmp_path / "w0.jsonl").open("ab") as file:
        file.write(b"\x00\xff\x1b[2Jboo\xe2\x80\xae\n" + b"[1]\n" + b'{"time": 3\n' + b"[" * 90_000 + b"\n")
    put(tmp_path, "w0.jsonl", entry(2, "b"))
    lines = newest(tmp_path).lines
    assert said(lines)[:2] == ["a", "��boo�"]
    assert said(lines)[2:4] == ["[1]", '{"time": 3']
    assert len(lines[4].message) == 2000
    assert {line.time for line in lines[1:5]} <= {T0 + 1, T0 + 2}
    assert all(line.level == "info" for line in lines)


def test_control_characters_in_texts_and_fields_move_no_cursor(tmp_path: Path) -> None:
    bad = "x\x1b[31mred\x1b[0m\x1b]0;title\x07\u202eevil\x08\ud800"
    fields: dict[str, Any] = {"k\x1b": [bad, {"a\n": bad}]}
    put(tmp_path, "w0.jsonl", entry(0, bad, **fields))
    (line,) = newest(tmp_path).lines
    assert line.message == "xred�evil��"
    assert dict(line.fields) == {"k": ["xred�evil��", {"a\n": "xred�evil��"}]}


def test_a_line_of_any_length_costs_little_and_is_named(tmp_path: Path) -> None:
    huge = entry(1, "x" * (3 * files.LINE_MOST))
    put(tmp_path, "w0.jsonl", entry(0, "a"), huge, entry(2, "b"))
    for lines in (newest(tmp_path).lines, after(tmp_path, start(tmp_path)).lines):
        assert said(lines)[::2] == ["a", "b"]
        assert f"{len(huge):,} bytes" in lines[1].message


def test_only_regular_files_of_the_folder_are_read(tmp_path: Path) -> None:
    secret = put(tmp_path / "elsewhere", "secret.jsonl", entry(0, "secret"))
    logs = tmp_path / "logs"
    put(logs, "w0.jsonl", entry(0, "a"))
    (logs / "w1.jsonl").symlink_to(secret)
    os.mkfifo(logs / "w2.jsonl")
    (logs / "w3.jsonl").mkdir()
    (logs / "join-9").mkdir()
    put(logs / "join-9", "w4.log.jsonl", entry(1, "joined"))
    assert said(newest(logs).lines) == ["a", "joined"]


def test_there_may_be_nothing(tmp_path: Path) -> None:
    page = newest(tmp_path / "none")
    assert page.lines == [] and page.complete
    put(tmp_path / "none", "w0.jsonl", entry(0, "a"))
    assert said(after(tmp_path / "none", page.cursor).lines) == ["a"]


def test_a_budget_bounds_the_search_and_it_is_said(tmp_path: Path) -> None:
    put(tmp_path, "w0.jsonl", entry(0, "needle"), *(entry(n + 1, "hay") for n in range(500)))
    few = newest(tmp_path, Wanted(text="needle"), budget_bytes=5000)
    assert (few.lines, few.complete) == ([], False)
    all_ = newest(tmp_path, Wanted(text="needle"), budget_bytes=500_000)
    assert (said(all_.lines), all_.complete) == (["needle"], True)


@pytest.mark.parametrize("cursor", ["", "!", "x" * 100, "é", "eJwDAAAAAAE", "eJyrVkpUslIwNDIGAA0XAtg"])
def test_a_text_that_is_no_cursor_is_refused(tmp_path: Path, cursor: str) -> None:
    with pytest.raises(BadCursor):
        after(tmp_path, cursor)


def test_a_cursor_cannot_be_a_bomb(tmp_path: Path) -> None:
    import base64
    import zlib

    bomb = zlib.compress(b'{"a":[' + b"1," * (8 << 20) + b"1]}", 9)
    with pytest.raises(BadCursor):
        after(tmp_path, base64.urlsafe_b64encode(bomb).decode())


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_make_a_line_that_can_be_printed(raw: bytes) -> None:
    line = parse(raw.replace(b"\n", b""), "w0", 1.0)
    if line is not None:
        line.message.encode()
        assert not ansi.HARMFUL.search(line.message)
        "".join(logreading.details(line)).encode()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(), v, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.sampled_from(["time", "level", "message", "id", "role", "step", "exception", "x"]), values
    )
)
def test_any_object_makes_a_line_that_can_be_printed(found: dict[str, Any]) -> None:
    line = parse(json.dumps(found).encode(), "w0", 1.0)
    assert line is not None
    text = "\n".join([line.member, line.role, logreading.searched(line), *logreading.failure(line)])
    text.encode()
    assert not ansi.HARMFUL.search(text)
    assert line.level in logreading.LEVELS
    assert Wanted(text="x", steps=(0, 3), level="error").takes(line) in (True, False)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["w0", "w1", "p0"]), st.integers(0, 50), st.integers(0, 300)), max_size=60
    ),
    st.integers(1, 70),
    st.sampled_from([7, 64, 1024]),
    st.integers(0, 3),
)
def test_however_it_is_cut_and_rotated_the_merge_is_the_sorted_whole(
    tmp_path_factory: pytest.TempPathFactory,
    events: list[tuple[str, int, int]],
    most: int,
    block: int,
    rotations: int,
) -> None:
    """Against the plain way: all lines in memory, sorted."""
    folder = tmp_path_factory.mktemp("logs")
    clock = dict.fromkeys(("w0", "w1", "p0"), 0.0)
    whole: list[tuple[float, str]] = []
    cursor, followed = start(folder), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK", block)
        for number, (member, later, length) in enumerate(events):
            clock[member] = int(clock[member]) + later + number / 1000  # no two at one time
            message = f"{number} {'x' * length}"
            put(folder, f"{member}.jsonl", entry(clock[member], message, member))
            whole.append((T0 + clock[member], message))
            if rotations and number % 20 == 19:
                for old in range(3, 0, -1):
                    if (folder / f"w0.jsonl.{old}").exists():
                        os.rename(folder / f"w0.jsonl.{old}", folder / f"w0.jsonl.{old + 1}")
                if (folder / "w0.jsonl").exists():
                    os.rename(folder / "w0.jsonl", folder / "w0.jsonl.1")
            if number % 9 == 8:
                page = after(folder, cursor, most=most)
                followed += said(page.lines)
                cursor = page.cursor
        whole.sort(key=lambda each: round(each[0] * 1e6))
        assert said(newest(folder, most=most).lines) == [message for _, message in whole][-most:]
        assert said(after(folder, start(folder), most=1000).lines) == [message for _, message in whole]
        since = T0 + 100
        late = [message for when, message in whole if when >= since]
        assert said(after(folder, start(folder, since), Wanted(since=since)).lines) == late
        followed += said(after(folder, cursor, most=1000).lines)
        assert sorted(followed) == sorted(message for _, message in whole)  # each once
