"""`zml node`; and what `zml coordinator --cluster` needs to know."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..address import PORT
from ..config import Resolved
from ..errors import USAGE, ZmlError
from .flags import CONTEXT, HTTP_FLAGS, KEY_FLAG, MEMBER_FLAGS, PLACE_FLAGS, settle

MB = 1 << 20


def own_address(coordinator: Sequence[str]) -> str:
    """By which of this machine's addresses others reach it: that by which it reaches the coordinator."""
    for address in coordinator:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        if address.startswith("tcp://") and not host.startswith("127."):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
                try:
                    probe.connect((host.strip("[]"), int(port)))
                    return str(probe.getsockname()[0])
                except OSError as error:
                    raise ZmlError(USAGE, f"{address} cannot be reached: {error.strerror}") from None
    return "127.0.0.1"


def memory_mb() -> int:
    """What this machine has, of which a tenth is left to others."""
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 0.9) // MB


def offer(
    settings: Any,
    *,
    name: str,
    gpus: int | None,
    cpus: int | None,
    memory: int | None,
    rack: str,
    cost_per_hour: float,
) -> int:
    """Run `zml node`."""
    from .. import gpu
    from ..cluster.node import serve
    from ..scheduler.cluster.resources import Resources

    found = len(gpu.found())
    if gpus is not None and gpus > found:
        raise ZmlError(USAGE, f"--gpus {gpus}: this machine has {found}", "Offer no more than there are.")
    offers = Resources(
        cpus=cpus if cpus is not None else len(os.sched_getaffinity(0)),
        gpus=gpus if gpus is not None else found,
        memory_mb=memory if memory is not None else memory_mb(),
    )
    address = own_address(settings.coordinator)
    return serve(settings, name, offers, rack=rack, cost_per_hour=cost_per_hour, address=address)


def serve_cluster(
    resolved: Resolved,
    folder: str,
    *,
    policy: str | None,
    users: str | None,
    pool: str | None,
    keep_jobs: int | None,
    keep_days: float | None,
) -> int:
    """Run `zml coordinator --cluster`."""
    from ..cluster.pool import read_pool
    from ..cluster.serving import Plan, read_users, serve
    from ..logs import outlets as logs
    from ..scheduler.cluster.policies import DEFAULT, POLICIES
    from ..scheduler.cluster.retention import Keep

    settings = resolved.settings
    if settings.http == "off":
        what = f"http = off ({resolved.origins['http']}) with --cluster: jobs come by HTTP"
        raise ZmlError(USAGE, what, "Leave it out, or give HOST:PORT.")
    path = Path(folder).absolute()
    try:
        (path / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZmlError(USAGE, f"cannot write to {path}: {error.strerror}", "Choose another folder.") from None
    chosen = policy or DEFAULT
    if chosen not in POLICIES:
        raise ZmlError(USAGE, f"there is no policy {chosen}", f"Choose one of: {', '.join(POLICIES)}.")
    quotas, shares = read_users(Path(users) if users else None)
    logs.configure("coordinator", "cluster", folder=path / "logs", run="", level=settings.log_level)
    plan = Plan(
        policy=chosen,
        http=f"127.0.0.1:{PORT}" if resolved.origins["http"] == "default" else settings.http,
        tokens=settings.http_tokens or None,
        quotas=quotas,
        shares=shares,
        pool=read_pool(Path(pool)) if pool else None,
        keep=Keep(jobs=keep_jobs, days=keep_days),
    )
    return serve(settings, path, plan, lambda text: click.echo(text, err=True))


@click.command(context_settings=CONTEXT)
@MEMBER_FLAGS
@click.option("--name", default="", metavar="NAME", help="What to call it.  [default: the host's name]")
@click.option("--gpus", type=click.IntRange(min=0), metavar="N", help="[default: all there are]")
@click.option("--cpus", type=click.IntRange(min=1), metavar="N", help="[default: all there are]")
@click.option(
    "--memory-mb", "memory", type=click.IntRange(min=1), metavar="N", help="[default: nine tenths of it]"
)
@click.option("--rack", default="", metavar="NAME", help="Machines of one rack have fast links.")
@click.option("--cost-per-hour", type=float, default=0.0, metavar="X", help="For the autoscaler.")
@click.option("--pool", is_flag=True, help="It was asked for by an autoscaler, which may let it go.")
@KEY_FLAG
@HTTP_FLAGS
@PLACE_FLAGS
def node(
    name: str,
    gpus: int | None,
    cpus: int | None,
    memory: int | None,
    rack: str,
    cost_per_hour: float,
    pool: bool,
    **given: Any,
) -> int:
    """Offer this machine to a coordinator of many jobs.

    It starts workers and shards when it is told to. SIGTERM, SIGUSR1 or Ctrl-C: what runs here leaves in order, then
    it ends; a second signal ends everything at once.
    """
    from ..cluster.nodes import POOLED
    from ..logs import outlets as logs

    settings = settle(given).settings
    if pool and not name:
        name = f"{POOLED}{os.environ.get('SLURM_JOB_ID') or socket.gethostname()}-{os.getpid()}"
    logs.configure("node", name or "node", folder=Path(settings.runs, "nodes"), level=settings.log_level)
    return offer(
        settings, name=name, gpus=gpus, cpus=cpus, memory=memory, rack=rack, cost_per_hour=cost_per_hour
    )
