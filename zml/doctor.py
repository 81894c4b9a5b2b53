"""`zml doctor`: is this machine fit to take part? Each check says what it found and, if need be, a fix.

It loads neither torch nor zmq: what is broken must not break the doctor.
"""

import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from . import gpu

Verdict = Literal["pass", "warn", "fail"]

PYTHON = (3, 11)
LEAST = {"torch": (2, 4), "pyzmq": (26,), "msgpack": (1, 2, 1), "uvloop": (0, 20)}
LIBZMQ = (4, 3, 5)
FILES = 4096
SHM_BYTES = 256 * 2**20
DISK_BYTES = 2 * 2**30
FSYNC_S = 0.05


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    verdict: Verdict
    found: str
    fix: str = ""


def version(text: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0)."""
    numbers = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def check_python() -> Check:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    if sys.version_info[:2] < PYTHON:
        return Check("python", "fail", found, f"Use Python {dotted(PYTHON)} or newer.")
    return Check("python", "pass", found)


def check_package(
    name: str, least: tuple[int, ...], installed: Callable[[str], str] = metadata.version
) -> Check:
    try:
        found = installed(name)
    except metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", f"pip install '{name}>={dotted(least)}'")
    if version(found) < least:
        return Check(name, "fail", found, f"pip install '{name}>={dotted(least)}'")
    return Check(name, "pass", found)


def check_libzmq() -> Check:
    """Asked in a process of its own: a broken library kills only that."""
    try:
        answer = subprocess.run(
            [sys.executable, "-P", "-c", "import zmq; print(zmq.zmq_version(), zmq.has('curve'))"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Check("libzmq", "fail", str(error), "Install pyzmq again.")
    if answer.returncode != 0:
        said = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        return Check("libzmq", "fail", said, "Install pyzmq again.")
    found, curve = answer.stdout.split()
    if version(found) < LIBZMQ:
        return Check(
            "libzmq", "fail", found, f"Install a pyzmq that brings libzmq {dotted(LIBZMQ)} or newer."
        )
    if curve != "True":
        return Check("libzmq", "warn", f"{found} without CURVE", "Install pyzmq's own wheel to use keys.")
    return Check("libzmq", "pass", found)


def check_name(installed: Callable[[str], str] = metadata.version) -> Check:
    """Another distribution is called zml, and its package is too."""
    here = Path(__file__).parent
    try:
        other = installed("zml")
    except metadata.PackageNotFoundError:
        return Check("zml", "pass", str(here))
    fix = "pip uninstall zml; pip install --force-reinstall zml-train"
    return Check("zml", "fail", f"another package called zml ({other}) is installed over this one", fix)


def check_open_files(limits: tuple[int, int] | None = None) -> Check:
    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES:
        return Check(
            "open files", "warn", str(soft), f"ulimit -n {FILES} (the hard limit is {hard}): one per peer."
        )
    return Check("open files", "pass", "unlimited" if soft == resource.RLIM_INFINITY else str(soft))


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


def check_name_resolves(resolve: Callable[[str], str] = socket.gethostbyname) -> Check:
    host = socket.gethostname()
    try:
        return Check("host name", "pass", f"{host} is {resolve(host)}")
    except OSError as error:
        fix = "Add it to /etc/hosts, or give addresses instead of names."
        return Check("host name", "warn", f"{host} does not resolve: {error.strerror or error}", fix)


def check_loopback() -> Check:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return Check("loopback", "pass", f"can listen, for example on port {server.getsockname()[1]}")
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "")
        return Check("loopback", "fail", f"cannot listen on 127.0.0.1: {error.strerror} {name}", "Allow it.")


def check_gpus(gpus: list[gpu.Gpu]) -> Check:
    if not gpus:
        return Check("GPUs", "pass", "none: workers take --cpu")
    return Check("GPUs", "pass", ", ".join(f"{g.index} {g.name} ({g.memory_mb / 1024:.0f} GB)" for g in gpus))


def examine(runs: Path) -> list[Check]:
    """All checks, in the order in which they are told."""
    return [
        check_python(),
        check_name(),
        *(check_package(name, least) for name, least in LEAST.items()),
        check_libzmq(),
        check_open_files(),
        check_shm(),
        *check_disk(runs),
        check_name_resolves(),
        check_loopback(),
        check_gpus(gpu.found()),
    ]
