"""The network in memory: the same seed gives the same hour, and whatever it does, requests end as they promise.

Whole exchanges run here, over real frames and sessions, in virtual time.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.simulation import simulate
from zml.transport import AddressInUse, Answer, DeadlineExceeded, Endpoint, PeerLost, Refusal, Refused
from zml.transport.memory import MemoryEndpoint, MemoryNetwork


class Do(msgspec.Struct, frozen=True, tag=True):
    number: int
    takes_s: float = 0.0


class Done(msgspec.Struct, frozen=True, tag=True):
    number: int


class Party:
    """One process: what it handled, whom it found and lost, and when."""

    def __init__(self, network: MemoryNetwork, name: str, bind: tuple[str, ...] = ()) -> None:
        self.handled: Counter[int] = Counter()
        self.order: list[int] = []
        self.told: list[str] = []
        self.payloads: list[bytes] = []
        self.endpoint: MemoryEndpoint = network.endpoint(
            name,
            vocabulary=Do | Done,
            handler=self.handle,
            bind=bind,
            on_found=lambda peer: self.told.append(f"found {peer}"),
            on_lost=lambda peer, because: self.told.append(f"lost {peer}: {because}"),
        )

    async def handle(
        self, peer: str, message: msgspec.Struct, payload: memoryview | None
    ) -> tuple[Done, memoryview | None]:
        assert isinstance(message, Do)
        self.handled[message.number] += 1
        self.order.append(message.number)
        if payload is not None:
            self.payloads.append(bytes(payload))
        if message.number < 0:
            raise Refusal("negative", f"{message.number} is below zero")
        await asyncio.sleep(message.takes_s)
        return Done(message.number), payload


SHARD = "tcp://127.0.0.1:4000"


@asynccontextmanager
async def pair(network: MemoryNetwork) -> AsyncIterator[tuple[Party, Party]]:
    """A worker that has connected to a shard."""
    shard, worker = Party(network, "p0", (SHARD,)), Party(network, "w0")
    await shard.endpoint.start()
    await worker.endpoint.start()
    await worker.endpoint.connect("p0", [SHARD], timeout_s=600)
    yield worker, shard
    await worker.endpoint.close()
    await shard.endpoint.close()


async def some_traffic(network: MemoryNetwork, requests: int = 30) -> tuple[list[str], Party]:
    """Requests of all kinds in both directions; what became of each, and the shard."""
    outcomes: list[str] = []
    async with pair(network) as (worker, shard):

        async def ask(sender: Endpoint, peer: str, number: int) -> None:
            payload = bytes([number % 251]) * (number * 100) if number % 3 else None
            try:
                message, back = await sender.request(
                    peer, Do(number, number % 7 / 10), payload, timeout_s=120
                )
            except DeadlineExceeded as error:
                assert error.peer == peer
                outcomes.append("late")
                return
            assert message == Done(number)
            assert (None if back is None else bytes(back)) == payload
            outcomes.append("answered")

        async with asyncio.TaskGroup() as group:
            for number in range(requests):
                group.create_task(ask(worker.endpoint, "p0", number))
                group.create_task(ask(shard.endpoint, "w0", 1000 + number))
                await asyncio.sleep(network.random.random() / 10)
        assert max(worker.handled.values()) == 1
    return outcomes, shard


def test_the_same_seed_gives_the_same_trace_to_the_last_byte() -> None:
    def trace(seed: int) -> tuple[str, list[bytes]]:
        network = MemoryNetwork(seed, loss=0.1, duplication=0.1)
        simulate(some_traffic(network))
        return network.history(), [passage.header for passage in network.trace]

    assert trace(5) == trace(5)
    assert trace(5) != trace(6)


def test_a_quiet_network_carries_every_message_once() -> None:
    network = MemoryNetwork(1)
    outcomes, shard = simulate(some_traffic(network))
    assert outcomes == ["answered"] * 60
    assert set(network.counts) == {"arrived"}
    assert shard.handled == Counter(range(30))


@given(
    seed=st.integers(0, 2**32 - 1),
    loss=st.floats(0, 0.4),
    duplication=st.floats(0, 0.5),
    slow=st.floats(0, 1),
    ordered=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_under_loss_doubling_and_reordering_requests_are_handled_once_and_answered(
    seed: int, loss: float, duplication: float, slow: float, ordered: bool
) -> None:
    network = MemoryNetwork(seed, delay_s=(0.0, slow), loss=loss, duplication=duplication, ordered=ordered)
    outcomes, shard = simulate(some_traffic(network, requests=10))
    assert len(outcomes) == 20
    assert set(outcomes) <= {"answered", "late"}
    assert set(shard.handled.values()) == {1}
    if loss < 0.1:
        assert outcomes == ["answered"] * 20


def test_a_request_across_a_partition_ends_in_time_and_names_who_did_not_answer() -> None:
    async def main() -> None:
        network = MemoryNetwork(2)
        loop = asyncio.get_running_loop()
        async with pair(network) as (worker, shard):
            network.partition({"w0"}, {"p0"})
            start = loop.time()
            with pytest.raises(DeadlineExceeded, match="p0 did not answer Do within 60 s"):
                await worker.endpoint.request("p0", Do(1), timeout_s=60)
            assert loop.time() - start == pytest.approx(60)
            assert shard.handled == Counter()
            assert worker.told[1].startswith("lost p0: silent for ")
            assert shard.told[1].startswith("lost w0: silent for ")
            assert network.counts["cut off"] > 0

            network.heal()
            answer = await worker.endpoint.request("p0", Do(2), timeout_s=60)
            assert answer == Answer(Done(2), None)
            assert (worker.told[2], shard.told[2]) == ("found p0", "found w0")

    simulate(main())


def test_a_short_partition_is_bridged_by_resending() -> None:
    async def main() -> None:
        network = MemoryNetwork(3)
        async with pair(network) as (worker, shard):
            network.partition({"w0"}, {"p0"})
            asyncio.get_running_loop().call_later(1.5, network.heal)
            await worker.endpoint.request("p0", Do(1), timeout_s=30)
            assert (worker.told, shard.told) == (["found p0"], ["found w0"])
            assert shard.handled == Counter([1])

    simulate(main())


def test_a_reply_that_is_lost_is_sent_again_and_the_request_not_handled_again() -> None:
    async def main() -> None:
        network = MemoryNetwork(4)
        async with pair(network) as (worker, shard):
            network.partition({"p0"}, {"w0"}, both_ways=False)
            asyncio.get_running_loop().call_later(2.5, network.heal)
            await worker.endpoint.request("p0", Do(1), timeout_s=30)
            assert shard.handled == Counter([1])

    simulate(main())


def test_a_crash_says_nothing_and_is_found_out_by_silence() -> None:
    async def main() -> None:
        network = MemoryNetwork(5)
        loop = asyncio.get_running_loop()
        async with pair(network) as (worker, shard):
            crashed_at = loop.time()
            request = asyncio.create_task(worker.endpoint.request("p0", Do(1, takes_s=5), timeout_s=100))
            own = asyncio.create_task(shard.endpoint.request("w0", Do(2, takes_s=5), timeout_s=100))
            await asyncio.sleep(1)
            network.crash("p0")
            await asyncio.sleep(0)
            assert own.cancelled() or own.cancelling() or own.done()
            assert worker.told == ["found p0"]

            # The same address, a new life: what was under way may have been applied, and is not sent again.
            restarted = Party(network, "p0", (SHARD,))
            await restarted.endpoint.start()
            with pytest.raises(PeerLost, match="p0 is lost"):
                await request
            assert loop.time() - crashed_at < 60
            assert restarted.handled == Counter()
            await worker.endpoint.request("p0", Do(3), timeout_s=60)
            assert restarted.handled == Counter([3])
            assert [line.split(":")[0] for line in worker.told] == ["found p0", "lost p0", "found p0"]
            await restarted.endpoint.close()

    simulate(main())


def test_who_waits_in_a_process_that_crashes_is_cancelled() -> None:
    async def main() -> None:
        network = MemoryNetwork(6)
        async with pair(network) as (worker, shard):
            waiting = asyncio.create_task(worker.endpoint.request("p0", Do(1, takes_s=10), timeout_s=100))
            dialling = asyncio.create_task(worker.endpoint.connect("p9", ["tcp://10.0.0.9:1"], timeout_s=100))
            await asyncio.sleep(1)
            network.crash("w0")
            done, _ = await asyncio.wait({waiting, dialling})
            assert all(task.cancelled() for task in done)
            await asyncio.sleep(1)  # what was on its way when it crashed arrives
            passed = len(network.trace)
            await asyncio.sleep(60)
            assert [
                str(p) for p in list(network.trace)[passed:] if p.sender == "w0" and p.fate == "arrived"
            ] == []
            assert shard.told[1].startswith("lost w0: silent")

    simulate(main())


def test_a_restarted_worker_replaces_its_former_self() -> None:
    async def main() -> None:
        network = MemoryNetwork(7)
        async with pair(network) as (_, shard):
            network.crash("w0")
            second = Party(network, "w0")
            await second.endpoint.start()
            await second.endpoint.connect("p0", [SHARD])
            await second.endpoint.request("p0", Do(1), timeout_s=5)
            assert shard.told == ["found w0", "lost w0: it was started anew", "found w0"]
            await second.endpoint.close()

    simulate(main())


def test_a_refusal_arrives_as_one() -> None:
    async def main() -> None:
        async with pair(MemoryNetwork(8)) as (worker, _):
            with pytest.raises(Refused) as caught:
                await worker.endpoint.request("p0", Do(-3), timeout_s=5)
            assert (caught.value.peer, caught.value.code) == ("p0", "negative")

    simulate(main())


def test_a_payload_that_is_changed_too_early_arrives_changed() -> None:
    async def main() -> None:
        async with pair(MemoryNetwork(9)) as (worker, shard):
            payload = bytearray(b"gradient")
            request = asyncio.create_task(worker.endpoint.request("p0", Do(1), payload, timeout_s=5))
            await asyncio.sleep(0)
            payload[:] = b"overrun!"
            await request
            assert shard.payloads == [b"overrun!"]

    simulate(main())


@pytest.mark.parametrize("ordered", [True, False])
def test_only_an_ordered_network_keeps_the_order(ordered: bool) -> None:
    async def main() -> list[int]:
        network = MemoryNetwork(10, delay_s=(0, 0.5), ordered=ordered)
        async with pair(network) as (worker, shard):
            async with asyncio.TaskGroup() as group:
                for number in range(100):
                    group.create_task(worker.endpoint.request("p0", Do(number), timeout_s=30))
            return shard.order

    order = simulate(main())
    assert sorted(order) == list(range(100))
    assert (order == sorted(order)) == ordered


def test_ports_are_numbered_and_an_address_is_taken_once() -> None:
    async def main() -> None:
        network = MemoryNetwork(11)
        one = Party(network, "one", ("tcp://127.0.0.1:0", "tcp://127.0.0.1:0", "ipc:///run/one"))
        assert not one.endpoint.addresses
        await one.endpoint.start()
        assert one.endpoint.addresses == (
            "tcp://127.0.0.1:40001",
            "tcp://127.0.0.1:40002",
            "ipc:///run/one",
        )
        with pytest.raises(AddressInUse, match="40002"):
            await Party(network, "two", ("tcp://127.0.0.1:40002",)).endpoint.start()
        await one.endpoint.close()
        two = Party(network, "two", ("tcp://127.0.0.1:40002",))
        await two.endpoint.start()
        await two.endpoint.close()

    simulate(main())


def test_a_storm_of_partitions_and_crashes_leaves_every_request_ended() -> None:
    """Six workers, two shards, twenty minutes of trouble: every request ends, and none is handled twice by one life."""
    seed = random.randrange(1 << 32)
    print("seed", seed)

    async def main() -> None:
        network = MemoryNetwork(seed, loss=0.02, duplication=0.02)
        addresses = {f"p{n}": f"tcp://10.0.0.{n}:1" for n in range(2)}
        lives: list[Party] = []
        ended: Counter[str] = Counter()

        async def start_shard(name: str) -> None:
            lives.append(Party(network, name, (addresses[name],)))
            await lives[-1].endpoint.start()

        async def work(name: str, first: int) -> None:
            party = Party(network, name)
            await party.endpoint.start()
            for shard, address in addresses.items():
                await party.endpoint.connect(shard, [address], timeout_s=3600)
            for number in range(first, first + 100):
                try:
                    await party.endpoint.request(f"p{number % 2}", Do(number), b"x" * 1000, timeout_s=20)
                    ended["answered"] += 1
                except (DeadlineExceeded, PeerLost) as error:
                    ended[type(error).__name__] += 1
                await asyncio.sleep(network.random.uniform(0, 20))
            await party.endpoint.close()

        async def trouble() -> None:
            while True:
                await asyncio.sleep(network.random.uniform(0, 200))
                shard = network.random.choice(list(addresses))
                if network.random.random() < 0.3:
                    network.crash(shard)
                    await asyncio.sleep(network.random.uniform(0, 10))
                    await start_shard(shard)
                else:
                    network.partition({shard}, {f"w{network.random.randrange(6)}" for _ in range(3)})
                    await asyncio.sleep(network.random.uniform(0, 30))
                    network.heal()

        for shard in addresses:
            await start_shard(shard)
        mischief = asyncio.create_task(trouble())
        async with asyncio.TaskGroup() as group:
            for worker in range(6):
                group.create_task(work(f"w{worker}", worker * 1000))
        mischief.cancel()
        assert ended.total() == 600
        assert ended["answered"] > 400
        assert all(times == 1 for life in lives for times in life.handled.values())
        for life in lives:
            await life.endpoint.close()

    simulate(main())


def test_an_endpoint_that_has_ended_finds_nobody_or_who_tries_again_and_again_would_never_pause() -> None:
    async def main(network: MemoryNetwork) -> float:
        loop = asyncio.get_running_loop()
        shard, worker = Party(network, "p0", (SHARD,)), Party(network, "w0")
        await shard.endpoint.start()
        await worker.endpoint.start()
        await worker.endpoint.connect("p0", [SHARD], timeout_s=600)
        assert await worker.endpoint.found("p0", timeout_s=1.0)
        worker.endpoint.die()
        begin = loop.time()
        while loop.time() < begin + 5.0:
            with pytest.raises(PeerLost, match="closed"):
                await worker.endpoint.request("p0", Do(1), timeout_s=1.0)
            assert not await worker.endpoint.found("p0", timeout_s=1.0)
        await shard.endpoint.close()
        return loop.time() - begin

    assert simulate(main(MemoryNetwork(1))) == pytest.approx(5.0)


def test_who_is_waited_for_is_found_when_he_comes_and_not_before() -> None:
    async def main(network: MemoryNetwork) -> list[tuple[bool, float]]:
        loop = asyncio.get_running_loop()
        shard, worker = Party(network, "p0", (SHARD,)), Party(network, "w0")
        await shard.endpoint.start()
        found: list[tuple[bool, float]] = []

        async def wait(timeout_s: float) -> None:
            begin = loop.time()
            found.append((await shard.endpoint.found("w0", timeout_s=timeout_s), loop.time() - begin))

        await wait(2.0)
        waiting = [asyncio.ensure_future(wait(60.0)) for _ in range(2)]
        await asyncio.sleep(5.0)
        await worker.endpoint.start()
        await worker.endpoint.connect("p0", [SHARD], timeout_s=600)
        await asyncio.gather(*waiting)
        await wait(60.0)
        await worker.endpoint.close()
        await asyncio.sleep(1.0)
        await wait(3.0)
        await shard.endpoint.close()
        return found

    network = MemoryNetwork(1)
    (never, took), first, second, (again, at_once), (gone, last) = simulate(main(network))
    assert not never and took == pytest.approx(2.0)
    assert [first[0], second[0]] == [True, True] and 5.0 <= first[1] < 6.0
    assert (again, at_once) == (True, 0.0)
    assert not gone and last == pytest.approx(3.0)


def test_who_has_not_read_all_that_came_misses_no_answer_and_misses_it_soon_after() -> None:
    async def main(network: MemoryNetwork) -> tuple[bool, str, float]:
        loop = asyncio.get_running_loop()
        async with pair(network) as (worker, _):
            await asyncio.sleep(5.0)
            since = loop.time()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(worker.endpoint, "catch_up", lambda: loop.time() - since)
                network.crash("p0")
                asking = asyncio.ensure_future(worker.endpoint.request("p0", Do(1), timeout_s=3))
                await asyncio.sleep(20.0)
                waits = not asking.done()
            with pytest.raises(DeadlineExceeded) as caught:
                await asking
            return waits, str(caught.value), loop.time() - since

    waits, said, took = simulate(main(MemoryNetwork(3)))
    assert waits and "did not answer Do within 3 s" in said
    assert took < 45.0, "it looks again before long"


@pytest.mark.parametrize("asks", [0, 3])
@pytest.mark.parametrize(("who", "whom"), [("p0", "w0"), ("w0", "p0")])
def test_who_has_not_read_all_that_came_calls_nobody_silent_and_everybody_soon_after(
    who: str, whom: str, asks: int
) -> None:
    """Whoever dialled pings meanwhile, and requests are sent again: each time it is looked at the peer."""

    async def main(network: MemoryNetwork) -> list[tuple[str, ...]]:
        loop = asyncio.get_running_loop()
        told: list[tuple[str, ...]] = []
        async with pair(network) as (worker, shard):
            party = worker if who == "w0" else shard
            await asyncio.sleep(5.0)
            since = loop.time()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(party.endpoint, "catch_up", lambda: loop.time() - since)
                network.crash(whom)
                requests = [
                    asyncio.ensure_future(party.endpoint.request(whom, Do(number), timeout_s=300))
                    for number in range(asks)
                ]
                await asyncio.sleep(25.0)
                told.append(tuple(party.told))
            await asyncio.sleep(10.0)
            told.append(tuple(party.told))
            for request in requests:
                request.cancel()
        return told

    held_up, caught_up = simulate(main(MemoryNetwork(3)))
    assert held_up == (f"found {whom}",)
    assert [what.partition(":")[0] for what in caught_up] == [f"found {whom}", f"lost {whom}"]
