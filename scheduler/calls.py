"""What can be asked of the data ledger, one frozen record each: the only way in which a ledger changes.

A live coordinator, a journal, a replay and an audit all speak these records (`batches.Ledger.perform`), so that what is
written down is what was done. The same calls in the same order give the same ledger. On disk a call is its kind, which
is the name of its class, and its fields.
"""

from dataclasses import dataclass
from typing import TypeAlias

from .ids import Seat, WorkerId


@dataclass(frozen=True, slots=True)
class Members:
    """The active workers of a new generation, in order of seniority."""

    seats: tuple[Seat, ...]


@dataclass(frozen=True, slots=True)
class Resume:
    """The job goes on in an epoch of an earlier run: these batches are over. The first call of all, if it comes."""

    epoch: int
    batches: int
    token: bytes
    committed: tuple[int, ...]
    skipped: tuple[int, ...] = ()
    samples: int = 0
    batch_size: int = 0


@dataclass(frozen=True, slots=True)
class Open:
    """A worker is at the start of an epoch. `samples` is how many its batches hold, each but the last `batch_size`."""

    worker: WorkerId
    epoch: int
    batches: int
    token: bytes
    samples: int = 0  # 0: not told
    batch_size: int = 0


@dataclass(frozen=True, slots=True)
class Take:
    """Lease up to `most` batches to a worker that stands at `clock`.

    `have` of the epoch have reached this incarnation; None stands for all of them.
    """

    worker: WorkerId
    epoch: int
    most: int
    have: int | None = None
    clock: int = 0


@dataclass(frozen=True, slots=True)
class Reached:
    """A worker has got to this clock."""

    epoch: int
    clock: int


@dataclass(frozen=True, slots=True)
class Commit:
    """The gradients of these batches are applied."""

    worker: WorkerId
    epoch: int
    batches: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Settle:
    """Of all that this worker was given in the epoch, in that order, the first `done` are applied."""

    worker: WorkerId
    epoch: int
    done: int


@dataclass(frozen=True, slots=True)
class Skip:
    """This batch is left out of the epoch, by the worker that holds it or on its behalf."""

    worker: WorkerId
    epoch: int
    batch: int
    because: str
    samples: tuple[int, ...] = ()  # indices, where they are known


@dataclass(frozen=True, slots=True)
class Blame:
    """The script of this worker has crashed with its batches in hand; with `kills` times a batch is condemned.

    Of all that it was given in the epoch, in that order, it had begun the first `begun`; None: perhaps all.
    """

    worker: WorkerId
    kills: int
    begun: int | None = None


@dataclass(frozen=True, slots=True)
class Drain:
    """Give out nothing more."""

    because: str


Call: TypeAlias = Members | Resume | Open | Take | Reached | Commit | Settle | Skip | Blame | Drain

KINDS: dict[str, type[Call]] = {
    kind.__name__: kind for kind in (Members, Resume, Open, Take, Reached, Commit, Settle, Skip, Blame, Drain)
}
