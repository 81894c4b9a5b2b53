"""A node fetches code that it does not see, and holds processes to what was asked for."""

import asyncio
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.simulation import simulate
from zml.cluster import node, nodes
from zml.cluster.archive import pack
from zml.cluster.node import NodeAgent, serve
from zml.cluster.nodes import archive_file, read_piece
from zml.cluster.wire import Ceased, Offer, Quit, Run, Vocabulary, Want, Work
from zml.config import Settings
from zml.coordinator.orders import Orders
from zml.errors import ZmlError
from zml.launch.child import hold_to, spawn
from zml.lease import COORDINATOR
from zml.messages import Ok
from zml.scheduler.cluster.resources import Resources
from zml.transport import Answer, PeerLost, Refused
from zml.transport.memory import MemoryNetwork


class Coordinator:
    """Answers `Want` from its folder; after `pieces` it is lost."""

    def __init__(self, folder: Path, pieces: int = 10**6) -> None:
        self.folder = folder
        self.pieces = pieces
        self.asked: list[int] = []

    async def request(self, peer: str, message: Any, payload: Any = None, *, timeout_s: float) -> Answer:
        assert isinstance(message, Want)
        self.asked.append(message.offset)
        if len(self.asked) > self.pieces:
            raise PeerLost(peer, "it is gone")
        answer, piece = read_piece(archive_file(self.folder, message.sha256), message.offset)
        return Answer(answer, memoryview(piece))


@pytest.fixture
def archived(tmp_path: Path) -> tuple[Path, str]:
    """A coordinator's folder with one archive, and its checksum."""
    for name in ("code", "packed"):
        (tmp_path / name).mkdir()
    (tmp_path / "code" / "train.py").write_text("print('hello')\n" + "#" * 5000)
    packed = pack(tmp_path / "code", tmp_path / "packed")
    folder = tmp_path / "cluster"
    (folder / "archives").mkdir(parents=True)
    data = packed.path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    archive_file(folder, sha256).write_bytes(data)
    return folder, sha256


def agent(tmp_path: Path, coordinator: Coordinator) -> NodeAgent:
    found = NodeAgent(Settings(runs=str(tmp_path / "node")), "n1", Resources(cpus=1))
    found.endpoint = coordinator  # type: ignore[assignment]
    return found


def test_an_archive_comes_in_pieces_and_whole(
    tmp_path: Path, archived: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "PIECE_BYTES", 50)
    folder, sha256 = archived
    coordinator = Coordinator(folder)

    async def fetch() -> Path:
        return await agent(tmp_path, coordinator)._fetch(sha256, tmp_path / "node")

    path = asyncio.run(fetch())
    assert path.read_bytes() == archive_file(folder, sha256).read_bytes()
    assert coordinator.asked == list(range(0, path.stat().st_size, 50)) and len(coordinator.asked) > 1


def test_an_archive_that_does_not_come_leaves_nothing(
    tmp_path: Path, archived: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "PIECE_BYTES", 50)
    folder, sha256 = archived

    async def fetch() -> Path:
        return await agent(tmp_path, Coordinator(folder, pieces=1))._fetch(sha256, tmp_path / "node")

    with pytest.raises(OSError, match="does not come"):
        asyncio.run(fetch())
    assert list((tmp_path / "node").iterdir()) == []


def test_a_process_that_is_to_end_while_it_is_being_started_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "PROGRAM", (sys.executable, "-c", "import time; time.sleep(60)"))
    started = asyncio.Event()

    async def slowly(*args: Any) -> Any:
        started.set()
        await asyncio.sleep(0.05)
        return await spawn(*args)

    monkeypatch.setattr(node, "spawn", slowly)
    told: list[Any] = []

    async def main() -> None:
        found = agent(tmp_path, Coordinator(tmp_path))
        monkeypatch.setattr(found, "_tell", told.append)
        work = Work(
            run_dir="", coordinator=[], settings={}, environment={}, script="x.py", args=[], folder="/"
        )
        found.handle("coordinator", Run("j1.1", "w0"), memoryview(msgspec.json.encode(work)))
        await started.wait()
        found.handle("coordinator", Quit("j1.1", "w0", True, "not needed"), None)
        (place,) = found.places.values()
        assert place.task is not None
        await asyncio.wait_for(place.task, 30)
        found.handle("coordinator", Quit("j1.1", "w7", True, "not needed"), None)

    asyncio.run(main())
    assert [(each.slot, each.because) for each in told] == [
        ("w0", "its process ended by SIGKILL"),
        ("w7", "its process is not here"),
    ]


def test_a_node_that_does_not_see_the_code_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    async def main() -> None:
        found = agent(tmp_path, Coordinator(tmp_path))
        monkeypatch.setattr(found, "_tell", told.append)
        work = Work(
            run_dir="", coordinator=[], settings={}, environment={}, script="x.py", args=[], folder="/no/such"
        )
        found.handle("coordinator", Run("j1.1", "w0"), memoryview(msgspec.json.encode(work)))
        (place,) = found.places.values()
        assert place.task is not None
        await asyncio.wait_for(place.task, 30)

    asyncio.run(main())
    assert "node n1 does not see the folder /no/such" in told[0].because


