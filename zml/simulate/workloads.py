"""Recorded workloads: who asked for what, when. In the formats of the Pollux artifact and of the Philly trace in it."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from random import Random

from ..errors import BAD_TRACE, USAGE, ZmlError
from ..scheduler.cluster.request import Request
from ..scheduler.cluster.resources import Resources
from ..scheduler.ids import JobId
from .curves import Calibrated
from .engine import Job
from .measured import FIXED, Library, number, rows
from .work import Countdown, Learning, Model, Work

MEASURED = ("name", "time", "application", "num_replicas", "batch_size")
TIMED = ("timestamp", "duration", "num_gpus")
GPU = Resources(gpus=1)
MOST_ADAPTED = 64  # workers of a job that adapts: the measurements end there


@dataclass(frozen=True, slots=True)
class Asked:
    """A line of a workload: a training run of a measured model, or a duration."""

    name: str
    submitted: float
    workers: int
    user: str = ""
    application: str = ""
    batch: int = 0
    duration_s: float = 0.0


def find(paths: Sequence[str]) -> list[Path]:
    """The files that are meant: those of a folder are its CSVs."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(path.glob("*.csv"))
            if not files:
                raise ZmlError(
                    BAD_TRACE,
                    f"{path} is a folder without CSV files",
                    "Name a workload, or a folder of them.",
                )
            found += files
        elif path.is_file():
            found.append(path)
        else:
            raise ZmlError(BAD_TRACE, f"there is no {path}", "Name a workload, or a folder of them.")
    return found


def read(path: Path, limit: int | None = None) -> list[Asked]:
    """The jobs of a workload, in order of submission; the first `limit` of them."""
    try:
        with path.open(newline="") as file:
            columns = next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ZmlError(BAD_TRACE, f"{path} cannot be read: {error}") from None
    if set(MEASURED) <= set(columns):
        found = read_measured(path)
    elif set(TIMED) <= set(columns):
        found = read_timed(path, "cluster" in columns)
    else:
        raise ZmlError(
            BAD_TRACE,
            f"{path} is no workload: it has neither the columns {', '.join(MEASURED)} nor {', '.join(TIMED)}",
        )
    if not found:
        raise ZmlError(BAD_TRACE, f"{path} has no jobs")
    found.sort(key=lambda asked: (asked.submitted, asked.name))
    return found[:limit]


def read_measured(path: Path) -> list[Asked]:
    found: list[Asked] = []
    names: set[str] = set()
    for name, at, application, workers, batch in rows(path, MEASURED):
        if name in names:
            raise ZmlError(BAD_TRACE, f"{path} has two jobs called {name}")
        names.add(name)
        found.append(
            Asked(
                name=name,
                submitted=number(at, path, f"the time of {name}"),
                workers=count(workers, path, f"num_replicas of {name}"),
                application=application,
                batch=count(batch, path, f"batch_size of {name}"),
            )
        )
    return found


def read_timed(path: Path, users: bool) -> list[Asked]:
    lines: list[tuple[float, float, int, str]] = []
    for at, duration, gpus, *user in rows(path, (*TIMED, "cluster") if users else TIMED):
        try:
            when = datetime.fromisoformat(at).timestamp()
        except ValueError:
            raise ZmlError(BAD_TRACE, f"{path}: {at!r} is no time, as of 2017-10-09 07:01:55") from None
        seconds = number(duration, path, "a duration")
        if seconds > 0:
            lines.append((when, seconds, count(gpus, path, "num_gpus"), user[0] if user else ""))
    start = min((line[0] for line in lines), default=0.0)
    return [
        Asked(f"job-{i}", when - start, gpus, user=user, duration_s=seconds)
        for i, (when, seconds, gpus, user) in enumerate(lines)
    ]


def count(text: str, path: Path, what: str) -> int:
    value = number(text, path, what)
    if value < 1 or value != int(value):
        raise ZmlError(BAD_TRACE, f"{path}: {what} is {text!r}, which is no whole number of 1 or more")
    return int(value)


# -- jobs ------------------------------------------------------------------------------------------------


def jobs(
    asked: Sequence[Asked],
    profiles: Library | None,
    adapts: bool,
    seed: int = 0,
    noise: float = 0.0,
    curves: Mapping[str, Calibrated] | None = None,
) -> list[Job]:
    """Jobs to simulate. Those that adapt may have any number of workers and any batch size their model was measured
    at; others have what their user asked for. `curves`, by model, go before `profiles`."""
    made: list[Job] = []
    for entry in asked:
        least = most = entry.workers
        work: Work
        if entry.application:
            model: Model
            if curves and entry.application in curves:
                model = curves[entry.application]
            elif profiles is None:
                raise ZmlError(
                    USAGE,
                    f"{entry.name} trains {entry.application}, and no measurements are given",
                    "Give --profiles FOLDER, with a folder for each model, or --curves FILE of it.",
                )
            else:
                model = profiles[entry.application]
            fixed = FIXED.get(model.name) if adapts else entry.batch
            if adapts:
                least, most = 1, 1 if fixed is not None else most_workers(model)
            if not model.asked <= (fixed or model.asked) <= model.most:
                raise ZmlError(
                    BAD_TRACE,
                    f"{entry.name} asks for batches of {fixed}, and {model.name} was measured at {model.asked} to "
                    f"{model.most}",
                )
            work = Learning(
                model=model,
                asked=entry.workers,
                asked_batch=entry.batch,
                adapts=adapts,
                fixed=fixed,
                noise=noise,
                random=Random(f"{seed}/{entry.name}"),
            )
        else:
            work = Countdown(entry.workers, entry.duration_s)
        request = Request(
            job=JobId(entry.name),
            user=entry.user,
            least=least,
            most=most,
            worker=GPU,
            submitted=entry.submitted,
        )
        made.append(Job(request=request, work=work, application=entry.application))
    return made


def most_workers(model: Model) -> int:
    return min(MOST_ADAPTED, model.batches().most_workers)
