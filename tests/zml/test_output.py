"""What processes print on a node that does not see the coordinator's folder arrives there whole, and only once."""

import asyncio
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.simulation import simulate
from tests.zml.hub import FakeCluster
from zml.cluster import storing
from zml.cluster.sending import LAST_S, Sender, Tail, parts_of
from zml.cluster.storing import CUT, Outputs, Part, fitting, is_output
from zml.cluster.wire import OUTPUT_BYTES, Output, Stored
from zml.lease import NO_ROOM
from zml.logs.logfile import LogFile
from zml.logs.reading.files import Part as File
from zml.transport import Refusal, Refused

ROOM = 1 << 40


# -- what comes next, and what is taken ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "at", "length", "room", "part"),
    [
        (0, 0, 5, ROOM, Part(0, 5, False)),
        (5, 5, 5, ROOM, Part(0, 5, False)),
        (5, 0, 5, ROOM, Part(5, 0, False)),  # twice
        (5, 3, 5, ROOM, Part(2, 3, False)),  # half of it is there
        (5, 0, 2, ROOM, Part(2, 0, False)),  # an old one comes late
        (5, 6, 5, ROOM, Part(0, 0, False)),  # what comes before it is lacking
        (5, 5, 5, 3, Part(0, 3, True)),
        (5, 5, 5, 0, Part(0, 0, True)),
        (5, 5, 5, -7, Part(0, 0, True)),
        (5, 0, 5, 0, Part(5, 0, False)),
    ],
)
def test_what_joins_on_is_taken_and_what_is_there_counts_once(
    size: int, at: int, length: int, room: int, part: Part
) -> None:
    assert fitting(size, at, length, room) == part


class Disk:
    """A coordinator's file, without the disk. It may lose its end, as a machine that dies does."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, at: int, piece: bytes) -> Stored:
        if at >= 0:
            part = fitting(len(self.data), at, len(piece), ROOM)
            self.data += piece[part.skipped : part.skipped + part.taken]
        return Stored(len(self.data), False)


class Rotated:
    """A process's files, without the disk."""

    def __init__(self) -> None:
        self.files = [b""]
        self.former = 0

    def parts(self) -> list[File]:
        return [File(Path("w0.out"), 100 + n, len(data), 0.0) for n, data in enumerate(self.files)]

    def read(self, part: File, offset: int, size: int) -> bytes:
        return self.files[part.inode - 100][offset : offset + size]


SENDING = st.tuples(
    st.just("send"),
    st.sampled_from(["arrives", "is lost", "its answer is lost", "is late", "meets a dead machine"]),
    st.integers(1, 9),
)
DOING = st.one_of(
    st.tuples(st.just("write"), st.binary(min_size=1, max_size=12), st.just(0)),
    st.tuples(st.just("rotate"), st.just(""), st.just(0)),
    st.tuples(st.just("an old piece comes"), st.just(""), st.integers(0, 50)),
    SENDING,
)


@given(before=st.binary(max_size=9), doing=st.lists(DOING, max_size=60))
def test_whatever_happens_to_pieces_the_file_is_what_was_written(
    before: bytes, doing: list[tuple[str, Any, int]]
) -> None:
    """Lost, doubled, late, reordered; over rotations, and behind what the process wrote on another node."""
    disk, here, tail = Disk(before), Rotated(), Tail("w0.out")
    safe = len(before)  # bytes that a machine that dies does not lose: older files here are not gone back to
    old: list[tuple[int, bytes]] = []

    def piece(size: int) -> tuple[int, bytes] | None:
        part = tail.next(here.parts())
        if part is None:
            return None
        return (tail.at, here.read(part, tail.offset, size)) if tail.at >= 0 else (-1, b"")

    for what, how, number in doing:
        if what == "write":
            here.files[-1] += how
        elif what == "rotate":
            here.files.append(b"")
        elif what == "an old piece comes" and old:
            disk.take(*old[number % len(old)])
        elif what == "send" and (sent := piece(number)) is not None:
            if how == "meets a dead machine" and tail.at > 0:
                back = min(number, tail.offset, len(disk.data) - safe)
                disk.data = disk.data[: len(disk.data) - max(back, 0)]
            if how in ("arrives", "meets a dead machine"):
                tail.answered(disk.take(*sent))
            elif how == "its answer is lost":
                disk.take(*sent)
            old += [sent] if how != "is lost" else []
    while (sent := piece(5)) is not None:
        tail.answered(disk.take(*sent))
    assert disk.data == before + b"".join(here.files)
    assert tail.behind == 0


