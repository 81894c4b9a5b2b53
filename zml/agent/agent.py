"""`zml worker`: the agent. It joins, starts the user's script in a child process, captures what that prints line by
line, and keeps the lease while the child computes.

Rules: the agent never imports torch and never computes, so that no training step can starve its heartbeats; and the
child never outlives it. A worker that is told to go (SIGTERM, SIGUSR1, Ctrl-C) leaves in order: nothing that its script
has made is lost, and nobody waits for its lease. A script that a signal has killed, and a worker that was fenced while
this machine was frozen, come back as the next incarnation, so many times within an hour.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
from msgspec import Struct

from ..doctor.answering import Examinee
from ..errors import EX_TEMPFAIL, FENCED, INTERRUPTED, LOST, NO_SCRIPT, ZmlError
from ..figures import WorkerFigures, after
from ..launch import tether
from ..lease import Lease, ask, join
from ..link import LISTENER, WORKER, bulk_endpoint, control_endpoint
from ..logs import outlets as logs
from ..logs.printed import Printed
from ..messages import Examine, Exited, Failure, Fenced, Launch, Ok, Pulse, Stop
from ..metrics.endpoint import opened
from ..metrics.roles import WorkerSource
from ..transport import Endpoint, Refusal, Refused, TransportError
from . import runner
from .child import Child
from .restarts import Restarts
from .seat import Seat

if TYPE_CHECKING:
    from ..config import Settings

SIGNALS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: EX_TEMPFAIL, signal.SIGUSR1: EX_TEMPFAIL}
STOP_S = 5.0  # for a script that is stopped, and is no more asked to leave

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Again:
    """This incarnation is over, and the next one is to follow."""

    because: str


class Agent:
    """One worker's place on this machine. States of a life: joining, idle, running the script, leaving, over."""

    def __init__(self, settings: Settings, name: str, device: str, script: str, args: list[str]) -> None:
        self.settings = settings
        self.name = name
        self.incarnation = 0  # of the newest life
        self.device = device
        self.script = script
        self.args = args
        self.metrics = ""  # where this process is scraped
        self.former = WorkerFigures()  # of scripts that have ended
        self.scripts = 0  # that were started
        self.restarts = Restarts(settings.worker_restarts)
        self.lease: Lease | None = None  # of the life that goes on
        self.keeping: asyncio.Task[ZmlError] | None = None
        self.child: Child | None = None
        self.running: asyncio.Task[None] | None = None
        self.leaving = ""  # why the script was asked to leave
        self.stopping = ""  # why this life ends, once it does
        self.code = EX_TEMPFAIL  # what the agent ends with when its worker has left
        self.ending: asyncio.Task[None] | None = None
        self.out_of_time: asyncio.TimerHandle | None = None
        self.over: asyncio.Future[int | Again] | None = None
        self.endpoint = control_endpoint(settings, f"agent-{socket.gethostname()}-{os.getpid()}", self.handle)
        self.examinee = Examinee(self.endpoint, self._dial, device=device, script=self._script_pid)

    async def run(self) -> int:
        """Join and serve until the job is over, or no further incarnation is to follow; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number, code in SIGNALS.items():
            loop.add_signal_handler(number, self.leave, number.name, code)
        await self.endpoint.start()
        try:
            while isinstance(end := await self._live(), Again):
                if self.leaving:  # told so between two lives
                    return self.code
                log.warning(
                    "joining again", member=self.name, because=end.because, restarts=str(self.restarts)
                )
            return end
        finally:
            await self.endpoint.close()

    async def _live(self) -> int | Again:
        """One incarnation, from its join to its end."""
        self.over = asyncio.get_running_loop().create_future()
        joining = asyncio.ensure_future(
            join(
                self.endpoint,
                self.settings,
                "worker",
                self.name,
                device=self.device,
                former=self.incarnation,
                metrics=self.metrics,
            )
        )
        try:
            either: list[asyncio.Future[Any]] = [joining, self.over]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not joining.done():
                return await self.over
            self.lease = joining.result()
            self.name, self.incarnation = self.lease.joined.member, self.lease.joined.incarnation
            self.stopping = ""
            self.keeping = asyncio.ensure_future(self.lease.keep())
            self.keeping.add_done_callback(
                lambda task: None if task.cancelled() else self._finish(task.result())
            )
            return await self.over
        finally:
            joining.cancel()
            if self.keeping is not None:
                self.keeping.cancel()
            if self.out_of_time is not None:
                self.out_of_time.cancel()
            self.stopping = self.stopping or "over"
            if self.child is not None:
                await self.child.end(grace_s=0.0)
            if self.running is not None:
                await asyncio.wait([self.running], timeout=5)
            self.former = self.figures
            self.lease = self.keeping = self.child = self.running = None

    @property
    def figures(self) -> WorkerFigures:
        """What all of its scripts have counted together."""
        return after(self.former, self.child.figures if self.child is not None else None)

    # -- the coordinator's orders ---------------------------------------------------------------------

    def handle(self, peer: str, message: Struct, payload: memoryview | None) -> Any:
        match message:
            case Pulse():
                if self.lease is not None:
                    self.lease.heard(message)
                return None
            case Launch():
                if self.lease is None or message.incarnation != self.lease.joined.incarnation:
                    raise Refusal("early", f"this agent is not {message.member}#{message.incarnation} yet")
                if self.running is None and not self.stopping:
                    self.running = asyncio.ensure_future(self._run(self.lease, message))
                return Ok()
            case Stop():
                self._stop(message.because, message.grace_s, 0)
                return Ok()
            case Examine():
                if self.lease is None:
                    raise Refusal("early", f"this agent is not {message.member} yet")
                return self.examinee.answer(message, str(self._run_dir(self.lease)))
            case Fenced():
                if self.lease is not None and self.lease.is_mine(message) and not self.stopping:
                    self._fenced(f"{message.member}#{message.incarnation} was fenced: {message.because}")
                return None
        raise Refusal("unexpected", f"an agent does not take {type(message).__name__}")

    def _dial(self, name: str) -> Endpoint:
        """A connection to shards as the script has one."""
        return bulk_endpoint(self.settings, name, _say_no, keys=(WORKER, LISTENER), listens=False)

    def _script_pid(self) -> int:
        process = self.child.process if self.child is not None else None
        return process.pid if process is not None and process.returncode is None else 0

    def _fenced(self, because: str) -> None:
        """This machine was frozen or cut off for longer than the lease: its batches are others' by now."""
        if self.leaving:
            self._finish(self.code)
        elif self.restarts.take(time.monotonic()):
            self._finish(Again(because))
        else:
            self._finish(ZmlError(FENCED, because))

    # -- going -----------------------------------------------------------------------------------------

    def leave(self, name: str, code: int) -> None:
        """A signal to the agent itself: the script leaves in order. Once more: it is stopped. Again: at once."""
        if self.lease is None or (self.stopping and self.leaving):
            self.leaving, self.code = name, code
            self._finish(code)
        elif self.leaving or self.stopping:
            self._stop(f"{name}, again", STOP_S, self.code)
            self.leaving = self.leaving or name
        else:
            self.leaving, self.code = f"{name} on its machine", code
            if self.child is None:
                self._stop(self.leaving, 0.0, code)
                return
            log.info("asking the script to leave", member=self.name, because=self.leaving)
            self.child.line.ask(self.leaving)
            self._allow(self.settings.drain_s)

    def _allow(self, seconds: float) -> None:
        """For the script to come to its end."""
        because = f"{self.leaving}, and not gone after {seconds:g} s"
        self.out_of_time = asyncio.get_running_loop().call_later(
            seconds, self._stop, because, STOP_S, self.code
        )

    def _left(self) -> None:
        """The script says: nothing of this worker is in flight. What it does from now on is its own affair."""
        if self.stopping:
            return
        if self.out_of_time is None:  # a signal to the script itself
            self.leaving = "a signal to its script"
            self._allow(self.settings.drain_s)
        self.stopping = self.leaving
        assert self.lease is not None and self.keeping is not None, "only a member's script can leave"
        self.keeping.cancel()
        self.ending = asyncio.ensure_future(self._say_goodbye(self.lease))

    async def _say_goodbye(self, lease: Lease) -> None:
        await lease.leave(self.stopping)
        if self.running is not None:
            await asyncio.wait([self.running])
        self._finish(self.code)

    def _stop(self, because: str, grace_s: float, code: int) -> None:
        if self.stopping and self.ending is not None and self.child is not None:
            log.warning("stopping the script", member=self.name, because=because)
            self.ending = asyncio.ensure_future(self.child.end(grace_s))  # it has said goodbye already
        elif not self.stopping:
            self.stopping = because
            self.ending = asyncio.ensure_future(self._end(grace_s, code))

    async def _end(self, grace_s: float, code: int) -> None:
        if self.child is not None:
            await self.child.end(grace_s)
        if self.running is not None:
            await asyncio.wait([self.running], timeout=5)
        if self.lease is not None:
            await self.lease.leave(self.stopping)
        self._finish(code)

    def _finish(self, result: int | Again | ZmlError) -> None:
        if self.over is None or self.over.done():
            return
        if isinstance(result, ZmlError):
            self.over.set_exception(result)
        else:
            self.over.set_result(result)

    # -- the script ------------------------------------------------------------------------------------

    async def _run(self, lease: Lease, order: Launch) -> None:
        """Run the script to its end; what keeps this machine from that is told as any failure of it would be."""
        script = self.script or lease.spec.script
        args = self.args if self.script else lease.spec.args
        folder = None if self.script else (lease.spec.folder or None)
        here = socket.gethostname()
        if not script or not Path(folder or ".", script).is_file():
            text = f"{Path(folder or '.', script)} is not a file on {here}"
            log.error("no script", path=script, folder=folder)
            await self._report(order, 2, Failure(kind=NO_SCRIPT, text=text, at=time.time()))
            return
        self.child = child = Child(self._left)
        self.scripts += 1
        try:
            failure_file = self._log_path(lease, "failure.json")
            failure_file.unlink(missing_ok=True)
            environment = self._environment(lease, failure_file)
            out = self._log_path(lease, "out")
            printed = Printed(
                out, logs.about("script", lease.joined.member, lease.joined.job, logs.run_of(out.parent))
            )
            code = await child.run(runner.command(script, args), folder, environment, printed)
        except OSError as error:
            log.error("cannot run the script", because=str(error))
            await child.end(grace_s=0.0)
            text = f"{here} cannot run it: {error}"
            await self._report(order, 1, Failure(kind=type(error).__name__, text=text, at=time.time()))
            return
        failure = failure_of(code, failure_file, child.tail[-1] if child.tail else "", out)
        may_return = code < 0 or (code > 0 and self.settings.restart_on_error)
        await self._report(order, code, failure, may_return=may_return and not self.leaving)

    def _environment(self, lease: Lease, failure_file: Path) -> dict[str, str]:
        joined = lease.joined
        seat = Seat(
            job=joined.job,
            worker=joined.member,
            incarnation=joined.incarnation,
            coordinator=list(self.settings.coordinator),
            keys=str(self.settings.keys or ""),
            run_dir=str(self._run_dir(lease)),
            bucket_chunks=self.settings.bucket_chunks,
            patience_s=self.settings.patience_s,
            run=joined.run_dir,
            heartbeat_s=joined.heartbeat_s,
            trace=self.settings.trace,
            spec=msgspec.structs.replace(lease.spec, args=[]),  # which may be too long for a variable
        )
        environment = {**os.environ, **seat.to_environment(), **tether.environment()}
        environment |= {runner.FAILURE_FILE: str(failure_file), "PYTHONUNBUFFERED": "1"}
        if self.device.startswith("cuda:"):
            environment["CUDA_VISIBLE_DEVICES"] = self.device.removeprefix("cuda:")
            environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # count as nvidia-smi does
        elif self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        return environment

    async def _report(
        self, order: Launch, code: int, failure: Failure | None, *, may_return: bool = False
    ) -> None:
        """Tell the coordinator how the script ended, unless it was to end. `code` is minus n after signal n."""
        if self.stopping:
            log.info("script ended", member=order.member, code=code, because=self.stopping)
            return
        returns = may_return and self.restarts.take(time.monotonic())
        log.info("script ended", member=order.member, code=code, starts_again=returns)
        self.stopping = "its script ended"
        message = Exited(
            job=order.job,
            member=order.member,
            incarnation=order.incarnation,
            code=max(code, 0),
            signal=max(-code, 0),
            failure=failure,
            returns=returns,
            begun=self.child.begun if self.child is not None else None,
        )
        try:
            await ask(self.endpoint, message, within_s=self.settings.coordinator_away_s)
        except Refused as refused:
            self._fenced(f"{order.member}#{order.incarnation}: {refused.because}")
        except TransportError as error:
            self._finish(ZmlError(LOST, f"{order.member}: could not report the script's end: {error}"))
        else:
            how = failure.kind if failure is not None else f"exit code {code}"
            ends_with = 128 - code if code < 0 else code
            self._finish(Again(f"its script ended: {how}") if returns else ends_with)

    def _run_dir(self, lease: Lease) -> Path:
        wanted = Path(self.settings.run_dir or lease.joined.run_dir)
        return wanted if wanted.is_dir() else Path.cwd()

    def _log_path(self, lease: Lease, suffix: str) -> Path:
        folder = self._run_dir(lease) / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{lease.joined.member}.{suffix}"


