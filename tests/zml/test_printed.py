"""What scripts print: lines of two streams, as text and as objects, whatever they print."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zml.agent.child import Child
from zml.logs import outlets as logs
from zml.logs import printed
from zml.logs.printed import Levels, Piece, Printed, Splitter


def split(*chunks: bytes, every_s: float = 1.0) -> list[Piece]:
    splitter = Splitter()
    pieces = [piece for n, chunk in enumerate(chunks) for piece in splitter.feed(chunk, n * every_s)]
    return pieces + splitter.end()


def lines(*chunks: bytes, every_s: float = 1.0) -> list[bytes]:
    return [piece.text for piece in split(*chunks, every_s=every_s)]


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([b"a\nb\n"], [b"a", b"b"]),
        ([b"a", b"b\nc"], [b"ab", b"c"]),
        ([b"a\r\nb\r", b"\n"], [b"a", b"b"]),
        ([b"\r 10%", b"\r 50%", b"\r100%\n", b"done\n"], [b"100%", b"done"]),
        ([b" 10%\r", b" 50%\r", b"done\n"], [b"done"]),
        ([b"\r 99%\r     \r", b"next\n"], [b"next"]),
        ([b"\n\n"], [b"", b""]),
        ([b"no end"], [b"no end"]),
        ([b"bar 3\r"], [b"bar 3"]),
        ([], []),
    ],
)
def test_lines_are_what_a_terminal_shows_in_the_end(chunks: list[bytes], expected: list[bytes]) -> None:
    assert lines(*chunks) == expected


def test_a_bar_that_is_redrawn_for_long_is_told_now_and_then() -> None:
    chunks = [b"\r%d%%" % n for n in range(100)]
    assert lines(*chunks, b"\nend\n") == [b"30%", b"60%", b"90%", b"99%", b"end"]
    assert lines(b"waits for more", *[b"." for _ in range(100)]) == [b"waits for more" + b"." * 100]


def test_a_long_line_goes_in_pieces_between_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(printed, "PIECE_BYTES", 8)
    pieces = split("aaaaaaaüüü€\nb\n".encode())
    assert pieces == [
        Piece(b"aaaaaaa", ends=False),
        Piece("üüü".encode(), ends=False),
        Piece("€".encode()),
        Piece(b"b"),
    ]
    assert split(*[b"x" * 5] * 4) == [Piece(b"x" * 8, False), Piece(b"x" * 8, False), Piece(b"xxxx")]


@settings(deadline=None)
@given(st.lists(st.text(alphabet="ab\ré€", max_size=12)), st.lists(st.integers(1, 9)))
def test_however_it_is_cut_the_lines_are_the_same_and_little_is_held(
    texts: list[str], cuts: list[int]
) -> None:
    data = b"".join(text.encode() + b"\n" for text in texts)
    chunks, at = [], 0
    for cut in cuts:
        chunks.append(data[at : at + cut])
        at += cut
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(printed, "PIECE_BYTES", 8)
        splitter = Splitter()
        pieces = []
        for chunk in [*chunks, data[at:]]:
            pieces += splitter.feed(chunk, 0.0)
            assert len(splitter.rest) <= 9
        pieces += splitter.end()
    whole = [text.rstrip("\r").rpartition("\r")[2] for text in texts]
    # Of a line that is rewritten, what was too long to be kept has been told before.
    told = b"".join(piece.text + b"\n" * piece.ends for piece in pieces).decode().split("\n")[:-1]
    assert len(told) == len(whole)
    assert all(line.endswith(end) for line, end in zip(told, whole, strict=True))
    if all(len(text.encode()) <= 8 for text in texts):
        assert told == whole


def test_what_looks_like_a_warning_or_an_error_is_one() -> None:
    of = Levels().of
    said = {
        "epoch 1: loss 2.3": "info",
        "WARNING:root:careful": "warning",
        "2026-03-01 12:00:00,123 - WARNING - careful": "warning",
        "2026-03-01 12:00:00.123 | ERROR    | __main__:f:3 - no": "error",
        "[12:00:00] [my.module] fine": "info",
        "my.module - CRITICAL: no": "error",
        "2026-03-01 12:00:00 WARNING careful": "warning",
        "[W1127 02:17:14.329 socket.cpp:697] [c10d] no client": "warning",
        "[rank0]:[E1127 02:17:14.329 ProcessGroup.cpp:5] gone": "error",
        "/home/u/train.py:3: UserWarning: careful": "warning",
        "ERROR: no": "error",
        "errors: 0": "info",
        "no WARNING here, only in the middle of a sentence": "info",
        "Fatal Python error: Segmentation fault": "error",
        "Warnings are off": "info",
    }
    assert {line: of(line) for line in said} == said


def test_a_traceback_is_an_error_as_a_whole() -> None:
    text = """before
