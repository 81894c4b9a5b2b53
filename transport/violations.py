"""What peers did wrong: every case is counted, few are logged.

A hostile peer may break rules a million times a second; the log must not become its weapon.
"""

from collections import Counter, OrderedDict
from typing import Any, Final

import structlog

EVERY_S: Final = 10.0
REMEMBERED: Final = 1024

log = structlog.get_logger("zml.transport")


class Violations:
    """Counted by rule. One log line per rule and culprit in ten seconds, with the number of those left out."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._logged: OrderedDict[tuple[str, str], list[float]] = (
            OrderedDict()
        )  # last logged at, left out since

    def note(self, rule: str, who: str, what: str, now: float, **more: Any) -> None:
        """`who` did `what`, which breaks `rule`. `now` in seconds, by any clock that is always the same."""
        self.counts[rule] += 1
        entry = self._logged.get((rule, who))
        if entry is None:
            self._logged[rule, who] = [now, 0]
            if len(self._logged) > REMEMBERED:
                self._logged.popitem(last=False)
        elif now - entry[0] < EVERY_S:
            entry[1] += 1
            return
        else:
            more["left_out"] = int(entry[1])
            entry[:] = now, 0
        log.warning("refused what a peer sent", rule=rule, peer=who, what=what, **more)
