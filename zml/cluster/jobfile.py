"""job.toml and the flags of `zml submit`: what people write, made into a Submission.

job.toml is a Submission key for key, and nothing else: a misspelt key is an error that names the nearest, because a
job that quietly has other limits than was meant is found out the next morning. `sound` is what types cannot say of a
Submission; whoever takes one calls it, the server too.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from ..config import KINDS, Settings, checked, read_file, unknown
from ..errors import BAD_JOB, USAGE, ZmlError
from .jobs import NAME_IN_WORDS, Submission, plain

MOST_WORKERS = 10_000
MOST_SHARDS = 1_000
MOST = 2**40  # of anything that is counted: beyond that somebody has mistaken the unit
UNITS_MB = {"": 1, "m": 1, "g": 2**10, "t": 2**20}
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# What the cluster decides, or the submission itself says.
NOT_OF_A_JOB = frozenset(
    "job workers shards replicas bind coordinator keys run_dir runs coordinator_away_s coordinator_restarts "
    "trackers".split()
)
SETTINGS = tuple(each.name for each in fields(Settings) if each.name not in NOT_OF_A_JOB)


# -- what types cannot say -----------------------------------------------------------------------------------


def sound(job: Submission) -> None:
    """Raises ZmlError where the fields make no sense, each by itself or together."""
    try:
        least, most = job.bounds
    except ValueError:
        least = most = 0
    if not 1 <= least <= most <= MOST_WORKERS:
        shown = job.workers if str(job.workers).isprintable() else repr(job.workers)
        raise bad(f"workers = {shown}", f"write 1 to {MOST_WORKERS:,}, or MIN..MAX within that")
    if job.shards > MOST_SHARDS:
        raise bad(f"shards = {job.shards:,}", f"a job has at most {MOST_SHARDS:,}")
    if job.replicas > min(1, job.shards - 1):
        raise bad(
            f"replicas = {job.replicas} with shards = {job.shards}", "write 0, or 1 with 2 shards or more"
        )
    for key in ("gpus", "cpus", "memory_mb", "shard_memory_mb"):
        if getattr(job, key) > MOST:
            raise bad(f"{key} = {getattr(job, key):,}", "no machine has as much")
    if job.time_limit_s is not None and job.time_limit_s > MOST:
        raise bad(f"time_limit_s = {job.time_limit_s:g}", "leave it out for no limit")
    if bool(job.folder) == bool(job.archive):
        raise bad(
            "both folder and archive" if job.folder else "neither folder nor archive",
            "one of them says where the code is",
        )
    if job.folder and not job.folder.startswith("/"):
        raise bad(f"folder = {job.folder!r}", "it must be absolute: nodes do not know where you are")
    if (
        not job.script
        or job.script.endswith("/")
        or (".." in PurePosixPath(job.script).parts and job.archive)
    ):
        raise bad(f"script = {job.script!r}", "name a file in the folder")
    if job.archive and job.script.startswith("/"):
        raise bad(f"script = {job.script!r}", "in an archive it is relative to the folder that was packed")
    for place, text in (
        ("script", job.script),
        ("folder", job.folder),
        *(("args", each) for each in job.args),
    ):
        if "\0" in text:
            raise bad(f"{place} with a zero byte", "no program can be given that")
    for name, value in job.environment.items():
        if not VARIABLE.fullmatch(name) or "\0" in value:
            raise bad(f"environment: {name[:60]!r}", "write letters, digits and _, and no zero bytes")
        if name.startswith("ZML_"):
            raise bad(f"environment: {name}", "variables of that kind are zml's own; use settings")
    for key, value in job.settings.items():
        setting(key, value, "settings", exact=True)
    try:
        msgspec.json.encode(job)
    except UnicodeEncodeError:  # a command line may hold any bytes
        raise bad("a name or an argument that is not UTF-8", "it cannot be sent; write it in UTF-8") from None


def bad(what: str, fix: str) -> ZmlError:
    return ZmlError(BAD_JOB, what, fix[0].upper() + fix[1:] + ".")


def setting(key: str, value: Any, place: str, *, exact: bool) -> Any:
    """One setting of the training, checked. `exact`: it comes from a file with types, not from a flag."""
    if key not in SETTINGS:
        if key == "trackers":  # they are code, and would run in everybody's coordinator
            what = (
                f"{place}: trackers are not a job's to choose: they would run in the coordinator of all jobs"
            )
            raise ZmlError(BAD_JOB, what, "Let the script itself call the tracker.")
        if key in KINDS:
            raise ZmlError(
                BAD_JOB,
                f"{place}: {key} is no setting of one job",
                "The submission or the cluster says that.",
            )
        raise unknown(key[:60], SETTINGS, place, "`zml config show` lists every key.", code=BAD_JOB)
    try:
        return checked(key, value, f"{place}: {key}", exact=exact, code=BAD_JOB)
    except RecursionError:
        raise bad(f"{place}: {key}", "it is nested too deeply") from None


def convert(given: Mapping[str, Any], place: str) -> Submission:
    """Raises ZmlError with the place and the key."""
    known = tuple(Submission.__struct_fields__)
    for key in given:
        if key not in known:
            raise unknown(key[:60], known, place, f"The keys are {', '.join(known)}.", code=BAD_JOB)
    if "script" not in given:
        raise ZmlError(BAD_JOB, f"{place} names no script", 'Add script = "train.py".')
    try:
        return msgspec.convert(given, Submission)
    except msgspec.ValidationError as error:
        because, _, where = plain(error).partition(" - at ")
        key = where.removeprefix("$.") or place
        if key == "name" and because.endswith(NAME_IN_WORDS):
            raise ZmlError(
                BAD_JOB, f"{place}: name = {given['name'][:80]!r}", f"Write {NAME_IN_WORDS}."
            ) from None
        raise ZmlError(BAD_JOB, f"{place}: {key}: {because}", "Correct that key.") from None


# -- what people write ---------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """What a job.toml says; its folder is where it lies, unless it names another. Raises ZmlError."""
    given = read_file(path)
    known = tuple(Submission.__struct_fields__)
    for key in given:
        if key not in known:
            raise unknown(key[:60], known, str(path), f"The keys are {', '.join(known)}.", code=BAD_JOB)
    here = path.absolute().parent
    folder = given.get("folder", "")
    if isinstance(folder, str) and not given.get("archive"):
        given["folder"] = str((here / folder).resolve())
    return given


def seconds(text: str) -> float:
    """2h, 90m, 1h30m, 45s, 3600. Raises ZmlError."""
    parts = re.fullmatch(
        r"(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s?)?", text.strip().lower()
    )
    found = [int(each or 0) for each in parts.groups()] if parts else []
    total = sum(n * unit for n, unit in zip(found, (86400, 3600, 60, 1), strict=False))
    if total <= 0:
        raise ZmlError(USAGE, f"{text!r} is no time", "Write 2h, 90m, 1h30m, or seconds.")
    return float(total)


def megabytes(text: str) -> int:
    """8GB, 512MB, 1.5G; a bare number is MB. 1 GB is 1,024 MB, as sbatch has it. Raises ZmlError."""
    parts = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*([mgt]?)(?:i?b)?", text.strip().lower())
    if parts is None:
        raise ZmlError(USAGE, f"{text!r} is no amount of memory", "Write 8GB, or 512MB.")
    return math.ceil(float(parts[1]) * UNITS_MB[parts[2]])


def pair(text: str, flag: str, example: str) -> tuple[str, str]:
    """KEY=VALUE. Raises ZmlError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ZmlError(USAGE, f"{flag} {text} is not KEY=VALUE", f"Write {flag} {example}.")
    return key, value


def command(job: Submission) -> str:
    """The script and its arguments, as one would type them."""
    return shlex.join([job.script, *job.args])
