"""What the processes of `faults.py` have left, as figures: their steps, the events, the push logs and the ledger."""

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import checkout  # noqa: F401
import msgspec

from zml.messages import Commit, Muster, Push, Roster
from zml.shard.pushlog import PushLog

DAY_S = 86_400.0


@dataclass
class Steps:
    """One process: when its steps returned."""

    worker: str
    incarnation: int
    pid: int
    at: list[float] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)


def read_steps(folder: Path) -> list[Steps]:
    """Of all processes. The last line of one that was killed may be torn."""
    found = []
    for file in sorted(folder.glob("steps-*.txt")):
        worker, incarnation, pid = file.stem.split("-")[1:]
        steps = Steps(worker, int(incarnation), int(pid))
        for line in file.read_text().splitlines():
            words = line.split()
            if len(words) == 4:
                steps.at.append(float(words[0]))
                steps.epochs.append(int(words[1]))
                steps.numbers.append(int(words[2]))
        found.append(steps)
    return found


def usual_step(processes: Iterable[Steps]) -> float:
    return statistics.median(b - a for each in processes for a, b in pairwise(each.at))


class Gap(NamedTuple):
    """Between two steps of one process."""

    length: float
    begin: float


def longest_gap(
    processes: Iterable[Steps], begin: float = -math.inf, end: float = math.inf, *, within: bool = False
) -> Gap:
    """Of those of which any part lies between these moments; `within`: of those between two steps of one epoch."""
    gaps = [
        Gap(b - a, a)
        for each in processes
        for (a, of), (b, to) in pairwise(zip(each.at, each.epochs, strict=True))
        if b > begin and a < end and (of == to or not within)
    ]
    return max(gaps, default=Gap(0.0, begin))


@dataclass
class Kill:
    """One process that was killed; seconds from the kill on. None: it did not come to that."""

    who: str
    at: float
    detection_s: float | None = None
    pause_s: float | None = None
    pause_from_s: float | None = None
    within_s: float | None = None  # the longest pause that is not at an epoch's end
    demanded_s: float | None = None  # how long the staleness bound alone would have made the others wait
    back_s: float | None = None
    redone: int = 0  # steps that torch's processes did again


@dataclass
class Run:
    """One training, disturbed or not."""

    system: str
    mode: str
    role: str  # "" for nobody
    failure: str = ""
    wall_s: float = 0.0
    step_s: float = 0.0
    gap_s: float = 0.0  # the longest of all, beyond the usual step
    within_s: float | None = None  # the longest of those that are not at an epoch's end
    loss: float | None = None
    kills: list[Kill] = field(default_factory=list)
    batches: int = 0
    lost_batches: int = 0
    doubled_batches: int = 0
    reissued: int = 0
    returned: int = 0  # optimizer steps, in scripts
    lost_updates: int | None = 0  # None where nobody has counted
    doubled_updates: int | None = 0


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def detected(events: Sequence[dict[str, Any]], member: str, after: float) -> float | None:
    """When the coordinator first said that this member is lost, on the clock of the events."""
    for event in events:
        lost = event["event"] == "Announce" and f"{member} was lost" in event["because"]
        fenced = event["event"] == "Fence" and event.get("member") == member
        if event["at"] > after and (lost or fenced):
            return float(event["at"])
    return None


def served_again(events: Sequence[dict[str, Any]], role: str, member: str, after: float) -> float | None:
    """When a shard is there again with all that it had, or the coordinator."""
    for event in events:
        shard = role.endswith("shard") and event["event"] == "Rehome" and event.get("shard") == member
        coordinator = role == "coordinator" and event["event"] == "the coordinator goes on"
        if event["at"] > after and (shard or coordinator):
            return float(event["at"])
    return None


# -- updates ---------------------------------------------------------------------------------------------------------


def counted(folder: Path) -> tuple[dict[tuple[str, int], set[int]], int]:
    """The clocks of each script that one shard's push log counts, and how many it has twice.

    A step counts with its commit, or, where the script was lost after another shard had the commit, with the roster
    that says so, if all that the script pushed is there.
    """
    log = PushLog(folder)
    clocks: dict[tuple[str, int], set[int]] = defaultdict(set)
    pushed: Counter[tuple[str, int, int]] = Counter()
    buckets = twice = 0
    try:
        if log.records.first > 0:
            raise ValueError(f"{folder} has been cut: its first records are in a base")
        for message, payload in log.replay():
            if isinstance(message, Push):
                pushed[message.worker, message.incarnation, message.clock] += 1
            elif isinstance(message, Commit):
                mine = clocks[message.worker, message.incarnation]
                twice += message.clock in mine
                mine.add(message.clock)
                buckets = message.buckets
            elif isinstance(message, Roster):
                for last in msgspec.msgpack.decode(payload, type=Muster).finished:
                    if pushed[last.worker, last.incarnation, last.clock] >= max(1, buckets):
                        clocks[last.worker, last.incarnation].add(last.clock)
    finally:
        log.close()
    return clocks, twice


