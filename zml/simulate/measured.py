"""What was measured of a model: step times by placement and batch size, and how training went at several batch sizes.

A folder per model, in the format of the Pollux artifact (petuum/adaptdl, branch osdi21-artifact, simulator/traces):

    placements.csv    placement,local_bsz,step_time,sync_time     placement: workers per node, a digit each
    scalability.csv   num_nodes,num_replicas,local_bsz,step_time,sync_time
    validation-M.csv  progress,iteration,metric,grad_sqr,grad_var     a line per epoch, at batch size M

What lies between measured points is interpolated linearly; of a placement that was not measured itself, between the
nearest numbers of nodes, at the same number of workers per node. Progress is counted in steps at the smallest batch
size; a step at batch M is worth (var + sqr) / (var M0 / M + sqr) of them.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..errors import BAD_TRACE, ZmlError
from ..scheduler.cluster.goodput import Batches

MOST_LOCAL = {"yolov3": 8}
"""Batch sizes that fit a worker where that is not the greatest measured one; as in the artifact's applications.py."""
FIXED = {"ncf": 32_768}
"""Models whose batch size is not adapted, and which run on one worker when others adapt; as in its simulator.py."""


def rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The named columns of a CSV. Raises ZmlError with file and line."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise ZmlError(
                    BAD_TRACE, f"{path} has no column {missing[0]}", f"It needs {', '.join(columns)}."
                )
            for row in reader:
                values = tuple(row[name] for name in columns)
                if any(value is None for value in values):
                    raise ZmlError(BAD_TRACE, f"{path}, line {reader.line_num}: too few columns")
                yield values
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ZmlError(BAD_TRACE, f"{path} cannot be read: {error}") from None


