"""Checkpoints without a shared file system: shards send their parts to the coordinator, and fetch what they need."""

import asyncio
import errno
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
from msgspec.structs import replace
from structlog.testing import capture_logs

from tests.simulation import simulate
from tests.soaking import soak
from tests.zml.checkpoints import LEDGER, fill, make, numbers, registration
from tests.zml.cluster import Cluster, Script
from tests.zml.test_checkpointing import held
from tests.zml.test_cluster import run, same, trained
from tests.zml.test_going_on import Mortal
from tests.zml.test_recovery import bits
from zml import piecewise
from zml.checkpoint import BadCheckpoint, Checkpoint, Disk, Writer, newest, read, writing
from zml.checkpoint.folder import ABOUT, TENSORS, is_seen
from zml.checkpoint.reading import hash_file
from zml.checkpoint.tensors import MOST_HEADER
from zml.coordinator import depot, shard_desk
from zml.coordinator.checkpointer import WRITE_S
from zml.coordinator.checkpoints import KEEP_S, When, begun_with
from zml.coordinator.cutting import MARK_S
from zml.coordinator.docket import Docket
from zml.coordinator.facts import Begun
from zml.errors import BAD_CHECKPOINT, DISK_FULL, FENCED, NOT_WRITTEN, ZmlError
from zml.journal import Journal
from zml.lease import COORDINATOR
from zml.messages import Fetch, Fetched, JobSpec, Piece, Write
from zml.scheduler.ids import JobId
from zml.scheduler.machine import Machine
from zml.scheduler.rules import Rules
from zml.shard import porter
from zml.shard.ps import Ps
from zml.shard.pushlog import PushLog
from zml.shard.shard import Shard
from zml.transport import Answer, Refusal, Refused
from zml.transport.memory import MemoryNetwork
from zml.worker import keeping
from zml.worker.client import ASK_S

ALL = [(epoch, batch) for epoch in range(2) for batch in range(12)]
SMALL = 100  # bytes of a piece: the models here are small


def nowhere(folder: Path) -> bool:
    return False


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piecewise.pieces, "__defaults__", (SMALL,))
    monkeypatch.setattr(porter, "PIECE", SMALL)


class Watched(Cluster):
    """It counts what comes to the coordinator, and may answer in its place."""

    def __init__(self, *args: Any, **more: Any) -> None:
        self.came: Counter[str] = Counter()
        self.messages: list[Any] = []
        self.instead: Callable[[str, Any, Any, Any], Any] = lambda peer, message, payload, handler: handler(
            peer, message, payload
        )
        super().__init__(*args, **more)

    def watched(self, handler: Any) -> Any:
        inner = super().watched(handler)

        def handle(peer: str, message: Any, payload: Any) -> Any:
            self.came[type(message).__name__] += 1
            if isinstance(message, Piece | Fetch):
                self.messages.append(message)
            return self.instead(peer, message, payload, inner)

        return handle


def keep(cluster: Cluster, folder: Path) -> Callable[[], Any]:
    """From now on the job has checkpoints; what takes one."""
    cluster.coordinator.checkpoint_desk.keep(folder / "checkpoints", When(), keep_last=100)
    checkpoints = cluster.coordinator.checkpoint_desk.checkpoints
    assert checkpoints is not None
    return lambda: checkpoints.take("a test")


def train(
    folder: Path,
    *,
    sees: Callable[[Path], bool] = nowhere,
    spec: JobSpec | None = None,
    missing: bool = False,
    **network: Any,
) -> tuple[Watched, list[Script], list[Checkpoint]]:
    """A run with a checkpoint in the middle and one at the end."""

    async def main() -> tuple[Watched, list[Script], list[Path | None]]:
        asked = spec or JobSpec(workers=3, shards=2)
        cluster = Watched(MemoryNetwork(1, **network), asked, sees=sees, folder=folder / "logs")
        await cluster.start()
        take = keep(cluster, folder)
        scripts = [cluster.script(f"w{index}") for index in range(asked.workers)]
        await cluster.until(lambda: len(trained(scripts)) >= 7)
        path = await take()
        assert await cluster.finish() == 0, [script.error for script in scripts]
        found, skipped = newest(folder / "checkpoints")
        assert (found is None) is missing and not skipped
        return cluster, scripts, [path, found.path if found is not None else None]

    cluster, scripts, paths = simulate(main())
    return cluster, scripts, [read(path) for path in paths if path is not None]


def begin(
    folder: Path,
    checkpoint: Checkpoint,
    spec: JobSpec,
    *,
    sees: Callable[[Path], bool] = nowhere,
    **network: Any,
) -> tuple[Watched, list[Script]]:
    """The job goes on from a checkpoint to its end."""

    async def main() -> tuple[Watched, list[Script]]:
        cluster = Watched(
            MemoryNetwork(2, **network), spec, resumed=checkpoint, sees=sees, folder=folder / "again"
        )
        await cluster.start()
        scripts = [cluster.script(f"w{index}", seed=100 + index) for index in range(spec.workers)]
        assert await cluster.finish() == 0, [script.error for script in scripts]
        return cluster, scripts

    return simulate(main())


