"""`zml run`: a coordinator, shards and workers as processes of this machine, watched and shown until they end.

Rules: nothing that it starts outlives it, however it ends; what has ended is told to the coordinator at once, and what
died before its end is started again, a few times (`revival`); every wait has a deadline that names who; a first Ctrl-C
drains, a second kills; the exit code is the job's.
"""

import asyncio
import io
import os
import shutil
import signal
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import msgspec
from rich.console import Console

from ..address import any_port
from ..compiled import NOTICE
from ..compression import parse
from ..config import ANY_PORT, Resolved, Settings, as_environment
from ..errors import HELD, INTERRUPTED, LOST, NOT_FORMED, ZmlError
from ..hold import hold
from ..logs import outlets as logs
from ..logs.printed import Printed
from ..metrics.endpoint import guarded, must_be_free
from ..runs import resume, rundir
from ..status import JobStatus, encode
from ..text import console, report
from . import tether
from .child import Child, how_ended, lines_of, spawn
from .revival import Revivals

START_S = 60.0  # for the coordinator to listen
GOODBYE_S = 10.0  # for members to end after the job
COMPILE_S = 240.0  # for the codec's kernels, on a slow and busy machine
KILLED_S = 5.0  # for the kernel to end what was killed
ASK_S = 12.0  # to connect and to be answered
DRAIN_ASK_S = 20.0  # for a coordinator that is being started again, too
SILENT_S = 60.0  # a coordinator that is alive and answers nobody for so long will not any more
LOOK_EVERY_S = 0.5
TELL_AGAIN_S = 0.1
LAST_LINES = 5
# -P: modules of the working folder do not shadow ours.
PROGRAM = (sys.executable, "-P", "-m", "zml")
SOCKET_PATH_BYTES = 90  # a Unix socket's path has 107, and we put a name behind the folder


class Observer(Protocol):
    """How the coordinator is asked; `zml.observe` is one. Everything raises ZmlError if it does not answer."""

    async def connect(self, settings: Settings) -> Any: ...

    async def status(self, endpoint: Any) -> JobStatus: ...

    async def drain(self, endpoint: Any, because: str) -> None: ...

    async def ended(self, endpoint: Any, job: str, member: str, pid: int, because: str) -> None: ...

    async def hang_up(self, endpoint: Any, *, dead: bool) -> None: ...


class Stopped(Exception):
    """A signal ended the run before the job had begun."""


