"""How many lines this process has logged, by level: a handler of the standard library's loggers that keeps no more.

There is one for the process, as there is one root logger; `zml.logs.outlets` puts it there.
"""

from __future__ import annotations

import logging

LEVELS = ("debug", "info", "warning", "error", "critical")


class Counting(logging.Handler):
    """Levels of other names count as the one below."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = dict.fromkeys(LEVELS, 0)

    def emit(self, record: logging.LogRecord) -> None:
        self.counts[LEVELS[min(max(record.levelno // 10 - 1, 0), len(LEVELS) - 1)]] += 1


COUNTED = Counting()
