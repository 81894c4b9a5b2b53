"""Where log lines go: always as JSON to a file of the run directory; for people to a terminal, where one is.

A line has, in this order: `time` (RFC 3339, UTC, microseconds), `level`, `message`; the process: `run`, `job`, `role`,
`id`, `host`, `pid`; what is bound where it is written (`at_step`): `step`, `trace_id`, `span_id`; then what the message
is about. A unit is the end of its name: `push_s`, `size_bytes`. `reading` reads them back.

Lines never hold local variables of frames: in a hospital or a bank that would write rows of data to disk.
Records of the standard library's loggers (torch, zmq, the script's own) take the same way. A message that comes too
often is counted (`repeats`), files are rotated, and a full disk costs lines only (`logfile`).
"""

import atexit
import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import msgspec
import structlog

from .. import own
from ..metrics.lines import COUNTED
from ..runs.rundir import LOGS
from ..text.ansi import coloured, harmless
from .logfile import LogFile
from .repeats import Flood

ROTATE_BYTES = 64 * 2**20
KEPT = 3
LINE_BYTES = 64 * 1024  # of a line of the file; a longer one is shortened
TEXT_CHARS = 2000  # what is left of each text then
MAX_FRAMES = 20

EventDict = MutableMapping[str, Any]
Processor = Callable[[Any, str, EventDict], Any]


# -- what a line holds ------------------------------------------------------------------------------------


def at_step(step: int, trace_id: str = "", span_id: str = "") -> None:
    """Lines of this thread or task say from now on at which step they were written, and in which span of a trace."""
    if trace_id:
        structlog.contextvars.bind_contextvars(step=step, trace_id=trace_id, span_id=span_id)
    else:
        structlog.contextvars.bind_contextvars(step=step)
        structlog.contextvars.unbind_contextvars("trace_id", "span_id")


def stamp(when: float) -> str:
    """RFC 3339 in UTC, with microseconds."""
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def add_time(_logger: Any, _method: str, event: EventDict) -> EventDict:
    record = event.get("_record")  # of the standard library: made before it came here
    event["time"] = stamp(record.created if record is not None else time.time())
    return event


def add_span(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """Of OpenTelemetry, where the process has loaded it and is within a span."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is not None and "trace_id" not in event:
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            event["trace_id"] = trace.format_trace_id(context.trace_id)
            event["span_id"] = trace.format_span_id(context.span_id)
    return event


BEFORE: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    add_time,
    add_span,
]


def run_of(folder: Path) -> str:
    """The name of the run whose logs a folder holds, as people write it: "slurm-7/attempt-0" where it has no name of
    its own. Empty for a folder that is no run's."""
    folder = folder.absolute()
    if folder.parent.name == LOGS:  # of nodes that came later, in a folder of their own
        folder = folder.parent
    if folder.name != LOGS or not folder.parent.name:
        return ""
    run = folder.parent
    nameless = run.name.isdigit() or run.name.startswith("attempt-")
    return f"{run.parent.name}/{run.name}" if nameless else run.name


def about(role: str, member: str, job: str, run: str, pid: int | None = None) -> dict[str, Any]:
    """The part of a line that is the same in all of a process."""
    known = {"run": run, "job": job, "role": role, "id": member, "host": socket.gethostname()}
    return {key: value for key, value in known.items() if value} | {
        "pid": os.getpid() if pid is None else pid
    }


def as_json(constant: Mapping[str, Any]) -> list[Processor]:
    """A line of JSON that says when, how bad, what, and which process."""

    def name_the_process(_logger: Any, _method: str, event: EventDict) -> EventDict:
        first = {key: event.pop(key, "") for key in ("time", "level", "message")}
        bound = {key: event.pop(key) for key in ("step", "trace_id", "span_id") if key in event}
        own = {**constant, "job": event.pop("job")} if "job" in event else constant  # it may serve many
        about = {f"its_{key}" if key in constant else key: value for key, value in event.items()}
        return {**first, **own, **bound, **about}

    without_locals = structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=MAX_FRAMES)
    return [
        structlog.processors.ExceptionRenderer(without_locals),
        structlog.processors.EventRenamer("message"),
        name_the_process,
        lambda _logger, _method, event: encode(event).decode(),
    ]