def number(text: str, path: Path, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise ZmlError(BAD_TRACE, f"{path}: {what} is {text!r}, which is no number of 0 or more")
    return value


@dataclass(frozen=True, slots=True)
class Curve:
    """Step and sync time by local batch size, on one placement."""

    batches: tuple[float, ...]
    step_s: tuple[float, ...]
    sync_s: tuple[float, ...]

    def at(self, batch: float) -> tuple[float, float]:
        """Outside of what was measured, as at the nearest measured point."""
        i = bisect_left(self.batches, batch)
        if i == 0:
            return self.step_s[0], self.sync_s[0]
        if i == len(self.batches):
            return self.step_s[-1], self.sync_s[-1]
        share = (batch - self.batches[i - 1]) / (self.batches[i] - self.batches[i - 1])
        return lerp(self.step_s[i - 1], self.step_s[i], share), lerp(
            self.sync_s[i - 1], self.sync_s[i], share
        )


def lerp(a: float, b: float, share: float) -> float:
    return a + (b - a) * share


def curve(points: dict[float, list[tuple[float, float]]]) -> Curve:
    """Several measurements of one point count as their mean."""
    batches = tuple(sorted(points))
    step = tuple(sum(p[0] for p in points[b]) / len(points[b]) for b in batches)
    sync = tuple(sum(p[1] for p in points[b]) / len(points[b]) for b in batches)
    return Curve(batches, step, sync)


def turned(placement: Sequence[int]) -> tuple[int, ...]:
    """Placements that are rotations of each other are one: the smallest stands for all."""
    return min(tuple(placement[i:]) + tuple(placement[:i]) for i in range(len(placement)))


@dataclass(frozen=True, slots=True)
class Training:
    """How training went at one batch size, a value per epoch."""

    progress: tuple[float, ...]
    grad_sqr: tuple[float, ...]
    grad_var: tuple[float, ...]


@dataclass(slots=True)
class Measured:
    """A model as it was measured."""

    name: str
    placements: dict[tuple[int, ...], Curve]
    sizes: dict[int, dict[int, Curve]]
    """By nodes, then by workers: the mean over placements."""
    trainings: dict[int, Training]
    least_local: int
    most_local: int
    _steps: dict[tuple[tuple[int, ...], int], tuple[float, float]] = field(default_factory=dict, repr=False)
    _noise: dict[tuple[int, int], tuple[float, float]] = field(default_factory=dict, repr=False)
    _progress: list[float] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        epochs = min(len(training.progress) for training in self.trainings.values())
        self._progress = [
            0.0,
            *(min(t.progress[epoch] for t in self.trainings.values()) for epoch in range(epochs)),
        ]

    @property
    def asked(self) -> int:
        return min(self.trainings)

    @property
    def most(self) -> int:
        return max(self.trainings)

    @property
    def epochs(self) -> int:
        return len(self._progress) - 1

    def progress(self, epoch: int) -> float:
        """Where so many epochs end."""
        return self._progress[epoch]

    def batches(self, fixed: int | None = None) -> Batches:
        return Batches(
            asked=self.asked,
            most=self.most,
            least_local=self.least_local,
            most_local=self.most_local,
            fixed=fixed,
        )

    def noise(self, batch: int, epoch: int) -> tuple[float, float]:
        """grad_sqr and grad_var at this batch size, in this epoch."""
        key = batch, epoch
        found = self._noise.get(key)
        if found is None:
            found = self._noise[key] = self._find_noise(batch, epoch)
        return found

    def _find_noise(self, batch: int, epoch: int) -> tuple[float, float]:
        known = sorted(self.trainings)
        batch = min(max(batch, known[0]), known[-1])
        i = bisect_left(known, batch)
        high = self.trainings[known[i]]
        if known[i] == batch:
            return high.grad_sqr[epoch], high.grad_var[epoch]
        low = self.trainings[known[i - 1]]
        share = (batch - known[i - 1]) / (known[i] - known[i - 1])
        return (
            lerp(low.grad_sqr[epoch], high.grad_sqr[epoch], share),
            lerp(low.grad_var[epoch], high.grad_var[epoch], share),
        )

    def step(self, placement: Sequence[int], batch: int) -> tuple[float, float]:
        """Step and sync time with so many workers on each node, at this local batch size."""
        key = turned(placement), batch
        found = self._steps.get(key)
        if found is None:
            measured = self.placements.get(key[0])
            found = measured.at(batch) if measured else self._between(len(key[0]), sum(key[0]), batch)
            self._steps[key] = found
        return found

    def _between(self, nodes: int, workers: int, batch: int) -> tuple[float, float]:
        known = sorted(self.sizes)
        i = min(bisect_left(known, nodes), len(known) - 1)
        high = known[i]
        low = high if high <= nodes or i == 0 else known[i - 1]
        share = 0.0 if high == low else (nodes - low) / (high - low)
        a = self._on(low, workers * low / nodes, batch)
        b = self._on(high, workers * high / nodes, batch)
        return lerp(a[0], b[0], share), lerp(a[1], b[1], share)

    def _on(self, nodes: int, workers: float, batch: int) -> tuple[float, float]:
        by_workers = self.sizes[nodes]
        known = sorted(by_workers)
        i = min(bisect_right(known, workers), len(known) - 1)
        high, low = known[i], known[max(0, i - 1)]
        share = 0.0 if high == low else min(max((workers - low) / (high - low), 0.0), 1.0)
        a, b = by_workers[low].at(batch), by_workers[high].at(batch)
        return lerp(a[0], b[0], share), lerp(a[1], b[1], share)


# -- reading ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Library:
    """A folder with a folder for each model; each is read when it is asked for."""

    folder: Path

    @cached_property
    def _read(self) -> dict[str, Measured]:
        return {}

    def __getitem__(self, name: str) -> Measured:
        if name not in self._read:
            self._read[name] = read(self.folder / name)
        return self._read[name]


def read(folder: Path) -> Measured:
    if not folder.is_dir():
        raise ZmlError(
            BAD_TRACE,
            f"there are no measurements of {folder.name} in {folder.parent}",
            "Give --profiles FOLDER.",
        )
    Points = dict[float, list[tuple[float, float]]]
    placed: dict[tuple[int, ...], Points] = {}
    sized: dict[tuple[int, int], Points] = {}
    path = folder / "placements.csv"
    local: set[int] = set()
    for text, *values in rows(path, ("placement", "local_bsz", "step_time", "sync_time")):
        if not text.isdigit() or "0" in text:
            raise ZmlError(BAD_TRACE, f"{path}: {text!r} is no placement: workers per node, a digit 1-9 each")
        placement = tuple(int(digit) for digit in text)
        batch, step, sync = (number(value, path, "a value") for value in values)
        local.add(int(batch))
        placed.setdefault(turned(placement), {}).setdefault(batch, []).append((step, sync))
        sized.setdefault((len(placement), sum(placement)), {}).setdefault(batch, []).append((step, sync))
    if not local:
        raise ZmlError(BAD_TRACE, f"{path} has no lines")
    path = folder / "scalability.csv"
    if path.exists():
        for row in rows(path, ("num_nodes", "num_replicas", "local_bsz", "step_time", "sync_time")):
            nodes, workers, batch, step, sync = (number(value, path, "a value") for value in row)
            sized.setdefault((int(nodes), int(workers)), {}).setdefault(batch, []).append((step, sync))
    sizes: dict[int, dict[int, Curve]] = {}
    for (nodes_, workers_), points in sized.items():
        sizes.setdefault(nodes_, {})[workers_] = curve(points)
    return Measured(
        name=folder.name,
        placements={placement: curve(points) for placement, points in placed.items()},
        sizes=sizes,
        trainings=read_trainings(folder),
        least_local=min(local),
        most_local=MOST_LOCAL.get(folder.name, max(local)),
    )


def read_trainings(folder: Path) -> dict[int, Training]:
    found: dict[int, Training] = {}
    for path in sorted(folder.glob("validation-*.csv")):
        size = path.stem.partition("-")[2]
        if not size.isdigit():
            raise ZmlError(BAD_TRACE, f"{path.name} does not end in a batch size", f"It is in {folder}.")
        columns = list(zip(*rows(path, ("progress", "grad_sqr", "grad_var")), strict=True))
        if not columns:
            raise ZmlError(BAD_TRACE, f"{path} has no lines")
        progress, sqr, var = (tuple(number(value, path, "a value") for value in column) for column in columns)
        found[int(size)] = Training(progress, sqr, var)
    if not found:
        raise ZmlError(BAD_TRACE, f"{folder} has no validation-*.csv")
    return found
