"""Allocations by the piece, for whoever decides how many there are to be: ask, release, look.

Rules: each allocation is a job of its own that runs one command, for Slurm does not let jobs grow; it is released in
order, with SIGTERM to that command. All of them bear one name, by which they are found again after a restart. One
squeue tells of all; ask it every few seconds at most, for it locks the controller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from ..errors import USAGE, ZmlError
from . import commands
from .script import Script
from .shape import Needs
from .table import FORMAT, Allocation, State, look, rows


class Provider(Protocol):
    """Where allocations come from. All methods may raise ZmlError, and then nothing has changed but what they say."""

    def ask(self, count: int) -> list[str]:
        """So many more, each of which runs the provider's command; their ids. Fewer where only some were granted."""

    def release(self, id: str, *, now: bool = False) -> None:
        """Its command is told to go, with `now` it is killed. Twice is the same as once."""

    def look(self) -> list[Allocation]:
        """All that were asked for, those that are over included, until they are forgotten."""

    def forget(self, id: str) -> None:
        """Say no more of one that is over."""

    def close(self) -> None:
        """No more is asked for, also by an `ask` that goes on in another thread. What cannot live on ends."""


class SlurmProvider:
    """Jobs of Slurm. `call` is as `commands.call`."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        needs: Needs,
        *,
        options: Sequence[tuple[str, str]] = (),
        setup: Sequence[str] = (),
        requeue: bool = True,
        call: Callable[..., str] = commands.call,
    ) -> None:
        if not name or not command:
            raise ZmlError(USAGE, "an allocation needs a name and a command", "Give both.")
        self.name = name
        self.call = call
        self.known: dict[str, Allocation] = {}
        self.forgotten: set[str] = set()
        self.released: set[str] = set()
        self.closed = False
        self.text = Script(
            title=f"One of the allocations of {name}, which zml asks for and gives back.",
            name=name,
            nodes="1",
            each=needs,
            requeue=requeue,
            options=options,
            setup=setup,
            words=command,
        ).text()

    def ask(self, count: int) -> list[str]:
        asked: list[str] = []
        try:
            for _ in range(count):
                if self.closed:
                    break
                job = self.call(["sbatch", "--parsable"], text=self.text).strip().partition(";")[0]
                self.known[job] = Allocation(job, State.PENDING)
                asked.append(job)
        except ZmlError:
            if not asked:
                raise
        return asked

    def release(self, id: str, *, now: bool = False) -> None:
        self.released.add(id)
        try:
            if now:
                self.call(["scancel", "--quiet", id])
            else:
                self.call(["scancel", "--quiet", "--state=PENDING", id])
                self.call(["scancel", "--quiet", "--batch", "--signal=TERM", id])
        except ZmlError:
            # scancel refuses what is over, too; that it is gone is what was wanted.
            if any(each.id == id and not each.state.over for each in self.look()):
                raise

    def look(self) -> list[Allocation]:
        words = ["squeue", "--noheader", "--me", "--states=all", f"--name={self.name}", f"--format={FORMAT}"]
        seen = [row for row in rows(self.call(words)) if row.id not in self.forgotten]
        self.known = look(self.known, seen)
        return [self._meant(allocation) for allocation in self.known.values()]

    def _meant(self, allocation: Allocation) -> Allocation:
        """A command that did not come to handle SIGTERM, because it was starting, has not failed."""
        if allocation.state is State.FAILED and allocation.id in self.released:
            return replace(allocation, state=State.ENDED, because="released")
        return allocation

    def forget(self, id: str) -> None:
        if id in self.known and self.known[id].state.over:
            del self.known[id]
            self.forgotten.add(id)  # squeue may tell of it for a while

    def close(self) -> None:
        """Allocations stay, and are found again by their name."""
        self.closed = True
