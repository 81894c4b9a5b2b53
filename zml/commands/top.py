"""`zml top`: which run or cluster is watched, and whether there is a terminal to watch it on."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UNREACHABLE, USAGE, ZmlError
from .flags import CONTEXT, KEY_FLAG, MEMBER_FLAGS, settle

if TYPE_CHECKING:
    from ..config import Resolved
    from ..top.source import Cluster, Source

WIDTH = 80  # off a terminal


@click.command(context_settings=CONTEXT)
@MEMBER_FLAGS
@click.option(
    "--server",
    metavar="URL",
    envvar="ZML_SERVER",
    help="Of a cluster of many jobs: where its coordinator answers.  [or ZML_SERVER]",
)
@click.option("--token", metavar="FILE", envvar="ZML_TOKEN", help="The file with your token.  [or ZML_TOKEN]")
@KEY_FLAG
@click.option("--config", metavar="FILE", help="Settings.  [default: zml.toml, if it is there]")
@click.option("--once", is_flag=True, help="One picture, and an end. Off a terminal it is always so.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1, max=3600),
    default=1.0,
    metavar="S",
    help="Seconds between two looks.  [default: 1]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, once.")
@click.argument("run", required=False)
def top(
    run: str | None,
    server: str | None,
    token: str | None,
    once: bool,
    interval: float,
    as_json: bool,
    **given: Any,
) -> int:
    """Watch a job live: its workers, its shards, what happens.

    RUN is a run directory, or a job of a cluster. Without it: the run below ./runs that is going on, else the jobs of
    the cluster that answers, else the run below ./runs that began last. ? in it says which keys there are.
    """
    from rich.console import Console

    from ..logs import outlets as logs
    from ..top.source import FIRST_S, Lookout
    from ..top.watching import main, speaks_unicode

    logs.silence()
    resolved = settle(given)
    source = chosen(run, server, token, resolved)
    lookout = Lookout(source, interval, lambda: None)
    lookout.start()
    try:
        first = lookout.take(FIRST_S)
        if first is None or (first.status is None and (first.jobs is None or first.trouble)):
            what = first.trouble if first is not None else "nothing answers"
            raise ZmlError(
                UNREACHABLE, what, "Name a run directory, an address or a cluster: `zml top --help`."
            )
        out = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)
        unicode = speaks_unicode(os.environ, out.encoding)
        terminal = sys.stdout.isatty() and out.is_terminal and not out.is_dumb_terminal
        if not as_json and not once and terminal and sys.stdin.isatty():
            live = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
            return main(lookout, first, live, unicode=unicode)
        picture(first, out, as_json=as_json, unicode=unicode, width=out.width if terminal else WIDTH)
        return 0
    finally:
        lookout.stop()


def picture(first: Any, out: Any, *, as_json: bool, unicode: bool, width: int) -> None:
    import time

    import msgspec

    from ..top.known import Known
    from ..top.picture import plain

    known = Known()
    known.take(first)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(known.as_json())).decode())
        return
    for line in plain(known, width, unicode=unicode, now=time.time()):
        out.print(line)


def chosen(run: str | None, server: str | None, token: str | None, resolved: Resolved) -> Source:
    """What is watched. Raises ZmlError."""
    from ..runs import finding
    from ..top.source import Run

    settings = resolved.settings
    if run is not None:
        runs = Path(settings.runs)
        if (folder := finding.at(Path(run)) or finding.at(runs / run)) is not None:
            return Run(settings, folder)
        if Path(run).exists() or os.sep in run:
            raise ZmlError(USAGE, f"{run} holds no run", finding.LIST)
        cluster = cluster_at(server, token, resolved)
        try:
            return cluster.run_of(run)
        except ZmlError as error:
            if error.code != UNREACHABLE:
                raise
            with suppress(ZmlError):  # no job's: the beginning or the end of a run's name
                return Run(settings, finding.find(run, runs))
            if server is not None:
                raise ZmlError(USAGE, f"there is no run {run}, and {error.what}", error.fix) from None
        return Run(settings, finding.find(run, runs))  # raises: nobody has said a word of a cluster
    if server is not None:
        return cluster_at(server, token, resolved)
    if resolved.origins["coordinator"] != "default":
        return Run(settings, None)
    running = finding.running(Path(settings.runs))
    if running:
        return Run(settings, running[0])
    cluster = cluster_at(server, token, resolved)
    try:
        cluster.client.nodes()
        return cluster
    except ZmlError as error:
        if error.code != UNREACHABLE:
            raise
    newest = finding.newest(Path(settings.runs))
    return Run(settings, newest) if newest is not None else Run(settings, None)


def cluster_at(server: str | None, token: str | None, resolved: Resolved) -> Cluster:
    from ..cluster.client import DEFAULT_SERVER, Client
    from ..top import source
    from .jobs import read_token, who

    client = Client(server or DEFAULT_SERVER, token=read_token(token) if token else "", user=who())
    return source.Cluster(client, resolved.settings)
