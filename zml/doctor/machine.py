"""The checks of one machine: is it fit to take part? Each check says what it found and, if need be, what to do.

Rule: checks look and leave nothing; what a check asks of others (a library, a driver) it asks in a process of its own,
with a deadline; and each has one of its own, for a file system or a resolver that hangs.
"""

import os
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from . import graphics, installed, network, slurm
from .findings import Check

FILES = 4096
PROCESSES = 2048
SHM_BYTES = 256 * 2**20
DISK_BYTES = 2 * 2**30
FSYNC_S = 0.05
LOOK_S = 60.0  # for one check; importing torch in a process of its own takes the longest

Look = Callable[[], Check | Iterable[Check]]


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
    looks: list[tuple[str, Look]] = [
        ("python", installed.check_python),
        ("name", installed.check_name),
        *((name, partial(installed.check_package, name, least)) for name, least in installed.LEAST.items()),
        ("libraries", installed.check_libraries),
        ("open files", check_open_files),
        ("processes", check_processes),
        ("shared memory", check_shm),
        ("disk", partial(check_disk, runs)),
        ("clock", network.check_clock),
        ("host name", network.check_name_resolves),
        ("loopback", network.check_loopback),
        ("bind", network.check_bind),
        ("interfaces", network.check_interfaces),
        ("gpu", graphics.checks),
        ("slurm", partial(slurm.check, environ)),
    ]
    return [check for name, look in looks for check in looked(name, look)]


def looked(name: str, look: Look, within_s: float = LOOK_S) -> list[Check]:
    """What a check has found; also where what it looks at hangs (a file system, a resolver) or breaks the check."""
    found: list[Check] = []
    broken: list[str] = []

    def run() -> None:
        try:
            checks = look()
            found.extend([checks] if isinstance(checks, Check) else checks)
        except Exception as error:  # the doctor says so, and goes on with the others
            broken.append(f"the check itself failed: {type(error).__name__}: {error}")

    thread = threading.Thread(target=run, name=f"zml-doctor-{name}", daemon=True)
    thread.start()
    thread.join(within_s)
    if thread.is_alive():
        return [Check(name, "fail", f"no answer within {within_s:g} s", "Look whether what it asks hangs.")]
    if broken:
        found.append(Check(name, "fail", broken[0], "Look at what it names."))
    return found
