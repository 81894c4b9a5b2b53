"""The worker's side of checkpoints: its optimizer's state into the folder, or in pieces, and back at a resume."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from tests.simulation import simulate
from tests.zml.checkpoints import JOB, LEDGER, NOW, fill, numbers, registration
from tests.zml.cluster import Cluster
from tests.zml.test_updates import Twin
from zml.agent.seat import Seat
from zml.checkpoint import Checkpoint, Writer, read
from zml.checkpoint import Refused as WriterRefused
from zml.checkpoint.folder import ABOUT, TENSORS
from zml.coordinator.checkpoints import When
from zml.errors import BAD_CHECKPOINT, ZmlError
from zml.iothread import IoThread
from zml.messages import Fetch, Fetched, JobSpec, Keep, Kept, Ok, Piece
from zml.piecewise import PIECE, pieces
from zml.transport import Answer, Refused
from zml.transport.memory import MemoryNetwork
from zml.worker.keeping import Keeping, fetch
from zml.worker.schedules import Schedules

ME: dict[str, Any] = {"job": "job", "member": "w0", "incarnation": 1}


class Coordinator:
    """A client whose coordinator is called on the spot, and takes files as the real one's writer does."""

    def __init__(self, writer: Writer | None = None, resumes: Checkpoint | None = None) -> None:
        self.seat = Seat(job="job", worker="w0", incarnation=1, coordinator=[])
        self.writer = writer
        self.resumes = resumes
        self.said: list[Any] = []
        self.path = True  # whether it tells where its files lie
        self.damage = False
        self.error: Exception | None = None
        self.free = asyncio.Event()
        self.free.set()

    async def of_checkpoint(self, message: Piece | Kept | Fetch, payload: Any = None) -> Answer:
        await self.free.wait()
        if self.error is not None:
            raise self.error
        self.said.append(message)
        match message:
            case Piece():
                assert self.writer is not None and len(payload) <= PIECE
                self.writer.piece(message.name, message.offset, payload)
                self.writer.piece(message.name, message.offset, payload)  # twice is the same as once
            case Kept():
                for name, size, xxh3 in message.files:
                    assert self.writer is not None
                    self.writer.adopt(name, size, xxh3)
            case Fetch():
                return self.fetched(message)
        return Answer(Ok(), None)

    def fetched(self, message: Fetch) -> Answer:
        path = self.resumes.file(message.name) if self.resumes is not None else None
        if path is None or self.resumes is None:
            return Answer(Fetched("job", -1), None)
        data = path.read_bytes()[message.offset : message.offset + PIECE]
        listed = self.resumes.manifest.files[message.name]
        where = str(path) if self.path else "/nowhere/else"
        piece = xxhash.xxh3_64_hexdigest(data)
        data = bytes(len(data)) if self.damage else data
        return Answer(Fetched("job", listed.bytes, listed.xxh3, where, piece), memoryview(data))


def keeping(coordinator: Coordinator, io: IoThread, twin: Twin, on_worker: bool = True) -> Keeping:
    schedules = Schedules(twin.optimizer, "w0").look()
    return Keeping(coordinator, io, twin.model, schedules, on_worker=on_worker)  # type: ignore[arg-type]


def ask(keeping: Keeping, folder: Path | str) -> None:
    keeping.order = Keep("job", "c1", str(folder))
    keeping.look(2)
    keeping.close()


def seal(writer: Writer) -> Checkpoint:
    fill(writer, numbers(registration()))
    path = writer.seal(registration(), ledger=LEDGER, job=JOB, epoch=1, because="test", now=NOW)
    return read(path)


def twin_of(io: IoThread, weights: dict[str, torch.Tensor] | None = None) -> Twin:
    return Twin(io, "AdamW", weights=weights, compress="none")


