"""How many of whom, what each needs, and on which node it runs.

Rule: every node is asked for what the fullest one needs, for an allocation is the same on each of its nodes. Members
are dealt in a ring, so that no node has two more than another. The coordinator runs on the first node, where the
batch script is: when that node dies both are gone anyway. The first shard is on the second, to notice just that
(`role`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import USAGE, ZmlError

COORDINATOR = "coordinator"
COORDINATOR_MB = 1024  # the coordinator, and the batch script beside it


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Of one member."""

    cpus: int
    memory_mb: int
    gpus: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """`workers_per_node` wins over `workers`: their number is then known when the nodes are."""

    workers: int
    shards: int
    worker: Needs
    shard: Needs
    workers_per_node: int = 0

    def workers_on(self, nodes: int) -> int:
        return self.workers_per_node * nodes or self.workers

    def needs(self, member: str) -> Needs:
        if member == COORDINATOR:
            return Needs(cpus=1, memory_mb=COORDINATOR_MB)
        return self.worker if member.startswith("w") else self.shard

    def placed(self, nodes: Sequence[str]) -> dict[str, str]:
        """The node of each member, the coordinator first."""
        members = [f"p{shard}" for shard in range(self.shards)]
        members += [f"w{worker}" for worker in range(self.workers_on(len(nodes)))]
        places = {COORDINATOR: nodes[0]}
        places |= {member: nodes[at % len(nodes)] for at, member in enumerate(members, 1)}
        return places

    def per_node(self, nodes: int) -> Needs:
        """What to ask of each of so many nodes: the most that any of them needs."""
        names = [str(number) for number in range(nodes)]
        cpus, memory, gpus = Counter(dict.fromkeys(names, 0)), Counter[str](), Counter[str]()
        for member, node in self.placed(names).items():
            needs = self.needs(member)
            if member != COORDINATOR:  # it waits, mostly, and shares a core
                cpus[node] += needs.cpus
            memory[node] += needs.memory_mb
            gpus[node] += needs.gpus
        return Needs(
            cpus=max(1, *cpus.values()),
            memory_mb=max(memory.values()),
            gpus=max(gpus.values()),
        )


def another_place(member: str, places: Mapping[str, str], left: Sequence[str], avoid: str) -> str | None:
    """Where a shard goes whose node is gone or silent: the node that is left with the fewest members.

    None where none is left but the one to avoid.
    """
    load = Counter(node for other, node in places.items() if other != member)
    return min((node for node in left if node != avoid), key=lambda node: (load[node], node), default=None)


def node_range(text: str) -> tuple[int, int]:
    """The least and the most nodes of `4` or `2-4`. Raises ZmlError."""
    least, _, most = text.partition("-")
    if least.isdecimal() and (most.isdecimal() or most == "" == text.partition("-")[1]):
        found = int(least), int(most or least)
        if 0 < found[0] <= found[1]:
            return found
    raise ZmlError(
        USAGE, f"--nodes {text} is no number of nodes", "Write a number, or the least and the most: 2-4."
    )


UNITS = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0 * 1024}


def megabytes(text: str, flag: str) -> int:
    """Memory as Slurm writes it: 4G, 512M; a plain number is megabytes. Raises ZmlError."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in UNITS else (text, "M")
    try:
        found = round(float(number) * UNITS[unit])
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise ZmlError(USAGE, f"{flag} {text} is no amount of memory", "Write 4G or 512M.")
    return found
