"""Thousands of peers on one endpoint: each says one heartbeat a second and gets its answer.

Three processes: the endpoint, as a coordinator has it; and two that play all the peers, with real ZeroMQ sockets but
without the endpoint's own code, so that they do not starve what is measured. `wire.py` starts them.
"""

import asyncio
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import msgspec
import uvloop
import zmq
from peer import cpu_s, quiet

from zml.messages import AnyMessage, Heartbeat, Pulse
from zml.transport import CONTROL
from zml.transport.endpoint import ZmqEndpoint
from zml.transport.frames import Envelope, Hello, Kind, Vocabulary, pack, unpack

HERE = Path(__file__).resolve().parent
PLAYERS = 2
BEAT_S = 1.0
TICK_S = 0.01


def rss_mb() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


# -- the endpoint ---------------------------------------------------------------------------------------------


async def serve() -> None:
    """Prints its address; answers each line of its input with CPU seconds, memory, and how many it has found."""
    last_heard: dict[str, float] = {}
    loop = asyncio.get_running_loop()
    pulse = Pulse("demo", 1)

    def handle(peer: str, message: msgspec.Struct, payload: memoryview | None) -> None:
        assert isinstance(message, Heartbeat)
        last_heard[peer] = loop.time()  # as a lease is renewed
        endpoint.notify(peer, pulse)

    endpoint = ZmqEndpoint(
        "coordinator", vocabulary=AnyMessage, handler=handle, bind=["tcp://127.0.0.1:0"], limits=CONTROL
    )
    await endpoint.start()
    print(json.dumps(endpoint.addresses[0]), flush=True)
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while await lines.readline():
        print(json.dumps({"cpu_s": cpu_s(), "rss_mb": rss_mb(), "peers": len(endpoint.peers())}), flush=True)
    await endpoint.close()


# -- the peers ------------------------------------------------------------------------------------------------


class Player:
    """One peer, as little of it as the endpoint cannot tell from a whole one."""

    def __init__(self, name: str, context: "zmq.Context[zmq.SyncSocket]", address: str) -> None:
        self.name = name
        self.session = random.getrandbits(39) << 24 | 1
        self.sent = 0
        self.sent_at = 0.0
        self.welcome = False
        self.replies: list[float] = []  # seconds from heartbeat to pulse
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.ROUTING_ID, f"{name}/{random.getrandbits(128):032x}".encode())
        self.socket.connect(address)
        asyncio.get_running_loop().add_reader(int(self.socket.getsockopt(zmq.FD)), self.drain)

    def hello(self) -> None:
        body = Hello(name=self.name, to="coordinator", resume=False, requests=1, ping_s=BEAT_S)
        self.socket.send(pack(Envelope(kind=Kind.HELLO, session=self.session, body=body)))
        self.drain()

    def beat(self) -> None:
        self.sent += 1
        self.sent_at = time.perf_counter()
        body = Heartbeat("demo", self.name, 1)
        self.socket.send(pack(Envelope(kind=Kind.NOTICE, session=self.session, id=self.sent, body=body)))
        self.drain()

    def drain(self) -> None:
        while True:
            try:
                header = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            envelope = unpack(header, None, VOCABULARY, payload_bytes=0)
            if envelope.kind is Kind.WELCOME:
                self.welcome = True
            elif envelope.kind is Kind.NOTICE:
                self.replies.append(time.perf_counter() - self.sent_at)


VOCABULARY = Vocabulary(AnyMessage)


async def play(address: str, first: int, count: int, seconds: float) -> None:
    """Prints when all are welcome, beats from the next line of its input on, then prints what it measured."""
    context: zmq.Context[zmq.SyncSocket] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, count + 10)
    players = [Player(f"w{number}", context, address) for number in range(first, first + count)]
    for player in players:
        player.hello()
        await asyncio.sleep(0.0002)
    deadline = time.monotonic() + 60
    while not all(player.welcome for player in players) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    print(json.dumps(sum(player.welcome for player in players)), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    start = time.perf_counter()
    turn = 0
    while (now := time.perf_counter()) < start + seconds:
        due = int((now - start) / BEAT_S * count)
        for number in range(turn, due):
            players[number % count].beat()
        turn = due
        await asyncio.sleep(TICK_S)
    await asyncio.sleep(1)  # for the last answers
    replies = [reply for player in players for reply in player.replies]
    print(json.dumps({"sent": sum(player.sent for player in players), "replies": replies}), flush=True)
    context.destroy(linger=0)


# -- both together ----------------------------------------------------------------------------------------------


def _start(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(HERE / "swarm.py"), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _line(process: "subprocess.Popen[str]", question: str | None = None) -> Any:
    assert process.stdin is not None and process.stdout is not None
    if question is not None:
        process.stdin.write(question + "\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args!r} ended with {process.wait(10)}")
    return json.loads(line)


def measure(count: int, seconds: float) -> dict[str, float]:
    """CPU share, memory and reply times of one endpoint with `count` peers."""
    server = _start("serve")
    players: list[subprocess.Popen[str]] = []
    try:
        address = _line(server)
        before = time.perf_counter()
        share = count // PLAYERS
        players = [_start("play", address, str(n * share), str(share), str(seconds)) for n in range(PLAYERS)]
        welcome = sum(_line(player) for player in players)
        connected_s = time.perf_counter() - before
        start, at_start = time.perf_counter(), _line(server, "usage")
        for player in players:
            assert player.stdin is not None
            player.stdin.write("go\n")
            player.stdin.flush()
        time.sleep(seconds)
        at_end, taken = _line(server, "usage"), time.perf_counter() - start
        results = [_line(player) for player in players]
        replies = sorted(reply for result in results for reply in result["replies"])
        sent = sum(result["sent"] for result in results)
        return {
            "peers": at_end["peers"],
            "welcome": welcome,
            "connect_s": connected_s,
            "cpu_percent": 100 * (at_end["cpu_s"] - at_start["cpu_s"]) / taken,
            "rss_mb": at_end["rss_mb"],
            "beats": sent,
            "unanswered": sent - len(replies),
            "p50_ms": 1e3 * replies[len(replies) // 2],
            "p99_ms": 1e3 * replies[int(len(replies) * 0.99)],
        }
    finally:
        for process in (*players, server):
            process.kill()
            process.communicate()


if __name__ == "__main__":
    quiet()
    if sys.argv[1] == "serve":
        uvloop.run(serve())
    else:
        uvloop.run(play(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])))
