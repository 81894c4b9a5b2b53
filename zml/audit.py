"""`zml data audit RUN`: what became of every batch of a run, proved from the calls that its ledger was given.

The proof is `scheduler.audit`; here is what it is read from and how it is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgpack
import msgspec

from .errors import RUN_FILES, USAGE, ZmlError
from .scheduler import calls
from .scheduler.audit import EpochAccount
from .scheduler.explain import name_samples

CALLS = "calls.msgpack"
RECORD_BYTES = 1 << 28  # of one record: a commit may name ten million batches


def record(call: calls.Call) -> tuple[str, dict[str, Any]]:
    """A call as a journal keeps it: its kind, and its fields as msgpack knows them."""
    return type(call).__name__, msgspec.to_builtins(call, builtin_types=(bytes,))


def call_of(kind: str, fields: Any) -> calls.Call:
    """The other way. Raises ValueError with a sentence for what is no call."""
    if kind not in calls.KINDS:
        raise ValueError(f"there is no call {kind!r} of a data ledger")
    return msgspec.convert(fields, type=calls.KINDS[kind])  # a ValidationError is a ValueError


def read_calls(run_dir: Path) -> Iterator[calls.Call]:
    """Every call that the run's ledger was given, in order. Raises ZmlError where they cannot be read."""
    path = run_dir / CALLS
    try:
        file = path.open("rb")
    except OSError as error:
        what = f"{run_dir} has no record of its data: {error.strerror}"
        raise ZmlError(USAGE, what, "`ls runs` lists the runs of this folder.") from None
    with file:
        unpacker = msgpack.Unpacker(file, max_buffer_size=RECORD_BYTES, raw=False, strict_map_key=True)
        count = 0
        try:
            for count, item in enumerate(unpacker, start=1):  # noqa: B007
                kind, fields = item
                yield call_of(kind, fields)
        except (ValueError, TypeError, msgpack.UnpackException) as bad:
            raise ZmlError(RUN_FILES, f"record {count} of {path} cannot be read: {bad}") from None


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
        table.append(["-" if row[name] is None else f"{row[name]:,}" for name in COLUMNS])
    widths = [max(len(line[column]) for line in table) for column in range(len(COLUMNS))]
    for line in table:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
    for account in accounts:
        for skipped in account.skipped:
            what = f"batch {skipped.batch} ({name_samples(skipped.samples)})"
            yield f"epoch {account.epoch}: {skipped.worker} skipped {what}: {skipped.because}"
        if not account.closed:
            yield f"epoch {account.epoch} is not over: {account.to_go:,} batches to go"
        for fault in account.faults:
            yield f"epoch {account.epoch}: {fault}"
    wrong = [account for account in accounts if not account.sound]
    if wrong:
        yield f"{len(wrong)} of {len(accounts)} epochs are wrong"
    elif not accounts:
        yield "no epoch was opened"
    elif any(account.skipped for account in accounts):
        yield "every batch counted once, but for those that were skipped"
    else:
        yield "every batch counted once" + ("" if accounts[-1].closed else " so far")
