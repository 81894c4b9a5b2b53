"""One run from a seed: a whole cluster in memory, what goes wrong in it, and the rules checked at its end.

python -m tests.chaos.world 4711          # this seed once more, with its plan, its messages in a file
"""

import asyncio
import logging
import random
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgpack
import structlog
import torch

from tests.zml.cluster import Cluster
from zml.checkpoint import Checkpoint
from zml.coordinator import spreading
from zml.coordinator.checkpoints import When
from zml.errors import EX_TEMPFAIL
from zml.lease import COORDINATOR
from zml.messages import JobSpec
from zml.records import HEAD, HEAD_BYTES, SUM
from zml.scheduler.homes import Home
from zml.shard.ps import Ps
from zml.shard.pushlog import LOG, NoLog
from zml.transport.frames import Kind

from .cuts import held
from .ending import check, chosen
from .faults import (
    ANY,
    ORDERS,
    Boundary,
    Crash,
    Fault,
    Freeze,
    Leave,
    Order,
    Partition,
    Plan,
    Weather,
    draw,
    draw_after,
    goes_on,
)
from .invariants import Batch
from .processes import NOBODY, WHOSE, Network, Process, live
from .recorder import Recorder
from .witness import Witness, watching
from .worker import Worker

FOLDER = Path("/dev/shm") if Path("/dev/shm").is_dir() else None  # push logs that need no disk
LEAVE_S = 90.0  # within which a process ends that was told to leave
PEACE_S = 120.0  # within which a run ends after its last fault
LONGEST_S = 600.0
CAN_RESTART_COORDINATOR = hasattr(Cluster, "restart_coordinator")


