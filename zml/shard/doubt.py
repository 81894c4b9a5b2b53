"""What a shard is in doubt of, while an edition of the placement is being decided (`ceding`)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import NoReturn

from ..transport import Refusal


@dataclass(slots=True, eq=False)
class Doubt:
    """What becomes of these buckets comes with this edition. `gives`: they are to go, else they have come."""

    edition: int
    buckets: frozenset[int]
    gives: bool
    over: asyncio.Future[None] | None = None  # of those who wait for it

    async def wait(self, name: str) -> NoReturn:
        """Raises Refusal once it is over: whoever waited is to look who has them now."""
        if self.over is None:
            self.over = asyncio.get_running_loop().create_future()
        await asyncio.shield(self.over)
        raise anew(name)

    def undecided(self, name: str) -> Refusal:
        """No cut is made through this shard now."""
        return Refusal("checkpoint", f"{name} waits for edition {self.edition} of the placement")

    def end(self) -> None:
        if self.over is not None and not self.over.done():
            self.over.set_result(None)


def anew(name: str) -> Refusal:
    """Whoever speaks to this shard is to look who holds what, and to enter again."""
    return Refusal("identity", f"the placement has another edition, and nobody has entered at {name} since")
