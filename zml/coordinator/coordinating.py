"""`zml coordinator`: the process around a coordinator: where its state lies, where it listens, its signals.

A run directory whose journal holds a job is gone on with: the same job at the same addresses.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog

from ..address import PORT
from ..checkpoint import Checkpoint, Skipped
from ..checkpoint.finding import Skip, find, load_from
from ..config import COORDINATOR_ADDRESS
from ..dashboard.mounting import of_run
from ..errors import HELD, USAGE, ZmlError
from ..journal import Journal
from ..lease import COORDINATOR
from ..link import LISTENER, control_endpoint
from ..messages import JobSpec
from ..metrics.endpoint import opened
from ..metrics.roles import CoordinatorSource
from ..runs import rundir
from ..runs.events import EventLog
from ..runs.recorder import Recorder
from ..scheduler.ids import JobId
from ..scheduler.machine import Machine
from ..scheduler.rules import Rules
from ..tracing import process as tracing
from ..trackers import feeding, naming
from ..transport import Endpoint, Handler
from .checkpoints import When
from .coordinator import Coordinator

if TYPE_CHECKING:
    from ..config import Settings

IPC = "ipc://"
SYNC_S = 0.5
# For shards to write what they hold when the job is over, or its next piece, and end.
LAST_CHECKPOINT_S = 600.0

log = structlog.get_logger()


def serve(settings: Settings, spec: JobSpec) -> int:
    """Coordinate one job until it is over; returns its exit code. Raises ZmlError for a person to read."""
    import uvloop

    tracing.begin(settings.trace, "coordinator", COORDINATOR, settings.job, Path(settings.run_dir).name)
    try:
        return uvloop.run(_serve(settings, spec))
    finally:
        tracing.end()


async def _serve(settings: Settings, spec: JobSpec) -> int:
    loop = asyncio.get_running_loop()
    folder = Path(settings.run_dir)
    before = rundir.listening(folder)
    if before is not None and not before.pid:  # nobody locks each of those
        what = f"{folder} belongs to a coordinator of many jobs"
        raise ZmlError(HELD, what, "Let that one go on with it, or give this one another --run-dir.")
    tracking = naming.make(settings.trackers)
    journal = Journal(folder / rundir.COORDINATOR_STATE)
    try:
        before = before if not journal.empty else None
        skipped: list[Skipped] = []
        resumed = beginning(settings.resume, skipped.append, begun=not journal.empty)
        bind = where(settings.bind, before.addresses if before is not None else ())

        def listening(handler: Handler) -> Endpoint:
            return control_endpoint(settings, COORDINATOR, handler, keys=(LISTENER,), bind=bind)

        coordinator = Coordinator(
            JobId(settings.job),
            spec,
            Machine(rules_of(settings)),
            listening,
            EventLog(folder / rundir.EVENTS),
            heartbeat_s=settings.heartbeat_s,
            run_dir=str(folder),
            journal=journal,
            resumed=resumed,
        )
        must_go_on(coordinator, spec, folder)
        for each in skipped:
            log.warning("checkpoint skipped", name=each.name, because=each.because)
            coordinator.events.note(f"skipped {each.name}", each.because)
        # A job that goes on is worth more than its dashboard.
        begins = not coordinator.docket.resumed
        with_http = opened(settings, preferred=port_of(before) or PORT, reached_from=bind, must=begins)
    except BaseException:
        journal.close()
        raise
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, coordinator.interrupt, signal.Signals(number).name)
    loop.add_signal_handler(signal.SIGUSR2, coordinator.checkpoint_desk.signalled)
    syncing = asyncio.ensure_future(keep_synced(journal))
    begun = coordinator.begun
    first = coordinator.steps_before = feeding.first_step(begun.begin_with, begun.steps_before)
    feeds = feeding.Feeds(tracking, feeding.run_info(folder, first))
    recorder = Recorder(folder, coordinator.status, coordinator.changes, [feeds.follow])
    try:
        coordinator.metrics = with_http.url
        await coordinator.start()
        if coordinator.docket.resumed:
            log.info("job goes on", job=coordinator.job, boots=coordinator.facts.boots)
        pages = of_run(folder, coordinator.status)
        with_http.serve(CoordinatorSource(coordinator, with_http.lag, with_http.url), [pages])
        keep_checkpoints(coordinator, folder, settings)
        recorder.start()
        addresses = list(coordinator.endpoint.addresses)
        here = rundir.Listening(addresses, os.getpid(), coordinator.job, with_http.url, rundir.boot_id())
        rundir.write(folder / rundir.COORDINATOR, msgspec.json.encode(here))
        log.info("listening", addresses=here.addresses, http=here.http, job=coordinator.job)
        code = await coordinator.run()
        rundir.write(folder / rundir.STATUS, msgspec.json.encode(coordinator.status()))
        return code
    finally:
        await recorder.stop()
        await with_http.close()
        await asyncio.to_thread(feeds.stop)
        syncing.cancel()
        await asyncio.wait({syncing})
        await coordinator.close()


def beginning(resume: str, skip: Skip, *, begun: bool) -> Checkpoint | None:
    """The checkpoint that the job begins with. One that has begun mostly needs it no more: then it may be gone."""
    if not resume:
        return None
    try:
        return load_from(find(Path(resume)), skip)
    except ZmlError:
        if not begun:
            raise
        return None


def rules_of(settings: Settings) -> Rules:
    """How patient a job's machine is."""
    return Rules(
        lease_s=settings.lease_s,
        lease_most_s=max(5.0, 3 * settings.lease_s),
        return_s=settings.return_s,
        goodbye_s=LAST_CHECKPOINT_S,
    )