@pytest.mark.parametrize("near", [True, False], ids=["into the folder", "in pieces"])
@pytest.mark.parametrize("path", [True, False], ids=["from disk", "fetched"])
def test_a_resumed_run_goes_on_with_the_bits_of_the_undisturbed_one(
    tmp_path: Path, io: IoThread, near: bool, path: bool
) -> None:
    """One worker in sync, its optimizer here, nothing compressed: seven steps, and four steps and three."""
    schedulers: dict[Twin, Any] = {}

    def make(weights: dict[str, torch.Tensor] | None = None) -> Twin:
        twin = twin_of(io, weights)
        schedulers[twin] = torch.optim.lr_scheduler.CosineAnnealingLR(twin.optimizer, 9)
        return twin

    def train(twin: Twin, steps: int) -> None:
        for _ in range(steps):
            twin.train(1)
            schedulers[twin].step()

    undisturbed, first = make(), make()
    train(undisturbed, 7)
    train(first, 4)
    writer = Writer(tmp_path / "checkpoints", 4)
    coordinator = Coordinator(writer)
    ask(keeping(coordinator, io, first), writer.folder if near else "/nowhere")
    weights = {name: value.clone() for name, value in first.model.state_dict().items()}
    train(first, 1)  # what comes after the copy is in nothing
    checkpoint = seal(writer)
    streamed = [said for said in coordinator.said if isinstance(said, Piece)]
    assert bool(streamed) is not near and isinstance(coordinator.said[-1], Kept)

    second = make(weights)
    resumes = Coordinator(resumes=checkpoint)
    resumes.path = path
    resumed = keeping(resumes, io, second)
    resumed.schedules.begin(2, b"", resumed.restore())
    train(second, 3)
    resumed_weights = second.model.state_dict()
    for name, value in undisturbed.model.state_dict().items():
        assert torch.equal(value, resumed_weights[name]), name
    for one, other in zip(undisturbed.model.parameters(), second.model.parameters(), strict=True):
        ours, theirs = undisturbed.optimizer.state[one], second.optimizer.state[other]
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert undisturbed.optimizer.param_groups[0]["lr"] == second.optimizer.param_groups[0]["lr"] < 0.01


def test_without_the_state_the_bits_would_differ(tmp_path: Path, io: IoThread) -> None:
    """So that the test before can fail."""
    undisturbed = twin_of(io)
    undisturbed.train(4)
    second = twin_of(io, undisturbed.model.state_dict())
    assert keeping(Coordinator(), io, second).restore() is None, "the job goes on from nothing"
    undisturbed.train(1)
    second.train(1)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(undisturbed.model.parameters(), second.model.parameters(), strict=True)
    )


def test_where_the_optimizer_is_on_the_shards_there_is_nothing_to_keep_or_to_fetch(io: IoThread) -> None:
    coordinator = Coordinator()
    kept = keeping(coordinator, io, twin_of(io), on_worker=False)
    ask(kept, "/nowhere")
    assert coordinator.said == [Kept(**ME, checkpoint="c1", files=[])]
    assert kept.restore() is None and len(coordinator.said) == 1


def test_one_copy_is_on_its_way_at_a_time_and_the_newest_order_counts(tmp_path: Path, io: IoThread) -> None:
    coordinator = Coordinator(Writer(tmp_path / "checkpoints", 1))
    twin = twin_of(io)
    twin.train(1)
    kept = keeping(coordinator, io, twin)
    coordinator.free.clear()
    for name in ("c1", "c2", "c3"):
        kept.order = Keep("job", name, "/nowhere")
        kept.look(0)
    under_way = kept.under_way
    assert kept.order is not None and kept.order.checkpoint == "c3"
    io.post(coordinator.free.set)
    assert under_way is not None
    under_way.result(20)
    assert {said.checkpoint for said in coordinator.said} == {"c1"}
    coordinator.writer = Writer(tmp_path / "checkpoints", 2)
    kept.look(0)
    kept.close()
    assert {said.checkpoint for said in coordinator.said} == {"c1", "c3"} and kept.order is None


