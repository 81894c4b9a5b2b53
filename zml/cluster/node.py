"""`zml node`: a machine offers its resources, and starts workers and shards of jobs when it is told to.

Rules: nothing that it starts outlives it, the kernel sees to that; what was killed is started again here, a few times
(`launch.revival`), before the coordinator is told that it is gone; while the coordinator is away everything goes on. A
node that is told to go (SIGTERM, SIGUSR1, Ctrl-C) lets what it runs leave in order first.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import socket
from asyncio.subprocess import Process
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
from msgspec import Struct

from ..address import any_port
from ..config import ANY_PORT, Settings, resolve
from ..errors import EX_TEMPFAIL, INTERRUPTED, LOST, NO_SCRIPT, UNREACHABLE, USAGE, ZmlError
from ..launch.child import hold_to, how_ended, spawn
from ..launch.local import PROGRAM, environment
from ..launch.revival import Revivals
from ..lease import COORDINATOR, RETRY_S, ask
from ..link import control_endpoint
from ..logs.printed import Printed
from ..messages import Message, Ok
from ..metrics.endpoint import http_hosts
from ..runs import rundir
from ..transport import Refusal, Refused, TransportError
from .away import Away
from .jobs import why_not_named
from .sending import FAILED_S, LAST_S, Sender, copy
from .wire import (
    Ceased,
    Goodbye,
    Have,
    LetGo,
    NodeBeat,
    NodePulse,
    Offer,
    Offered,
    Quit,
    Run,
    Runs,
    Strange,
    Vocabulary,
    Want,
    Work,
)

if TYPE_CHECKING:
    from ..scheduler.cluster.resources import Resources

SIGNALS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: EX_TEMPFAIL, signal.SIGUSR1: EX_TEMPFAIL}
TELL_S = 600.0  # that a process has ended is told for so long
SAY_S = 10.0  # of silence, before it is said
FORMER_S = 10.0  # until a former self of this node is missed; one that is well then is another process
HEARD = 3  # heartbeats; a coordinator that is silent for longer is away
KILLED_S = 5.0
PIECE_S = 30.0
CODE = "code"

log = structlog.get_logger()


@dataclass(slots=True)
class Place:
    """A process of an attempt here, through all times that it is started again."""

    job: str
    slot: str
    work: Work
    gpu: int | None
    revivals: Revivals
    run_dir: Path = field(default_factory=Path)  # of its attempt, once it is known which this node has
    task: asyncio.Task[None] | None = None
    process: Process | None = None
    quitting: bool = False  # it was told to end: it is not started again
    killed: bool = False  # at once

    @property
    def memory_mb(self) -> int:
        """What it may have. None for a worker with a GPU: its driver maps far more than it uses."""
        if self.slot[0] == "p":
            return self.work.shard_memory_mb
        return self.work.memory_mb if self.gpu is None else 0

    @property
    def key(self) -> tuple[str, str]:
        return self.job, self.slot


class NodeAgent:
    """One machine of a cluster."""

    def __init__(
        self,
        settings: Settings,
        name: str,
        offers: Resources,
        *,
        rack: str = "",
        cost_per_hour: float = 0.0,
        address: str = "127.0.0.1",
    ) -> None:
        self.settings = settings
        self.name = name
        self.offers = offers
        self.rack = rack
        self.cost_per_hour = cost_per_hour
        self.address = address  # where shards listen
        self.boot = secrets.token_hex(8)
        self.places: dict[tuple[str, str], Place] = {}
        self.telling: set[asyncio.Task[None]] = set()
        self.ended: set[tuple[str, str]] = set()  # of which the coordinator is still to be told
        self.heartbeat_s = 1.0
        self.heard_at = 0.0
        self.silent = False
        self.offering: asyncio.Task[None] | None = None
        self.leaving = ""
        self.code = EX_TEMPFAIL
        self.empty = asyncio.Event()
        self.over: asyncio.Future[int] | None = None
        shared = settings.shared_folder == "auto"
        self.away = Away(Path(settings.runs), name, shared=shared)
        here = f"node-{name}-{os.getpid()}"
        self.endpoint = control_endpoint(settings, here, self.handle, vocabulary=Vocabulary)
        self.sender = Sender(name, self.endpoint, self._is_heard)

    async def run(self) -> int:
        """Offer, and serve until it is told to go. Raises ZmlError where no coordinator takes the offer."""
        loop = asyncio.get_running_loop()
        self.over = loop.create_future()
        for number, code in SIGNALS.items():
            loop.add_signal_handler(number, self.leave, number.name, code)
        await self.endpoint.start()
        beside: list[asyncio.Task[None]] = []
        try:
            first: asyncio.Future[Any] = asyncio.ensure_future(self._first_offer())
            await asyncio.wait({first, self.over}, return_when=asyncio.FIRST_COMPLETED)
            if self.over.done():  # it was told to go before anybody took it
                first.cancel()
                await asyncio.wait({first})
                return self.over.result()
            first.result()
            beside += [asyncio.ensure_future(self._beat()), asyncio.ensure_future(self.sender.run())]
            return await self.over
        finally:
            await self._end_all(beside)
            await self.endpoint.close()
            self.away.close()

    # -- the coordinator ---------------------------------------------------------------------------------

    async def _offer_until(self, end: float) -> None:
        """A former self of this node may still count as alive for a moment."""
        loop = asyncio.get_running_loop()
        said = False
        while True:
            try:
                return await self._offer(max(end - loop.time(), RETRY_S))
            except Refused as refused:
                if refused.code != "early" or loop.time() + RETRY_S >= end:
                    raise
                if not said:
                    log.warning(
                        "waits for its former self to be missed", node=self.name, because=refused.because
                    )
                    said, end = True, min(end, loop.time() + FORMER_S)
            await asyncio.sleep(10 * RETRY_S)

    async def _first_offer(self) -> None:
        loop = asyncio.get_running_loop()
        where = ", ".join(self.settings.coordinator)
        try:
            await self.endpoint.connect(
                COORDINATOR, self.settings.coordinator, timeout_s=self.settings.join_timeout_s
            )
            await self._offer_until(loop.time() + self.settings.join_timeout_s)
        except Refused as refused:
            what = f"the coordinator at {where} refused node {self.name}: {refused.because}"
            fix = "Give this one another --name." if refused.code == "early" else ""
            raise ZmlError(UNREACHABLE, what, fix) from None
        except TransportError as error:
            raise ZmlError(
                UNREACHABLE,
                f"no coordinator of many jobs answers at {where} ({error})",
                "Start `zml coordinator --cluster FOLDER`, or give its address with --coordinator.",
            ) from None
        log.info("offered", node=self.name, offers=str(self.offers), coordinator=where)

    async def _offer(self, within_s: float) -> None:
        offer = Offer(
            node=self.name,
            boot=self.boot,
            cpus=self.offers.cpus,
            gpus=self.offers.gpus,
            memory_mb=self.offers.memory_mb,
            rack=self.rack,
            cost_per_hour=self.cost_per_hour,
            machine=socket.gethostname(),
            hosts=tuple(http_hosts(self.settings)),
        )
        runs = msgspec.json.encode(Runs([*self.places]))
        answer = await self.endpoint.request(COORDINATOR, offer, runs, timeout_s=within_s)
        assert isinstance(answer.message, Offered), answer.message
        self.heartbeat_s = answer.message.heartbeat_s
        self._heard()

    async def _offer_again(self) -> None:
        try:
            await self._offer(self.settings.join_timeout_s)
            if self.leaving:
                self._say_goodbye()
        except TransportError as error:
            log.warning("offer not taken", node=self.name, because=str(error))

    def _heard(self) -> None:
        self.heard_at, self.silent = asyncio.get_running_loop().time(), False

    def _is_heard(self) -> bool:
        return asyncio.get_running_loop().time() - self.heard_at < HEARD * self.heartbeat_s

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self.endpoint.notify(COORDINATOR, NodeBeat(self.name, self.boot))
            if loop.time() - self.heard_at > SAY_S and not self.silent:
                self.silent = True
                log.warning("waiting for the coordinator", node=self.name)
            if loop.time() - self.heard_at > self.settings.coordinator_away_s:
                what = f"the coordinator has been silent for {self.settings.coordinator_away_s:g} s"
                self._finish(ZmlError(LOST, f"node {self.name}: {what}"))
                return
            await asyncio.sleep(self.heartbeat_s)

    def handle(self, peer: str, message: Struct, payload: memoryview | None) -> Message | None:
        match message:
            case NodePulse():
                self._heard()
                return None
            case Strange():
                if self.offering is None or self.offering.done():
                    self.offering = asyncio.ensure_future(self._offer_again())
                return None
            case Run():
                return self._run(message, bytes(payload or b""))
            case LetGo():
                if not self.leaving:
                    self.leave(f"the coordinator ({message.because})", 0)
                return Ok()
            case Quit():
                key = (message.job, message.slot)
                if (place := self.places.get(key)) is not None:
                    self._quit(place, at_once=message.at_once, because=message.because)
                elif key not in self.ended:  # the coordinator waits to hear that it is gone
                    self._cease(*key, "is not here")
                return Ok()
        raise Refusal("unexpected", f"a node does not take {type(message).__name__}")

    # -- processes -----------------------------------------------------------------------------------------

    def _run(self, message: Run, payload: bytes) -> Message:
        if (message.job, message.slot) in self.places:
            return Ok()
        if (message.job, message.slot) in self.ended:
            raise Refusal("early", "it has not been answered yet that the former one has ended")
        if self.leaving:
            raise Refusal("leaving", f"node {self.name} leaves: {self.leaving}")
        try:
            work = msgspec.json.decode(payload, type=Work)
            settings = resolve(work.settings, {}, os.devnull).settings
        except (msgspec.MsgspecError, ZmlError) as bad:
            raise Refusal("work", f"node {self.name} cannot read what it is to do: {bad}") from None
        gpu = self._free_gpu() if work.gpus and message.slot[0] == "w" else None
        place = Place(message.job, message.slot, work, gpu, Revivals(settings))
        self.places[place.key] = place
        place.task = asyncio.ensure_future(self._keep(place, settings))
        return Ok()

    def _free_gpu(self) -> int:
        taken = {place.gpu for place in self.places.values()}
        free = [gpu for gpu in range(self.offers.gpus) if gpu not in taken]
        if not free:
            raise Refusal("gpu", f"node {self.name} has no free GPU")
        return free[0]

    def _quit(self, place: Place, *, at_once: bool, because: str) -> None:
        log.info("ending", job=place.job, slot=place.slot, at_once=at_once, because=because)
        again, place.quitting = place.quitting, True
        place.killed = place.killed or at_once
        if place.process is None or place.process.returncode is not None:
            return
        if at_once:
            place.process.kill()
        elif not again:  # a second signal would stop it
            place.process.terminate()

    async def _keep(self, place: Place, settings: Settings) -> None:
        """Run the process, again where it was killed; then tell that it is gone."""
        because, done = "it could not be started", False
        try:
            await self._settle(place)
            folder = await self._folder(place)
            command = self._command(place, settings)
            told = self._environment(place, settings)
            while not place.quitting:
                last: list[str] = []
                loop = asyncio.get_running_loop()
                begun = loop.time()
                place.process, gone = await spawn([*PROGRAM, *command], told, folder)
                hold_to(place.process.pid, place.memory_mb)
                if place.quitting:  # it was told so while it was being started
                    place.process.send_signal(signal.SIGKILL if place.killed else signal.SIGTERM)
                copying = asyncio.ensure_future(self._copy(place, place.process, last))
                await gone.wait()
                await asyncio.wait([copying], timeout=KILLED_S)
                code = place.process.returncode
                assert code is not None, "it has ended"
                because, done = how_ended(code) + (f": {last[-1]}" if last and code else ""), code == 0
                again = place.revivals.decide(place.slot, code, last, loop.time() - begun)
                if again is None or place.quitting:
                    break
                log.warning("starting again", job=place.job, slot=place.slot, because=because)
                await asyncio.sleep(again.after_s)
        except (OSError, ZmlError) as error:
            because = f"cannot be started: {error}"
        except Exception as error:  # a mistake of ours is this process's end, and not this node's
            log.exception("cannot keep", job=place.job, slot=place.slot)
            because = f"cannot be kept: {type(error).__name__}: {error}"
        await self.sender.finish(*place.key, LAST_S if done else FAILED_S)
        log.info("gone", job=place.job, slot=place.slot, because=because)
        del self.places[place.key]
        self._cease(place.job, place.slot, because, done)
        await self._tidy(place)
        if not self.places:
            self.empty.set()

    def _cease(self, job: str, slot: str, because: str, done: bool = False) -> None:
        self.ended.add((job, slot))
        self._tell(Ceased(self.name, job, slot, f"its process {because}", done))

    async def _tidy(self, ended: Place) -> None:
        """What was unpacked here alone for an attempt goes with the last process of it, what it wrote a day later."""
        if all(place.job != ended.job for place in self.places.values()):
            folder = Path(self.settings.runs).absolute() / CODE / ended.job
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            if self._is_away(ended) and ended.run_dir != Path():
                await asyncio.to_thread(self.away.touch, ended.run_dir)
        await asyncio.to_thread(self.away.tidy, {place.run_dir for place in self.places.values()})

    async def _settle(self, place: Place) -> None:
        """Where its attempt's files lie, and who brings what it writes to the coordinator."""
        work, away = place.work, self.away
        place.run_dir = await asyncio.to_thread(away.run_dir, place.job, work.run_dir, work.mark)
        if self._is_away(place):
            await self.sender.follow(*place.key, place.run_dir / rundir.LOGS)

    def _is_away(self, place: Place) -> bool:
        return place.run_dir != Path(place.work.run_dir)

    def _command(self, place: Place, settings: Settings) -> list[str]:
        work = place.work
        at = [part for address in work.coordinator for part in ("--coordinator", address)]
        there = ["--run-dir", str(place.run_dir)]
        if self.settings.keys:
            there += ["--keys", self.settings.keys]
        if place.slot[0] == "p":
            bind = ANY_PORT if self.address == "127.0.0.1" else f"tcp://{self.address}:0"
            return ["ps", "--shard", place.slot[1:], *at, "--bind", bind, *there]
        on = ["--cpu"] if place.gpu is None else ["--gpu", str(place.gpu)]
        script = ["--", work.script, *work.args] if work.archive else []
        return ["worker", *on, "--name", place.slot, *at, *there, *script]

    def _environment(self, place: Place, settings: Settings) -> dict[str, str]:
        threads = place.work.cpus if place.slot[0] == "w" else 1
        told = environment({**os.environ, **place.work.environment}, settings, threads)
        tokens = self.settings.http_tokens and os.path.abspath(self.settings.http_tokens)  # of this folder
        told |= {"ZML_HTTP": any_port(self.settings.http), "ZML_HTTP_TOKENS": tokens}
        told |= {"ZML_ATTEMPT": place.job, "ZML_JOB": place.job, "ZML_COORDINATOR": "", "ZML_KEYS": ""}
        if self._is_away(place):
            told["ZML_SHARED_FOLDER"] = "no"
        return told

    async def _folder(self, place: Place) -> str | None:
        """Where to run it: as asked for, or where its archive is unpacked, for this attempt alone: what its script
        writes lies there."""
        work = place.work
        if not work.archive:
            if Path(work.folder).is_dir():
                return work.folder
            if place.slot[0] == "w" and not Path(work.script).is_absolute():
                fix = "Put the code there, or send it along with --archive."
                raise ZmlError(NO_SCRIPT, f"node {self.name} does not see the folder {work.folder}", fix)
            return None
        from .archive import unpack

        here = Path(self.settings.runs).absolute()
        near = place.run_dir.is_dir() and not self._is_away(place)
        into = place.run_dir / CODE if near else here / CODE / place.job
        at = Path(work.archive_at)
        if not at.is_file():
            at = await self._fetch(work.archive, here / "archives")
        return str(await asyncio.to_thread(unpack, at, work.archive, into))

    async def _fetch(self, sha256: str, into: Path) -> Path:
        """This node does not see the coordinator's folder: piece by piece. What arrives is verified by `unpack`."""
        into.mkdir(parents=True, exist_ok=True)
        path = into / f"{sha256}.tar.gz"
        scratch = into / f".{sha256}.{secrets.token_hex(4)}"
        try:
            with scratch.open("wb") as file:
                while True:
                    answer = await self.endpoint.request(
                        COORDINATOR, Want(sha256, file.tell()), timeout_s=PIECE_S
                    )
                    assert isinstance(answer.message, Have), answer.message
                    file.write(answer.payload or b"")
                    if file.tell() >= answer.message.bytes or not answer.payload:
                        break
            os.replace(scratch, path)
        except TransportError as error:
            raise OSError(f"the archive {sha256[:12]} does not come: {error}") from None
        finally:
            scratch.unlink(missing_ok=True)
        return path

    def _copy(self, place: Place, process: Process, last: list[str]) -> Coroutine[Any, Any, None]:
        logs = place.run_dir / rundir.LOGS
        printed = Printed.of_member(logs, place.slot, place.job, process.pid)
        return copy(process, printed, last, both=place.slot[0] == "p")

    def _tell(self, message: Ceased | Goodbye) -> None:
        task = asyncio.ensure_future(self._tell_until(message))
        self.telling.add(task)
        task.add_done_callback(self.telling.discard)
        if isinstance(message, Ceased):
            key = (message.job, message.slot)
            task.add_done_callback(lambda task: self.ended.discard(key))

    async def _tell_until(self, message: Ceased | Goodbye) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + TELL_S
        while loop.time() < until:
            try:
                await ask(self.endpoint, message, within_s=TELL_S)
                return
            except Refused as refused:
                if refused.code != "strange":
                    return
            except TransportError:
                pass
            await asyncio.sleep(RETRY_S)

    # -- going -----------------------------------------------------------------------------------------------

    def leave(self, name: str, code: int) -> None:
        """The first signal lets everything leave in order; the second ends it."""
        if self.leaving:
            self._finish(self.code)
            return
        self.leaving, self.code = name, code
        log.info("leaving", node=self.name, because=name, processes=len(self.places))
        self._say_goodbye()
        asyncio.ensure_future(self._go_when_empty()).add_done_callback(lambda task: None)

    def _say_goodbye(self) -> None:
        self._tell(Goodbye(self.name, self.boot, False, f"{self.leaving} at the node"))

    async def _go_when_empty(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self.settings.drain_s
        while self.places and loop.time() < until:
            self.empty.clear()
            try:
                async with asyncio.timeout_at(until):
                    await self.empty.wait()
            except TimeoutError:
                break
        self._finish(self.code)

    def _finish(self, result: int | ZmlError) -> None:
        if self.over is None or self.over.done():
            return
        if isinstance(result, ZmlError):
            self.over.set_exception(result)
        else:
            self.over.set_result(result)

    async def _end_all(self, beside: list[asyncio.Task[None]]) -> None:
        """Nothing is left behind; the coordinator is told, if it can be."""
        self.sender.hurried = True
        for place in self.places.values():
            self._quit(place, at_once=True, because="its node ends")
        keeping = [place.task for place in self.places.values() if place.task is not None]
        if keeping:
            await asyncio.wait(keeping, timeout=KILLED_S + LAST_S)
        for task in (*self.telling, *beside):  # a heartbeat behind the goodbye would be a stranger's
            task.cancel()
        try:
            goodbye = Goodbye(self.name, self.boot, True, f"{self.leaving or 'an error'} at the node")
            await self.endpoint.request(COORDINATOR, goodbye, timeout_s=2.0)
        except TransportError:
            pass  # it finds out


def serve(
    settings: Settings, name: str, offers: Resources, *, rack: str, cost_per_hour: float, address: str
) -> int:
    """Be a node until told to go; returns the exit code. Raises ZmlError."""

    name = name or socket.gethostname()
    if because := why_not_named(name):
        raise ZmlError(USAGE, because, "Give it another --name.")

    async def main() -> int:
        agent = NodeAgent(
            settings,
            name,
            offers,
            rack=rack,
            cost_per_hour=cost_per_hour,
            address=address,
        )
        return await agent.run()

    return asyncio.run(main())  # not uvloop, which gives no process a group of its own