def test_a_process_gets_no_more_memory_than_was_asked_for() -> None:
    code = "import sys; sys.stdin.readline(); x = bytearray(1 << 30)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    hold_to(process.pid, 200)
    _, said = process.communicate(b"go\n", timeout=30)
    assert process.returncode == 1 and b"MemoryError" in said
    hold_to(process.pid, 200)  # one that is gone is no error


@pytest.mark.parametrize("seed", range(8))
def test_what_has_ended_and_is_to_run_there_again_begins_whichever_is_heard_first(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer that its end is known, and the order that follows from it, come along together."""
    network, begun = MemoryNetwork(seed), []
    work = Work(
        run_dir=str(tmp_path), coordinator=[], settings={}, environment={}, script="x", args=[], folder="/"
    )

    async def keep(self: NodeAgent, place: node.Place, settings: Settings) -> None:
        begun.append(place.key)

    async def main() -> None:
        ordered: list[asyncio.Task[bool]] = []

        def handle(peer: str, message: Any, payload: Any) -> Ok:
            assert isinstance(message, Ceased)
            orders = Orders(hub, {"n1": peer}, lambda node, peer: True)
            run = Run(message.job, message.slot)
            asyncio.get_running_loop().call_soon(
                lambda: ordered.append(orders.send("n1", run, msgspec.json.encode(work)))
            )
            return Ok()

        hub = network.endpoint(COORDINATOR, vocabulary=Vocabulary, handler=handle, bind=["tcp://hub:1"])
        await hub.start()
        agent = NodeAgent(Settings(runs=str(tmp_path / "runs")), "n1", Resources(cpus=1))
        agent.endpoint = network.endpoint("node-n1", vocabulary=Vocabulary, handler=agent.handle)
        await agent.endpoint.start()
        await agent.endpoint.connect(COORDINATOR, ["tcp://hub:1"])
        agent._cease("j1.1", "p0", "died")
        await asyncio.sleep(30.0)
        assert [task.result() for task in ordered] == [True]
        assert begun == [("j1.1", "p0")], "the order was taken"
        await agent.endpoint.close()
        await hub.close()

    monkeypatch.setattr(NodeAgent, "_keep", keep)
    simulate(main())


class Unheard:
    """Nobody answers, or somebody with "early"."""

    def __init__(self, early: bool) -> None:
        self.early = early

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def connect(self, peer: str, addresses: Any, *, timeout_s: float) -> None:
        if not self.early:
            await asyncio.sleep(timeout_s)
            raise PeerLost(peer, "no answer")

    async def request(self, peer: str, message: Any, payload: Any = None, *, timeout_s: float) -> Answer:
        if self.early and isinstance(message, Offer):
            raise Refused(peer, "early", "another process offers node n1, and is well")
        raise PeerLost(peer, "it is not connected")


@pytest.mark.parametrize("early", [False, True], ids=["no coordinator", "its name is taken"])
def test_a_node_that_is_not_taken_yet_goes_when_it_is_told(tmp_path: Path, early: bool) -> None:
    async def main() -> int:
        agent = NodeAgent(Settings(runs=str(tmp_path), coordinator=("tcp://a:1",)), "n1", Resources(cpus=1))
        agent.endpoint = Unheard(early)  # type: ignore[assignment]
        running = asyncio.ensure_future(agent.run())
        await asyncio.sleep(0.1)
        assert not running.done()
        agent.leave("SIGINT", 130)
        async with asyncio.timeout(10.0):
            return await running

    assert asyncio.run(main()) == 130


def test_a_name_that_another_node_has_and_keeps_is_refused_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "FORMER_S", 0.5)

    async def main() -> None:
        agent = NodeAgent(Settings(runs=str(tmp_path), coordinator=("tcp://a:1",)), "n1", Resources(cpus=1))
        agent.endpoint = Unheard(True)  # type: ignore[assignment]
        with pytest.raises(ZmlError, match="another process offers node n1, and is well"):
            async with asyncio.timeout(20.0):  # it may take 60 s to be answered at all
                await agent.run()

    asyncio.run(main())


@pytest.mark.parametrize("name", ["a b", "a/b", "böse", "-a", "x" * 65])
def test_what_is_no_name_of_a_node_is_said_before_anything_begins(tmp_path: Path, name: str) -> None:
    with pytest.raises(ZmlError, match="is no name of a node: it takes 1 to 64 of"):
        serve(
            Settings(runs=str(tmp_path)),
            name,
            Resources(cpus=1),
            rack="",
            cost_per_hour=0,
            address="127.0.0.1",
        )
    assert not list(tmp_path.iterdir())
