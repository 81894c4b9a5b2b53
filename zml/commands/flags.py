"""Flags that several commands share, and how they become settings. It reads the environment for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from ..config import COORDINATOR_ADDRESS, Resolved, resolve
from ..errors import NO_SCRIPT, USAGE, ZmlError

F = TypeVar("F", bound=Callable[..., Any])

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
SCRIPT = {**CONTEXT, "allow_interspersed_args": False}  # what follows the script is the script's


class InOrder(click.Group):
    """Lists its commands in the order of its file, the first to try first."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def flags(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several click options as one decorator, in the order in which help shows them."""

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


TRAINING_FLAGS = flags(
    click.option("--sync", is_flag=True, help="Every step waits for all workers (BSP). This is the default."),
    click.option(
        "--staleness", type=int, metavar="N", help="A worker may be N steps ahead of the slowest (SSP)."
    ),
    click.option("--async", "asynchronous", is_flag=True, help="Nobody waits for anybody."),
    click.option(
        "--compress",
        metavar="HOW",
        help="How gradients travel: none, bf16, topk:1%, topk:1%:int4, auto.  [default: none]",
    ),
    click.option(
        "--local-steps", type=int, metavar="H", help="Exchange after H optimizer steps.  [default: 1]"
    ),
    click.option(
        "--optimizer-on",
        type=click.Choice(["auto", "shard", "worker"]),
        help="Who runs the optimizer.  [default: auto, the worker with topk and local steps]",
    ),
    click.option(
        "--outer-lr",
        type=float,
        metavar="X",
        help="Learning rate with which shards apply the workers' averaged updates (topk, local steps).",
    ),
    click.option(
        "--outer-momentum", type=float, metavar="X", help="Nesterov momentum of those updates.  [default: 0]"
    ),
    click.option(
        "--warm-up-steps",
        type=int,
        metavar="N",
        help="Steps over which topk goes from 25 % to its density.  [default: 5 % of the run]",
    ),
    click.option(
        "--residual-decay",
        type=float,
        metavar="X",
        help="Factor applied to unsent updates at each exchange; 1 keeps all.  [default: 1]",
    ),
    click.option(
        "--lr-scaling",
        type=click.Choice(["none", "linear", "sqrt"]),
        help="In sync: the learning rate follows the workers' number, from the -w asked for.  [default: none]",
    ),
    click.option(
        "--lr-warm-up-steps",
        type=int,
        metavar="N",
        help="Updates over which it grows to more workers.  [default: 0]",
    ),
    click.option(
        "--staleness-damping",
        is_flag=True,
        default=None,
        help="With a bound or async: divide the rate by the updates that a gradient is late.",
    ),
    click.option(
        "--on-bad-batch",
        type=click.Choice(["stop", "skip"]),
        help="When a batch crashes scripts, or its gradient is not finite.  [default: stop]",
    ),
)
JOB_FLAGS = flags(
    click.option("-w", "--workers", type=int, metavar="N", help="Workers to wait for.  [default: 1]"),
    click.option("-p", "--shards", type=int, metavar="M", help="Parameter-server shards.  [default: 1]"),
    click.option(
        "--replicas",
        type=int,
        metavar="R",
        help="Backups of each shard, 0 or 1: one takes over where a shard dies.  [default: 0]",
    ),
    TRAINING_FLAGS,
)
MEMBER_FLAGS = flags(
    click.option(
        "--coordinator",
        multiple=True,
        metavar="ADDR",
        help=f"Where the coordinator listens; may be repeated.  [default: {COORDINATOR_ADDRESS}]",
    ),
)
RESTART_FLAGS = flags(
    click.option(
        "--worker-restarts",
        type=int,
        metavar="N",
        help="Times per hour that a killed script is restarted.  [default: 3]",
    ),
    click.option(
        "--restart-on-error", is_flag=True, default=None, help="Also restart after a Python exception."
    ),
)
TRACKER_FLAG = click.option(
    "--tracker",
    "trackers",
    multiple=True,
    metavar="NAME",
    help="tensorboard, wandb, mlflow, package.module:Class or none; may be repeated.  [default: tensorboard]",
)
RESUME_FLAG = click.option(
    "--resume", metavar="RUN", help="Begin with a run's newest checkpoint, or with the one that is named."
)
KEEPING_FLAGS = flags(
    click.option("--checkpoint-steps", type=int, metavar="N", help="Checkpoint every N steps."),
    click.option(
        "--checkpoint-minutes",
        type=float,
        metavar="T",
        help="Checkpoint every T minutes; 0: never.  [default: 10]",
    ),
    click.option("--keep-last", type=int, metavar="N", help="Checkpoints that stay.  [default: 3]"),
    click.option(
        "--keep-every",
        "keep_every_steps",
        type=click.IntRange(min=0),
        metavar="STEPS",
        help="And the first of every so many steps.  [default: 0, none]",
    ),
)
CHECKPOINT_FLAGS = flags(RESUME_FLAG, KEEPING_FLAGS)
HTTP_FLAGS = flags(
    click.option(
        "--http",
        metavar="HOST:PORT",
        help="Answer /metrics, health and people here, or off.  [default: 127.0.0.1, 7078 or another port]",
    ),
    click.option(
        "--http-tokens",
        "--tokens",
        "http_tokens",
        metavar="FILE",
        help="Who may ask from other machines; needed beyond 127.0.0.1.",
    ),
)
KEY_FLAG = click.option("--keys", metavar="FOLDER", help="CURVE keys, made by `zml keys`.")
BIND_FLAG = click.option("--bind", multiple=True, metavar="ADDR", help="Listen here; may be repeated.")
CLUSTER_FLAGS = flags(
    click.option("--cluster", metavar="FOLDER", help="Serve many jobs; all state is in FOLDER."),
    click.option(
        "--policy",
        metavar="NAME",
        help="Of --cluster: who goes first: zml (default), fifo, srtf, las or static.",
    ),
    click.option("--users", metavar="FILE", help="Of --cluster: quotas and shares of users, as TOML."),
    click.option(
        "--pool", metavar="FILE", help="Of --cluster: nodes that come and go with the jobs, as TOML."
    ),
    click.option(
        "--keep-jobs",
        type=click.IntRange(min=0),
        metavar="N",
        help="Of --cluster: jobs that are over go, with their files, but for the newest N.  [default: all stay]",
    ),
    click.option(
        "--keep-days",
        type=click.FloatRange(min=0),
        metavar="DAYS",
        help="Of --cluster: they stay for so long at least.",
    ),
)
# Of `zml coordinator`, what is for a cluster too.
OF_CLUSTERS = frozenset(
    "cluster policy users pool keep_jobs keep_days bind keys http http_tokens config log_level trace"
    " script args".split()
)
PLACE_FLAGS = flags(
    click.option("--run-dir", metavar="FOLDER", help="The run directory.  [default: a new one below ./runs]"),
    click.option("--job", metavar="NAME", help="The job's name.  [default: job]"),
    click.option("--config", metavar="FILE", help="Settings.  [default: zml.toml, if it is there]"),
    click.option(
        "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[default: info]"
    ),
    click.option(
        "--trace",
        metavar="1/N",
        help="OpenTelemetry traces of one step in N and of slow and failed ones; slow: of those alone; off.",
    ),
)
# Of whoever starts a whole cluster on this machine, with a script or with a run to go on with.
LOCAL_FLAGS = flags(
    KEEPING_FLAGS,
    click.option("--cpu", is_flag=True, help="No GPUs, even if there are some."),
    click.option(
        "--keep-output",
        type=click.Choice(["first", "all", "none"]),
        help="Whose printed lines to show.  [default: first]",
    ),
    RESTART_FLAGS,
    HTTP_FLAGS,
    TRACKER_FLAG,
    PLACE_FLAGS,
)


