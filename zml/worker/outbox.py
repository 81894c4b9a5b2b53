"""One bucket of the step that is being computed: gradients are gathered in it, packed, and sent."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..codec import Codec, Differing
from ..layout import Bucket, Layout


class Outbox:
    """Invariants: `missing` are the parameters whose gradient has not been gathered in this step; `sent` says that
    what was gathered last has left."""

    def __init__(self, bucket: Bucket, layout: Layout, codec: Codec, device: str = "cpu") -> None:
        """`device` is where the bucket's gradients live: a codec may pack there, before the copy to the host."""
        self.bucket = bucket
        chunks = [layout.chunks[chunk] for chunk in bucket.chunks]
        self.packer = codec.packer(chunks) if device == "cpu" else codec.device_packer(chunks, device)
        self.differing: Differing | None = None  # it packs differences, if so
        self.missing = set(bucket.parameters)
        self.absent: set[int] = set()
        self.sent = False
        self.clock = -1  # at which it left last

    @property
    def values(self) -> Mapping[int, Tensor]:
        return self.packer.values

    def set_absent(self, parameter: int, absent: bool) -> None:
        if absent:
            self.absent.add(parameter)
        else:
            self.absent.discard(parameter)

    def pack(self, density: float | None = None, decay: float = 1.0) -> memoryview:
        """Encode what was gathered; the payload of its push. Raises NonFinite, and then nothing was packed."""
        if self.differing is not None:
            payload = self.differing.pack_difference(density)
        else:
            payload = self.packer.pack(self.absent, density, decay)
        self.sent = True
        return payload

    def take_back(self) -> None:
        """What has left does not count; to be called before anything else is gathered."""
        if self.sent:
            self.packer.take_back()
            self.sent = False

    def next_step(self) -> None:
        """The step counts at the shard."""
        self.missing = set(self.bucket.parameters)
        self.sent = False
