"""One bucket of a model whose updates are measured as p less the model, and packed from the two in one pass.

    V = p - theta        what waited in the residual, and what was computed since: theta was p less the residual
    C(V) leaves, V - C(V) is the residual, and theta becomes the new p less that

With an exchange in flight what that one carries acts at home as well, so that its frames are in p - theta and are no
part of V. What waits is known to the rounding of the model's own parameters, which is part of the next difference.
For models that hold their parameters as chunks do, in float32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..codec import Differing
from ..codec.runs import Places, within
from .binding import Binding
from .outbox import Outbox
from .replica import Replica


class Difference:
    """Belongs to the training thread; between `prepare` and `settled` another may pack."""

    def __init__(
        self, outbox: Outbox, packer: Differing, binding: Binding, replica: Replica, *, overlap: bool
    ) -> None:
        self.outbox = outbox
        self.packer = packer
        self.binding = binding
        self.overlap = overlap
        self.base, self.values, self.residual = packer.slabs()
        # What the model lacks of p, as one piece of memory.
        self.less = self.residual.clone() if overlap else self.residual
        outbox.differing = packer
        for chunk, memory in packer.by_chunk(self.base).items():
            replica.keep_in(chunk, memory)

    @staticmethod
    def of(outbox: Outbox, binding: Binding, replica: Replica, *, overlap: bool) -> Difference | None:
        """None where the model or the codec has no use for it."""
        packer = outbox.packer.differing()
        if packer is None or not binding.exact(outbox.bucket.parameters):
            return None
        return Difference(outbox, packer, binding, replica, overlap=overlap)

    @property
    def holds(self) -> bool:
        """Are the parameters still what they were, or has somebody converted or moved them?"""
        return self.binding.exact(self.outbox.bucket.parameters)

    def end(self) -> Mapping[int, torch.Tensor]:
        """No more differences; what the model lacks of p, chunk by chunk."""
        self.outbox.differing = None
        return self.packer.by_chunk(self.less)

    def prepare(self, *, at_home: bool) -> None:
        """Let base - values be V. `at_home`: the model was made by `restore`, and is not p itself."""
        self.binding.read_runs(self.packer.runs, self.values)
        if not at_home:
            self.values.sub_(self.residual)
        elif self.overlap:
            self.packer.give(self.values)

    def restore(self) -> None:
        """The model becomes p, less what has not left or is in flight."""
        if self.overlap:
            self.less.copy_(self.residual)
            self.packer.give(self.less)
        self.binding.write_runs(self.packer.runs, self.base, self.less)

    def sent(self) -> Iterator[tuple[int, Places]]:
        """What of each parameter was chosen last, as positions in it."""
        return within(self.packer.runs, self.packer.places())
