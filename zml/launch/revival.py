"""Which process that has ended is started again, when, and how often: decisions only.

What ended by itself is not: a script that finished or failed, a mistake in the configuration. What was killed, or
fenced because it was silent for too long, comes again, at once the first time and ever later after that; a process that
lived for a minute begins to count anew.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from ..config import Settings
from ..errors import BOOK, FENCED, LOST, PORT_IN_USE

HEALTHY_S = 60.0
FIRST_S, MOST_S = 0.5, 8.0  # before the second time, and at most
CRASHED = 1  # the exit code of an exception that nobody caught


@dataclass(frozen=True, slots=True)
class Again:
    """Start it once more, `after_s` from now."""

    after_s: float
    number: int
    most: int


class Revivals:
    """The accounts of one run."""

    def __init__(self, settings: Settings) -> None:
        self.most = {
            "coordinator": settings.coordinator_restarts,
            "shard": settings.shard_restarts,
            "worker": settings.worker_restarts,
        }
        self.numbers: dict[str, int] = {}

    def decide(self, member: str, code: int, last: Sequence[str], lived_s: float) -> Again | None:
        """This process ended, with its last lines; None where it stays so."""
        role = {"c": "coordinator", "p": "shard", "w": "worker"}[member[0]]
        if not is_death(role, code, last):
            return None
        if lived_s >= HEALTHY_S:
            self.numbers[member] = 0
        number = self.numbers.get(member, 0) + 1
        if number > self.most[role]:
            return None
        self.numbers[member] = number
        after_s = 0.0 if number == 1 else min(FIRST_S * 2 ** (number - 2), MOST_S)
        return Again(after_s, number, self.most[role])


def is_death(role: str, code: int, last: Sequence[str]) -> bool:
    """Did it end without having come to its end?"""
    if code < 0:
        # Whoever stops a process in order sends these to it; zml's own processes then end by themselves.
        return -code not in (signal.SIGINT, signal.SIGTERM)
    if role == "coordinator":
        return code in (CRASHED, BOOK[PORT_IN_USE].exit_code, BOOK[LOST].exit_code)
    return code == BOOK[FENCED].exit_code and any(f"[{FENCED}]" in line for line in last)
