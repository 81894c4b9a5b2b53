"""What shards have written, kept by somebody who is none of them: every record of every log, and whose copy it is.

A shard has many logs in its life: whenever its copy takes its place, that one's log goes on where the copy was made,
and the former is deleted. Here they are all kept, so that the whole history of a shard can be read at the end of a run,
through all the homes that it had.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from zml.messages import Message
from zml.records import Buffer
from zml.scheduler.homes import copy_name
from zml.shard import pushlog
from zml.shard.backup import Backup
from zml.shard.mirror import Mirror
from zml.shard.pushlog import PushLog
from zml.shard.shard import Shard


class Record(NamedTuple):
    message: Message
    payload: bytes


class Copy(NamedTuple):
    """A log is that of a copy of the shard that wrote `of`, as it was when its history had `length` records."""

    of: str
    length: int


class Witness:
    """Logs have the names of their folders. A history is that of a log and of what it is a copy of."""

    def __init__(self) -> None:
        self.logs: dict[str, list[Record]] = {}  # what was written to each
        self.copies: dict[str, Copy] = {}
        self.promoted: dict[str, int] = {}  # copies that serve since their history had so many records
        self.wrong: list[str] = []

    def wrote(self, log: str, number: int, record: Record) -> None:
        records = self.logs.setdefault(log, [])
        if number != len(records):
            self.wrong.append(f"{log}: record {number} was written, and {len(records)} was to follow")
        records.append(record)

    def begins(self, log: str) -> int:
        """How much of its history is in the logs before."""
        return self.copies[log].length if log in self.copies else 0

    def length(self, log: str) -> int:
        return self.begins(log) + len(self.logs.get(log, ()))

    def history(self, log: str) -> list[Record]:
        before = self.history(copy.of)[: copy.length] if (copy := self.copies.get(log)) is not None else []
        return [*before, *self.logs.get(log, ())]

    def agree(self, one: str, other: str) -> int:
        """How many records the histories of both have in common."""
        pairs = zip(self.history(one), self.history(other), strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    # -- the rules -------------------------------------------------------------------------------------------

    def no_log_holds_two_histories(self) -> None:
        assert not self.wrong, self.wrong[0]

    def copies_follow(self) -> None:
        """A copy has taken what its shard took, in the same order, as long as it did not serve."""
        for log, copy in self.copies.items():
            followed = self.promoted.get(log, self.length(log))
            agreed = self.agree(log, copy.of)
            assert agreed >= min(followed, self.length(copy.of)), (
                f"{log} took as record {agreed} what {copy.of} did not: {self.history(log)[agreed].message}"
            )
            assert followed <= self.length(copy.of), (
                f"{log} had {followed} records, and {copy.of} only {self.length(copy.of)}"
            )

    def is_on_disk(self, folder: Path) -> int:
        """What a log holds is what was written to it, but for the records that its base has replaced; how many."""
        log = PushLog(folder)
        try:
            found = [Record(message, bytes(payload)) for message, payload in log.replay(log.records.first)]
            first = log.records.first
        finally:
            log.close()
        written = self.logs.get(folder.name, [])
        assert found == written[first:], f"{folder.name} holds {len(found)} records from {first} on, " + (
            f"and {len(written)} were written to it"
        )
        return len(found)


@contextmanager
def watching(witness: Witness, long_log: int) -> Iterator[None]:
    """All logs of this process are written before these eyes; they are cut at so many bytes."""
    append, begin, serve = PushLog.append, Mirror._begin, Backup.serve

    def append_seen(self: PushLog, message: Message, payload: Buffer | None = None) -> None:
        number = self.records.next
        append(self, message, payload)
        kept = Record(message, bytes(payload) if payload is not None else b"")
        witness.wrote(self.folder.name, number, kept)

    def begin_seen(self: Mirror) -> None:
        if isinstance(log := self.core.log, PushLog):
            name = copy_name(self.core.name, self.home, self.copy)
            witness.copies[name] = Copy(log.folder.name, witness.length(log.folder.name))
        begin(self)

    async def serve_seen(self: Backup) -> Shard:
        core = await serve(self)
        witness.promoted[self.name] = witness.length(self.name)
        return core

    with (
        patch.object(PushLog, "append", append_seen),
        patch.object(Mirror, "_begin", begin_seen),
        patch.object(Backup, "serve", serve_seen),
        patch.object(pushlog, "LEAST_BYTES", long_log),
    ):
        yield


def pairs(records: Sequence[Record]) -> Iterator[tuple[Message, memoryview]]:
    """As a log gives them."""
    return ((message, memoryview(payload)) for message, payload in records)
