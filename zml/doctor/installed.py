"""What is installed: Python, the packages that zml stands on, and whether it is this zml that a person gets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from .findings import Check

PYTHON = (3, 11)
LEAST = {"torch": (2, 4), "pyzmq": (26,), "msgpack": (1, 2, 1), "uvloop": (0, 20)}
LIBZMQ = (4, 3, 5)
TOLD = ("torch", "pyzmq", "msgpack", "msgspec", "uvloop", "numpy", "lz4")  # in which members may differ
LOAD_S = 30.0  # for libraries to load on a machine that is busy, from a disk that is slow
# Both are tried, not only imported.
LOAD = """
import zmq, uvloop
loop = uvloop.new_event_loop()
loop.run_until_complete(__import__("asyncio").sleep(0))
loop.close()
print(zmq.zmq_version(), zmq.has("curve"))
"""


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


def versions() -> dict[str, str]:
    """Of this process' own installation, by package; what is missing is left out."""
    from .. import __version__

    found = {"zml": __version__, "python": sys.version.split()[0]}
    for name in TOLD:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


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


def check_libraries(command: tuple[str, ...] = (sys.executable, "-P", "-c", LOAD)) -> Iterator[Check]:
    """Do libzmq and uvloop load and work? Asked in a process of its own: a broken library kills only that."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=LOAD_S)
    except (OSError, subprocess.SubprocessError) as error:
        yield Check("libraries", "fail", str(error), "pip install --force-reinstall pyzmq uvloop")
        return
    told = answer.stdout.split()
    if answer.returncode != 0 or len(told) != 2:
        said = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        yield Check("libraries", "fail", said, "pip install --force-reinstall pyzmq uvloop")
        return
    yield check_libzmq(*told)
    yield Check("event loop", "pass", "uvloop runs")


def check_libzmq(found: str, curve: str) -> Check:
    if version(found) < LIBZMQ:
        return Check(
            "libzmq", "fail", found, f"Install a pyzmq that brings libzmq {dotted(LIBZMQ)} or newer."
        )
    if curve != "True":
        return Check("libzmq", "warn", f"{found} without CURVE", "Install pyzmq's own wheel to use keys.")
    return Check("libzmq", "pass", found)


def check_name(
    installed: Callable[[str], str] = metadata.version,
    which: Callable[[str], str | None] = shutil.which,
    here: Path | None = None,
    prefix: str = sys.prefix,
) -> Check:
    """Another distribution is called zml, and its package is too; and a script must not be called so. `here` is the
    working folder."""
    ours = Path(__file__).parent.parent
    try:
        other = installed("zml")
    except metadata.PackageNotFoundError:
        other = ""
    if other:
        fix = "pip uninstall zml; pip install --force-reinstall zml-train"
        return Check("zml", "fail", f"another package called zml ({other}) is installed over this one", fix)
    folder = Path.cwd() if here is None else here
    for hides in (folder / "zml.py", folder / "zml" / "__init__.py"):
        if hides.exists() and not ours.samefile(hides.parent):
            what = f"{hides} hides this package from scripts beside it"
            return Check("zml", "fail", what, "Call it something else: `import zml` finds it first.")
    command = which("zml")
    if command is not None and not Path(command).is_relative_to(prefix) and not runs_us(Path(command)):
        what = f"{ours}, but the command is {command}, of another installation"
        return Check("zml", "warn", what, f"Put {prefix}/bin first on the PATH, or use `python -m zml`.")
    return Check("zml", "pass", str(ours))


def runs_us(command: Path) -> bool:
    """Does a script that lies elsewhere (a link in ~/.local/bin, a wrapper) start this very Python?"""
    try:
        with command.open("rb") as file:
            first = file.readline(1024)
    except OSError:
        return True  # it cannot be known, and is no trouble yet
    found = re.match(rb"#!\s*(\S+)", first)
    if found is None:
        return command.resolve().is_relative_to(sys.prefix)
    return os.path.realpath(os.fsdecode(found[1])) == os.path.realpath(sys.executable)
