"""The folder of a job of Slurm: `runs/slurm-1234`, of an array's task `runs/slurm-1230_4`.

    runs/slurm-1234/
        keys/          the CURVE keys of this job, for their owner only
        attempt-0/     a run directory, as of any run
        attempt-1/     after a requeue: it began with the newest checkpoint of the ones before
        now            a link to the newest attempt

Rule: what an attempt left is never changed by the next one. An attempt without a checkpoint of its own has made no
progress that anybody could build on.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from ..checkpoint import Manifest
from ..checkpoint.finding import Skip, find, load_from
from ..errors import ALLOCATION, BAD_KEYS, USAGE, ZmlError
from ..runs import rundir
from ..status import JobStatus

KEYS = "keys"
NOW = "now"
_ATTEMPT = re.compile(r"attempt-(\d{1,9})")


def job_name(environ: Mapping[str, str]) -> str:
    """How Slurm's commands are to name this job: of an array the one task, for the array's own number is all of them.

    Raises ZmlError outside of an allocation.
    """
    if environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ.get('SLURM_ARRAY_TASK_ID', '0')}"
    if not environ.get("SLURM_JOB_ID"):
        raise ZmlError(
            USAGE,
            "this is no allocation of Slurm: SLURM_JOB_ID is not set",
            "Write a script with `zml slurm script`, and give it to sbatch.",
        )
    return environ["SLURM_JOB_ID"]


class JobFolder:
    """One job's, over all its attempts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, runs: Path, environ: Mapping[str, str]) -> "JobFolder":
        """This job's. A cluster that counts its jobs from 1 again has a folder of that number already: a job that
        runs for the first time gets another then, and one that was requeued the newest."""
        first = runs.absolute() / f"slurm-{job_name(environ)}"
        number, path = 1, first
        there: list[Path] = []
        while path.exists():
            there.append(path)
            number += 1
            path = first.with_name(f"{first.name}.{number}")
        if there and int(environ.get("SLURM_RESTART_COUNT") or 0) > 0:
            path = there[-1]
        return cls(path)

    @property
    def keys(self) -> Path:
        return self.path / KEYS

    def make(self) -> None:
        """The folder and its keys, which are only its owner's. Twice is the same as once. Raises ZmlError."""
        from ..link import LISTENER, WORKER
        from ..transport.errors import BadKeys
        from ..transport.keys import AUTHORIZED, make_keys

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.keys.mkdir(mode=0o700, exist_ok=True)
            if not (self.keys / AUTHORIZED).exists():
                for half in self.keys.glob("*.key"):  # of an attempt that died between the two
                    half.unlink()
                make_keys(self.keys, (LISTENER, WORKER))
        except BadKeys as bad:
            raise ZmlError(BAD_KEYS, str(bad)) from None
        except OSError as error:
            what = f"cannot write to {self.path}: {error.strerror}"
            raise ZmlError(ALLOCATION, what, "Choose another folder with --runs.") from None

    def attempts(self) -> list[Path]:
        """The oldest first."""
        found = []
        for each in self.path.glob("attempt-*"):
            if (match := _ATTEMPT.fullmatch(each.name)) and each.is_dir():
                found.append((int(match[1]), each))
        return [path for _, path in sorted(found)]

    def next_attempt(self) -> Path:
        """Not made yet."""
        before = self.attempts()
        number = int(before[-1].name.removeprefix("attempt-")) + 1 if before else 0
        return self.path / f"attempt-{number}"

    def point_at(self, attempt: Path) -> None:
        """`now` leads there, whoever looks meanwhile."""
        scratch = self.path / f".{NOW}.{os.getpid()}"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(attempt.name)
        os.replace(scratch, self.path / NOW)

    def ended(self) -> JobStatus | None:
        """How the newest attempt ended; None if there is none or it was cut off."""
        before = self.attempts()
        return rundir.last_status(before[-1]) if before else None

    def resume_from(self, skip: Skip) -> tuple[Path, Manifest] | None:
        """The newest attempt that has a checkpoint that can be used, and what that says of itself; `skip` is told of
        newer ones that cannot.

        Only sizes are looked at; the coordinator holds the bytes against it, and takes one before it where they differ.
        """
        for attempt in reversed(self.attempts()):
            try:
                return attempt, load_from(find(attempt), skip, deep=False).manifest
            except ZmlError:
                continue
        return None

    def fruitless(self) -> int:
        """So many attempts in a row, the newest ones, have left no checkpoint of their own."""
        count = 0
        for attempt in reversed(self.attempts()):
            try:
                load_from(find(attempt), lambda skipped: None, deep=False)
            except ZmlError:
                count += 1
            else:
                break
        return count


def running_job(path: Path) -> tuple[Path, Path]:
    """The run directory and the keys of a job to join: of its folder, or of one run in it. Raises ZmlError."""
    for run in (path / NOW, path):
        if (run / rundir.CONFIG).is_file():
            run = run.resolve()
            for keys in (run.parent / KEYS, run / KEYS):
                if keys.is_dir():
                    return run, keys
            return run, Path()
    raise ZmlError(
        USAGE, f"{path} is neither a job's folder nor a run", "`ls runs` lists those of this folder."
    )
