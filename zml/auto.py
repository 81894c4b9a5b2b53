"""`--compress auto`: the mildest density whose exchange hides behind computing, from what a step and the link take.

A pure rule. Each worker decides for itself: every frame says how it is coded, and a shard publishes as many elements as
came up. The link is measured when the worker joins, all workers at once if they join at once; steps all the time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DENSITIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # the mildest first
FIRST = 0.01  # until something is measured
AFTER = 8  # exchanges at first, and then always DECIDE_EVERY of them, between two decisions
DECIDE_EVERY = 64
HIDDEN_IN_BSP = 0.1  # of the computing: in BSP nothing runs beside the exchange, so it shall be short
SLACK = 0.8  # of the time to hide in that is counted on


def bits_per_element(density: float) -> float:
    """What a frame has per element of the tensor, about: position and four bits, or four bits for all of them."""
    return min(4.2, 13.0 * density)


def exchange_s(density: float, elements: int, workers: int, rate: float) -> float:
    """Seconds to send one frame up and take one down, at `rate` bytes per second; what comes down holds what all
    workers have sent."""
    up = bits_per_element(density)
    down = bits_per_element(min(1.0, workers * density))
    return (up + down) / 8 * elements / rate


def choose(elements: int, workers: int, rate: float, compute_s: float, hidden: bool) -> float:
    """The mildest density whose exchange is short enough; the sparsest if none is. `hidden`: it runs beside the next
    step."""
    room_s = SLACK * compute_s if hidden else HIDDEN_IN_BSP * compute_s
    for density in DENSITIES:
        if exchange_s(density, elements, workers, rate) <= room_s:
            return density
    return DENSITIES[-1]


@dataclass(slots=True)
class Auto:
    """Gathers measurements and decides now and then."""

    elements: int
    workers: int
    hidden: bool
    rate: float = 0.0  # bytes per second; 0 before anything is measured
    density: float = FIRST
    because: str = "nothing is measured yet"
    computes: list[float] = field(default_factory=list)
    wait: int = AFTER

    def step(self, compute_s: float) -> bool:
        """An exchange is over, before which the worker computed so long. True when a new density was chosen."""
        self.computes.append(compute_s)
        if len(self.computes) < self.wait or not self.rate:
            return False
        typical = sorted(self.computes)[len(self.computes) // 2]
        self.computes.clear()
        self.wait = DECIDE_EVERY
        before = self.density
        self.density = choose(self.elements, self.workers, self.rate, typical, self.hidden)
        needs_s = exchange_s(self.density, self.elements, self.workers, self.rate)
        self.because = (
            f"a step computes {1e3 * typical:.1f} ms, the link takes {self.rate / 1e6:.1f} MB/s,"
            f" and this exchange {1e3 * needs_s:.1f} ms"
        )
        return self.density != before
