"""A writer that is stopped at each of its calls in turn: by an error, by a kill, by a power cut.

Each case is one call of one checkpoint, counted; the former checkpoint must stay what it was, and a new one
counts only if it is whole. Nothing here depends on time or luck: a case is its number.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.zml.checkpoints import make, numbers, registration
from tests.zml.test_checkpoint import same
from zml import errors
from zml.checkpoint import Disk, Entry, Writer, entries, newest, prune, read, shard_metadata, write_shard_file
from zml.errors import ZmlError

CALLS = frozenset(name for name in vars(Disk) if not name.startswith("_"))
NEVER = 10**9


class Killed(BaseException):
    """The process is no more: neither handlers of exceptions nor anything else of it runs on."""


@dataclass
class Open:
    """A file or a folder that was opened: what of it would survive a power cut."""

    handle: int
    written: int = 0
    synced: int = 0


class Power(Disk):
    """A disk that counts calls, does at call `at` what `how` says, and can forget what was not synced.

    `how`: an error number for that call ("for ever": for all after it, too), or "kill". A write that is killed or that
    finds the disk full has written half. fsync is remembered instead of done.
    """

    def __init__(self, at: int = NEVER, how: int | str = "kill", for_ever: bool = False) -> None:
        self.at = at
        self.how = how
        self.for_ever = for_ever
        self.calls = 0
        self.files: dict[int, Open] = {}
        self.folders: dict[int, int] = {}  # handles of the writer -> inodes
        self.kept: list[int] = []  # handles of ours
        self.unsynced: list[
            tuple[int, Callable[[], None]]
        ] = []  # inode of the folder, how the change is undone

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.at or (self.calls > self.at and (self.for_ever or self.how == "kill")):
            if isinstance(self.how, int):
                raise OSError(self.how, os.strerror(self.how))
            raise Killed

    def _folder(self, path: Path) -> tuple[int, int]:
        """A handle of ours, by which the folder is found even when it was renamed; and its inode."""
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self.kept.append(handle)
        return handle, os.fstat(handle).st_ino

    def mkdir(self, path: Path) -> None:
        self._count()
        super().mkdir(path)
        handle, inode = self._folder(path.parent)
        self.unsynced.append((inode, lambda: os.rmdir(path.name, dir_fd=handle)))

    def create(self, path: Path) -> int:
        self._count()
        made = super().create(path)
        self.files[made] = Open(os.dup(made))
        self.kept += [made, self.files[made].handle]
        handle, inode = self._folder(path.parent)
        self.unsynced.append((inode, lambda: os.unlink(path.name, dir_fd=handle)))
        return made

    def open_folder(self, path: Path) -> int:
        self._count()
        handle, inode = self._folder(path)
        self.folders[handle] = inode
        return handle

    def write(self, handle: int, data: Any) -> int:
        half = memoryview(data)[: max(1, len(data) // 2)]
        try:
            self._count()
        except BaseException:
            self.files[handle].written += super().write(handle, half)
            raise
        written = super().write(
            handle, half if self.calls % 2 else data
        )  # as it may: less than was asked for
        self.files[handle].written += written
        return written

    def fsync(self, handle: int) -> None:
        self._count()
        if handle in self.folders:
            self.unsynced = [each for each in self.unsynced if each[0] != self.folders[handle]]
        else:
            self.files[handle].synced = self.files[handle].written

    def close(self, handle: int) -> None:
        self._count()  # `release` closes it, so that no other file gets its number

    def rename(self, old: Path, new: Path) -> None:
        self._count()
        before = new.read_bytes() if new.is_file() else None
        super().rename(old, new)
        handle, inode = self._folder(new.parent)

        def undo() -> None:
            os.rename(new.name, old.name, src_dir_fd=handle, dst_dir_fd=handle)
            if before is not None:
                new.write_bytes(before)

        self.unsynced.append((inode, undo))

    def unlink(self, path: Path) -> None:
        self._count()
        super().unlink(path)

    def rmdir(self, path: Path) -> None:
        self._count()
        super().rmdir(path)

    def listdir(self, path: Path) -> list[str]:
        self._count()
        return super().listdir(path)

    def cut(self, data: bool, names: bool) -> None:
        """The power is gone, and with it bytes of files, and changes of folders, that were not synced."""
        for file in self.files.values() if data else ():
            os.ftruncate(file.handle, file.synced)
        for _, undo in reversed(self.unsynced) if names else ():
            with suppress(OSError):  # it may have been undone by the writer itself
                undo()

    def release(self) -> None:
        for handle in self.kept:
            os.close(handle)


def tree(path: Path) -> dict[str, bytes | None]:
    """All below a folder, and what it holds; LATEST, which is only a hint, left out."""
    return {
        str(each.relative_to(path)): each.read_bytes() if stat.S_ISREG(each.lstat().st_mode) else None
        for each in sorted(path.rglob("*"))
        if each.name != "LATEST"
    }


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    make(tmp_path / "checkpoints", 100)
    yield tmp_path / "checkpoints"


def calls() -> int:
    """How many calls one checkpoint takes; the cases below are one per call."""
    import shutil
    import tempfile

    scratch = Path(tempfile.mkdtemp())
    disk = Power()
    make(scratch / "run" / "checkpoints", 100, disk=disk)
    disk.release()
    shutil.rmtree(scratch)
    return disk.calls


CHUNKS = numbers(registration(), seed=200)


def attempt(root: Path, disk: Power) -> BaseException | None:
    try:
        make(root, 200, chunks=CHUNKS, disk=disk)
    except (ZmlError, Killed) as error:
        return error
    return None


def check_what_is_left(root: Path, before: dict[str, bytes | None], ended: BaseException | None) -> bool:
    """The former one is as it was, and the newest is it or the whole new one. Returns whether it is the new one."""
    assert {name: data for name, data in tree(root).items() if name in before} == before
    found, skipped = newest(root)
    assert found is not None and skipped == [], "nothing half is called like a checkpoint"
    assert found.path.name in ("step-000000100", "step-000000200")
    new = found.path.name == "step-000000200"
    if new:
        assert same(found, CHUNKS)
    assert new or ended is not None, "sealed means: it is there whatever happens next"
    return new


def test_the_disk_of_these_tests_sees_every_call_of_a_writer(root: Path) -> None:
    disk = Power()
    make(root, 200, disk=disk)
    assert 60 < disk.calls < 200
    assert [file for file in disk.files.values() if file.synced != file.written] == []
    assert disk.unsynced == [], "what is sealed waits for no sync any more"
    disk.release()
    assert CALLS == {name for name in vars(Power) if name in CALLS}, "a call that is not counted here"


@pytest.mark.parametrize(
    ("data", "names"), [(False, False), (True, False), (False, True), (True, True)],
    ids=["killed", "bytes lost", "names lost", "both lost"],
)  # fmt: skip
def test_a_writer_killed_at_any_call_leaves_the_former_checkpoint_or_a_whole_new_one(
    root: Path, data: bool, names: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(root)
    came = []
    total = calls()
    for at in range(1, total + 2):
        disk = Power(at)
        with monkeypatch.context() as dead:
            dead.setattr("zml.checkpoint.writing.PROCESS", "deadbeef")
            ended = attempt(root, disk)
        assert (ended is None) == (at > disk.calls) and (ended is None or isinstance(ended, Killed))
        disk.cut(data, names)
        disk.release()
        came.append(check_what_is_left(root, before, ended))
        # And the next process goes on as if nothing had been.
        if came[-1]:
            assert make(root, 200).name == "step-000000200.2"
        else:
            assert make(root, 200).name == "step-000000200"
        assert [name for name in os.listdir(root) if name.startswith(".")] == []
        for each in entries(root)[1:]:
            remove(root / each.name)
        (root / "LATEST").write_text("step-000000100\n")
    assert came == sorted(came) and came[0] is False and came[-1] is True, (
        "before the rename never, after it always"
    )


def remove(folder: Path) -> None:
    for each in folder.iterdir():
        each.unlink()
    folder.rmdir()


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize(
    ("number", "code"), [(28, errors.DISK_FULL), (122, errors.DISK_FULL), (5, errors.NOT_WRITTEN)],
    ids=["no space", "quota", "input or output"],
)  # fmt: skip
def test_an_error_at_any_call_abandons_the_checkpoint_and_touches_no_other(
    root: Path, number: int, code: str, for_ever: bool
) -> None:
    before = tree(root)
    failed = 0
    for at in range(1, calls() + 2):
        disk = Power(at, number, for_ever)
        ended = attempt(root, disk)
        if ended is None:
            disk.cut(data=True, names=True)  # also where only LATEST could not be written
        disk.release()
        if ended is not None:
            failed += 1
            assert isinstance(ended, ZmlError) and ended.code == code
            assert str(root) in ended.what
        new = check_what_is_left(root, before, ended)
        hidden = [name for name in os.listdir(root) if name.startswith(".")]
        assert for_ever or hidden == [], "what was begun is removed"
        if new:
            remove(root / "step-000000200")
        for name in hidden:
            for each in (root / name).iterdir() if (root / name).is_dir() else ():
                each.unlink()
            (root / name).rmdir() if (root / name).is_dir() else (root / name).unlink()
        (root / "LATEST").write_text("step-000000100\n")
    assert failed > 50


def test_a_full_disk_is_told_with_what_was_needed_and_where(root: Path) -> None:
    disk = Power(at=12, how=28)
    writer = Writer(root, 200, disk)
    with pytest.raises(ZmlError) as raised:
        writer.write("job.json", bytes(100))
        writer.write("ledger.json", bytes(1_000))
    disk.release()
    assert writer.over, "abandoned, though nobody asked for it"
    assert raised.value.code == errors.DISK_FULL
    assert "ledger.json: at least 1,100 bytes were needed; " in raised.value.what
    assert raised.value.what.endswith(" are free there now")
    assert sorted(os.listdir(root)) == ["LATEST", "step-000000100"]


def test_a_shard_whose_disk_is_full_leaves_no_file(tmp_path: Path) -> None:
    tensors = {"0/w": bytes(40_000)}
    total = 0
    for at in range(1, 8):
        disk = Power(at, 28)
        try:
            write_shard_file(tmp_path / "shard-0000.safetensors", tensors, shard_metadata({0: 1}), disk)
            (tmp_path / "shard-0000.safetensors").unlink()
        except ZmlError as error:
            total += 1
            assert error.code == errors.DISK_FULL
            assert "shard-0000.safetensors: 40,1" in error.what, "exactly: header and tensors"
        finally:
            disk.release()
        assert os.listdir(tmp_path) == []
    assert total == 7


def test_a_real_small_disk_is_full_and_then_as_it_was(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root to mount a small tmpfs")
    import subprocess

    root = tmp_path / "small"
    root.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", root], capture_output=True
    ).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        make(root / "checkpoints", 100)
        before = tree(root)
        with pytest.raises(ZmlError) as raised, Writer(root / "checkpoints", 200) as writer:
            writer.piece("shard-0000.safetensors", 0, bytes(100_000))
            writer.piece("shard-0000.safetensors", 100_000, bytes(200_000))
        assert raised.value.code == errors.DISK_FULL and "at least 300,000 bytes" in raised.value.what
        assert tree(root) == before
        make(root / "checkpoints", 200)
    finally:
        subprocess.run(["umount", root], check=True)


@pytest.mark.parametrize("how", ["kill", 5])
def test_pruning_stopped_at_any_call_leaves_nothing_half(root: Path, how: int | str) -> None:
    for step in (200, 300):
        make(root, step)
    keep = tree(root / "step-000000300")
    for at in range(1, 60):
        disk = Power(at, how)
        done = False
        try:
            prune(root, 1, disk=disk)
            done = True
        except (OSError, Killed):
            pass
        disk.release()
        assert newest(root)[1] == [] and tree(root / "step-000000300") == keep
        for each in entries(root):
            read(root / each.name)
        if done and at > disk.calls:
            assert entries(root) == [Entry(300)]
            assert [name for name in os.listdir(root) if name.startswith(".")] == []
            break
        prune(root, 1)  # what was left half is removed by the next
        assert [name for name in os.listdir(root) if name.startswith(".")] == []
        for step in (100, 200):
            make(root, step)
    else:
        raise AssertionError("it never came to an end")
