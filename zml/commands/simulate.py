"""`zml simulate`: which policy, how many nodes? Asked of the scheduler's own code and a recorded workload."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import USAGE, ZmlError

if TYPE_CHECKING:
    from ..scheduler.cluster.autoscale import Bounds
    from ..simulate.curves import Calibrated
    from ..simulate.report import Outcome

NAMES = ("zml", "fifo", "srtf", "las", "static")


@dataclass(frozen=True, slots=True)
class Errand:
    """One run, in plain values: it may be done in another process."""

    workload: str
    policy: str
    seed: int
    nodes: int
    gpus_per_node: int
    profiles: str | None
    curves: tuple[str, ...]
    limit: int | None
    noise: float
    restart_s: float
    round_s: float
    autoscale: Bounds | None
    adapts: bool


@click.command()
@click.argument("traces", nargs=-1, required=True, metavar="TRACE...")
@click.option(
    "--policy",
    "policies",
    type=click.Choice(NAMES),
    multiple=True,
    help="May be repeated, to compare.  [default: zml]",
)
@click.option("--nodes", type=click.IntRange(1, 10_000), default=16, show_default=True, help="Machines.")
@click.option("--gpus-per-node", type=click.IntRange(1, 9), default=4, show_default=True)
@click.option(
    "--profiles",
    metavar="FOLDER",
    help="Measurements, a folder for each model.  [default: `traces` beside the workload's folder]",
)
@click.option(
    "--curves",
    multiple=True,
    metavar="FILE",
    help="A model as zml was measured to train it, by bench/curves.py; may be repeated.",
)
@click.option("--first", "limit", type=click.IntRange(1), metavar="N", help="Only the first N jobs of each.")
@click.option(
    "--autoscale",
    metavar="LOW:HIGH",
    help="Nodes come and go, so that GPUs are used at an efficiency from LOW to HIGH; --nodes is the most.",
)
@click.option(
    "--idle-s",
    type=click.FloatRange(0),
    default=300.0,
    show_default=True,
    help="Nodes that are too many go after so long.",
)
@click.option("--asked", is_flag=True, help="Under zml, too, each job has what its user asked for.")
@click.option(
    "--restart-s",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="How long a job stands still when its workers change.",
)
@click.option(
    "--round-s", type=click.FloatRange(1), default=60.0, show_default=True, help="Between two plans."
)
@click.option(
    "--noise",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="How wrong jobs measure their step times: deviation of the logarithm.",
)
@click.option("--seeds", default="0", show_default=True, metavar="LIST", help="Of that noise, as in 0,1,2.")
@click.option("--processes", type=click.IntRange(1, 64), default=1, show_default=True, help="Runs at a time.")
@click.option("--json", "json_file", metavar="FILE", help="All numbers, job by job; - is standard output.")
@click.option("--plot", "plot_file", metavar="FILE", help="A picture, as .png, .svg or .pdf.")
def simulate(
    traces: tuple[str, ...],
    policies: tuple[str, ...],
    nodes: int,
    gpus_per_node: int,
    profiles: str | None,
    curves: tuple[str, ...],
    limit: int | None,
    autoscale: str | None,
    idle_s: float,
    asked: bool,
    restart_s: float,
    round_s: float,
    noise: float,
    seeds: str,
    processes: int,
    json_file: str | None,
    plot_file: str | None,
) -> int:
    """What would a cluster have done with a recorded workload?

    TRACE is a CSV, or a folder of them: name,time,application,num_replicas,batch_size as in the artifact of Pollux
    (OSDI 2021; github.com/petuum/adaptdl, branch osdi21-artifact, folder simulator), with its measurements as
    --profiles; or timestamp,duration,num_gpus as in the Philly trace that comes with it, without profiles.

    Under zml jobs of measured models have any number of workers and adapt their batch sizes; under the other
    policies, and where no model is known, each has what its user asked for. srtf is told how long jobs will take.
    """
    from ..scheduler.cluster.autoscale import Bounds
    from ..simulate import plot, report, workloads
    from ..text.console import counted

    # Before the work, not after it.
    if plot_file is not None:
        plot.must_be_picture(plot_file)
        must_be_writable("--plot", plot_file)
    if json_file not in (None, "-"):
        must_be_writable("--json", json_file)
    bounds = None
    if autoscale is not None:
        try:
            low, high = (float(part) for part in autoscale.split(":"))
            bounds = Bounds(least=1, most=nodes, low=low, high=high, idle_s=idle_s)
        except ValueError as error:
            raise ZmlError(
                USAGE,
                f"--autoscale {autoscale}: {error}",
                "Give two efficiencies, as in --autoscale 0.35:0.65.",
            ) from None
    errands = [
        Errand(
            str(path),
            policy,
            seed,
            nodes,
            gpus_per_node,
            profiles,
            curves,
            limit,
            noise,
            restart_s,
            round_s,
            bounds,
            policy == "zml" and not asked,
        )
        for policy in dict.fromkeys(policies or ("zml",))
        for path in workloads.find(traces)
        for seed in read_seeds(seeds)
    ]
    for calibrated in read_curves(curves).values():
        click.echo(calibrated, err=True)
    outcomes = list(run_all(errands, processes))
    if json_file == "-":
        report.as_json(outcomes, given(errands), sys.stdout)
    else:
        click.echo(report.text(outcomes))
        for outcome in outcomes:
            if outcome.unfinished:
                ask = "it asks" if outcome.unfinished == 1 else "they ask"
                click.echo(
                    f"{counted(outcome.unfinished, 'job')} of {outcome.workload} never ended under "
                    f"{outcome.policy}: {ask} for more than there is.",
                    err=True,
                )
        if json_file is not None:
            try:
                with open(json_file, "w") as file:
                    report.as_json(outcomes, given(errands), file)
            except OSError as error:
                raise ZmlError(
                    USAGE, f"--json {json_file}: {error.strerror}", "Name a file that can be written."
                ) from None
    if plot_file is not None:
        plot.plot(outcomes, Path(plot_file))
    return 0


def must_be_writable(flag: str, file: str) -> None:
    """Without touching it: what fails later leaves no empty file. Raises ZmlError."""
    path = Path(file)
    folder = path.parent
    if path.is_dir():
        because = "it is a folder"
    elif not folder.is_dir():
        because = f"there is no folder {folder}"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        because = "it may not be written" if path.exists() else f"{folder} may not be written to"
    else:
        return
    raise ZmlError(USAGE, f"{flag} {file}: {because}", "Name a file that can be written.")


def read_curves(files: tuple[str, ...]) -> dict[str, Calibrated]:
    from ..simulate import curves

    found = [curves.read(Path(file)) for file in files]
    return {calibrated.name: calibrated for calibrated in found}


def read_seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ZmlError(USAGE, f"--seeds {text} is no list of whole numbers", "As in --seeds 0,1,2.") from None


def given(errands: list[Errand]) -> dict[str, object]:
    first = errands[0]
    return {
        "gpus_per_node": first.gpus_per_node,
        "nodes": first.nodes,
        "restart_s": first.restart_s,
        "round_s": first.round_s,
        "noise": first.noise,
        "autoscale": None if first.autoscale is None else [first.autoscale.low, first.autoscale.high],
    }


def run_all(errands: list[Errand], processes: int) -> Iterable[Outcome]:
    if processes == 1 or len(errands) == 1:
        yield from map(run_one, errands)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(min(processes, len(errands)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(run_one, errands)


def run_one(errand: Errand) -> Outcome:
    from ..scheduler.cluster.policies import POLICIES, RANKS
    from ..simulate import engine, measured, report, workloads

    path = Path(errand.workload)
    folder = Path(errand.profiles) if errand.profiles is not None else path.parent.parent / "traces"
    library = measured.Library(folder) if errand.profiles is not None or folder.is_dir() else None
    rules = engine.Rules(
        round_s=errand.round_s, restart_s=errand.restart_s, gpus_per_node=errand.gpus_per_node
    )
    jobs = workloads.jobs(
        workloads.read(path, errand.limit),
        library,
        errand.adapts,
        seed=errand.seed,
        noise=errand.noise,
        curves=read_curves(errand.curves),
    )
    fleet = None if errand.autoscale is None else engine.Autoscaler(errand.autoscale, errand.gpus_per_node)
    simulation = engine.Simulation(
        jobs,
        POLICIES[errand.policy],
        1 if fleet is not None else errand.nodes,
        rules,
        fleet,
        RANKS[errand.policy],
    )
    simulation.run()
    return report.sum_up(simulation, path.stem, errand.policy, errand.seed, errand.nodes)
