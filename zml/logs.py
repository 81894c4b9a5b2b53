"""Where log lines go: always as JSON to a file of the run directory; for people to a terminal, where one is.

Lines never hold local variables of frames: in a hospital or a bank that would write rows of data to disk.
Records of the standard library's loggers (torch, the script's own) take the same way.
The module is not called `log`: importing it would replace the function `zml.log`.
"""

import logging
import logging.handlers
import os
import socket
import sys
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import structlog

from .metrics.lines import COUNTED

ROTATE_BYTES = 64 * 2**20
KEPT = 3
MAX_FRAMES = 20

EventDict = MutableMapping[str, Any]
Processor = Callable[[Any, str, EventDict], Any]

BEFORE: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%S.%fZ", utc=True, key="time"),
]


def as_json(role: str, member: str, job: str) -> list[Processor]:
    """A line of JSON that says when, how bad, what, and which process."""
    constant = {"job": job, "role": role, "id": member, "host": socket.gethostname(), "pid": os.getpid()}

    def name_the_process(_logger: Any, _method: str, event: EventDict) -> EventDict:
        first = {key: event.pop(key, "") for key in ("time", "level", "message")}
        return {**first, **constant, **event}

    without_locals = structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=MAX_FRAMES)
    return [
        structlog.processors.ExceptionRenderer(without_locals),
        structlog.processors.EventRenamer("message"),
        name_the_process,
        structlog.processors.JSONRenderer(),
    ]


def configure(
    role: str,
    member: str,
    *,
    folder: str | Path,
    job: str = "",
    level: str = "info",
    terminal: bool | None = None,
) -> Path:
    """Send every log line of this process to `folder`/`member`.jsonl; returns that path. May be called again.

    On a terminal the lines also go to standard error, coloured unless NO_COLOR is set; `terminal` overrides
    the look at whether it is one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{member}.jsonl"
    shared: list[Any] = [*BEFORE, structlog.stdlib.ExtraAdder()]
    to_file = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            *as_json(role, member, job),
        ],
    )
    handlers: list[logging.Handler] = [
        logging.handlers.RotatingFileHandler(path, maxBytes=ROTATE_BYTES, backupCount=KEPT, encoding="utf-8")
    ]
    handlers[0].setFormatter(to_file)
    if sys.stderr.isatty() if terminal is None else terminal:
        console = logging.StreamHandler(sys.stderr)
        console.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=shared,
                processors=[
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    shorten_time,
                    structlog.dev.ConsoleRenderer(
                        colors=not os.environ.get("NO_COLOR"),
                        timestamp_key="time",
                        exception_formatter=structlog.dev.plain_traceback,
                    ),
                ],
            )
        )
        handlers.append(console)

    close()
    root = logging.getLogger()
    root.handlers = [*handlers, COUNTED]
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


def silence() -> None:
    """For a command that only asks a question: its answer is all that it prints, but for errors."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))


def configure_script(worker: str, *, folder: str | Path, job: str = "", level: str = "info") -> Path:
    """In a script's process: only zml's own lines go to `folder`/`worker`.script.jsonl; returns that path.

    The script's logging is the script's: the standard library's loggers are not touched, and if it uses structlog
    as it comes, its lines look as they would without zml.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{worker}.script.jsonl"
    file = path.open("a", buffering=1, encoding="utf-8")
    here = Path(__file__).parent
    ours = tuple(
        str(part) + os.sep for part in (here, (here / "transport").resolve(), (here / "scheduler").resolve())
    )
    numbers = logging.getLevelNamesMapping()
    least = numbers[level.upper()]
    chain = [*BEFORE, *as_json("script", worker, job)]

    def keep_ours(logger: Any, method: str, event: EventDict) -> EventDict:
        if not str(event.pop("pathname", "")).startswith(ours):
            return event
        if numbers.get(method.upper(), logging.ERROR) >= least:
            line: Any = event
            for processor in chain:
                line = processor(logger, method, line)
            file.write(line + "\n")
        raise structlog.DropEvent

    where = structlog.processors.CallsiteParameterAdder([structlog.processors.CallsiteParameter.PATHNAME])
    structlog.configure(processors=[where, keep_ours, *structlog.get_config()["processors"]])
    return path


def shorten_time(_logger: Any, _method: str, event: EventDict) -> EventDict:
    """On a terminal the day is known: 12:34:56.789."""
    time = event.get("time")
    if isinstance(time, str):
        event["time"] = time[11:23]
    return event


def close() -> None:
    """Close the files of the former configuration."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
