"""How far a script has come, for its agent to read: in its batches, when it is dead, and in its steps, to say at which
one it printed a line.

A few bytes of memory that both share: only what has begun can be what a script has crashed over, and a script that
crashes says nothing any more. Rule: it is written before the batch is touched.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import MutableMapping
from struct import Struct

VARIABLE = "ZML_TALLY"
_NUMBER = Struct("=Q")  # one store: whatever kills the script, it is whole
_EPOCH = 1 << 32  # batches of an epoch are fewer
_STEP = Struct("=q")  # behind it: steps that are complete, -1 before the script has joined
_BYTES = _NUMBER.size + _STEP.size
Tally = tuple[int, int]  # an epoch, and how many of the batches given to this script in it have begun


class AgentTally:
    """The agent's side."""

    def __init__(self) -> None:
        self.file = os.memfd_create("zml-tally")
        os.pwrite(self.file, _NUMBER.pack(0) + _STEP.pack(-1), 0)

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
        if number.isdigit():
            self.memory = mmap.mmap(int(number), _BYTES)
            os.close(int(number))

    def begin(self, epoch: int, batches: int, steps: int = -1) -> None:
        if self.memory is not None:
            _STEP.pack_into(self.memory, _NUMBER.size, steps)
            _NUMBER.pack_into(self.memory, 0, epoch * _EPOCH + batches)
