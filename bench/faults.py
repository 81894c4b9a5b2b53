"""What dies, and what it costs: each kind of process is killed while a real training runs, with zml and under torchrun.

    python bench/faults.py                        sync, staleness 2 and async, each role, 2 kills; half an hour
    python bench/faults.py --role shard --mode sync --no-peers --kills 3
    python bench/faults.py --mode async --json faults.json
    python bench/faults.py --role coordinator --batches 1200      longer epochs
    python bench/faults.py --role "backed shard" --role "leaving shard" --no-peers

`zml run -w 3 -p 2` trains the script of `fault_trainee.py`, whose step takes about 50 ms, and starts again by itself
what died: nobody helps. One run for each role and mode, all its kills in it, by SIGKILL, each after the former has
healed; before them two undisturbed runs with the same seed. Under torchrun three processes train the same, with
DistributedDataParallel over gloo and a checkpoint every 50 steps. All times are medians over the kills.

worker         an agent and its script; script: the script alone. w0, which brought the first parameters, lives on
backed shard   one of a job with --replicas 1; leaving shard: with SIGTERM, so that it hands over what it has, and is
               then started again by this bench, so that it gets it back; its pause covers both moves
detection      from the kill until the run's events say that the member is lost; of the coordinator, until `zml run`
               has said that it starts it again. Not measured of torchrun
pause          the longest time between two steps of any other worker, from the kill until the next one or the end,
               minus the usual step; the JSON says how long after the kill it began. In the line "nobody":
               the longest of that undisturbed run, at ends of epochs too
within         the same, without pauses at an epoch's end: there the coordinator is needed, and all wait for the last
               batches
demanded       by the staleness bound: from the moment when a worker that makes usual steps must wait for the dead one
               (in sync at once, with staleness s after s steps, in async never) until detection
back           from the kill until the member's next step; of a shard or the coordinator, until it serves again; of
               torchrun, until there is a step that had not been done before the kill
batches        lost and doubled, by `zml data audit`
updates        lost: optimizer steps that returned in a script and are in no shard's push log at the end (of a killed
               script all but its last, where the exchange runs beside computing), or not in that of every shard.
               Doubled: twice in a log. Not accounted where the log of a shard begins with a copy of it
done again     of torchrun, steps that all processes do a second time, because the checkpoint is older; of zml, steps
               that returned in a script beyond the number of batches
loss           on held-out data at the end, and its distance from the mean of the undisturbed runs. In sync fewer
               workers make more updates of the same batches: a run that lacks one for a while has more of them. A kill
               also changes the order of the samples; what another order alone does to plain Python is told below
availability   1 - sum over kinds of processes * pause / MTBF, where each process fails once in that time. Of torchrun
               the pause is `back`: what is done again is no progress
"""

import json
import math
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import click
from fault_report import (
    Kill,
    Run,
    account_of_batches,
    account_of_updates,
    availability,
    detected,
    longest_gap,
    markdown,
    read_events,
    read_steps,
    served_again,
    usual_step,
)
from fault_trainee import RESULT, alone

from zml.records import Damaged

HERE = Path(__file__).resolve().parent
POLL_S = 0.05
START_S, HEAL_S, END_S = (
    90.0,
    60.0,
    120.0,
)  # what is waited for: the first steps, a death's end, the run's end
ORDERS = 6  # that plain Python trains in
HEALTH_S = 1.5  # of steps between two kills
WORKERS, SHARDS = 3, 2
ROLES = ("worker", "script", "shard", "coordinator", "backed shard", "leaving shard")
OF_SHARDS = ("shard", "backed shard", "leaving shard")
MODES = {"sync": "--sync", "staleness 2": "--staleness=2", "async": "--async"}
BATCHES = 180  # of an epoch, for all workers together
LIMITS = {
    "ZML_WORKER_RESTARTS": "99",
    "ZML_SHARD_RESTARTS": "99",
    "ZML_COORDINATOR_RESTARTS": "99",
    "ZML_BAD_BATCH_KILLS": "99",
}


class Failed(Exception):
    """This run, in a sentence."""


class Training:
    """One command and all that it starts, in a folder of its own; nothing of it is left behind."""

    def __init__(self, folder: Path, command: Sequence[str], **more: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ZML_")}
        path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.folder = folder
        self.out = folder / "output.txt"
        with self.out.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **more},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.out.read_text(errors="replace")

    @property
    def over(self) -> bool:
        return self.process.poll() is not None

    def until(self, condition: Callable[[], Any], what: str, seconds: float) -> Any:
        """None where the training ended first."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            if self.over:
                return None
            if time.monotonic() > end:
                raise Failed(f"{what}: not within {seconds:g} s")
            time.sleep(POLL_S)
        return found

    def pids(self, *words: str) -> list[int]:
        """Of this training's processes, which work in its folder, those whose command line has all these words."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                where = os.readlink(entry / "cwd")
            except OSError:
                continue
            if where == str(self.folder) and all(word in line for word in words):
                found.append(int(entry.name))
        return found

    def end(self) -> None:
        if not self.over:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pid in self.pids():
            kill(pid)