def keep_checkpoints(coordinator: Coordinator, folder: Path, settings: Settings) -> None:
    """From now on, in this run directory, as the settings say."""
    coordinator.checkpoint_desk.keep(
        folder / rundir.CHECKPOINTS,
        When(settings.checkpoint_steps, settings.checkpoint_minutes),
        settings.keep_last,
        settings.keep_every_steps,
    )


def job_spec(settings: Settings, script: str, args: Sequence[str], folder: str) -> JobSpec:
    """What is asked for, as the settings say."""
    return JobSpec(
        script=script,
        args=list(args),
        folder=folder,
        workers=settings.workers,
        shards=settings.shards,
        replicas=settings.replicas,
        staleness=settings.staleness,
        compress=settings.compress,
        optimizer_on=settings.optimizer_on,
        local_steps=settings.local_steps,
        outer_lr=settings.outer_lr,
        outer_momentum=settings.outer_momentum,
        residual_decay=settings.residual_decay,
        warm_up_steps=settings.warm_up_steps,
        on_bad_batch=settings.on_bad_batch,
        bad_batch_kills=settings.bad_batch_kills,
        lr_scaling=settings.lr_scaling,
        lr_base_workers=settings.lr_base_workers,
        lr_warm_up_steps=settings.lr_warm_up_steps,
        staleness_damping=settings.staleness_damping,
    )


async def keep_synced(journal: Journal) -> None:
    """What is written survives this machine too, a moment later."""
    while True:
        await asyncio.sleep(SYNC_S)
        if journal.dirty:
            await asyncio.to_thread(journal.sync)


def must_go_on(coordinator: Coordinator, spec: JobSpec, folder: Path) -> None:
    """Raises ZmlError where the job in this run directory is another one, or over."""
    job, found = coordinator.job, coordinator.spec
    over = coordinator.machine.over.get(job)
    if over is not None and rundir.last_status(folder) is not None:
        what = f"the job in {folder} is over: {over.state.name}, {over.because}"
        raise ZmlError(USAGE, what, "Choose another --run-dir for a new one.")
    if spec.script and spec.script != found.script:
        what = f"{folder} holds a job that goes on with {found.script or 'no script'}, not {spec.script}"
        raise ZmlError(USAGE, what, "Choose another --run-dir, or leave the script out.")
    if spec.script and spec != found:
        log.warning("goes on as asked for before", job=job, differs=differences(spec, found))


def differences(one: JobSpec, other: JobSpec) -> list[str]:
    return [name for name in one.__struct_fields__ if getattr(one, name) != getattr(other, name)]


def where(wanted: Sequence[str], before: Sequence[str]) -> list[str]:
    """Where to listen: as wanted, but where the system chose a port `before`, that one, for peers dial it."""
    here = [address for address in before if not address.startswith(IPC) or _has_folder(address)]
    if not wanted:
        return here or [COORDINATOR_ADDRESS]
    left = [address for address in here if not address.startswith(IPC)]
    bind = []
    for address in wanted:
        host, _, port = address.rpartition(":")
        known = [each for each in left if each.rpartition(":")[0] == host]
        if port == "0" and known:
            left.remove(known[0])
            bind.append(known[0])
        else:
            bind.append(address)
    return bind


def port_of(before: rundir.Listening | None) -> int:
    """Where a former process answered HTTP; 0 where none did."""
    port = before.http.rpartition(":")[2] if before is not None else ""
    return int(port) if port.isdigit() else 0


def _has_folder(address: str) -> bool:
    """The launcher that made it may be gone, and its folder with it; then tcp must do."""
    return Path(address.removeprefix(IPC)).parent.is_dir()
