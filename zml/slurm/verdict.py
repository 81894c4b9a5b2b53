"""What the batch script does when its attempt is over: end with the job's exit code, or ask Slurm to run it again.

Rule: it is run again only if that can help. A job that was told to go has a checkpoint and goes on from it; one that
lost its machines too. One that failed by itself would fail again, one that people have cancelled is to stay so, and
one that has not come as far as a checkpoint so many times in a row never will.
"""

from dataclasses import dataclass

from ..errors import EX_TEMPFAIL

EXIT_LOST = 4  # no cluster, or a process that is needed is gone
FRUITLESS_MOST = 3


@dataclass(frozen=True, slots=True)
class End:
    """Of an attempt. `state`: what Slurm calls the job at that moment; "" where it cannot be asked."""

    code: int
    nodes_lost: bool
    fruitless: int  # attempts in a row without a checkpoint of their own, this one included
    state: str


@dataclass(frozen=True, slots=True)
class Exit:
    code: int
    because: str = ""  # worth saying


@dataclass(frozen=True, slots=True)
class Requeue:
    """With `code` in case Slurm cannot."""

    code: int
    because: str


def verdict(end: End, *, may_requeue: bool) -> Exit | Requeue:
    if end.code == EX_TEMPFAIL:
        because = "it was told to go"
    elif end.code == EXIT_LOST and end.nodes_lost:
        because = "it has lost nodes that it needs"
    else:
        return Exit(end.code)
    if not may_requeue:
        return Exit(end.code, f"{because}; submitted again with --requeue, it would go on by itself")
    if end.state and end.state != "RUNNING":
        return Exit(end.code, f"{because}; Slurm calls the job {end.state} and decides what follows")
    if end.fruitless >= FRUITLESS_MOST:
        often = f"{end.fruitless} attempts in a row have not come to a checkpoint"
        return Exit(end.code, f"{because}, and is not requeued: {often}. More --time may help")
    return Requeue(end.code, because)