NETWORKS: list[dict[str, Any]] = [
    {"ordered": True},
    {"delay_s": (0.001, 0.05)},
    *soak([{"loss": 0.02}, {"loss": 0.02, "duplication": 0.05}]),
]


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_a_shard_that_does_not_see_the_folder_streams_its_part(
    tmp_path: Path, network: dict[str, Any]
) -> None:
    """The same bytes as a shard writes that sees it, whatever overtakes what on the way."""
    near, calm, written = train(tmp_path / "near", sees=Path.is_dir, **network)
    far, scripts, sent = train(tmp_path / "far", **network)
    same([*calm, *scripts])
    assert near.came["Piece"] == 0 and far.came["Piece"] > 20
    assert len(sent) == len(written) == 2
    needed = sum(
        -(-each.manifest.files[f"shard-000{k}.safetensors"].bytes // SMALL) for each in sent for k in range(2)
    )
    assert far.came["Piece"] == needed if "ordered" in network else far.came["Piece"] > needed, (
        "overtaken, and again"
    )
    whole = sent[-1]
    assert (
        whole.manifest.files["shard-0000.safetensors"] == written[-1].manifest.files["shard-0000.safetensors"]
    )
    assert (
        whole.manifest.files["shard-0001.safetensors"] == written[-1].manifest.files["shard-0001.safetensors"]
    )
    assert not list((tmp_path / "far" / "checkpoints").glob(".step*")), "nothing is left of what was begun"
    assert all(ps.core is not None and ps.core.copy is None for ps in far.shards.values())


def test_what_is_under_way_is_bounded(tmp_path: Path) -> None:
    async def main() -> int:
        cluster = Watched(MemoryNetwork(1), JobSpec(workers=1, shards=1), sees=nowhere)
        most, now = 0, 0

        def slow(peer: str, message: Any, payload: Any, handler: Any) -> Any:
            if not isinstance(message, Piece):
                return handler(peer, message, payload)

            async def later() -> Any:
                nonlocal most, now
                now += 1
                most = max(most, now)
                await asyncio.sleep(0.2)
                try:
                    return await handler(peer, message, payload)
                finally:
                    now -= 1

            return later()

        cluster.instead = slow
        await cluster.start()
        take = keep(cluster, tmp_path)
        script = cluster.script("w0", batches=100)
        await cluster.until(lambda: script.trained)
        taking = asyncio.ensure_future(take())
        await cluster.until(lambda: cluster.came["Piece"])
        before = len(script.trained)
        assert await taking is not None
        assert len(script.trained) > before, "training goes on beside it"
        cluster.coordinator.interrupt("SIGINT")
        cluster.coordinator.interrupt("SIGINT")
        await cluster.finish()
        return most

    assert simulate(main()) == piecewise.WINDOW


@pytest.mark.soak
def test_a_part_may_take_as_long_as_pieces_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far longer than a shard that says nothing is waited for; and such a one costs one checkpoint."""
    monkeypatch.setattr(piecewise.pieces, "__defaults__", (10,))

    async def main() -> tuple[float, Path | None, float, Path | None]:
        cluster = Watched(
            MemoryNetwork(1), JobSpec(workers=1, shards=1), sees=nowhere, compute_s=lambda name: 100.0
        )
        silent = False

        def slow(peer: str, message: Any, payload: Any, handler: Any) -> Any:
            if not isinstance(message, Piece):
                return handler(peer, message, payload)

            async def later() -> Any:
                await asyncio.sleep(1e6 if silent else 20.0)
                return await handler(peer, message, payload)

            return later()

        cluster.instead = slow
        await cluster.start()
        take = keep(cluster, tmp_path)
        script = cluster.script("w0", batches=100)
        await cluster.until(lambda: script.trained)
        loop = asyncio.get_running_loop()
        began = loop.time()
        first = await take()
        took_s = loop.time() - began
        silent, began = True, loop.time()
        second = await take()
        silent_s = loop.time() - began
        cluster.coordinator.interrupt("SIGINT")
        cluster.coordinator.interrupt("SIGINT")
        await cluster.finish()
        return took_s, first, silent_s, second

    took_s, first, silent_s, second = simulate(main())
    assert first is not None and took_s > 2 * WRITE_S
    assert second is None and silent_s <= MARK_S + piecewise.PIECE_S + 1, (
        "no clock to come was marked meanwhile"
    )


def test_only_the_shard_itself_may_send_its_part_and_only_while_it_is_made(tmp_path: Path) -> None:
    async def main() -> list[str]:
        cluster = Watched(MemoryNetwork(1), JobSpec(workers=1, shards=2), sees=nowhere)
        await cluster.start()
        take = keep(cluster, tmp_path)
        script = cluster.script("w0", batches=40)
        await cluster.until(lambda: script.trained)
        codes: list[str] = []

        async def send(member: str, incarnation: int, checkpoint: str, name: str, data: bytes = b"x") -> None:
            piece = Piece("job", member, incarnation, checkpoint, name, 0)
            try:
                await script.client.of_checkpoint(piece, data)
                codes.append("taken")
            except Refused as refused:
                codes.append(refused.code)
            except Exception as error:  # a script that hears it was fenced
                codes.append(type(error).__name__)

        await send("p0", 1, "1", "shard-0000.safetensors")  # none is being made
        taking = asyncio.ensure_future(take())
        await cluster.until(lambda: cluster.came["Piece"] > 1)
        name = next(message.checkpoint for message in cluster.messages if message.checkpoint != "1")
        await send("p0", 1, "1", "shard-0000.safetensors")  # another one is
        await send("p1", 1, name, "shard-0000.safetensors")
        await send("w0", 1, name, "shard-0000.safetensors")
        await send("p0", 1, name, "../shard-0000.safetensors")
        await send("p0", 1, name, "MANIFEST.json")
        await send("p0", 7, name, "shard-0000.safetensors")  # no such incarnation
        assert await taking is not None
        await send("p0", 1, name, "shard-0000.safetensors")  # it is sealed
        assert await cluster.finish() == 0
        return codes

    assert simulate(main()) == [*["checkpoint"] * 6, "ZmlError", "checkpoint"]


def test_a_shard_writes_only_into_a_checkpoint_in_the_making(tmp_path: Path) -> None:
    real = tmp_path / ".step-000000001.0123456789abcdef.partial"
    real.mkdir()

    async def main() -> list[bool]:
        cluster = Watched(MemoryNetwork(1), JobSpec(workers=1, shards=1))
        await cluster.start()
        script = cluster.script("w0")
        await cluster.until(lambda: script.trained)
        core, done = cluster.shards[0].core, []
        assert core is not None and core.store is not None
        for folder, name in ((tmp_path, "x"), (real, "../x"), (real, ".x"), (real, "x")):
            core.copy = (7, core.store.snapshot(published=False))
            answer = await cluster.coordinator.shard_desk.ask("p0", Write("job", 7, str(folder), name))
            done.append(answer is not None)
        assert await cluster.finish() == 0
        return done

    assert simulate(main()) == [False, False, False, True]
    assert [path.name for path in tmp_path.iterdir()] == [real.name] and [p.name for p in real.iterdir()] == [
        "x"
    ]


def test_a_folder_that_may_not_be_looked_at_is_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*args: Any, **more: Any) -> Any:
        raise PermissionError(errno.EACCES, "no")

    assert is_seen(tmp_path)
    monkeypatch.setattr(os, "stat", denied)
    assert not is_seen(tmp_path)


@pytest.mark.parametrize("what", ["shard", "connection", "piece"])
def test_a_part_that_does_not_come_costs_this_checkpoint_and_the_next_is_whole(
    tmp_path: Path, what: str
) -> None:
    async def main() -> tuple[Path | None, Path | None, list[str]]:
        cluster = Watched(
            MemoryNetwork(1),
            JobSpec(workers=2, shards=2),
            sees=nowhere,
            folder=tmp_path / "logs",
            compute_s=lambda name: 1.0,
        )
        pieces: list[tuple[str, int]] = []  # in the order in which they first came

        def meddle(peer: str, message: Any, payload: Any, handler: Any) -> Any:
            if isinstance(message, Piece) and message.name == "shard-0001.safetensors":
                piece = message.checkpoint, message.offset
                first = piece not in pieces
                pieces.extend([piece] * first)
                if pieces.index(piece) != 2:
                    return handler(peer, message, payload)
                if what == "piece":
                    payload = bytes(
                        255 - byte for byte in payload
                    )  # damaged on its way, however often it is sent
                if what == "shard" and first:
                    cluster.kill_shard(1)
                if what == "connection" and first:
                    cluster.network.partition({peer}, {COORDINATOR})
            return handler(peer, message, payload)

        cluster.instead = meddle
        await cluster.start()
        take = keep(cluster, tmp_path)
        scripts = [cluster.script(f"w{index}", batches=60) for index in range(2)]
        await cluster.until(lambda: trained(scripts))
        with capture_logs() as logs:
            first = await take()
        said = [str(line["because"]) for line in logs if line["event"] == "no checkpoint"]
        assert not list((tmp_path / "checkpoints").iterdir()), "nothing is left of it"
        cluster.network.heal()
        if what == "shard":
            cluster.start_shard(1)
            await cluster.until(lambda: cluster.coordinator.shard_desk.holding())
        second = await take()
        assert await cluster.finish() == 0, [script.error for script in scripts]
        return first, second, said

    first, second, said = simulate(main())
    assert first is None and len(said) == 1
    assert ("p1 did not write its part" if what != "piece" else "of shard-0001.safetensors came") in said[0]
    assert second is not None and read(second).path == second


@pytest.mark.parametrize("code", [NOT_WRITTEN, DISK_FULL])
def test_a_folder_that_takes_nothing_is_gone_round_but_a_full_disk_is_full_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    def refuse(*args: Any) -> None:
        raise ZmlError(code, "no")

    monkeypatch.setattr(porter, "write_tensors", refuse)
    cluster, _, sent = train(tmp_path, sees=Path.is_dir, missing=code == DISK_FULL)
    assert bool(cluster.came["Piece"]) is bool(sent) is (code == NOT_WRITTEN)


@pytest.mark.parametrize("damage", ["full", "gone"])
def test_a_disk_that_does_not_take_the_pieces_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    write = Disk.write

    def full(disk: Disk, handle: int, data: Any) -> int:
        raise OSError(errno.ENOSPC if damage == "full" else errno.EIO, "no")

    async def main() -> tuple[Path | None, Path | None, list[str]]:
        cluster = Watched(MemoryNetwork(1), JobSpec(workers=1, shards=2), sees=nowhere)
        await cluster.start()
        take = keep(cluster, tmp_path)
        script = cluster.script("w0", batches=40)
        await cluster.until(lambda: script.trained)
        monkeypatch.setattr(Disk, "write", full)
        with capture_logs() as logs:
            first = await take()
        monkeypatch.setattr(Disk, "write", write)
        second = await take()
        assert await cluster.finish() == 0
        return first, second, [str(line["because"]) for line in logs if line["event"] == "no checkpoint"]

    first, second, said = simulate(main())
    assert first is None and second is not None
    assert len(said) == 1 and said[0].startswith(DISK_FULL if damage == "full" else NOT_WRITTEN)


def test_a_checkpoint_for_which_there_is_no_room_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "free_bytes", lambda path: 100)

    async def main() -> tuple[Path | None, list[str], int, bool]:
        cluster = Watched(MemoryNetwork(1), JobSpec(workers=1, shards=2), sees=nowhere)
        await cluster.start()
        take = keep(cluster, tmp_path)
        script = cluster.script("w0")
        await cluster.until(lambda: script.trained)
        with capture_logs() as logs:
            path = await take()
        said = [str(line["because"]) for line in logs if line["event"] == "no checkpoint"]
        left = any((tmp_path / "checkpoints").iterdir())
        await ended(cluster)
        return path, said, cluster.came["Piece"], left

    path, said, pieces, left = simulate(main())
    assert path is None and pieces == 0 and not left
    assert len(said) == 1 and said[0].startswith(DISK_FULL) and "bytes were needed" in said[0]


def test_a_file_may_not_be_longer_than_what_was_copied_for_it(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = Watched(MemoryNetwork(1), JobSpec(workers=1, shards=1), sees=nowhere)
        await cluster.start()
        take = keep(cluster, tmp_path)
        script = cluster.script("w0", batches=40)
        await cluster.until(lambda: script.trained)
        taking = asyncio.ensure_future(take())
        await cluster.until(lambda: cluster.came["Piece"])
        checkpoints = cluster.coordinator.checkpoint_desk.checkpoints
        intake = checkpoints.checkpointer.intake if checkpoints is not None else None
        assert intake is not None
        name = "shard-0000.safetensors"
        long = Piece("job", "p0", 1, intake.name, name, intake.most[name])
        with pytest.raises(Refused, match="and more came"):
            await script.client.of_checkpoint(long, b"x")
        path = await taking
        assert path is not None
        assert intake.most[name] - MOST_HEADER <= (path / name).stat().st_size < intake.most[name]
        await ended(cluster)

    simulate(main())


class DyingAt(Mortal):
    """Its coordinator dies when so many messages of a kind have come."""

    def __init__(self, folder: Path, seed: int, spec: JobSpec, kind: type, at: int) -> None:
        self.kind, self.at, self.came = kind, at, 0
        super().__init__(folder, seed, spec)

    def after_message(self) -> None:
        pass

    def watched(self, handler: Any) -> Any:
        inner = super().watched(handler)

        def handle(peer: str, message: Any, payload: Any) -> Any:
            if isinstance(message, self.kind):
                self.came += 1
                if self.came == self.at:
                    self.die()
            return inner(peer, message, payload)

        return handle


def test_a_coordinator_that_is_started_again_takes_the_next_checkpoint_and_not_the_rest_of_the_last(
    tmp_path: Path,
) -> None:
    async def main() -> tuple[Path | None, list[Script], list[str]]:
        cluster = DyingAt(tmp_path, 1, JobSpec(workers=2, shards=2), Piece, 5)
        cluster.sees = nowhere
        await cluster.start()
        take = keep(cluster, tmp_path)
        scripts = [cluster.script(f"w{index}", batches=30, epochs=1) for index in range(2)]
        await cluster.until(lambda: trained(scripts))
        with capture_logs() as logs:
            taking = asyncio.ensure_future(take())
            while not cluster.deaths or cluster.died.is_set():
                await asyncio.sleep(0.01)
            await cluster.until(lambda: cluster.coordinator.shard_desk.holding())
            second = await keep(cluster, tmp_path)()
            taking.cancel()
            assert await cluster.finish() == 0, [script.error for script in scripts]
        return second, scripts, [str(line["event"]) for line in logs]

    path, scripts, events = simulate(main())
    assert path is not None and read(path).path == path
    assert "a part of a checkpoint is missing" in events, "the former one's"
    assert trained(scripts) == [(0, batch) for batch in range(30)]


def with_optimizer(tmp_path: Path, **more: Any) -> Watched:
    """Of a job whose senior script is asked to keep its optimizer, and does so when the test lets it."""
    spec = JobSpec(workers=1, shards=1, optimizer_on="worker")
    cluster = Watched(MemoryNetwork(1), spec, compute_s=lambda name: 5.0, **more)
    cluster.silent = True
    return cluster


async def asked(cluster: Watched, tmp_path: Path) -> tuple[Script, asyncio.Future[Path | None]]:
    """A script that has been told to keep it, and the checkpoint that is taken."""
    await cluster.start()
    take = keep(cluster, tmp_path)
    script = cluster.script("w0", batches=40)
    await cluster.until(lambda: script.trained)
    taking = asyncio.ensure_future(take())
    await cluster.until(lambda: script.keep is not None)
    return script, taking


FILES = {TENSORS: [memoryview(b"t" * 17 * SMALL)], ABOUT: [memoryview(b"{}")]}


async def ended(cluster: Watched) -> None:
    cluster.coordinator.interrupt("SIGINT")
    cluster.coordinator.interrupt("SIGINT")
    await cluster.finish()


def test_a_script_s_files_are_synced_when_the_shards_parts_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However early they come: the disk is asked in one thread, and pieces would wait behind that."""
    adopted: list[str] = []
    adopt = Writer.adopt

    def noted(writer: Writer, name: str, size: int, xxh3: str) -> None:
        adopted.append(name)
        adopt(writer, name, size, xxh3)

    monkeypatch.setattr(Writer, "adopt", noted)
    monkeypatch.setattr(keeping, "is_seen", nowhere)

    async def main() -> list[str]:
        cluster = with_optimizer(tmp_path, sees=nowhere)
        kept = asyncio.Event()

        def hold(peer: str, message: Any, payload: Any, handler: Any) -> Any:
            if not isinstance(message, Piece) or message.member == "w0":
                return handler(peer, message, payload)

            async def later() -> Any:
                await kept.wait()
                return await handler(peer, message, payload)

            return later()

        cluster.instead = hold
        script, taking = await asked(cluster, tmp_path)
        assert script.keep is not None
        await keeping.keep(script.client, script.keep, FILES)
        assert cluster.came["Kept"] == 1
        early = list(adopted)
        kept.set()
        path = await taking
        assert path is not None and read(path).file(TENSORS) is not None
        await ended(cluster)
        return early

    assert simulate(main()) == []
    assert adopted == ["shard-0000.safetensors", TENSORS, ABOUT]


@pytest.mark.parametrize("stops", [False, True])
def test_a_script_may_send_its_optimizer_as_long_as_pieces_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    """Each of them may take longer than the coordinator mostly needs to answer."""
    monkeypatch.setattr(keeping, "is_seen", nowhere)
    slow_s = 4 * ASK_S

    async def main() -> tuple[float, Path | None, int]:
        cluster = with_optimizer(tmp_path)

        def slow(peer: str, message: Any, payload: Any, handler: Any) -> Any:
            if not isinstance(message, Piece):
                return handler(peer, message, payload)

            async def later() -> Any:
                await asyncio.sleep(1e6 if stops else slow_s)
                return await handler(peer, message, payload)

            return later()

        cluster.instead = slow
        script, taking = await asked(cluster, tmp_path)
        began = asyncio.get_running_loop().time()
        assert script.keep is not None
        sending = asyncio.ensure_future(keeping.keep(script.client, script.keep, FILES))
        path = await taking
        took_s = asyncio.get_running_loop().time() - began
        sending.cancel()
        await ended(cluster)
        return took_s, path, cluster.came["Piece"]

    took_s, path, came = simulate(main())
    assert path is not None
    if stops:
        assert read(path).file(TENSORS) is None and took_s < KEEP_S + 1
    else:
        assert read(path).file(TENSORS) is not None and took_s > KEEP_S
        assert came <= 2 * (17 + 1), "once more where it has overtaken another, and not because it took long"


def test_a_script_that_wrote_one_file_and_then_sends_both_costs_nothing(tmp_path: Path) -> None:
    """And of files that belong together all are in the checkpoint, or none."""
    model = registration()

    async def main(xxh3: str) -> Checkpoint:
        root = tmp_path / xxh3 / "checkpoints"
        root.parent.mkdir()
        intake = await depot.Intake.begin(root, 1)
        intake.senders |= {TENSORS: "w0", ABOUT: "w0"}
        fill(intake.writer, numbers(model))
        (intake.writer.folder / ABOUT).write_bytes(b"{}")
        for name in (ABOUT, TENSORS):
            await intake.take(Piece("job", "w0", 1, intake.name, name, 0), b"[]")
        files = [(ABOUT, 2, xxhash.xxh3_64_hexdigest(b"[]")), (TENSORS, 2, xxh3)]
        await intake.adopt_what_fits(files)
        path = intake.writer.seal(model, ledger=LEDGER, job={}, epoch=1, because="a test", now=1.0)
        await intake.end()
        assert {each.name for each in path.iterdir()} == {"MANIFEST.json", *read(path).manifest.files}
        return read(path)

    both = asyncio.run(main(xxhash.xxh3_64_hexdigest(b"[]")))
    for name in (ABOUT, TENSORS):
        path = both.file(name)
        assert path is not None and path.read_bytes() == b"[]"
    neither = asyncio.run(main(xxhash.xxh3_64_hexdigest(b"{}")))
    assert neither.file(ABOUT) is None and neither.file(TENSORS) is None


@pytest.mark.parametrize("stops", [False, True])
def test_the_end_waits_for_the_last_checkpoint_as_long_as_pieces_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    """And one that does not become whole is told of."""
    monkeypatch.setattr(piecewise.pieces, "__defaults__", (3 * SMALL,))

    async def main() -> tuple[int, float, list[str]]:
        cluster = Watched(MemoryNetwork(1), JobSpec(workers=1, shards=1), sees=nowhere)

        def slow(peer: str, message: Any, payload: Any, handler: Any) -> Any:
            if not isinstance(message, Piece):
                return handler(peer, message, payload)

            async def later() -> Any:
                await asyncio.sleep(1e6 if stops else 8.0)
                return await handler(peer, message, payload)

            return later()

        cluster.instead = slow
        await cluster.start()
        keep(cluster, tmp_path)
        script = cluster.script("w0", batches=2)
        await cluster.until(lambda: len(script.trained) == 4)
        loop = asyncio.get_running_loop()
        began = loop.time()
        with capture_logs() as logs:
            code = await cluster.finish()
        said = [f"{line['log_level']}: {line['wanted']}" for line in logs if line["event"] == "no checkpoint"]
        return code, loop.time() - began, said

    code, took_s, said = simulate(main())
    assert code == 0
    found, skipped = newest(tmp_path / "checkpoints")
    assert not skipped
    if stops:
        assert found is None and said == ["error: run ended"]
    else:
        assert found is not None and not said
        assert took_s > 2 * Rules().goodbye_s


# -- a job goes on ---------------------------------------------------------------------------------------------


def test_shards_that_do_not_see_the_checkpoint_fetch_what_belongs_to_their_chunks(tmp_path: Path) -> None:
    """In BSP the bits are those of a run that was never stopped, with as many shards and with others."""
    calm, _ = run(1)
    _, _, (checkpoint, _) = train(tmp_path / "first")
    for place, shards in enumerate((2, 3, 1)):
        cluster, scripts = begin(tmp_path / str(place), checkpoint, JobSpec(workers=3, shards=shards))
        assert sorted([*held(checkpoint), *trained(scripts)]) == ALL
        same([*calm, *scripts])
        asked = [message for message in cluster.messages if isinstance(message, Fetch)]
        assert {message.name for message in asked} == {
            "MANIFEST.json",
            "shard-0000.safetensors",
            "shard-0001.safetensors",
        }
        assert all(message.most <= SMALL or message.name == "MANIFEST.json" for message in asked)
        got = sum(message.most for message in asked if message.name.startswith("shard"))
        heads = shards * sum(
            len(file.read_bytes()[: 8 + int.from_bytes(file.read_bytes()[:8], "little")]) + 8
            for file in checkpoint.path.glob("shard-*")
        )
        data = sum(
            tensor.nbytes for chunk in checkpoint.holders for tensor in checkpoint.chunk(chunk).values()
        )
        assert got == heads + data, "each byte of the chunks once, and of the rest only where they lie"


@pytest.mark.parametrize("network", NETWORKS[1:], ids=str)
def test_what_is_fetched_survives_the_network(tmp_path: Path, network: dict[str, Any]) -> None:
    _, _, (checkpoint, _) = train(tmp_path / "first")
    calm, undisturbed = begin(tmp_path / "calm", checkpoint, JobSpec(workers=2, shards=3), sees=Path.is_dir)
    _, scripts = begin(tmp_path / "far", checkpoint, JobSpec(workers=2, shards=3), **network)
    same([*undisturbed, *scripts])
    assert calm.came["Fetch"] == 0, "who sees the folder reads there"


def test_another_folder_of_that_name_is_not_taken_for_the_coordinator_s(tmp_path: Path) -> None:
    """Here the shards see the one that the coordinator's was replaced by: nobody begins with that."""
    _, _, (checkpoint, later) = train(tmp_path / "first")
    before = checkpoint.path.with_name("before")
    checkpoint.path.rename(before)
    shutil.copytree(later.path, checkpoint.path)

    async def main() -> tuple[int, list[str]]:
        cluster = Watched(MemoryNetwork(2), JobSpec(workers=1, shards=1), resumed=checkpoint)
        await cluster.start()
        script = cluster.script("w0")
        with capture_logs() as logs:
            code = await cluster.finish()
        assert not script.trained
        return code, [str(line["because"]) for line in logs if line["event"] == "cannot begin"]

    code, said = simulate(main())
    assert code != 0
    assert len(said) == 1 and "MANIFEST.json is not the one that the job began with" in said[0]


DAMAGES: dict[str, Callable[[Fetch, Fetched, bytes], tuple[Fetched, bytes]]] = {
    "a byte": lambda asked, said, data: (said, bytes([data[0] ^ 1]) + data[1:]),
    "cut": lambda asked, said, data: (said, data[:-1]),
    "too long": lambda asked, said, data: (said, data + b"x"),
    "empty": lambda asked, said, data: (said, b""),
    "gone": lambda asked, said, data: (Fetched("job", -1), b""),
    "another piece": lambda asked, said, data: (
        replace(said, piece=xxhash.xxh3_64_hexdigest(data[:-1])),
        data,
    ),
}


@pytest.mark.parametrize("which", ["MANIFEST.json", "header", "chunks"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_an_answer_that_is_damaged_or_cut_is_refused_and_changes_nothing(
    tmp_path: Path, which: str, damage: str
) -> None:
    _, _, (checkpoint, _) = train(tmp_path / "first", spec=JobSpec(workers=1, shards=1))
    header = 8 + int.from_bytes((checkpoint.path / "shard-0000.safetensors").read_bytes()[:8], "little")

    def kind(message: Fetch) -> str:
        if message.name == "MANIFEST.json":
            return message.name
        return "header" if message.offset < header else "chunks"

    async def main() -> tuple[int, list[str]]:
        cluster = Watched(MemoryNetwork(2), JobSpec(workers=1, shards=1), resumed=checkpoint, sees=nowhere)

        def meddle(peer: str, message: Any, payload: Any, handler: Any) -> Any:
            reply = handler(peer, message, payload)
            if not isinstance(message, Fetch) or kind(message) != which:
                return reply

            async def damaged() -> Any:
                return DAMAGES[damage](message, *await reply)

            return damaged()

        cluster.instead = meddle
        await cluster.start()
        script = cluster.script("w0")
        await cluster.until(lambda: cluster.shards and cluster.shards[0].cores)
        core = cluster.shards[0].core
        assert core is not None
        with capture_logs() as logs:
            code = await cluster.finish()
        assert core.store is None and core.brought is None and not core.layout_digest and not script.trained
        return code, [str(line["because"]) for line in logs if line["event"] == "cannot begin"]

    code, said = simulate(main())
    assert code != 0
    assert len(said) == 1 and said[0].startswith(
        f"{BAD_CHECKPOINT}: the checkpoint {checkpoint.path} is not usable"
    )
    assert ("MANIFEST.json" if which == "MANIFEST.json" else "shard-0000.safetensors") in said[0]


def test_a_file_is_fetched_with_a_few_requests_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(piecewise, "PIECE", SMALL)
    data = bytes(range(256)) * 9
    now = most = 0

    async def say(message: Fetch, payload: Any) -> Answer:
        nonlocal now, most
        now += 1
        most = max(most, now)
        for _ in range(message.offset % 7):  # they come in another order than they were asked for
            await asyncio.sleep(0)
        now -= 1
        piece = data[message.offset : message.offset + message.most]
        hashes = [xxhash.xxh3_64_hexdigest(each) for each in (data, piece)]
        return Answer(Fetched("job", len(data), hashes[0], "", hashes[1]), memoryview(piece))

    async def main() -> bytes:
        source = piecewise.Source(say, lambda name, offset, count: Fetch("job", "w0", 1, name, offset, count))
        return await source.rest(*await begun(source))

    async def begun(source: piecewise.Source) -> tuple[Fetched, str, memoryview]:
        said, first = await source.begin(TENSORS)
        return said, TENSORS, first

    assert asyncio.run(main()) == data
    assert most == piecewise.WINDOW


def test_who_may_fetch_what(tmp_path: Path) -> None:
    _, _, (checkpoint, _) = train(tmp_path / "first", spec=JobSpec(workers=1, shards=1))

    async def main() -> list[str]:
        cluster = Watched(MemoryNetwork(2), JobSpec(workers=1, shards=1), resumed=checkpoint)
        await cluster.start()
        script = cluster.script("w0")
        await cluster.until(lambda: script.trained)
        said: list[str] = []
        shard = "shard-0000.safetensors"
        for member, incarnation, name, offset, most in (
            ("p0", 1, shard, 0, 10),
            ("p0", 1, "MANIFEST.json", 0, 10),
            ("w0", 1, shard, 0, 10),
            ("p0", 1, "ledger.json", 0, 10),
            ("p0", 1, "../checkpoints/LATEST", 0, 10),
            ("p0", 1, "shard-0001.safetensors", 0, 10),
            ("p0", 1, shard, -1, 10),
            ("p0", 1, shard, 10**12, 10),
            ("p0", 1, shard, 0, (1 << 20) + 1),
            ("p0", 1, shard, 0, 0),
            ("p0", 2, shard, 0, 10),
            ("p9", 1, shard, 0, 10),
        ):
            try:
                answer = await script.client.of_checkpoint(
                    Fetch("job", member, incarnation, name, offset, most)
                )
                assert isinstance(answer.message, Fetched)
                said.append("none" if answer.message.bytes < 0 else str(len(answer.payload or b"")))
            except Refused as refused:
                said.append(refused.code)
            except ZmlError as error:
                said.append(error.code)
        assert await cluster.finish() == 0
        return said

    assert simulate(main()) == [
        *["10", "10", "none", "none", "none", "none"],
        *["checkpoint"] * 4,
        FENCED,
        FENCED,
    ]


def test_a_file_that_has_changed_at_the_coordinator_is_not_given_out(tmp_path: Path) -> None:
    _, _, (checkpoint, _) = train(tmp_path / "first", spec=JobSpec(workers=1, shards=1))
    path = checkpoint.path / "shard-0000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    async def main() -> list[str]:
        cluster = Watched(MemoryNetwork(2), JobSpec(workers=1, shards=1), resumed=checkpoint, sees=nowhere)
        await cluster.start()
        cluster.script("w0")
        with capture_logs() as logs:
            assert await cluster.finish() != 0
        return [str(line["because"]) for line in logs if line["event"] == "cannot begin"]

    (said,) = simulate(main())
    assert "shard-0000.safetensors has changed since it was written" in said


def test_a_file_is_verified_once_and_who_asks_for_another_does_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is as it was written or not."""
    whole = make(tmp_path / "checkpoints", 3, shards=3)
    names = [f"shard-000{index}.safetensors" for index in range(3)]
    (whole / names[2]).write_bytes(bytes((whole / names[2]).stat().st_size))
    hashed: list[str] = []
    go_on = threading.Event()

    def hold(path: Path) -> tuple[int, str]:
        hashed.append(path.name)
        assert path.name != names[1] or go_on.wait(60)
        return hash_file(path)

    monkeypatch.setattr(depot, "hash_file", hold)

    async def main() -> None:
        offer = depot.Offer("job", str(whole))

        async def fetch(name: str) -> Any:
            said, _ = await offer.fetched(Fetch("job", "p0", 1, name, 0, 10), to_shard=True)
            return said

        assert (await fetch(names[0])).bytes > 0
        for _ in range(2):
            with pytest.raises(Refusal, match="has changed since it was written"):
                await fetch(names[2])
        others = [asyncio.ensure_future(fetch(names[1])) for _ in range(2)]
        async with asyncio.timeout(60):
            while names[1] not in hashed:
                await asyncio.sleep(0)
            assert (await fetch(names[0])).bytes > 0
            assert not any(other.done() for other in others)
        go_on.set()
        assert all(said.bytes > 0 for said in await asyncio.gather(*others))

    try:
        asyncio.run(main())
    finally:
        go_on.set()
    assert hashed == [names[0], names[2], names[1]]


def test_what_was_verified_when_it_was_loaded_is_not_read_through_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as it is the very same file."""
    whole = read(make(tmp_path / "checkpoints", 3, shards=2))
    name, other = "shard-0000.safetensors", "shard-0001.safetensors"
    data = (whole.path / other).read_bytes()
    (whole.path / other).unlink()
    (whole.path / other).write_bytes(data)
    hashed: list[str] = []

    def noted(path: Path) -> tuple[int, str]:
        hashed.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(depot, "hash_file", noted)
    offer = depot.Offer("job", str(whole.path), whole.manifest.xxh3, whole)
    for each in (name, other):
        said, got = asyncio.run(offer.fetched(Fetch("job", "p0", 1, each, 0, 100), to_shard=True))
        assert isinstance(said, Fetched) and said.xxh3 == whole.manifest.files[each].xxh3
        assert got == (whole.path / each).read_bytes()[:100]
    assert hashed == [other]


def test_a_coordinator_that_is_started_again_goes_on_with_the_checkpoint_that_the_job_began_with(
    tmp_path: Path,
) -> None:
    """Where the folder has another one by now nothing of it is given out, and nothing is begun with it."""
    before, later = read(make(tmp_path / "a", 3)), read(make(tmp_path / "b", 4))
    wrong = "MANIFEST.json is not the one that the job began with"
    offer = depot.Offer("job", str(later.path), before.manifest.xxh3)
    for name in ("MANIFEST.json", "shard-0000.safetensors"):
        with pytest.raises(Refusal, match=wrong):
            asyncio.run(offer.fetched(Fetch("job", "p0", 1, name, 0, 100), to_shard=True))
    with pytest.raises(BadCheckpoint, match="lists no file with chunk 999"):
        later.check([999])

    begun = Begun(
        "job", JobSpec(workers=1, shards=1), 1.0, 0.15, 0.0, str(before.path), 3, before.manifest.xxh3
    )
    for found in (later, None):
        with pytest.raises(BadCheckpoint, match=wrong):
            begun_with(begun, found, going_on=False)
        assert begun_with(begun, found, going_on=True) is None
    assert begun_with(begun, before, going_on=False) is before

    journal = Journal(tmp_path / "state")
    docket = Docket(JobId("job"), Machine(Rules()), journal, lambda: 0.0)
    docket.fact(begun)
    assert docket.settled()
    journal.close()

    async def main() -> None:
        Cluster(MemoryNetwork(1), begun.spec, state=tmp_path / "state", resumed=later)

    with pytest.raises(BadCheckpoint, match=wrong):
        simulate(main())


def test_a_shard_that_dies_before_its_log_has_a_base_fetches_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then its log begins with the order, and what the order names is elsewhere."""
    _, _, (checkpoint, _) = train(tmp_path / "first")
    _, undisturbed = begin(tmp_path / "calm", checkpoint, JobSpec(workers=3, shards=2))

    async def never(ps: Ps, core: Shard, pushes: PushLog) -> None:
        raise OSError("no room")

    monkeypatch.setattr(Ps, "_rebase", never)

    async def main() -> tuple[list[Script], int]:
        cluster = Watched(
            MemoryNetwork(2),
            JobSpec(workers=3, shards=2),
            resumed=checkpoint,
            sees=nowhere,
            folder=tmp_path / "logs",
        )
        await cluster.start()
        scripts = [cluster.script(f"w{index}", seed=100 + index) for index in range(3)]
        await cluster.until(lambda: trained(scripts))
        fetched = cluster.came["Fetch"]
        cluster.kill_shard(1)
        await asyncio.sleep(2.0)
        cluster.start_shard(1)
        assert await cluster.finish() == 0, [script.error for script in scripts]
        return scripts, cluster.came["Fetch"] - fetched

    scripts, again = simulate(main())
    assert again > 3
    same([*undisturbed, *scripts])


def test_the_coordinator_may_be_away_while_shards_fetch(tmp_path: Path) -> None:
    _, _, (checkpoint, _) = train(tmp_path / "first")
    _, undisturbed = begin(tmp_path / "calm", checkpoint, JobSpec(workers=2, shards=2))

    async def main() -> tuple[list[Script], int]:
        cluster = DyingAt(tmp_path, 2, JobSpec(workers=2, shards=2), Fetch, 9)
        cluster.sees = nowhere
        cluster.resumed = checkpoint
        cluster.coordinator.docket.journal.close()  # type: ignore[union-attr]
        cluster.make_coordinator()
        await cluster.start()
        scripts = [cluster.script(f"w{index}", seed=100 + index) for index in range(2)]
        assert await cluster.finish() == 0, [script.error for script in scripts]
        return scripts, cluster.deaths

    scripts, deaths = simulate(main())
    assert deaths == 1
    same([*undisturbed, *scripts])


@pytest.mark.parametrize("stops", [False, True])
def test_a_shard_may_fetch_as_long_as_pieces_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    """Longer than an order or a script waits without a sign; one to whom nothing comes ends the job."""
    _, _, (checkpoint, _) = train(tmp_path / "first", spec=JobSpec(workers=1, shards=1))
    patience_s = 20.0
    monkeypatch.setattr(shard_desk, "READ_S", patience_s)
    monkeypatch.setattr(shard_desk, "FETCH_S", patience_s)

    async def main() -> tuple[int, float, list[str]]:
        cluster = Watched(MemoryNetwork(2), JobSpec(workers=1, shards=1), resumed=checkpoint, sees=nowhere)
        cluster.patience_s = 10 * patience_s if stops else patience_s

        def slow(peer: str, message: Any, payload: Any, handler: Any) -> Any:
            if not isinstance(message, Fetch):
                return handler(peer, message, payload)

            async def later() -> Any:
                await asyncio.sleep(1e6 if stops and cluster.came["Fetch"] > 9 else patience_s / 4)
                return await handler(peer, message, payload)

            return later()

        cluster.instead = slow
        await cluster.start()
        script = cluster.script("w0")
        loop = asyncio.get_running_loop()
        while not script.trained and not cluster.coordinator.machine.over:
            await asyncio.sleep(0.1)
        took_s = loop.time()
        code = await cluster.finish()
        return code, took_s, [over.because for over in cluster.coordinator.machine.over.values()]

    code, took_s, said = simulate(main())
    if stops:
        assert code != 0 and said == ["p0 did not take the layout; its log says why"]
    else:
        assert code == 0 and took_s > 5 * patience_s


def test_a_backup_never_fetches_and_has_the_same_bits(tmp_path: Path) -> None:
    """It is copied from the shard's memory, once that has begun."""
    _, _, (checkpoint, _) = train(tmp_path / "first")
    cluster, _ = begin(tmp_path, checkpoint, JobSpec(workers=2, shards=2, replicas=1))
    asked = [message.member for message in cluster.messages if message.name == "MANIFEST.json"]
    assert sorted(asked) == ["p0", "p1"], "each for the shard that lives in it"
    backups = {name: backup for ps in cluster.shards.values() for name, backup in ps.backups.items()}
    assert backups.keys() == {"p0", "p1"}
    for name, backup in backups.items():
        core = cluster.shards[int(name[1:])].core
        assert core is not None and not backup.broken
        ours, theirs = bits(core), bits(backup.core)
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


@pytest.mark.parametrize("when", ["fetching", "begun", "training"])
def test_a_shard_that_dies_while_or_after_it_fetches_is_replaced_by_its_backup(
    tmp_path: Path, when: str
) -> None:
    """Nobody starts it again."""
    _, _, (checkpoint, _) = train(tmp_path / "first")
    _, undisturbed = begin(tmp_path / "calm", checkpoint, JobSpec(workers=2, shards=2))

    async def main() -> list[Script]:
        cluster = Watched(
            MemoryNetwork(2),
            JobSpec(workers=2, shards=2, replicas=1),
            resumed=checkpoint,
            sees=nowhere,
            compute_s=lambda name: 0.2,
        )

        def slow(peer: str, message: Any, payload: Any, handler: Any) -> Any:
            if not isinstance(message, Fetch):
                return handler(peer, message, payload)

            async def later() -> Any:
                begun = when != "fetching" and "p0" in cluster.coordinator.shard_desk.assigned
                await asyncio.sleep(
                    60.0 if begun else 0.2
                )  # a backup's, longer than a promotion is waited for
                return await handler(peer, message, payload)

            return later()

        cluster.instead = slow
        await cluster.start()
        scripts = [cluster.script(f"w{index}", seed=100 + index) for index in range(2)]
        assigned = cluster.coordinator.shard_desk.assigned
        moments: dict[str, Callable[[], object]] = {
            "fetching": lambda: sum(message.member == "p1" for message in cluster.messages) > 3,
            "begun": lambda: {"p0", "p1"} <= assigned and cluster.backed_up("p1"),
            "training": lambda: trained(scripts) and cluster.backed_up("p1"),
        }
        await cluster.until(moments[when])
        cluster.kill_shard(1)
        assert await cluster.finish() == 0, [script.error for script in scripts]
        return scripts

    same([*undisturbed, *simulate(main())])
