"""What an examination finds, as data: what `zml doctor` prints, members answer with and --json shows."""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

Verdict: TypeAlias = Literal["pass", "warn", "fail"]
WORST: dict[Verdict, int] = {"pass": 0, "warn": 1, "fail": 2}
COORDINATOR = "coordinator"


class Check(msgspec.Struct, frozen=True):
    """`fix` is one thing to do, empty where all is well. `where`: of which machine, member or pair of members."""

    name: str
    verdict: Verdict
    found: str
    fix: str = ""
    where: str = ""


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """What a member says of its own process."""

    node: str
    pid: int
    script_pid: int = 0  # of a worker that runs its script
    device: str = "cpu"
    versions: dict[str, str] = {}
    checks: list[Check] = []


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What the checks of a machine have found."""

    node: str
    checks: list[Check]


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """From a member to another. -1 is: not measured. `trouble` is why nothing, or not all, was."""

    rtt_s: float = -1.0  # the median of a few small messages
    skew_s: float = 0.0  # the other's clock minus this one's, of the fastest of them; known to half of it
    up_bps: float = -1.0  # bytes per second of what is sent there: gradients
    down_bps: float = -1.0  # and of what comes back: parameters
    mtu: int = 0  # of the route there; 0 where it is none of IP
    by: str = ""  # what large messages take: socket or shared memory
    trouble: str = ""

    @property
    def reached(self) -> bool:
        return self.rtt_s >= 0


def worst(checks: list[Check]) -> Verdict:
    return max((check.verdict for check in checks), key=WORST.__getitem__, default="pass")
