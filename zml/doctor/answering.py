"""A member is asked how it is, and answers while it trains.

Rules: nothing here holds the member's loop up; what takes time is in a thread that no end of the process waits for.
One examination of a kind goes on at a time, whoever asks; and nothing that was asked changes anything.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec

from .. import stack
from ..errors import ZmlError
from ..messages import Examine, Examined
from ..transport import Endpoint, Refusal
from . import installed, links, machine, network, slurm
from .findings import COORDINATOR, Check, Link, Machine, Process
from .means import MEANS, Means

LONGEST_S = 60.0  # that an examination may take
MOST_BYTES = 4 << 20  # of a link, each way


def allowed(question: Examine) -> float:
    """Seconds that it may take."""
    return min(max(question.within_s, 0.1), LONGEST_S)


class Examinee:
    """One member's side. `device` is a worker's; `script` says which process its script is, 0 for none."""

    def __init__(
        self,
        endpoint: Endpoint,
        dial: Callable[[str], Endpoint] | None = None,
        *,
        device: str = "cpu",
        script: Callable[[], int] = lambda: os.getpid(),
        means: Means = MEANS,
    ) -> None:
        """`dial` makes a connection to shards, for a member that speaks with them."""
        self.endpoint = endpoint
        self.dial = dial
        self.device = device
        self.script = script
        self.means = means
        self.busy: set[tuple[str, str]] = set()

    async def answer(self, question: Examine, run_dir: str) -> tuple[Examined, bytes]:
        """Raises Refusal."""
        kind = (question.what, question.to)
        if kind in self.busy:
            raise Refusal("busy", f"{question.member} is being examined already")
        self.busy.add(kind)
        try:
            found = await self._found(question, Path(run_dir))
        finally:
            self.busy.discard(kind)
        return Examined(question.job, question.member), msgspec.json.encode(found)

    async def _found(self, question: Examine, run_dir: Path) -> Process | Machine | Link | stack.Stack:
        look = self.means.look
        found: Process | Machine | Link | stack.Stack
        match question.what:
            case "process":
                running = check_loop()
                found = await look(lambda: self.process(running))
            case "machine":
                found = await look(lambda: self.machine(run_dir))
            case "link":
                found = await self._link(question, allowed(question))
            case "stack":
                found = await look(lambda: self._stack(question.member, run_dir))
        return found

    def machine(self, run_dir: Path) -> Machine:
        return Machine(node=socket.gethostname(), checks=self.means.machine(run_dir))

    def process(self, running: Check) -> Process:
        """Files are read for it: what is installed may lie on a network."""
        script = self.script()
        return Process(
            node=socket.gethostname(),
            pid=os.getpid(),
            script_pid=script if script != os.getpid() else 0,
            device=self.device,
            versions=installed.versions(),
            checks=[running, check_files(), machine.check_processes(), slurm.check(os.environ)],
        )

    async def _link(self, question: Examine, within_s: float) -> Link:
        if question.to == COORDINATOR:
            return await links.to_coordinator(self.endpoint, COORDINATOR, question.job, within_s, self.means)
        if self.dial is None or not question.addresses:
            raise Refusal("link", f"{question.member} has no link to {question.to}")
        most = min(question.bulk_bytes, MOST_BYTES)
        try:
            return await links.to_shard(
                self.dial, question.to, question.addresses, question.job, within_s, most, self.means
            )
        except ZmlError as error:  # keys that are not there, or not usable
            return Link(trouble=error.what)

    def _stack(self, member: str, run_dir: Path) -> stack.Stack:
        pid = self.script()
        if not pid:
            idle = "`zml status` says what it waits for."
            node = socket.gethostname()
            return stack.Stack(member=member, node=node, trouble="it runs no script now", note=idle)
        there = stack.own_record() if pid == os.getpid() else stack.recorded(run_dir, member)
        return stack.of(member, pid, there)


def check_loop() -> Check:
    """Of the loop that runs."""
    module = type(asyncio.get_running_loop()).__module__
    if module.startswith("uvloop"):
        return Check("event loop", "pass", "uvloop runs")
    return Check("event loop", "warn", f"{module}, which is slower", "pip install uvloop")


def check_files(limit: int | None = None, used: int | None = None) -> Check:
    """The limit is this process' own: a service or a batch system may set another than a login has."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if limit is None else limit
    used = network.in_use() if used is None else used
    if used > limit / 2 and limit != resource.RLIM_INFINITY:
        return Check(
            "open files", "warn", f"{used} of {limit} in use", f"ulimit -n {4 * limit}: one per peer."
        )
    return machine.check_open_files((limit, limit))
