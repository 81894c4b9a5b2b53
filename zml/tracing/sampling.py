"""Which steps are traced: one in N, and every one that was slow or failed. Nothing here reads a clock or draws lots.

All workers pick the same steps without a word, because the choice follows from the run, the job and the clock alone:
of every N clocks one, at a place that is drawn anew for each N. A fixed place would always, or never, meet what itself
happens every 100 steps.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping

OFF = "off"
SLOW = "slow"  # no step is sampled; slow and failed ones are kept
USUAL = "1/100"
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
ONE_IN = re.compile(r"1/([1-9][0-9]{0,8})", re.ASCII)

WINDOW = 64  # steps that say what is usual
LEAST = 8  # before so many are known, nothing is slow
TIMES = 2.0  # slower than usual
FLOOR_S = (
    0.02  # and by at least so much: what a scheduler's hiccup does to a step of 1 ms is not worth a trace
)


def checked(text: str) -> str:
    """A value of the setting `trace`. Raises ValueError."""
    if text in (OFF, SLOW) or ONE_IN.fullmatch(text):
        return text
    raise ValueError(f"{text!r} does not say which steps are traced")


def one_in(text: str) -> int:
    """N of 1/N; 0 where no step is sampled."""
    found = ONE_IN.fullmatch(text)
    return int(found.group(1)) if found is not None else 0


def asked_by(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """What OpenTelemetry's own variables ask for where the setting is not given: the variable, and `trace`."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if environment.get("OTEL_TRACES_EXPORTER", "").strip() == "none":
        return None
    named = next((name for name in ENDPOINTS if environment.get(name, "").strip()), None)
    if named is None:
        return None
    sampler = environment.get("OTEL_TRACES_SAMPLER", "").strip().removeprefix("parentbased_")
    if sampler == "always_on":
        return named, "1/1"
    if sampler == "always_off":
        return named, SLOW
    if sampler == "traceidratio":
        return named, ratio(environment.get("OTEL_TRACES_SAMPLER_ARG", ""))
    return named, USUAL


def ratio(text: str) -> str:
    """0.01 is 1/100. What is no ratio is 1, as OpenTelemetry has it."""
    try:
        part = float(text)
    except ValueError:
        part = 1.0
    if not 0.0 <= part <= 1.0:  # NaN is neither
        part = 1.0
    return f"1/{min(round(1 / part), 999_999_999)}" if part > 1e-9 else SLOW


def trace_of(run: str, job: str, clock: int, worker: str = "") -> int:
    """The trace of a step. Steps of one clock share it, for they wait for each other; without a bound nobody does, and
    each worker's step has its own."""
    name = "\0".join((run, job, str(clock), worker)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=16).digest()) or 1


def sampled(run: str, job: str, clock: int, every: int) -> bool:
    """Is it this one of its `every` clocks? With `every` 0 none is."""
    if every <= 1:
        return every == 1
    block, place = divmod(clock, every)
    name = "\0".join((run, job, str(block))).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) % every == place


class Slow:
    """Is a step much slower than the median of those before it?"""

    def __init__(self) -> None:
        self.newest: deque[float] = deque()
        self.ordered: list[float] = []  # the same, sorted

    @property
    def usual_s(self) -> float:
        return self.ordered[len(self.ordered) // 2] if self.ordered else 0.0

    def look(self, seconds: float) -> bool:
        """Also remembers it."""
        usual_s = self.usual_s
        slow = len(self.ordered) >= LEAST and seconds > max(TIMES * usual_s, usual_s + FLOOR_S)
        if len(self.newest) == WINDOW:
            del self.ordered[bisect_left(self.ordered, self.newest.popleft())]
        self.newest.append(seconds)
        insort(self.ordered, seconds)
        return slow
