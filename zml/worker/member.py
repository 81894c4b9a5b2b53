"""The script as a worker: `zml.join`, `zml.epochs`, `zml.evaluate`, `zml.log` and `zml.save` inside a cluster.

The training thread computes and copies; everything that waits for others happens in one I/O thread. The training
thread blocks in a few places only: for parameters at the end of a step, for batches, for an epoch and for an evaluation
to be over, and while it tells of a bad batch.

A worker ends early in two ways: with the job, when that is drained, or alone, when its agent is told to leave. Either
way the script gets no batch after the one that it computes, its loops end, and what comes behind them runs. Alone, all
that it has made leaves first, and then it asks nothing of the job any more: others go on, and theirs is what is saved.
"""

from __future__ import annotations

import atexit
import concurrent.futures
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import structlog
import torch
from msgspec import Struct

from ..agent import runner
from ..agent.leaving import ScriptEnd
from ..agent.seat import Seat
from ..agent.tally import ScriptTally
from ..codec import by_name
from ..errors import EX_TEMPFAIL, NOT_JOINED, ZmlError
from ..iothread import IoThread
from ..layout import Layout, Registration, buckets
from ..lease import COORDINATOR
from ..link import script_endpoints
from ..messages import Drained, EpochOver, Evaluating, Keep, Moved, Registered, Result, Taken, Wait
from ..plan import Plan
from ..runs.rundir import TIMELINE
from ..scheduler.evaluation import Key
from ..scheduler.explain import name_samples
from ..tracing import process as tracing
from .binding import Binding
from .client import Client, Progress
from .data import DividedLoader
from .evaluation import Anew, Evaluator, check
from .evaluation import Result as Outcome
from .evaluation import alone as evaluate_alone
from .exact_streams import ExactStream, is_exact
from .hooks import Hooks
from .keeping import Keeping
from .parts import Place
from .reporting import Reports
from .schedules import Schedules, Told
from .script import EXACT, write_model
from .streams import StreamLoader
from .timeline import Timeline
from .traffic import Traffic
from .updates import Updates, outer_spec

MOST_LEFT_OUT = 10  # steps in a row: then it is not the batches
DRAINED = "drained.safetensors"  # in the run directory

log = structlog.get_logger()
T = TypeVar("T")
Asked = Taken | Wait | EpochOver | Drained


