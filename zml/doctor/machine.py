"""The checks of one machine: is it fit to take part? Each check says what it found and, if need be, what to do.

Rule: checks look and leave nothing; what a check asks of others (a library, a driver) it asks in a process of its own,
with a deadline.
"""

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from . import graphics, installed, network, slurm
from .findings import Check

FILES = 4096
PROCESSES = 2048
SHM_BYTES = 256 * 2**20
DISK_BYTES = 2 * 2**30
FSYNC_S = 0.05


def check_open_files(limits: tuple[int, int] | None = None) -> Check:
    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES:
        return Check(
            "open files", "warn", str(soft), f"ulimit -n {FILES} (the hard limit is {hard}): one per peer."
        )
    return Check("open files", "pass", "unlimited" if soft == resource.RLIM_INFINITY else str(soft))


def check_processes(soft: int | None = None) -> Check:
    """Threads count as processes do, and every process of torch has dozens."""
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0] if soft is None else soft
    if soft != resource.RLIM_INFINITY and soft < PROCESSES:
        return Check("processes", "warn", str(soft), f"ulimit -u {PROCESSES}: threads count, too.")
    return Check("processes", "pass", "unlimited" if soft == resource.RLIM_INFINITY else str(soft))


def check_shm(folder: Path = Path("/dev/shm")) -> Check:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Check(
            "shared memory", "warn", f"{folder}: {error.strerror}", "Without it sockets are used: slower."
        )
    found = f"{free / 2**20:,.0f} MB free in {folder}"
    if free < SHM_BYTES:
        return Check(
            "shared memory", "warn", found, "Give the container more, e.g. docker run --shm-size=1g."
        )
    return Check("shared memory", "pass", found)


def check_disk(runs: Path) -> Iterator[Check]:
    """Of the folder in which runs are kept, or of the nearest one above that exists."""
    folder = runs.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    found = f"{free / 2**30:,.1f} GB free at {folder}"
    yield Check("disk", "pass", found) if free >= DISK_BYTES else Check("disk", "warn", found, "Make room.")
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            took = []
            for _ in range(5):
                file.write(b"x" * 4096)
                file.flush()
                start = time.perf_counter()
                os.fsync(file.fileno())
                took.append(time.perf_counter() - start)
    except OSError as error:
        yield Check(
            "fsync", "fail", f"cannot write to {folder}: {error.strerror}", "Choose another --run-dir."
        )
        return
    median_s = sorted(took)[len(took) // 2]
    found = f"{1e3 * median_s:.2f} ms"
    slow = "Put the run directory on a local disk."
    yield Check("fsync", "pass", found) if median_s < FSYNC_S else Check("fsync", "warn", found, slow)


def examine(runs: Path, environ: Mapping[str, str] = os.environ) -> list[Check]:
    """All checks, in the order in which they are told. `runs` is where runs are kept."""
    return [
        installed.check_python(),
        installed.check_name(),
        *(installed.check_package(name, least) for name, least in installed.LEAST.items()),
        *installed.check_libraries(),
        check_open_files(),
        check_processes(),
        check_shm(),
        *check_disk(runs),
        network.check_clock(),
        network.check_name_resolves(),
        network.check_loopback(),
        network.check_bind(),
        network.check_interfaces(),
        *graphics.checks(),
        slurm.check(environ),
    ]
