"""The child of an agent: `python -m zml.agent.runner script.py args...` runs a script as plain python would.

Rule: the script cannot tell. It is `__main__`, its folder comes first on the path, its arguments are its own,
and how it ends is how this process ends. What is added: lines leave at once, and an exception is told to the
agent, as a `messages.Failure` in the file that ZML_FAILURE names, without any local variable.
"""

from __future__ import annotations

import builtins
import faulthandler
import linecache
import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType

import msgspec

from .. import own, stack
from ..errors import NO_SCRIPT, ZmlError
from ..launch import tether
from ..logs import outlets as logs
from ..messages import Failure
from ..runs import rundir
from .seat import Seat

FAILURE_FILE = "ZML_FAILURE"
# A failure travels in a header of 4 KB: each text has a share of it, in bytes.
TEXT_BYTES = 1200
LINE_BYTES = 160
PATH_BYTES = 400
AROUND = 2  # source lines before and after the one that failed

# The runtime of a script that has joined puts its clock here.
current_step: Callable[[], int] = lambda: -1  # noqa: E731
# And here what it is computing, in words.
in_hand: Callable[[], str] = lambda: ""  # noqa: E731
# And here what it does where the script fails.
failed: Callable[[BaseException], None] = lambda error: None  # noqa: E731


def command(script: str, args: Sequence[str]) -> list[str]:
    """How an agent starts a script. -P keeps modules of the working folder from shadowing ours meanwhile."""
    return [sys.executable, "-P", "-m", "zml.agent.runner", script, *args]


def main(argv: Sequence[str]) -> int:
    """Run argv[0] with the rest as its arguments; returns the exit code or raises the script's SystemExit."""
    if not argv:
        print("usage: python -m zml.agent.runner script.py [args]", file=sys.stderr)
        return 2
    script = argv[0]
    try:
        path = os.path.join(os.getcwd(), script)  # `__file__` is absolute, sys.argv[0] as it was given
        loader = Uncached("__main__", path)
        module = as_main(path, loader)
        loader.get_data(path)
    except OSError as error:
        missing = ZmlError(NO_SCRIPT, f"there is no script {script}: {error.strerror}", "Check the path.")
        print(f"error: {missing.what}", file=sys.stderr)
        tell(Failure(kind=NO_SCRIPT, text=str(missing), at=time.time()))
        return missing.exit_code
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(line_buffering=True)
    if not faulthandler.is_enabled():
        faulthandler.enable()  # a crash in native code says in which line of the script

    keep_our_logs_apart()
    sys.argv = list(argv)
    folder = str(Path(script).resolve().parent)
    if sys.flags.safe_path:
        if not os.environ.get("PYTHONSAFEPATH"):
            sys.path.insert(0, folder)
    else:
        sys.path[0] = folder  # it was the working folder, because of -m
    sys.modules["__main__"] = module
    try:
        loader.exec_module(module)
    except KeyboardInterrupt:
        return 130
    except SystemExit:
        raise
    except BaseException as error:
        error.__traceback__ = without_launcher(error.__traceback__)
        tell(describe(error, folder))
        with suppress(Exception):  # as above: it is the script that failed
            failed(error)
        if isinstance(error, ZmlError):
            end_at_user(error.__traceback__, folder)
        sys.excepthook(type(error), error, error.__traceback__)  # the script may have set its own
        return 1
    finally:
        sys.stdout.flush()
    return 0


def keep_our_logs_apart() -> None:
    """A worker's script prints what it prints and nothing of ours: that goes to a log of the run."""
    seat = Seat.from_environment()
    if seat is not None and seat.run_dir:
        level = os.environ.get("ZML_LOG_LEVEL", "info")
        folder = Path(seat.run_dir) / rundir.LOGS
        # Looked up at each line: the runtime replaces it when the script joins.
        logs.configure_script(
            seat.worker, folder=folder, job=seat.job, level=level, step=lambda: current_step()
        )
        stack.answer_signal(folder, seat.worker)


class Uncached(SourceFileLoader):
    """Reads source and leaves no bytecode behind: python keeps none for a script either."""

    def path_stats(self, path: object) -> Mapping[str, object]:
        raise OSError("no bytecode for a script")