@contextmanager
def training(command: Sequence[str], **more: str) -> Iterator[Training]:
    with tempfile.TemporaryDirectory(prefix="zml-faults-", ignore_cleanup_errors=True) as scratch:
        made = Training(Path(scratch).resolve(), command, **more)
        try:
            yield made
        finally:
            made.end()


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def trainee(way: str, epochs: int, seed: int, batches: int = BATCHES) -> list[str]:
    # The folder of the training is the one that the command starts in.
    return [
        str(HERE / "fault_trainee.py"),
        *("--way", way, "--folder", ".", "--epochs", str(epochs), "--batches", str(batches), "--seed", str(seed)),
    ]  # fmt: skip


def last_steps(made: Training) -> dict[int, float]:
    """By process: when its newest step returned."""
    return {each.pid: each.at[-1] for each in read_steps(made.folder) if each.at}


def all_step(made: Training, since: float) -> bool:
    """As many processes as there are workers have returned from a step since then."""
    return sum(at > since for at in last_steps(made).values()) >= WORKERS


# -- zml -------------------------------------------------------------------------------------------------------------


def victims(made: Training, role: str, member: str) -> list[int]:
    """The processes to kill. An agent before its script, which it would start again."""
    if role == "coordinator":
        return made.pids("zml coordinator")
    if role in OF_SHARDS:
        return made.pids(f"--shard {member[1:]} ")
    agents = made.pids("worker", f"--name {member} ")
    scripts = [pid for pid in made.pids("zml.agent.runner") if parent(pid) in agents]
    if not agents or not scripts:
        return []
    return scripts if role == "script" else agents + scripts


def run_dir_of(made: Training) -> Path:
    (file,) = made.folder.glob("runs/*/coordinator.json")
    return file.parent


