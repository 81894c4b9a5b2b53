"""Processes as Linux shows them in /proc: what one is, waits for, catches, and has started."""

from __future__ import annotations

from pathlib import Path

PROCESSES = 1000  # below one, that are looked for
STATES = {
    "R": "running",
    "S": "waiting",
    "D": "waiting for a disk, a network file system or a driver",
    "T": "stopped by a signal: `kill -CONT` lets it go on",
    "t": "stopped by a debugger",
    "Z": "dead, and its parent has not noticed",
    "I": "idle",
}


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status; empty where there is no such process."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key: value.strip() for key, _, value in pairs}


def children(pid: int) -> list[int]:
    """All processes below one, the nearest first."""
    found, level = list[int](), [pid]
    while level and len(found) < PROCESSES:
        below: list[int] = []
        for each in level:
            for task in Path(f"/proc/{each}/task").glob("*/children"):
                try:
                    below += map(int, task.read_text().split())
                except (OSError, ValueError):
                    continue
        found += below
        level = below
    return found


def catches(pid: int, number: int) -> bool:
    """Has the process a handler for this signal? Without one, most of them kill."""
    try:
        return bool(int(status_of(pid).get("SigCgt", "0"), 16) >> (number - 1) & 1)
    except ValueError:
        return False


def began(pid: int) -> int:
    """When a process started, in the kernel's ticks since its own start; 0 where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        return int(text.rpartition(")")[2].split()[19])  # behind the name, which may hold anything
    except (OSError, ValueError, IndexError):
        return 0
