"""The machine's sentences: who is waited for, how it came out, why not. For the log, `zml status` and the CLI.

Here nothing is decided: state in, words out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .ids import MemberId, Role
from .membership import Alive, Fate, Gone, how_it_ended, number_of, role_of
from .state import (
    NEXT,
    OUTCOME,
    Cause,
    Draining,
    Finishing,
    Forming,
    Job,
    Loading,
    Over,
    Running,
    State,
    Unknown,
)

NAMED = 8  # at most this many members are told of in one sentence
MOST_SAMPLES = 20  # and this many samples


@dataclass(frozen=True, slots=True)
class MemberView:
    """One member as others see it. `state` is joined, active, done, failed, lost, left or stopped."""

    member: MemberId
    role: Role
    incarnation: int
    state: str
    because: str


def counted(number: int, noun: str) -> str:
    """ "1 worker", "4 workers" """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Sequence[str]) -> str:
    """ "w0", "w0 and w1", "w0, w1 and 7 more" """
    if len(names) > NAMED:
        names = [*names[: NAMED - 1], f"{len(names) - NAMED + 1} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def waiting_for(job: Job) -> str:
    """Who keeps the job from going on, e.g. "waiting for 1 of 4 workers and shard p1"; empty when nobody does."""
    match job.phase:
        case Forming():
            return f"waiting for {listed(missing(job))}"
        case Running() if job.away:
            taken = [f"{home.host} to serve {shard}" for shard, home in job.promoting.items()]
            away = [shard for shard in job.away if shard not in job.promoting]
            if away:
                taken.append(f"{'shard' if len(away) == 1 else 'shards'} {listed(away)} to come back")
            return f"waiting for {listed(taken)}"
        case Running() if not job.members.workers():
            gone = job.members.gone("worker")
            return f"waiting for {listed([w for w, end in gone if end.back_by is not None])} to come back"
        case Running(parameters=Unknown()):
            return "waiting for the first script to show its model"
        case Running(parameters=Loading(initialiser=worker)):
            return f"waiting for {worker} to bring the first parameters"
        case Draining():
            return f"waiting for {listed(job.members.workers())} to finish the step, save and leave"
        case Finishing():
            return f"waiting for {listed(job.members.everybody())} to stop"
        case _:
            return ""


def missing(job: Job) -> list[str]:
    """Who has to join before the job begins."""
    found = []
    if job.missing_workers:
        found.append(f"{job.missing_workers} of {counted(job.workers, 'worker')}")
    if shards := job.missing_shards:
        found.append(f"{'shard' if len(shards) == 1 else 'shards'} {listed(shards)}")
    return found


def why(job: Job | Over) -> str:
    """Why the job is in its state."""
    if isinstance(job, Over):
        return job.because
    return job.phase.because if isinstance(job.phase, Draining | Finishing) else waiting_for(job)


def outcome(job: Job) -> str:
    """How a job's workers came out, once none is left: "3 of 4 workers finished; w1 was lost: silent for 1.2 s". Of a
    job that was drained they have not finished, and why it was comes first."""
    before, did, well = "", "finished", {Fate.DONE}
    if isinstance(job.phase, Draining):
        before, did, well = f"{job.phase.because}: ", "stopped in order", {Fate.DONE, Fate.LEFT}
    gone = job.members.gone("worker")
    others = [how_it_ended(member, end) for member, end in gone if end.fate not in well]
    if not others:
        return before + (f"the worker {did}" if len(gone) == 1 else f"all {len(gone)} workers {did}")
    finished = f"{before}{len(gone) - len(others)} of {counted(len(gone), 'worker')} {did}"
    if len(others) > NAMED:
        others = [*others[: NAMED - 1], f"{len(others) - NAMED + 1} more did not"]
    return "; ".join([finished, *others])


def members(job: Job | Over) -> list[MemberView]:
    """All that ever were: the workers by number, then the shards."""
    alive = "joined" if isinstance(job, Job) and isinstance(job.phase, Forming) else "active"
    records = job.members if isinstance(job, Over) else job.members.records
    views = []
    for member, record in sorted(
        records.items(), key=lambda one: (role_of(one[0]) == "shard", number_of(one[0]))
    ):
        match record:
            case Alive():
                state, because = alive, ""
            case Gone():
                state, because = record.fate.name.lower(), record.because
        views.append(MemberView(member, role_of(member), record.incarnation, state, because))
    return views


def table(events: Mapping[State, Mapping[type, Callable[..., object]]]) -> str:
    """Which event does what in which state, and where each cause leads from there, FINISHING left out."""
    states = list(events)
    kinds = dict.fromkeys(kind for row in events.values() for kind in row)

    def does(state: State, kind: type) -> str:
        handler = events[state].get(kind)
        return handler.__name__.strip("_").replace("_", " ") if handler is not None else "-"

    def leads(state: State, cause: Cause) -> str:
        following = NEXT[state].get(cause)
        if following is State.FINISHING:
            return OUTCOME[cause].name
        return following.name if following is not None else "-"

    rows = [["", *(state.name for state in states)]]
    rows += [[kind.__name__, *(does(state, kind) for state in states)] for kind in kinds]
    moves = [["", *(state.name for state in NEXT)]]
    moves += [[cause.value, *(leads(state, cause) for state in NEXT)] for cause in Cause]
    return "\n".join([*_columns(rows), "", *_columns(moves)])


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return ["    " + line.rstrip() for line in lines]


def name_samples(samples: Sequence[int]) -> str:
    """ "samples 3, 17, 4" """
    if not samples:
        return "its samples are not known"
    more = f" and {len(samples) - MOST_SAMPLES} more" if len(samples) > MOST_SAMPLES else ""
    noun = "sample" if len(samples) == 1 else "samples"
    return f"{noun} {', '.join(map(str, samples[:MOST_SAMPLES]))}{more}"
