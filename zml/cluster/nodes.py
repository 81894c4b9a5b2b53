"""The coordinator's side of its nodes: who is where, and orders that are repeated until they are taken.

Rule: an order goes out when what led to it is on disk; a node that comes, or comes back, is told all of it again.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import structlog
from msgspec import Struct

from ..coordinator.orders import Orders
from ..messages import Message, Ok
from ..scheduler.cluster import actions, events
from ..scheduler.cluster.machine import Machine
from ..scheduler.cluster.resources import Node, NodeId, Resources
from ..scheduler.ids import JobId
from ..transport import Endpoint, Refusal
from .attempts import attempt_name
from .jobs import why_not_named
from .storing import Outputs
from .wire import (
    Ceased,
    Goodbye,
    Have,
    LetGo,
    NodeBeat,
    NodePulse,
    Offer,
    Offered,
    Output,
    Quit,
    Run,
    Runs,
    Stored,
    Strange,
    Want,
    Work,
)

ORDER_S = 20.0
MOST_OFFERED = 1 << 40  # of anything
PIECE_BYTES = 1 << 20
MOST_HOSTS = 16
POOLED = "pool-"  # how the names of nodes begin that an autoscaler has asked for

log = structlog.get_logger()


def archive_file(folder: Path, sha256: str) -> Path:
    """Where the coordinator of this folder keeps an archive."""
    return folder / "archives" / f"{sha256}.tar.gz"


def read_piece(path: Path, offset: int) -> tuple[Message, bytes]:
    """Raises OSError."""
    with path.open("rb") as file:
        file.seek(offset)
        return Have(path.stat().st_size), file.read(PIECE_BYTES)


class Reached(NamedTuple):
    """A machine's own name, and the hosts by which its processes answer HTTP: a node's word, and no job's."""

    machine: str
    hosts: frozenset[str]


NOWHERE = Reached("", frozenset())


