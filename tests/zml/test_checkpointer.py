"""What a checkpointer says of itself: of the newest checkpoint, also of one from before it began."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.zml import checkpoints
from zml.checkpoint.folder import MANIFEST
from zml.coordinator.checkpointer import Checkpointer, Taken, on_disk
from zml.coordinator.cutting import Agreed, Cut
from zml.coordinator.holds import Holds, NotTaken
from zml.status import CheckpointStatus


class Told(Checkpointer):
    """Whose checkpoints end as they are told to."""

    ends: list[Taken | Exception]

    async def _take(self, because: str, moves: bool) -> Taken:
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


def of(root: Path, *ends: Taken | Exception) -> Told:
    nothing: Any = None
    made = Told("j", root, holds=Holds("j", nothing), shards=list, host=str, at=nothing, keep=nothing)
    made.ends = list(ends)
    return made


@pytest.mark.parametrize("failure", [NotTaken("no room"), RuntimeError("no room")])
def test_a_checkpoint_that_is_taken_forgets_the_failure_before(tmp_path: Path, failure: Exception) -> None:
    async def run() -> None:
        taker = of(tmp_path, failure, Taken(tmp_path / "c", 7, 100, 0.1), failure)
        await taker.take("asked")
        assert "no room" in taker.told.because and (taker.told.taken, taker.told.failed) == (0, 1)
        await taker.take("asked")
        assert (taker.told.because, taker.told.step, taker.told.taken, taker.told.failed) == ("", 7, 1, 1)
        await taker.take("asked")
        assert "no room" in taker.told.because and (taker.told.step, taker.told.failed) == (7, 2)

    asyncio.run(run())


def test_a_coordinator_that_begins_again_knows_the_newest_that_is_whole(tmp_path: Path) -> None:
    assert on_disk(tmp_path / "none") == CheckpointStatus()
    older = checkpoints.make(tmp_path, step=5)
    newest = checkpoints.make(tmp_path, step=9)
    told = of(tmp_path).told
    assert (told.path, told.step, told.taken, told.because) == (str(newest), 9, 0, "")
    assert told.bytes > 0 and told.at == 1_770_000_000.0, "when that one was made"
    (newest / MANIFEST).write_text("torn")
    assert on_disk(tmp_path).path == str(older)


class Standing(Checkpointer):
    """Whose shards stand after so many updates, with this ledger, and whose checkpoints are written at once."""

    def __init__(self, root: Path) -> None:
        nothing: Any = None
        cutter: Any = self
        super().__init__(
            "j", root, holds=Holds("j", nothing), shards=lambda: ["p0"], host=str, at=nothing, keep=nothing
        )
        self.cutter = cutter
        self.updates = 5
        self.ledger: dict[str, Any] = {"epoch": 0, "committed": [[0, 4]]}

    async def cut(self, *about: Any, **how: Any) -> Agreed:
        front: Any = SimpleNamespace(updates=self.updates)
        return Agreed(
            front, Cut(b"", 0, dict(self.ledger), {"steps": self.updates, "note": None}, {}), {"p0": 9}, 0.0
        )

    async def _write(self, *about: Any) -> tuple[Path, float]:
        return checkpoints.make(self.root, step=about[1]), 0.0


def test_at_the_end_none_is_taken_where_the_newest_has_all_there_is_and_is_whole(tmp_path: Path) -> None:
    async def run() -> None:
        taker = Standing(tmp_path)
        first = await taker.take("every 5 steps")
        assert first is not None and first.name == "step-000000005"
        assert await taker.take("at the end", moves=False) == first and taker.told.taken == 1
        asked = await taker.take("SIGUSR2 at the coordinator")
        assert asked is not None and asked.name == "step-000000005.2", "who asks for one gets one"
        taker.ledger["committed"] = [[0, 5]]
        skipped = await taker.take("at the end", moves=False)
        assert skipped is not None and skipped.name == "step-000000005.3"
        (skipped / MANIFEST).unlink()
        again = await taker.take("at the end", moves=False)
        assert again not in (None, skipped)
        taker.updates += 1
        assert await taker.take("at the end", moves=False) == tmp_path / "step-000000006"

    asyncio.run(run())
