"""`zml timeline`: where the time of each step of a run went. It may be going on."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import USAGE, ZmlError

if TYPE_CHECKING:
    from rich.console import Console

    from ..runs.timeline import Step


@click.command()
@click.option("--worker", metavar="wK", help="Only this worker.  [default: all]")
@click.option("--last", type=click.IntRange(min=1), default=10, help="Steps to show.  [default: 10]")
@click.option(
    "--step", type=click.IntRange(min=1), metavar="N", help="This step of all workers, on one time axis."
)
@click.option("--json", "as_json", is_flag=True, help="Every recorded step, for machines.")
@click.argument("run", required=False)
def timeline(run: str | None, worker: str | None, last: int, step: int | None, as_json: bool) -> int:
    """Where the time of each step went.

    d data, c compute, e encode, w wait, a apply: what the script's thread did. Send and pull go on beside it. With
    --step N it is one step of all workers, each at its time: who was late, and who waited for whom. RUN is a path, a
    run's name below ./runs, or the beginning or end of one; without it, the run that is going on, else the newest.
    """
    import msgspec

    from ..runs import finding, rundir
    from ..runs import timeline as times
    from .flags import settle

    folder = finding.find(run, Path(settle({}).settings.runs))
    files = list((folder / rundir.TIMELINE).glob("*.jsonl"))
    files.sort(key=lambda file: (len(file.stem), file.stem))
    if worker is not None:
        files = [file for file in files if file.stem == worker]
    if not files:
        who = f" of {worker}" if worker else ""
        fix = "Workers write theirs after their first steps, to the run directory as their machine sees it."
        raise ZmlError(USAGE, f"no steps{who} are recorded in {folder}", fix)
    found = {file.stem: times.read(file) for file in files}
    if step is not None:
        return _one_step(found, step, as_json=as_json)
    if as_json:
        for name, steps in found.items():
            click.echo(msgspec.json.encode({"worker": name, "steps": steps}).decode())
        return 0
    from ..text.waterfall import table

    out, width = _out()
    for name, steps in found.items():
        for line in table(name, steps, last, width):
            out.print(line)
    return 0


def _one_step(found: dict[str, list["Step"]], clock: int, *, as_json: bool) -> int:
    import msgspec

    from ..text.waterfall import recorded, waterfall

    # A worker whose script was started again may have made a step twice: the last time counts.
    steps = {name: step for name, all_ in found.items() for step in all_ if step.clock == clock}
    if not steps:
        there = recorded([step.clock for all_ in found.values() for step in all_])
        fix = f"Recorded are {there}." if there else "None is recorded yet."
        raise ZmlError(USAGE, f"step {clock:,} is not recorded of any worker", fix)
    if as_json:
        click.echo(msgspec.json.encode({"step": clock, "workers": steps}).decode())
        return 0
    out, width = _out()
    for line in waterfall(clock, steps, [name for name in found if name not in steps], width):
        out.print(line)
    return 0


def _out() -> tuple["Console", int]:
    """Standard output, and how wide it is: 80 columns off a terminal."""
    import sys

    from rich.console import Console

    out = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)
    return out, min(out.width, 160) if out.is_terminal else 80
