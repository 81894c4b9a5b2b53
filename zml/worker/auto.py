"""`--compress auto`: the mildest setting whose exchange hides behind computing, from what a step and the link take.

A pure rule. Every frame says how it is coded, and a shard publishes as many elements as came up, written as those were.
With a staleness bound each update is merged by itself, and each worker decides for itself. In sync all updates of a
clock are merged into one, with a factor that depends on how sparse they are, and so all workers have one setting: each
says with its steps what it wishes, the shards answer with what follows from the newest steps (`shard.counted.agreed`),
and everybody takes that up with the parameters that the same steps have made.

Steps are measured all the time. The link is when a worker joins, and again where an epoch ends and LINK_EVERY_S have
gone by, for it is others' too: then nothing is on its way, and all workers do it at once, as they use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..hyper import NO_WISH

BITS = {"fp32": 32.0, "bf16": 16.0, "int8": 8.2, "int4": 4.2}  # of an element where all of them are sent
SPARSE_BITS = 13.0  # of an entry in four bits, with its position
AFTER = 8  # exchanges at first, and then always DECIDE_EVERY of them, between two decisions
DECIDE_EVERY = 64
HIDDEN_IN_BSP = 0.1  # of the computing: in BSP nothing runs beside the exchange, so it shall be short
SLACK = 0.8  # of the time to hide in that is counted on
LINK_EVERY_S = 300.0
TELLS_S = 0.25  # a pull that takes so long tells how fast a link is, and not how long a message takes
PROBE_BYTES = 256 << 10, 16 << 20  # of the first pull and the largest


@dataclass(frozen=True, slots=True)
class Setting:
    density: float
    values: str  # how they are written, one of `compression.VALUES`

    def __str__(self) -> str:
        return self.values if self.density == 1 else f"topk:{100 * self.density:g}%:{self.values}"


# The mildest first: all elements as they are, in 16, 8 and 4 bits, and then ever fewer of them.
SETTINGS = (
    *(Setting(1.0, values) for values in BITS),
    *(Setting(density, "int4") for density in (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)),
)
FIRST = Setting(0.01, "int4")  # until something is measured


@dataclass(frozen=True, slots=True)
class Link:
    latency_s: float  # of a request and its answer
    rate: float  # bytes per second


def measure(pull: Callable[[int], tuple[float, int]]) -> Link:
    """`pull` brings so many bytes, if there are, and whatever is new besides; it says in how many seconds, and how many
    they were. Ever more are asked for, until that takes TELLS_S longer, and so less than four times that."""
    empty_s, empty = min(pull(0) for _ in range(3))
    size, most = PROBE_BYTES
    before = 0
    while True:
        takes_s, came = pull(size)
        if takes_s < 4 * TELLS_S:  # it may have been held up once; the slower it is the less that matters
            takes_s, came = min((takes_s, came), pull(size))
        if takes_s - empty_s >= TELLS_S or size >= most or came <= before:  # that is all there is
            break
        size, before = 4 * size, came
    # What takes no longer than an empty message says nothing of the rate, but that it is high.
    rate = max(came - empty, 1) / max(takes_s - empty_s, 0.1 * takes_s, 1e-9)
    return Link(max(0.0, empty_s - empty / rate), rate)


def bits_per_element(density: float, values: str = "int4") -> float:
    """What a frame has per element of the tensor, about."""
    return min(BITS[values], SPARSE_BITS * density) if density < 1 else BITS[values]


def exchange_s(setting: Setting, elements: int, workers: int, link: Link) -> float:
    """Seconds to send one frame up and take one down; what comes down holds what all workers have sent."""
    up = bits_per_element(setting.density, setting.values)
    down = bits_per_element(min(1.0, workers * setting.density), setting.values)
    return 2 * link.latency_s + (up + down) / 8 * elements / link.rate


def choose(elements: int, workers: int, link: Link, compute_s: float, hidden: bool) -> Setting:
    """The mildest setting whose exchange is short enough. `hidden`: it runs beside the next step.

    Shorter than the time to hide in, or than what the link takes for an empty message: sending less would not help
    there. If nothing is short enough, the sparsest.
    """
    room_s = SLACK * compute_s if hidden else HIDDEN_IN_BSP * compute_s
    room_s = max(room_s, 2 * link.latency_s * (1 + HIDDEN_IN_BSP))
    for setting in SETTINGS:
        if exchange_s(setting, elements, workers, link) <= room_s:
            return setting
    return SETTINGS[-1]


@dataclass(slots=True)
class Auto:
    """Gathers measurements and decides now and then."""

    elements: int
    hidden: bool
    together: bool = False  # all workers have one setting
    link: Link | None = None  # before anything is measured
    setting: Setting = FIRST  # that is in force
    wish: Setting | None = None  # of this worker
    measured: str = "nothing is measured yet"
    computes: list[float] = field(default_factory=list)
    wait: int = AFTER
    link_at: float = 0.0  # when it was measured

    @property
    def told(self) -> int:
        """The wish, as it goes with a step. Who has measured nothing yet wants no change."""
        return SETTINGS.index(self.wish or self.setting) if self.together else NO_WISH

    @property
    def because(self) -> str:
        if self.wish in (None, self.setting):
            return self.measured
        return f"another worker needs it, and this one {self.wish}: {self.measured}"

    def is_due(self, now: float) -> bool:
        """Is it time to measure the link again?"""
        return now - self.link_at >= LINK_EVERY_S

    def step(self, compute_s: float, workers: int) -> bool:
        """An exchange is over, before which the worker computed so long. True when another setting is in force."""
        self.computes.append(compute_s)
        if len(self.computes) < self.wait or self.link is None:
            return False
        typical = sorted(self.computes)[len(self.computes) // 2]
        self.computes.clear()
        self.wait = DECIDE_EVERY
        self.wish = choose(self.elements, workers, self.link, typical, self.hidden)
        needs_s = exchange_s(self.wish, self.elements, workers, self.link)
        self.measured = (
            f"a step computes {1e3 * typical:.1f} ms; the link takes {self.link.rate / 1e6:.1f} MB/s and"
            f" {1e3 * self.link.latency_s:.1f} ms for a message, and {1e3 * needs_s:.1f} ms for this exchange"
        )
        return not self.together and self._take(self.wish)

    def adopt(self, agreed: int) -> bool:
        """What the shards answered with. True when another setting is in force."""
        return self.together and 0 <= agreed < len(SETTINGS) and self._take(SETTINGS[agreed])

    def _take(self, setting: Setting) -> bool:
        before, self.setting = self.setting, setting
        return setting != before
