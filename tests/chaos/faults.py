"""What goes wrong in a run, drawn from its seed: a list of faults with their times.

There are three kinds of worlds. In a fixed one every shard lives and dies with its own process. In a housed one shards
have backups or are moved, processes are told to leave and come again, and checkpoints are taken all the while. In a
growing one shards join beside all that, and get their share of the buckets, one by one. In any of them a part of the
model may be frozen, so that some shards hold nothing that is trained.

One worker of each run, the anchor, is spared what costs a worker its place: a job whose workers are all gone is over,
and rightly so. It meets everything else: loss, delay, short partitions, lost shards, a coordinator that stands still.
"""

import random
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

Boundary = Literal["sent", "arrives", "handled"]
Kind = Literal["fixed", "housed", "growing"]
ANY = "p*"  # the target of a crash: whichever shard's process comes to its message first
BRIEF_S = 0.9  # shorter than a lease
LONG_LOG = 64 << 20  # bytes, which no log of these runs reaches


@dataclass(frozen=True, slots=True)
class Crash:
    """`target` dies at a message: the one after `messages` more, before it leaves, before or after it is handled.

    A worker's name is that of its agent, which takes the script with it; `script w1` dies alone, and its agent tells.
    After `back_s` another process takes its place, if one is to. Where the coordinator dies at an order that it gives,
    it is before it leaves ("sent"), or at so many messages after it.
    """

    target: str
    boundary: Boundary
    messages: int
    back_s: float | None
    about: str = ""  # if not empty, only requests of this kind count; for "sent", their answers
    torn: int = 0  # bytes of a record that the dying shard has begun to write
    within_s: float = 1.0  # where no such message comes in this time, it dies then


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


@dataclass(frozen=True, slots=True)
class Leave:
    """A shard's process is told to leave, once or, `again_s` later, twice; and another is started `back_s` after its
    end. None: none is, if it has handed over what it had."""

    target: str
    again_s: float | None
    back_s: float | None


@dataclass(frozen=True, slots=True)
class Order:
    """Somebody wants a checkpoint now."""


Fault: TypeAlias = Crash | Freeze | Partition | Weather | Leave | Order


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
    kind: Kind = "fixed"
    replicas: int = 0  # or 1
    checkpoint_s: float = 0.0  # between two checkpoints; 0: there are none
    long_log: int = LONG_LOG  # bytes from which on a push log is cut
    chunk_elements: int = 64  # three buckets, or four
    frozen: tuple[str, ...] = ()  # parameters that are not trained; some shards then hold no others
    ahead: int = 0  # batches that a worker has left when it asks for more
    changes: float = 0.0  # how often a gradient is another one once it has left
    joins: dict[int, float] = field(default_factory=dict)  # shards that come later, by number, and when
    faults: list[tuple[float, Fault]] = field(default_factory=list)  # seconds after the start, in order

    def __str__(self) -> str:
        lines = [
            f"{self.workers} workers {self.shards} shards staleness {self.staleness} {self.compress} "
            f"optimizer on {self.optimizer_on}, {self.epochs} epochs of {self.batches} batches, "
            f"anchor {self.anchor}, late {self.late}, {self.weather}",
            f"frozen {', '.join(self.frozen) or 'nothing'}, {self.ahead} batches ahead, "
            f"gradients change at {self.changes:.0%}",
            f"{self.kind}: {self.replicas} replicas, a checkpoint every {self.checkpoint_s:.2f} s, "
            f"logs cut at {self.long_log} bytes, shards join {self.joins}",
            *(f"  {at:.3f} {fault}" for at, fault in self.faults),
        ]
        return "\n".join(lines)


def kind_of(seed: int) -> Kind:
    """Every twelfth world is a housed one, for it takes more than twice as long; and every third of these grows."""
    if seed % 12 != 2:
        return "fixed"
    return "growing" if seed // 12 % 3 == 1 else "housed"


def goes_on(seed: int) -> bool:
    """Is what the run of this seed has left gone on from?"""
    return seed % 24 == 2


def draw(seed: int, *, coordinator_dies: bool) -> Plan:
    """The run of this seed."""
    dice = random.Random(seed)
    plan, pace_s = _cluster(dice)
    length_s = max(1.0, plan.epochs * plan.batches * pace_s * 1.5)
    kind = kind_of(seed)
    if kind != "fixed":
        _house(dice, plan)
        length_s = max(2.0, length_s)
    if kind == "growing":
        _grow(dice, plan)
        length_s = 4.0
        for joined_at in plan.joins.values():
            for _ in range(dice.choice((0, 1, 2, 3))):
                fault = _of_growing(dice, plan, coordinator_dies=coordinator_dies)
                plan.faults.append((joined_at + dice.uniform(0.0, 2.0), fault))
    _befall(dice, plan, length_s, coordinator_dies=coordinator_dies)
    _compute(random.Random(f"computes {seed}"), plan)
    return plan


def _compute(dice: random.Random, plan: Plan) -> None:
    """What workers do with their model and their batches."""
    plan.frozen = dice.choice(((), (), (), *FROZEN))
    plan.ahead = dice.choice((0, 0, 1, 3))
    plan.changes = dice.choice((0.0, 0.0, 0.1, 1.0))


def _befall(dice: random.Random, plan: Plan, length_s: float, *, coordinator_dies: bool) -> None:
    for _ in range(dice.randint(0, 6)):
        fault = draw_fault(dice, plan, coordinator_dies=coordinator_dies)
        plan.faults.append((dice.uniform(0.05, length_s), fault))
    plan.faults.sort(key=lambda pair: pair[0])


