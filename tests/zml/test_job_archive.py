"""Archives of code: what is packed, what is the same again, and what is not unpacked."""

import gzip
import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from zml.cluster import archive
from zml.cluster.archive import checksum, pack, stays_within, unpack
from zml.errors import ARCHIVE, ZmlError


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A folder as people have them."""
    folder = tmp_path / "code"
    for name in (
        "train.py", "pkg/model.py", "conf/a.toml", ".env", ".git-not/x", "__pycache__/a.pyc", "venv/bin/x",
        "mine/pyvenv.cfg", "mine/lib/y.py", "runs/1/state", "pkg/__pycache__/b.pyc", "old.pyc",
    ):  # fmt: skip
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (folder / "train.py").chmod(0o755)
    (folder / "link.py").symlink_to("pkg/model.py")
    (folder / "data").symlink_to("/var/data")
    return folder


def packed(folder: Path, into: Path, **limits: int) -> archive.Packed:
    into.mkdir()
    return pack(folder, into, **limits)


def names(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def git(folder: Path, *args: str) -> None:
    subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org", *args],
        check=True,
        capture_output=True,
    )


def test_without_git_what_is_hidden_or_made_by_tools_stays_here(code: Path, tmp_path: Path) -> None:
    made = packed(code, tmp_path / "out")
    assert names(made.path) == ["conf/a.toml", "link.py", "pkg/model.py", "train.py"]
    assert made.left_out == ["data: a link that leads out, to /var/data"]
    assert made.names == names(made.path)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_with_git_it_is_what_git_knows_and_what_it_does_not_ignore(code: Path, tmp_path: Path) -> None:
    git(code, "init", "-q")
    (code / ".gitignore").write_text("*.pyc\nvenv/\nmine/\nconf/\n")
    git(code, "add", "-f", "train.py", "conf/a.toml", ".gitignore", "pkg/model.py")
    git(code, "commit", "-qm", "x")
    (code / "new.py").write_text("new")
    (code / "pkg" / "model.py").unlink()  # git still knows it
    made = packed(code, tmp_path / "out")
    assert names(made.path) == [
        ".env", ".git-not/x", ".gitignore", "conf/a.toml", "link.py", "new.py", "train.py",
    ]  # fmt: skip
    inner = packed(code / "conf", tmp_path / "inner")
    assert names(inner.path) == ["a.toml"]


def test_the_same_content_is_the_same_archive(code: Path, tmp_path: Path) -> None:
    first = packed(code, tmp_path / "a")
    other = tmp_path / "elsewhere"
    shutil.copytree(code, other, symlinks=True)
    for path in other.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)
    assert packed(other, tmp_path / "b").sha256 == first.sha256
    (other / "train.py").write_text("changed")
    assert packed(other, tmp_path / "c").sha256 != first.sha256


def test_what_is_packed_is_unpacked_and_twice_is_once(code: Path, tmp_path: Path) -> None:
    made = packed(code, tmp_path / "out")
    into = tmp_path / "node" / made.sha256
    assert unpack(made.path, made.sha256, into) == into
    assert {path.relative_to(into).as_posix() for path in into.rglob("*") if not path.is_dir()} == set(
        names(made.path)
    )
    assert (into / "link.py").read_text() == "pkg/model.py"
    assert os.access(into / "train.py", os.X_OK) and not os.access(into / "conf/a.toml", os.X_OK)
    (into / "train.py").write_text("it stays")
    made.path.unlink()
    assert unpack(made.path, made.sha256, into) == into and (into / "train.py").read_text() == "it stays"
    assert os.listdir(into.parent) == [into.name]


def test_a_folder_that_is_large_is_refused_and_the_largest_are_named(code: Path, tmp_path: Path) -> None:
    (code / "weights.bin").write_bytes(bytes(3_000_000))
    (code / "pkg" / "data.npy").write_bytes(bytes(2_000_000))
    with pytest.raises(ZmlError) as refused:
        packed(code, tmp_path / "a", most_bytes=4_000_000)
    assert refused.value.code == ARCHIVE
    assert f"{code} has 5 MB in 6 files; an archive takes 4 MB" in refused.value.what
    assert "The largest: weights.bin (3 MB), pkg/data.npy (2 MB), " in refused.value.what
    with pytest.raises(ZmlError, match="6 files; an archive takes 5"):
        packed(code, tmp_path / "b", most_files=5)


def test_a_folder_that_is_not_there_is_an_error_for_people(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "x.py").write_text("")
    with pytest.raises(ZmlError, match="cannot be packed: No such file or directory"):
        pack(tmp_path / "code", tmp_path / "nowhere")


# -- what arrives --------------------------------------------------------------------------------------------


def make(path: Path, *entries: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        for entry, data in entries:
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **rest: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    for key, value in rest.items():
        setattr(made, key, value)
    return made


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


HOSTILE: dict[str, Callable[[Path], Path]] = {
    "absolute": lambda p: make(p, (entry("/tmp/x"), b"x")),
    "upwards": lambda p: make(p, (entry("a/../../x"), b"x")),
    "link out": lambda p: make(p, (entry("a", tarfile.SYMTYPE, "../x"), b"")),
    "absolute link": lambda p: make(p, (entry("a", tarfile.SYMTYPE, "/etc"), b"")),
    "through a link": lambda p: make(p, (entry("a", tarfile.SYMTYPE, "b"), b""), (entry("a/x"), b"x")),
    "over a link": lambda p: make(p, (entry("a", tarfile.SYMTYPE, "b"), b""), (entry("a"), b"x")),
    "hard link": lambda p: make(p, (entry("a", tarfile.LNKTYPE, "/etc/passwd"), b"")),
    "device": lambda p: make(p, (entry("a", tarfile.CHRTYPE, devmajor=1, devminor=3), b"")),
    "fifo": lambda p: make(p, (entry("a", tarfile.FIFOTYPE), b"")),
    "many": lambda p: make(p, *((entry(f"{n}"), b"") for n in range(200))),
    "large": lambda p: make(p, (entry("a"), bytes(3 << 20))),
    "a header without end": lambda p: make(p, (entry("a", pax_headers={"comment": "x" * (2 << 20)}), b"")),
    "not tar": lambda p: written(p, gzip.compress(b"hello" * 1000)),
    "not gzip": lambda p: written(p, b"hello" * 1000),
    "empty": lambda p: written(p, b""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_has_no_place_in_an_archive_of_code_leaves_nothing(tmp_path: Path, name: str) -> None:
    path = HOSTILE[name](tmp_path / "x.tar.gz")
    into = tmp_path / "node" / "code"
    with pytest.raises(ZmlError) as refused:
        unpack(path, checksum(path), into, most_bytes=1 << 20, most_files=100)
    assert refused.value.code == ARCHIVE and refused.value.fix
    assert os.listdir(tmp_path / "node") == []
    assert sorted(os.listdir(tmp_path)) == ["node", "x.tar.gz"]


def test_an_archive_cut_short_or_with_another_checksum_is_not_unpacked(code: Path, tmp_path: Path) -> None:
    made = packed(code, tmp_path / "out")
    into = tmp_path / "node" / "code"
    with pytest.raises(ZmlError, match="its checksum differs"):
        unpack(made.path, "0" * 64, into)
    assert not into.parent.exists()
    made.path.write_bytes(made.path.read_bytes()[:-40])
    with pytest.raises(ZmlError, match="cannot be unpacked"):
        unpack(made.path, checksum(made.path), into)
    assert os.listdir(into.parent) == []


@pytest.mark.parametrize(
    ("name", "target", "within"),
    [
        ("a", "b", True),
        ("a", "../b", False),
        ("d/a", "../b", True),
        ("d/a", "../../b", False),
        ("d/a", "x/../../../b", False),
        ("a", "/b", False),
        ("a", "", False),
    ],
)
def test_where_a_link_leads(name: str, target: str, within: bool) -> None:
    assert stays_within(name, target) is within