Traceback (most recent call last):
  File "train.py", line 3, in <module>
    raise ValueError("no")
ValueError: no

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "train.py", line 5, in <module>
    x
zml.errors.ZmlError: E
after"""
    of = Levels().of
    assert [of(line)[0] for line in text.split("\n")] == list("ieeeeiiieeeei")


def objects(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_text_is_as_it_was_and_the_objects_have_no_colours(tmp_path: Path) -> None:
    out = Printed(tmp_path / "w0.out", logs.about("script", "w0", "job", "r", 5))
    assert out.write("stdout", [Piece(b"\x1b[32mok\x1b[0m \xff"), Piece(b"long", ends=False)], step=3) == [
        "\x1b[32mok\x1b[0m �",
        "long",
    ]
    out.write("stderr", [Piece(b"er")])
    out.write("stdout", [Piece(b"long", ends=False)])
    out.write("stdout", [Piece(b"er")])
    assert (tmp_path / "w0.out").read_text() == "\x1b[32mok\x1b[0m �\nlong\ner\nlonger\n"
    first, second, third, *_ = objects(tmp_path / "w0.out.jsonl")
    about = {"level": "info", "run": "r", "job": "job", "role": "script", "id": "w0", "pid": 5}
    for line in (first, second, third):
        assert line.items() >= about.items()
    assert (first["message"], first["stream"], first["step"]) == ("ok �", "stdout", 3)
    assert (second["message"], second["goes_on"]) == ("long", True)
    assert (third["message"], third["stream"], "step" in third) == ("er", "stderr", False)


def test_both_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(printed, "TEXT_BYTES", 1000)
    monkeypatch.setattr(logs, "ROTATE_BYTES", 2000)
    out = Printed(tmp_path / "w0.out", {"id": "w0"})
    for number in range(500):
        out.write("stdout", [Piece(b"line %d" % number)])
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"w0.out", "w0.out.1", *(f"w0.out.jsonl{end}" for end in ("", ".1", ".2", ".3"))}
    assert sizes["w0.out"] + sizes["w0.out.1"] <= 2000
    assert max(sizes.values()) <= 2000


def test_nothing_printed_is_no_file(tmp_path: Path) -> None:
    out = Printed(tmp_path / "p0.log", {})
    assert out.write("stderr", []) == []
    out.close()
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import os, sys
print("to out")
print("to err", file=sys.stderr)
for n in range(3):
    print(f"bar {n}", end="\\r")
print("\\x1b[31mred\\x1b[0m")
os.write(1, b"x" * 100_000 + b"\\n")
os.write(1, b"no end")
"""


def run(script: str, out: Printed) -> tuple[int, Child]:
    """The exit code, and the child of the agent that it was."""

    async def main() -> tuple[int, Child]:
        child = Child(lambda: None)
        return await child.run([sys.executable, "-u", "-c", script], None, dict(os.environ), out), child

    return asyncio.run(main())


def test_of_a_process_each_line_is_of_its_stream_and_the_rest_comes_at_its_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w0.out"
    code, child = run(SCRIPT, Printed(path, logs.about("script", "w0", "", "")))
    assert code == 0
    said = path.read_text()
    assert {"to out", "to err", "\x1b[31mred\x1b[0m", "no end"} <= set(said.splitlines())
    assert said.count("x") == 100_000 and "bar" not in said
    found = objects(tmp_path / "w0.out.jsonl")
    assert [line["message"] for line in found if line["stream"] == "stderr"] == ["to err"]
    out_lines = [line["message"] for line in found if line["stream"] == "stdout"]
    assert out_lines[:2] + out_lines[-1:] == ["to out", "red", "no end"]
    assert "".join(line for line in out_lines[2:-1]) == "x" * 100_000
    assert max(len(line) for line in out_lines) <= printed.PIECE_BYTES
    assert {line["pid"] for line in found} == {child.process.pid if child.process else 0}
    assert child.tail[-1] == "no end"
    assert "to out\n" in capfd.readouterr().out


def test_output_that_cannot_be_kept_costs_the_output_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("w0.out", "w0.out.jsonl"):
        (tmp_path / name).symlink_to("/dev/full")
    assert run("print('hello')", Printed(tmp_path / "w0.out", {}))[0] == 0
    said = capfd.readouterr()
    assert said.out == "hello\n"
    assert said.err.count("No space left on device") == 2
