"""What a script tells its agent, for the agent to read when it wants to, also when the script is dead.

Some memory that both share. First, in eight bytes, how far the script has come in its batches: only what has begun can
be what it has crashed over, and a script that crashes says nothing any more. Rule: that is written before the batch is
touched. Then its complete steps, to say at which one it printed a line. Behind them its figures, now and then, in two
places in turn, each with a number and a checksum: whatever kills the script while it writes, and whenever the agent
looks, one of the two is whole. Nobody waits for anybody, and nothing is told that nobody reads.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import MutableMapping
from struct import Struct

import msgspec

from ..figures import STALENESS_BOUNDS, STEP_BOUNDS_S, WorkerFigures

VARIABLE = "ZML_TALLY"
_NUMBER = Struct("=Q")  # one store: whatever kills the script, it is whole
_EPOCH = 1 << 32  # batches of an epoch are fewer
_STEP = Struct("=q")  # behind it: steps that are complete, -1 before the script has joined
_HEAD = Struct("=QII")  # number, bytes, checksum
_PLACE = 4096
_FIGURES = _NUMBER.size + _STEP.size
_SIZE = _FIGURES + 2 * _PLACE
Tally = tuple[int, int]  # an epoch, and how many of the batches given to this script in it have begun


class AgentTally:
    """The agent's side."""

    def __init__(self) -> None:
        self.file = os.memfd_create("zml-tally")
        os.ftruncate(self.file, _SIZE)
        os.pwrite(self.file, _STEP.pack(-1), _NUMBER.size)

    def environment(self) -> dict[str, str]:
        """For the child, which must inherit `file`."""
        return {VARIABLE: str(self.file)}

    def read(self) -> Tally:
        number: int = _NUMBER.unpack(os.pread(self.file, _NUMBER.size, 0))[0]
        return divmod(number, _EPOCH)

    def step(self) -> int:
        """Steps that are complete; -1 where none can be."""
        if self.file < 0:
            return -1
        number: int = _STEP.unpack(os.pread(self.file, _STEP.size, _NUMBER.size))[0]
        return number

    def figures(self) -> WorkerFigures | None:
        """The newest that are whole; None before the first, and after `close`."""
        if self.file < 0:
            return None
        memory = os.pread(self.file, _SIZE, 0)
        told = [place for start in (0, 1) if (place := _whole(memory, _start(start))) is not None]
        if not told:
            return None
        try:
            figures = msgspec.msgpack.decode(max(told)[1], type=WorkerFigures)
        except msgspec.MsgspecError:
            return None  # the memory is the script's to spoil
        steps, staleness = len(figures.step_s), len(figures.staleness)
        whole = steps in (0, len(STEP_BOUNDS_S) + 1) and staleness in (0, len(STALENESS_BOUNDS) + 1)
        return figures if whole else None

    def close(self) -> None:
        """Twice is the same as once."""
        if self.file >= 0:
            os.close(self.file)
        self.file = -1


class ScriptTally:
    """The script's side; without an agent nobody reads it."""

    def __init__(self, environ: MutableMapping[str, str] | None = None) -> None:
        number = (os.environ if environ is None else environ).pop(VARIABLE, "")
        self.memory: mmap.mmap | None = None
        self.told = 0  # figures
        if number.isdigit():
            self.memory = mmap.mmap(int(number), _SIZE)
            os.close(int(number))

    def begin(self, epoch: int, batches: int, steps: int = -1) -> None:
        if self.memory is not None:
            _STEP.pack_into(self.memory, _NUMBER.size, steps)
            _NUMBER.pack_into(self.memory, 0, epoch * _EPOCH + batches)

    def tell(self, figures: WorkerFigures) -> None:
        """In one thread, whichever."""
        if self.memory is None:
            return
        data = msgspec.msgpack.encode(figures)
        self.told += 1
        at = _start(self.told % 2)
        assert len(data) <= _PLACE - _HEAD.size, "a report's header would not hold them either"
        self.memory[at + _HEAD.size : at + _HEAD.size + len(data)] = data
        _HEAD.pack_into(self.memory, at, self.told, len(data), zlib.crc32(data))


def _start(place: int) -> int:
    return _FIGURES + place * _PLACE


def _whole(memory: bytes, start: int) -> tuple[int, bytes] | None:
    """What stands in one of the two places, with its number, if that is all there."""
    number, size, checksum = _HEAD.unpack_from(memory, start)
    data = memory[start + _HEAD.size : start + _HEAD.size + min(size, _PLACE - _HEAD.size)]
    return (number, data) if number and len(data) == size and zlib.crc32(data) == checksum else None
