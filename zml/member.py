"""The script as a worker: `zml.join`, `zml.epochs`, `zml.log` and `zml.save` inside a cluster.

The training thread computes and copies; everything that waits for others happens in one I/O thread. The training
thread blocks in three places only: for parameters at the end of a step, for batches, and for an epoch to be over.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import structlog
import torch
from msgspec import Struct

from . import runner
from .binding import Binding
from .client import Client, Progress
from .codec import by_name
from .data import DividedLoader
from .errors import NOT_JOINED, ZmlError
from .hooks import Hooks
from .iothread import IoThread
from .keeping import Keeping
from .layout import Layout, Registration, buckets
from .lease import COORDINATOR
from .link import script_endpoints
from .messages import Drained, EpochOver, Keep, Moved, Taken, Wait
from .plan import Plan
from .rundir import TIMELINE
from .schedules import Schedules, Told
from .script import number, write_model
from .seat import Seat
from .timeline import Timeline
from .traffic import Traffic
from .updates import Updates, outer_spec

REPORT_S = 0.5

log = structlog.get_logger()


class Member:
    """One worker's script. Not thread-safe: it belongs to the training thread."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self.io = IoThread(f"zml-{seat.worker}")
        self.client: Client = self.io.call(self._connect())
        self.plan = Plan.of(seat.spec)
        self.timeline = Timeline(
            Path(seat.run_dir, TIMELINE, f"{seat.worker}.jsonl") if seat.run_dir else None
        )
        self.traffic: Traffic | None = None
        self.hooks: Hooks | Updates | None = None
        self.loader: DividedLoader | None = None
        self.model: torch.nn.Module | None = None
        self.staleness: int | None = 0
        self.first_epoch = 0
        self.schedules: Schedules | None = None
        self.schedule: Told | None = None  # in the checkpoint that the job goes on from
        self.keeping: Keeping | None = None
        self.ledger_epoch = -1  # the epoch that is open for this worker
        self.batches = 0  # of that epoch
        self.next_clock = 0  # the first clock of the epoch after it, unless a worker is lost
        self.rested_at: int | None = None  # the clock at which this worker ran out of batches, while it rests
        self.epochs_wanted = 0
        self.ended = False  # the loop over `epochs` is
        self.draining = ""
        self.steps = (
            0  # that this script has finished; clocks also count the steps of an epoch that others made
        )
        self.samples = 0  # since the last report
        self.values: dict[str, Any] = {}
        self.reported_at = time.monotonic()
        atexit.register(self.close)

    async def _connect(self) -> Client:
        control, bulk = script_endpoints(self.seat, self._told)
        await control.start()
        await bulk.start()
        await control.connect(COORDINATOR, self.seat.coordinator)
        return Client(self.seat, control, bulk)

    def _told(self, peer: str, message: Struct, payload: memoryview | None) -> None:
        """Notices from the coordinator; in the I/O thread."""
        if isinstance(message, Drained):
            self.draining = message.because
        elif isinstance(message, Moved):
            self.client.moved(message)
        elif isinstance(message, Keep) and self.keeping is not None:
            self.keeping.order = message

    # -- the script's four calls ------------------------------------------------------------------------

    def join(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> Any:
        if self.hooks is not None:
            raise ZmlError(
                NOT_JOINED, "zml.join was called twice", "Join once, with one model and one optimizer."
            )
        if loader is not None:
            self.loader = DividedLoader(
                loader, self
            )  # refuses what cannot be divided before anything is told
        registration = self._registration(model, optimizer)
        layout = registration.layout
        registered, placement = self.io.call(
            self.client.register(registration.to_bytes(), registration.digest, len(layout.chunks))
        )
        codec = by_name(str(self.plan.compression))
        cut = buckets(layout, placement, registration.bucket_chunks)
        self.traffic = traffic = Traffic(
            Binding(layout, model), cut, codec, self.client, self.io, self.plan, self, self.timeline
        )
        kind = Updates if self.plan.optimizer_on == "worker" else Hooks
        self.model, self.hooks = model, kind(traffic, optimizer, self._stepped)
        self.staleness, self.first_epoch = registered.staleness, registered.epoch
        self.ledger_epoch = registered.epoch - 1
        traffic.clock = traffic.exchanges = self.io.call(self.client.enter())  # who comes late has no warm-up
        traffic.warm_up = self.plan.warm_up(0)
        if registered.initialiser == self.seat.worker:
            traffic.load_shards()
            self.io.call(self.client.loaded())
        traffic.pull(traffic.clock, everything=True)
        traffic.measure_link()
        self.schedules = Schedules(optimizer, self.seat.worker)
        on_worker = self.plan.optimizer_on == "worker"
        self.keeping = Keeping(self.client, self.io, model, self.schedules, on_worker=on_worker)
        self.schedule = self.keeping.restore()
        self.hooks.install()
        runner.current_step = lambda: self.steps
        if self.plan.optimizer_on == "worker" and any(p.dtype != torch.float32 for p in model.parameters()):
            log.warning("steps smaller than half a digit of a parameter vanish", worker=self.seat.worker)
        if any(buffer.is_floating_point() for buffer in model.buffers()):
            log.info("buffers stay local", worker=self.seat.worker, saved="those of the worker that saves")
        log.info(
            "in the job",
            worker=self.seat.worker,
            parameters=layout.size,
            buckets=len(cut),
            clock=traffic.clock,
        )
        return self.loader

    def _registration(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Registration:
        bucket_chunks = self.plan.bucket_chunks(self.seat.bucket_chunks)
        if self.plan.optimizer_on == "shard":
            return Registration.of(model, optimizer, bucket_chunks)
        layout = Layout.of(model, optimizer, any_optimizer=True)
        return Registration(layout, outer_spec(), bucket_chunks)

    def epochs(self, count: int) -> Iterator[int]:
        self.epochs_wanted = count
        if self.traffic is not None and self.loader is not None:
            steps = count * len(self.loader) / (self.plan.workers * self.plan.local_steps)
            self.traffic.warm_up = self.plan.warm_up(int(steps))
        if self.schedules is not None:  # and only now the script has made them all
            self.schedules.begin(self.first_epoch, self.client.note, self.schedule)
        try:
            for epoch in range(self.first_epoch, count):
                if self.draining:
                    break
                yield epoch
                if self.loader is not None:
                    self.loader.finish()
        finally:
            self.ended = True  # also where the script leaves the loop early
        if self.hooks is not None:
            self.hooks.finish()
            self._look()
        self._report()
        if self.draining:
            self.save(Path(self.seat.run_dir, "drained.safetensors"))

    def log(self, values: dict[str, Any]) -> None:
        self.values = values
        if time.monotonic() - self.reported_at >= REPORT_S:
            self._report()

    def save(self, path: str | PathLike[str]) -> None:
        if self.model is None:
            raise ZmlError(
                NOT_JOINED, "zml.save has no model yet", "Call zml.join(model, optimizer, loader) first."
            )
        if self.ended and self.hooks is not None:
            self.hooks.finish()
        self.flush()
        claimed = self.io.call(self.client.claim(str(path)))
        if claimed.granted:
            write_model(self.model, path)
            log.info("saved", worker=self.seat.worker, path=str(path))

    # -- the ledger, as data.DividedLoader asks for it -----------------------------------------------------

    def open_epoch(self, batches: int, generator_state: bytes) -> bytes:
        self.ledger_epoch += 1
        opened = self.io.call(self.client.open_epoch(self.ledger_epoch, batches, generator_state))
        if opened is None:
            self.draining = self.draining or "the job is being drained"
            return generator_state
        epoch, state = opened
        if epoch.opener == self.seat.worker and self.schedules is not None:
            self.io.call(self.client.tell_note(self.ledger_epoch, self.schedules.note(self.ledger_epoch)))
        traffic = self._joined()
        if self.rested_at is not None and traffic.clock > epoch.first_clock:
            traffic.clock = self.io.call(self.client.enter(at_least=self.rested_at))
        self._rest_until(epoch.first_clock)
        self.rested_at = None
        self.batches, self.next_clock = batches, epoch.first_clock + batches
        return state

    def take(self, most: int, done: list[int], *, wait: bool) -> list[int] | None:
        if wait and self.plan.overlap and self._in_last_epoch() and self.hooks is not None:
            # Before the last batches are told to be done: once the epoch is over nothing waits on any worker.
            self.hooks.finish()
        while not self.draining:
            clock = self._joined().clock
            reply = self.io.call(self.client.take(self.ledger_epoch, clock, most, done, hold=wait))
            done = []
            match reply:
                case Taken():
                    self._return_to_gate()
                    return reply.batches
                case EpochOver():
                    self._settle(reply.next_clock)
                    return None
                case Drained():
                    self.draining = reply.because
                case Wait():
                    if not wait:
                        return []
                    self._look()
                    self._rest(longer=reply.dealt_again)
                    self.io.post(self.client.note_wait, reply)
        if wait:
            self._rest(longer=False)  # drained: others may have a step to finish
        return None

    def in_hand(self, batch: int, samples: int) -> None:
        self.samples += samples

    def _settle(self, clock: int) -> None:
        """The epoch is over: hold what the shards hold once every worker's steps are in it."""
        self.flush()
        rested_at, traffic = self.rested_at, self._joined()
        if rested_at is not None and traffic.clock > clock:
            traffic.clock = self.io.call(
                self.client.enter(at_least=rested_at)
            )  # it rested longer than needed
        self._rest_until(clock)
        self.rested_at = rested_at
        traffic.pull(clock + (self.staleness or 0))
        if self._in_last_epoch() and self.hooks is not None:
            self.hooks.finish()  # what the script evaluates after its last epoch is what it will save

    def _in_last_epoch(self) -> bool:
        return self.ledger_epoch == self.epochs_wanted - 1

    def _rest(self, *, longer: bool) -> None:
        """Nobody shall wait for a worker that has no batch. `longer`: other workers may go on from where it rests."""
        clock = self._joined().clock
        if self.rested_at is None and clock < self.next_clock:
            self._rest_until(self.next_clock)  # without a loss no worker gets beyond
        elif self.rested_at is None or longer:
            self._rest_until(clock + max(self.batches, 1))

    def _rest_until(self, clock: int) -> None:
        """Nobody waits for this worker below `clock`."""
        self.flush()
        traffic = self._joined()
        if traffic.clock < clock:
            self.io.call(self.client.advance(clock))
            self.rested_at = traffic.clock if self.rested_at is None else self.rested_at
            traffic.clock = clock

    def _return_to_gate(self) -> None:
        """More batches than this worker's share, for another worker was lost: come back as a late worker comes."""
        traffic = self._joined()
        if self.rested_at is not None:
            traffic.clock = self.io.call(self.client.enter(at_least=self.rested_at))
            traffic.pull(traffic.clock)
        self.rested_at = None

    def flush(self) -> None:
        """Every step that the script has made counts, and the model holds what followed from it."""
        if self.hooks is not None:
            self.hooks.flush()
            self.timeline.pause()

    def _joined(self) -> Traffic:
        if self.traffic is None:
            raise ZmlError(
                NOT_JOINED, "the script has not joined", "Call zml.join(model, optimizer, loader) first."
            )
        return self.traffic

    # -- which steps count, as Traffic tells it ----------------------------------------------------------

    def leaving(self) -> Progress:
        if self.loader is None:
            return -1, 0
        return self.ledger_epoch, self.loader.leaving()

    def counted(self) -> None:
        if self.loader is not None:
            self.loader.counted()

    # -- saying how it goes ----------------------------------------------------------------------------------

    def _stepped(self) -> None:
        self.steps += 1
        self._look()
        if time.monotonic() - self.reported_at >= REPORT_S:
            self._report()

    def _look(self) -> None:
        """Is a copy of the optimizer's state wanted? It is complete here."""
        if self.keeping is not None:
            self.keeping.look(max(self.ledger_epoch, 0))

    def _report(self) -> None:
        self.reported_at = time.monotonic()
        self.timeline.write()
        fields = {
            "steps": self.steps,
            "epoch": max(self.ledger_epoch, 0),
            "epochs": self.epochs_wanted,
            "samples": self.samples,
            "staleness": self._joined().staleness,
            "values": {str(name): number(name, value) for name, value in self.values.items()},
        }
        self.samples = 0
        self.io.post(lambda: self.client.report(**fields))

    def close(self) -> None:
        """At the end of the process: the last report, and a goodbye to every peer."""
        if self.hooks is not None:
            self._report()
        if self.keeping is not None:
            self.keeping.close()
        self.io.close(self._disconnect())

    async def _disconnect(self) -> None:
        await self.client.bulk.close()
        await self.client.control.close()
