"""What runs differ in: what was asked of them, and what came out. Pure, but for what reads run directories.

The numbers: `step` and its phases are means over the recorded steps of all workers (`timeline`). Of a long run not
every step is recorded, so that the bytes of a whole run are those of a recorded step, on average, times the steps that
were made. `samples/s` is over the whole run, from its beginning to its end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import figures
from ..status import JobStatus, since_the_first
from . import finding, rundir
from . import timeline as times

PHASES = (*figures.PHASES, "send", "pull")  # of a step, each a field of `timeline.Step`
# Settings of one run, and of where it ran.
OWN = frozenset({"run_dir", "runs", "bind", "coordinator", "keys", "job", "attempt"})


class Run(NamedTuple):
    """`settings`: every one, with `script` and `args` first. `results`: numbers with their unit in the name."""

    name: str
    settings: dict[str, Any]
    results: dict[str, Any]


class Row(NamedTuple):
    """`values`: one for each run, None where it has none."""

    what: str
    values: list[Any]

    @property
    def differs(self) -> bool:
        return any(value != self.values[0] for value in self.values)


def read(folder: Path, name: str, now: float) -> Run:
    """Whatever of it can be read."""
    about = about_of(folder)
    asked, args = about.get("settings"), about.get("args")
    settings = {
        "script": about.get("script"),
        "args": " ".join(map(str, args if isinstance(args, list) else [])),
    }
    settings |= asked if isinstance(asked, dict) else {}
    found = finding.look(folder, now)
    steps = {file.stem: times.read(file) for file in sorted((folder / rundir.TIMELINE).glob("*.jsonl"))}
    return Run(name, settings, {"state": found.state, **results(found.status, steps)})


def about_of(folder: Path) -> dict[str, Any]:
    """The run's config.json; empty where there is none that can be read."""
    try:
        found = json.loads((folder / rundir.CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def results(status: JobStatus | None, steps: Mapping[str, Sequence[times.Step]]) -> dict[str, Any]:
    """What a run has reached, and how fast."""
    found: dict[str, Any] = {}
    if status is not None:
        took = max(0.0, status.at - status.started_at)
        made = made_by(status)
        found |= {"exit code": status.exit_code, "took_s": took, "epochs": epochs(status), "steps": made}
        found |= {"samples": status.samples, "samples/s": status.samples / took if took else None}
        # What a script logs may have any name.
        found |= {f"logged {key}" if key in found else key: value for key, value in status.values.items()}
    recorded = [step for each in steps.values() for step in each]
    if recorded:
        count = len(recorded)
        found["step_s"] = sum(step.whole for step in recorded) / count
        for phase in PHASES:
            found[f"{phase}_s"] = sum(getattr(step, phase) for step in recorded) / count
        for way in ("up", "down"):
            mean = sum(getattr(step, f"bytes_{way}") for step in recorded) / count
            found[f"{way} a step_bytes"] = mean
            if status is not None and (of_all := sum(max(m.steps, 0) for m in status.of("worker"))):
                found[f"{way}_bytes"] = mean * of_all
    return found


def made_by(status: JobStatus) -> int:
    """Steps of the worker that has made the most."""
    return max([status.steps, *(member.steps for member in status.of("worker"))])


def epochs(status: JobStatus) -> float | None:
    """How many were trained, the open one in part."""
    done = status.epoch + status.epoch_progress
    return round(min(done, status.epochs) if status.epochs else done, 3)


def settings_rows(runs: Sequence[Run]) -> list[Row]:
    return _rows([{k: v for k, v in run.settings.items() if k not in OWN} for run in runs])


def result_rows(runs: Sequence[Run]) -> list[Row]:
    return _rows([run.results for run in runs])


def _rows(tables: Sequence[Mapping[str, Any]]) -> list[Row]:
    keys = dict.fromkeys(key for table in tables for key in table)
    return [Row(key, [table.get(key) for table in tables]) for key in keys]


# -- many runs --------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A run in a list. Times are seconds, `began_at` since the Unix epoch; None is not known."""

    name: str
    path: str
    script: str
    live: bool
    state: str
    began_at: float | None
    took_s: float | None
    steps: int | None  # those of the runs before, too
    epochs: float | None
    values: Mapping[str, float | None]
    exit_code: int | None


def entry(folder: Path, name: str, now: float) -> Entry:
    about = about_of(folder)
    found = finding.look(folder, now)
    began = about.get("started_at")
    status = found.status
    if not isinstance(began, int | float) or not 0 < began < 1e11:
        began = (status.started_at if status is not None else 0.0) or finding.began(folder) or None
    until = now if found.live else status.at if status is not None else finding.touched(folder)
    return Entry(
        name=name,
        path=str(folder),
        script=str(about.get("script", "")),
        live=found.live,
        state=found.state,
        began_at=began,
        took_s=max(0.0, until - began) if began and until else None,
        steps=made_by(since_the_first(status)) if status is not None else None,
        epochs=epochs(status) if status is not None else None,
        values=dict(status.values) if status is not None else {},
        exit_code=status.exit_code if status is not None else None,
    )


def all_entries(runs: Path, now: float) -> list[Entry]:
    """Of all runs below a folder: those that go on first, then the newest."""
    found = [entry(folder, finding.name(folder, runs), now) for folder in finding.all_runs(runs)]
    return sorted(found, key=lambda each: (not each.live, -(each.began_at or 0.0), each.name))


def short_names(names: Sequence[str]) -> list[str]:
    """The end of each name, behind its date, where that names no other run: enough for RUN."""

    def short(name: str) -> str:
        head, tail = name[:20], name[20:]
        try:
            time.strptime(head, "%Y-%m-%dT%H-%M-%S-")
        except ValueError:
            return name
        return tail if tail and finding.fits(tail, whole) == [name] else name

    whole = set(names)
    return [short(name) for name in names]
