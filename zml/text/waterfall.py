"""What `zml timeline` prints: the means and last steps of each worker, or one step of all of them on one time axis.

Rule: the phases, their order and their letters come from `figures.PHASES`; send and pull run beside the training
thread and stand below it, at the moment at which the step's exchange begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.text import Text

from ..figures import PHASES
from ..runs.timeline import Step, span, starts
from . import bars

EXCHANGED = PHASES.index("wait")  # what stands before it is over when the exchange begins
SEND, PULL = (">", "cyan"), ("<", "magenta")
LABEL = 18
RANGES = 6  # of steps that are recorded, in an error


# -- many steps of one worker --------------------------------------------------------------------------------


def table(worker: str, steps: Sequence[Step], last: int, width: int) -> Iterator[Text]:
    """The means, then the last steps, one bar each."""
    if not steps:
        yield Text(f"{worker}: no steps yet")
        return
    count = len(steps)
    whole = sum(step.whole for step in steps) / count
    mean = {phase: sum(step.thread()[phase] for step in steps) / count for phase in PHASES}
    yield Text(f"{worker}: {count:,} {'step' if count == 1 else 'steps'} of {1e3 * whole:.1f} ms on average")
    shares = [
        f"{phase} {1e3 * mean[phase]:.1f} ms ({mean[phase] / whole if whole else 0:.0%})" for phase in PHASES
    ]
    yield from wrapped(shares, width)
    send, pull = (sum(getattr(step, key) for step in steps) / count for key in ("send", "pull"))
    up, down = (sum(getattr(step, key) for step in steps) / count / 1e3 for key in ("bytes_up", "bytes_down"))
    yield from wrapped(
        [
            f"beside it: send {1e3 * send:.1f} ms",
            f"pull {1e3 * pull:.1f} ms",
            f"up {up:,.1f} kB",
            f"down {down:,.1f} kB",
        ],
        width,
    )
    shown = steps[-last:]
    longest = max(step.whole for step in shown)
    for step in shown:
        head = f"  {step.clock:>7} {1e3 * step.whole:>8.1f} ms |"
        yield Text.assemble(head, bars.phases(step.thread(), longest, max(1, width - len(head)), PHASES))


def wrapped(parts: Sequence[str], width: int) -> Iterator[Text]:
    """As many on a line as there is room for."""
    line = " "
    for part in parts:
        if len(line) + 1 + len(part) > width and line.strip():
            yield Text(line)
            line = "   "
        line += (" " if line.strip() == "" else "  ") + part
    yield Text(line)


# -- one step of many workers --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lane:
    """One worker's step. Seconds from the axis' beginning."""

    worker: str
    step: Step
    start: float

    @property
    def exchange(self) -> float:
        """When its exchange begins."""
        return self.start + sum(list(self.step.thread().values())[:EXCHANGED])

    @property
    def end(self) -> float:
        return max(self.start + self.step.whole, self.exchange + self.step.send + self.step.pull)


def lanes(steps: Mapping[str, Step]) -> tuple[list[Lane], str]:
    """On one axis, and why it is not one, if so."""
    longest = max((step.whole for step in steps.values()), default=0.0)
    start, because = starts({name: step.began for name, step in steps.items()}, longest)
    return [Lane(name, step, start[name]) for name, step in steps.items()], because


def waterfall(clock: int, steps: Mapping[str, Step], missing: Sequence[str], width: int) -> Iterator[Text]:
    """`steps` by worker, in the order in which they are shown; `missing`: workers that have no such step."""
    drawn, because = lanes(steps)
    whole = max((lane.end for lane in drawn), default=0.0)
    room = max(10, width - LABEL - 1)
    slowest = max(drawn, key=lambda lane: lane.step.whole - lane.step.wait)
    own = slowest.step.whole - slowest.step.wait
    yield Text(f"step {clock:,} of {len(drawn)} {'worker' if len(drawn) == 1 else 'workers'}", style="bold")
    if len(drawn) > 1:
        yield Text(f"the longest without waiting: {slowest.worker}, {span(own)}")
    if because:
        yield Text(f"each from its own beginning: {because}")
    yield axis(whole, room)
    for lane in drawn:
        head = f"  {lane.worker[:6]:<6} {span(lane.step.whole):>8}"[:LABEL]
        yield Text.assemble(
            (f"{head:<{LABEL}}|", ""), *_placed(lane.start, _pieces(lane.step.thread()), whole, room)
        )
        yield Text.assemble(
            (f"{'':<{LABEL}}|", "dim"),
            *_placed(lane.exchange, [(lane.step.send, *SEND), (lane.step.pull, *PULL)], whole, room),
        )
    yield Text()
    yield Text.assemble(bars.legend(PHASES), "   ", SEND, " send  ", PULL, " pull")
    yield Text("Phases are added up in this order; send and pull run beside them.", style="dim")
    if missing:
        yield Text(f"not recorded of {', '.join(missing)}")


def axis(whole: float, room: int) -> Text:
    """0 at the left, the end at the right, the middle between."""
    left, middle, right = "0", span(whole / 2), span(whole)
    gap = room // 2 - len(left) - len(middle) // 2
    line = left + " " * max(1, gap) + middle
    line += " " * max(1, room - len(line) - len(right)) + right
    return Text(f"{'':<{LABEL}}|{line[:room]}", style="dim")


def _pieces(spent: Mapping[str, float]) -> list[tuple[float, str, str]]:
    return [(spent[phase], phase[0], bars.STYLES.get(phase, bars.PLAIN)) for phase in PHASES]


def _placed(
    start: float, pieces: Sequence[tuple[float, str, str]], whole: float, room: int
) -> Iterator[tuple[str, str]]:
    """Pieces one behind the other from `start` on, each as its letter in its style."""
    counts = bars.cells([start, *(seconds for seconds, _, _ in pieces)], whole, room)
    yield " " * counts[0], ""
    for count, (_, letter, style) in zip(counts[1:], pieces, strict=True):
        yield letter * count, style


def recorded(clocks: Sequence[int]) -> str:
    """1 to 20,000, or with gaps 1 to 10, 12 to 14 and further ones."""
    ranges: list[tuple[int, int]] = []
    for clock in sorted(set(clocks)):
        if ranges and clock == ranges[-1][1] + 1:
            ranges[-1] = ranges[-1][0], clock
        else:
            ranges.append((clock, clock))
    said = [f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in ranges]
    if len(said) > RANGES:
        return f"{', '.join(said[: RANGES - 1])} and others up to {ranges[-1][1]:,}"
    return ", ".join(said)