def draw_after(seed: int, plan: Plan, *, coordinator_dies: bool) -> Plan:
    """Of a run that goes on where this one was, with other numbers and other faults."""
    dice = random.Random(f"after {seed}")
    after, pace_s = _cluster(dice)
    _house(dice, after)
    if plan.kind == "growing":
        _grow(dice, after)
        after.chunk_elements = plan.chunk_elements
    after.epochs, after.batches = plan.epochs, plan.batches
    after.compress, after.optimizer_on = plan.compress, plan.optimizer_on
    _compute(random.Random(f"computes after {seed}"), after)
    after.frozen = plan.frozen
    _befall(dice, after, max(1.0, plan.epochs * plan.batches * pace_s), coordinator_dies=coordinator_dies)
    return after


def _house(dice: random.Random, plan: Plan) -> None:
    plan.kind = "housed"
    plan.shards = dice.choice((1, 2, 2, 3, 3))
    plan.replicas = dice.choice((0, 0, 1, 1, 1)) if plan.shards > 1 else 0
    plan.checkpoint_s = dice.choice((0.15, 0.4, 1.0))
    plan.long_log = dice.choice((LONG_LOG, 8000))
    plan.epochs = dice.randint(2, 3)
    plan.weather = replace(plan.weather, loss=dice.choice((0.0, 0.0, 0.0, 0.01)))


def _grow(dice: random.Random, plan: Plan) -> None:
    """It trains for a while, with buckets enough for all who come."""
    plan.kind = "growing"
    plan.shards = dice.choice((1, 1, 2, 2, 3))
    plan.replicas = dice.choice((0, 0, 1)) if plan.shards > 1 else 0
    plan.checkpoint_s = dice.choice((0.4, 1.0, 2.0))
    plan.batches = dice.randint(8, 12)
    plan.chunk_elements = 32
    plan.compute_s = {worker: dice.uniform(0.15, 0.6) for worker in plan.compute_s}
    plan.joins = {plan.shards + i: dice.uniform(0.1, 1.5) for i in range(dice.choice((1, 1, 2)))}


def _cluster(dice: random.Random) -> tuple[Plan, float]:
    """Its members, and how long a step takes."""
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
    return plan, pace_s


def draw_fault(dice: random.Random, plan: Plan, *, coordinator_dies: bool) -> Fault:
    shards = [f"p{index}" for index in (*range(plan.shards), *plan.joins)]
    workers = [*(f"w{index}" for index in range(plan.workers)), *plan.late]
    mortal = [worker for worker in workers if worker != plan.anchor]
    if plan.kind != "fixed" and dice.random() < 0.5:
        return _of_housing(dice, shards, coordinator_dies=coordinator_dies)
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


def _of_housing(dice: random.Random, shards: list[str], *, coordinator_dies: bool) -> Fault:
    """What befalls shards that are moved and copied, and a checkpoint in the making."""
    target = dice.choice(shards)
    match dice.choice(("leave", "leave", "leave", "dies", "dies", "coordinator", "order")):
        case "leave":
            stays = len(shards) > 1 and dice.random() < 0.2
            back_s = None if stays else dice.choice((0.0, dice.uniform(0.1, 4.0)))
            return Leave(target, dice.uniform(0.01, 2.0) if dice.random() < 0.2 else None, back_s)
        case "dies":
            about = dice.choice(HOUSING)
            boundary: Boundary = dice.choice(("sent", "arrives", "handled"))
            many = (0, 1, 2, 5, 10, 20, 40) if about == "Copy" else (0, 0, 1, 2)
            return Crash(target, boundary, dice.choice(many), dice.uniform(0.1, 4.0), about)
        case "coordinator" if coordinator_dies:
            boundary = dice.choice(("sent", "arrives", "handled"))
            about = dice.choice(("Standing", "Returned", "Vacate"))
            return Crash("coordinator", boundary, dice.choice((0, 0, 1, 2)), dice.uniform(0.1, 4.0), about)
        case _:
            return Order()


def _of_growing(dice: random.Random, plan: Plan, *, coordinator_dies: bool) -> Fault:
    """Somebody dies at a message by which buckets move: who gives them, who gets them, or another."""
    shards = [f"p{index}" for index in (*range(plan.shards), *plan.joins)]
    about = dice.choice(("Cede", "Graft", "Assign"))
    target = dice.choice(shards) if about == "Assign" else ANY
    if coordinator_dies and dice.random() < 0.4:
        about, target = dice.choice(("Cede", "Cede", "Assign")), "coordinator"
    boundary: Boundary = dice.choice(("sent", "arrives", "handled"))
    back_s = dice.uniform(0.1, 4.0)
    return Crash(target, boundary, dice.choice((0, 0, 0, 1, 2)), back_s, about, within_s=5.0)


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
ORDERS = ("Cede", "Assign")  # that the coordinator gives, and at which it may die
HOUSING = ("Copy", "Copy", "Pair", "Promote", "Adopt", "Retire", "Hold", "Align", "Snap", "Write")
FROZEN = (
    ("0.weight",),
    ("0.weight", "0.bias"),
    ("0.weight", "0.bias", "1.bias"),
    ("1.weight", "1.bias"),
)  # what may be frozen of the model: most of it, so that few buckets are left to train, or little