def failure_of(code: int, told: Path, last: str, out: Path) -> Failure | None:
    """Why a script ended: as it has told itself, else by how it ended and its last line."""
    if code == 0:
        return None
    try:
        return msgspec.structs.replace(msgspec.json.decode(told.read_bytes(), type=Failure), log=str(out))
    except (FileNotFoundError, msgspec.DecodeError):
        pass  # it could not say why: killed, or ended by sys.exit
    kind = _signal_name(-code) if code < 0 else f"exit code {code}"
    return Failure(kind=kind, text=runner.cut(last, runner.TEXT_BYTES), log=str(out), at=time.time())


def _say_no(peer: str, message: Struct, payload: memoryview | None) -> None:
    raise Refusal("unexpected", "nobody asks here")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def serve(settings: Settings, name: str, device: str, script: str, args: list[str]) -> int:
    """Run an agent until its job is over. Raises ZmlError for a person to read."""
    import uvloop

    return uvloop.run(_serve(settings, name, device, script, args))


async def _serve(settings: Settings, name: str, device: str, script: str, args: list[str]) -> int:
    with_http = opened(settings, reached_from=settings.coordinator)
    try:
        agent = Agent(settings, name, device, script, args)
        agent.metrics = with_http.url
        with_http.serve(WorkerSource(agent, with_http.lag))
        return await agent.run()
    finally:
        await with_http.close()
