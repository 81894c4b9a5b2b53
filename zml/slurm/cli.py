"""`zml slurm script|submit|head`: the command line of a job in an allocation of Slurm.

Rule: what `script` prints is what `submit` hands in, and the `head` inside it takes the same flags of the job as `zml
run` does; they are checked when the script is written, not when the job has waited a night in the queue.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from ..commands.flags import CHECKPOINT_FLAGS, JOB_FLAGS, RESTART_FLAGS, SCRIPT, flags, must_exist, settle
from ..config import Resolved
from ..errors import USAGE, ZmlError
from .script import Script
from .shape import Needs, Shape, megabytes, node_range

F = TypeVar("F", bound=Callable[..., Any])

# Of sbatch; whatever it has beside them goes through --sbatch.
SBATCH = {
    "partition": "NAME",
    "time": "TIME",
    "account": "NAME",
    "qos": "NAME",
    "constraint": "FEATURES",
    "array": "INDICES",
    "nodelist": "NODES",
    "exclude": "NODES",
    "reservation": "NAME",
    "dependency": "WHAT",
    "begin": "TIME",
    "mail-type": "WHEN",
    "mail-user": "WHOM",
    "job-name": "NAME",
    "output": "FILE",
}
# Of srun, with the plugin pyxis: each step runs in the container, the batch script does not.
CONTAINER = ("container-image", "container-mounts", "container-workdir", "container-name")


def passed_on(names: Mapping[str, str], help: str) -> Callable[[F], F]:
    """An option for each name; they differ in nothing."""
    return flags(*(click.option(f"--{name}", metavar=metavar, help=help) for name, metavar in names.items()))


SHAPE_FLAGS = flags(
    click.option("--workers-per-node", type=click.IntRange(min=1), metavar="K", help="Instead of -w."),
    click.option(
        "--cpus-per-worker", type=click.IntRange(min=1), default=2, metavar="C", help="[default: 2]"
    ),
    click.option("--mem-per-worker", default="4G", metavar="SIZE", help="[default: 4G]"),
    click.option(
        "--gpus-per-worker", type=int, default=0, metavar="G", help="0 or 1.  [default: 0, the CPU]"
    ),
    click.option("--cpus-per-shard", type=click.IntRange(min=1), default=1, metavar="C", help="[default: 1]"),
    click.option("--mem-per-shard", default="4G", metavar="SIZE", help="[default: 4G]"),
)
LIFE_FLAGS = flags(
    click.option("--join", metavar="RUN", help="Only bring workers into this run, which is going on."),
    click.option(
        "--requeue/--no-requeue", default=True, help="After SIGTERM: let Slurm run it again, or exit with 75."
    ),
    click.option("--interface", default="", metavar="NAME", help="The network to use, ib0 say."),
    click.option("--python", metavar="PATH", help="Of every step.  [default: this one]"),
    click.option("--srun", "srun", multiple=True, metavar="OPTION", help="One more option of every step."),
    click.option("--runs", metavar="FOLDER", help="On a file system that all nodes share.  [default: runs]"),
    click.option("--job", metavar="NAME", help="The job's name.  [default: job]"),
    click.option(
        "--keys", metavar="FOLDER", help="With --join: keys of the run, if it is not a job of Slurm."
    ),
    click.option("--config", metavar="FILE", help="Settings.  [default: zml.toml, if it is there]"),
    click.option(
        "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[default: info]"
    ),
    click.option(
        "--keep-output",
        type=click.Choice(["first", "all", "none"]),
        help="Whose lines to show.  [default: first]",
    ),
)
WRITE_FLAGS = flags(
    click.option("-N", "--nodes", metavar="N", help="Or the least and the most: 2-4.  [default: 1]"),
    passed_on(SBATCH, "As of sbatch."),
    click.option("--sbatch", "sbatch", multiple=True, metavar="OPTION", help="Any other option of sbatch."),
    passed_on(dict.fromkeys(CONTAINER, "WHAT"), "As of srun with pyxis, for every step."),
    click.option("--setup", multiple=True, metavar="LINE", help="A line of shell before it: module load ..."),
    SHAPE_FLAGS,
    JOB_FLAGS,
    CHECKPOINT_FLAGS,
    RESTART_FLAGS,
    LIFE_FLAGS,
    click.argument("script", required=False, default=""),
    click.argument("args", nargs=-1, type=click.UNPROCESSED),
)


@click.command("script", context_settings=SCRIPT)
@WRITE_FLAGS
@click.pass_context
def script_(context: click.Context, /, **given: Any) -> int:
    """Print an sbatch script that trains SCRIPT in one allocation.

    Each member is a step of its own. What dies is started again; SIGTERM, which Slurm sends two minutes before the
    time limit and when it preempts, ends in a checkpoint and a requeue that goes on from there. Edit it as you like.
    """
    click.echo(written(context, given).text(), nl=False)
    return 0


@click.command(context_settings=SCRIPT)
@WRITE_FLAGS
@click.option("--json", "as_json", is_flag=True, help="Print id, log and run directory, for programs.")
@click.pass_context
def submit(context: click.Context, /, as_json: bool, **given: Any) -> int:
    """Hand that script to sbatch."""
    from . import commands

    made = written(context, given)
    job = commands.submit(made.text())
    log = dict(made.options).get("output") or ("%x-%A_%a.out" if given["array"] else "%x-%j.out")
    name = dict(made.options).get("job-name") or made.name
    log = log.replace("%x", name).replace("%j", job).replace("%A", job)
    runs = settle(of_the_job(given)).settings.runs
    folder = Path(runs) / f"slurm-{job}{'_%a' if given['array'] else ''}"
    if as_json:
        about = {"id": job, "log": log, "run_dir": given["join"] or str(folder)}
        click.echo(json.dumps(about, indent=2))
        return 0
    click.echo(f"job {job}")
    click.echo(f"log     {log}")
    if given["join"]:
        click.echo(f"watch   squeue --jobs {job}")
    else:
        click.echo(f"watch   zml status --keys {folder}/keys {folder}/now")
    click.echo(
        f"stop    scancel --signal=TERM {job}        with a checkpoint; scancel {job} ends it within seconds"
    )
    return 0


@click.command(context_settings=SCRIPT)
@SHAPE_FLAGS
@JOB_FLAGS
@CHECKPOINT_FLAGS
@RESTART_FLAGS
@LIFE_FLAGS
@click.argument("script", required=False, default="")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def head(script: str, args: tuple[str, ...], **given: Any) -> int:
    """What such a script runs: the batch step of an allocation.

    It starts the members with srun, and ends with the exit code of the job; 75 means: safe to run again.
    """
    from .leading import Asked, lead

    resolved, shape = understood({**given, "script": script})
    asked = Asked(
        resolved=resolved,
        shape=shape,
        script=script,
        args=args,
        join=given["join"] or "",
        python=given["python"] or sys.executable,
        interface=given["interface"],
        requeue=given["requeue"],
        srun=given["srun"],
    )
    return lead(asked, os.environ)


COMMANDS = {"script": script_, "submit": submit, "head": head}


# -- from flags to a script --------------------------------------------------------------------------------

# Of these flags none is a setting of the job.
OTHERS = {
    "workers_per_node",
    "cpus_per_worker",
    "mem_per_worker",
    "gpus_per_worker",
    "cpus_per_shard",
    "mem_per_shard",
}
OTHERS |= {"join", "requeue", "interface", "python", "srun", "nodes", "sbatch", "setup", "script", "args"}
OTHERS |= {name.replace("-", "_") for name in (*SBATCH, *CONTAINER)}


def of_the_job(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in OTHERS}


def understood(given: Mapping[str, Any]) -> tuple[Resolved, Shape]:
    """Raises ZmlError for what cannot be."""
    resolved = settle(of_the_job(given))
    settings = resolved.settings
    if given["join"] and given["script"]:
        raise ZmlError(
            USAGE, "--join brings workers into a run, which has its script", "Leave the script out."
        )
    if not given["join"]:
        if not given["script"]:
            raise ZmlError(USAGE, "there is no script to train", "`zml slurm script --help` shows how.")
        must_exist(given["script"])
    if given["workers_per_node"] and resolved.origins["workers"] == "flag":
        raise ZmlError(USAGE, "--workers and --workers-per-node exclude each other", "Give one of them.")
    if not 0 <= given["gpus_per_worker"] <= 1:
        raise ZmlError(
            USAGE,
            f"--gpus-per-worker {given['gpus_per_worker']}: a worker computes on one GPU, or on the CPU",
            "Ask for a worker for each GPU.",
        )
    worker = Needs(
        cpus=given["cpus_per_worker"],
        memory_mb=megabytes(given["mem_per_worker"], "--mem-per-worker"),
        gpus=given["gpus_per_worker"],
    )
    shard = Needs(
        cpus=given["cpus_per_shard"], memory_mb=megabytes(given["mem_per_shard"], "--mem-per-shard")
    )
    shape = Shape(
        workers=settings.workers,
        shards=0 if given["join"] else settings.shards,
        worker=worker,
        shard=shard,
        workers_per_node=given["workers_per_node"] or 0,
    )
    return resolved, shape


def written(context: click.Context, given: Mapping[str, Any]) -> Script:
    """The script, from the parameters of a command. Raises ZmlError."""
    resolved, shape = understood(given)
    least, most = node_range(given["nodes"] or "1")
    settings, script, args = resolved.settings, given["script"], given["args"]
    workers, shards = shape.workers_on(least), settings.shards
    where = f"{given['nodes'] or 1} node{'s' if most > 1 else ''}"
    if given["join"]:
        title = f"Further workers for {given['join']}, on {where}. Made by `zml slurm script`; edit it as you like."
    else:
        title = f"{script} on {where}: {counted(shape, workers)}, {shards} shard{'s' if shards > 1 else ''}."
        title += " Made by `zml slurm script`; edit it as you like."
    more = [option(text) for text in given["sbatch"]]
    options = [(name, given[name.replace("-", "_")]) for name in SBATCH if given[name.replace("-", "_")]]
    inside = [
        f"--{name}={given[name.replace('-', '_')]}" for name in CONTAINER if given[name.replace("-", "_")]
    ]
    python = given["python"] or sys.executable
    parts = parts_of(context, given, inside)
    if script:
        parts.append(["--", script, *args])
    return Script(
        title=title,
        name="join" if given["join"] else Path(script).stem,
        nodes=given["nodes"] or "1",
        each=shape.per_node(least),
        requeue=given["requeue"],
        options=[*options, *more],
        setup=given["setup"],
        words=[python, "-P", "-m", "zml", "slurm", "head"],
        parts=parts,
        about=ABOUT_JOINING if given["join"] else ABOUT,
    )


ABOUT = "One step for each member; what dies is started again, and SIGTERM ends in a checkpoint."
ABOUT_JOINING = "One step for each worker; on SIGTERM they leave in order, and the job trains on."


def counted(shape: Shape, workers: int) -> str:
    if shape.workers_per_node:
        return f"{shape.workers_per_node} worker{'s' if shape.workers_per_node > 1 else ''} on each"
    return f"{workers} worker{'s' if workers > 1 else ''}"


def option(text: str) -> tuple[str, str]:
    """`--comment=why` or `comment=why`, as name and value. Raises ZmlError."""
    name, _, value = text.removeprefix("--").partition("=")
    if (text.startswith("-") and not text.startswith("--")) or not name.strip() or " " in name:
        raise ZmlError(
            USAGE, f"--sbatch {text!r} is no long option of sbatch", "Write --sbatch=--comment=why."
        )
    return name, value


# What the batch script says to `head` again: all flags of the job, and of Slurm those that speak of steps.
NOT_FOR_THE_HEAD = {"nodes", "sbatch", "setup", "script", "args", "as_json"}
NOT_FOR_THE_HEAD |= {name.replace("-", "_") for name in (*SBATCH, *CONTAINER)}


def parts_of(context: click.Context, given: Mapping[str, Any], inside: Sequence[str]) -> list[list[str]]:
    """The flags that were given, as they are written, one after the other."""
    parts = []
    for parameter in context.command.params:
        name = parameter.name or ""
        if not isinstance(parameter, click.Option) or name in NOT_FOR_THE_HEAD:
            continue
        source = context.get_parameter_source(name)
        if source is None or source is not click.core.ParameterSource.COMMANDLINE:
            continue
        value, flag = given[name], parameter.opts[-1]
        if parameter.is_flag:
            written = flag if value else (parameter.secondary_opts or [""])[0]
            parts += [[written]] if written else []
        elif parameter.multiple:
            parts += [[f"{flag}={each}"] for each in value]
        else:
            parts.append([flag, str(value)])
    return parts + [[f"--srun={text}"] for text in inside]
