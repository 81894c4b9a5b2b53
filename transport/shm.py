"""Shared memory between two processes of one machine: a ring of slots, one ring per direction.

The writer copies a payload into a slot and tells the reader the slot's number over the socket; the reader
lends the slot out as a memoryview, without a copy. The rule: a slot belongs to the writer until it is
announced, then to whoever holds the view or anything made from it, and comes back when the last of them has
let go.

The memory has no name in any file system (memfd_create, Linux): nothing needs to be unlinked, nothing is
left behind however a process ends, and a full or tiny /dev/shm does not matter. The other process opens it
as /proc/PID/fd/N, which takes the same user on the same machine, and knows by the nonce inside that it
found what was offered. Its size is sealed and pages are reserved before they are written, so that neither a
peer nor a machine without memory can turn an access into a SIGBUS. A writer could still change what it has
announced: rings join processes of one user, which could do worse to each other.
"""

import ctypes
import fcntl
import hmac
import mmap
import os
import re
import secrets
import stat
import struct
import weakref
from collections.abc import Callable
from typing import Any, Final

SLOTS: Final = 32
SLOT_BYTES: Final = (4 << 20) + (64 << 10)  # a message of 4 MiB and the headers of what is in it
MAX_BYTES: Final = 1 << 30  # the largest ring that is made, or opened for a peer
NONCE_BYTES: Final = 16

_HEADER: Final = struct.Struct(
    "<8sIQ16s"
)  # magic, slots, bytes per slot, nonce; slots begin on the next page
_MAGIC: Final = b"zmlring1"
_PATH: Final = re.compile(r"/proc/[1-9][0-9]{0,9}/fd/[0-9]{1,7}", re.ASCII)


class NoRing(Exception):
    """These two processes cannot share memory; the socket carries everything."""


class BadSlot(ValueError):
    """A peer named a slot or a length that cannot be. Nothing was changed."""


