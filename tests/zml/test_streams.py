"""Streams, by best effort: the ledger counts batches, and each worker fills them from its own part."""

from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import zml
from tests.zml.test_data import Alone, Dealt, numbers
from zml.errors import ZmlError
from zml.worker.streams import StreamLoader


class Stream(IterableDataset[int]):
    """0, 1, 2 ... up to `end`, of which a part can be read; worker processes divide it further."""

    def __init__(self, end: int, length: int | None = None) -> None:
        self.end, self.part = end, (0, 1)
        if length is not None:
            self.__class__ = type("Measured", (Stream,), {"__len__": lambda self: length})

    def zml_shard(self, index: int, count: int) -> None:
        self.part = (index, count)

    def __iter__(self) -> Iterator[int]:
        index, count = self.part
        info = get_worker_info()
        inner, inners = (info.id, info.num_workers) if info is not None else (0, 1)
        return iter(range(index + count * inner, self.end, count * inners))


def read(loader: StreamLoader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def test_each_worker_reads_its_own_part_as_often_as_it_is_leased_a_batch() -> None:
    shares = [
        read(StreamLoader(DataLoader(Stream(60), batch_size=5), Dealt(rank, 3, None), rank, 3, 10))
        for rank in range(3)
    ]
    assert [len(share) for share in shares] == [4, 3, 3], "ten batches in all"
    for rank, share in enumerate(shares):
        assert all(number % 3 == rank for batch in share for number in batch)
    assert shares[1][0] == [1, 4, 7, 10, 13]


def test_reading_goes_on_from_epoch_to_epoch_and_begins_again_at_the_end() -> None:
    ledger = Alone()
    loader = StreamLoader(DataLoader(Stream(16), batch_size=4), ledger, 0, 1, 3)
    assert read(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]] and sorted(ledger.done) == [0, 1, 2]
    assert read(loader) == [[12, 13, 14, 15], [0, 1, 2, 3], [4, 5, 6, 7]]


def test_batches_of_a_lost_worker_are_made_up_for_with_what_comes_next() -> None:
    ledger = Alone()
    ledger.late = [[2, 0]]
    loader = StreamLoader(DataLoader(Stream(100), batch_size=2), ledger, 0, 1, 3)
    assert read(loader) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert ledger.done == [0, 1, 2, 2, 0] and loader.samples_of(0) == []


def test_worker_processes_of_the_loader_divide_the_part_among_themselves() -> None:
    plain = DataLoader(Stream(40), batch_size=2, num_workers=2)
    found = read(StreamLoader(plain, Alone(), 1, 2, 10))
    assert sorted(number for batch in found for number in batch) == list(range(1, 40, 2))


def test_an_epoch_is_as_long_as_the_loader_unless_something_else_is_said() -> None:
    assert len(StreamLoader(DataLoader(Stream(40, length=40), batch_size=8), Alone(), 0, 1)) == 5
    assert len(StreamLoader(DataLoader(Stream(40, length=40), batch_size=8), Alone(), 0, 1, 7)) == 7


class Unsharded(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    ("loader", "batches", "named"),
    [
        (DataLoader(Unsharded()), 3, "no method zml_shard"),
        (DataLoader(numbers(3)), 3, "TensorDataset"),
        ([1, 2], 3, "list"),
        (DataLoader(Stream(3)), None, "has no length"),
        (DataLoader(Stream(3)), 0, "0 batches"),
    ],
    ids=["no shards", "map-style", "no loader", "no length", "no batches"],
)
def test_what_cannot_be_read_in_parts_is_refused_with_the_fix(
    loader: Any, batches: int | None, named: str
) -> None:
    with pytest.raises(ZmlError, match=named) as refused:
        StreamLoader(loader, Alone(), 0, 1, batches)
    assert refused.value.code == "ZML-E301" and refused.value.fix


def test_a_part_that_holds_nothing_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(ZmlError, match="yields nothing in this worker's part"):
        read(StreamLoader(DataLoader(Stream(1), batch_size=2), Alone(), 3, 4, 3))


def test_alone_a_stream_is_the_loader_that_was_given() -> None:
    plain = DataLoader(Stream(3))
    assert zml.join(None, None, plain, data="best effort", batches=9) is plain  # type: ignore[arg-type]
    with pytest.raises(ZmlError, match="data='perfect'"):
        zml.join(None, None, plain, data="perfect")  # type: ignore[arg-type]
