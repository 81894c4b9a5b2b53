"""One attempt's share of the endpoint that a whole cluster talks to: to the attempt's coordinator it is an endpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from ..transport import Answer, Endpoint, Handler, PeerInfo
from ..transport.peers import Buffer


class Branch:
    """What is sent goes out by the trunk; what comes for this attempt, the trunk's owner hands to `handler`."""

    def __init__(self, trunk: Endpoint, handler: Handler) -> None:
        self.trunk = trunk
        self.handler = handler

    @property
    def name(self) -> str:
        return self.trunk.name

    @property
    def addresses(self) -> tuple[str, ...]:
        return self.trunk.addresses

    async def start(self) -> None:
        """The trunk listens already."""

    async def connect(self, peer: str, addresses: Sequence[str], *, timeout_s: float = 10) -> None:
        await self.trunk.connect(peer, addresses, timeout_s=timeout_s)

    def disconnect(self, peer: str) -> None:
        self.trunk.disconnect(peer)

    async def request(
        self, peer: str, message: Struct, payload: Buffer | None = None, *, timeout_s: float
    ) -> Answer:
        return await self.trunk.request(peer, message, payload, timeout_s=timeout_s)

    def notify(self, peer: str, message: Struct, payload: Buffer | None = None) -> bool:
        return self.trunk.notify(peer, message, payload)

    def peers(self) -> Mapping[str, PeerInfo]:
        return self.trunk.peers()

    async def found(self, peer: str, *, timeout_s: float, anew: bool = False) -> bool:
        return await self.trunk.found(peer, timeout_s=timeout_s, anew=anew)

    def pace(self, peer: str, ping_s: float) -> None:
        self.trunk.pace(peer, ping_s)

    def catch_up(self) -> float:
        return self.trunk.catch_up()

    async def close(self) -> None:
        """The trunk goes on for others."""
