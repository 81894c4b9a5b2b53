"""`zml dashboard` and `zml report`: a run in a browser, and as one file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import NOT_WRITTEN, USAGE, ZmlError
from .flags import CONTEXT, settle

if TYPE_CHECKING:
    from ..dashboard.sources import Source

PORT = 7079


def source_at(run: str | None) -> Source:
    """What RUN names, or all the runs in the folder that it is; without it, those below the folder of the settings.
    Raises ZmlError."""
    from ..dashboard.sources import OneRun, source_of
    from ..runs import finding

    runs = Path(settle({}).settings.runs)
    found = source_of(runs if run is None else Path(run))
    if found is not None:
        return found
    if run is None:
        raise ZmlError(USAGE, f"there is no folder {runs}", "Start a run with `zml run`, or name a folder.")
    return OneRun(finding.find(run, runs))


@click.command(context_settings=CONTEXT)
@click.option(
    "--port", type=click.IntRange(0, 65_535), metavar="N", help="[default: 7079, or another that is free]"
)
@click.option(
    "--host", default="127.0.0.1", metavar="HOST", help="Where to listen; beyond this machine, with --tokens."
)
@click.option("--tokens", metavar="FILE", help="Who may look: a token on each line.")
@click.option("--open", "open_", is_flag=True, help="Open a browser.")
@click.option("--json", "as_json", is_flag=True, help="Say where it is as JSON.")
@click.argument("run", required=False)
def dashboard(
    run: str | None, port: int | None, host: str, tokens: str | None, open_: bool, as_json: bool
) -> int:
    """Look at a run in a browser, while it goes on or later.

    RUN is a run directory or the name of one below ./runs, or a folder of runs; without it, ./runs. It reads files
    only: nothing needs to run but this. Ctrl-C ends it.
    """
    from ..dashboard.standing import look
    from ..logs import outlets as logs
    from ..web.access import Door, read_tokens

    source = source_at(run)
    logs.silence()
    door = Door(host, read_tokens(tokens) if tokens else ())

    def say(url: str) -> None:
        if as_json:
            click.echo(json.dumps({"url": url, "showing": source.about().title}))
        else:
            click.echo(f"{source.about().title}\n  {url}\n  Ctrl-C ends it.")
        if open_:
            click.launch(url)

    return look(source, door, host, port if port is not None else PORT, port is not None, say)


@click.command(context_settings=CONTEXT)
@click.option("-o", "--output", metavar="FILE", help="[default: the run's name with .html]")
@click.option("--json", "as_json", is_flag=True, help="Say what was written as JSON.")
@click.argument("run", required=False)
def report(run: str | None, output: str | None, as_json: bool) -> int:
    """Write a run's dashboard as one HTML file.

    It opens without a server and without a network: to attach to a ticket, or to keep. RUN is a run directory or
    the name of one below ./runs; without it, the one that is going on, else the newest. `-o -` writes to standard
    output. It holds logs, settings and names of machines.
    """
    from ..dashboard.page import bake
    from ..dashboard.run import Run
    from ..runs import finding

    folder = finding.find(run, Path(settle({}).settings.runs))
    page = bake(Run(folder))
    if output == "-":
        sys.stdout.buffer.write(page)
        return 0
    path = Path(output or f"{folder.absolute().name}.html")
    try:
        path.write_bytes(page)
    except OSError as error:
        raise ZmlError(
            NOT_WRITTEN, f"{path} cannot be written: {error.strerror}", "Choose another -o."
        ) from None
    if as_json:
        click.echo(json.dumps({"file": str(path), "bytes": len(page)}))
    else:
        click.echo(f"{path}  {len(page) / 1e6:.1f} MB")
    return 0
