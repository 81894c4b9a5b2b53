"""The commands. Only here and in `flags` is the environment read, and only here do errors become exit codes.

Rule: nothing heavy is imported before a command needs it: `zml --help` loads neither torch nor zmq. What a
person did wrong is one line that begins with "error:" and one that says what to do, never a traceback.
"""

import errno
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__, errors
from ..config import ANY_PORT
from ..errors import INTERRUPTED, USAGE, ZmlError
from ..trackers.naming import must_be_here
from . import guess
from .ckpt import ckpt
from .cluster import node
from .completion import VARIABLE, teach
from .dashboard import dashboard, report
from .data import data
from .flags import (
    BIND_FLAG,
    CHECKPOINT_FLAGS,
    CLUSTER_FLAGS,
    CONTEXT,
    HTTP_FLAGS,
    JOB_FLAGS,
    KEY_FLAG,
    LOCAL_FLAGS,
    MEMBER_FLAGS,
    OF_CLUSTERS,
    PLACE_FLAGS,
    RESTART_FLAGS,
    RESUME_FLAG,
    SCRIPT,
    TRACKER_FLAG,
    InOrder,
    devices,
    must_exist,
    only,
    settle,
)
from .help import completion, doctor, explain, stack
from .jobs import job, jobs, nodes, submit
from .look import events, logs
from .obs import obs
from .runs import compare, runs
from .simulate import simulate
from .slurm import slurm
from .timeline import timeline
from .top import top

if TYPE_CHECKING:
    from ..config import Settings


# -- commands --------------------------------------------------------------------------------------------


