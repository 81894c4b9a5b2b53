"""Memory for payloads that is used again once nobody looks at it.

Fresh pages cost eight times as much as the copy that fills them, and the C library gives freed ones back to the
kernel after every step. The rule: a buffer is lent again only when no view of it is left, whoever held one.
"""

from collections import deque

SIZE = 1 << 16  # bytes; buffers are multiples of this, so that payloads of about one size share them


class Pages:
    """Lends buffers and remembers at most `most` bytes of them. One thread asks; views may be held anywhere."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept = 0  # bytes of all buffers in `_buffers`, at most `most`
        self._buffers: dict[int, deque[bytearray]] = {}  # by size; lent longest ago first

    def lend(self, size: int) -> memoryview:
        """A view of `size` bytes, whatever is in them. The buffer is free again when the last view of it is gone."""
        wanted = -(-max(size, 1) // SIZE) * SIZE
        buffers = self._buffers.setdefault(wanted, deque())
        for _ in range(len(buffers)):
            buffer = buffers[0]
            buffers.rotate(-1)
            if _unseen(buffer):
                return memoryview(buffer)[:size]
        buffer = bytearray(wanted)
        if self.kept + wanted <= self.most:
            self.kept += wanted
            buffers.append(buffer)
        return memoryview(buffer)[:size]


def _unseen(buffer: bytearray) -> bool:
    """Nobody has a view of it: a bytearray that is looked at cannot change its length."""
    try:
        buffer.append(buffer.pop())  # no memory moves: the room for the last byte is still there
    except BufferError:
        return False
    return True
