"""One process at a time writes in a folder of the run.

Held by flock(2) on a file in it, for as long as the process lives: whatever kills it, the kernel lets go. On NFS that
works between machines from version 4 on.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

from .errors import ZmlError

NAME = "lock"
NAMED_BYTES = 200  # that say who holds it


def holder(folder: Path) -> str:
    """Who holds it; empty where nobody does."""
    try:
        file = os.open(folder / NAME, os.O_RDWR)
    except OSError:
        return ""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(file, NAMED_BYTES, 0).decode(errors="replace").strip() or "another process"
    finally:
        os.close(file)
    return ""


def hold(folder: Path, code: str, rule: str, fix: str) -> int:
    """The descriptor to close when it is over. Raises ZmlError that names who holds it, and OSError."""
    file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(file, NAMED_BYTES, 0).decode(errors="replace").strip() or "another process"
        os.close(file)
        raise ZmlError(code, f"{folder} is held by {holder}: {rule}", fix) from None
    except OSError:
        os.close(file)
        raise
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    holder = f"process {os.getpid()} on {socket.gethostname()} since {since}"
    os.pwrite(file, holder.encode()[: NAMED_BYTES - 1].ljust(NAMED_BYTES - 1) + b"\n", 0)  # over any before
    return file
