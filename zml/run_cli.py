"""`zml timeline` and `zml data`: what a run leaves behind, for people and machines. It may be going on."""

import json
from pathlib import Path

import click

from .errors import USAGE, ZmlError


@click.command()
@click.option("--worker", metavar="wK", help="Only this worker.  [default: all]")
@click.option("--last", type=click.IntRange(min=1), default=10, help="Steps to show.  [default: 10]")
@click.option("--json", "as_json", is_flag=True, help="Every recorded step, for machines.")
@click.argument("run", required=False)
def timeline(run: str | None, worker: str | None, last: int, as_json: bool) -> int:
    """Where the time of each step went.

    d data (the loader), c compute, e encode, w wait, a apply: what the script's thread did. Send and pull go on beside
    it. RUN is a path, a run's name below ./runs, or the beginning or end of one; without it, the run that is going on,
    else the newest.
    """
    import shutil

    import msgspec

    from . import finding, rundir
    from . import timeline as times
    from .flags import settle

    folder = finding.find(run, Path(settle({}).settings.runs))
    files = sorted((folder / rundir.TIMELINE).glob("*.jsonl"))
    if worker is not None:
        files = [file for file in files if file.stem == worker]
    if not files:
        who = f" of {worker}" if worker else ""
        raise ZmlError(USAGE, f"no steps{who} are recorded in {folder}", finding.LIST)
    for file in files:
        steps = times.read(file)
        if as_json:
            click.echo(msgspec.json.encode({"worker": file.stem, "steps": steps}).decode())
            continue
        for line in times.table(file.stem, steps, last, min(shutil.get_terminal_size().columns, 120)):
            click.echo(line)
    return 0


@click.group()
def data() -> None:
    """What became of the samples."""


@data.command("audit")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
@click.argument("run", required=False)
def audit_(run: str | None, as_json: bool) -> int:
    """Prove that every batch counted once.

    Per epoch: batches, committed samples, batches that were given out again, skipped, doubled and missing ones, from
    the run's record of all that its ledger was asked. The exit code is 1 if a batch is doubled or missing. RUN is a
    path, a run's name below ./runs, or the beginning or end of one; without it, the run that is going on, else the
    newest.
    """
    from . import audit, finding
    from .flags import settle
    from .scheduler.audit import audit as prove

    folder = finding.find(run, Path(settle({}).settings.runs))
    accounts = prove(audit.read_calls(folder))
    if as_json:
        click.echo(json.dumps(audit.rows(accounts), indent=2))
    else:
        for line in audit.lines(accounts):
            click.echo(line)
    return 0 if all(account.sound for account in accounts) else 1
