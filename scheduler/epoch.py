"""The accounts of one epoch: where each of its batches is. `batches.Ledger` moves them.

A batch is not dealt yet, or in the share of a worker that may take it, or leased to one, or over: committed or skipped.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from .ids import WorkerId

MOST_NAMED = 8  # of those who are waited for, with what each of them holds
COMMITTED, SKIPPED = 1, 2  # how a batch is over


@dataclass(slots=True)
class Pass:
    """The accounts of one epoch. Every batch is in exactly one of: `undealt`, one share, `leases`, over."""

    epoch: int
    batches: int
    first_clock: int
    token: bytes
    opener: WorkerId
    samples: int  # in all batches, and in each but the last; 0 where nobody has said
    batch_size: int
    state: bytearray  # one byte per batch, 0 or how it is over
    to_go: int  # batches that are not over
    undealt: list[int] = field(default_factory=list)  # empty unless nobody is present
    shares: dict[WorkerId, deque[int]] = field(default_factory=dict)  # dealt and not taken; of those present
    leases: dict[int, WorkerId] = field(default_factory=dict)  # taken and not committed
    given: dict[WorkerId, list[int]] = field(default_factory=dict)  # all that those present took, in order
    returned: set[int] = field(default_factory=set)  # leased once, not committed, and back; they go out first
    strikes: dict[int, int] = field(
        default_factory=dict
    )  # crashes with it in hand; of batches that are not over
    skipped: int = 0
    dealt_again: bool = False
    beyond: bool = False  # somebody has batches for clocks behind the last at which the others began to rest
    given_again: int = 0  # batches leased after either
    furthest: int = 0  # the clock of the worker that was the furthest when it last asked

    @property
    def over(self) -> bool:
        return self.to_go == 0

    @property
    def next_clock(self) -> int:
        """No gradient of this epoch was applied at this clock or later. One batch is one clock of one worker, mostly,
        and a worker without a batch rests until first_clock + batches; it goes on beyond that only with batches that
        were dealt again, and then from where the others rest. Whoever commits a batch says which clock it reached."""
        return max(self.first_clock + self.batches + self.given_again, self.furthest)

    def samples_in(self, batch: int) -> int:
        """0 where nobody has said."""
        return max(0, min(self.batch_size, self.samples - batch * self.batch_size))

    def deal(self, present: Sequence[WorkerId]) -> None:
        """Deal all that is not taken, round robin, what came back from a lost worker first."""
        cards = [*self.undealt, *(batch for share in self.shares.values() for batch in share)]
        cards = sorted(self.returned.intersection(cards)) + sorted(set(cards) - self.returned)
        self.undealt = [] if present else cards
        self.shares = {worker: deque(cards[place :: len(present)]) for place, worker in enumerate(present)}
        self.given = {worker: self.given.get(worker, []) for worker in present}

    def take_back(self, worker: WorkerId) -> int:
        """A worker is gone: what it held is to be dealt again. Returns how many batches it held."""
        held = [batch for batch, owner in self.leases.items() if owner == worker]
        for batch in held:
            del self.leases[batch]
        self.returned.update(held)
        self.undealt += [*held, *self.shares.pop(worker, ())]
        self.given.pop(worker, None)
        return len(held)

    def owing(self) -> list[WorkerId]:
        """Who has batches that are not committed, in order of seniority."""
        leasing = set(self.leases.values())
        return [worker for worker, share in self.shares.items() if share or worker in leasing]

    def held(self, worker: WorkerId, first: int | None = None) -> list[int]:
        """What this worker has taken and not committed, in the order in which it took it; of the `first` so many."""
        return [batch for batch in self.given.get(worker, [])[:first] if self.leases.get(batch) == worker]

    def end(self, batch: int, how: int) -> None:
        """A leased batch is over."""
        self.state[batch] = how
        self.to_go -= 1
        self.skipped += how == SKIPPED
        del self.leases[batch]
        self.strikes.pop(batch, None)

    def who_holds(self) -> str:
        """ "w0 has 3 from 12 on, w1 has 17": what those who are waited for hold and have not taken yet."""
        out: dict[WorkerId, tuple[int, int]] = {}  # how many, and the first
        for worker, share in self.shares.items():
            out[worker] = (len(share), share[0] if share else self.batches)
        for batch, worker in self.leases.items():
            count, first = out[worker]
            out[worker] = (count + 1, min(first, batch))
        owing = [(worker, *out[worker]) for worker in out if out[worker][0]]
        words = [
            f"{worker} has {count:,} from {first} on" if count > 1 else f"{worker} has {first}"
            for worker, count, first in owing[:MOST_NAMED]
        ]
        more = len(owing) - len(words)
        return ", ".join([*words, f"{more} more workers"] if more else words)

    def check(self) -> None:
        """Every invariant, derived from scratch."""
        open_batches = [*self.undealt, *(b for share in self.shares.values() for b in share), *self.leases]
        done = [batch for batch, how in enumerate(self.state) if how]
        assert self.skipped == self.state.count(SKIPPED)
        assert not self.strikes.keys() & set(done), "a batch that is over is under suspicion"
        assert sorted([*open_batches, *done]) == list(range(self.batches)), "a batch is lost or doubled"
        assert self.to_go == len(open_batches), (self.to_go, len(open_batches))
        assert not (self.undealt and self.shares), "somebody is present, and batches are not dealt"
        assert self.shares.keys() == self.given.keys(), (self.shares.keys(), self.given.keys())
        assert all(batch in self.given[worker] for batch, worker in self.leases.items())
        assert not self.returned & {*done, *self.leases}, "a batch that came back is out again"
