"""The endpoint over real sockets: both event loops, tcp and ipc, with and without shared memory."""

import asyncio
import gc
import os
import socket
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq
from structlog.testing import capture_logs

from tests.transport.wiring import LOOPS, PATIENCE_S, QUICK, Add, Done, Echo, Fail, Party, run, running
from zml.transport import (
    CONTROL,
    AddressInUse,
    Answer,
    BadAddress,
    Congested,
    DeadlineExceeded,
    LocalProtocolError,
    LoopThread,
    OpenBind,
    PeerLost,
    Refused,
    ZmqEndpoint,
)

FIRST_PATIENCE_S = 1.0  # `transport.peer.PATIENCE_S`
LOCAL = "tcp://127.0.0.1:0"
NO_MEMORY = replace(QUICK, slots=0)


def ipc(folder: Path) -> str:
    return f"ipc://{folder}/s"


async def joined(worker: Party, shard: Party) -> None:
    await worker.endpoint.connect(shard.endpoint.name, shard.endpoint.addresses)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("where", ["tcp", "ipc"])
@pytest.mark.parametrize("limits", [QUICK, NO_MEMORY], ids=["memory", "socket"])
def test_payloads_of_every_length_arrive_as_they_were(
    loop: str, where: str, limits: Any, tmp_path: Path
) -> None:
    async def main() -> None:
        shard, worker = (
            Party("p0", [LOCAL if where == "tcp" else ipc(tmp_path)], limits=limits),
            Party("w0", limits=limits),
        )
        async with running(shard, worker):
            await joined(worker, shard)
            assert await worker.endpoint.request("p0", Echo(1), timeout_s=30) == Answer(Done(1), None)
            most = limits.payload_bytes
            for size in [0, 1, 32, 33, 8191, 8192, 65_535, 65_536, 1 << 20, most]:
                payload = os.urandom(size)
                message, back = await worker.endpoint.request("p0", Echo(size), payload, timeout_s=30)
                assert message == Done(size) and back is not None and bytes(back) == payload
                message, back = await shard.endpoint.request("w0", Echo(size), payload, timeout_s=30)
                assert message == Done(size) and back is not None and bytes(back) == payload
            assert worker.endpoint.peers()["p0"].shared_memory == (limits is QUICK)
            with pytest.raises(LocalProtocolError, match=f"{most + 1} bytes; {most} are allowed"):
                await worker.endpoint.request("p0", Echo(0), bytes(most + 1), timeout_s=30)
            assert worker.endpoint.violations.counts == shard.endpoint.violations.counts == {}

    run(main(), loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_thousands_of_small_messages_both_ways_and_no_edge_is_missed(loop: str) -> None:
    async def main() -> None:
        shard, worker = Party("p0", [LOCAL]), Party("w0")
        async with running(shard, worker):
            await joined(worker, shard)

            async def ask(endpoint: ZmqEndpoint, peer: str, numbers: Iterator[int]) -> None:
                for number in numbers:
                    assert (await endpoint.request(peer, Echo(number), timeout_s=30)).message == Done(number)

            out, back = iter(range(2000)), iter(range(2000))
            async with asyncio.TaskGroup() as group:
                for _ in range(40):
                    group.create_task(ask(worker.endpoint, "p0", out))
                    group.create_task(ask(shard.endpoint, "w0", back))

    run(main(), loop)


@pytest.mark.parametrize("loop", LOOPS)
def test_bursts_of_notices_arrive_whole_and_in_order(loop: str) -> None:
    """Each burst is longer than what is taken in at a time, and nothing else wakes the receiver."""

    async def main() -> None:
        limits = replace(CONTROL, ping_s=20.0, silence_s=60.0, silence_most_s=60.0)
        shard, worker = Party("p0", [LOCAL], limits=limits), Party("w0", limits=limits)
        async with running(shard, worker):
            await joined(worker, shard)
            for burst in range(1, 6):
                for number in range(500):
                    assert worker.endpoint.notify("p0", Add(number))
                await shard.until(lambda: len(shard.handled) >= burst * 500)  # noqa: B023
            assert shard.handled == list(range(500)) * 5

    run(main(), loop)


@pytest.mark.parametrize("limits", [QUICK, NO_MEMORY], ids=["memory", "socket"])
def test_a_received_payload_does_not_change_while_it_is_held(limits: Any) -> None:
    """More are held than the ring has slots: those that come later go over the socket."""

    async def main() -> None:
        shard, worker = Party("p0", [LOCAL], limits=limits), Party("w0", limits=limits)
        async with running(shard, worker):
            await joined(worker, shard)
            count = 2 * QUICK.slots
            buffer = bytearray(70_000)
            for number in range(count):
                buffer[:] = bytes([number]) * len(
                    buffer
                )  # one buffer for all: it is free when a request has ended
                await worker.endpoint.request("p0", Add(number), buffer, timeout_s=30)
            assert [bytes(held or b"") for held in shard.held] == [
                bytes([n]) * len(buffer) for n in range(count)
            ]
            slices = [held[10:20] for held in shard.held if held is not None]
            shard.held.clear()
            for number in range(count):
                await worker.endpoint.request("p0", Echo(number), bytes([255]) * len(buffer), timeout_s=30)
            assert [bytes(part) for part in slices] == [bytes([n]) * 10 for n in range(count)]

    run(main())


def test_slots_that_are_free_again_are_used_again() -> None:
    async def main() -> None:
        shard, worker = Party("p0", [LOCAL]), Party("w0")
        async with running(shard, worker):
            await joined(worker, shard)
            peer, back = worker.endpoint._peers["p0"], shard.endpoint._peers["w0"]
            assert peer.lane is not None and peer.lane._out is not None
            assert back.lane is not None and back.lane._out is not None
            payload = bytes(100_000)
            for number in range(3 * QUICK.slots):
                await worker.endpoint.request("p0", Echo(number), payload, timeout_s=30)
            out, home = peer.lane._out, back.lane._out
            await worker.until(lambda: out.free == home.free == QUICK.slots)

    run(main())


def test_without_a_free_slot_the_socket_carries_the_payload() -> None:
    async def main() -> None:
        shard, worker = Party("p0", [LOCAL]), Party("w0")
        async with running(shard, worker):
            await joined(worker, shard)
            for number in range(QUICK.slots):
                await worker.endpoint.request("p0", Add(number), bytes(70_000), timeout_s=30)
            lane = worker.endpoint._peers["p0"].lane
            assert lane is not None and lane._out is not None and lane._out.free == 0
            answer = await worker.endpoint.request("p0", Echo(0), b"x" * 70_000, timeout_s=30)
            assert answer.payload is not None and bytes(answer.payload) == b"x" * 70_000

    run(main())


def test_a_handler_may_answer_at_once_or_later_and_may_say_no() -> None:
    async def main() -> None:
        shard, worker = Party("p0", [LOCAL]), Party("w0")
        shard.gate = asyncio.Event()
        async with running(shard, worker):
            await joined(worker, shard)
            later = asyncio.ensure_future(worker.endpoint.request("p0", Add(1), timeout_s=30))
            await shard.until(lambda: shard.handled == [1])
            assert (await worker.endpoint.request("p0", Echo(2), timeout_s=30)).message == Done(2)
            shard.gate.set()
            assert (await later).message == Done(1)
            with pytest.raises(Refused) as refused:
                await worker.endpoint.request("p0", Fail("refuse"), timeout_s=30)
            assert (refused.value.peer, refused.value.code, refused.value.because) == (
                "p0",
                "full",
                "no room",
            )
            with pytest.raises(Refused, match=r"on second thoughts \[later\]"):
                await worker.endpoint.request("p0", Fail("later"), timeout_s=30)

    run(main())


@pytest.mark.parametrize("how", ["raise", "nothing", "long"])
def test_a_handler_that_fails_is_logged_without_its_variables_and_answered(how: str) -> None:
    async def main() -> None:
        shard, worker = Party("p0", [LOCAL]), Party("w0")
        async with running(shard, worker):
            await joined(worker, shard)
            with capture_logs() as logs, pytest.raises(Refused, match=r"\[internal\]"):
                await worker.endpoint.request("p0", Fail(how), timeout_s=30)
            errors = [entry for entry in logs if entry["log_level"] == "error"]
            assert len(errors) == 1 and errors[0]["peer"] == "w0"
            assert "patient" not in str(
                {key: value for key, value in errors[0].items() if key != "traceback"}
            )
            if how == "raise":
                assert "RuntimeError: broken" in errors[0]["traceback"]
            assert (await worker.endpoint.request("p0", Echo(2), timeout_s=30)).message == Done(2)

    run(main())


def test_a_deadline_names_who_did_not_answer_what_for_how_long() -> None:
    async def main() -> None:
        shard, worker = Party("p0", [LOCAL]), Party("w0")
        shard.gate = asyncio.Event()
        async with running(shard, worker):
            await joined(worker, shard)
            with pytest.raises(DeadlineExceeded) as late:
                await worker.endpoint.request("p0", Add(1), timeout_s=0.3)
            assert str(late.value) == (
                "p0 did not answer Add within 0.3 s. The request may still have been applied."
            )
            assert (late.value.peer, late.value.message, late.value.sent) == ("p0", "Add", True)
            assert worker.endpoint.peers()["p0"].outstanding == 0

    run(main())


def test_a_cancelled_request_gives_its_credit_back_and_the_next_one_works() -> None:
    async def main() -> None:
        shard, worker = Party("p0", [LOCAL]), Party("w0")
        shard.gate = asyncio.Event()
        async with running(shard, worker):
            await joined(worker, shard)
            task = asyncio.ensure_future(worker.endpoint.request("p0", Add(1), bytes(1000), timeout_s=30))
            await shard.until(lambda: shard.handled == [1])
            assert worker.endpoint.peers()["p0"].outstanding_bytes == 1000
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert worker.endpoint.peers()["p0"].outstanding_bytes == 0
            assert (await worker.endpoint.request("p0", Echo(2), timeout_s=30)).message == Done(2)

    run(main())


def test_unanswered_payloads_never_exceed_the_credit() -> None:
    async def main() -> None:
        limits = replace(QUICK, payload_bytes=100_000, credit_bytes=250_000, waiting=10)
        shard, worker = Party("p0", [LOCAL], limits=limits), Party("w0", limits=limits)
        shard.gate = asyncio.Event()
        async with running(shard, worker):
            await joined(worker, shard)
            requests = [
                asyncio.ensure_future(worker.endpoint.request("p0", Add(n), bytes(100_000), timeout_s=30))
                for n in range(12)
            ]
            await shard.until(lambda: shard.handled == [0, 1])
            assert worker.endpoint.peers()["p0"].outstanding_bytes == 200_000
            with pytest.raises(Congested, match="10 requests wait for p0"):
                await worker.endpoint.request("p0", Add(99), timeout_s=30)
            shard.gate.set()
            await asyncio.gather(*requests)
            assert shard.handled == list(range(12))

    run(main())


def test_a_peer_that_is_stuck_does_not_delay_the_others() -> None:
    async def main() -> None:
        coordinator, good, stuck = Party("c", [LOCAL]), Party("good"), Party("stuck")
        stuck.gate = asyncio.Event()
        async with running(coordinator, good, stuck):
            await joined(good, coordinator)
            await joined(stuck, coordinator)
            parked = [
                asyncio.ensure_future(
                    coordinator.endpoint.request("stuck", Add(n), bytes(1 << 20), timeout_s=30)
                )
                for n in range(100)
            ]
            await stuck.until(lambda: len(stuck.handled) >= 10)
            for number in range(50):
                answer = await coordinator.endpoint.request("good", Echo(number), bytes(1000), timeout_s=30)
                assert answer.message == Done(number)
            info = coordinator.endpoint.peers()["stuck"]
            assert info.outstanding_bytes <= QUICK.credit_bytes
            for task in parked:
                task.cancel()
            await asyncio.gather(*parked, return_exceptions=True)

    run(main())


def test_a_request_to_nobody_ends_at_once_and_a_notice_is_dropped() -> None:
    async def main() -> None:
        worker = Party("w0")
        async with running(worker):
            with pytest.raises(PeerLost, match="p9 is lost: it is not connected"):
                await worker.endpoint.request("p9", Echo(1), timeout_s=30)
            assert not worker.endpoint.notify("p9", Echo(1))
            worker.endpoint.disconnect("p9")

    run(main())


def test_an_address_where_nobody_answers_is_named() -> None:
    async def main() -> None:
        worker = Party("w0")
        async with running(worker):
            with pytest.raises(PeerLost, match=r"no answer from tcp://127\.0\.0\.1:1 in 0\.5 s"):
                await worker.endpoint.connect("p0", ["tcp://127.0.0.1:1"], timeout_s=0.5)
            with pytest.raises(
                PeerLost, match="none of its addresses can be reached from here: ipc:///no/such"
            ):
                await worker.endpoint.connect("p0", ["ipc:///no/such"], timeout_s=0.5)
            with pytest.raises(BadAddress, match="cannot be dialled"):
                await worker.endpoint.connect("p0", ["carrier://pigeon"], timeout_s=0.5)
            assert worker.endpoint.peers() == {}

    run(main())


def test_to_cancel_a_connect_ends_the_dialling() -> None:
    async def main() -> None:
        worker = Party("w0")
        async with running(worker):
            first, second = (
                asyncio.ensure_future(worker.endpoint.connect("p0", ["tcp://127.0.0.1:1"], timeout_s=30))
                for _ in range(2)
            )
            await asyncio.sleep(0)
            first.cancel()
            await asyncio.wait([first])
            assert list(worker.endpoint.peers()) == ["p0"]  # somebody waits still
            second.cancel()
            await asyncio.wait([second])
            assert worker.endpoint.peers() == {}

    run(main())


def test_whoever_answers_must_be_the_peer_that_was_meant() -> None:
    async def main() -> None:
        shard, worker = Party("p1", [LOCAL]), Party("w0")
        async with running(shard, worker):
            with pytest.raises(PeerLost, match="this is p1, not p0"):
                await worker.endpoint.connect("p0", shard.endpoint.addresses, timeout_s=1)
            assert shard.endpoint.peers() == {}

    run(main())


def test_the_next_address_is_tried_when_one_does_not_answer(tmp_path: Path) -> None:
    async def main() -> None:
        dead = f"{tmp_path}/dead"
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(dead)  # a file that looks like a socket, and nobody behind it
            shard, worker = Party("p0", [LOCAL]), Party("w0")
            async with running(shard, worker):
                addresses = [*shard.endpoint.addresses, f"ipc://{dead}", "ipc:///not/here"]
                await worker.endpoint.connect("p0", addresses, timeout_s=30)
                assert (await worker.endpoint.request("p0", Echo(1), timeout_s=30)).message == Done(1)

    run(main())


def test_ipc_is_preferred_on_one_machine(tmp_path: Path) -> None:
    async def main() -> None:
        shard, worker = Party("p0", [LOCAL, ipc(tmp_path)]), Party("w0")
        async with running(shard, worker):
            assert shard.endpoint.addresses[0].startswith("tcp://127.0.0.1:")
            assert not shard.endpoint.addresses[0].endswith(":0")
            assert oct(os.stat(tmp_path / "s").st_mode & 0o777) == "0o600"
            tcp = shard.endpoint.addresses[0]
            assert worker.endpoint._rank(ipc(tmp_path)) == 0 and worker.endpoint._rank(tcp) == 1
            await joined(worker, shard)
        assert not (tmp_path / "s").exists()

    run(main())


def timers(port: int) -> list[int]:
    """Of each connection on this port, which timer the kernel runs for it (proc_net_tcp: 0 none, 2 keepalive)."""
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    ends = [(row[1].rpartition(":")[2], row[2].rpartition(":")[2], row[3], row[5]) for row in rows]
    return [
        int(timer.partition(":")[0], 16)
        for local, remote, state, timer in ends
        if state == "01" and port in (int(local, 16), int(remote, 16))
    ]


def test_the_kernel_clears_away_connections_to_machines_that_are_gone() -> None:
    """On both sides; libzmq looks through the timers of all connections when a heartbeat of its own is answered."""

    async def main() -> None:
        shard, worker = Party("p0", [LOCAL], limits=NO_MEMORY), Party("w0", limits=NO_MEMORY)
        async with running(shard, worker):
            await joined(worker, shard)
            port = int(shard.endpoint.addresses[0].rpartition(":")[2])
            async with asyncio.timeout(PATIENCE_S):
                while timers(port) != [2, 2]:  # 1 for as long as something is not acknowledged
                    await asyncio.sleep(0.01)
            for channel in (shard.endpoint._listener, *worker.endpoint._dialled):
                assert channel is not None and channel.socket.getsockopt(zmq.TCP_MAXRT) == 60_000
                assert channel.socket.getsockopt(zmq.HEARTBEAT_IVL) == 300_000

    run(main())


def test_an_address_that_is_taken_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        first = Party("p0", [LOCAL, ipc(tmp_path)])
        async with running(first):
            for address in first.endpoint.addresses:
                with pytest.raises(AddressInUse, match=f"{address}: the address is in use"):
                    await Party("p1", [address]).endpoint.start()
            worker = Party("w0")
            async with running(worker):
                await joined(worker, first)  # the first still listens on both

    run(main())


@pytest.mark.parametrize(
    "address", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://[::]:0", "tcp://10.0.0.1:0", "tcp://eth0:0"]
)
def test_a_bind_beyond_this_machine_needs_keys(address: str) -> None:
    async def main() -> None:
        with pytest.raises(OpenBind, match="needs keys"):
            await Party("p0", [LOCAL, address]).endpoint.start()

    run(main())


@pytest.mark.parametrize(
    "address",
    ["", "127.0.0.1:0", "tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:x", "tcp://127.0.0.1:70000", "udp://127.0.0.1:0",
     "ipc://", "ipc:///no/such/folder/s", "ipc:///tmp/" + "x" * 120, "inproc://x", "tcp://localhost"],
)  # fmt: skip
def test_what_is_no_address_is_refused(address: str) -> None:
    async def main() -> None:
        with pytest.raises(BadAddress):
            await Party("p0", [address]).endpoint.start()

    run(main())


@pytest.mark.parametrize("address", ["tcp://localhost:0", "tcp://127.0.0.2:0", "tcp://[::1]:0"])
def test_this_machine_has_several_addresses(address: str) -> None:
    if "::1" in address and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")

    async def main() -> None:
        shard, worker = Party("p0", [address]), Party("w0")
        async with running(shard, worker):
            await joined(worker, shard)
            assert (await worker.endpoint.request("p0", Echo(1), timeout_s=30)).message == Done(1)

    run(main())


def test_a_goodbye_is_heard_at_once_on_either_side() -> None:
    async def main() -> None:
        limits = replace(QUICK, ping_s=20.0, silence_s=100.0, silence_most_s=100.0)  # no silence is noticed
        shard, worker, other = (
            Party("p0", [LOCAL], limits=limits),
            Party("w0", limits=limits),
            Party("w1", limits=limits),
        )
        async with running(shard, worker, other):
            await joined(worker, shard)
            await joined(other, shard)
            shard_asks = asyncio.ensure_future(shard.endpoint.request("w0", Echo(1), timeout_s=30))
            await shard_asks
            await worker.endpoint.close()
            await shard.until(shard.lost)
            assert shard.told == ["found w0", "found w1", "lost w0: it said goodbye: w0 ends"]
            other.endpoint.disconnect("p0")
            await shard.until(lambda: len(shard.lost()) == 2)
            assert shard.endpoint.peers() == {} and other.endpoint.peers() == {}
            assert other.lost() == []  # it was our own wish

    run(main())


def test_what_waits_for_a_slow_peer_leaves_before_the_goodbye() -> None:
    async def main() -> None:
        limits = replace(QUICK, send_hwm=1, receive_hwm=1, slots=0)
        shard, worker = Party("p0", [LOCAL], limits=limits), Party("w0", limits=limits)
        async with running(shard, worker):
            await joined(worker, shard)
            for number in range(30):
                assert worker.endpoint.notify("p0", Add(number), bytes(1 << 20))
            assert any(channel.queued for channel in worker.endpoint._dialled)
            await worker.endpoint.close()
            await shard.until(shard.lost)
            assert shard.handled == list(range(30))
            assert shard.lost() == ["lost w0: it said goodbye: w0 ends"]

    run(main())


def test_a_listener_that_is_started_anew_is_found_again() -> None:
    async def main() -> None:
        shard, worker = Party("p0", [LOCAL]), Party("w0")
        async with running(worker):
            await shard.endpoint.start()
            addresses = shard.endpoint.addresses
            await joined(worker, shard)
            shard.gate = asyncio.Event()
            under_way = asyncio.ensure_future(worker.endpoint.request("p0", Add(1), timeout_s=30))
            await shard.until(lambda: shard.handled == [1])
            await shard.endpoint.close()
            await worker.until(worker.lost)
            waiting = asyncio.ensure_future(worker.endpoint.request("p0", Add(2), timeout_s=30))
            again = Party("p0", addresses)
            async with running(again):
                assert (await waiting).message == Done(2)
                with pytest.raises(PeerLost, match="p0 is lost"):
                    await under_way  # the new process cannot know whether the old one has applied it
                assert again.handled == [2]
                assert worker.told[-1] == "found p0"

    run(main())


def test_a_listener_that_is_busy_for_long_is_not_dialled_again_and_again() -> None:
    """Its answer would come along a connection that is gone."""

    async def main() -> None:
        shard, worker = Party("p0", [LOCAL], limits=NO_MEMORY), Party("w0", limits=NO_MEMORY)
        async with running(shard, worker):
            listener = shard.endpoint._listener
            assert listener is not None
            listener._draining = True  # nothing is read
            joining = asyncio.ensure_future(
                worker.endpoint.connect("p0", shard.endpoint.addresses, timeout_s=PATIENCE_S)
            )
            await asyncio.sleep(0)
            dialled = {*worker.endpoint._dialled}
            await asyncio.sleep(2.5 * FIRST_PATIENCE_S)
            assert {*worker.endpoint._dialled} == dialled and not joining.done()
            listener._draining = False
            listener.drain()
            await joining

    run(main())


def test_a_worker_that_is_started_anew_takes_its_name_over() -> None:
    async def main() -> None:
        shard, first, second = Party("p0", [LOCAL]), Party("w0"), Party("w0")
        async with running(shard, first, second):
            await joined(first, shard)
            await joined(second, shard)
            assert shard.told == ["found w0", "lost w0: it was started anew", "found w0"]
            await shard.endpoint.request("w0", Add(1), timeout_s=30)
            assert (first.handled, second.handled) == ([], [1])

    run(main())


class Proxy:
    """A network between two processes that can be cut and healed, and that breaks connections."""

    def __init__(self, target: str) -> None:
        self.port = int(target.rpartition(":")[2])
        self.writers: list[asyncio.StreamWriter] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.open = True

    async def start(self) -> str:
        self.server = await asyncio.start_server(self.accept, "127.0.0.1", 0)
        return f"tcp://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        if not self.open:
            writer.transport.abort()
            return
        back_reader, back_writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(back_writer)
        await asyncio.gather(self.copy(reader, back_writer), self.copy(back_reader, writer))

    async def copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                if self.open:
                    writer.write(data)
                    await writer.drain()
        except OSError:
            pass
        writer.transport.abort()

    def cut(self) -> None:
        """Break every connection; what is on its way is lost."""
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()

    async def close(self) -> None:
        self.cut()
        self.server.close()
        await self.server.wait_closed()


def test_requests_survive_broken_connections_and_are_handled_once() -> None:
    async def main() -> None:
        shard, worker = Party("p0", [LOCAL]), Party("w0")
        async with running(shard, worker):
            proxy = Proxy(shard.endpoint.addresses[0])
            address = await proxy.start()
            await worker.endpoint.connect("p0", [address])
            numbers = iter(range(300))

            async def ask() -> None:
                for number in numbers:
                    answer = await worker.endpoint.request("p0", Add(number), bytes(20_000), timeout_s=50)
                    assert answer.message == Done(number)

            async def cut() -> None:
                for _ in range(6):
                    done = len(shard.handled)
                    await shard.until(lambda: len(shard.handled) > done + 5 or len(shard.handled) == 300)  # noqa: B023
                    proxy.cut()

            async with asyncio.TaskGroup() as group:
                group.create_task(cut())
                for _ in range(8):
                    group.create_task(ask())
            assert sorted(shard.handled) == list(range(300))
            await proxy.close()

    run(main())


def test_a_partition_is_noticed_on_both_sides_and_what_was_under_way_goes_on_after_it() -> None:
    async def main() -> None:
        shard, worker = Party("p0", [LOCAL]), Party("w0")
        shard.gate = asyncio.Event()
        async with running(shard, worker):
            proxy = Proxy(shard.endpoint.addresses[0])
            address = await proxy.start()
            await worker.endpoint.connect("p0", [address])
            under_way = asyncio.ensure_future(worker.endpoint.request("p0", Add(1), timeout_s=50))
            await shard.until(lambda: shard.handled == [1])
            proxy.open = False
            proxy.cut()
            await worker.until(worker.lost)
            await shard.until(shard.lost)
            assert "silent for" in worker.lost()[0] and "silent for" in shard.lost()[0]
            assert not worker.endpoint.peers()["p0"].connected
            shard.gate.set()
            proxy.open = True
            assert (await under_way).message == Done(1)
            assert shard.handled == [1]
            assert worker.told[-1] == "found p0" and shard.told[-1] == "found w0"
            await proxy.close()

    run(main())


def test_a_process_that_hangs_is_lost_and_comes_back() -> None:
    """Its sockets are alive, ZeroMQ answers for it: only its own silence tells."""

    async def main() -> None:
        shard = Party("p0", [LOCAL])
        thread = LoopThread("hanging worker")
        other = thread.start()
        release = threading.Event()
        async with running(shard):

            async def begin() -> Party:
                worker = Party("w0")
                await worker.endpoint.start()
                await worker.endpoint.connect("p0", shard.endpoint.addresses)
                return worker

            worker = await other.ask(begin, timeout_s=30)
            other.post(release.wait, PATIENCE_S)
            await shard.until(shard.lost)
            assert "silent for" in shard.lost()[0]
            release.set()
            await shard.until(lambda: shard.told[-1] == "found w0")
            assert (await shard.endpoint.request("w0", Echo(1), timeout_s=30)).message == Done(1)
            # It was the worker itself that was held up: it accuses nobody.
            assert await other.ask(wrap(worker.lost), timeout_s=30) == []
            await other.ask(worker.endpoint.close, timeout_s=30)
        thread.stop()

    run(main())


def wrap(function: Any) -> Any:
    async def call() -> Any:
        return function()

    return call


def test_no_more_peers_come_in_than_are_allowed() -> None:
    async def main() -> None:
        shard = Party("p0", [LOCAL], limits=replace(QUICK, peers=2))
        workers = [Party(f"w{n}") for n in range(3)]
        async with running(shard, *workers):
            await joined(workers[0], shard)
            await joined(workers[1], shard)
            with pytest.raises(PeerLost, match="2 peers are connected already"):
                await workers[2].endpoint.connect("p0", shard.endpoint.addresses, timeout_s=1)
            workers[0].endpoint.disconnect("p0")
            await shard.until(shard.lost)
            await joined(workers[2], shard)

    run(main())


def test_the_process_says_who_may_come_in() -> None:
    async def main() -> None:
        shard = Party("p0", [LOCAL], admit=lambda name, key: None if name.startswith("w") else "workers only")
        worker, other = Party("w0"), Party("x0")
        async with running(shard, worker, other):
            await joined(worker, shard)
            with pytest.raises(PeerLost, match="workers only"):
                await other.endpoint.connect("p0", shard.endpoint.addresses, timeout_s=1)
            assert list(shard.endpoint.peers()) == ["w0"]

    run(main())


def test_the_budget_is_shared_among_the_peers() -> None:
    async def main() -> None:
        limits = replace(QUICK, payload_bytes=100, credit_bytes=1000, budget_bytes=1500)
        shard = Party("p0", [LOCAL], limits=limits)
        workers = [Party(f"w{n}", limits=limits) for n in range(20)]
        async with running(shard, *workers[:2]):
            await joined(workers[0], shard)
            assert worker_credit(workers[0]) == 1000
            await joined(workers[1], shard)
            assert worker_credit(workers[1]) == 750
            await workers[0].until(lambda: worker_credit(workers[0]) == 750)
            async with running(*workers[2:]):
                for worker in workers[2:]:
                    await joined(worker, shard)
                assert worker_credit(workers[19]) == 100  # never less than one payload

    run(main())


def worker_credit(worker: Party) -> int:
    return worker.endpoint._peers["p0"].session.outgoing.credit


def files() -> list[str]:
    """What this process has open, except what Python and ZeroMQ keep for good."""
    return sorted(
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if int(fd) > 2 and _exists(fd)
    )


def _exists(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


@pytest.mark.parametrize("loop", LOOPS)
def test_closing_leaves_no_file_thread_or_task_behind(loop: str, tmp_path: Path) -> None:
    async def cycle() -> None:
        shard, worker = Party("p0", [LOCAL, ipc(tmp_path)]), Party("w0")
        shard.gate = asyncio.Event()
        async with running(shard, worker):
            await joined(worker, shard)
            await worker.endpoint.request("p0", Echo(1), bytes(200_000), timeout_s=30)
            parked = asyncio.ensure_future(
                worker.endpoint.request("p0", Add(2), bytes(200_000), timeout_s=30)
            )
            never = asyncio.ensure_future(worker.endpoint.connect("p9", ["tcp://127.0.0.1:1"], timeout_s=30))
            await shard.until(lambda: shard.handled == [2])
        with pytest.raises(PeerLost):
            await parked
        with pytest.raises(PeerLost):
            await never
        await worker.endpoint.close()  # twice is the same as once
        with pytest.raises(PeerLost, match="closed"):
            await worker.endpoint.request("p0", Echo(1), timeout_s=1)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    def count(main: Coroutine[Any, Any, None]) -> tuple[int, int]:
        run(main, loop)
        gc.collect()  # the parties hold payloads, and with them the memory that is shared
        return len(files()), threading.active_count()

    first = count(cycle())  # ZeroMQ's collector thread and its files stay for good
    assert count(cycle()) == first
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("loop", LOOPS)
def test_who_does_not_answer_is_not_seen_off(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor waited for: of the dialled, only who is here has a second to take a goodbye."""
    waited_for: list[int] = []
    see_off = ZmqEndpoint._see_off

    async def watched(endpoint: ZmqEndpoint) -> None:
        waited_for.append(len(endpoint._dialled))
        await see_off(endpoint)

    async def main() -> None:
        shard, worker = Party("p0", [LOCAL]), Party("w0")
        async with running(shard, worker):
            await joined(worker, shard)
            never = asyncio.ensure_future(worker.endpoint.connect("p9", ["tcp://127.0.0.1:1"], timeout_s=30))
            while len(worker.endpoint._dialled) < 2:
                await asyncio.sleep(0.01)
            monkeypatch.setattr(ZmqEndpoint, "_see_off", watched)
            await worker.endpoint.close()
            with pytest.raises(PeerLost):
                await never

    run(main(), loop)
    assert waited_for[0] == 1


def test_a_failed_start_leaves_nothing_behind() -> None:
    async def main() -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
            before = len(files())
            for _ in range(3):
                with pytest.raises(AddressInUse):
                    await Party("p0", [LOCAL, address]).endpoint.start()
            assert len(files()) == before

    run(main())