class Nodes:
    """`dispatch` is told what nodes say; `work` makes what a node needs to start a process of an attempt; `logs` is
    where an attempt's outputs lie."""

    def __init__(
        self,
        folder: Path,
        endpoint: Endpoint,
        machine: Machine,
        dispatch: Callable[[events.Event], object],
        work: Callable[[JobId, int], Work | None],
        logs: Callable[[str, int], Path],
        heartbeat_s: float,
    ) -> None:
        self.folder = folder
        self.endpoint = endpoint
        self.machine = machine
        self.dispatch = dispatch
        self.work = work
        self.logs = logs
        self.outputs = Outputs()
        self.heartbeat_s = heartbeat_s
        self.run_there: set[tuple[str, str, str]] = set()  # what a node runs that is just coming
        self.peers: dict[str, str] = {}  # node -> its endpoint
        self.heard_at: dict[str, float] = {}
        self.reached: dict[str, Reached] = {}
        self.orders = Orders(endpoint, self.peers, lambda node, peer: self.peers.get(node) == peer)
        # Orders to run something that no node has answered yet: node, attempt, slot.
        self.starting: dict[tuple[str, str, str], asyncio.Task[bool]] = {}

    # -- what they say -----------------------------------------------------------------------------------

    def handle(self, peer: str, message: Struct, payload: memoryview | None) -> Any:
        match message:
            case NodeBeat():
                return self._beat(peer, message)
            case Offer():
                return self._offer(peer, message, bytes(payload or b""))
            case Ceased():
                self._must_know(message.node, peer)
                job, _, number = message.job.rpartition(".")
                if not number.isdecimal():
                    raise Refusal("job", f"{message.job[:40]!r} is no attempt")
                # The order that began it may still be repeated, and would begin it anew.
                if (order := self.starting.get((message.node, message.job, message.slot))) is not None:
                    order.cancel()
                # One that was replaced elsewhere meanwhile is none of this node's business any more.
                if self._is_there(message.job, message.slot, NodeId(message.node)):
                    gone = events.Gone(JobId(job), int(number), message.slot, message.because, message.done)
                    self.dispatch(gone)
                return Ok()
            case Goodbye():
                return self._goodbye(peer, message)
            case Want():
                return self._piece(message)
            case Output():
                return self._output(peer, message, bytes(payload or b""))
        raise Refusal("unexpected", f"a coordinator does not take {type(message).__name__}")

    def _beat(self, peer: str, message: NodeBeat) -> None:
        name = NodeId(message.node)
        present = self.machine.cluster.nodes.get(name)
        if present is None or present.boot != message.boot or self.peers.get(name) != peer:
            self.endpoint.notify(peer, Strange())
            return
        self.heard_at[name] = asyncio.get_running_loop().time()
        self.dispatch(events.NodeHeard(name, message.boot))
        self.endpoint.notify(peer, NodePulse())

    def _offer(self, peer: str, message: Offer, payload: bytes) -> Message:
        try:
            runs = msgspec.json.decode(payload or b'{"slots":[]}', type=Runs)
        except msgspec.MsgspecError as bad:
            raise Refusal("offer", f"what runs there cannot be read: {bad}") from None
        if because := why_no_node(message):
            raise Refusal("offer", because)
        name = NodeId(message.node)
        before = self.peers.get(name)
        present = self.machine.cluster.nodes.get(name)
        if present is not None and present.boot != message.boot and self._is_well(name):
            # It may just have been started again.
            raise Refusal("early", f"another process offers node {name}, and is well")
        if before is not None and before != peer:
            self.endpoint.disconnect(before)
        self.peers[name] = peer
        self.reached[name] = Reached(message.machine, frozenset(message.hosts[:MOST_HOSTS]))
        self.heard_at[name] = asyncio.get_running_loop().time()
        offers = Resources(cpus=message.cpus, gpus=message.gpus, memory_mb=message.memory_mb)
        node = Node(id=name, offers=offers, rack=message.rack, cost_per_hour=message.cost_per_hour)
        # Who comes back to a coordinator that was started again mostly runs what it should.
        self.run_there = {(name, job, slot) for job, slot in runs.slots}
        try:
            self.dispatch(events.NodeCame(node, message.boot))
        finally:
            self.run_there = set()
        for job, slot in runs.slots:
            if not self._is_there(job, slot, name):
                self.orders.send(name, Quit(job, slot, True, "nobody knows of it"), within_s=ORDER_S)
        return Offered(self.heartbeat_s)

    async def _piece(self, message: Want) -> tuple[Message, bytes]:
        if not re.fullmatch(r"[0-9a-f]{64}", message.sha256) or message.offset < 0:
            raise Refusal("archive", f"{message.sha256[:20]!r} is no checksum")
        path = archive_file(self.folder, message.sha256)
        try:
            return await asyncio.to_thread(read_piece, path, message.offset)
        except OSError as error:
            raise Refusal("archive", f"archive {message.sha256[:12]} cannot be read: {error}") from None

    def _output(self, peer: str, message: Output, payload: bytes) -> Coroutine[Any, Any, Stored]:
        self._must_know(message.node, peer)
        if not self._is_there(message.job, message.slot, NodeId(message.node)):
            raise Refusal(
                "elsewhere", f"{message.job[:40]} {message.slot[:20]} does not run on {message.node}"
            )
        job, _, number = message.job.rpartition(".")
        return self.outputs.take(message, payload, self.logs(job, int(number)))

    def _is_well(self, name: NodeId) -> bool:
        """Was it heard just now, by its former self?"""
        heard_at = self.heard_at.get(name)
        return heard_at is not None and asyncio.get_running_loop().time() - heard_at < 3 * self.heartbeat_s

    def _is_there(self, attempt: str, slot: str, node: NodeId) -> bool:
        job, _, number = attempt.rpartition(".")
        found = self.machine.cluster.jobs.get(JobId(job))
        return (
            found is not None
            and found.attempt is not None
            and str(found.attempt.number) == number
            and slot in found.attempt.slots
            and found.attempt.slots[slot].node == node
        )

    def where(self, attempt: str, slot: str) -> Reached:
        """How the node said that it is reached on which this hub has put a process; nowhere where it has not."""
        job, _, number = attempt.rpartition(".")
        found = self.machine.cluster.jobs.get(JobId(job))
        if found is None or found.attempt is None or str(found.attempt.number) != number:
            return NOWHERE
        place = found.attempt.slots.get(slot)
        return self.reached.get(place.node, NOWHERE) if place is not None else NOWHERE

    def _goodbye(self, peer: str, message: Goodbye) -> Message:
        self._must_know(message.node, peer)
        name = NodeId(message.node)
        present = self.machine.cluster.nodes.get(name)
        if present is None or present.boot != message.boot:
            return Ok()  # a former self
        if message.empty:
            self.dispatch(events.NodeLeft(name, message.because))
            self.peers.pop(name, None)
            self.reached.pop(name, None)
        else:
            self.dispatch(events.NodeLeaving(name, message.because))
        return Ok()

    def _must_know(self, node: str, peer: str) -> None:
        if self.peers.get(node) != peer:
            raise Refusal("strange", f"node {node} is not here, or is another process")

    # -- what they are told --------------------------------------------------------------------------------

    def run(self, action: actions.Run) -> None:
        name = attempt_name(action.job, action.attempt)
        place = (action.node, name, action.slot)
        if action.node not in self.peers or place in self.run_there:
            return  # it is told when it comes, or has just said so itself
        if (work := self.work(action.job, action.attempt)) is None:
            return
        task = self.orders.send(
            action.node, Run(name, action.slot), msgspec.json.encode(work), within_s=ORDER_S
        )

        self.starting[place] = task

        def answered(task: asyncio.Task[bool]) -> None:
            if self.starting.get(place) is task:
                del self.starting[place]
            if not task.cancelled() and not task.result():
                self._not_taken(action)

        task.add_done_callback(answered)

    def quit(self, action: actions.Quit) -> None:
        if action.node in self.peers:
            name = attempt_name(action.job, action.attempt)
            order = Quit(name, action.slot, action.at_once, action.because)
            self.orders.send(action.node, order, within_s=ORDER_S)

    def forget(self, node: str) -> None:
        """It is gone; should it come back, it offers itself again."""
        self.peers.pop(node, None)
        self.heard_at.pop(node, None)
        self.reached.pop(node, None)

    def let_go(self, node: NodeId, because: str) -> None:
        if node in self.peers:
            self.orders.send(node, LetGo(because), within_s=ORDER_S)

    def _not_taken(self, action: actions.Run) -> None:
        """It refuses, or does not answer; should it run there all the same, it is not to. Where it is to be somewhere
        else by now, that is none of this node's business."""
        because = f"node {action.node} does not start it"
        if not self._is_there(attempt_name(action.job, action.attempt), action.slot, action.node):
            return
        self.quit(actions.Quit(action.job, action.attempt, action.slot, action.node, True, because))
        self.dispatch(events.Gone(action.job, action.attempt, action.slot, because))

    async def close(self) -> None:
        self.orders.cancel()
        self.outputs.close()
        await asyncio.gather(*self.orders.tasks, return_exceptions=True)


def why_no_node(offer: Offer) -> str:
    """Why such a machine cannot be; empty if it can."""
    if because := why_not_named(offer.node):
        return because
    amounts = {"CPUs": offer.cpus, "GPUs": offer.gpus, "MB of memory": offer.memory_mb}
    for what, amount in amounts.items():
        if not 0 <= amount <= MOST_OFFERED:
            return f"node {offer.node} offers {amount} {what}"
    if not 0 <= offer.cost_per_hour < inf:
        return f"node {offer.node} costs {offer.cost_per_hour} an hour"
    return ""