@click.group(cls=InOrder, context_settings=CONTEXT, invoke_without_command=True)
@click.version_option(__version__, message="zml %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """Trains PyTorch models on machines that come and go.

    \b
    zml run -w 4 -p 2 train.py --lr 0.1      a whole cluster on this machine
    zml coordinator -w 4 -p 2 train.py       the same by hand, on many:
    zml ps --shard 0 --coordinator ADDR      a shard here,
    zml worker --gpu 0 --coordinator ADDR    a worker there
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command("run", context_settings=SCRIPT)
@JOB_FLAGS
@RESUME_FLAG
@LOCAL_FLAGS
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def run_(script: str, args: tuple[str, ...], cpu: bool, **given: Any) -> int:
    """Train SCRIPT on a whole cluster on this machine.

    It starts a coordinator, M shards and N workers, and leaves none behind.

    Ctrl-C lets the workers finish their step and save; a second one ends everything at once. The exit code is
    the job's: 0, or that of the script that failed first; 130 after Ctrl-C.
    """
    from ..launch import local

    resolved = settle(given)
    must_exist(script)
    must_be_here(resolved.settings.trackers)
    return local.run(resolved, script, list(args), devices(resolved, cpu), cpu=cpu)


@main.command(context_settings=CONTEXT)
@JOB_FLAGS
@LOCAL_FLAGS
@click.argument("run")
def resume(run: str, cpu: bool, **given: Any) -> int:
    """Go on with a run that has ended before its time.

    RUN is a run directory, one checkpoint in it, or the beginning or end of a run's name below ./runs. A run that was
    cut off (by kill -9, say) goes on in its directory where it stood, as long as this machine was not
    started anew. Else a new run goes on from the newest checkpoint that verifies, with the settings of the first;
    flags change them: another number of workers or shards, say. Finished epochs are skipped, and of the epoch that
    was open the batches that are in the parameters.
    """
    from ..launch import local
    from ..runs import finding
    from ..runs.resume import again

    named = settle(given)
    flags = {key: getattr(named.settings, key) for key, origin in named.origins.items() if origin == "flag"}
    place = Path(run) if finding.is_folder(Path(run)) else finding.find(run, Path(named.settings.runs))
    found = again(place, flags, os.environ, lambda skipped: click.echo(str(skipped), err=True))
    try:
        os.chdir(found.folder)
    except OSError as error:
        what = f"the run was started in {found.folder}, which cannot be entered: {error.strerror}"
        raise ZmlError(USAGE, what, "Start it with `zml run --resume CHECKPOINT SCRIPT ...`.") from None
    must_exist(found.script)
    must_be_here(found.resolved.settings.trackers)
    click.echo(f"resuming {found.words}", err=True)
    cpu = cpu or found.cpu
    found_devices = devices(found.resolved, cpu)
    return local.run(found.resolved, found.script, found.args, found_devices, cpu=cpu, cut_off=found.cut_off)


@main.command(context_settings=SCRIPT)
@JOB_FLAGS
@CHECKPOINT_FLAGS
@BIND_FLAG
@KEY_FLAG
@HTTP_FLAGS
@TRACKER_FLAG
@PLACE_FLAGS
@CLUSTER_FLAGS
@click.argument("script", required=False, default="")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def coordinator(script: str, args: tuple[str, ...], **given: Any) -> int:
    """The one process that decides.

    It runs until the job is over; its exit code is the job's. It listens on tcp://127.0.0.1:7077 unless
    --bind says otherwise. SCRIPT and its arguments are what the workers run; the path must lead to the
    script on each machine.

    With --cluster it serves many jobs, which come by `zml submit` and run on the machines where `zml node` runs,
    until a signal ends it; jobs go on meanwhile, and find it when it is started again.
    """
    from ..logs import outlets as log_files
    from ..runs import rundir
    from ..stack import answer_signal

    cluster = {key: given.pop(key) for key in ("policy", "users", "pool", "keep_jobs", "keep_days")}
    folder_of_many = given.pop("cluster")
    if folder_of_many is not None:
        only(OF_CLUSTERS, "--cluster", "Each job brings its own: `zml submit --help`.")
    resolved = settle(given)
    settings = resolved.settings
    if folder_of_many == "":
        raise ZmlError(USAGE, "--cluster is empty", "Give it a folder.")
    if folder_of_many is not None:
        from .cluster import serve_cluster

        if script:
            raise ZmlError(USAGE, "with --cluster there is no SCRIPT", "Submit it: `zml submit SCRIPT`.")
        return serve_cluster(resolved, folder_of_many, **cluster)
    if alone := [key for key, value in cluster.items() if value is not None]:
        raise ZmlError(
            USAGE, f"--{alone[0].replace('_', '-')} is for --cluster only", "Give both, or neither."
        )
    folder = Path(settings.run_dir).absolute()
    if not settings.run_dir or not (folder / rundir.CONFIG).exists():
        folder = rundir.create(resolved, script, args)
    settings = replace(settings, run_dir=str(folder))
    log_files.configure(
        "coordinator", "coordinator", folder=folder / rundir.LOGS, job=settings.job, level=settings.log_level
    )
    answer_signal(folder / rundir.LOGS, "coordinator")
    from ..coordinator.coordinating import job_spec, serve

    spec = job_spec(settings, script, args, os.getcwd() if script else "")
    try:
        return serve(settings, spec)
    except ZmlError:
        if not resolved.settings.run_dir:
            rundir.discard(folder)
        raise


@main.command(context_settings=CONTEXT)
@click.option("--shard", type=click.IntRange(min=0), required=True, metavar="K", help="Which shard, from 0.")
@MEMBER_FLAGS
@BIND_FLAG
@KEY_FLAG
@HTTP_FLAGS
@PLACE_FLAGS
def ps(shard: int, **given: Any) -> int:
    """A parameter-server shard.

    It holds some chunks of the parameters and runs the optimizer on them.

    It takes pushes on a port of 127.0.0.1 that the operating system chooses, unless --bind says otherwise:
    --bind tcp://10.0.0.2:0 lets the system choose a port of that address.
    """
    settings = settle(given).settings
    settings = replace(settings, bind=settings.bind or (ANY_PORT,))
    log_to_file(settings, "shard", f"p{shard}")
    from ..shard.serving import serve

    return serve(settings, shard)


@main.command(context_settings=SCRIPT)
@click.option(
    "--gpu", "gpu_index", type=click.IntRange(min=0), metavar="K", help="Use GPU K, as nvidia-smi counts."
)
@click.option("--cpu", is_flag=True, help="Use no GPU.")
@MEMBER_FLAGS
@click.option(
    "--name", default="", metavar="wK", help="Which worker to be.  [default: the coordinator chooses]"
)
@RESTART_FLAGS
@KEY_FLAG
@HTTP_FLAGS
@PLACE_FLAGS
@click.argument("script", required=False, default="")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def worker(
    gpu_index: int | None, cpu: bool, name: str, script: str, args: tuple[str, ...], **given: Any
) -> int:
    """A worker: computes gradients.

    It runs the script that the coordinator names, or SCRIPT. The GPU is the only one that the script sees, as cuda:0.

    SIGTERM, SIGUSR1: the script finishes its step, all that it has made counts, and the worker leaves; exit code 75,
    safe to run again. Ctrl-C does the same with exit code 130. A second signal stops the script at once.
    """
    from .. import gpu

    settings = settle(given).settings
    if cpu == (gpu_index is not None):
        there = ", ".join(str(each.index) for each in gpu.found()) or "none"
        raise ZmlError(
            USAGE, f"a worker takes either --gpu K or --cpu; GPUs here: {there}", "Give one of them."
        )
    device = "cpu" if gpu_index is None else gpu.device(gpu_index, gpu.found())
    if script:
        must_exist(script)
    log_to_file(settings, "worker", name or "worker")
    from ..agent.agent import serve

    return serve(settings, name, device, script, list(args))


@main.command(context_settings=CONTEXT)
@MEMBER_FLAGS
@KEY_FLAG
@click.option("--config", metavar="FILE", help="Settings.  [default: zml.toml, if it is there]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("run", required=False)
def status(run: str | None, as_json: bool, **given: Any) -> int:
    """What a job is doing.

    Without arguments: the run below ./runs that is going on, else the one at the default address, else the run below
    ./runs that began last. RUN is a path, or a run's name below ./runs, or the beginning or end of one; of a run that
    is over it shows how it ended.
    """
    import msgspec

    from ..runs import finding, rundir
    from ..text import console
    from ..text import report as ending
    from . import aim

    at = aim.take(run, given)
    folder = at.folder if run else None
    if folder is None and at.nobody_is_there():
        folder = finding.default(Path(at.settings.runs))
    found = finding.left(folder) if folder is not None else None
    if found is None:
        if folder is not None and rundir.listening(folder) is None:
            raise ZmlError(USAGE, f"{run or folder} holds no run that has begun", finding.LIST)
        from ..logs import outlets as log_files
        from ..observe import fetch_status

        log_files.silence()
        found = fetch_status(at.settings)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
        return 0
    from rich.console import Console

    out = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    out.print(console.block(found, out.width, unicode=out.encoding.startswith("utf"), full=True))
    if found.over or found.state == finding.CUT_OFF:
        ending.print_report(msgspec.structs.replace(found, run_dir=console.near(found.run_dir)), out)
    return 0


for _command in (dashboard, report, submit, jobs, job, nodes):
    main.add_command(_command)
for _command in (runs, top, logs, events, timeline, compare):
    main.add_command(_command)
main.add_command(ckpt)
main.add_command(data)
main.add_command(slurm)
main.add_command(node)
main.add_command(simulate)
main.add_command(obs)


@main.command(context_settings=CONTEXT)
@click.argument("folder")
@click.option(
    "--name",
    "names",
    multiple=True,
    metavar="NAME",
    help="A key of this name; may be repeated.  [default: coordinator and worker]",
)
def keys(folder: str, names: tuple[str, ...]) -> int:
    """Make CURVE keys for a cluster that several machines share.

    FOLDER gets a secret key per name, for its owner only, and authorized.toml, for everybody. Names that are
    already there stay; further names are added to them.
    """
    from ..link import LISTENER, WORKER
    from ..transport.errors import BadKeys
    from ..transport.keys import make_keys

    try:
        written = make_keys(folder, names or (LISTENER, WORKER))
    except (BadKeys, OSError) as error:
        raise ZmlError(errors.BAD_KEYS, str(error)) from None
    for path in written:
        whom = "for its owner only" if path.suffix == ".key" else "for every machine"
        click.echo(f"{path}  {whom}")
    click.echo(f"Give --keys {folder} to every role.")
    return 0


main.add_command(doctor)
main.add_command(stack)


@main.command(context_settings=CONTEXT)
@click.option("--json", "as_json", is_flag=True, help="For bug reports.")
def version(as_json: bool) -> int:
    """Versions of zml and of what it stands on."""
    from importlib import metadata

    found = {"zml": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "pyzmq", "msgpack", "msgspec", "uvloop", "lz4"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    click.echo(
        json.dumps(found) if as_json else "\n".join(f"{name:<8} {text}" for name, text in found.items())
    )
    return 0


main.add_command(explain)
main.add_command(completion)


@main.group(context_settings=CONTEXT)
def config() -> None:
    """Settings and where they come from."""


@config.command("show", context_settings=CONTEXT)
@click.option("--config", "file", metavar="FILE", help="Settings.  [default: zml.toml, if it is there]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(file: str | None, as_json: bool) -> int:
    """Every setting, its value, and the place that decided it."""
    resolved = settle({"config": file})
    if as_json:
        click.echo(json.dumps(resolved.as_json(), indent=2))
        return 0
    from ..text.settings import lines

    click.echo("\n".join(lines(resolved.as_json()["settings"], dict(resolved.origins))))
    return 0


# -- how a command ends ----------------------------------------------------------------------------------


def log_to_file(settings: "Settings", role: str, member: str) -> None:
    """Into the run directory if it is given, else into a new folder: the coordinator's may be on another machine."""
    import time

    from ..logs import outlets as log_files
    from ..runs import rundir
    from ..stack import answer_signal

    folder = Path(settings.run_dir or Path(settings.runs, rundir.new_name(member, time.time())))
    log_files.configure(
        role,
        member,
        folder=folder / rundir.LOGS,
        job=settings.job,
        level=settings.log_level,
        alone=not settings.run_dir,
    )
    if role == "shard":  # of a worker it is the script that may be stuck
        answer_signal(folder / rundir.LOGS, member)


def say_error(error: ZmlError) -> None:
    fix = error.fix or f"`zml explain {error.code}` says more."
    click.echo(f"error: {error.what} [{error.code}]\n  {fix}", err=True)


def run(argv: Sequence[str]) -> int:
    """Run a command; returns its exit code. What people did wrong is told in two lines, without a traceback."""
    if VARIABLE in os.environ:
        teach(main)
    try:
        result = main.main(args=list(argv), prog_name="zml", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except ZmlError as error:
        say_error(error)
        return error.exit_code
    except click.UsageError as error:
        say_error(ZmlError(USAGE, guess.said(error), guess.fix_of(error, main, argv)))
        return errors.BOOK[USAGE].exit_code
    except click.ClickException as error:
        say_error(ZmlError(USAGE, error.format_message()))
        return errors.BOOK[USAGE].exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        say_error(ZmlError(USAGE, f"the output cannot be written: {error.strerror}", "Make room for it."))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left of it is not tried again at the end
        return 1