class LocalRun:
    """One `zml run`. `devices` has one entry per worker; `cut_off`: the run in this folder, whose processes are gone,
    goes on."""

    def __init__(
        self,
        resolved: Resolved,
        folder: Path,
        script: str,
        args: Sequence[str],
        devices: Sequence[str],
        viewer: console.Viewer,
        observer: Observer,
        program: Sequence[str] = PROGRAM,
        *,
        cut_off: bool = False,
    ) -> None:
        self.settings = resolved.settings
        self.cut_off = cut_off
        self.folder = folder
        self.script = script
        self.args = list(args)
        self.devices = devices
        self.viewer = viewer
        self.program = program
        self.observer = observer
        self.children: dict[str, Child] = {}
        self.revivals = Revivals(resolved.settings)
        self.reviving: set[asyncio.Task[None]] = set()
        self.minding: set[asyncio.Task[None]] = set()
        self.begun = False  # the cluster has formed: from now on scripts have something to lose
        self.scraped = ""  # where the coordinator answers HTTP, once that was said
        self.interrupts = 0
        self.interrupted_by = 0  # the first signal's number
        self.draining: asyncio.Task[None] | None = None
        self.killed = ""  # why, once it is so
        self.wake = asyncio.Event()
        self.link: Any = None  # our connection to the coordinator, once there is one
        self.connecting = asyncio.Lock()
        self.hanging_up: set[asyncio.Task[None]] = set()

    async def run(self) -> JobStatus | None:
        """Start everything, watch it to its end; returns how the job ended, None if it was stopped before.

        Raises ZmlError if the cluster did not form or the coordinator was lost. No process is left in any case.
        """
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self.interrupt, number)
        sockets = private_folder()
        try:
            await self._start(sockets)
            await self._watch()
            await self._goodbye()
        except Stopped:
            pass  # why is in `killed`, and was said
        finally:
            for task in (*self.reviving, *self.minding, *filter(None, [self.draining])):
                task.cancel()
            if self.reviving or self.minding:
                await asyncio.wait(self.reviving | self.minding)  # or they might start something yet
            await self._hang_up()
            if self.hanging_up:
                await asyncio.wait(self.hanging_up)
            await self._kill_all()
            shutil.rmtree(sockets, ignore_errors=True)
            for number in numbers:
                loop.remove_signal_handler(number)
        return rundir.last_status(self.folder)

    # -- starting --------------------------------------------------------------------------------------------

    async def _start(self, sockets: Path) -> None:
        settings = self.settings
        there = ["--run-dir", str(self.folder)]
        http = ["--http", settings.http]
        await self._spawn(
            "coordinator",
            ["coordinator", *there, *http, *listen(sockets, "coordinator"), "--", self.script, *self.args],
        )
        self.settings = replace(settings, coordinator=await self._addresses())
        if self.cut_off:
            await self._tell_who_is_gone()
        at = [part for address in self.settings.coordinator for part in ("--coordinator", address)]
        for shard in range(settings.shards):
            name = f"p{shard}"
            await self._spawn(
                name, ["ps", "--shard", str(shard), *at, *listen(sockets, name), *there], threads=1
            )
        cores = len(os.sched_getaffinity(0))
        for worker, device in enumerate(self.devices):
            name = f"w{worker}"
            # One worker gets what plain python would have, so that its results are the same to the bit.
            threads = max(1, cores // len(self.devices)) if len(self.devices) > 1 else None
            on = ["--cpu"] if device == "cpu" else ["--gpu", device.removeprefix("cuda:")]
            await self._spawn(name, ["worker", *on, "--name", name, *at, *there], threads=threads)

    async def _spawn(self, member: str, arguments: Sequence[str], *, threads: int | None = None) -> None:
        if self.killed:
            raise Stopped
        told = environment(os.environ, self.settings, threads)
        process, gone = await spawn([*self.program, *arguments], told)
        last: list[str] = []
        copying = asyncio.ensure_future(self._copy(member, process, last))
        now = asyncio.get_running_loop().time()
        started = Child(member, arguments, threads, now, process, gone, last, copying)
        self.children[member] = started
        minding = asyncio.ensure_future(self._mind(started))
        self.minding.add(minding)
        minding.add_done_callback(self.minding.discard)

    async def _addresses(self) -> tuple[str, ...]:
        """Where the coordinator listens, this machine's own socket first."""
        coordinator = self.children["coordinator"]
        loop = asyncio.get_running_loop()
        until = loop.time() + START_S
        while True:
            found = rundir.listening(self.folder)
            if found is not None and found.addresses:
                break
            if self.killed:
                raise Stopped
            if coordinator.ended:
                await asyncio.wait([coordinator.copying], timeout=KILLED_S)
                raise ZmlError(NOT_FORMED, f"the coordinator {coordinator.how()}", self._see("coordinator"))
            if loop.time() > until:
                what = f"the coordinator does not listen after {START_S:g} s"
                raise ZmlError(NOT_FORMED, what, self._see("coordinator"))
            await self._pause(0.02)
        return tuple(sorted(found.addresses, key=lambda address: not address.startswith("ipc:")))

    # -- watching --------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Until the job is over: look, show, see that the cluster forms in time, start again what died."""
        loop = asyncio.get_running_loop()
        started = heard = loop.time()
        while not self.killed:
            self.wake.clear()
            # Before we look: then it explains what we see.
            ended = [child for child in self.children.values() if child.ended]
            coordinator = self.children["coordinator"]
            if coordinator.ended:
                if rundir.last_status(self.folder) is not None or not await self._revive(coordinator):
                    return
                heard = loop.time()
            status = await self._look()
            if status is not None:
                heard = loop.time()
                self.viewer.show(status)
                if status.metrics and not self.scraped:
                    self.scraped = status.metrics
                    self.viewer.say(f"dashboard: {status.metrics}/  metrics: {status.metrics}/metrics")
                self.begun = self.begun or status.state != "FORMING"
                if status.over:
                    if await self._ended(coordinator, GOODBYE_S):
                        continue  # it may have died before it wrote down how the job ended
                    return
                if not self.begun:
                    others = [child for child in ended if child is not coordinator]
                    await self._must_form(status, others, waited_s=loop.time() - started)
                elif status.state == "RUNNING" and not self.interrupts:
                    self._revive_members(ended)
            elif loop.time() - heard > SILENT_S and not coordinator.ended:
                what = f"the coordinator has not answered for {SILENT_S:g} s"
                raise ZmlError(LOST, what, self._see("coordinator"))
            await self._pause(LOOK_EVERY_S)

    async def _mind(self, child: Child) -> None:
        """Its end is seen, and told to the coordinator, at once: else all would wait until its lease is over.

        Nobody waits for that. A coordinator that is away is told when it is back.
        """
        await child.gone.wait()
        self.wake.set()
        code = child.process.returncode
        assert code is not None, "it has ended"
        loop = asyncio.get_running_loop()
        until = loop.time() + SILENT_S
        while child.member != "coordinator" and not self._is_named_again(child) and loop.time() < until:
            try:
                link, job = await self._connection(), self.settings.job
                because = f"its process {how_ended(code)}"
                return await self.observer.ended(link, job, child.member, child.process.pid, because)
            except ZmlError:  # whoever looks hangs up
                await asyncio.sleep(TELL_AGAIN_S)

    async def _tell_who_is_gone(self) -> None:
        """The coordinator goes on with the members of before, and would wait until their leases are over."""
        try:
            link, job = await self._connection(), self.settings.job
            for member in (await self.observer.status(link)).members:
                if member.pid and member.node == socket.gethostname() and not rundir.alive(member.pid):
                    await self.observer.ended(link, job, member.member, member.pid, "its process is gone")
        except ZmlError:
            await self._hang_up()  # then leases must do

    def _is_named_again(self, child: Child) -> bool:
        """Has the system given the number of this process to that which takes its place?"""
        heir = self.children[child.member]
        return heir is not child and heir.process.pid == child.process.pid

    def _revive_members(self, ended: Sequence[Child]) -> None:
        for child in ended:
            if self.children[child.member] is child and not child.given_up:
                child.given_up = True  # by the next look; `_revive` makes another of it
                task = asyncio.ensure_future(self._revive_member(child))
                self.reviving.add(task)
                task.add_done_callback(self.reviving.discard)

    async def _revive_member(self, child: Child) -> None:
        try:
            await self._revive(child)
        except Stopped:
            pass

    async def _revive(self, child: Child) -> bool:
        """Start a process again that has ended, if that is worth it; says so. False where it stays as it is."""
        await asyncio.wait([child.copying], timeout=KILLED_S)
        code = child.process.returncode
        assert code is not None, "it has ended"
        lived_s = asyncio.get_running_loop().time() - child.started_at
        again = self.revivals.decide(child.member, code, child.last, lived_s)
        if again is None:
            return False
        self.viewer.say(f"{child.member} {child.how()}; starting it again ({again.number} of {again.most})")
        if child.member == "coordinator":
            # Not waited for; it begins before there is another.
            hanging_up = asyncio.ensure_future(self._hang_up())
            self.hanging_up.add(hanging_up)
            hanging_up.add_done_callback(self.hanging_up.discard)
        until = asyncio.get_running_loop().time() + again.after_s
        while (left_s := until - asyncio.get_running_loop().time()) > 0 and not self.killed:
            await asyncio.sleep(min(left_s, LOOK_EVERY_S))
        await self._spawn(child.member, child.arguments, threads=child.threads)
        return True

    async def _must_form(self, status: JobStatus, ended: Sequence[Child], waited_s: float) -> None:
        """Raise ZmlError if a process has ended before the job began, or if time is up."""
        states = {member.member: member.state for member in status.members}
        for child in ended:
            code = child.process.returncode or 0
            if states.get(child.member) in ("done", "lost") and (code == 0 or code > 128):
                continue  # its script has come to its end, and it says so; the job begins without
            await asyncio.wait([child.copying], timeout=KILLED_S)
            raise ZmlError(NOT_FORMED, f"{child.member} {child.how()}", self._see(child.member))
        if waited_s > self.settings.join_timeout_s:
            here = {member.member for member in status.members}
            missing = [member for member in self.children if member not in here and member != "coordinator"]
            what = f"{console.names(missing)} did not join within {self.settings.join_timeout_s:g} s"
            raise ZmlError(NOT_FORMED, what, self._see(missing[0]) if missing else "")

    async def _look(self) -> JobStatus | None:
        """The job's status; None when the coordinator ended or does not answer."""
        asking = asyncio.ensure_future(self._ask())
        gone = asyncio.ensure_future(self.children["coordinator"].gone.wait())
        done, pending = await asyncio.wait({asking, gone}, timeout=ASK_S, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if pending:
            await asyncio.wait(pending)
        try:
            return asking.result() if asking in done else None
        except ZmlError:
            await self._hang_up()
            return None

    async def _ask(self) -> JobStatus:
        return await self.observer.status(await self._connection())

    async def _connection(self) -> Any:
        async with self.connecting:
            if self.link is None:
                self.link = await self.observer.connect(self.settings)
            return self.link

    async def _hang_up(self) -> None:
        link, self.link = self.link, None
        if link is not None:
            await self.observer.hang_up(link, dead=self.children["coordinator"].ended)

    def _see(self, member: str) -> str:
        return f"Its log is {console.near(str(self.folder / rundir.LOGS / member))}.jsonl."

    async def _pause(self, seconds: float) -> None:
        """Wait, less if something happens, or has happened since `wake` was cleared."""
        try:
            await asyncio.wait_for(self.wake.wait(), seconds)
        except TimeoutError:
            return

    # -- what they print ---------------------------------------------------------------------------------------

    async def _copy(self, member: str, process: asyncio.subprocess.Process, last: list[str]) -> None:
        """A worker's stdout is its script's: shown. Everything else a process prints is kept in its log."""
        assert process.stdout is not None and process.stderr is not None
        printed = Printed.of_member(self.folder / rundir.LOGS, member, self.settings.job, process.pid)
        is_worker = member.startswith("w")

        async def keep(name: str, stream: asyncio.StreamReader) -> None:
            async for line in lines_of(stream):
                if line.startswith(NOTICE):
                    self.viewer.say(line.removeprefix(NOTICE))
                    continue
                last.append(line)
                del last[:-LAST_LINES]
                printed.line(name, line)  # rare: a process that is well prints nothing

        async def show(stream: asyncio.StreamReader) -> None:
            async for line in lines_of(stream):
                self._script_line(member, line)

        try:
            await asyncio.gather(
                show(process.stdout) if is_worker else keep("stdout", process.stdout),
                keep("stderr", process.stderr),
            )
        finally:
            printed.close()
        await process.wait()
        self.wake.set()

    def _script_line(self, member: str, line: str) -> None:
        keep = self.settings.keep_output
        if keep == "all":
            self.viewer.script_line(f"{member} | {line}")
        elif keep == "first" and member == self._speaker():
            self.viewer.script_line(line)

    def _speaker(self) -> str:
        """The first worker; if it was lost, the next one, so that a run does not fall silent."""
        for worker in range(len(self.devices)):
            child = self.children.get(f"w{worker}")
            if child is None or child.process.returncode in (None, 0):
                return f"w{worker}"
        return ""

    # -- ending --------------------------------------------------------------------------------------------------

    def interrupt(self, number: int) -> None:
        """The first signal drains, if there is anything to drain; the second kills."""
        self.interrupts += 1
        name = signal.Signals(number).name
        if self.interrupts == 1:
            self.interrupted_by = number
        if not self.begun:
            self._kill(f"{name}, before the job had begun")
        elif self.interrupts == 1:
            self.draining = asyncio.ensure_future(self._drain(name))
        else:
            self._kill(f"{name}, again")
        self.wake.set()

    async def _drain(self, name: str) -> None:
        """Ask the coordinator for an orderly end; if it cannot, or takes too long, end without order."""
        self.viewer.say("draining: the workers finish their step and save; press Ctrl-C again to stop now")
        loop = asyncio.get_running_loop()
        until = loop.time() + DRAIN_ASK_S
        while True:
            try:
                asked = self.observer.drain(await self._connection(), f"{name} at zml run")
                await asyncio.wait_for(asked, min(ASK_S, until - loop.time()))
                break
            except (ZmlError, TimeoutError) as error:
                await self._hang_up()
                if loop.time() + LOOK_EVERY_S >= until:
                    self._kill(f"the coordinator could not be asked to drain: {error}")
                    return
            await asyncio.sleep(LOOK_EVERY_S)
        await asyncio.sleep(self.settings.drain_s)
        self._kill(f"the drain is not over after {self.settings.drain_s:g} s")

    def _kill(self, because: str) -> None:
        if not self.killed:
            self.killed = because
            self.viewer.say(f"stopping now: {because}")
        self.wake.set()

    async def _goodbye(self) -> None:
        """After the job the members end by themselves; who does not, is killed."""
        status = rundir.last_status(self.folder)
        if self.killed or status is None:
            return  # without a coordinator nobody tells them to end
        members = {member.member for member in status.members}
        for child in self.children.values():
            if child.member not in members and child.member != "coordinator" and not child.ended:
                child.process.kill()  # it was still loading, and would wait for a coordinator that is gone
        ends = [asyncio.ensure_future(child.process.wait()) for child in self.children.values()]
        _, late = await asyncio.wait(ends, timeout=GOODBYE_S)
        for wait in late:
            wait.cancel()
        if late:
            whom = console.names([child.member for child in self.children.values() if not child.ended])
            self.viewer.say(f"killing {whom}: still there {GOODBYE_S:g} s after the job")

    async def _ended(self, child: Child, seconds: float) -> bool:
        try:
            await asyncio.wait_for(child.process.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _kill_all(self) -> None:
        """SIGKILL to whatever is left. Agents' scripts die with their agents: the kernel sees to it."""
        for child in self.children.values():
            if not child.ended:
                child.process.kill()
        copying = [child.copying for child in self.children.values()]
        if copying:
            # A script's own children may hold the pipe open; they are not worth waiting for.
            _, pending = await asyncio.wait(copying, timeout=KILLED_S)
            for task in pending:
                task.cancel()


def environment(environ: Mapping[str, str], settings: Settings, threads: int | None) -> dict[str, str]:
    """What a process of the run is told: all settings, whose child it is, and how many threads to compute with."""
    told = {key: value for key, value in environ.items() if key != "ZML_CONFIG"}
    told |= as_environment(settings) | tether.environment()
    told |= {"ZML_BIND": "", "ZML_RUN_DIR": "", "PYTHONUNBUFFERED": "1"}  # said by flags, differently to each
    told["ZML_HTTP"] = any_port(settings.http)
    if settings.http_tokens:  # a child may be started in another folder
        told["ZML_HTTP_TOKENS"] = os.path.abspath(settings.http_tokens)
    if threads is not None:
        told.setdefault("OMP_NUM_THREADS", str(threads))
    root = str(Path(__file__).resolve().parents[2])
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):  # a checkout
        told["PYTHONPATH"] = os.pathsep.join(part for part in (told.get("PYTHONPATH", ""), root) if part)
    return told


def listen(sockets: Path, member: str) -> list[str]:
    """Flags: a port that the operating system chooses, and a socket that only this user reaches."""
    return ["--bind", ANY_PORT, "--bind", f"ipc://{sockets}/{member}"]


def private_folder() -> Path:
    """For sockets, mode 0700, with a path that is short enough for one."""
    folder = Path(tempfile.mkdtemp(prefix="zml-"))
    if len(os.fsencode(folder)) > SOCKET_PATH_BYTES:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="zml-", dir="/tmp"))
    return folder


