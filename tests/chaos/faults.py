"""What goes wrong in a run, drawn from its seed: a list of faults with their times.

One worker of each run, the anchor, is spared what costs a worker its place: a job whose workers are all gone is over,
and rightly so. It meets everything else: loss, delay, short partitions, lost shards, a coordinator that stands still.
"""

import random
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Boundary = Literal["sent", "arrives", "handled"]
BRIEF_S = 0.9  # shorter than a lease


@dataclass(frozen=True, slots=True)
class Crash:
    """`target` dies at a message: the one after `messages` more, before it leaves, before or after it is handled.

    A worker's name is that of its agent, which takes the script with it; `script w1` dies alone, and its agent tells.
    After `back_s` another process takes its place, if one is to.
    """

    target: str
    boundary: Boundary
    messages: int
    back_s: float | None
    about: str = ""  # if not empty, only requests of this kind count; for "sent", their answers
    torn: int = 0  # bytes of a record that the dying shard has begun to write


@dataclass(frozen=True, slots=True)
class Freeze:
    target: str
    for_s: float


@dataclass(frozen=True, slots=True)
class Partition:
    """`one` does not reach `other`; `both_ways`: nor the other way."""

    one: str
    other: str
    both_ways: bool
    for_s: float


@dataclass(frozen=True, slots=True)
class Weather:
    """What the network does to messages for a while."""

    delay_s: tuple[float, float]
    loss: float
    duplication: float
    for_s: float


Fault: TypeAlias = Crash | Freeze | Partition | Weather


@dataclass(slots=True)
class Plan:
    """A run, but for what follows from it."""

    workers: int
    shards: int
    staleness: int | None
    compress: str
    optimizer_on: Literal["shard", "worker"]
    epochs: int
    batches: int
    compute_s: dict[str, float]
    anchor: str
    weather: Weather
    late: dict[str, float]  # workers that come later, and when
    faults: list[tuple[float, Fault]] = field(default_factory=list)  # seconds after the start, in order

    def __str__(self) -> str:
        lines = [
            f"{self.workers} workers {self.shards} shards staleness {self.staleness} {self.compress} "
            f"optimizer on {self.optimizer_on}, {self.epochs} epochs of {self.batches} batches, "
            f"anchor {self.anchor}, late {self.late}, {self.weather}",
            *(f"  {at:.3f} {fault}" for at, fault in self.faults),
        ]
        return "\n".join(lines)


def draw(seed: int, *, coordinator_dies: bool) -> Plan:
    """The run of this seed."""
    dice = random.Random(seed)
    workers = dice.randint(2, 4)
    names = [f"w{index}" for index in range(workers)]
    late = {f"w{workers + i}": dice.uniform(0.1, 2.5) for i in range(dice.choice((0, 0, 1, 2)))}
    pace_s = dice.choice((0.01, 0.03, 0.08))
    plan = Plan(
        workers=workers,
        shards=dice.randint(1, 3),
        staleness=dice.choice((0, 0, 1, 2, None)),
        compress=dice.choice(("none", "bf16", "topk:10%")),
        optimizer_on=dice.choice(("shard", "worker")),
        epochs=dice.randint(1, 3),
        batches=dice.randint(2, 8),
        compute_s={name: pace_s * dice.uniform(0.5, 2) for name in [*names, *late]},
        anchor=dice.choice(names),
        weather=Weather(
            (0.0005, dice.choice((0.001, 0.002, 0.02))),
            dice.choice((0.0, 0.0, 0.01, 0.03)),
            dice.choice((0.0, 0.02, 0.05)),
            0.0,
        ),
        late=late,
    )
    length_s = max(1.0, plan.epochs * plan.batches * pace_s * 1.5)
    for _ in range(dice.randint(0, 6)):
        fault = draw_fault(dice, plan, coordinator_dies=coordinator_dies)
        plan.faults.append((dice.uniform(0.05, length_s), fault))
    plan.faults.sort(key=lambda pair: pair[0])
    return plan


def draw_fault(dice: random.Random, plan: Plan, *, coordinator_dies: bool) -> Fault:
    shards = [f"p{index}" for index in range(plan.shards)]
    workers = [*(f"w{index}" for index in range(plan.workers)), *plan.late]
    mortal = [worker for worker in workers if worker != plan.anchor]
    match dice.choice(("shard dies", "shard dies", "worker dies", "worker dies", "freeze", "cut", "weather")):
        case "shard dies":
            targets = [*shards, "coordinator"] if coordinator_dies else shards
            return crash(dice, dice.choice(targets), back_s=dice.uniform(0.1, 4.0))
        case "worker dies":
            target = dice.choice(mortal)
            if dice.random() < 0.4:
                target = f"script {target}"
            return crash(dice, target, back_s=dice.uniform(0.1, 4.0) if dice.random() < 0.6 else None)
        case "freeze":
            target = dice.choice([*shards, *workers, "coordinator"])
            most_s = BRIEF_S if target == plan.anchor else 4.0 if target == "coordinator" else 8.0
            return Freeze(target, dice.uniform(0.1, most_s))
        case "cut":
            one, other = dice.sample([*shards, *workers, "coordinator"], 2)
            brief = {one, other} == {plan.anchor, "coordinator"}
            return Partition(one, other, dice.random() < 0.5, dice.uniform(0.1, BRIEF_S if brief else 8.0))
        case _:
            slow = dice.choice((0.005, 0.1, 0.5))
            return Weather(
                (0.0005, slow), dice.choice((0.0, 0.1, 0.2)), dice.choice((0.0, 0.3)), dice.uniform(0.2, 3.0)
            )


def crash(dice: random.Random, target: str, back_s: float | None) -> Crash:
    boundary: Boundary = dice.choice(("sent", "arrives", "handled"))
    about = dice.choice(("", *KINDS["script" if target[0] in "sw" else target[0]]))
    messages = dice.choice((0, 1, 2, 3)) if about else dice.choice((0, 1, 2, 5, 10, 20, 40))
    torn = dice.choice((0, 0, 7, 30)) if target.startswith("p") else 0
    return Crash(target, boundary, messages, back_s, about, torn)


KINDS = {
    "p": ("Commit", "Commit", "Push", "Pull", "Roster", "Settle", "Enter", "Advance", "Load"),
    "c": ("Take", "Take", "OpenEpoch", "Register", "Exited", "Join", "Returned", "Where"),
    "script": ("Commit", "Commit", "Push", "Take", "Enter", "Advance"),
}  # what a crash may be about, of a shard, the coordinator and a worker
