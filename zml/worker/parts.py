"""Where the batches of an epoch lie in a stream: in which of its parts, and how far into that.

A stream is read in a fixed number of parts, each a sequence of batches that begins anew where it ends. An epoch takes
turns among them: its batch b is in part b mod P, b div P batches behind where the epoch before has left that part. So
which samples a batch holds follows from its number alone, whoever reads it, and however many workers there are.

The ledger keeps the cut of each epoch as the token that its first worker shows, and checkpoints keep the ledger.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import msgspec

from ..errors import LOADER, ZmlError
from ..messages import MOST_PARTS


class Place(NamedTuple):
    """A batch of a stream: the `position`th of this part, from 0, over all epochs."""

    part: int
    position: int


class Cut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One epoch of `batches` batches. `starts`: how many of each part come before it.

    `batch_size` (0: the stream's own batches) and `drop_last` say what a batch is: positions count nothing else.
    """

    batches: int
    starts: tuple[int, ...]
    batch_size: int = 0
    drop_last: bool = False

    @classmethod
    def first(cls, parts: int, batches: int, batch_size: int, drop_last: bool) -> Self:
        return cls(batches, (0,) * parts, batch_size, drop_last)

    @property
    def parts(self) -> int:
        return len(self.starts)

    def place(self, batch: int) -> Place:
        later, part = divmod(batch, self.parts)
        return Place(part, self.starts[part] + later)

    def is_last_of_part(self, batch: int) -> bool:
        return batch + self.parts >= self.batches

    def next(self, batches: int) -> Cut:
        """The epoch behind this one."""
        each, more = divmod(self.batches, self.parts)
        starts = tuple(start + each + (part < more) for part, start in enumerate(self.starts))
        return msgspec.structs.replace(self, batches=batches, starts=starts)

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self)

    def understand(self, token: bytes, most: int = MOST_PARTS) -> Cut:
        """The cut that counts, as the ledger has it; ZmlError if it is not of such a stream as this one, of which
        `most` parts can be read."""
        fix = "Give every worker, and a run that goes on, the same loader."
        try:
            cut = msgspec.json.decode(token, type=Cut)
        except msgspec.MsgspecError:
            what = "another worker, or the run before, has no such stream for its data"
            raise ZmlError(LOADER, what, fix) from None
        if not 1 <= cut.parts <= most or min(cut.starts) < 0:
            what = f"another worker, or the run before, reads its stream in {cut.parts} parts; this one has {most}"
            raise ZmlError(LOADER, what, fix)
        if (cut.batch_size, cut.drop_last) != (self.batch_size, self.drop_last):
            mine, other = _said(self), _said(cut)
            what = (
                f"this loader reads its stream with {mine}; another worker, or the run before, with {other}"
            )
            raise ZmlError(LOADER, what, fix)
        return cut


def _said(cut: Cut) -> str:
    return f"batch_size {cut.batch_size or None} and drop_last {cut.drop_last}"


def parts_for(readers: int, most: int) -> int:
    """Into how many parts so many readers divide a stream of which `most` can be read: each then reads whole parts."""
    return max(parts for parts in range(1, readers + 1) if readers % parts == 0 and parts <= max(most, 1))