def as_main(script: str, loader: Uncached) -> ModuleType:
    module = ModuleType("__main__")
    module.__file__ = script
    module.__loader__ = loader
    module.__spec__ = None
    vars(module).update(__builtins__=builtins, __cached__=None, __annotations__={})
    return module


def without_launcher(trace: TracebackType | None) -> TracebackType | None:
    """The frames from the script's own first one on; None where it has none, as for a syntax error."""
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file != __file__ and not file.startswith("<frozen importlib"):
            return trace
        trace = trace.tb_next
    return None


def end_at_user(trace: TracebackType | None, folder: str) -> None:
    """Drop the frames below the script's innermost one: an error of ours says what is wrong, not where we saw it."""
    inside = None
    while trace is not None:
        if os.path.realpath(trace.tb_frame.f_code.co_filename).startswith(folder + os.sep):
            inside = trace
        trace = trace.tb_next
    if inside is not None:
        inside.tb_next = None


def describe(error: BaseException, folder: str) -> Failure:
    """What a person needs to know of an exception. The frame is the innermost of the user's own code."""
    file, line = "", 0
    if isinstance(error, SyntaxError) and error.filename:
        file, line = error.filename, error.lineno or 0
    else:
        found = user_frame(error.__traceback__, folder)
        if found is not None:
            file, line = found
    first = max(1, line - AROUND)
    source = [linecache.getline(file, number) for number in range(first, line + AROUND + 1)] if line else []
    while source and not source[-1]:
        source.pop()  # the file ended
    try:
        step, batch = current_step(), in_hand()
    except Exception:  # it is the script that failed; that the clock cannot be read adds nothing
        step, batch = -1, ""
    text = (
        "".join(traceback.format_exception_only(error)[-1:])
        if isinstance(error, SyntaxError)
        else said(error)
    )
    return Failure(
        kind=type(error).__qualname__,
        text=cut(text.removeprefix(f"{type(error).__qualname__}: ").strip(), TEXT_BYTES),
        file=cut(file, PATH_BYTES),
        line=line,
        source=[cut(text.rstrip(), LINE_BYTES) for text in source],
        first_source_line=first if source else 0,
        step=step,
        batch=cut(batch, PATH_BYTES),
        at=time.time(),
    )


def said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # the exception's own __str__ is broken; python prints the same words
        return "<exception str() failed>"


def user_frame(trace: TracebackType | None, folder: str) -> tuple[str, int] | None:
    """File and line of the innermost frame in the script's folder, else of the innermost one outside zml."""
    installed = {sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")}
    inner: tuple[str, int] | None = None
    inside: tuple[str, int] | None = None
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        path = os.path.realpath(name)
        ours = path.startswith(own.FOLDERS)
        foreign = ours or any(path.startswith(root + os.sep) for root in installed)
        if not ours:
            inner = (name, trace.tb_lineno)
        if path.startswith(folder + os.sep) and not foreign and "site-packages" not in path:
            inside = (name, trace.tb_lineno)
        trace = trace.tb_next
    return inside or inner


def cut(text: str, limit_bytes: int) -> str:
    """The beginning of a text, in at most so many bytes of UTF-8."""
    raw = text.encode("utf-8", errors="replace")
    if len(raw) <= limit_bytes:
        return raw.decode("utf-8")
    return raw[: limit_bytes - 3].decode("utf-8", errors="ignore") + "…"


def tell(failure: Failure) -> None:
    """Leave the failure where the agent looks for it, whole or not at all."""
    path = os.environ.get(FAILURE_FILE)
    if not path:
        return
    scratch = f"{path}.{os.getpid()}"
    try:
        Path(scratch).write_bytes(msgspec.json.encode(failure))
        os.replace(scratch, path)
    except OSError as error:  # the traceback on stderr still tells
        print(f"zml: cannot write {path}: {error.strerror}", file=sys.stderr)


if __name__ == "__main__":
    tether.hold()
    # The runtime finds `zml.agent.runner` by name to set its clock: be that module and not a second copy of it.
    from zml.agent.runner import main as run

    sys.exit(run(sys.argv[1:]))