def test_a_process_that_is_started_here_anew_sends_only_what_it_writes_itself() -> None:
    former = [File(Path("w0.out.1"), 7, 100, 0.0), File(Path("w0.out"), 8, 30, 0.0)]
    tail = Tail("w0.out", former)
    assert tail.next(former) is None
    grown = [former[0], File(Path("w0.out"), 8, 31, 0.0)]
    assert tail.next(grown) == grown[1] and tail.offset == 30 and tail.behind == 1


def test_what_was_rotated_away_or_emptied_is_not_waited_for() -> None:
    tail = Tail("w0.out", [File(Path("w0.out"), 1, 10, 0.0)])
    parts = [File(Path("w0.out.1"), 5, 3, 0.0), File(Path("w0.out"), 6, 4, 0.0)]
    assert tail.next(parts) == parts[0] and (tail.offset, tail.behind, tail.missed) == (0, 7, True)
    tail.offset = 3
    assert tail.next([parts[0], File(Path("w0.out"), 6, 2, 0.0)]) is not None and tail.offset == 0


# -- the coordinator's files -----------------------------------------------------------------------------------


def output(name: str = "w0.out", at: int = 0, slot: str = "w0") -> Output:
    return Output("n1", "j1.1", slot, name, at)


def take(outputs: Outputs, folder: Path, message: Output, data: bytes) -> Stored:
    return simulate(outputs.take(message, data, folder))


@pytest.mark.parametrize("kind", ["out", "out.jsonl", "jsonl", "script.jsonl", "log", "log.jsonl"])
def test_outputs_have_names_of_a_known_shape(kind: str) -> None:
    assert is_output(f"w12.{kind}", "w12") and is_output(f"p0.{kind}", "p0")
    assert not is_output(f"w1.{kind}", "w12") and not is_output(f"w12.{kind}.1", "w12")


@pytest.mark.parametrize(
    "name",
    [
        "", "w0", "w0.", "../w0.out", "w0.out/../x", "/w0.out", "w0.out\n", "w0.out\0", "w0.failure.json", "w0.OUT",
        "coordinator.jsonl", ".w0.out", f"w{'1' * 300}.out", "ẘ0.out", "w٣.out",
    ],
)  # fmt: skip
def test_no_other_file_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(Refusal) as refused:
        take(Outputs(), tmp_path, output(name, slot=name.partition(".")[0]), b"x")
    assert refused.value.code == "output" and list(tmp_path.iterdir()) == []


def test_a_piece_has_a_limit(tmp_path: Path) -> None:
    for message, data in ((output(), bytes(OUTPUT_BYTES + 1)), (output(at=-2), b"x")):
        with pytest.raises(Refusal, match="no piece"):
            take(Outputs(), tmp_path, message, data)
    assert list(tmp_path.iterdir()) == []


def a_link(path: Path) -> None:
    (path.parent / "elsewhere").write_bytes(b"")
    path.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize("make", [a_link, Path.mkdir, os.mkfifo])
def test_what_is_no_regular_file_is_not_followed(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "w0.out")
    with pytest.raises(Refusal) as refused:
        take(Outputs(), tmp_path, output(), b"x")
    assert refused.value.code == "output"
    elsewhere = tmp_path / "elsewhere"
    assert not elsewhere.exists() or elsewhere.read_bytes() == b""


def test_a_folder_that_is_a_link_or_not_there_yet_gets_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for name in ("link", "not-there-yet"):
        with pytest.raises(Refusal):
            take(Outputs(), tmp_path / name, output(), b"x")
    assert list((tmp_path / "there").iterdir()) == [] and not (tmp_path / "not-there-yet").exists()