def ends_with(status: JobStatus, interrupted_by: int) -> int:
    """The exit code of a run that ended so, after this signal, or 0 for none: of a job that a signal stopped, what a
    shell expects of one. A job that came to its end nevertheless has its own."""
    if interrupted_by and status.state == "CANCELLED":
        return 128 + interrupted_by
    return status.exit_code if status.exit_code is not None else 1


def run(
    resolved: Resolved,
    script: str,
    args: list[str],
    devices: Sequence[str],
    *,
    cpu: bool = False,
    cut_off: Path | None = None,
) -> int:
    """The command: returns the exit code of the job, 128 + n after signal n. Raises ZmlError.

    `cut_off` is the directory of a run whose processes are all gone: it goes on there, where it stood.
    """
    from .. import observe

    settings = resolved.settings
    guarded(settings)
    must_be_free(settings)
    folder = cut_off if cut_off is not None else rundir.create(resolved, script, args, cpu=cpu)
    state = rundir.launcher_state(folder)
    hold(state, HELD, "one `zml run` at a time", "Let that one go on with it.")  # until this process ends
    if cut_off is not None:
        rundir.forget_addresses(folder)  # nobody is left who would dial them
    if parse(settings.compress).sparse:  # the first run on a machine compiles before its shards join
        settings = replace(settings, join_timeout_s=max(settings.join_timeout_s, COMPILE_S))
        resolved = replace(resolved, settings=settings)
    where = folder / rundir.LOGS
    logs.configure(
        "launcher", "run", folder=where, job=settings.job, level=settings.log_level, terminal=False
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # scripts print what they like, terminals show what they can
    viewer = console.viewer(sys.stdout, sys.stderr)
    local: LocalRun | None = None
    try:

        async def main() -> JobStatus | None:
            nonlocal local
            cut = cut_off is not None
            local = LocalRun(resolved, folder, script, args, devices, viewer, observe, cut_off=cut)
            return await local.run()

        status = asyncio.run(main())
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        viewer.close()
    assert local is not None
    out = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
    if status is not None:
        code = ends_with(status, local.interrupted_by)
        if code != status.exit_code:  # whoever looks later is to see what the shell saw
            status = msgspec.structs.replace(status, exit_code=code)
            with suppress(OSError):
                rundir.write(folder / rundir.STATUS, encode(status))
        report.print_report(msgspec.structs.replace(status, run_dir=console.near(str(folder))), out)
        return code
    last = rundir.current_status(folder)
    there = report.saved(msgspec.structs.replace(last, run_dir=str(folder))) if last is not None else []
    if local.interrupted_by:
        for line in ["stopped", *there, f"run directory: {console.near(str(folder))}"]:
            print(line, file=sys.stderr)
        return 128 + local.interrupted_by
    fix = f"Its log is in {console.near(str(where))}. {resume.advice(folder, saved=bool(there))}".strip()
    raise ZmlError(LOST, f"the coordinator {local.children['coordinator'].how()}", fix)