@pytest.mark.parametrize(
    "error",
    [
        Refused("coordinator", "checkpoint", "no checkpoint is being made"),
        ZmlError(BAD_CHECKPOINT, "gone"),
        WriterRefused("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_checkpoint_that_fails_is_logged_and_training_goes_on(
    tmp_path: Path, io: IoThread, error: Exception
) -> None:
    coordinator, twin = Coordinator(), twin_of(io)
    twin.train(1)
    coordinator.error = error
    with capture_logs() as logs:
        ask(keeping(coordinator, io, twin), tmp_path)
    assert [line["event"] for line in logs] == ["optimizer not kept"]
    twin.train(1)


def test_a_folder_that_does_not_take_the_files_is_gone_round(tmp_path: Path, io: IoThread) -> None:
    coordinator, twin = Coordinator(Writer(tmp_path / "checkpoints", 1)), twin_of(io)
    twin.train(1)
    folder = tmp_path / "folder"
    (folder / TENSORS).mkdir(parents=True)  # nothing can be renamed onto a folder
    with capture_logs() as logs:
        ask(keeping(coordinator, io, twin), folder)
    assert logs[0]["event"] == "optimizer is sent"
    assert {said.name for said in coordinator.said if isinstance(said, Piece)} == {TENSORS, ABOUT}
    assert [path.name for path in folder.iterdir()] == [TENSORS]


@pytest.mark.parametrize("what", ["damage", "refused", "large", "short"])
def test_a_state_that_does_not_come_as_it_was_written_is_an_error_for_people(
    tmp_path: Path, io: IoThread, what: str
) -> None:
    twin = twin_of(io)
    twin.train(1)
    writer = Writer(tmp_path / "checkpoints", 1)
    ask(keeping(Coordinator(writer), io, twin), writer.folder)
    coordinator = Coordinator(resumes=seal(writer))
    coordinator.path = False
    if what == "damage":
        coordinator.damage = True
    elif what == "refused":
        coordinator.error = Refused("coordinator", "checkpoint", "it was deleted")
    elif what == "short":
        listed = coordinator.resumes.manifest.files[ABOUT]  # type: ignore[union-attr]
        listed_more = type(listed)(listed.bytes + 5, listed.xxh3)
        coordinator.resumes.manifest.files[ABOUT] = listed_more  # type: ignore[union-attr]
    other = twin_of(io)
    before = {name: value.clone() for name, value in other.model.state_dict().items()}
    with pytest.raises(ZmlError) as caught:
        if what == "large":
            io.call(fetch(coordinator, TENSORS, 100))  # type: ignore[arg-type]
        keeping(coordinator, io, other).restore()
    assert caught.value.code == BAD_CHECKPOINT and "w0: worker." in caught.value.what
    assert not other.optimizer.state
    assert all(torch.equal(before[name], value) for name, value in other.model.state_dict().items())


@given(st.lists(st.binary(max_size=50), max_size=20), st.integers(1, 60))
def test_pieces_are_the_same_bytes_and_all_but_the_last_have_the_same_size(
    data: list[bytes], size: int
) -> None:
    found = [bytes(piece) for piece in pieces([memoryview(each) for each in data], size)]
    assert b"".join(found) == b"".join(data)
    assert all(len(piece) == size for piece in found[:-1])
    assert all(0 < len(piece) <= size for piece in found)


def test_a_script_without_a_shared_folder_sends_its_state_and_who_resumes_fetches_it(tmp_path: Path) -> None:
    spec = JobSpec(workers=2, shards=1, optimizer_on="worker")
    tensors, about = b"t" * 2500, b"{}"

    async def kept() -> tuple[Checkpoint, list[str]]:
        cluster = Cluster(MemoryNetwork(1), spec)
        cluster.silent = True
        await cluster.start()
        cluster.coordinator.checkpoint_desk.keep(tmp_path / "checkpoints", When())
        scripts = [cluster.script(f"w{rank}", batches=12, epochs=3) for rank in range(2)]
        await cluster.until(lambda: any(script.trained for script in scripts))
        client, codes = scripts[0].client, []

        async def refused(message: Any, payload: bytes = b"") -> None:
            try:
                await client.of_checkpoint(message, payload)
            except Refused as error:
                codes.append(error.code)

        await refused(Piece(**ME, checkpoint="1", name=ABOUT, offset=0), b"x")  # none is being made
        assert cluster.coordinator.checkpoint_desk.checkpoints is not None
        taking = asyncio.ensure_future(cluster.coordinator.checkpoint_desk.checkpoints.take("a test"))
        await cluster.until(lambda: scripts[0].keep is not None)
        assert scripts[0].keep is not None and scripts[1].keep is None, "the senior is asked"
        number = scripts[0].keep.checkpoint
        await refused(Piece(**ME, checkpoint=number, name="shard-0000.safetensors", offset=0), b"x")
        await refused(Piece(**ME, checkpoint=number, name=TENSORS, offset=7), b"x")  # nothing is before it
        for offset in (0, 1000, 1000, 2000):  # one comes twice
            piece = Piece(**ME, checkpoint=number, name=TENSORS, offset=offset)
            await client.of_checkpoint(piece, tensors[offset : offset + 1000])
        await client.of_checkpoint(Piece(**ME, checkpoint=number, name=ABOUT, offset=0), about)
        files = [(n, len(d), xxhash.xxh3_64_hexdigest(d)) for n, d in ((TENSORS, tensors), (ABOUT, about))]
        await client.of_checkpoint(Kept(**ME, checkpoint=number, files=files))
        path = await taking
        assert path is not None
        await cluster.until(lambda: any(epoch == 1 for epoch, _ in scripts[0].trained))
        late = cluster.script("w2", batches=12, epochs=3)
        assert await cluster.finish() == 0, [script.error for script in cluster.scripts.values()]
        assert scripts[0].client.note == b"" and late.client.note == b"w0 at epoch 1"
        return read(path), codes

    async def resumed(checkpoint: Checkpoint) -> tuple[list[Fetched], list[bytes]]:
        cluster = Cluster(MemoryNetwork(2), spec, resumed=checkpoint)
        await cluster.start()
        scripts = [cluster.script(f"w{rank}", batches=12, epochs=3) for rank in range(2)]
        await cluster.until(lambda: any(script.trained for script in scripts))
        answers = [
            await scripts[0].client.of_checkpoint(Fetch("job", "w0", 1, name, offset))
            for name, offset in ((TENSORS, 0), (TENSORS, 2400), (ABOUT, 0), ("MANIFEST.json", 0))
        ]
        assert await cluster.finish() == 0
        return [answer.message for answer in answers], [bytes(answer.payload or b"") for answer in answers]  # type: ignore[misc]

    checkpoint, codes = simulate(kept())
    assert codes == ["checkpoint", "checkpoint", "gap"]
    assert (checkpoint.path / TENSORS).read_bytes() == tensors
    messages, payloads = simulate(resumed(checkpoint))
    assert payloads == [tensors, tensors[2400:], about, b""]
    assert [message.bytes for message in messages] == [2500, 2500, 2, -1]


def test_a_script_that_sends_half_a_file_costs_the_checkpoint_that_file_and_no_more(tmp_path: Path) -> None:
    async def main() -> Checkpoint:
        cluster = Cluster(
            MemoryNetwork(1), JobSpec(workers=1, shards=1, optimizer_on="worker"), compute_s=lambda w: 5.0
        )
        cluster.silent = True
        await cluster.start()
        cluster.coordinator.checkpoint_desk.keep(tmp_path / "checkpoints", When())
        script = cluster.script("w0")
        await cluster.until(lambda: script.trained)
        assert cluster.coordinator.checkpoint_desk.checkpoints is not None
        taking = asyncio.ensure_future(cluster.coordinator.checkpoint_desk.checkpoints.take("a test"))
        await cluster.until(lambda: script.keep is not None)
        assert script.keep is not None
        piece = Piece(**ME, checkpoint=script.keep.checkpoint, name=TENSORS, offset=0)
        await script.client.of_checkpoint(piece, b"half")
        path = await taking
        assert path is not None and await cluster.finish() == 0
        return read(path)

    checkpoint = simulate(main())
    assert checkpoint.file(TENSORS) is None and not (checkpoint.path / TENSORS).exists()
