"""One member's process inside its step: what only its own node knows, and what a signal means.

    python -m zml.slurm.role [--interface NAME] [--gpu] RUN COORDINATOR -- ps --shard 0 ...

It says where to listen (`{here}` in the arguments), which GPU the step was given, and waits for `zml`, which it starts.

SIGTERM comes to every process of the job when Slurm preempts or cancels it, and to one step alone when somebody takes that
member away. To all it means: the job is to drain, and the coordinator does that; a shard that left in order just then would
take the parameters away from under the last checkpoint. So a worker's or shard's SIGTERM waits until the coordinator has
been asked: it is passed on only if the job trains on. SIGUSR1 is the batch script's own word, and passed on as SIGTERM.

When the batch script's node dies, Slurm goes on with the job on the others and nobody leads it: a member that has lost the
coordinator for good then asks Slurm to run the job again.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ..errors import ALLOCATION, BOOK, LOST, NO_GPU, ZmlError
from ..launch import tether
from . import address, commands
from .folder import job_name

HERE = "{here}"
ASK_AFTER_S = 1.0  # a SIGTERM to all has reached the coordinator by then
ASK_FOR_S = 10.0
ASK_EVERY_S = 0.5
LOOK_EVERY_S = 10.0  # at Slurm, whether the batch script's node is still there
LOOK_FOR_S = 900.0  # SlurmdTimeout is 300 s by default
SAME_S = 3.0  # a signal of the batch script's and one of Slurm's within this time are one


@dataclass(frozen=True, slots=True)
class Orders:
    """The command line."""

    run: Path
    coordinator: tuple[str, ...]
    interface: str
    gpu: bool
    arguments: tuple[str, ...]

    @property
    def is_coordinator(self) -> bool:
        return self.arguments[0] == "coordinator"


def understand(argv: Sequence[str]) -> Orders:
    at = argv.index("--")
    words, interface, gpu = list(argv[:at]), "", False
    while words and words[0].startswith("--"):
        if words[0] == "--gpu":
            gpu, words = True, words[1:]
        else:
            interface, words = words[1], words[2:]
    run, *coordinator = words
    return Orders(Path(run), tuple(coordinator), interface, gpu, tuple(argv[at + 1 :]))


def arguments(orders: Orders, environ: Mapping[str, str]) -> list[str]:
    """What zml is started with on this node. Raises ZmlError."""
    here = socket.gethostname()
    if not orders.run.is_dir():
        what = f"{environ.get('SLURMD_NODENAME', here)} ({here}) does not see {orders.run}"
        raise ZmlError(ALLOCATION, what, "Choose a folder with --runs that all nodes share.")
    told = list(orders.arguments)
    if any(HERE in word for word in told):
        own = listens_at(orders)
        told = [word.replace(HERE, own) for word in told]
    if orders.gpu:
        told[1:1] = ["--gpu", str(given_gpu(environ))]
    return told


def listens_at(orders: Orders) -> str:
    if orders.interface:
        return address.of_interface(orders.interface)
    peer = orders.coordinator[0].removeprefix("tcp://").rpartition(":")[0]
    return address.towards(peer)


def given_gpu(environ: Mapping[str, str]) -> int:
    """The one GPU of this step, as nvidia-smi counts here. Raises ZmlError."""
    named = environ.get("CUDA_VISIBLE_DEVICES", "")
    first = named.partition(",")[0].strip()
    if first.isdecimal():
        return int(first)
    what = f"Slurm gave this step no GPU that has a number: CUDA_VISIBLE_DEVICES is {named!r}"
    raise ZmlError(NO_GPU, what, "Ask for whole GPUs, or leave --gpus-per-worker out.")


class Role:
    """The process that waits for the member."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.child: subprocess.Popen[bytes] | None = None
        self.passed_at = float("-inf")
        self.asking: threading.Thread | None = None
        self.early: list[int] = []  # signals that came before there was a child

    def run(self, environ: Mapping[str, str]) -> int:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.told)
        program = [sys.executable, "-P", "-m", "zml", *arguments(self.orders, environ)]
        # The kernel ends it when this process is killed; it is started from the main thread, as that needs.
        self.child = subprocess.Popen(program, env={**environ, **tether.environment()})
        for number in self.early:
            self.told(number, None)
        code = self.child.wait()
        if code == BOOK[LOST].exit_code and not self.orders.is_coordinator:
            self.look_for_the_head(environ)
        return code if code >= 0 else 128 - code

    def told(self, number: int, frame: FrameType | None) -> None:
        if self.child is None:
            self.early.append(number)
        elif number == signal.SIGUSR1 or self.orders.is_coordinator:
            self.pass_on(once=True)
        elif self.asking is None or not self.asking.is_alive():
            self.asking = threading.Thread(target=self.ask_first, daemon=True)
            self.asking.start()

    def pass_on(self, *, once: bool) -> None:
        now = time.monotonic()
        if self.child is not None and not (once and now - self.passed_at < SAME_S):
            self.passed_at = now
            self.child.send_signal(signal.SIGTERM)

    def ask_first(self) -> None:
        time.sleep(ASK_AFTER_S)
        if trains_on(self.orders.coordinator):
            self.pass_on(once=True)

    def look_for_the_head(self, environ: Mapping[str, str]) -> None:
        """The coordinator has not come back. Is its node gone, and this job without anybody who leads it?"""
        job, until = job_name(environ), time.monotonic() + LOOK_FOR_S
        while time.monotonic() < until:
            try:
                about = commands.job_fields(job)
                if about.get("JobState") != "RUNNING":
                    return
                if is_headless(about, commands.nodes_of(job)):
                    print(f"zml: {about['BatchHost']}, which led {job}, is gone: requeueing it", file=sys.stderr, flush=True)
                    commands.requeue(job)
                    return
            except ZmlError as error:
                print(f"zml: {error.what}", file=sys.stderr, flush=True)
            time.sleep(LOOK_EVERY_S * random.uniform(0.5, 1.5))  # members do not all ask at once


def is_headless(about: Mapping[str, str], nodes: Sequence[str]) -> bool:
    """Slurm has taken the batch script's node out of the allocation, and nobody runs the batch script."""
    return bool(nodes) and about.get("BatchHost", "") not in ("", *nodes)


def trains_on(coordinator: Sequence[str]) -> bool:
    """Does the job go on without this member's leave? A coordinator that does not answer is starting, or gone: no matter."""
    from .. import logs
    from ..config import resolve
    from ..observe import fetch_status

    logs.silence()
    settings = resolve({"coordinator": list(coordinator)}, os.environ).settings
    until = time.monotonic() + ASK_FOR_S
    while True:
        try:
            return fetch_status(settings).state in ("FORMING", "RUNNING")
        except ZmlError:
            if time.monotonic() > until:
                return True
            time.sleep(ASK_EVERY_S)


def main(argv: Sequence[str]) -> int:
    try:
        return Role(understand(argv)).run(os.environ)
    except ZmlError as error:
        print(f"error: {error.what} [{error.code}]\n  {error.fix}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