class Ring:
    """The writer's side. Not thread-safe: one thread puts and releases."""

    def __init__(self, descriptor: int, memory: mmap.mmap, slots: int, slot_bytes: int, nonce: bytes) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self.nonce = nonce
        self.path = f"/proc/{os.getpid()}/fd/{descriptor}"
        self._descriptor = descriptor
        self._memory = memory
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._stride = _pages(slot_bytes)
        self._free = list(range(slots - 1, -1, -1))  # a stack: the slot freed last is warm and is taken first
        self._taken: set[int] = set()  # announced to the reader; together with `_free`, every slot
        self._reserved = [0] * slots  # bytes at the start of each slot that have pages

    @classmethod
    def create(cls, slots: int = SLOTS, slot_bytes: int = SLOT_BYTES) -> "Ring":
        """Make a ring, to offer to one peer by `path` and `nonce`; unused slots are free. Raises NoRing."""
        size = _size(slots, slot_bytes)
        if slots < 1 or slot_bytes < 1 or size > MAX_BYTES:
            raise ValueError(
                f"{slots} slots of {slot_bytes} bytes do not make a ring of up to {MAX_BYTES} bytes"
            )
        if not hasattr(os, "memfd_create"):
            raise NoRing("this operating system has no memfd_create")
        try:
            descriptor = os.memfd_create("zml-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise NoRing(f"no shared memory: {error}") from error
        try:
            os.fchmod(descriptor, 0o600)
            os.ftruncate(descriptor, size)
            fcntl.fcntl(
                descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            )
            os.posix_fallocate(descriptor, 0, mmap.PAGESIZE)
            memory = mmap.mmap(descriptor, size)
        except OSError as error:
            os.close(descriptor)
            raise NoRing(f"no shared memory of {size >> 20} MiB: {error}") from error
        nonce = secrets.token_bytes(NONCE_BYTES)
        _HEADER.pack_into(memory, 0, _MAGIC, slots, slot_bytes, nonce)
        return cls(descriptor, memory, slots, slot_bytes, nonce)

    @staticmethod
    def open(
        path: str, nonce: bytes, on_free: Callable[[int], None], *, max_bytes: int = MAX_BYTES
    ) -> "RingReader":
        """Map what a peer offers. Raises NoRing where it is not on this machine or not what it should be.

        `on_free(slot)` is called when the last reference to a slot's view is gone, by whichever thread drops
        it and possibly from inside the garbage collector: it must not block, take a lock or raise.
        """
        return RingReader(*_map(path, nonce, max_bytes), on_free)

    @property
    def free(self) -> int:
        """Slots that could be taken now."""
        return len(self._free)

    def put(self, buffer: bytes | bytearray | memoryview) -> int | None:
        """Copy a payload into a slot, outside the interpreter's lock. None: it has to travel over the socket.

        So it is when every slot is taken, when it is empty or too long, and when the machine has no memory.
        """
        with _Held(buffer) as source:
            length = source.len
            if not self._free or not 0 < length <= self.slot_bytes:
                return None
            slot = self._free[-1]
            if length > self._reserved[slot] and not self._reserve(slot, length):
                return None
            self._taken.add(self._free.pop())
            ctypes.memmove(self._address + mmap.PAGESIZE + slot * self._stride, source.buf, length)
            return slot

    def release(self, slot: int) -> None:
        """The reader has let go of this slot. Raises BadSlot if it did not have it."""
        if slot not in self._taken:
            raise BadSlot(f"slot {slot} was not taken")
        self._taken.remove(slot)
        self._free.append(slot)

    def close(self) -> None:
        """End the writer's side; twice is the same as once. What the reader holds stays readable."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._free.clear()
            self._taken.clear()
            self._memory.close()

    def _reserve(self, slot: int, length: int) -> bool:
        # A page that cannot be had is an error code here; in memmove it would be a SIGBUS.
        length = _pages(length)
        try:
            os.posix_fallocate(self._descriptor, mmap.PAGESIZE + slot * self._stride, length)
        except OSError:
            return False
        self._reserved[slot] = length
        return True


class RingReader:
    """The reader's side. One thread asks for views; they may be held and dropped by any."""

    def __init__(
        self, memory: mmap.mmap, slots: int, slot_bytes: int, on_free: Callable[[int], None]
    ) -> None:
        self.slots = slots
        self.slot_bytes = slot_bytes
        self._memory: mmap.mmap | None = memory
        self._stride = _pages(slot_bytes)
        self._on_free = on_free
        self._slot_type: Any = ctypes.c_ubyte * slot_bytes
        self._lent: dict[int, weakref.ref[Any]] = {}  # the slots whose views are in use

    def view(self, slot: int, length: int) -> memoryview:
        """Lend out what the writer announced; raises BadSlot if it cannot have.

        The view, its slices, and arrays made from it all keep the slot; it returns after the last.
        """
        if self._memory is None:
            raise BadSlot("the ring is closed")
        if not 0 <= slot < self.slots or not 0 < length <= self.slot_bytes:
            raise BadSlot(f"{length} bytes in slot {slot}, of {self.slots} slots of {self.slot_bytes} bytes")
        if slot in self._lent:
            raise BadSlot(f"slot {slot} was announced again before it was given back")
        # A memoryview of the mapping itself could not tell when its last slice dies. All that is made from
        # this ctypes array refers to the array, and the array to the mapping.
        exporter = self._slot_type.from_buffer(self._memory, mmap.PAGESIZE + slot * self._stride)
        lent, on_free = self._lent, self._on_free

        def gone(_: object) -> None:
            if lent.pop(slot, None) is not None:
                on_free(slot)

        lent[slot] = weakref.ref(exporter, gone)
        return memoryview(exporter).cast("B")[:length]

    def close(self) -> None:
        """End the reader's side; twice is the same as once. Views stay valid; nobody is told when they go."""
        self._lent.clear()
        memory, self._memory = self._memory, None
        if memory is not None:
            try:
                memory.close()
            except BufferError:
                pass  # views are in use: the mapping goes with the last of them


def _map(path: str, nonce: bytes, max_bytes: int) -> tuple[mmap.mmap, int, int]:
    """The mapping, its slots and their size. The path is a peer's: look before opening."""
    if not _PATH.fullmatch(path):
        raise NoRing(f"{path[:80]!r} does not name a ring")
    try:
        # O_PATH opens nothing yet: a device or a terminal behind this path does not notice.
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            _check_ownership(os.fstat(found), max_bytes)
            descriptor = os.open(f"/proc/self/fd/{found}", os.O_RDWR | os.O_CLOEXEC)
        finally:
            os.close(found)
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            if not seals & fcntl.F_SEAL_SHRINK:
                raise NoRing("its size is not sealed")
            size = os.fstat(descriptor).st_size
            slots, slot_bytes = _read_header(os.pread(descriptor, _HEADER.size, 0), nonce, size)
            return mmap.mmap(descriptor, size), slots, slot_bytes
        finally:
            os.close(descriptor)
    except OSError as error:
        raise NoRing(f"{path} cannot be mapped: {error}") from error


def _check_ownership(status: os.stat_result, max_bytes: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NoRing("it is not a file")
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != 0o600:
        raise NoRing("it belongs to somebody else, or is open to others")
    if not mmap.PAGESIZE < status.st_size <= max_bytes:
        raise NoRing(f"{status.st_size} bytes are too few or too many")


def _read_header(header: bytes, nonce: bytes, size: int) -> tuple[int, int]:
    if len(header) < _HEADER.size:
        raise NoRing("it has no header")
    magic, slots, slot_bytes, written = _HEADER.unpack(header)
    if magic != _MAGIC or not hmac.compare_digest(written, nonce):
        raise NoRing("it is not the ring that was offered")
    if slots < 1 or slot_bytes < 1 or _size(slots, slot_bytes) != size:
        raise NoRing(f"{slots} slots of {slot_bytes} bytes do not make {size} bytes")
    return slots, slot_bytes


def _pages(length: int) -> int:
    return -(-length // mmap.PAGESIZE) * mmap.PAGESIZE


def _size(slots: int, slot_bytes: int) -> int:
    return mmap.PAGESIZE + slots * _pages(slot_bytes)


class _Held(ctypes.Structure):
    """CPython's Py_buffer: the address of any contiguous buffer, writable or not, in place while held."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )

    def __init__(self, buffer: bytes | bytearray | memoryview) -> None:
        super().__init__()
        # Flags 0 is PyBUF_SIMPLE: contiguous bytes, else BufferError.
        ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(buffer), ctypes.byref(self), 0)

    def __enter__(self) -> "_Held":
        return self

    def __exit__(self, *_: object) -> None:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(self))