def test_a_coordinator_that_is_started_again_goes_on_where_its_file_ends(tmp_path: Path) -> None:
    assert take(Outputs(), tmp_path, output(at=-1), b"") == Stored(0, False)
    assert not (tmp_path / "w0.out").exists(), "a question makes no file"
    assert take(Outputs(), tmp_path, output(at=0), b"one\n") == Stored(4, False)
    assert take(Outputs(), tmp_path, output(at=-1), b"") == Stored(4, False)
    assert take(Outputs(), tmp_path, output(at=0), b"one\ntwo\n") == Stored(8, False)
    assert take(Outputs(), tmp_path, output(at=9), b"four\n") == Stored(8, False)
    assert (tmp_path / "w0.out").read_bytes() == b"one\ntwo\n"


def test_a_file_that_is_full_says_so_once(tmp_path: Path) -> None:
    for name in ("w0.out", "w0.jsonl"):
        for _ in range(3):  # a coordinator that was started again, too
            stored = take(Outputs(file_bytes=1 << 20), tmp_path, output(name), b"a" * 1000)
            assert stored == Stored(1000, False)
        for at in range(1000, (1 << 20) + 1000, OUTPUT_BYTES):
            stored = take(Outputs(file_bytes=1 << 20), tmp_path, output(name, at), b"b" * OUTPUT_BYTES)
        assert stored.full
        again = take(Outputs(file_bytes=1 << 20), tmp_path, output(name, at), b"b" * OUTPUT_BYTES)
        assert again == stored == Stored((tmp_path / name).stat().st_size, True)
        *_, line = (tmp_path / name).read_text().splitlines()
        said = json.loads(line)["message"] if name.endswith("l") else line
        assert said == f"{CUT}: the coordinator keeps 1 MB of a file"
        assert stored.bytes < (1 << 20) + 200


def test_an_attempt_has_a_limit_over_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "p0.jsonl").write_bytes(bytes(600))  # from before it was started again
    outputs = Outputs(attempt_bytes=1000)
    assert take(outputs, tmp_path, output("w0.out"), b"a" * 300) == Stored(300, False)
    assert take(outputs, tmp_path, output("w1.out", slot="w1"), b"b" * 300).full
    assert (tmp_path / "w1.out").read_bytes().startswith(b"b" * 100 + b"\n" + CUT.encode())
    assert take(outputs, tmp_path, output("w2.out", slot="w2"), b"c").full
    assert (tmp_path / "w2.out").read_bytes().startswith(CUT.encode())


def test_a_full_disk_is_said_once_and_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, said, left = Outputs(), [], [3]
    monkeypatch.setattr(storing.log, "warning", lambda event, **more: said.append(event))
    write = os.write

    def full(file: int, data: Any) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = write(file, data[: left[0]])
        left[0] -= count
        return count

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        for _ in range(3):
            with pytest.raises(Refusal, match="No space left") as refused:
                take(outputs, tmp_path, output(), b"hello\n")
            assert refused.value.code == NO_ROOM
    assert said == ["output is not kept"]
    assert take(outputs, tmp_path, output(), b"hello\n") == Stored(6, False)
    assert (tmp_path / "w0.out").read_bytes() == b"hello\n"


# -- a node and a coordinator ----------------------------------------------------------------------------------


def test_all_output_arrives_over_a_bad_network_rotations_and_a_coordinator_that_is_killed(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path / "cluster", script_s=600.0)
        (tmp_path / "cluster").mkdir()
        await cluster.start()
        node = cluster.node("n1")
        job = cluster.submit()
        await cluster.until_state(job, "RUNNING")
        cluster.network.loss = cluster.network.duplication = 0.1
        sender = Sender("n1", node.endpoint, lambda: True)
        logs = tmp_path / "node"
        await sender.follow(f"{job}.1", "w0", logs)
        sending = asyncio.ensure_future(sender.run())
        text = LogFile(logs / "w0.out", rotate_bytes=4000, kept=2)
        lines = LogFile(logs / "w0.jsonl", rotate_bytes=1 << 20, kept=3)
        wrote = {"w0.out": b"", "w0.jsonl": b""}
        for step in range(120):
            for name, file in (("w0.out", text), ("w0.jsonl", lines)):
                line = b"%s step %d %s\n" % (name.encode(), step, b"." * (step % 50))
                file.write(line)
                wrote[name] += line
            await asyncio.sleep(0.3)
            if step == 40:
                await cluster.kill()
            if step == 60:
                await cluster.start()
        text.close()
        lines.close()
        await sender.finish(f"{job}.1", "w0")
        there = cluster.hub.attempts.run_dir(job, 1) / "logs"
        assert {name: (there / name).read_bytes() for name in wrote} == wrote
        assert len(parts_of(logs / "w0.out")) > 1 and not (there / "w0.out.1").exists()
        assert cluster.desk.job(job).state == "RUNNING", "its node was heard all the time"
        assert not sender.followed
        sending.cancel()
        await cluster.close()

    simulate(main())


