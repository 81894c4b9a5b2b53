"""When a reply may leave: once the backup has every message that it follows from. `mirror` says why that holds for
parameters too."""

from __future__ import annotations

from collections.abc import Awaitable
from inspect import isawaitable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pulling import Reply
    from .shard import Shard


def covered(shard: Shard, reply: Reply | Awaitable[Reply]) -> Reply | Awaitable[Reply]:
    """The reply; of a shard without a backup at once."""
    if isawaitable(reply):  # there may be a mirror by then
        return _later(shard, reply)
    if shard.mirror is None:
        return reply
    wait = shard.mirror.settled()
    return reply if wait is None else _behind(wait, reply)


async def _later(shard: Shard, reply: Awaitable[Reply]) -> Reply:
    answer = await reply
    if shard.mirror is not None and (wait := shard.mirror.settled()) is not None:
        await wait
    return answer


async def _behind(wait: Awaitable[None], reply: Reply) -> Reply:
    await wait
    return reply
