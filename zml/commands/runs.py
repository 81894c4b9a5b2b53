"""`zml runs` and `zml compare`: all runs of a folder in a table, and what some of them differ in."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import USAGE, ZmlError

if TYPE_CHECKING:
    from ..runs.comparing import Entry, Row

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
VALUES = 2  # that a script logs, in the table


@click.command()
@click.option("--runs", "folder", metavar="FOLDER", help="Where they lie.  [default: ./runs]")
@AS_JSON
def runs(folder: str | None, as_json: bool) -> int:
    """All runs, with how they went.

    Those that go on come first, then the newest. A name of the first column is all that other commands need to find a
    run again.
    """
    from ..runs import comparing
    from .flags import settle

    where = Path(folder or settle({}).settings.runs)
    if folder is not None and not where.is_dir():
        raise ZmlError(USAGE, f"there is no folder {folder}", "Name the folder that holds the runs.")
    found = comparing.all_entries(where, time.time())
    if as_json:
        click.echo(json.dumps([finite(entry._asdict()) for entry in found], indent=2))
        return 0
    if not found:
        click.echo(f"no runs below {where}; `zml run train.py` makes one")
        return 0
    print_runs(found)
    return 0


def print_runs(found: Sequence[Entry]) -> None:
    from ..runs import comparing
    from ..text.console import duration, number
    from ..text.job_views import clock
    from ..text.tables import print_table

    names = comparing.short_names([entry.name for entry in found])
    scripts = [Path(entry.script).name for entry in found]
    # Names that zml has given say which script it is.
    needed = any(Path(s).stem not in name for s, name in zip(scripts, names, strict=True))
    rows = []
    for entry, name, script in zip(found, names, scripts, strict=True):
        values = [f"{key} {number(value)}" for key, value in list(entry.values.items())[:VALUES]]
        rows.append(
            [
                name,
                *([script] if needed else []),
                entry.state,
                clock(entry.began_at),
                duration(entry.took_s) if entry.took_s is not None else "",
                f"{entry.steps:,}" if entry.steps is not None else "",
                ", ".join(values),
                "" if entry.exit_code is None else str(entry.exit_code),
            ]
        )
    columns = ("run", *(["script"] if needed else []), "state", "began", "took>", "steps>", "values", "exit>")
    print_table(columns, rows, "values")


@click.command()
@click.option("--all", "everything", is_flag=True, help="What is the same, too.")
@AS_JSON
@click.argument("runs", nargs=-1, metavar="A B ...")
def compare(runs: tuple[str, ...], everything: bool, as_json: bool) -> int:
    """What runs differ in.

    Their settings, what they reached and how fast, where the time of their steps went, and their bytes. Each is a path,
    a run's name below ./runs, or the beginning or end of one. Of two, the last column says how many times the first the
    second is.
    """
    from ..runs import comparing, finding
    from .flags import settle

    if len(runs) < 2:
        raise ZmlError(USAGE, "it takes two runs or more to compare", "`zml runs` lists the runs.")
    where = Path(settle({}).settings.runs)
    folders = [finding.find(run, where) for run in runs]
    now = time.time()
    found = [comparing.read(folder, finding.name(folder, where), now) for folder in folders]
    settings, results = comparing.settings_rows(found), comparing.result_rows(found)
    if as_json:
        differ = {row.what: row.values for row in settings if everything or row.differs}
        told = {
            "runs": [{"name": run.name, "path": str(f)} for run, f in zip(found, folders, strict=True)],
            "settings": differ,
            "results": {row.what: row.values for row in results},
        }
        click.echo(json.dumps(finite(told), indent=2, ensure_ascii=False))
        return 0
    shown = [row for row in settings if everything or row.differs]
    names = comparing.short_names([run.name for run in found])
    print_rows("settings", names, shown)
    click.echo()
    print_rows("results", names, [row for row in results if everything or row.differs])
    return 0


def print_rows(what: str, names: Sequence[str], rows: Sequence[Row]) -> None:
    from ..text.tables import print_table

    if not rows:
        click.echo(f"{what}: the same")
        return
    ratios = what == "results" and len(names) == 2
    body = []
    for row in rows:
        label, _, unit = (
            row.what.rpartition("_") if row.what.endswith(("_s", "_bytes")) else (row.what, "", "")
        )
        values = [shown(value, unit if what == "results" else "") for value in row.values]
        label = row.what if what == "settings" else label
        body.append([label, *values, *([ratio(row.values)] if ratios else [])])
    columns = [what, *(f"{name}>" if what == "results" else name for name in names)]
    print_table([*columns, *([" >"] if ratios else [])], body, all_but=(what, " "))


def shown(value: Any, unit: str) -> str:
    from ..text.console import duration
    from ..text.tables import size

    if value is None:
        return "-"
    if unit == "bytes":
        return size(value)
    if unit == "s":
        return f"{1e3 * value:,.1f} ms" if value < 1 else f"{value:,.1f} s" if value < 60 else duration(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def ratio(values: Sequence[Any]) -> str:
    """How many times the first the second is."""
    first, second = values
    if (
        not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        or not first
        or not second
    ):
        return ""
    return f"{second / first:.3g}x" if second / first > 0 else ""


def finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: null, as in a run's status."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and value - value != 0 else value
