"""Run directories as real runs leave them, of any size and with any trouble, within a second or two.

Figures follow a simple model: in lockstep a step takes as long as the slowest worker's work; everybody else waits. All
of it follows from a seed. `python -m tests.zml.dashboard.synthetic FOLDER [TROUBLE ...]` writes one to look at.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from zml.figures import (
    APPLY_BOUNDS_S,
    STALENESS_BOUNDS,
    STEP_BOUNDS_S,
    GpuFigures,
    ShardFigures,
    WorkerFigures,
)
from zml.messages import Failure
from zml.runs import history, rundir
from zml.runs.history import MemberRow, Row
from zml.runs.timeline import Step
from zml.status import (
    CheckpointStatus,
    DataStatus,
    EventLine,
    JobStatus,
    MemberFailure,
    MemberStatus,
)

CHUNK_BYTES = 65_536 * 4
BATCH = 64
HOSTILE = (
    "</script><script>document.documentElement.dataset.owned=1</script>",
    '"><img src=x onerror="document.documentElement.dataset.owned=1">',
    "\u202egnp.exe \u2066\u2028\u2029",
    "nul \x00 bell \x07 escape \x1b[31m",
    "javascript:document.documentElement.dataset.owned=1//",
    "{{constructor.constructor('document.documentElement.dataset.owned=1')()}}",
)
TROUBLES = (
    "straggler",
    "starving",
    "nan",
    "dead-shard",
    "lost-worker",
    "uneven",
    "errors",
    "overdue",
    "failed",
    "hostile",
)


@dataclass(frozen=True)
class Shape:
    """What to make."""

    workers: int = 8
    shards: int = 4
    steps: int = 20_000
    epochs: int = 10
    step_s: float = 0.1
    rows: int = 1500  # of history.jsonl
    member_rows: int = 300
    timeline_steps: int = 1000  # in each worker's file
    log_lines: int = 400  # of each worker
    troubles: frozenset[str] = frozenset()
    over: bool = False
    values: tuple[str, ...] = ("loss", "accuracy")
    seed: int = 7
    ended_at: float = field(default_factory=time.time)


class Made:
    """The parts of a run directory, as structs."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.random = random.Random(shape.seed)
        self.workers = [f"w{n}" for n in range(shape.workers)]
        self.shards = [f"p{n}" for n in range(shape.shards)]
        spread = {worker: self.random.uniform(0.95, 1.05) for worker in self.workers}
        slow = self.workers[shape.workers // 2]
        self.work: dict[str, dict[str, float]] = {}
        for worker in self.workers:
            compute = 0.62 * shape.step_s * spread[worker]
            if "straggler" in shape.troubles and worker == slow:
                compute *= 2.6
            self.work[worker] = {
                "data": 0.5 * shape.step_s if "starving" in shape.troubles else 0.02 * shape.step_s,
                "compute": compute,
                "encode": 0.06 * shape.step_s,
                "apply": 0.04 * shape.step_s,
            }
        self.step_s = max(sum(work.values()) for work in self.work.values()) + 0.08 * shape.step_s
        self.began = shape.ended_at - shape.steps * self.step_s - 12.0

    def at(self, step: float) -> float:
        return self.began + 12.0 + step * self.step_s

    def worker(self, worker: str, steps: int) -> WorkerFigures:
        work = self.work[worker]
        phases = {phase: seconds * steps for phase, seconds in work.items()}
        phases["wait"] = max(0.0, self.step_s * steps - sum(phases.values()))
        phases["push"], phases["pull"] = 0.05 * self.step_s * steps, 0.07 * self.step_s * steps
        dense = steps * 64 * CHUNK_BYTES
        classes = [0] * (len(STEP_BOUNDS_S) + 1)
        classes[next(n for n, bound in enumerate(STEP_BOUNDS_S) if bound >= self.step_s)] = steps
        return WorkerFigures(
            steps=steps,
            samples=steps * BATCH,
            left_out=steps // 5000 if "nan" in self.shape.troubles and worker == "w0" else 0,
            phases=phases,
            step_s=classes,
            step_sum_s=self.step_s * steps,
            staleness=[steps] + [0] * len(STALENESS_BOUNDS),
            sent_bytes=dense // 71,
            received_bytes=dense // 38,
            dense_sent_bytes=dense,
            dense_received_bytes=dense,
            learning_rate=3e-4 * 0.5 * (1 + math.cos(math.pi * steps / max(1, self.shape.steps))),
            memory_bytes=2_400_000_000 + 1_000_000 * int(worker[1:]),
            gpu=GpuFigures(
                utilization=min(1.0, work["compute"] / self.step_s),
                memory_used_bytes=31_000_000_000,
                memory_bytes=80_000_000_000,
                power_w=412.0,
            )
            if int(worker[1:]) % 2 == 0
            else None,
        )

    def shard(self, shard: str, steps: int) -> ShardFigures:
        number = int(shard[1:])
        chunks = 64 // self.shape.shards + (number % 2)
        if "uneven" in self.shape.troubles:
            chunks = 90 if number == 0 else 8
        size = chunks * CHUNK_BYTES
        dense = steps * self.shape.workers * size
        classes = [0] * (len(APPLY_BOUNDS_S) + 1)
        classes[4] = steps
        return ShardFigures(
            updates=steps,
            version=steps,
            chunks=chunks,
            parameter_bytes=size,
            optimizer_bytes=2 * size,
            log_bytes=int(0.4 * size),
            pushes=steps * self.shape.workers,
            duplicates=steps // 900,
            pulls=steps * self.shape.workers,
            parked=int(3 + 2 * math.sin(steps / 1500 + number)),
            staged=1,
            received_bytes=dense // 71,
            sent_bytes=dense // 38,
            dense_received_bytes=dense,
            dense_sent_bytes=dense,
            apply_s=classes,
            apply_sum_s=0.004 * steps,
            memory_bytes=900_000_000,
        )

    def value(self, name: str, step: int) -> float | None:
        share = step / self.shape.steps
        if "nan" in self.shape.troubles and name == self.shape.values[0] and share > 0.93:
            return None
        noise = self.random.gauss(0, 0.02)
        if name == "accuracy":
            return min(0.999, 0.1 + 0.83 * (1 - math.exp(-6 * share)) + noise / 3)
        return 0.32 + 3.9 * math.exp(-9 * share) + 0.5 * math.exp(-2 * share) + noise

    def row(self, step: int) -> Row:
        share = step / self.shape.steps
        rate = self.shape.workers * BATCH / self.step_s * self.random.uniform(0.97, 1.02)
        return Row(
            at=self.at(step),
            state="RUNNING",
            steps=step,
            epoch=min(self.shape.epochs - 1, int(share * self.shape.epochs)),
            progress=share,
            samples=step * BATCH * self.shape.workers,
            samples_per_s=rate,
            values={name: self.value(name, step) for name in self.shape.values},
            learning_rate=3e-4 * 0.5 * (1 + math.cos(math.pi * share)),
            workers=self.shape.workers,
            shards=self.shape.shards,
        )

    def steps_of(self, rows: int) -> list[int]:
        return [max(1, round(self.shape.steps * (n + 1) / rows)) for n in range(rows)]

    def member_row(self, step: int) -> MemberRow:
        return MemberRow(
            at=self.at(step),
            workers={worker: self.worker(worker, step) for worker in self.workers},
            shards={shard: self.shard(shard, step) for shard in self.shards},
        )

    def members(self, step: int) -> list[MemberStatus]:
        over, found = self.shape.over, []
        for worker in self.workers:
            lost = "lost-worker" in self.shape.troubles and worker == self.workers[-1]
            state = "lost" if lost else "done" if over else "active"
            found.append(
                MemberStatus(
                    member=worker,
                    role="worker",
                    state=state,
                    because="silent for 1.6 s" if lost else "its script finished" if over else "",
                    incarnation=2 if worker == "w1" else 1,
                    node=f"node{int(worker[1:]) // 4:02}",
                    device="cuda:0",
                    steps=step,
                    samples=step * BATCH,
                    heard_s=41.0 if lost else 0.1,
                    pid=4000 + int(worker[1:]),
                    epoch=0,
                    figures=self.worker(worker, step),
                )
            )
        for shard in self.shards:
            lost = "dead-shard" in self.shape.troubles and shard == self.shards[-1]
            found.append(
                MemberStatus(
                    member=shard,
                    role="shard",
                    state="lost" if lost else "stopped" if over else "active",
                    because="its process was killed by SIGKILL" if lost else "",
                    node=f"node{int(shard[1:]):02}",
                    heard_s=7.0 if lost else 0.1,
                    pid=5000 + int(shard[1:]),
                    shard=self.shard(shard, step),
                )
            )
        return found

    def status(self, step: int | None = None) -> JobStatus:
        shape = self.shape
        step = shape.steps if step is None else step
        row = self.row(step)
        failed = "failed" in shape.troubles
        share = 1.0 if shape.over and not failed else min(0.999, 0.64 * step / shape.steps)
        hostile = HOSTILE[0] if "hostile" in shape.troubles else ""
        batches = 1250
        return JobStatus(
            job="job",
            state=("FAILED" if failed else "SUCCEEDED") if shape.over else "RUNNING",
            because="w1's script raised ValueError"
            if failed
            else "all workers finished"
            if shape.over
            else "",
            script=f"/home/ada/{hostile}train.py",
            workers=shape.workers,
            shards=shape.shards,
            generation=3,
            epoch=int(share * shape.epochs) if share < 1 else shape.epochs - 1,
            epochs=shape.epochs,
            epoch_progress=(share * shape.epochs) % 1 if share < 1 else 1.0,
            steps=step,
            values=row.values,
            samples=row.samples,
            samples_per_s=row.samples_per_s,
            eta_s=None if shape.over else 0.56 * step * self.step_s,
            started_at=self.began,
            at=self.at(step),
            members=self.members(step),
            data=DataStatus(
                batches=batches, batch_size=BATCH, committed=800, leased=2 * shape.workers, reissued=5
            ),
            checkpoint=CheckpointStatus(
                path=f"checkpoints/step-{step - 80:09}",
                step=step - 80,
                at=shape.ended_at - (4000.0 if "overdue" in shape.troubles else 130.0),
                bytes=1_240_000_000,
                held_s=0.021,
                took_s=2.4,
                taken=6,
            ),
            events=[EventLine(at=self.began + 3, what="joined", member="w0")],
            failures=[
                MemberFailure(
                    member="w1",
                    failure=Failure(
                        kind="ValueError",
                        text=f"expected 10 classes, found 11 {hostile}",
                        file="/home/ada/train.py",
                        line=42,
                        source=[
                            "    for x, y in train:",
                            "        loss = criterion(model(x), y)",
                            "        loss.backward()",
                        ],
                        first_source_line=41,
                        step=step,
                        batch="batch 17, samples 3, 9, 41",
                        at=self.at(step),
                    ),
                )
            ]
            if failed
            else [],
            exit_code=(1 if failed else 0) if shape.over else None,
        )


def write(folder: Path, shape: Shape) -> Made:
    """The whole run directory; returns what it was made of."""
    made = Made(shape)
    hostile = "hostile" in shape.troubles
    (folder / rundir.LOGS).mkdir(parents=True, exist_ok=True)
    (folder / rundir.TIMELINE).mkdir(exist_ok=True)
    settings = {
        "workers": shape.workers,
        "shards": shape.shards,
        "staleness": 0,
        "compress": "topk:0.01",
        "checkpoint_minutes": 10.0,
        "checkpoint_steps": 0,
        "runs": HOSTILE[1] if hostile else "runs",
        "bind": [],
        "log_level": "info",
    }
    origins = {name: "flag" if name in ("workers", "shards", "compress") else "default" for name in settings}
    about = {
        "zml": "0.1.0",
        "python": "3.11.7",
        "started_at": made.began,
        "folder": "/home/ada",
        "script": "train.py",
        "args": ["--lr", "3e-4", *(HOSTILE if hostile else ())],
        "settings": settings,
        "origins": origins,
    }
    (folder / rundir.CONFIG).write_text(json.dumps(about))
    for name, rows in (
        (history.JOB, (made.row(step) for step in made.steps_of(shape.rows))),
        (history.MEMBERS, (made.member_row(step) for step in made.steps_of(shape.member_rows))),
    ):
        (folder / name).write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    put_status(folder, made.status())
    (folder / rundir.EVENTS).write_text("".join(json.dumps(event) + "\n" for event in events(made)))
    timelines(folder / rundir.TIMELINE, made)
    log_files(folder / rundir.LOGS, made)
    return made


def put_status(folder: Path, status: JobStatus) -> None:
    name = rundir.STATUS if status.over else rundir.NOW
    rundir.write(folder / name, msgspec.json.encode(status))


def events(made: Made) -> Iterator[Mapping[str, object]]:
    hostile = "hostile" in made.shape.troubles
    for n, member in enumerate([*made.workers, *made.shards]):
        yield {
            "at": made.began + 0.1 * n,
            "event": "Admit",
            "what": "joined",
            "member": member,
            "incarnation": 1,
            "because": "there is a place",
        }
    yield {
        "at": made.began + 9,
        "event": "Announce",
        "what": f"generation 1: {len(made.workers)} workers",
        "generation": 1,
        "seats": [[w, 1, True] for w in made.workers],
        "because": "everybody is here",
    }
    yield {
        "at": made.at(0.3 * made.shape.steps),
        "event": "Fence",
        "what": "was fenced",
        "member": "w1",
        "incarnation": 1,
        "because": "silent for 1.6 s",
    }
    yield {
        "at": made.at(0.3 * made.shape.steps) + 4,
        "event": "Admit",
        "what": "joined again, as incarnation 2",
        "member": "w1",
        "incarnation": 2,
        "because": "it came back",
    }
    for n in range(6):
        yield {
            "at": made.at((n + 1) / 6.2 * made.shape.steps),
            "event": f"checkpoint of step {n * 1000}",
            "because": "every 10 minutes",
        }
    if hostile:
        for text in HOSTILE:
            yield {"at": made.at(made.shape.steps), "event": text, "member": text, "because": text}


def timelines(folder: Path, made: Made) -> None:
    shape = made.shape
    every = max(1, shape.steps // shape.timeline_steps)
    for worker in made.workers:
        work, lines = made.work[worker], []
        for n in range(shape.timeline_steps):
            wobble = made.random.uniform(0.9, 1.12) * (3.0 if n % 331 == 330 else 1.0)
            compute = work["compute"] * wobble
            wait = max(
                0.002,
                made.step_s * max(1.0, wobble) - compute - work["encode"] - work["apply"] - work["data"],
            )
            step = Step(
                clock=1 + n * every,
                at=n * every * made.step_s,
                **{**work, "compute": compute, "wait": wait},
                send=0.05 * made.step_s,
                pull=0.07 * made.step_s,
                bytes_up=236_000,
                bytes_down=441_000,
            )
            lines.append(msgspec.json.encode(step) + b"\n")
        (folder / f"{worker}.jsonl").write_bytes(b"".join(lines))


def log_files(folder: Path, made: Made) -> None:
    shape = made.shape
    for worker in made.workers:
        lines = []
        for n in range(shape.log_lines):
            at = made.at(shape.steps * n / shape.log_lines)
            level = "warning" if n % 97 == 96 else "info"
            message = "a push was sent again" if level == "warning" else "step"
            lines.append(
                log_line(
                    at, level, worker, message, step=round(shape.steps * n / shape.log_lines), push_s=0.0031
                )
            )
        if "errors" in shape.troubles and worker == "w2":
            lines += [
                log_line(made.at(shape.steps) + n, "error", worker, "the disk is full", path="/tmp/x")
                for n in range(3)
            ]
        if "hostile" in shape.troubles:
            lines += [
                log_line(made.at(shape.steps), "warning", worker, text, **{"k" + text: text})
                for text in HOSTILE
            ]
            lines += [
                "x" * 1_000_000,
                "\x00" * 50,
                "{not json",
                '{"time": 1e400, "message": ["' + HOSTILE[0] + '"]}',
            ]
        (folder / f"{worker}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "coordinator.jsonl").write_text(log_line(made.began, "info", "coordinator", "listening") + "\n")


def log_line(at: float, level: str, member: str, message: str, **fields: object) -> str:
    when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1e6):06}Z"
    return json.dumps(
        {"time": when, "level": level, "message": message, "role": "worker", "id": member, **fields}
    )


BIG = Shape(
    workers=64, shards=8, steps=100_000, rows=4000, member_rows=600, timeline_steps=2000, log_lines=2000
)

if __name__ == "__main__":
    from dataclasses import replace

    place, *wanted = sys.argv[1:]
    base = BIG if "big" in wanted else Shape()
    write(Path(place), replace(base, troubles=frozenset(wanted), over="over" in wanted))
