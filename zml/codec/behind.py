"""What is to be published: a chunk of which workers hold an older version than the shard."""

from typing import NamedTuple

from torch import Tensor

from ..layout import Chunk


class Behind(NamedTuple):
    """w is what the shard has at `version`, p what workers hold at `base`."""

    chunk: Chunk
    w: Tensor
    p: Tensor
    base: int
    version: int
    budget: int  # elements that a delta may have, of codecs that choose