def encode(event: Mapping[str, Any]) -> bytes:
    """One line of JSON without its end: valid for every parser (NaN is a text), bounded, whatever is in it."""
    try:
        if any(type(value) is float and not math.isfinite(value) for value in event.values()):
            event = {
                key: str(v) if type(v) is float and not math.isfinite(v) else v for key, v in event.items()
            }
        line = msgspec.json.encode(event, enc_hook=worded)
    except (TypeError, ValueError, OverflowError, RecursionError):  # lone surrogates, huge numbers, odd keys
        line = json.dumps(plain(event), allow_nan=False).encode()
    if len(line) > LINE_BYTES:
        line = json.dumps(plain(event, TEXT_CHARS, 40) | {"shortened_bytes": len(line)}).encode()
    if len(line) > LINE_BYTES:  # of very many parts
        first = {key: event[key] for key in ("time", "level", "message", "role", "id", "pid") if key in event}
        line = json.dumps(plain(first, TEXT_CHARS) | {"shortened_bytes": len(line)}).encode()
    return line


def worded(value: Any) -> str:
    try:
        return repr(value)
    except Exception:  # the value is a user's, and so is what it does
        return f"<{type(value).__name__}>"


def plain(value: Any, chars: int | None = None, most: int | None = None, depth: int = 8) -> Any:
    """As JSON can hold it: texts of at most so many characters, so many parts of each list and table."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if depth and isinstance(value, Mapping):
        inner = list(value.items())[:most]
        return {plain(str(k), 100): plain(v, chars, most, depth - 1) for k, v in inner}
    if depth and isinstance(value, list | tuple | set | frozenset):
        return [plain(v, chars, most, depth - 1) for v in list(value)[:most]]
    text = value if isinstance(value, str) else worded(value)
    text = text.encode("utf-8", errors="backslashreplace").decode()
    return text if chars is None or len(text) <= chars else text[:chars] + "…"


def notice(constant: Mapping[str, Any]) -> Callable[[int, str], bytes]:
    """The line that says how many could not be written."""

    def line(lost: int, because: str) -> bytes:
        message = f"{lost} lines before this one could not be written: {because}"
        return encode({"time": stamp(time.time()), "level": "error", "message": message, **constant}) + b"\n"

    return line


def log_file(path: Path, constant: Mapping[str, Any]) -> LogFile:
    return LogFile(path, rotate_bytes=ROTATE_BYTES, kept=KEPT, notice=notice(constant))


# -- a process of zml's own -------------------------------------------------------------------------------


class FileHandler(logging.Handler):
    def __init__(self, file: LogFile) -> None:
        super().__init__()
        self.file = file

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode("utf-8", errors="replace")
        except Exception:  # a user's argument whose repr raises, say: its text is not worth a process
            line = encode(
                {
                    "time": stamp(record.created),
                    "level": record.levelname.lower(),
                    "message": "a line that cannot be written out",
                    "logger": record.name,
                    "file": record.pathname,
                    "line": record.lineno,
                }
            )
        self.file.write(line + b"\n")

    def close(self) -> None:
        self.file.close()
        super().close()


class Sparingly(logging.Handler):
    """Hands records on to the others; of a message that comes too often only the number."""

    def __init__(self, handlers: list[logging.Handler]) -> None:
        super().__init__()
        self.handlers = handlers
        self.flood: Flood[logging.LogRecord] = Flood()

    def emit(self, record: logging.LogRecord) -> None:
        now = monotonic()
        held_by = self.flood.held_by(*message_of(record), now)
        for count, newest in self.flood.due(now):
            self.hand_on(repeated(newest, count))
        if held_by is None:
            self.hand_on(record)
        else:
            kept, key = held_by
            kept.hold(key, light(record))

    def hand_on(self, record: logging.LogRecord) -> None:
        for handler in self.handlers:
            handler.handle(record)

    def close(self) -> None:
        """`logging` calls it when the process ends."""
        self.acquire()
        try:
            for count, newest in self.flood.rest():
                self.hand_on(repeated(newest, count))
        finally:
            self.release()
        for handler in self.handlers:
            handler.close()
        super().close()


def message_of(record: logging.LogRecord) -> tuple[Hashable, Hashable]:
    """What makes two records the same message, and what makes them the very same line."""
    exception: Any = record.exc_info
    if isinstance(record.msg, dict):
        text = str(record.msg.get("event", ""))
        exception = record.msg.get("exc_info")
        about = hash(
            tuple(worded(value) for key, value in record.msg.items() if key not in ("exc_info", "time"))
        )
    else:
        words = words_of(record)
        # "%s", of `warnings` and others: the text is all in the arguments
        text = words if record.args and len(str(record.msg)) < 8 else str(record.msg)
        about = hash(words)
    if exception is True:
        exception = sys.exc_info()
    if isinstance(exception, tuple):
        exception = exception[1]
    kind = type(exception) if exception else None
    return (record.levelno, record.name, text[:200], kind), (
        about,
        worded(exception)[:200] if exception else "",
    )


def words_of(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # arguments that do not fit, or that cannot be worded
        return str(record.msg)


def light(record: logging.LogRecord) -> logging.LogRecord:
    """To be kept: without arguments and frames, which may hold anything."""
    record = logging.makeLogRecord(record.__dict__)
    if isinstance(record.msg, dict):
        record.msg = {key: value for key, value in record.msg.items() if key != "exc_info"}
    else:
        record.msg, record.args = words_of(record)[:TEXT_CHARS], None
    record.exc_info = record.exc_text = None
    return record


def repeated(record: logging.LogRecord, count: int) -> logging.LogRecord:
    if isinstance(record.msg, dict):
        record.msg |= {"event": f"repeated {count:,} times: {record.msg.get('event', '')}", "repeated": count}
    else:
        record.msg = f"repeated {count:,} times: {record.msg}"
        record.repeated = count
    return record


def configure(
    role: str,
    member: str,
    *,
    folder: str | Path,
    job: str = "",
    run: str | None = None,
    level: str = "info",
    terminal: bool | None = None,
    alone: bool = False,
) -> Path:
    """Send every log line of this process to `folder`/`member`.jsonl; returns that path. May be called again.

    On a terminal the lines also go to standard error, coloured unless NO_COLOR is set; `terminal` overrides
    the look at whether it is one. `run` is the run's name, where the folder does not say it.
    `alone`: the folder is this process's own, until it knows better (`move`).
    """
    global _alone, _folder
    folder = Path(folder)
    path = folder / f"{member}.jsonl"
    constant = about(role, member, job, run_of(folder) if run is None else run)
    shared: list[Any] = [*BEFORE, structlog.stdlib.ExtraAdder()]
    to_file = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *as_json(constant)],
    )
    handlers: list[logging.Handler] = [FileHandler(log_file(path, constant))]
    handlers[0].setFormatter(to_file)
    if sys.stderr.isatty() if terminal is None else terminal:
        console = logging.StreamHandler(sys.stderr)
        console.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=shared,
                processors=[
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    shorten_time,
                    make_harmless,
                    structlog.dev.ConsoleRenderer(
                        colors=coloured(),
                        timestamp_key="time",
                        exception_formatter=structlog.dev.plain_traceback,
                    ),
                ],
            )
        )
        handlers.append(console)

    close()
    _alone = Alone(role, member, folder, level, terminal) if alone else None
    _folder = folder.absolute()
    root = logging.getLogger()
    root.handlers = [Sparingly(handlers), COUNTED]
    root.setLevel(level.upper())
    logging.captureWarnings(False)  # whoever reset `warnings` since the last time took our hook out
    logging.captureWarnings(True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,  # it may be configured again, when the process knows its id
    )
    return path


class Alone(NamedTuple):
    """How a process was configured that was started by hand, and knew no run yet."""

    role: str
    member: str
    folder: Path
    level: str
    terminal: bool | None


_alone: Alone | None = None
_folder: Path | None = None


def folder() -> Path | None:
    """Where this process keeps its log, as an absolute path; None until it is configured, and when it is closed."""
    return _folder


def move(member: str, run_dir: str, job: str) -> None:
    """It knows who it is and of which run: its lines go where those of the others are, if this machine sees that."""
    if _alone is None:
        return
    there = Path(run_dir, LOGS)
    seen = bool(run_dir) and there.is_dir()
    if seen or member != _alone.member:
        role, _, folder, level, terminal = _alone
        configure(
            role,
            member,
            folder=there if seen else folder,
            job=job,
            level=level,
            terminal=terminal,
            alone=not seen,
        )


def silence() -> None:
    """For a command that only asks a question: its answer is all that it prints, but for errors."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))


