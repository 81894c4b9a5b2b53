"""What this process takes from its machine, read where Linux says it, and what all roles show of themselves.

Each look costs a few system calls, and is taken only when somebody asks.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

from .. import __version__
from ..logs import outlets as logs
from ..transport.peers import TRAFFIC
from . import catalog as c
from .lag import Lag
from .lines import COUNTED
from .points import Classes, Point

PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")


def resident_bytes() -> int:
    """Memory that is in RAM; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * PAGE
    except (OSError, IndexError, ValueError):
        return 0


def cpu_seconds() -> float:
    """Of all threads, in user code and in the system."""
    return time.process_time()


def open_files() -> int:
    """Files and sockets; 0 where the system does not say."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0


def disk() -> tuple[int, int]:
    """Bytes that are free where this process keeps its log, and with it its files, and bytes that there are; zeros
    where the system does not say."""
    try:
        there = os.statvfs(logs.folder() or ".")
    except OSError:
        return 0, 0
    return there.f_bavail * there.f_frsize, there.f_blocks * there.f_frsize


def started_at() -> float:
    """Seconds since the Unix epoch."""
    try:
        # Behind the program's name, which may have spaces and parentheses in it.
        stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        since_boot_s = int(stat[19]) / TICKS
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot_s)
    except (OSError, IndexError, ValueError):
        return time.time()


@cache
def versions() -> tuple[str, str, str]:
    """Of zml, python and torch, which this process may never load."""
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = ""
    return __version__, platform.python_version(), torch


STARTED_AT = started_at()


def of_process(
    lag: Lag, resident: int | None = None, cpu_s: float | None = None, files: int | None = None
) -> Iterator[Point]:
    """What every role shows. `resident`, `cpu_s` and `files`: where those of another process say more."""
    yield Point(c.BUILD, versions(), 1)
    yield Point(c.UPTIME, (), STARTED_AT)
    yield Point(c.MEMORY, (), resident_bytes() if resident is None else resident)
    yield Point(c.CPU, (), cpu_seconds() if cpu_s is None else cpu_s)
    yield Point(c.FILES, (), open_files() if files is None else files)
    free, there = disk()
    if there:
        yield Point(c.DISK_FREE, (), free)
        yield Point(c.DISK, (), there)
    yield Point(c.LAG, (), Classes(lag.counts, lag.sum_s))
    for level, lines in COUNTED.counts.items():
        yield Point(c.LINES, (level,), lines)
    for kind, traffic in TRAFFIC.items():
        yield Point(c.NET_SENT, (kind,), traffic.sent_bytes)
        yield Point(c.NET_RECEIVED, (kind,), traffic.received_bytes)
