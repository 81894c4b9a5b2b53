"""Machines for a measurement: network namespaces around a router, each on a wire of a stated speed, and what passed.

Both ends of a wire are shaped (`tc tbf`), so that a machine can neither send nor take faster than its link. Bytes are
those that the kernel counts on the router's interfaces, where they have come through the sender's link; a byte is
counted once, whoever sent it. Without root there are no namespaces: all machines are 127.0.0.1, nothing is shaped, and
everything on the loopback interface counts. Nothing stays: namespaces go, and the processes in them.

As a program it is the meter: it prints the time and the bytes so far, many times a second, until it is ended.
"""

import bisect
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

BURST, QUEUE = "256kb", "50ms"  # a queue as of a switch: 6 MB at 1 Gbit/s
EVERY_S = 0.02
TAG = "zb"


class Machines(Protocol):
    """Some machines, by number from 0."""

    interface: str
    shaped: bool

    def address(self, index: int) -> str: ...
    def on(self, index: int) -> list[str]: ...  # what to put before a command for it to run there
    def meter(self) -> list[str]: ...  # the command that measures
    def shape(self, rate: str | None) -> None: ...


class Loopback:
    """All of them are this machine."""

    interface = "lo"
    shaped = False

    def address(self, index: int) -> str:
        return "127.0.0.1"

    def on(self, index: int) -> list[str]:
        return []

    def meter(self) -> list[str]:
        return [sys.executable, __file__, "lo"]

    def shape(self, rate: str | None) -> None:
        pass


class Namespaces:
    """Machine k is 10.78.k.2 in a namespace of its own, on a wire to the router at 10.78.k.1."""

    interface = "eth"
    shaped = True

    def __init__(self, count: int) -> None:
        tag = f"{TAG}{os.getpid()}"
        self.hub = f"{tag}h"
        self.names = [f"{tag}n{index}" for index in range(count)]
        self.wires = [f"wire{index}" for index in range(count)]

    def make(self) -> None:
        ip("netns", "add", self.hub)
        ip("netns", "exec", self.hub, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        for index, (name, wire) in enumerate(zip(self.names, self.wires, strict=True)):
            ip("netns", "add", name)
            ip("link", "add", wire, "netns", self.hub, "type", "veth", "peer", "name", "eth", "netns", name)
            ip("-n", self.hub, "addr", "add", f"10.78.{index}.1/30", "dev", wire)
            ip("-n", self.hub, "link", "set", wire, "up")
            ip("-n", name, "addr", "add", f"{self.address(index)}/30", "dev", "eth")
            for device in ("lo", "eth"):
                ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "route", "add", "default", "via", f"10.78.{index}.1")

    def address(self, index: int) -> str:
        return f"10.78.{index}.2"

    def on(self, index: int) -> list[str]:
        return ["ip", "netns", "exec", self.names[index]]

    def meter(self) -> list[str]:
        return ["ip", "netns", "exec", self.hub, sys.executable, __file__, *self.wires]

    def shape(self, rate: str | None) -> None:
        """Each wire carries so much each way, as tc writes rates; None: as much as it can."""
        ends = [(self.hub, wire) for wire in self.wires] + [(name, "eth") for name in self.names]
        for name, device in ends:
            if rate is None:
                subprocess.run(["tc", "-n", name, "qdisc", "del", "dev", device, "root"], capture_output=True)
            else:
                shaper = ["tbf", "rate", rate, "burst", BURST, "latency", QUEUE]
                call("tc", "-n", name, "qdisc", "replace", "dev", device, "root", *shaper)

    def remove(self) -> None:
        for name in [*self.names, self.hub]:
            remove(name)


def ip(*words: str) -> None:
    call("ip", *words)


def call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def remove(name: str) -> None:
    """End what runs in a namespace of ours, and the namespace."""
    inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
    for pid in map(int, inside.split()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)


def remove_orphans() -> None:
    """Namespaces of measurements that were killed before they could clean up: their name has their process id."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for name in (line.split()[0] for line in listed.splitlines() if line.startswith(TAG)):
        owner = re.fullmatch(rf"{TAG}(\d+)(h|n\d+)", name)
        if owner and not Path("/proc", owner[1]).exists():
            remove(name)


@contextmanager
def machines(count: int) -> Iterator[Machines]:
    """Namespaces if this process may make them, else the loopback interface."""
    if os.geteuid() != 0:
        yield Loopback()
        return
    remove_orphans()
    made = Namespaces(count)
    try:
        try:
            made.make()
            made.shape("1gbit")
        except OSError as error:
            print(f"no namespaces here, all on loopback: {error}", file=sys.stderr)
            made.remove()
            yield Loopback()
            return
        yield made
    finally:
        made.remove()


def bits_per_s(rate: str) -> float:
    """Of a rate as tc writes it."""
    for unit, factor in (("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3)):
        if rate.endswith(unit):
            return float(rate.removesuffix(unit)) * factor
    raise ValueError(f"{rate} is not a rate such as 1gbit or 100mbit")


# -- the meter ---------------------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """Bytes that had passed at each time (time.monotonic, the same clock in all processes of a machine)."""

    times: list[float]
    totals: list[int]

    @staticmethod
    def read(file: Path) -> "Traffic":
        pairs = [line.split() for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return Traffic([float(at) for at, _ in pairs], [int(total) for _, total in pairs])

    def at(self, moment: float) -> float:
        """Between two samples: in proportion."""
        place = bisect.bisect_left(self.times, moment)
        if place == 0 or place == len(self.times):
            return float(self.totals[0 if place == 0 else -1])
        before, after = self.times[place - 1], self.times[place]
        share = (moment - before) / (after - before)
        return self.totals[place - 1] + share * (self.totals[place] - self.totals[place - 1])

    def between(self, begin: float, end: float) -> float:
        return self.at(end) - self.at(begin)


def received(wires: Sequence[str], table: str) -> int:
    """Sum of received bytes in the text of /proc/net/dev. What a router receives is what the machines sent."""
    total = 0
    for line in table.splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() in wires:
            total += int(numbers.split()[0])
    return total


def meter(wires: Sequence[str]) -> None:
    with open("/proc/net/dev") as file:
        while True:
            file.seek(0)
            print(f"{time.monotonic():.4f} {received(wires, file.read())}", flush=True)
            time.sleep(EVERY_S)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt, BrokenPipeError):
        meter(sys.argv[1:])