def only(allowed: Set[str], beside: str, fix: str) -> None:
    """Refuse the flags of this command that do nothing beside that one."""
    here = click.get_current_context()
    for each in here.command.params:
        source = here.get_parameter_source(each.name or "")
        if each.name not in allowed and source is ParameterSource.COMMANDLINE:
            raise ZmlError(USAGE, f"{max(each.opts, key=len)} does nothing with {beside}", fix)


def settle(given: Mapping[str, Any]) -> Resolved:
    """Settings from a command's parameters: those that are None, empty or False were not given."""
    named = named_by(given)
    file = named.pop("config", None)
    resolved = resolve(named, os.environ, file)
    if "trace" in given and resolved.settings.trace != "off":
        from ..tracing.process import require

        require(resolved.settings.trace)
    return resolved


def named_by(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that flags say, by their keys."""
    named = {
        key: value for key, value in given.items() if not (value is None or value is False or value == ())
    }
    if len(named.keys() & {"sync", "staleness", "asynchronous"}) > 1:
        raise ZmlError(USAGE, "--sync, --staleness and --async exclude each other", "Give one of them.")
    if named.pop("sync", False):
        named["staleness"] = 0
    if named.pop("asynchronous", False):
        named["staleness"] = "async"
    return named


def devices(resolved: Resolved, cpu: bool) -> list[str]:
    """One for each worker."""
    from .. import gpu

    workers = resolved.settings.workers
    return ["cpu"] * workers if cpu else gpu.share_out(workers, gpu.found(), os.environ)


def must_exist(script: str) -> None:
    if not Path(script).is_file():
        what = "is a folder" if Path(script).is_dir() else "does not exist"
        raise ZmlError(NO_SCRIPT, f"the script {script} {what}", f"The working folder is {os.getcwd()}.")
