"""`zml worker`: the agent. It joins, starts the user's script in a child process, captures what that prints line by
line, and keeps the lease while the child computes.

Rule: the agent never imports torch and never computes, so that no training step can starve its heartbeats; and the
child never outlives it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog
from msgspec import Struct

from . import runner
from .errors import FENCED, LOST, NO_SCRIPT, ZmlError
from .launch import tether
from .lease import Lease, ask, join
from .link import control_endpoint
from .messages import Exited, Failure, Fenced, Launch, Message, Ok, Pulse, Stop
from .seat import Seat
from .transport import Refusal, TransportError

if TYPE_CHECKING:
    from .config import Settings

INTERRUPTED = 130
OUTPUT_S = 2.0  # for what a script has printed to arrive, once it has ended
LAST_WORDS = 20  # lines of the script's output that a report may quote

log = structlog.get_logger()


class Agent:
    """One worker's place on this machine. States: joining, idle, running the script, over."""

    def __init__(self, settings: Settings, name: str, device: str, script: str, args: list[str]) -> None:
        self.settings = settings
        self.name = name
        self.device = device
        self.script = script
        self.args = args
        self.lease: Lease | None = None
        self.child: asyncio.subprocess.Process | None = None
        self.running: asyncio.Task[None] | None = None
        self.stopping = ""  # why, once it is so
        self.ending: asyncio.Task[None] | None = None
        self.over: asyncio.Future[int] | None = None
        self.endpoint = control_endpoint(settings, f"agent-{socket.gethostname()}-{os.getpid()}", self.handle)

    async def run(self) -> int:
        """Join and serve until the job or this incarnation is over; returns the exit code."""
        loop = asyncio.get_running_loop()
        self.over = loop.create_future()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.leave, signal.Signals(number).name)
        await self.endpoint.start()
        keeping: asyncio.Task[ZmlError] | None = None
        try:
            self.lease = await join(self.endpoint, self.settings, "worker", self.name, device=self.device)
            keeping = asyncio.ensure_future(self.lease.keep())
            keeping.add_done_callback(lambda task: None if task.cancelled() else self._finish(task.result()))
            return await self.over
        finally:
            if keeping is not None:
                keeping.cancel()
            await self._end_child(grace_s=0.0)
            if self.running is not None:
                await asyncio.wait([self.running], timeout=5)
            await self.endpoint.close()

    # -- the coordinator's orders ---------------------------------------------------------------------

    def handle(self, peer: str, message: Struct, payload: memoryview | None) -> Message | None:
        match message:
            case Pulse():
                if self.lease is not None:
                    self.lease.heard()
                return None
            case Launch():
                if self.lease is None:
                    raise Refusal("early", "this agent has not joined yet")
                if self.running is None:
                    self.running = asyncio.ensure_future(self._run(message))
                return Ok()
            case Stop():
                self._stop(message.because, message.grace_s, 0)
                return Ok()
            case Fenced():
                if self.lease is not None and self.lease.is_mine(message) and not self.stopping:
                    who = f"{message.member}#{message.incarnation}"
                    self._finish(ZmlError(FENCED, f"{who} was fenced: {message.because}"))
                return None
        raise Refusal("unexpected", f"an agent does not take {type(message).__name__}")

    def leave(self, name: str) -> None:
        """Ctrl-C or SIGTERM on the agent itself: end the script, say goodbye. Twice: at once."""
        if self.stopping or self.lease is None:
            self._finish(INTERRUPTED)
        else:
            self._stop(f"{name} on its machine", 5.0, INTERRUPTED)

    def _stop(self, because: str, grace_s: float, code: int) -> None:
        if not self.stopping:
            self.stopping = because
            self.ending = asyncio.ensure_future(self._end(grace_s, code))

    async def _end(self, grace_s: float, code: int) -> None:
        await self._end_child(grace_s)
        if self.running is not None:
            await asyncio.wait([self.running], timeout=5)
        if self.lease is not None:
            await self.lease.leave(self.stopping)
        self._finish(code)

    def _finish(self, result: int | ZmlError) -> None:
        if self.over is None or self.over.done():
            return
        if isinstance(result, ZmlError):
            self.over.set_exception(result)
        else:
            self.over.set_result(result)

    # -- the script ------------------------------------------------------------------------------------

    async def _run(self, order: Launch) -> None:
        """Run the script; what keeps this machine from that is told as any failure of it would be."""
        try:
            await self._run_script(order)
        except OSError as error:
            log.error("cannot run the script", because=str(error))
            await self._end_child(grace_s=0.0)
            text = f"{socket.gethostname()} cannot run it: {error}"
            await self._report(
                order, code=1, failure=Failure(kind=type(error).__name__, text=text, at=time.time())
            )

    async def _run_script(self, order: Launch) -> None:
        """Run the script to its end and tell the coordinator how it ended."""
        assert self.lease is not None, "only a member is told to launch"
        spec = self.lease.spec
        script = self.script or spec.script
        args = self.args if self.script else spec.args
        folder = None if self.script else (spec.folder or None)
        failure_file = self._log_path(order.member, "failure.json")
        if not script or not Path(folder or ".", script).is_file():
            text = f"{Path(folder or '.', script)} is not a file on {socket.gethostname()}"
            log.error("no script", path=script, folder=folder)
            await self._report(order, code=2, failure=Failure(kind=NO_SCRIPT, text=text, at=time.time()))
            return
        failure_file.unlink(missing_ok=True)
        self.child = await asyncio.create_subprocess_exec(
            *runner.command(script, args),
            cwd=folder,
            env=self._environment(order, failure_file),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=1 << 20,
            start_new_session=True,
        )
        tail: deque[str] = deque(maxlen=LAST_WORDS)
        path = self._log_path(order.member, "out")
        copying = asyncio.ensure_future(self._copy_output(self.child, path, tail))
        code = await self.child.wait()
        # Processes that the script has started may hold its output open, and must not outlive it.
        await asyncio.wait([copying], timeout=OUTPUT_S)
        _kill_group(self.child.pid)
        copying.cancel()
        failure = self._failure(order, code, failure_file, tail)
        await self._report(order, code=max(code, 0), killed_by=max(-code, 0), failure=failure)

    def _environment(self, order: Launch, failure_file: Path) -> dict[str, str]:
        assert self.lease is not None, "only a member is told to launch"
        seat = Seat(
            job=order.job,
            worker=order.member,
            incarnation=order.incarnation,
            coordinator=list(self.settings.coordinator),
            keys=str(self.settings.keys or ""),
            run_dir=str(self._run_dir()),
            bucket_chunks=self.settings.bucket_chunks,
            patience_s=self.settings.patience_s,
            spec=msgspec.structs.replace(self.lease.spec, args=[]),  # which may be too long for a variable
        )
        environment = {**os.environ, **seat.to_environment(), **tether.environment()}
        environment |= {runner.FAILURE_FILE: str(failure_file), "PYTHONUNBUFFERED": "1"}
        if self.device.startswith("cuda:"):
            environment["CUDA_VISIBLE_DEVICES"] = self.device.removeprefix("cuda:")
            environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # count as nvidia-smi does
        elif self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        return environment

    async def _copy_output(self, child: asyncio.subprocess.Process, path: Path, tail: deque[str]) -> None:
        """Line by line to our own stdout, to the log, and the last lines into `tail`."""
        assert child.stdout is not None
        with path.open("a", buffering=1, errors="replace") as file:
            while True:
                try:
                    raw = await child.stdout.readline()
                except ValueError:  # a line beyond the limit: its rest follows as further lines
                    continue
                if not raw:
                    return
                # A progress bar rewrites its line with \r: keep what it shows in the end.
                line = raw.decode(errors="replace").rstrip("\r\n").rsplit("\r", 1)[-1]
                tail.append(line)
                with suppress(OSError):  # a full disk, a closed terminal: the script goes on
                    file.write(line + "\n")
                    print(line, flush=True)

    def _failure(self, order: Launch, code: int, path: Path, tail: Sequence[str]) -> Failure | None:
        if code == 0 or self.stopping:
            return None
        log_path = str(self._log_path(order.member, "out"))
        try:
            told = msgspec.json.decode(path.read_bytes(), type=Failure)
            return msgspec.structs.replace(told, log=log_path)
        except (FileNotFoundError, msgspec.DecodeError):
            pass  # it could not say why: killed, or ended by sys.exit
        kind = _signal_name(-code) if code < 0 else f"exit code {code}"
        last = runner.cut(tail[-1], runner.TEXT_BYTES) if tail else ""
        return Failure(kind=kind, text=last, log=log_path, at=time.time())

    async def _report(
        self, order: Launch, *, code: int, killed_by: int = 0, failure: Failure | None = None
    ) -> None:
        if self.stopping:
            log.info("script stopped", member=order.member, because=self.stopping)
            return
        log.info("script ended", member=order.member, code=code, signal=killed_by)
        self.stopping = "its script ended"
        message = Exited(
            job=order.job,
            member=order.member,
            incarnation=order.incarnation,
            code=code,
            signal=killed_by,
            failure=failure,
        )
        try:
            await ask(self.endpoint, message, within_s=self.settings.coordinator_away_s)
            self._finish(128 + killed_by if killed_by else code)
        except TransportError as error:
            self._finish(ZmlError(LOST, f"{order.member}: could not report the script's end: {error}"))

    async def _end_child(self, grace_s: float) -> None:
        """SIGTERM to the script and all it started, then SIGKILL after the grace."""
        child = self.child
        if child is None or child.returncode is not None:
            return
        for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(child.pid, number)
            except ProcessLookupError:
                return
            try:
                async with asyncio.timeout(wait_s):
                    await child.wait()
                return
            except TimeoutError:
                continue

    def _run_dir(self) -> Path:
        assert self.lease is not None
        wanted = Path(self.settings.run_dir or self.lease.joined.run_dir)
        return wanted if wanted.is_dir() else Path.cwd()

    def _log_path(self, member: str, suffix: str) -> Path:
        folder = self._run_dir() / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{member}.{suffix}"


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # nobody is left


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def serve(settings: Settings, name: str, device: str, script: str, args: list[str]) -> int:
    """Run an agent until its job is over. Raises ZmlError for a person to read."""
    import uvloop

    return uvloop.run(Agent(settings, name, device, script, args).run())