class World(Cluster):
    """A cluster whose members are processes, and whoever starts them again."""

    network: Network

    def __init__(
        self,
        seed: int,
        plan: Plan,
        folder: Path,
        processes: list[Process],
        resumed: Checkpoint | None = None,
    ) -> None:
        self.plan = plan
        self.batches = {(epoch, batch) for epoch in range(plan.epochs) for batch in range(plan.batches)}
        self.before = frozenset(held(resumed, plan.batches)) if resumed is not None else frozenset[Batch]()
        self.steps_before = resumed.manifest.step if resumed is not None else 0
        self.witness = Witness()
        self.checkpoints = folder / "checkpoints"
        self.homes: dict[str, Home] = {}  # where each shard lives, or lived at the end
        self.dice = random.Random(seed + 1)  # of what goes on beside the plan
        self.processes = processes
        weather = plan.weather
        network = Network(seed, delay_s=weather.delay_s, loss=weather.loss, duplication=weather.duplication)
        network.spared = f"agent-{plan.anchor}.1"
        self.recorder = network.recorder = Recorder(self.position)
        network.passing = self.passing
        spec = JobSpec(
            workers=plan.workers,
            shards=plan.shards,
            replicas=plan.replicas,
            staleness=plan.staleness,
            compress=plan.compress,
            optimizer_on=plan.optimizer_on,
        )
        journal: dict[str, Any] = {"state": folder / COORDINATOR} if CAN_RESTART_COORDINATOR else {}
        super().__init__(
            network,
            spec,
            compute_s=lambda name: plan.compute_s[name],
            folder=folder,
            resumed=resumed,
            **journal,
        )
        self.chunk_elements = plan.chunk_elements
        self.frozen = plan.frozen
        self.coordinator_is_back = asyncio.Event()
        self.coordinator_process = self.process(COORDINATOR)
        self.shard_processes: dict[int, Process] = {}
        self.workers: dict[str, Worker] = {}  # the newest of each name
        self.lives_of_workers: list[Worker] = []
        self.crashes: list[
            tuple[Crash, int]
        ] = []  # that wait for their message, and how many are to pass before
        self.ended = False
        self.took_s: list[float] = []  # each checkpoint that was ordered
        self.troubles = len(plan.faults)  # that are still to come, or not over
        self.troubled_until = 0.0
        self.trained_at = 0.0  # by the newest worker to come to its end
        self.lasted_s = 0.0

    def process(self, name: str) -> Process:
        process = Process(name)
        self.processes.append(process)
        return process

    def position(self, shard: str) -> tuple[str, int] | None:
        """The log of the shard in the process that is running, and how long its history is."""
        process = WHOSE.get()
        index = next((index for index, one in self.shard_processes.items() if one is process), None)
        pushes = self.shards[index].logs.get(shard) if index is not None else None
        return (pushes.folder.name, self.witness.length(pushes.folder.name)) if pushes is not None else None

    def after_message(self) -> None:
        """The coordinator has decided something."""
        if (job := self.coordinator.machine.jobs.get(self.coordinator.job)) is not None:
            self.homes |= {str(shard): home for shard, home in job.homes.items()}

    # -- members ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        await self.coordinator_process.run(self._coordinator())
        for index in range(self.spec.shards):
            self.start_shard(index)
        for name in (f"w{index}" for index in range(self.plan.workers)):
            self.start_worker(name)

    def start_worker(self, name: str) -> None:
        if self.ended:
            return
        former = self.workers.get(name)
        worker = self.workers[name] = Worker(self, name, former.life + 1 if former is not None else 1)
        self.scripts[f"{name}.{worker.life}"] = worker
        self.lives_of_workers.append(worker)
        self.tasks.append(worker.process.run(worker.run()))

    def fenced(self, worker: Worker) -> None:
        """Its launcher starts another."""
        if self.workers[worker.name] is worker and worker.fenced_at is None and not self.ended:
            worker.fenced_at = now = asyncio.get_running_loop().time()
            if self.dice.random() < 0.5:
                worker.kill()
            asyncio.get_running_loop().call_at(
                now + 0.5, self.start_worker, worker.name, context=NOBODY.copy()
            )

    def start_shard(self, index: int) -> None:
        """Unless one runs: whoever started that did so for another reason."""
        former, task = self.shard_processes.get(index), self.shard_tasks.get(index)
        if self.ended or (former is not None and task is not None and not former.dead and not task.done()):
            return
        self.lives[index] += 1
        process = self.shard_processes[index] = self.process(f"p{index}.{self.lives[index]}")
        task = self.shard_tasks[index] = process.run(self._shard(index))
        self.tasks.append(task)
        task.add_done_callback(lambda task: self._shard_ended(index, process, task))

    def _shard_ended(self, index: int, process: Process, task: "asyncio.Task[int]") -> None:
        """As `zml run` does: a shard that fails is started again."""
        if task.cancelled() or process.dead or self.ended or task.exception() is None:
            return
        asyncio.get_running_loop().call_later(0.3, self.start_shard, index, context=NOBODY.copy())

    async def _coordinator(self) -> None:
        await self.coordinator.start()
        self._keep_checkpoints()

    def _keep_checkpoints(self) -> None:
        if self.plan.checkpoint_s:
            self.coordinator.checkpoint_desk.keep(self.checkpoints, When(), keep_last=100)
            self.tasks.append(asyncio.ensure_future(self._order_checkpoints()))

    async def _order_checkpoints(self) -> None:
        while True:
            await asyncio.sleep(self.plan.checkpoint_s)
            await self.take_checkpoint(f"every {self.plan.checkpoint_s:.2f} s")

    async def take_checkpoint(self, because: str) -> None:
        desk = self.coordinator.checkpoint_desk.checkpoints
        assert desk is not None
        began = asyncio.get_running_loop().time()
        await desk.take(because)
        self.took_s.append(asyncio.get_running_loop().time() - began)

    # Of a cluster that can restart its coordinator, from a journal:

    def kill_coordinator(self) -> None:
        if self.coordinator_process.dead:
            return
        self.coordinator_process.kill()
        self.close_journal()

    def close_journal(self) -> None:
        docket: Any = getattr(self.coordinator, "docket")  # noqa: B009
        former, docket.journal = docket.journal, None  # in the middle of a callback it may go on to write
        if former is not None:
            former.close()

    def start_coordinator(self) -> None:
        if not self.ended and self.coordinator_process.dead:
            process = self.coordinator_process = self.process(COORDINATOR)
            process.run(self._coordinator_again())

    async def _coordinator_again(self) -> None:
        await getattr(self, "restart_coordinator")()  # noqa: B009
        self._keep_checkpoints()
        self.coordinator_is_back.set()

    async def over(self) -> int:
        """The exit code, of whichever coordinator comes to the end of the job."""
        while True:
            self.coordinator_is_back.clear()
            run = asyncio.ensure_future(self.coordinator.run())
            back = asyncio.ensure_future(self.coordinator_is_back.wait())
            await asyncio.wait({run, back}, return_when=asyncio.FIRST_COMPLETED)
            back.cancel()
            if run.done():
                return run.result()
            run.cancel()

    def kill_shard(self, index: int) -> None:
        process, ps = self.shard_processes[index], self.shards.get(index)
        process.kill()
        if ps is not None:
            for core in (*ps.cores.values(), *(backup.core for backup in ps.backups.values())):
                core.log = NoLog()  # in the middle of a callback it may go on to write
            let_go(ps)

    def is_alive(self, index: int) -> bool:
        return not self.shard_processes[index].stands_still

    # -- what goes wrong --------------------------------------------------------------------------------------

    def passing(self, boundary: Boundary, whose: Process, header: bytes) -> None:
        """A message is at a boundary of this process; who is to die here, dies."""
        if not self.crashes or self.ended:
            return
        kind, *_, body = msgpack.unpackb(header[4:])
        if kind not in MATTERS:
            return
        about = body.get("type") if kind == Kind.REQUEST else None
        for place, (crash, left) in enumerate(self.crashes):
            if whose not in self.processes_of(crash.target):
                continue
            orders = crash.target == COORDINATOR and crash.about in ORDERS
            # The answer to a message of this kind is what is sent next once it has arrived.
            answer = bool(crash.about) and crash.boundary == "sent" and crash.target[0] in "pc" and not orders
            at = "sent" if orders else "arrives" if answer else crash.boundary
            if crash.about not in ("", about) or boundary != at:
                continue
            if orders and crash.boundary != "sent":
                self.crashes[place] = (replace(crash, about=""), left)
            elif left:
                self.crashes[place] = (crash, left - 1)
            else:
                found = replace(crash, target=self.shard_of(whose)) if crash.target == ANY else crash
                if answer:
                    self.crashes[place] = (replace(found, about=""), 0)
                else:
                    del self.crashes[place]
                    self.crash(found)
            return

    def processes_of(self, target: str) -> list[Process]:
        if target == COORDINATOR:
            return [self.coordinator_process]
        if target == ANY:
            return list(self.shard_processes.values())
        if target.startswith("p"):
            process = self.shard_processes.get(int(target[1:]))
            return [process] if process is not None else []
        worker = self.workers.get(target.removeprefix("script "))
        if worker is None:
            return []
        mine = [worker.script_process] if worker.script_process is not None else []
        return mine if target.startswith("script") else [worker.process, *mine]

    def shard_of(self, process: Process) -> str:
        return next(f"p{index}" for index, one in self.shard_processes.items() if one is process)

    def crash(self, crash: Crash) -> None:
        target, again = crash.target, crash.back_s
        later = asyncio.get_running_loop().call_later
        if target == COORDINATOR:
            self.kill_coordinator()
            assert again is not None
            later(again, self.start_coordinator, context=NOBODY.copy())
            return
        if target.startswith("p"):
            index = int(target[1:]) if target != ANY else self.dice.choice(list(self.shards))
            if index not in self.shards:
                return  # it has not come yet
            wrote = [pushes.folder for pushes in self.shards[index].logs.values()]
            self.kill_shard(index)
            if crash.torn:
                for folder in wrote:
                    tear(folder / LOG, crash.torn)
            assert again is not None
            later(again, self.start_shard, index, context=NOBODY.copy())
            return
        worker = self.workers.get(target.removeprefix("script "))
        if worker is None:
            return  # it has not come yet
        if target.startswith("script"):
            worker.kill_script()
        else:
            worker.kill()
        if again is None and self.coordinator.machine.generation(self.coordinator.job) == 0:
            again = 1.0  # the job has not begun, and cannot without it
        if again is not None:
            later(again, self.start_worker, worker.name, context=NOBODY.copy())

    async def befall(self, fault: Fault) -> None:
        """Let it happen; returns when it is over."""
        match fault:
            case Crash():
                self.crashes.append((fault, fault.messages))
                await asyncio.sleep(fault.within_s)
                for crash, left in self.crashes:
                    if (
                        replace(crash, about=fault.about, target=fault.target) == fault
                    ):  # so few messages: it dies now
                        self.crashes.remove((crash, left))
                        self.crash(fault)
                        break
                await asyncio.sleep(fault.back_s or 0.0)
            case Freeze():
                frozen = self.processes_of(fault.target)
                for process in frozen:
                    process.freeze()
                await asyncio.sleep(fault.for_s)
                for process in frozen:
                    process.thaw()
            case Partition():
                pairs = list(self.pairs(fault))
                self.network._cut.update(pairs)
                await asyncio.sleep(fault.for_s)
                self.network._cut.difference_update(pairs)
            case Leave():
                await self._leave(fault)
            case Order():
                if self.plan.checkpoint_s and not self.coordinator_process.dead:
                    self.tasks.append(self.coordinator_process.run(self.take_checkpoint("an order")))
            case Weather():
                self.blow(fault)
                await asyncio.sleep(fault.for_s)
                self.blow(self.plan.weather)

    async def _leave(self, leave: Leave) -> None:
        """As SIGTERM, until the process has ended, in whatever way."""
        index = int(leave.target[1:])
        if index not in self.shards:
            return  # it has not come yet
        process, task, ps = self.shard_processes[index], self.shard_tasks[index], self.shards[index]
        loop = asyncio.get_running_loop()
        loop.call_soon(ps.leave, "SIGTERM", context=process.context)
        if leave.again_s is not None:
            loop.call_later(leave.again_s, ps.leave, "SIGTERM", context=process.context)
        until = loop.time() + LEAVE_S
        while not task.done() and not process.dead:
            assert loop.time() < until, f"{LEAVE_S:g} s ago {process} was told to leave"
            await asyncio.sleep(0.01)
        if process.dead:
            return  # who killed it starts another
        ended_well = not task.cancelled() and task.exception() is None
        # Of a job that has not begun it has handed over nothing, and that cannot begin without it.
        begun = self.coordinator.machine.generation(self.coordinator.job) > 0
        handed_over = begun and ended_well and task.result() == EX_TEMPFAIL
        back_s = (None if handed_over else 1.0) if leave.back_s is None else leave.back_s
        if back_s is not None:
            await asyncio.sleep(back_s)
            NOBODY.copy().run(self.start_shard, index)

    def pairs(self, cut: Partition) -> Iterator[tuple[str, str]]:
        for one in self.names(cut.one):
            for other in self.names(cut.other):
                yield one, other
                if cut.both_ways:
                    yield other, one

    def names(self, target: str) -> set[str]:
        return {endpoint.name for process in self.processes_of(target) for endpoint in process.endpoints}

    def blow(self, weather: Weather) -> None:
        self.network.delay_s = weather.delay_s
        self.network.loss, self.network.duplication = weather.loss, weather.duplication

    # -- a life -----------------------------------------------------------------------------------------------

    async def live(self) -> int:
        """To the end of the job; its exit code."""
        loop = asyncio.get_running_loop()
        await self.start()
        began = loop.time()
        for name, at in self.plan.late.items():
            loop.call_later(at, self.start_worker, name)
        for index, at in self.plan.joins.items():
            loop.call_later(at, self.start_shard, index)
        happens = [asyncio.ensure_future(self._at(began + at, fault)) for at, fault in self.plan.faults]
        ending = asyncio.ensure_future(self.over())
        # A fault that comes when all is over does not come.
        while not ending.done() and (to_come := [task for task in happens if not task.done()]):
            await asyncio.wait([ending, *to_come], return_when=asyncio.FIRST_COMPLETED)
        try:
            async with asyncio.timeout(PEACE_S):
                code = await ending
        except TimeoutError:
            raise AssertionError(f"{PEACE_S:g} s after the last fault it goes on:\n{self.stuck()}") from None
        finally:
            self.ended = True
            for task in happens:
                if task.done():
                    task.result()
                task.cancel()
            self.network.recorder = None
        self.lasted_s = loop.time() - began
        await asyncio.sleep(1.0)
        if not self.coordinator_process.dead:
            self.close_journal()
        for ps in self.shards.values():
            let_go(ps)
        return code

    async def _at(self, when: float, fault: Fault) -> None:
        await asyncio.sleep(when - asyncio.get_running_loop().time())
        await self.befall(fault)
        self.troubles -= 1
        self.troubled_until = asyncio.get_running_loop().time()

    def stuck(self) -> str:
        """Where everybody waits."""
        lines = []
        for task in asyncio.all_tasks():
            frames = task.get_stack()
            if frames:
                code = frames[-1].f_code
                lines.append(f"  {task.get_coro().__qualname__} {code.co_filename}:{frames[-1].f_lineno}")  # type: ignore[union-attr]
        return "\n".join(sorted(lines))