def shorten_time(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """On a terminal the day is known: 12:34:56.789."""
    time = event.get("time")
    if isinstance(time, str):
        event["time"] = time[11:23]
    return event


def close() -> None:
    """Close the files of the former configuration."""
    global _folder
    _folder = None
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()


# -- a script's process -----------------------------------------------------------------------------------


def configure_script(
    worker: str,
    *,
    folder: str | Path,
    job: str = "",
    level: str = "info",
    step: Callable[[], int] = lambda: -1,
) -> Path:
    """In a script's process: only zml's own lines go to `folder`/`worker`.script.jsonl; returns that path.

    The script's logging is the script's: the standard library's loggers are not touched, and if it uses structlog
    as it comes, its lines look as they would without zml. What it prints goes to its agent. `step` tells how far it is.
    """
    path = Path(folder) / f"{worker}.script.jsonl"
    constant = about("script", worker, job, run_of(Path(folder)))
    file = log_file(path, constant)
    numbers = logging.getLevelNamesMapping()
    least = numbers[level.upper()]
    chain = [*BEFORE, add_step(step), *as_json(constant)]
    flood: Flood[bytes] = Flood()
    one_at_a_time = threading.RLock()  # the script's threads and ours

    def write(event: EventDict, method: str) -> None:
        message = (method, str(event.get("event", ""))[:200])
        about = hash(tuple(worded(value) for key, value in event.items() if key != "exc_info"))
        line: Any = event
        for processor in chain:
            line = processor(None, method, line)
        with one_at_a_time:
            now = monotonic()
            held_by = flood.held_by(message, about, now)
            for count, newest in flood.due(now):
                file.write(counted(newest, count))
            if held_by is None:
                file.write(line.encode() + b"\n")
            else:
                kept, key = held_by
                kept.hold(key, line.encode())

    def keep_ours(_logger: Any, method: str, event: EventDict) -> EventDict:
        if not str(event.pop("pathname", "")).startswith(own.FOLDERS):
            return event
        if numbers.get(method.upper(), logging.ERROR) >= least:
            with suppress(Exception):  # a line of ours is never worth the user's script
                write(event, method)
        raise structlog.DropEvent

    def flush() -> None:
        for count, newest in flood.rest():
            file.write(counted(newest, count))

    atexit.register(flush)
    where = structlog.processors.CallsiteParameterAdder([structlog.processors.CallsiteParameter.PATHNAME])
    structlog.configure(processors=[where, keep_ours, *structlog.get_config()["processors"]])
    return path


def make_harmless(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """What peers and scripts call themselves must not move the cursor of a terminal, nor pass for a line of its own."""
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable() and key != "exception":
            event[key] = harmless(value).replace("\n", "\n    ")
    return event


def add_step(step: Callable[[], int]) -> Processor:
    def add(_logger: Any, _method: str, event: EventDict) -> EventDict:
        if "step" not in event and (now := step()) >= 0:
            event["step"] = now
        return event

    return add


def counted(line: bytes, count: int) -> bytes:
    event = msgspec.json.decode(line)
    return (
        encode(event | {"message": f"repeated {count:,} times: {event['message']}", "repeated": count})
        + b"\n"
    )
