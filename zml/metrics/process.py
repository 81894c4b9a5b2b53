"""What this process takes from its machine, read where Linux says it. Each call costs a few system calls."""

from __future__ import annotations

import os
import time
from pathlib import Path

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


def started_at() -> float:
    """Seconds since the Unix epoch."""
    try:
        # Behind the program's name, which may have spaces and parentheses in it.
        stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        since_boot_s = int(stat[19]) / TICKS
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot_s)
    except (OSError, IndexError, ValueError):
        return time.time()
