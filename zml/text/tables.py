"""Tables for the eyes: a line per row on a terminal and in a file, columns as wide as they need be."""

import sys
from collections.abc import Collection, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .ansi import printable

PIPED = 200  # columns of a file in which a row is a line
FOLDED = 80  # and of one in which it is not


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], folding: str = "", all_but: Collection[str] = ()
) -> None:
    """Columns whose name ends in > stand at the right; the one called `folding` takes more lines where it must. Where
    there are some in `all_but`, every other one does, also in a file."""
    terminal = sys.stdout.isatty()
    out = Console(
        file=sys.stdout,
        highlight=False,
        markup=False,
        emoji=False,
        width=None if terminal else FOLDED if all_but else PIPED,
    )
    drawn = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False, header_style="bold")
    for column in columns:
        name = column.removesuffix(">")
        folds = name == folding or (bool(all_but) and name not in all_but)
        drawn.add_column(
            Text(printable(name)),
            justify="right" if column.endswith(">") else "left",
            no_wrap=not folds,
            overflow="fold" if folds else "ellipsis",
        )
    for row in rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))
    with out.capture() as captured:
        out.print(drawn)
    for line in captured.get().splitlines():
        print(line.rstrip())


def size(count: float) -> str:
    """1,234 B, 5.2 MB: of 1,000, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