def test_a_node_writes_for_nobody_but_who_runs_there(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path, script_s=600.0)
        await cluster.start()
        one = cluster.node("n1", cpus=1)
        job = cluster.submit()
        await cluster.until_state(job, "RUNNING")
        other = cluster.node("n2")
        await cluster.until(lambda: "n2" in cluster.hub.nodes.peers, "n2 is there")
        attempt = f"{job}.1"
        for node, message, code in (
            (other, Output("n2", attempt, "w0", "w0.out", 0), "elsewhere"),
            (other, Output("n1", attempt, "w0", "w0.out", 0), "strange"),
            (one, Output("n1", f"{job}.2", "w0", "w0.out", 0), "elsewhere"),
            (one, Output("n1", "../x.1", "w0", "w0.out", 0), "elsewhere"),
            (one, Output("n1", attempt, "w9", "w9.out", 0), "elsewhere"),
            (one, Output("n1", attempt, "w0", "p0.out", 0), "output"),
        ):
            with pytest.raises(Refused) as refused:
                await node.endpoint.request("coordinator", message, b"x", timeout_s=5.0)
            assert refused.value.code == code, message
        assert not list(tmp_path.rglob("*.out"))
        await cluster.close()

    simulate(main())


class Silent:
    """Answers nothing, or not what was hoped for."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def request(self, *args: Any, timeout_s: float) -> Any:
        raise self.error


@pytest.mark.parametrize(("code", "least_s"), [(NO_ROOM, LAST_S), ("elsewhere", 0.0), ("output", 0.0)])
def test_the_end_of_a_process_waits_for_its_last_bytes_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, least_s: float
) -> None:
    said: list[dict[str, Any]] = []
    from zml.cluster import sending

    monkeypatch.setattr(sending.log, "warning", lambda event, **more: said.append({"event": event, **more}))

    async def main() -> float:
        sender = Sender("n1", Silent(Refused("coordinator", code, "its disk is full")), lambda: True)  # type: ignore[arg-type]
        await sender.follow("j1.1", "w0", tmp_path)
        running = asyncio.ensure_future(sender.run())
        (tmp_path / "w0.out").write_bytes(b"hello\n")
        began = asyncio.get_running_loop().time()
        await sender.finish("j1.1", "w0")
        running.cancel()
        return asyncio.get_running_loop().time() - began

    took = simulate(main())
    assert least_s <= took < least_s + 3.0
    assert said[0]["event"] == "output is not taken"
    if least_s:
        (late,) = said[1:]
        assert (late["bytes"], late["because"], late["lies_in"]) == (
            {"w0.out": 6},
            "its disk is full",
            str(tmp_path),
        )


def test_time_in_which_the_coordinator_is_away_does_not_count_unless_the_node_ends(tmp_path: Path) -> None:
    async def main() -> None:
        heard = [False]
        sender = Sender("n1", Silent(Refused("coordinator", NO_ROOM, "not now")), lambda: heard[0])  # type: ignore[arg-type]
        running = asyncio.ensure_future(sender.run())
        for hurried in (False, True):
            await sender.follow("j1.1", "w0", tmp_path)
            with (tmp_path / "w0.out").open("ab") as file:
                file.write(b"hello\n")
            finishing = asyncio.ensure_future(sender.finish("j1.1", "w0"))
            await asyncio.sleep(20 * LAST_S)
            assert not finishing.done()
            if hurried:
                sender.hurried = True
            else:
                heard[0] = True
            await finishing
            heard[0] = False
        running.cancel()

    simulate(main())
