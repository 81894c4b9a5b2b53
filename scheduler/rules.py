"""The numbers that decisions depend on. They come from the configuration; the machine holds no other."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How patient the machine is. Times are seconds."""

    lease_s: float = 1.0
    """A member that was not heard for this long is lost; the jitter of its own renewals is allowed for on top."""

    lease_most_s: float = 5.0
    """No lease is longer than this, whatever the jitter."""

    jitter_factor: float = 2.0
    """How many times the worst lateness seen lately is allowed for."""

    lag_s: float = 0.25
    """The machine being asked this much after the deadline it gave means that the observer was held up."""

    return_s: float = 60.0
    """How long the job waits for a shard that is gone to come back, or for its last worker that was lost."""

    promote_s: float = 60.0
    """How long a process may take to serve what it is given: a copy of a shard, or the log of another process."""

    goodbye_s: float = 10.0
    """How long members may take to stop before the job is over without them."""

    remembered_jobs: int = 1_000
    """How many jobs that are over are kept for whoever asks; older ones are forgotten."""

    def __post_init__(self) -> None:
        if not 0 < self.lease_s <= self.lease_most_s:
            raise ValueError(
                f"lease_s must be above 0 and at most {self.lease_most_s:g}, not {self.lease_s:g}"
            )
        for name in ("jitter_factor", "lag_s", "return_s", "promote_s", "goodbye_s", "remembered_jobs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name):g}")

    @property
    def silent_s(self) -> float:
        """A member that was not heard for this long may be given up for another that asks for its place."""
        return self.lease_s / 2
