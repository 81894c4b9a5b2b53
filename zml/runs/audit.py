"""`zml data audit RUN`: what became of every batch of a run, proved from the calls that its ledger was given.

The proof is `scheduler.audit`; here is what it is read from and how it is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..errors import RUN_FILES, USAGE, ZmlError
from ..journal import history
from ..records import Damaged
from ..scheduler import calls
from ..scheduler.audit import EpochAccount
from ..scheduler.explain import name_samples
from ..scheduler.plain import NotPlain, build_fields, plain_fields
from .rundir import COORDINATOR_STATE

GROUP = "ledger."  # of the journal's kinds, those that are the ledger's calls


def record(call: calls.Call) -> tuple[str, dict[str, Any]]:
    """A call as the journal keeps it: its kind, and its fields as plain data."""
    return f"{GROUP}{type(call).__name__}", plain_fields(call)


def call_of(kind: str, fields: Any) -> calls.Call:
    """The other way. Raises ValueError with a sentence for what is no call."""
    name = kind.removeprefix(GROUP)
    if name not in calls.KINDS:
        raise ValueError(f"there is no call {name!r} of a data ledger")
    try:
        call: calls.Call = build_fields(calls.KINDS[name], fields, name)
        return call
    except NotPlain as bad:
        raise ValueError(str(bad)) from None


def read_calls(run_dir: Path) -> Iterator[calls.Call]:
    """Every call that the run's ledger was given, in order. Raises ZmlError where they cannot be read."""
    folder = run_dir / COORDINATOR_STATE
    if not folder.is_dir():
        what = f"{run_dir} has no record of its data: {folder} is not there"
        raise ZmlError(USAGE, what, "`zml runs` lists the runs of this folder.")
    try:
        for kind, fields in history(folder):
            if kind.startswith(GROUP):
                yield call_of(kind, fields)
    except (ValueError, Damaged, OSError) as bad:
        raise ZmlError(RUN_FILES, f"the journal of {run_dir} cannot be read: {bad}") from None


COLUMNS = ("epoch", "batches", "samples", "committed", "reissued", "skipped", "duplicates", "missing")


def rows(accounts: Sequence[EpochAccount]) -> list[dict[str, Any]]:
    """One for each epoch, for machines; the keys are COLUMNS and more."""
    return [
        {
            "epoch": account.epoch,
            "batches": account.batches,
            "samples": account.samples,
            "committed": account.committed,
            "reissued": account.reissued,
            "skipped": len(account.skipped),
            "duplicates": account.duplicates,
            "missing": account.missing,
            "unleased": account.unleased,
            "to_go": account.to_go,
            "closed": account.closed,
            "sound": account.sound,
            "faults": account.faults,
            "left_out": [msgspec.to_builtins(skipped) for skipped in account.skipped],
        }
        for account in accounts
    ]


def lines(accounts: Sequence[EpochAccount]) -> Iterator[str]:
    """The same for people."""
    table = [list(COLUMNS)]
    for row in rows(accounts):
        row["epoch"] += 1  # people count from 1
        table.append(["-" if row[name] is None else f"{row[name]:,}" for name in COLUMNS])
    widths = [max(len(line[column]) for line in table) for column in range(len(COLUMNS))]
    for line in table:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
    for number, account in ((account.epoch + 1, account) for account in accounts):
        for skipped in account.skipped:
            what = f"batch {skipped.batch} ({name_samples(skipped.samples)})"
            yield f"epoch {number}: {skipped.worker} skipped {what}: {skipped.because}"
        if not account.closed:
            yield f"epoch {number} is not over: {account.to_go:,} batches to go"
        for fault in account.faults:
            yield f"epoch {number}: {fault}"
    wrong = [account for account in accounts if not account.sound]
    if wrong:
        yield f"{len(wrong)} of {len(accounts)} epochs are wrong"
    elif not accounts:
        yield "no epoch was opened"
    elif any(account.skipped for account in accounts):
        yield "every batch counted once, but for those that were skipped"
    else:
        yield "every batch counted once" + ("" if accounts[-1].closed else " so far")
