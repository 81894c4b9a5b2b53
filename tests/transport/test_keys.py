"""Keys on disk: made once, read only from where nobody else can read, and never shown."""

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from zml.transport import BadKeys, Keys, make_keys
from zml.transport.keys import AUTHORIZED, Authorized


def test_a_set_of_keys_is_one_secret_file_each_and_one_list(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    written = make_keys(folder, ["cluster", "worker"])
    assert written == [folder / "cluster.key", folder / "worker.key", folder / AUTHORIZED]
    assert [stat.S_IMODE(path.stat().st_mode) for path in written] == [0o600, 0o600, 0o644]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    keys = Keys.load(folder, "worker")
    assert keys.name == "worker"
    assert dict(keys.authorized.names) == {
        "cluster": Keys.load(folder, "cluster").public,
        "worker": keys.public,
    }
    assert keys.authorized.name_of(keys.public) == "worker"
    assert keys.authorized.name_of("x" * 40) is None


def test_whoever_listens_shows_its_own_key_or_the_listeners(tmp_path: Path) -> None:
    make_keys(tmp_path, ["cluster", "worker", "p1"])
    keys = Keys.load(tmp_path, "worker")
    names = keys.authorized.names
    assert keys.key_of("coordinator") == names["cluster"]
    assert keys.key_of("p0") == names["cluster"]
    assert keys.key_of("p1") == names["p1"]


def test_the_first_name_that_has_a_secret_is_taken(tmp_path: Path) -> None:
    make_keys(tmp_path, ["cluster", "worker"])
    assert Keys.load(tmp_path, "p0", "cluster").name == "cluster"
    (tmp_path / "cluster.key").unlink()
    assert Keys.load(tmp_path).name == "worker"


def test_more_keys_join_those_that_are_there(tmp_path: Path) -> None:
    make_keys(tmp_path, ["cluster", "worker"])
    before = (tmp_path / "worker.key").read_bytes()
    assert make_keys(tmp_path, ["alice"]) == [tmp_path / "alice.key", tmp_path / AUTHORIZED]
    assert (tmp_path / "worker.key").read_bytes() == before
    keys = Keys.load(tmp_path, "alice")
    assert sorted(keys.authorized.names) == ["alice", "cluster", "worker"]
    assert keys.authorized.listener == "cluster"


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    make_keys(tmp_path, ["cluster"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(BadKeys, match=r"cluster\.key: this key exists"):
        make_keys(tmp_path, ["worker", "cluster"])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("names", [[], [""], ["../evil"], ["a/b"], ["a b"], ["-"], ["x" * 65], ["ä"]])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(BadKeys):
        make_keys(tmp_path / "keys", names)
    assert not list(tmp_path.rglob("*.key"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o666, 0o601])
def test_a_secret_that_others_can_reach_is_not_used(tmp_path: Path, mode: int) -> None:
    make_keys(tmp_path, ["worker"])
    path = tmp_path / "worker.key"
    path.chmod(mode)
    with pytest.raises(BadKeys, match=rf"{path}: others can read it \(mode {mode:o}\): chmod 600"):
        Keys.load(tmp_path, "worker")


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_list_that_others_can_write_is_not_trusted(tmp_path: Path, mode: int) -> None:
    make_keys(tmp_path, ["worker"])
    (tmp_path / AUTHORIZED).chmod(mode)
    with pytest.raises(BadKeys, match=rf"others can write it \(mode {mode:o}\)"):
        Keys.load(tmp_path, "worker")


def test_the_umask_cannot_open_or_close_what_is_written(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        make_keys(tmp_path / "open", ["worker"])
        os.umask(0o777)
        (tmp_path / "shut").mkdir()
        (tmp_path / "shut").chmod(0o700)
        make_keys(tmp_path / "shut", ["worker"])
    finally:
        os.umask(old)
    for folder in ("open", "shut"):
        assert stat.S_IMODE((tmp_path / folder / "worker.key").stat().st_mode) == 0o600
        assert stat.S_IMODE((tmp_path / folder / AUTHORIZED).stat().st_mode) == 0o644


def secret_of(path: Path) -> str:
    line = next(line for line in path.read_text().splitlines() if line.startswith("secret"))
    return line.split('"')[1]


def test_a_secret_is_never_shown(tmp_path: Path) -> None:
    make_keys(tmp_path, ["worker"])
    path = tmp_path / "worker.key"
    secret = secret_of(path)
    keys = Keys.load(tmp_path, "worker")
    assert keys.secret == secret
    assert (
        secret not in repr(keys)
        and secret not in str(keys)
        and secret not in (tmp_path / AUTHORIZED).read_text()
    )
    text = path.read_text()
    for damaged in (
        text.replace('secret = "', 'secret = "\\u00'),
        text.replace('secret = "', "secret = "),
        text.replace(secret, secret[:-1]),
        text.replace(secret, secret[::-1]),
    ):
        path.write_text(damaged)
        with pytest.raises(BadKeys) as caught:
            Keys.load(tmp_path, "worker")
        chain: BaseException | None = caught.value
        while chain is not None:
            assert secret[:-1] not in str(chain) and secret[::-1] not in str(chain)
            chain = None if chain.__suppress_context__ else chain.__context__


DAMAGE: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "not TOML": lambda text: "[[[",
    "not UTF-8": lambda text: "\udcff",
    "no name": lambda text: text.replace("name", "nom"),
    "another name": lambda text: text.replace('"worker"', '"cluster"'),
    "no public key": lambda text: text.replace("public", "pub"),
    "more than 32 bits": lambda text: re.sub('secret = "[^"]*"', f'secret = "{"#" * 40}"', text),
    "numbers": lambda text: 'name = "worker"\npublic = 1\nsecret = 2\n',
    "a public key of another secret": lambda text: (
        text.replace('public = "', 'public = "0000')[:70] + text[74:]
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_secret_names_the_file(tmp_path: Path, what: str) -> None:
    make_keys(tmp_path, ["worker"])
    path = tmp_path / "worker.key"
    path.write_bytes(DAMAGE[what](path.read_text()).encode("utf-8", "surrogateescape"))
    with pytest.raises(BadKeys, match=str(path)):
        Keys.load(tmp_path, "worker")


def test_a_missing_folder_file_or_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadKeys, match="there is no such folder"):
        Keys.load(tmp_path / "none", "worker")
    make_keys(tmp_path, ["cluster", "worker"])
    with pytest.raises(BadKeys, match=r"none of p0\.key, shard\.key is there"):
        Keys.load(tmp_path, "p0", "shard")
    with pytest.raises(BadKeys, match="one secret key was expected, 2 are there"):
        Keys.load(tmp_path)
    (tmp_path / AUTHORIZED).unlink()
    with pytest.raises(BadKeys, match=rf"{AUTHORIZED}: No such file"):
        Keys.load(tmp_path, "worker")


def test_a_key_of_another_set_is_told_apart(tmp_path: Path) -> None:
    make_keys(tmp_path / "a", ["worker"])
    make_keys(tmp_path / "b", ["worker"])
    (tmp_path / "a" / "worker.key").replace(tmp_path / "b" / "worker.key")
    with pytest.raises(BadKeys, match="the two are not of one set"):
        Keys.load(tmp_path / "b", "worker")


KEY_A, KEY_B = "a" * 40, "b" * 40


@pytest.mark.parametrize(
    "text, what",
    [
        ("", "no table"),
        ('listener = "a"\n[authorized]\n', "no table"),
        (f'[authorized]\na = "{KEY_A}"\n', "`listener` must be one of the authorized names"),
        (f'listener = "b"\n[authorized]\na = "{KEY_A}"\n', "`listener` must be one of"),
        (f'listener = "a"\n[authorized]\na = "{KEY_A}"\nb = "{KEY_A}"\n', "b and a have the same key"),
        (
            f'listener = "a"\n[authorized]\na = "{KEY_A[1:]}"\n',
            "the entry 'a' is not a name and 40 characters",
        ),
        ('listener = "a"\n[authorized]\na = 7\n', "the entry 'a' is not"),
        (f'listener = "a b"\n[authorized]\n"a b" = "{KEY_A}"\n', "the entry 'a b' is not"),
        ("listener = \n", "Invalid value"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / AUTHORIZED
    path.write_text(text)
    with pytest.raises(BadKeys, match=f"{path}.*{what}"):
        Authorized(path)


def test_a_changed_list_is_read_again_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / AUTHORIZED
    path.write_text(f'listener = "a"\n[authorized]\na = "{KEY_A}"\n')
    authorized = Authorized(path)
    assert not authorized.refresh()
    path.write_text(f'listener = "a"\n[authorized]\na = "{KEY_A}"\nb = "{KEY_B}"\n')
    assert authorized.refresh()
    assert authorized.name_of(KEY_B) == "b"
    path.write_text("[[[")
    with pytest.raises(BadKeys):
        authorized.refresh()
    assert authorized.name_of(KEY_B) == "b"
    path.unlink()
    with pytest.raises(BadKeys):
        authorized.refresh()
    assert dict(authorized.names) == {"a": KEY_A, "b": KEY_B}
