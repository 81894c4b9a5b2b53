"""Who may ask, and who they are. It opens no socket: headers in, a visitor or a refusal out.

On loopback whoever reaches the port is on this machine, and says who they are. But a browser on this machine also
reaches it, on behalf of any page: so the Host must be this machine (DNS rebinding), and a request that a page of
another origin made is refused. Beyond loopback nobody is let in without a token, and where a token has a user, that is
who asks, whatever they say. Tokens are compared by digest and all of them every time: how long an answer takes tells
nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from ..address import is_loopback
from ..cluster.jobs import NAME, JobView, Problem
from ..errors import NO_TOKEN, NOT_ALLOWED, ZmlError
from .bodies import USER_HEADER

SHORTEST = 16  # characters of a token
ANONYMOUS = "anonymous"
HIDDEN = "hidden"
MAKE_ONE = "Make one: (umask 077; openssl rand -hex 32 > token)"
TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")  # b64token, RFC 6750 section 2.1


@dataclass(frozen=True, slots=True)
class Visitor:
    """Whoever makes a request. `proved`: a token says so, not they alone."""

    user: str
    proved: bool = False
    admin: bool = False

    def owns(self, job: JobView) -> bool:
        return not self.proved or self.admin or job.user == self.user

    def may_see(self, job: JobView) -> JobView:
        """A job without the values of another's variables, which may be secrets."""
        if job.submission is None or self.owns(job):
            return job
        hidden = msgspec.structs.replace(
            job.submission, environment=dict.fromkeys(job.submission.environment, HIDDEN)
        )
        return msgspec.structs.replace(job, submission=hidden)

    def must_own(self, job: JobView) -> None:
        """Raises Problem where the job is another's to change."""
        if not self.owns(job):
            raise Problem(
                403,
                f"{job.id} belongs to {job.user}, and you are {self.user}",
                f"Ask {job.user}, or somebody whose token is an admin's.",
                NOT_ALLOWED,
            )


@dataclass(frozen=True, slots=True)
class Token:
    """One line of a file of tokens. `user` is empty where it lets somebody in without saying whom."""

    text: str
    user: str = ""
    admin: bool = False

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.text.encode()).digest()


def read_tokens(path: str | Path) -> tuple[Token, ...]:
    """The tokens in a file: a line for each, `TOKEN` or `USER TOKEN` or `USER TOKEN admin`; # begins a comment.
    Raises ZmlError, which never shows a token."""
    try:
        with open(path, encoding="utf-8") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(1 << 20)
    except (OSError, UnicodeDecodeError) as error:
        because = getattr(error, "strerror", None) or "it is not text"
        raise ZmlError(NO_TOKEN, f"the tokens in {path} cannot be read: {because}", MAKE_ONE) from None
    if mode & 0o077:
        raise ZmlError(
            NO_TOKEN, f"others than its owner may read {path} (mode {mode:04o})", f"chmod 600 {path}"
        )
    tokens = tuple(
        read_line(line.split(), f"{path}:{number}")
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    )
    if not tokens:
        raise ZmlError(NO_TOKEN, f"there is no token in {path}", MAKE_ONE)
    return tokens


def read_line(words: list[str], place: str) -> Token:
    user, text = ("", words[0]) if len(words) == 1 else (words[0], words[1])
    if len(words) > 3 or (len(words) == 3 and words[2] != "admin"):
        raise ZmlError(NO_TOKEN, f"{place} is not USER TOKEN, or USER TOKEN admin", "Correct that line.")
    if user and not re.search(NAME, user):
        raise ZmlError(NO_TOKEN, f"{place} begins with what is no user's name", "Correct that line.")
    if len(text) < SHORTEST or not TOKEN.fullmatch(text):
        raise ZmlError(
            NO_TOKEN,
            f"the token at {place} is not {SHORTEST} or more letters, digits and ._~+/=-",
            MAKE_ONE,
        )
    return Token(text, user, len(words) == 3)


class Door:
    """Lets requests in. Raises ZmlError where it would be open to everybody."""

    def __init__(self, host: str, tokens: tuple[Token, ...] = ()) -> None:
        self.loopback = is_loopback(host)
        self.tokens = tokens
        if not self.loopback and not tokens:
            raise ZmlError(
                NO_TOKEN,
                f"HTTP would be answered on {host}, beyond this machine, for everybody",
                f"Name a file of tokens with --http-tokens, or listen on 127.0.0.1. {MAKE_ONE}",
            )

    def admit(self, headers: Mapping[str, str], *, anybody: bool = False) -> Visitor:
        """Who asks. `anybody`: what they ask for is no secret, and needs no token. Raises Problem."""
        self._from_here(headers)
        said = headers.get(USER_HEADER, ANONYMOUS)
        if not re.search(NAME, said):
            raise Problem(400, f"{USER_HEADER} is not the name of a user", "Send letters, digits, . _ and -.")
        if not self.tokens or anybody:
            return Visitor(said)
        token = self._find(headers.get("Authorization", ""))
        return Visitor(token.user or said, proved=bool(token.user), admin=token.admin)

    def _from_here(self, headers: Mapping[str, str]) -> None:
        host = headers.get("Host", "")
        if self.loopback and not is_loopback(hostname(f"//{host}")):
            raise Problem(
                421,
                f"this is 127.0.0.1, and the request is for {host[:100] or 'nobody'}",
                "Call the server by 127.0.0.1 or localhost.",
                NOT_ALLOWED,
            )
        origin = headers.get("Origin")
        foreign = origin is not None and urlsplit_or_nothing(origin) != host
        if foreign or headers.get("Sec-Fetch-Site") == "cross-site":
            raise Problem(403, "a web page of another origin made this request", "", NOT_ALLOWED)

    def _find(self, authorization: str) -> Token:
        scheme, _, given = authorization.partition(" ")
        digest = hashlib.sha256(given.strip().encode("utf-8", "replace")).digest()
        found = None
        for token in self.tokens:
            if hmac.compare_digest(token.digest, digest):
                found = token
        if found is None or scheme.lower() != "bearer":
            what = "the server does not know this token" if given else "the request carries no token"
            raise Problem(401, what, "Give the file with your token by --token or ZML_TOKEN.", NO_TOKEN)
        return found


def hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def urlsplit_or_nothing(url: str) -> str:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return ""
