"""What nodes offer and what processes take: counted, never measured. A process takes what was asked for it, no less."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, NewType, TypeVar

NodeId = NewType("NodeId", str)
Key = TypeVar("Key", bound=Hashable)


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
        return Resources(
            cpus=self.cpus - other.cpus,
            gpus=self.gpus - other.gpus,
            memory_mb=self.memory_mb - other.memory_mb,
        )

    def __mul__(self, times: int) -> Resources:
        return Resources(cpus=self.cpus * times, gpus=self.gpus * times, memory_mb=self.memory_mb * times)

    def or_more(self, other: Resources) -> Resources:
        """Of each resource the more of the two."""
        return Resources(
            cpus=max(self.cpus, other.cpus),
            gpus=max(self.gpus, other.gpus),
            memory_mb=max(self.memory_mb, other.memory_mb),
        )

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


class Sums(Generic[Key]):
    """Amounts added up for each key, without an object for each sum on the way: a thousand jobs have thousands."""

    def __init__(self) -> None:
        self._of: dict[Key, list[int]] = {}

    def add(self, key: Key, amount: Resources, times: int = 1) -> None:
        sums = self._of.get(key)
        if sums is None:
            sums = self._of[key] = [0, 0, 0]
        sums[0] += times * amount.cpus
        sums[1] += times * amount.gpus
        sums[2] += times * amount.memory_mb

    def __getitem__(self, key: Key) -> Resources:
        """NOTHING of what was never added."""
        sums = self._of.get(key)
        return NOTHING if sums is None else Resources(cpus=sums[0], gpus=sums[1], memory_mb=sums[2])

    def __contains__(self, key: Key) -> bool:
        return key in self._of

    def all(self) -> dict[Key, Resources]:
        return {key: self[key] for key in self._of}

    def drop(self, key: Key) -> None:
        self._of.pop(key, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine that offers resources. What others than zml use of it is not in `offers`."""

    id: NodeId
    offers: Resources
    rack: str = ""
    leaving: bool = False
    """It gets nothing new, and what it has is to go elsewhere."""
    cost_per_hour: float = 0.0
