"""What peers did wrong: every case is counted, few are logged.

A hostile peer may break rules a million times a second, under a million names; the log must not become its weapon.
"""

from collections import Counter, OrderedDict
from math import inf
from typing import Any, Final

import structlog

EVERY_S: Final = 10.0
LINES: Final = 50  # in that time, whoever did whatever
REMEMBERED: Final = 1024

log = structlog.get_logger("zml.transport")


class Violations:
    """Counted by rule. One log line per rule and culprit in ten seconds, with the number of those left out, and fifty
    lines altogether."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._logged: OrderedDict[tuple[str, str], tuple[float, int]] = (
            OrderedDict()
        )  # last time, left out since
        self._began = -inf  # the present ten seconds
        self._lines = 0  # in them
        self._unlogged = 0  # since they began, for lack of lines

    def note(self, rule: str, who: str, what: str, now: float, **more: Any) -> None:
        """`who` did `what`, which breaks `rule`. `now` in seconds, by any clock that is always the same."""
        self.counts[rule] += 1
        at, left_out = self._logged.get((rule, who), (-inf, 0))
        if now - at < EVERY_S:
            self._logged[rule, who] = (at, left_out + 1)
            return
        if not self._take_line(now):
            return
        self._logged[rule, who] = (now, 0)
        self._logged.move_to_end((rule, who))
        if len(self._logged) > REMEMBERED:
            self._logged.popitem(last=False)
        if left_out:
            more["left_out"] = left_out
        log.warning("refused what a peer sent", rule=rule, peer=who, what=what, **more)

    def _take_line(self, now: float) -> bool:
        if now - self._began >= EVERY_S:
            if self._unlogged:
                log.warning("refused more than is logged", times=self._unlogged)
            self._began, self._lines, self._unlogged = now, 0, 0
        if self._lines >= LINES:
            self._unlogged += 1
            return False
        self._lines += 1
        return True