MATTERS = (Kind.REQUEST, Kind.REPLY, Kind.REFUSAL)


def let_go(ps: Ps) -> None:
    """Close what the kernel closes when a process ends."""
    logs = [*ps.logs.values(), *(backup.pushes for backup in ps.backups.values())]
    for pushes in logs:
        if pushes is not None:
            pushes.close()


def tear(folder: Path, length: int) -> None:
    """As much of a next record as had been written when its writer died."""
    last = max(folder.glob("*.records"), default=None)
    if last is None:
        return  # it died before it had opened its log
    number = int(last.stem)
    data = last.read_bytes()
    at = 0
    while at + HEAD_BYTES <= len(data):
        at += HEAD_BYTES + HEAD.unpack_from(data, at)[0]
        number += 1
    if at == len(data):
        head = HEAD.pack(1000, number, 0)
        record = head + SUM.pack(zlib.crc32(head)) + bytes(1000)
        with last.open("ab") as file:
            file.write(record[:length])


@contextmanager
def quiet() -> Iterator[None]:
    """Nobody reads the logs of thousands of clusters, and to make them takes a third of the time."""
    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL), cache_logger_on_first_use=False
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        structlog.configure(**before)


@dataclass(slots=True)
class Outcome:
    """How the run of a seed ended: `broken` is None where every rule holds."""

    seed: int
    plan: Plan
    broken: str | None
    lasted_s: float
    history: Callable[[], str]  # made when it is asked for: it is long

    def __str__(self) -> str:
        how = "all rules hold" if self.broken is None else self.broken
        return f"seed {self.seed}: {self.plan}\n{self.lasted_s:.1f} s: {how}"

    def write(self) -> Path:
        """All of it, with every message, to a file."""
        path = Path(tempfile.gettempdir()) / f"zml-chaos-{self.seed}.txt"
        path.write_text(f"{self}\n{self.history()}\n")
        return path