def account_of_updates(run: Run, run_dir: Path, processes: Sequence[Steps], killed: set[int]) -> None:
    """Every step that returned, and so had its commit acknowledged, counts, and what counts does so on every shard.

    Without sync the exchange of a step runs beside the computing of the next: of a script that was killed, the last
    step that returned need not have been acknowledged.
    """
    run.returned = sum(len(each.at) for each in processes)
    logs = [counted(folder) for folder in sorted((run_dir / "state").glob("p*"))]
    lost = 0
    run.doubled_updates = sum(twice for _, twice in logs)
    for each in processes:
        script = (each.worker, each.incarnation)
        anywhere = set[int]().union(*(clocks.get(script, ()) for clocks, _ in logs))
        lost += sum(len(anywhere - clocks.get(script, set())) for clocks, _ in logs)
        under_way = 1 if each.pid in killed and run.mode != "sync" else 0
        lost += max(0, len(each.at) - under_way - len(anywhere))
    run.lost_updates = lost


def account_of_batches(run: Run, rows: Sequence[dict[str, Any]], epochs: int, batches: int) -> None:
    run.batches = epochs * batches
    run.lost_batches = run.batches - sum(row["committed"] for row in rows)
    run.doubled_batches = sum(row["duplicates"] or 0 for row in rows)
    run.reissued = sum(row["reissued"] or 0 for row in rows)


# -- tables ----------------------------------------------------------------------------------------------------------

COLUMNS = (
    "system, mode",
    "killed",
    "kills",
    "detection s",
    "pause of the others s",
    "within an epoch s",
    "demanded s",
    "back s",
    "batches lost / doubled",
    "updates lost / doubled",
    "steps done again",
    "final loss",
)


def median(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def shown(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def row(run: Run, calm: Sequence[Run]) -> list[str]:
    losses = [each.loss for each in calm if each.loss is not None]
    loss = shown(run.loss, 4)
    if run.role and losses and run.loss is not None:
        loss += f" ({run.loss - statistics.mean(losses):+.4f})"
    cells = [f"{run.system} {run.mode}".strip(), run.role or "nobody", str(len(run.kills))]
    if run.failure:
        return [*cells, run.failure, *[""] * (len(COLUMNS) - len(cells) - 1)]
    for name in ("detection_s", "pause_s", "within_s", "demanded_s", "back_s"):
        cells.append(shown(median(getattr(kill, name) for kill in run.kills)))
    if not run.role:
        cells[4], cells[5] = shown(run.gap_s), shown(run.within_s)
    if run.system == "zml":
        cells += [
            f"{run.lost_batches} / {run.doubled_batches}",
            "-" if run.lost_updates is None else f"{run.lost_updates} / {run.doubled_updates}",
        ]
        cells.append(str(max(0, run.returned - run.batches)))
    else:
        cells += ["-", "-", str(sum(kill.redone for kill in run.kills))]
    return [*cells, loss]


def markdown(runs: Sequence[Run]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for run in runs:
        calm = [each for each in runs if (each.system, each.mode, each.role) == (run.system, run.mode, "")]
        lines.append(row(run, calm))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def availability(
    runs: Sequence[Run], mtbf_s: float, shards: int, workers: int
) -> list[tuple[str, str, float]]:
    """1 - sum over kinds of rate * pause, as arithmetic that can be followed; per system and mode."""
    found = []
    there = {"worker": workers, "script": workers, "shard": shards, "coordinator": 1}
    for system, mode in dict.fromkeys((run.system, run.mode) for run in runs if run.role and not run.failure):
        terms, lost = [], 0.0
        for run in runs:
            if (run.system, run.mode) != (system, mode) or not run.role or run.failure:
                continue
            # torch's processes do again what they had done since the checkpoint: until they are further than before.
            pauses = [kill.pause_s if system == "zml" else kill.back_s for kill in run.kills]
            pause = median(pauses)
            if pause is None:
                continue
            if run.role not in there:
                continue  # another way to run shards
            number = there[run.role]
            terms.append(f"{run.role} {number} * {pause:.2f} s")
            lost += number * pause / mtbf_s
        if terms:
            text = f"1 - ({' + '.join(terms)}) / {mtbf_s:,.0f} s"
            found.append((f"{system} {mode}".strip(), text, 1 - lost))
    return found
