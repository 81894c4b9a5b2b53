"""What a worker says to shards, and in which order."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from tests.simulation import simulate
from zml.agent.seat import Seat
from zml.errors import ZmlError
from zml.layout import Bucket
from zml.lease import COORDINATOR
from zml.messages import Advance, AnyMessage, Commit, Message, Ok, Push, Wait
from zml.transport import Answer, PeerLost, Refused
from zml.transport.memory import MemoryNetwork
from zml.worker import member
from zml.worker.client import Client

TRAINED = Bucket(index=0, shard=1, chunks=(0,), parameters=frozenset({0}), frozen=False)


class Shards:
    """Takes everything after a moment, but for the first so many messages to p0: it is not ready then."""

    def __init__(self, early: int) -> None:
        self.early = early
        self.told: list[tuple[str, str, int]] = []
        self.changed = asyncio.Event()

    async def request(self, shard: str, message: Message, payload: Any = None, *, timeout_s: float) -> Answer:
        await asyncio.sleep(0.01)
        assert isinstance(message, Commit | Push | Advance)
        if shard == "p0" and self.early:
            self.early -= 1
            raise Refused(shard, "early", "its log is being read")
        self.told.append((shard, type(message).__name__, message.clock))
        self.changed.set()
        self.changed = asyncio.Event()
        return Answer(Ok(), None)

    def peers(self) -> dict[str, Any]:
        return {}

    async def until(self, *told: Any) -> None:
        while told not in self.told:
            await self.changed.wait()


@pytest.mark.parametrize("early", [0, 1, 3])
def test_a_shard_without_anything_to_push_hears_of_steps_in_their_order(early: int) -> None:
    """It holds frozen parameters alone, so that nobody waits for it between two steps."""

    async def main() -> None:
        shards: Any = Shards(early)
        client = Client(Seat(job="job", worker="w0", incarnation=1, coordinator=[]), shards, shards)
        client.where.met(["p0", "p1"])
        steps = []
        for clock in range(4):
            client.push(TRAINED, clock, memoryview(b"gradient"), [])
            steps.append(asyncio.ensure_future(client.commit(clock, b"", [TRAINED])))
            await shards.until("p1", "Commit", clock)  # then its parameters come, and the next step begins
        await client.advance(9)
        await asyncio.gather(*steps)
        for shard in ("p0", "p1"):
            told = [(what, clock) for who, what, clock in shards.told if who == shard and what != "Push"]
            assert told == [("Commit", 0), ("Commit", 1), ("Commit", 2), ("Commit", 3), ("Advance", 9)]

    simulate(main())


class Full(Shards):
    """p0 has no room for an hour."""

    until_s = 3600.0

    async def request(self, shard: str, message: Message, payload: Any = None, *, timeout_s: float) -> Answer:
        if shard == "p0" and asyncio.get_running_loop().time() < self.until_s:
            raise Refused(shard, "full", "p0 has no room for its push log in /small")
        return await super().request(shard, message, payload, timeout_s=timeout_s)


def test_a_full_disk_uses_up_no_patience_and_fails_nobody() -> None:
    async def main() -> None:
        shards: Any = Full(0)
        seat = Seat(job="job", worker="w0", incarnation=1, coordinator=[], patience_s=60.0)
        client = Client(seat, shards, shards)
        client.where.met(["p0", "p1"])
        loop = asyncio.get_running_loop()
        pushing = asyncio.ensure_future(client.advance(1))
        await asyncio.sleep(1800.0)
        assert not pushing.done() and client.spared > 0
        begun = loop.time() - 1700.0
        client._waiting(Wait("job", ["w1"], "w1 is refused too"), begun + 60.0)
        await pushing
        assert Full.until_s <= loop.time() < Full.until_s + 5.0
        client._waiting(Wait("job", ["w1"], "busy", moved=7), begun)
        await asyncio.sleep(61.0)
        with pytest.raises(ZmlError, match="waited 60 s for w1"):
            client._waiting(Wait("job", ["w1"], "no more of it", moved=7), begun)
        client._waiting(Wait("job", ["w1"], "it goes on", moved=8), begun)

    simulate(main())


@pytest.mark.parametrize(("away_s", "found"), [(45.0, True), (75.0, False)])
def test_a_script_that_begins_while_the_coordinator_is_away_waits_as_patiently_as_in_a_step(
    away_s: float, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = MemoryNetwork(1)

    def endpoints(seat: Seat, handler: Any) -> list[Any]:
        names = (f"{seat.worker}.control", f"{seat.worker}.bulk")
        return [network.endpoint(name, vocabulary=AnyMessage, handler=handler) for name in names]

    async def main() -> None:
        seat = Seat(job="job", worker="w0", incarnation=1, coordinator=["tcp://a:1"], patience_s=60.0)
        script: Any = SimpleNamespace(seat=seat, _told=lambda peer, message, payload: None)
        connecting = asyncio.ensure_future(member.Member._connect(script))
        await asyncio.sleep(away_s)
        next_one = network.endpoint(
            COORDINATOR, vocabulary=AnyMessage, handler=script._told, bind=["tcp://a:1"]
        )
        await next_one.start()
        if found:
            client = await connecting
            assert COORDINATOR in client.control.peers()
            await client.control.close()
        else:
            with pytest.raises(PeerLost, match="in 60 s"):
                await connecting
        await next_one.close()

    monkeypatch.setattr(member, "script_endpoints", endpoints)
    simulate(main())