class Member:
    """One worker's script. Not thread-safe: it belongs to the training thread."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self.told = ""  # why this worker is to leave the job, once its agent or a signal has said so
        self.draining = ""  # why the whole job ends early
        self.agent = ScriptEnd(self._told_to_leave)
        self.tally = ScriptTally()
        self.io = IoThread(f"zml-{seat.worker}")
        self.client: Client = self.io.call(self._connect())
        self.plan = Plan.of(seat.spec)
        self.timeline = Timeline(
            Path(seat.run_dir, TIMELINE, f"{seat.worker}.jsonl") if seat.run_dir else None
        )
        self.reports = Reports(self.client, self.io, self.tally, self.timeline)
        self.meter = self.reports.meter
        self.client.trace = self.timeline.trace = tracing.begin_script(seat)
        self.agent.before_stop = lambda: tracing.end(tracing.MOMENT_S)
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
        self.begun = False  # an epoch was opened
        self.evaluated: dict[int, int] = {}  # evaluations, by the epoch that they follow
        self.evaluators: dict[Any, Evaluator] = {}  # of loaders that keep their worker processes
        self.epochs_wanted = 0
        self.ended = False  # the loop over `epochs` is
        self.departed = False  # it takes no more batches, and what it has made counts
        self.alone = False  # and is no worker of this job any more
        self.left_out_in_a_row = 0  # steps whose gradient was not finite
        self.untold: list[int] = []  # batches that are applied, while the worker comes to an early end
        self.asked: concurrent.futures.Future[Asked] | None = None  # for batches, while the script computes
        self.io.post(self.agent.listen, self.io.loop)
        self.agent.catch()
        atexit.register(self.close)

    async def _connect(self) -> Client:
        control, bulk = script_endpoints(self.seat, self._told)
        await control.start()
        await bulk.start()
        # It was here when the agent joined: where it has died since, it is waited for as by all others.
        await control.connect(COORDINATOR, self.seat.coordinator, timeout_s=self.seat.patience_s)
        return Client(self.seat, control, bulk)

    def _told(self, peer: str, message: Struct, payload: memoryview | None) -> None:
        """Notices from the coordinator; in the I/O thread."""
        if isinstance(message, Drained):
            self.draining = message.because
        elif isinstance(message, Moved):
            self.client.where.moved(message)
        elif isinstance(message, Keep) and self.keeping is not None:
            self.keeping.order = message

    def _told_to_leave(self, because: str) -> None:
        """In the I/O thread, or in a signal handler: the training thread looks when it can."""
        if not self.told:
            self.told = because

    def _others(self, work: Coroutine[Any, Any, T]) -> T:
        """What waits for other members."""
        with self.timeline.measure("wait"):
            return self.io.call(work)

    # -- the script's calls ------------------------------------------------------------------------

    def join(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        loader: Any,
        data: str = EXACT,
        batches: int | None = None,
    ) -> Any:
        if self.hooks is not None:
            raise ZmlError(
                NOT_JOINED, "zml.join was called twice", "Join once, with one model and one optimizer."
            )
        if loader is not None:  # what cannot be divided is refused before anything is told
            self.loader = self._divided(loader, data, batches)
        registration = self._registration(model, optimizer)
        layout = registration.layout
        shown = self.io.call(
            self.client.register(
                registration.to_bytes(), registration.digest, len(layout.chunks), lambda: self.told
            )
        )
        if shown is None or self.told:
            self._never_joined()
        registered, placement = shown
        codec = by_name(str(self.plan.compression))
        cut = buckets(layout, placement, registration.bucket_chunks)
        self.traffic = traffic = Traffic(
            Binding(layout, model), cut, codec, self.client, self.io, self.plan, self, self.timeline
        )
        kind = Updates if self.plan.optimizer_on == "worker" else Hooks
        self.model, self.hooks = model, kind(traffic, optimizer, self._stepped)
        self._begin(registered, traffic, optimizer)
        self._remark(model)
        log.info(
            "in the job",
            worker=self.seat.worker,
            parameters=layout.size,
            buckets=len(cut),
            clock=traffic.clock,
        )
        return self.loader

    def _begin(self, registered: Registered, traffic: Traffic, optimizer: torch.optim.Optimizer) -> None:
        """Hold the job's parameters, and what the script's optimizer and schedules are to go on from."""
        assert self.model is not None and self.hooks is not None
        self.staleness, self.first_epoch = registered.staleness, registered.epoch
        self.ledger_epoch = registered.epoch - 1
        traffic.clock = self.io.call(self.client.enter())
        # Who comes late has no warm-up, nor has a resumed run.
        traffic.exchanges = traffic.clock + registered.steps
        traffic.warm_up = self.plan.warm_up(0)
        if registered.initialiser == self.seat.worker:
            traffic.load_shards()
            self.io.call(self.client.loaded())
        traffic.pull(traffic.clock, everything=True)
        traffic.measure_link()
        # Now, before the script freezes what it has made.
        self.schedules = Schedules(optimizer, self.seat.worker).look()
        on_worker = self.plan.optimizer_on == "worker"
        self.keeping = Keeping(self.client, self.io, self.model, self.schedules, on_worker=on_worker)
        self.schedule = self.keeping.restore()
        self.hooks.install()
        runner.current_step = lambda: self.meter.steps
        runner.in_hand = self._in_hand
        self.reports.begin(optimizer, traffic.auto)
        runner.failed = self._failed

    def _remark(self, model: torch.nn.Module) -> None:
        if self.plan.optimizer_on == "worker" and any(p.dtype != torch.float32 for p in model.parameters()):
            log.warning("steps smaller than half a digit of a parameter vanish", worker=self.seat.worker)
        if any(buffer.is_floating_point() for buffer in model.buffers()):
            log.info("buffers stay local", worker=self.seat.worker, saved="those of the worker that saves")

    def _divided(self, loader: Any, data: str, batches: int | None) -> DividedLoader:
        count = self.plan.workers
        if data != EXACT:
            return StreamLoader(loader, self, int(self.seat.worker[1:]) % count, count, batches)
        return ExactStream(loader, self, count, batches) if is_exact(loader) else DividedLoader(loader, self)

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
                if self.stopping():
                    self.depart()
                    break
                yield epoch
                if self.loader is not None:
                    self.loader.finish()
        finally:
            self.ended = True  # also where the script leaves the loop early
        if self.alone:
            return
        if self.hooks is not None:
            self.hooks.finish()
            self._look()
        self._report()
        if self.draining:
            self.save(Path(self.seat.run_dir, DRAINED))

    def evaluate(self, fn: Callable[[Any], Mapping[str, Any]], loader: Any) -> dict[str, float]:
        if self.alone:
            # Others do not wait for its share any more, and what stands behind this call is to run.
            log.info("evaluated alone: this worker has left", worker=self.seat.worker)
            return evaluate_alone(fn, check(loader))
        evaluator = self.evaluators.get(loader) or Evaluator(loader)
        if getattr(loader, "persistent_workers", False):
            self.evaluators[loader] = evaluator
        if self.ended and self.hooks is not None:
            self.hooks.finish()
        self.flush()
        # A script that has not begun an epoch yet makes its evaluations before all of them, also where it comes late.
        epoch = self.ledger_epoch if self.begun else -1
        self.evaluated[epoch] = self.evaluated.get(epoch, 0) + 1
        return evaluator.run(fn, Desk(self, Key(epoch, self.evaluated[epoch])))

    def log(self, values: dict[str, Any]) -> None:
        self.reports.values = values
        if not self.alone and self.reports.due:
            self._report()

    def published(self) -> AbstractContextManager[None]:
        return nullcontext() if self.hooks is None or self.alone else self.hooks.published()

    def save(self, path: str | PathLike[str]) -> None:
        if self.model is None:
            raise ZmlError(
                NOT_JOINED, "zml.save has no model yet", "Call zml.join(model, optimizer, loader) first."
            )
        if self.alone:
            log.info("not saved: this worker has left", worker=self.seat.worker, path=str(path))
            return
        if self.ended and self.hooks is not None:
            self.hooks.finish()
        self.flush()
        claimed = self._others(self.client.claim(str(path)))
        if claimed.granted:
            write_model(self.model, path)
            log.info("saved", worker=self.seat.worker, path=str(path))

    # -- the ledger, as data.DividedLoader asks for it -----------------------------------------------------

    def open_epoch(self, batches: int, generator_state: bytes, samples: int, batch_size: int) -> bytes:
        self.ledger_epoch += 1
        self.begun = True
        opened = self._others(
            self.client.open_epoch(
                self.ledger_epoch, batches, generator_state, samples, batch_size, enough=self.stopping
            )
        )
        if opened is None:
            if not self.stopping():
                self.draining = "the job is being drained"
            return generator_state
        epoch, state = opened
        if epoch.opener == self.seat.worker and self.schedules is not None:
            self._others(self.client.tell_note(self.ledger_epoch, self.schedules.note(self.ledger_epoch)))
        traffic = self._joined()
        if self.rested_at is not None and traffic.clock > epoch.first_clock:
            traffic.clock = self._others(self.client.enter(at_least=self.rested_at))
        self._rest_until(epoch.first_clock)
        self.rested_at = None
        self.batches, self.next_clock = batches, epoch.first_clock + batches
        return state

    def take(self, most: int, done: list[int], *, wait: bool) -> list[int] | None:
        if wait and self.plan.overlap and self._in_last_epoch() and self.hooks is not None:
            # Before the last batches are told to be done: once the epoch is over nothing waits on any worker.
            self.hooks.finish()
        rests, wanted = 0, 1
        while not self.stopping():
            clock = self._joined().clock
            # The answer may take a second only once this worker rests: until then the others wait for it.
            hold = rests >= wanted
            reply = self._others(self.client.take(self.ledger_epoch, clock, most, done, hold=hold))
            done = []
            match reply:
                case Taken():
                    self._return_to_gate()
                    self._others(self._tell_contents(reply))
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
                    rests, wanted = rests + 1, 2 if reply.dealt_again else 1
                    self.io.post(self.client.note_wait, reply)
        self.untold += done
        return None

    def ask(self, most: int, done: list[int]) -> None:
        assert self.asked is None, "one request at a time: the next one begins where its answer ends"
        if self.stopping():
            self.untold += done
            return
        self.asked = self.io.submit(self._ask(self.ledger_epoch, self._joined().clock, most, done))

    async def _ask(self, epoch: int, clock: int, most: int, done: list[int]) -> Asked:
        """In the I/O thread."""
        reply = await self.client.take(epoch, clock, most, done, hold=False)
        if isinstance(reply, Taken):
            await self._tell_contents(reply)
        return reply

    async def _tell_contents(self, reply: Taken) -> None:
        for batch in reply.suspects:
            samples = self.loader.samples_of(batch) if self.loader is not None else []
            await self.client.tell_contents(reply.epoch, batch, samples)

    def answered(self, *, wait: bool) -> list[int] | None:
        if self.asked is None:
            return []
        if not wait and not self.asked.done():
            return None
        asked, self.asked = self.asked, None
        with self.timeline.measure("wait"):
            reply = asked.result()
        if isinstance(reply, Drained):
            self.draining = reply.because
        return reply.batches if isinstance(reply, Taken) else []

    def tell_state(self, place: Place, state: bytes) -> None:
        self.io.post(self.client.tell_state, *place, state)

    def find_state(self, place: Place) -> tuple[int, bytes] | None:
        return self._others(self.client.find_state(*place))

    def begin(self, batches: int) -> None:
        self.tally.begin(self.ledger_epoch, batches, self.meter.steps)

    @property
    def workers(self) -> int:
        return self._joined().workers

    def stopping(self) -> str:
        return self.told or self.draining

    def depart(self) -> None:
        if self.departed or self.hooks is None:
            return
        self.departed = True
        alone = bool(self.told)
        if alone:
            if self.hooks.owes and self.rested_at is not None:
                self._return_to_gate()  # from a rest ahead of the others it would count too late
            self.hooks.depart()
        else:
            self.flush()
        self._tell_done()
        self._rest(longer=False)  # others may have a step to finish
        if alone:
            self._report()
            self._leave()

    def _tell_done(self) -> None:
        """What is applied is not computed again by others."""
        done = [*self.untold, *(self.loader.take_done() if self.loader is not None else ())]
        self.untold = []
        if done:
            self._others(self.client.take(self.ledger_epoch, self._joined().clock, 0, done, hold=False))

    def _leave(self) -> None:
        """The last words to the job. If nobody goes on with it, the model is saved here."""
        if self._others(self.client.depart()):
            traffic = self._joined()
            traffic.pull(traffic.clock)
            assert self.model is not None
            write_model(self.model, Path(self.seat.run_dir, DRAINED))
        log.info("left the job", worker=self.seat.worker, because=self.told, steps=self.meter.steps)
        self.alone = True
        self.agent.left()

    def _never_joined(self) -> NoReturn:
        """Told to leave before there was anything to lose."""
        log.info("left before it was in the job", worker=self.seat.worker, because=self.told)
        self.alone = True
        self.agent.left()
        raise SystemExit(EX_TEMPFAIL)

    def in_hand(self, batch: int, samples: int) -> None:
        self.meter.samples += samples

    def reading(self, items: Iterator[Any]) -> Iterator[Any]:
        return self.timeline.reading(items)

    def _settle(self, clock: int) -> None:
        """The epoch is over: hold what the shards hold once every worker's steps are in it."""
        self.flush()
        rested_at, traffic = self.rested_at, self._joined()
        if rested_at is not None and traffic.clock > clock:
            traffic.clock = self._others(
                self.client.enter(at_least=rested_at)
            )  # it rested longer than needed
        self._rest_until(clock)
        self.rested_at = rested_at
        traffic.pull(clock + (self.staleness or 0))
        if not self._in_last_epoch():
            traffic.look_at_link()
        elif self.hooks is not None:
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
            self._others(self.client.advance(clock))
            self.rested_at = traffic.clock if self.rested_at is None else self.rested_at
            traffic.clock = clock

    def _return_to_gate(self) -> None:
        """More batches than this worker's share, for another worker was lost: come back as a late worker comes."""
        traffic = self._joined()
        if self.rested_at is not None:
            traffic.clock = self._others(self.client.enter(at_least=self.rested_at))
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

    @property
    def leaves_out(self) -> bool:
        return self.seat.spec.on_bad_batch == "skip" and self.loader is not None

    def left_out(self, because: str) -> bool:
        self.left_out_in_a_row += 1
        if self.loader is None or not self.leaves_out or self.left_out_in_a_row > MOST_LEFT_OUT:
            return False
        self.meter.left_out += 1
        for batch in self.loader.left_out():
            samples = self.loader.samples_of(batch)
            self._others(self.client.skip(self.ledger_epoch, batch, because, samples))
            log.warning("batch skipped", worker=self.seat.worker, batch=batch, because=because)
        self.timeline.trace.fail(self._joined().clock, because)
        return True

    # -- saying how it goes ----------------------------------------------------------------------------------

    def _in_hand(self) -> str:
        if self.loader is None:
            return ""
        known = [f"batch {b} ({name_samples(self.loader.samples_of(b))})" for b in self.loader.in_hand]
        return f"{', '.join(known)} of epoch {self.ledger_epoch + 1}" if known else ""

    def _failed(self, error: BaseException) -> None:
        """The script ends; in the middle of a step, if it was in the middle of an epoch."""
        if self.traffic is not None and (self.loader is None or self.loader.under_way):
            self.timeline.trace.fail(self.traffic.clock, tracing.why(error))

    def _stepped(self) -> None:
        self.meter.stepped(self._joined().staleness)
        self.left_out_in_a_row = 0
        if self.loader is not None:
            self.loader.stepped()
        self._look()
        if self.reports.due:
            self._report()

    def _look(self) -> None:
        """Is a copy of the optimizer's state wanted? It is complete here."""
        if self.keeping is not None:
            self.keeping.look(max(self.ledger_epoch, 0))

    def _report(self) -> None:
        self.reports.make(max(self.ledger_epoch, 0), self.epochs_wanted, self._joined().staleness)

    def close(self) -> None:
        """At the end of the process: the last report, and a goodbye to every peer."""
        if self.hooks is not None and not self.alone:
            self._report()
        if self.keeping is not None:
            self.keeping.close()
        if self.hooks is not None:
            self.hooks.close()
        self.io.close(self._disconnect())
        self.timeline.trace.end()
        tracing.end()

    async def _disconnect(self) -> None:
        await self.client.bulk.close()
        await self.client.control.close()


class Desk:
    """One evaluation, as `evaluation.Evaluator` asks for it."""

    def __init__(self, member: Member, key: Key) -> None:
        self.member = member
        self.key = key
        self.attempt = ""

    def ask(
        self, batches: int, results: list[Outcome], holds: list[int], *, wait: bool
    ) -> list[int] | dict[str, float] | Anew:
        client = self.member.client
        told = [Result(batch, numbers) for batch, numbers in results]
        answer = self.member._others(client.evaluate(self.key, batches, self.attempt, told, holds, hold=wait))
        if not isinstance(answer, Evaluating):
            return [] if isinstance(answer, Wait) else answer
        former, self.attempt = self.attempt, answer.attempt
        return answer.batches if former in ("", answer.attempt) else Anew()
