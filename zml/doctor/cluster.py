"""Asking all members of a cluster that runs how they are: everybody within a deadline, and what is silent is named.

Through the coordinator, which hands the questions on. What is measured disturbs training little: each machine is looked
at once, however many members it has; the rate between two machines is measured once, and no machine takes part in two
such measurements at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import msgspec

from ..messages import Examine
from ..status import JobStatus, MemberStatus
from ..text.console import names
from ..transport import Endpoint, Refused, TransportError
from .findings import COORDINATOR, Link, Machine, Process

BULK_BYTES = 4 << 20
AT_ONCE = 128  # questions under way
LINKS_AT_ONCE = 8  # of those about round trips
ANSWER_S = 3.0  # for the way of question and answer
TELL_S = 1.0  # from one word about what is waited for to the next
TO = " to "
HERE = frozenset({"joined", "active"})

T = TypeVar("T")
Pair: TypeAlias = tuple[str, str]


class Measured(msgspec.Struct, frozen=True):
    """One link, from whom to whom."""

    source: str
    to: str
    link: Link


class Answers(msgspec.Struct, kw_only=True):
    """Everything that was said, and who said nothing, with why."""

    job: str
    members: list[MemberStatus]
    processes: dict[str, Process] = {}
    machines: dict[str, Machine] = {}
    links: list[Measured] = []
    silent: dict[str, str] = {}  # by member, or by machine where nobody of it could look
    unmeasured: list[Pair] = []  # there was no time

    def node(self, member: str) -> str:
        return self.processes[member].node

    def role(self, member: str) -> str:
        return next((each.role for each in self.members if each.member == member), COORDINATOR)

    def by_node(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for member, process in self.processes.items():
            found.setdefault(process.node, []).append(member)
        return found


class Silent(Exception):
    """No answer, and why."""


class Asking:
    """Questions over one connection to the coordinator; `wait_s` is how long one may take."""

    def __init__(self, endpoint: Endpoint, job: str, wait_s: float) -> None:
        self.endpoint = endpoint
        self.job = job
        self.wait_s = wait_s
        self.free = asyncio.Semaphore(AT_ONCE)

    async def ask(
        self,
        member: str,
        what: Literal["process", "machine", "link", "stack"],
        kind: type[T],
        *,
        to: str = "",
        bulk_bytes: int = 0,
        within_s: float | None = None,
    ) -> T:
        """Raises Silent."""
        within_s = self.wait_s if within_s is None else within_s
        question = Examine(
            job=self.job, member=member, what=what, within_s=within_s, to=to, bulk_bytes=bulk_bytes
        )
        async with self.free:
            try:
                answer = await self.endpoint.request(COORDINATOR, question, timeout_s=within_s + ANSWER_S)
            except Refused as refused:
                raise Silent(refused.because) from None
            except TransportError as error:
                raise Silent(str(error)) from None
        try:
            return msgspec.json.decode(bytes(answer.payload or b""), type=kind)
        except msgspec.MsgspecError as error:
            raise Silent(f"its answer cannot be read: {error}") from None


Tell: TypeAlias = Callable[[str], None]


async def examine(asking: Asking, status: JobStatus, tell: Tell = lambda _: None) -> Answers:
    """All of it: processes, machines, links, each in `wait_s`; twice that for machines of which nobody answers. What
    it is at, and whom it waits for, is told every second."""
    found = Answers(job=status.job, members=list(status.members))
    here = [each.member for each in status.members if each.state in HERE]
    everybody = {member: _process(asking, found, member) for member in (COORDINATOR, *here)}
    await _together("processes", everybody, tell)
    machines = {node: _machine(asking, found, node, of) for node, of in found.by_node().items()}
    await _together("machines", machines, tell)
    shards = [each.member for each in status.of("shard") if each.member in found.processes]
    workers = [each.member for each in status.of("worker") if each.member in found.processes]
    await _links(asking, found, workers, shards, tell)
    found.links.sort(key=lambda each: (each.to != COORDINATOR, in_order(each.source), in_order(each.to)))
    return found


async def _process(asking: Asking, found: Answers, member: str) -> None:
    try:
        found.processes[member] = await asking.ask(member, "process", Process)
    except Silent as silent:
        found.silent[member] = str(silent)


async def _machine(asking: Asking, found: Answers, node: str, members: Sequence[str]) -> None:
    """By the first of its members that can."""
    because = ""
    for member in members[:2]:
        try:
            found.machines[node] = await asking.ask(member, "machine", Machine)
            return
        except Silent as silent:
            because = str(silent)
    found.silent[node] = because


async def _links(
    asking: Asking, found: Answers, workers: Sequence[str], shards: Sequence[str], tell: Tell
) -> None:
    loop = asyncio.get_running_loop()
    until = loop.time() + asking.wait_s
    few = asyncio.Semaphore(LINKS_AT_ONCE)

    async def measure(pair: Pair, bulk_bytes: int) -> None:
        source, to = pair
        async with few:
            left_s = until - loop.time()
            if left_s <= 0:
                found.unmeasured.append(pair)
                return
            try:
                link = await asking.ask(source, "link", Link, to=to, bulk_bytes=bulk_bytes, within_s=left_s)
            except Silent as silent:
                link = Link(trouble=str(silent))
            found.links.append(Measured(source, to, link))

    async def measure_all(what: str, links: Iterable[Pair], bulk_bytes: int) -> None:
        work = {f"{source}{TO}{to}": measure((source, to), bulk_bytes) for source, to in links}
        await _together(what, work, tell)

    await measure_all("links", [(member, COORDINATOR) for member in (*shards, *workers)], 0)
    pairs = [(worker, shard) for worker in workers for shard in shards]
    full = between_machines(pairs, found.node)
    between = set(full)
    await measure_all("links", [pair for pair in pairs if pair not in between], 0)
    for together in rounds(full, found.node):
        await measure_all("rates", together, BULK_BYTES)


def by_ends(name: str) -> list[tuple[str, int, str]]:
    """What names are sorted by: of a link both ends."""
    return [in_order(end) for end in name.split(TO)]


def in_order(member: str) -> tuple[str, int, str]:
    """coordinator, p0, p1, ... p10, w0."""
    return member[:1], len(member), member


def between_machines(pairs: Iterable[Pair], node: Callable[[str], str]) -> list[Pair]:
    """The first pair between each two machines."""
    found: dict[Pair, Pair] = {}
    for source, to in pairs:
        found.setdefault((node(source), node(to)), (source, to))
    return list(found.values())


def rounds(pairs: Iterable[Pair], node: Callable[[str], str]) -> list[list[Pair]]:
    """What may be measured at the same time, because no machine is in two of it."""
    found: list[tuple[set[str], list[Pair]]] = []
    for pair in pairs:
        busy = {node(pair[0]), node(pair[1])}
        for taken, together in found:
            if not taken & busy:
                taken |= busy
                together.append(pair)
                break
        else:
            found.append((busy, [pair]))
    return [together for _, together in found]


async def _together(what: str, work: Mapping[str, Coroutine[Any, Any, None]], tell: Tell) -> None:
    """Does it at once, and tells what is not done yet. What raises ends the rest."""
    tasks = {asyncio.ensure_future(each): name for name, each in work.items()}
    pending = set(tasks)
    try:
        while pending:
            whom = sorted((name for task, name in tasks.items() if task in pending), key=by_ends)
            tell(f"{what}: {names(whom)}")
            done, pending = await asyncio.wait(pending, timeout=TELL_S, return_when=asyncio.FIRST_EXCEPTION)
            for task in done:
                task.result()
    finally:
        for task in pending:
            task.cancel()
