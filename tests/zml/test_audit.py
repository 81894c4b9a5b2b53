"""`zml data audit`: calls go to disk and come back, and the command says what they prove."""

import json
from pathlib import Path

import msgpack
import pytest

from zml.commands import cli
from zml.journal import Journal
from zml.records import Records
from zml.runs.audit import call_of, record
from zml.runs.rundir import COORDINATOR_STATE
from zml.scheduler import calls
from zml.scheduler.ids import Seat, WorkerId

W0, W1 = WorkerId("w0"), WorkerId("w1")

GOOD: list[calls.Call] = [
    calls.Members((Seat(W0, 1, True), Seat(W1, 1, True))),
    calls.Open(W0, 0, 3, b"\x00\xff", 20, 8),
    calls.Open(W1, 0, 3, b"", 20, 8),
    calls.Take(W0, 0, 16, 0),
    calls.Take(W1, 0, 16, 0),
    calls.Reached(0, 1),
    calls.Settle(W0, 0, 1),
    calls.Blame(W0, 2),
    calls.Members((Seat(W1, 1, True),)),
    calls.Commit(W1, 0, (1,)),
    calls.Take(W1, 0, 16, 1),
]
CLOSED: list[calls.Call] = [
    *GOOD,
    calls.Skip(W1, 0, 2, "a gradient is not finite", (7, 3)),
    calls.Take(W1, 0, 16, 2),
]


def written(folder: Path, made: list[calls.Call], extra: bytes = b"", snapshot_bytes: int = 1 << 20) -> Path:
    """A run's journal, with other records between; old ones are moved out of the way by snapshots."""
    journal = Journal(folder / COORDINATOR_STATE, snapshot_bytes=snapshot_bytes)
    for call in made:
        journal.write("fact.Spoke", 0.0, {"worker": "w0", "peer": "a peer"})
        journal.write(record(call)[0], 0.0, record(call)[1])
        if journal.long:
            journal.shorten({})
    journal.close()
    if extra:
        records = Records(folder / COORDINATOR_STATE)
        records.append(extra)
        records.close()
    return folder


def test_every_call_comes_back_from_its_record() -> None:
    for call in [*CLOSED, calls.Drain("Ctrl-C")]:
        kind, fields = msgpack.unpackb(msgpack.packb(record(call)))
        assert call_of(kind, fields) == call


def test_a_run_that_went_well_is_proved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["data", "audit", str(written(tmp_path, CLOSED))]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "epoch  batches  samples  committed  reissued  skipped  duplicates  missing",
        "    1        3       16          2         1        1           0        0",
        "epoch 1: w1 skipped batch 2 (samples 7, 3): a gradient is not finite",
        "every batch counted once, but for those that were skipped",
    ]


def test_an_epoch_that_is_not_over_is_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["data", "audit", str(written(tmp_path, GOOD))]) == 0
    assert "epoch 1 is not over: 1 batches to go" in capsys.readouterr().out


def test_machines_get_the_same_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["data", "audit", "--json", str(written(tmp_path, CLOSED))]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["committed"], row["missing"], row["duplicates"], row["sound"]) == (2, 0, 0, True)
    assert row["left_out"][0]["samples"] == [7, 3]


def test_a_batch_that_another_worker_commits_once_more_is_a_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["data", "audit", str(written(tmp_path, [*GOOD, calls.Commit(W1, 0, (0,))]))]) == 1
    said = capsys.readouterr().out
    assert (
        "epoch 1: batch 0 was committed by w1 after it was over" in said and "1 of 1 epochs are wrong" in said
    )


@pytest.mark.parametrize(
    "extra",
    [
        b"\xc1",
        b"\x05",
        msgpack.packb(("ledger.Nothing", 0.0, {})),
        msgpack.packb(("ledger.Take", 0.0, {"worker": 3})),
    ],
    ids=["no msgpack", "no pair", "no such call", "wrong fields"],
)
def test_a_damaged_record_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: bytes) -> None:
    assert cli.run(["data", "audit", str(written(tmp_path, GOOD, extra))]) == 5
    assert f"the journal of {tmp_path} cannot be read" in capsys.readouterr().err


def test_what_snapshots_have_replaced_is_still_proved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written(tmp_path, CLOSED, snapshot_bytes=100)
    assert len(list(run.glob(f"{COORDINATOR_STATE}/history/*"))) > 3
    assert cli.run(["data", "audit", str(run)]) == 0
    assert "every batch counted once" in capsys.readouterr().out


def test_a_run_without_a_record_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert cli.run(["data", "audit", str(tmp_path)]) == 2
    assert "has no record of its data" in capsys.readouterr().err