def audit(run_dir: Path) -> list[dict[str, Any]]:
    """What the ledger says of each epoch."""
    command = [sys.executable, "-m", "zml", "data", "audit", "--json", str(run_dir)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    proof = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    rows: list[dict[str, Any]] = json.loads(proof.stdout)
    return rows


def strike(made: Training, role: str, member: str, killed: set[int]) -> Kill | None:
    """Kill once, and wait until it has healed. None where the training ended first."""
    pids = made.until(lambda: victims(made, role, member), f"{member} is there", HEAL_S)
    if not pids:
        return None
    run_dir, said = run_dir_of(made), made.text.count(f"{member} ended by")
    lives = {each.pid for each in read_steps(made.folder)}
    at, epoch_s = time.monotonic(), time.time()
    found = Kill(member, at)
    for pid in pids:
        kill(pid, signal.SIGTERM if role == "leaving shard" else signal.SIGKILL)
    killed.update(pids)

    def healed() -> bool:
        if (
            role == "coordinator"
            and found.detection_s is None
            and made.text.count(f"{member} ended by") > said
        ):
            found.detection_s = time.monotonic() - at
        if role in (*OF_SHARDS, "coordinator"):
            served = served_again(read_events(run_dir), role, member, epoch_s)
            found.back_s = served - epoch_s if served else None
        else:
            first = [each.at[0] for each in read_steps(made.folder) if each.pid not in lives and each.at]
            found.back_s = min(first) - at if first else None
        return found.back_s is not None

    made.until(healed, f"{member} is back", HEAL_S)
    if role == "leaving shard":
        bring_back(made, member, set(pids))
    made.until(lambda: all_step(made, at + (found.back_s or 0) + HEALTH_S), "all make steps", HEAL_S)
    if found.detection_s is None and role != "coordinator":
        seen = detected(read_events(run_dir), member, epoch_s)
        found.detection_s = seen - epoch_s if seen else None
    return found if found.back_s is not None else None


def bring_back(made: Training, member: str, left: set[int]) -> None:
    """Start a shard's process again that has left, as its user would, and wait until it has its chunks again."""
    made.until(lambda: not left & set(made.pids(f"--shard {member[1:]} ")), f"{member} has left", HEAL_S)
    run_dir, since = run_dir_of(made), time.time()
    addresses = json.loads((run_dir / "coordinator.json").read_text())["addresses"]
    command = [sys.executable, "-m", "zml", "ps", "--shard", member[1:], "--run-dir", str(run_dir)]
    command += ["--coordinator", addresses[0]]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    subprocess.Popen(command, cwd=made.folder, env=environment, stdin=quiet, stdout=quiet, stderr=quiet)
    made.until(
        lambda: served_again(read_events(run_dir), "shard", member, since), f"{member} is home", HEAL_S
    )


def demanded(mode: str, detection_s: float | None, step_s: float) -> float | None:
    """Before a loss is known, a worker may be as many steps ahead of the lost one as the bound says, in async any."""
    if detection_s is None:
        return None
    bounds = {"sync": 0.0, "async": math.inf}
    bound = bounds[mode] if mode in bounds else float(mode.split()[-1])
    return max(0.0, detection_s - bound * step_s)


def measure_zml(mode: str, role: str, kills: int, epochs: int, seed: int, batches: int = BATCHES) -> Run:
    run, dice, killed = Run("zml", mode, role), random.Random(seed), set[int]()
    begin = time.monotonic()
    flags = ["-w", str(WORKERS), "-p", str(SHARDS), "--cpu", MODES[mode]]
    flags += ["--replicas", "1"] if role == "backed shard" else []
    command = [sys.executable, "-m", "zml", "run", *flags, *trainee("zml", epochs, seed, batches)]
    with training(command, **LIMITS) as made:
        made.until(lambda: all_step(made, begin), "the first steps", START_S)
        for _ in range(kills if role else 0):
            names = ["p0", "p1"] if role in OF_SHARDS else ["w1", "w2"]
            names = ["coordinator"] if role == "coordinator" else names
            if (found := strike(made, role, dice.choice(names), killed)) is None:
                break
            run.kills.append(found)
        made.until(lambda: made.over, "the end", END_S)
        run.wall_s = time.monotonic() - begin
        if made.process.returncode:
            raise Failed(
                f"zml run ended with {made.process.returncode}: {' '.join(made.text.split())[-300:]}"
            )
        processes, run_dir = read_steps(made.folder), run_dir_of(made)
        run.step_s = usual_step(processes)
        run.gap_s = longest_gap(processes).length - run.step_s
        run.within_s = longest_gap(processes, within=True).length - run.step_s
        for number, found in enumerate(run.kills):
            others = [each for each in processes if each.worker != found.who]
            until = run.kills[number + 1].at if number + 1 < len(run.kills) else math.inf
            gap = longest_gap(others, found.at, until)
            found.pause_s, found.pause_from_s = max(0.0, gap.length - run.step_s), gap.begin - found.at
            within = longest_gap(others, found.at, until, within=True)
            found.within_s = max(0.0, within.length - run.step_s)
            if role in ("worker", "script"):
                found.demanded_s = demanded(mode, found.detection_s, run.step_s)
        account_of_batches(run, audit(run_dir), epochs, batches)
        if role in ("backed shard", "leaving shard"):
            run.lost_updates = run.doubled_updates = None
        else:
            account_of_updates(run, run_dir, processes, killed)
        run.loss = json.loads((made.folder / RESULT).read_text())
    return run


# -- torchrun --------------------------------------------------------------------------------------------------------


def further(made: Training, former: set[int]) -> bool:
    """Have new processes come beyond what the former had done?"""
    tops: dict[bool, list[int]] = {True: [0], False: [0]}
    for each in read_steps(made.folder):
        tops[each.pid in former] += each.numbers[-1:]
    return max(tops[False]) > max(tops[True])


def measure_torch(role: str, kills: int, epochs: int, seed: int, batches: int = BATCHES) -> Run:
    run = Run("DDP, torchrun", "", role)
    begin = time.monotonic()
    # Without the variable a restart fails for the store of the former attempt: pytorch issue 135712.
    flags = ["--standalone", "--nproc-per-node", str(WORKERS), "--max-restarts", "20"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *flags,
        *trainee("torch", epochs, seed, batches),
    ]
    with training(command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") as made:
        made.until(lambda: all_step(made, begin), "the first steps", START_S)
        for _ in range(kills if role else 0):
            # Anywhere between two checkpoints: from a moment that does not depend on them.
            time.sleep(random.Random(seed + len(run.kills)).uniform(0, 2))
            if made.over:
                break
            before = read_steps(made.folder)
            lives = {each.pid for each in before}
            (victim,) = [e.pid for e in before if e.worker == "1" and e.pid in made.pids("fault_trainee")]
            found = Kill("rank 1", time.monotonic())
            kill(victim)
            run.kills.append(found)
            made.until(lambda: further(made, lives), "further than before the kill", HEAL_S)  # noqa: B023
            made.until(lambda: all_step(made, time.monotonic() - HEALTH_S), "steps", HEAL_S)
        made.until(lambda: made.over, "the end", END_S)
        run.wall_s = time.monotonic() - begin
        if made.process.returncode:
            raise Failed(
                f"torchrun ended with {made.process.returncode}: {' '.join(made.text.split())[-300:]}"
            )
        fill_in_torch(run, made)
        run.loss = json.loads((made.folder / RESULT).read_text())
    return run


def fill_in_torch(run: Run, made: Training) -> None:
    """The others are gone, too: their pause ends with the first step of whoever takes their place."""
    processes = read_steps(made.folder)
    run.step_s = usual_step(processes)
    lines = sorted((at, number) for e in processes for at, number in zip(e.at, e.numbers, strict=True))
    run.gap_s = longest_gap(processes).length - run.step_s
    for found in run.kills:
        # A step may still be on its way to its line when the process beside it is killed.
        gaps = [two for two in pairwise(lines) if two[1][0] > found.at and two[0][0] < found.at + 1]
        if not gaps:
            continue
        (stopped, _), (went_on, resumed) = max(gaps, key=lambda two: two[1][0] - two[0][0])
        top = max(number for at, number in lines if at <= stopped)
        found.pause_s, found.pause_from_s = went_on - stopped - run.step_s, stopped - found.at
        found.redone = max(0, top - resumed + 1)
        found.back_s = next((at - found.at for at, number in lines if at > stopped and number > top), None)


# -- the whole -------------------------------------------------------------------------------------------------------


def say(run: Run) -> None:
    what = run.failure or f"{len(run.kills)} kills, step {1e3 * run.step_s:.0f} ms, loss {run.loss}"
    click.echo(f"{run.system} {run.mode}, {run.role or 'nobody'}: {what} ({run.wall_s:.0f} s)", err=True)


def attempt(run: Run, measure: Callable[[], Run]) -> Run:
    """One run that fails does not end the others."""
    begin = time.monotonic()
    try:
        run = measure()
    except (Failed, Damaged, OSError, ValueError, subprocess.SubprocessError) as error:
        run.failure, run.wall_s = f"failed: {error}", time.monotonic() - begin
    say(run)
    return run


def interrupted(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--kills", type=click.IntRange(1), default=2, show_default=True, help="In each run.")
@click.option(
    "--role", "roles", multiple=True, type=click.Choice(ROLES), default=ROLES[:4], show_default=True
)
@click.option(
    "--mode",
    "modes",
    multiple=True,
    type=click.Choice(list(MODES)),
    default=tuple(MODES),
    show_default=True,
)
@click.option("--peers/--no-peers", default=True, show_default=True, help="torchrun, too.")
@click.option(
    "--calm", type=click.IntRange(0), default=2, show_default=True, help="Undisturbed runs of each mode."
)
@click.option(
    "--mtbf", type=float, default=24.0, show_default=True, help="Hours between two failures of a process."
)
@click.option(
    "--batches",
    type=click.IntRange(6),
    default=BATCHES,
    show_default=True,
    help="Of an epoch, of all workers.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE")
def main(
    kills: int,
    roles: tuple[str, ...],
    modes: tuple[str, ...],
    peers: bool,
    calm: int,
    mtbf: float,
    batches: int,
    seed: int,
    json_file: Path | None,
) -> None:
    signal.signal(signal.SIGTERM, interrupted)
    epochs = max(2, math.ceil((2 + 2 * kills) * BATCHES / batches))
    load, found = os.getloadavg()[0], list[Run]()
    try:
        for mode in modes:
            for role in [""] * calm + list(roles):
                run = Run("zml", mode, role)
                found.append(attempt(run, lambda: measure_zml(mode, role, kills, epochs, seed, batches)))  # noqa: B023
        for role in ["", "worker"] if peers else []:
            run = Run("DDP, torchrun", "", role)
            found.append(attempt(run, lambda: measure_torch(role, kills, epochs, seed, batches)))  # noqa: B023
    except KeyboardInterrupt:
        click.echo("interrupted; what there is so far:", err=True)
    click.echo(markdown(found))
    click.echo()
    spreads = {
        at_once: [alone(epochs, batches, at_once, seed, order) for order in range(ORDERS)]
        for at_once in (1, WORKERS)
    }
    for at_once, losses in spreads.items():
        about = f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"
        click.echo(f"loss of plain Python in {ORDERS} other orders, {at_once} batches per update: {about}")
    up = availability(found, 3600 * mtbf, SHARDS, WORKERS)
    for system, arithmetic, value in up:
        click.echo(f"availability, {system}: {arithmetic} = {100 * value:.4f} %")
    if json_file:
        how = {
            "machine": platform.platform(),
            "cores": os.cpu_count(),
            "load_before": load,
            "epochs": epochs,
            "batches": batches,
            "seed": seed,
            "mtbf_h": mtbf,
            "losses_of_other_orders": spreads,
            "availability": {system: value for system, _, value in up},
        }
        json_file.write_text(json.dumps({**how, "runs": [asdict(run) for run in found]}, indent=1))


if __name__ == "__main__":
    main()
