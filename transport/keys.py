"""Who may come in: CURVE keys on disk. A folder holds

    NAME.key          one secret key each, TOML, mode 0600: copy to its owner only
    authorized.toml   the name and public key of everybody who may come in: the same for all

The rule: a secret is read from a file that nobody else can read, and is never printed, logged, or put into an
environment or a command line. Whoever listens shows the key called like itself or, without one, the key of the
`listener`, so that those who dial know beforehand which key must answer. To shut somebody out, delete the line in
`authorized.toml` of those who listen; they notice.
"""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

from .errors import BadKeys

AUTHORIZED: Final = "authorized.toml"
SUFFIX: Final = ".key"
KEY_CHARS: Final = 40  # 32 bytes in Z85, ZeroMQ RFC 32
FILE_BYTES: Final = 1 << 20

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._#-]{0,63}", re.ASCII)
_Z85: Final = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


class Authorized:
    """The names and public keys that are let in; read again when the file has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None
        self._by_name: dict[str, str] = {}
        self._by_key: dict[str, str] = {}
        self.listener = ""
        self.refresh()

    def refresh(self) -> bool:
        """Read the file if it has changed; True if it had. A file that cannot be read raises BadKeys, and what was
        known stays in force."""
        try:
            status = self.path.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp == self._stamp:
                return False
            if status.st_size > FILE_BYTES:
                raise BadKeys(f"{self.path}: {status.st_size} bytes are too many")
            if status.st_mode & 0o022:
                raise BadKeys(
                    f"{self.path}: others can write it (mode {status.st_mode & 0o777:o}): chmod 644"
                )
            document = tomllib.loads(self.path.read_text("utf-8"))
        except OSError as error:
            raise BadKeys(f"{self.path}: {error.strerror or error}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadKeys(f"{self.path}: {error}") from None
        by_name = _check_authorized(self.path, document)
        self.listener = str(document["listener"])
        self._by_name = by_name
        self._by_key = {key: name for name, key in by_name.items()}
        self._stamp = stamp
        return True

    @property
    def names(self) -> Mapping[str, str]:
        """Name -> public key."""
        return MappingProxyType(self._by_name)

    def name_of(self, public: str) -> str | None:
        return self._by_key.get(public)


@dataclass(frozen=True, slots=True)
class Keys:
    """The key of one process, and who else there is. Its repr shows no secret."""

    name: str
    public: str
    secret: str = field(repr=False)
    authorized: Authorized = field(repr=False, compare=False)

    @classmethod
    def load(cls, folder: Path | str, *names: str) -> "Keys":
        """The first of these names that has a secret key in the folder; without names, the only one there is.

        Raises BadKeys naming the file: missing, damaged, readable by others, or not among the authorized.
        """
        folder = Path(folder)
        path = _choose(folder, names)
        name, public, secret = _read_secret(path)
        authorized = Authorized(folder / AUTHORIZED)
        if authorized.names.get(name) != public:
            raise BadKeys(f"{path}: this key is not in {authorized.path}: the two are not of one set")
        return cls(name, public, secret, authorized)

    def key_of(self, peer: str) -> str:
        """The public key that a listening peer must show."""
        names = self.authorized.names
        return names[peer] if peer in names else names[self.authorized.listener]


def make_keys(folder: Path | str, names: Sequence[str], *, listener: str | None = None) -> list[Path]:
    """Make a secret key for each name, and authorize them beside those that are there already.

    `listener` (the first name, unless there is one already) is the key of every process that listens and has none
    of its own. Nothing is overwritten: an existing key raises BadKeys. Returns the files written.
    """
    folder = Path(folder)
    if not names:
        raise BadKeys("no names: nothing to make")
    for name in names:
        if not _NAME.fullmatch(name):
            raise BadKeys(f"{name!r} is not a name for a key: letters, digits and . _ # - only, 64 at most")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / AUTHORIZED
    known: dict[str, str] = {}
    if path.exists():
        authorized = Authorized(path)
        known, listener = dict(authorized.names), listener or authorized.listener
    for name in names:
        if name in known or (folder / (name + SUFFIX)).exists():
            raise BadKeys(f"{folder / (name + SUFFIX)}: this key exists; choose another name or folder")
    written = []
    for name in names:
        public, secret = _new_pair()
        known[name] = public
        written.append(folder / (name + SUFFIX))
        text = f'name = "{name}"\npublic = "{public}"\nsecret = "{secret}"\n'
        _write(written[-1], text, 0o600)
    listener = listener or names[0]
    if listener not in known:
        raise BadKeys(f"the listener's key {listener!r} is not among {', '.join(sorted(known))}")
    lines = [f'listener = "{listener}"', "", "[authorized]"]
    lines += [f'"{name}" = "{public}"' for name, public in sorted(known.items())]
    partial = folder / (AUTHORIZED + ".new")
    partial.unlink(missing_ok=True)
    _write(partial, "\n".join(lines) + "\n", 0o644)
    partial.replace(path)  # whoever reads it meanwhile sees the old or the new, never a half
    return [*written, path]


def _new_pair() -> tuple[str, str]:
    from .auth import new_pair

    return new_pair()


def _write(path: Path, text: str, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), mode)  # whatever the umask says
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _choose(folder: Path, names: Sequence[str]) -> Path:
    if not folder.is_dir():
        raise BadKeys(f"{folder}: there is no such folder; `zml keys` makes one")
    for name in names:
        if not _NAME.fullmatch(name):
            continue
        path = folder / (name + SUFFIX)
        if path.exists():
            return path
    if names:
        wanted = ", ".join(name + SUFFIX for name in names)
        raise BadKeys(f"{folder}: none of {wanted} is there")
    found = sorted(folder.glob("*" + SUFFIX))
    if len(found) != 1:
        raise BadKeys(f"{folder}: one secret key was expected, {len(found)} are there: say which by its name")
    return found[0]


def _read_secret(path: Path) -> tuple[str, str, str]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            # Asked of the open file: nobody can exchange it between the question and the reading.
            status = os.fstat(file.fileno())
            if status.st_mode & 0o077:
                raise BadKeys(
                    f"{path}: others can read it (mode {status.st_mode & 0o777:o}): chmod 600 {path}"
                )
            if status.st_uid not in (os.geteuid(), 0):
                raise BadKeys(f"{path}: it belongs to another user")
            raw = file.read(FILE_BYTES)
    except OSError as error:
        raise BadKeys(f"{path}: {error.strerror or error}") from None
    try:
        document = tomllib.loads(raw.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        raise BadKeys(f"{path}: this is not a key file") from None  # the parser's message may quote a secret
    name, public, secret = (document.get(part) for part in ("name", "public", "secret"))
    if not isinstance(name, str) or name + SUFFIX != path.name:
        raise BadKeys(f"{path}: the name inside is not the name of the file")
    if not isinstance(public, str) or not _is_key(public):
        raise BadKeys(f"{path}: `public` is not {KEY_CHARS} characters of Z85")
    if not isinstance(secret, str) or not _is_key(secret):
        raise BadKeys(f"{path}: `secret` is not {KEY_CHARS} characters of Z85")
    from .auth import public_of

    if public_of(secret) != public:
        raise BadKeys(f"{path}: `public` does not belong to `secret`: the file is damaged")
    return name, public, secret


def _is_key(text: str) -> bool:
    """Are these 32 bytes in Z85? Each five characters stand for 32 bits, and there are more of the former."""
    if len(text) != KEY_CHARS or not all(character in _Z85 for character in text):
        return False
    groups = (text[start : start + 5] for start in range(0, KEY_CHARS, 5))
    return all(sum(_Z85.index(c) * 85 ** (4 - i) for i, c in enumerate(g)) < 2**32 for g in groups)


def _check_authorized(path: Path, document: Mapping[str, object]) -> dict[str, str]:
    names = document.get("authorized")
    listener = document.get("listener")
    if not isinstance(names, dict) or not names:
        raise BadKeys(f"{path}: there is no table [authorized]")
    by_name: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name, key in names.items():
        if not _NAME.fullmatch(name) or not isinstance(key, str) or not _is_key(key):
            raise BadKeys(f"{path}: the entry {name[:64]!r} is not a name and {KEY_CHARS} characters of Z85")
        if key in owners:
            raise BadKeys(f"{path}: {name} and {owners[key]} have the same key")
        by_name[name] = key
        owners[key] = name
    if not isinstance(listener, str) or listener not in by_name:
        raise BadKeys(f"{path}: `listener` must be one of the authorized names")
    return by_name
