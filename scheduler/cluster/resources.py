"""What nodes offer and what processes take: counted, never measured. A process takes what was asked for it, no less."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NewType

NodeId = NewType("NodeId", str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """An amount of each resource. Differences may be negative; what somebody has or wants never is."""

    cpus: int = 0
    gpus: int = 0
    memory_mb: int = 0

    def __add__(self, other: Resources) -> Resources:
        return Resources(
            cpus=self.cpus + other.cpus,
            gpus=self.gpus + other.gpus,
            memory_mb=self.memory_mb + other.memory_mb,
        )

    def __sub__(self, other: Resources) -> Resources:
        return self + other * -1

    def __mul__(self, times: int) -> Resources:
        return Resources(cpus=self.cpus * times, gpus=self.gpus * times, memory_mb=self.memory_mb * times)

    def holds(self, other: Resources) -> bool:
        """Is there room for `other` in this?"""
        return self.cpus >= other.cpus and self.gpus >= other.gpus and self.memory_mb >= other.memory_mb

    def __str__(self) -> str:
        parts = []
        if self.gpus:
            parts.append(f"{self.gpus} GPU{'s' * (self.gpus != 1)}")
        if self.cpus:
            parts.append(f"{self.cpus} CPU{'s' * (self.cpus != 1)}")
        if self.memory_mb:
            parts.append(f"{self.memory_mb:,} MB")
        return ", ".join(parts) or "nothing"


NOTHING = Resources()


def total(parts: Iterable[Resources]) -> Resources:
    found = NOTHING
    for part in parts:
        found = found + part
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine that offers resources. What others than zml use of it is not in `offers`."""

    id: NodeId
    offers: Resources
    rack: str = ""
    leaving: bool = False
    """It gets nothing new, and what it has is to go elsewhere."""
    cost_per_hour: float = 0.0
