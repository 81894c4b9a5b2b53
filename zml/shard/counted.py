"""What a shard has of a worker's steps: staged, committed, and the newest that counts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..hyper import NO_WISH, Hyper, read_wish
from .store import Staged


@dataclass(slots=True)
class Step:
    """What one worker has staged for one clock: nothing of it counts before its commit."""

    pushes: dict[int, Staged] = field(default_factory=dict)  # by bucket


class Last(NamedTuple):
    """The newest step of one incarnation that counts, and how many batches of which epoch are in it and before it."""

    clock: int
    epoch: int
    done: int
    hyper: bytes
    incarnation: int = 0


NOTHING = Last(-1, -1, 0, b"")


@dataclass(slots=True)
class Committed:
    """A step whose commit has come, waiting (BSP only) for the other workers' steps of the same clock."""

    pushes: Sequence[Staged]
    hyper: list[Hyper]
    last: Last


def agreed(applied: Collection[Last]) -> int:
    """In BSP: which of `worker.auto`'s settings all workers compress with next. The last one, which sends least, of
    those that the workers of the newest clock have wished for: everybody waits for the slowest exchange.

    It follows from the steps in the parameters alone. So all shards say the same, whatever dies, and workers that hold
    the same parameters hold the same setting.
    """
    newest = max((last.clock for last in applied), default=NOTHING.clock)
    return max((read_wish(last.hyper) for last in applied if last.clock == newest), default=NO_WISH)