def again(seed: int) -> str:
    """The command that runs this seed once more."""
    return f"{Path(sys.executable).name} -m tests.chaos.world {seed}"


def run(seed: int) -> Outcome:
    """The run of this seed, and of some one that goes on from one of its checkpoints."""
    plan = draw(seed, coordinator_dies=CAN_RESTART_COORDINATOR)
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix="zml-chaos-") as folder:
        outcome, world = _run(seed, plan, Path(folder))
        if outcome.broken is None and goes_on(seed) and (checkpoint := chosen(world)) is not None:
            after = draw_after(seed, plan, coordinator_dies=CAN_RESTART_COORDINATOR)
            return _run(seed, after, Path(folder, "after"), checkpoint)[0]
        return outcome


def _run(seed: int, plan: Plan, folder: Path, resumed: Checkpoint | None = None) -> tuple[Outcome, World]:
    processes: list[Process] = []
    worlds: list[World] = []

    async def main() -> int:
        worlds.append(World(seed, plan, folder, processes, resumed))
        with watching(worlds[0].witness, plan.long_log), patch.object(spreading, "PORTION", 1):
            return await worlds[0].live()

    broken: str | None = None
    try:
        code = live(main(), processes, limit_s=LONGEST_S)
        check(worlds[0], code)
    except AssertionError as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        broken = f"{type(error).__name__}: {str(error) or f'{where.line} ({where.filename}:{where.lineno})'}"
        if resumed is not None:
            broken = f"gone on from {resumed.path.name}: {broken}"
    return Outcome(seed, plan, broken, worlds[0].lasted_s, worlds[0].network.history), worlds[0]


def main(seeds: list[str]) -> int:
    failed = 0
    for seed in map(int, seeds):
        with quiet():
            outcome = run(seed)
        print(f"{outcome}\nits messages are in {outcome.write()}")
        failed += outcome.broken is not None
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
