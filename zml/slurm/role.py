"""A member in its step: what only its own node knows, and what a signal means to a shard.

    python -m zml.slurm.role [--interface NAME] [--gpu] RUN COORDINATOR -- ps --shard 0 ...

It says where to listen (`{here}` in the arguments) and which GPU the step was given, and becomes `zml`; beside a
shard it stays.

SIGTERM comes to everybody when Slurm preempts or cancels a job, and to one step alone when somebody takes that member
away. To all it means: the job is to drain, which is the coordinator's affair. A worker may leave in order all the
same. A shard may not: it would take the parameters away from under the last checkpoint. So a shard does not see the
signal (with some of Slurm's plugins it goes to all processes of a step, with others to the first); the process beside
it asks the coordinator, and passes it on, as SIGUSR1, only if the job trains on.

When the batch script's node dies, Slurm goes on with the job on the others and nobody leads it. A shard that has lost
the coordinator for good then asks Slurm to run the job again.
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


@dataclass(frozen=True, slots=True)
class Orders:
    """The command line."""

    run: Path
    coordinator: tuple[str, ...]
    interface: str
    gpu: bool
    arguments: tuple[str, ...]

    @property
    def is_shard(self) -> bool:
        return self.arguments[0] == "ps"


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


class Beside:
    """The process that stays beside a shard."""

    def __init__(self, orders: Orders, environ: Mapping[str, str]) -> None:
        self.orders = orders
        self.environ = environ
        self.child: subprocess.Popen[bytes] | None = None
        self.asking: threading.Thread | None = None

    def run(self, program: Sequence[str]) -> int:
        # What is blocked stays so in a process that is started; here it waits until there is a child to tell of it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, self.told)
        # The kernel ends it when this process is killed; it is started from the main thread, as that needs.
        self.child = subprocess.Popen(program, env={**self.environ, **tether.environment()})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        code = self.child.wait()
        if code == BOOK[LOST].exit_code:
            self.look_for_the_head()
        return code if code >= 0 else 128 - code

    def told(self, number: int, frame: FrameType | None) -> None:
        if self.asking is None or not self.asking.is_alive():
            self.asking = threading.Thread(target=self.ask_first, daemon=True)
            self.asking.start()

    def ask_first(self) -> None:
        time.sleep(ASK_AFTER_S)
        if self.child is not None and trains_on(self.orders.coordinator):
            self.child.send_signal(signal.SIGUSR1)

    def look_for_the_head(self) -> None:
        """The coordinator has not come back. Is its node gone, and this job without anybody who leads it?"""
        job, until = job_name(self.environ), time.monotonic() + LOOK_FOR_S
        while time.monotonic() < until:
            try:
                about = commands.job_fields(job)
                if about.get("JobState") != "RUNNING":
                    return
                if is_headless(about, commands.nodes_of(job)):
                    say(f"{about['BatchHost']}, which led {job}, is gone: requeueing it")
                    return commands.requeue(job)
            except ZmlError as error:
                say(error.what)
            time.sleep(LOOK_EVERY_S * random.uniform(0.5, 1.5))  # shards do not all ask at once


def say(text: str) -> None:
    print(f"zml: {text}", file=sys.stderr, flush=True)


def is_headless(about: Mapping[str, str], nodes: Sequence[str]) -> bool:
    """Slurm has taken the batch script's node out of the allocation, and nobody runs the batch script."""
    return bool(nodes) and about.get("BatchHost", "") not in ("", *nodes)


def trains_on(coordinator: Sequence[str]) -> bool:
    """Does the job go on without this member's leave? A coordinator that does not answer is starting, or gone: no
    matter."""
    from ..config import resolve
    from ..logs import outlets as logs
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
    orders = understand(argv)
    try:
        program = [sys.executable, "-P", "-m", "zml", *arguments(orders, os.environ)]
    except ZmlError as error:
        print(f"error: {error.what} [{error.code}]\n  {error.fix}", file=sys.stderr, flush=True)
        return error.exit_code
    if orders.is_shard:
        return Beside(orders, dict(os.environ)).run(program)
    os.execv(program[0], program)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
