"""How patient the cluster is. Times are seconds.

Those of a coordinator are in its journal, for each time that they were others: what happened is read again by the rules
of then, whatever those of today are. A rule that is new has a default.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    lease_s: float = 5.0
    """A node that was not heard for this long is lost, with all that it runs."""

    start_s: float = 300.0
    """For everybody of an attempt to come; then it is given up, and tried again."""

    drain_s: float = 120.0
    """For a job to leave in order; then it is stopped, and goes back to its last checkpoint."""

    stop_s: float = 30.0
    """For what was stopped to be gone; then its processes are killed."""

    finish_s: float = 300.0
    """For all scripts of a job to come to their end, once one has: so long nobody drains it for others."""

    retry_s: float = 5.0
    """Before the first retry; doubled for each further one, up to `retry_most_s`."""

    retry_most_s: float = 300.0

    losses: int = 20
    """Attempts in a row that machines may end before the job is given up: its script is then suspected."""

    false_starts: int = 5
    """The same of attempts that never began: something is wrong with the nodes, or with what was asked for."""

    healthy_s: float = 600.0
    """An attempt that ran for so long begins a new row."""

    remembered: int = 10_000
    """Jobs that are over and still shown."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name):g}")

    def pause_s(self, times: int) -> float:
        """Before it is tried again, after so many failures."""
        return float(min(self.retry_s * 2 ** min(times - 1, 30), self.retry_most_s))
