"""Tracing of a process: on with its role, off with its end. Who lacks what it takes is told before anything begins."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from .. import __version__
from ..errors import NO_TRACES, ZmlError
from . import emit, into, on
from .sampling import OFF, one_in
from .steps import UNTRACED, Origin, StepTrace, Untraced

if TYPE_CHECKING:
    from ..agent.seat import Seat
    from .otlp import Otlp
    from .outlet import Outlet

FLUSH_S = 2.0  # at the end of a process
MOMENT_S = 0.5  # and where it is stopped
INSTALL = "Run pip install 'zml-train[otel]', or go without traces: --trace off."

log = structlog.get_logger()
_running: tuple[Outlet, Otlp] | None = None


def require(trace: str) -> None:
    """Raises ZmlError where traces are asked for and cannot be made."""
    if trace == OFF:
        return
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "").strip()
    if exporter not in ("", "otlp", "none"):
        raise ZmlError(
            NO_TRACES,
            f"OTEL_TRACES_EXPORTER = {exporter}: zml sends traces by OTLP only",
            "Set it to otlp, or go without traces: --trace off.",
        )
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = os.environ.get(name, "").strip()
        if protocol not in ("", "http/protobuf"):
            raise ZmlError(
                NO_TRACES,
                f"{name} = {protocol}: zml sends traces over HTTP, as http/protobuf",
                "Set it to http/protobuf, with the receiver's port for HTTP (mostly 4318), or give --trace off.",
            )
        if protocol:
            break  # the first one counts
    try:
        from . import otlp  # noqa: F401
    except ImportError as error:
        raise ZmlError(NO_TRACES, f"traces need OpenTelemetry: {error}", INSTALL) from None
    except Exception as error:  # a protobuf that does not fit, say
        what = f"OpenTelemetry cannot be loaded: {type(error).__name__}: {error}"
        raise ZmlError(NO_TRACES, what, INSTALL) from None


def begin(trace: str, role: str, member: str, job: str = "", run: str = "") -> None:
    """From now on this process sends its spans, if `trace` says so. Raises ZmlError. Ends with `end`."""
    global _running
    require(trace)
    if trace == OFF or _running is not None or disabled():
        return
    from .otlp import Otlp, batching
    from .outlet import Outlet

    attributes: dict[str, str | int] = {
        "service.name": f"zml-{role}",
        "service.instance.id": member,
        "service.version": __version__,
        "host.name": socket.gethostname(),
        "process.pid": os.getpid(),
    }
    attributes |= {name: value for name, value in (("zml.job", job), ("zml.run", run)) if value}
    try:
        send = Otlp(attributes)
    except Exception as error:  # a certificate that is not there, a compression that does not exist
        what = f"traces cannot be sent: {type(error).__name__}: {error}"
        raise ZmlError(NO_TRACES, what, "Correct the OTEL_ variables, or give --trace off.") from None
    outlet = Outlet(send, **batching())  # type: ignore[arg-type]
    _running = outlet, send
    into(outlet.emit)
    log.info("tracing", sampled=trace, service=f"zml-{role}")


def begin_script(seat: Seat) -> Untraced:
    """The same for a worker's script; what its client and its timeline tell of steps."""
    begin(seat.trace, "worker", seat.worker, seat.job, Path(seat.run).name)
    if not on():
        return UNTRACED
    alone = seat.spec.staleness is None
    origin = Origin(seat.run, seat.job, seat.worker, seat.incarnation, alone)
    return StepTrace(origin, one_in(seat.trace), emit)


def why(error: BaseException) -> str:
    """What a span says of an exception: not its text, in which the data of a hospital may stand; of our own, what
    happened."""
    return f"{error.code}: {error.what}" if isinstance(error, ZmlError) else type(error).__qualname__


def disabled() -> bool:
    """OpenTelemetry's own switches."""
    off = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return off or os.environ.get("OTEL_TRACES_EXPORTER", "").strip() == "none"


def end(within_s: float = FLUSH_S) -> None:
    """Send what waits, within this time. Twice is the same as once."""
    global _running
    running, _running = _running, None
    into(None)
    if running is None:
        return
    outlet, send = running
    whole = outlet.close(within_s)
    send.close()
    if outlet.sent or not whole:
        log.info("traced", spans=outlet.sent, dropped=outlet.dropped)
