"""How often may an agent start again what has died? So many times within an hour. It reads no clock."""

from collections import deque

WITHIN_S = 3600.0


class Restarts:
    """The restarts of one agent. `most` is 0 where nothing is to be started again."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.at: deque[float] = deque()  # of those within the last hour, the oldest first

    def allowed(self, now: float) -> bool:
        while self.at and self.at[0] <= now - WITHIN_S:
            self.at.popleft()
        return len(self.at) < self.most

    def take(self, now: float) -> bool:
        """One more, if it is allowed."""
        allowed = self.allowed(now)
        if allowed:
            self.at.append(now)
        return allowed

    def __str__(self) -> str:
        return f"{len(self.at)} of {self.most} restarts within an hour"
