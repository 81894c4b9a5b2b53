"""`zml data`: what became of the samples of a run, which may be going on."""

import json
from pathlib import Path

import click


@click.group()
def data() -> None:
    """What became of the samples."""


@data.command("audit")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("run", required=False)
def audit_(run: str | None, as_json: bool) -> int:
    """Prove that every batch counted once.

    Per epoch: batches, committed samples, batches that were given out again, skipped, doubled and missing ones, from
    the run's record of all that its ledger was asked. The exit code is 1 if a batch is doubled or missing. RUN is a
    path, a run's name below ./runs, or the beginning or end of one; without it, the run that is going on, else the
    newest.
    """
    from ..runs import audit, finding
    from ..scheduler.audit import audit as prove
    from .flags import settle

    folder = finding.find(run, Path(settle({}).settings.runs))
    accounts = prove(audit.read_calls(folder))
    if as_json:
        click.echo(json.dumps(audit.rows(accounts), indent=2))
    else:
        for line in audit.lines(accounts):
            click.echo(line)
    return 0 if all(account.sound for account in accounts) else 1
