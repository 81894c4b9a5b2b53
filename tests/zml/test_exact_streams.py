"""Streams that can say where they stand: which samples a batch holds follows from its number, whoever reads it."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tests.zml.test_data import Alone, Dealt
from zml.errors import ZmlError
from zml.worker import exact_streams, stream_state
from zml.worker import reader as reading
from zml.worker.exact_streams import ExactStream, is_exact
from zml.worker.parts import Cut, Place
from zml.worker.reader import Reader, Wanted


class Numbers(IterableDataset[int]):
    """0, 1, 2 ... up to `end`, and where it stands. `read` counts what all of them have yielded here."""

    read = 0

    def __init__(self, end: int) -> None:
        self.end, self.at, self.begin = end, 0, 0

    def __iter__(self) -> Iterator[int]:
        assert get_worker_info() is None, "what is divided already would be divided again"
        self.at, self.begin = self.begin, 0
        while self.at < self.end:
            self.at += 1
            Numbers.read += 1
            yield self.at - 1

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin = state["at"]


class Sharded(Numbers):
    """The same, of which a part can be read."""

    index, count = 0, 1

    def zml_shard(self, index: int, count: int) -> None:
        self.index, self.count = index, count

    def __iter__(self) -> Iterator[int]:
        return (number for number in super().__iter__() if number % self.count == self.index)


class Shards(Numbers):
    """The same, as Hugging Face's data sets do it."""

    num_shards, index, count = 5, 0, 1

    def shard(self, num_shards: int, index: int) -> Shards:
        other = Shards(self.end)
        other.index, other.count = index, num_shards
        return other

    def __iter__(self) -> Iterator[int]:
        return (number for number in super().__iter__() if number % self.count == self.index)


class Kept:
    """The states that the coordinator keeps; all workers of a test share them."""

    def __init__(self) -> None:
        self.states: dict[int, dict[int, bytes]] = {}
        self.found = 0

    def tell_state(self, place: Place, state: bytes) -> None:
        self.states.setdefault(place.part, {})[place.position] = state

    def find_state(self, place: Place) -> tuple[int, bytes] | None:
        self.found += 1
        before = [each for each in self.states.get(place.part, {}).items() if each[0] <= place.position]
        return max(before, default=None)


class AloneWithStates(Alone, Kept):
    def __init__(self) -> None:
        Alone.__init__(self)
        Kept.__init__(self)


class DealtWithStates(Dealt):
    def __init__(self, rank: int, world: int, kept: Kept, token: bytes | None = None) -> None:
        super().__init__(rank, world, token)
        self.tell_state, self.find_state = kept.tell_state, kept.find_state


class Leased(Dealt):
    """Just these batches, of an epoch whose cut is known."""

    def __init__(self, token: bytes, batches: list[int], kept: Kept) -> None:
        super().__init__(0, 1, token)
        self.batches = batches
        self.tell_state, self.find_state = kept.tell_state, kept.find_state

    def open_epoch(self, batches: int, generator_state: bytes, samples: int, batch_size: int) -> bytes:
        self.todo = list(self.batches)
        assert self.state is not None
        return self.state


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are told as soon as there is one to tell."""
    monkeypatch.setattr(exact_streams, "EVERY", 1)
    monkeypatch.setattr(exact_streams, "EVERY_S", 0.0)
    monkeypatch.setattr(reading, "REST", 0)


def read(loader: ExactStream) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def plain(end: int, size: int) -> list[list[int]]:
    return [batch.tolist() for batch in DataLoader(Numbers(end), batch_size=size)]


# -- where batches lie ------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_all_epochs_together_read_every_part_from_its_front_without_a_gap(
    parts: int, epochs: list[int]
) -> None:
    cut = Cut.first(parts, epochs[0], 4, False)
    places: list[Place] = []
    for number, batches in enumerate(epochs):
        cut = cut.next(batches) if number else cut
        assert cut.understand(cut.to_bytes()) == cut
        places += [cut.place(batch) for batch in range(batches)]
        last = {cut.place(batch).part: batch for batch in range(batches)}
        assert {b for b in range(batches) if cut.is_last_of_part(b)} == set(last.values())
    for part in range(parts):
        found = [place.position for place in places if place.part == part]
        assert found == list(range(len(found)))


@pytest.mark.parametrize(
    "token",
    [
        b"",
        b"{}",
        b"\xff",
        bytes(5056),
        Cut(3, (0,), 5).to_bytes(),
        Cut(3, (), 4).to_bytes(),
        Cut(3, (-1,), 4).to_bytes(),
    ],
)
def test_a_cut_of_something_else_is_refused(token: bytes) -> None:
    with pytest.raises(ZmlError) as refused:
        Cut.first(2, 3, 4, False).understand(token)
    assert refused.value.code == "ZML-E301" and refused.value.fix


# -- states -----------------------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers() | st.just("zml"), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(PLAIN)
def test_a_state_comes_back_as_it_was_told(state: Any) -> None:
    assert stream_state.read(stream_state.write(state)) == state


def test_generators_come_back_with_their_next_number() -> None:
    import random

    import numpy as np

    one, two, three = random.Random(3), np.random.default_rng(3), torch.Generator().manual_seed(3)
    said = stream_state.write(
        {"python": one.getstate(), "numpy": two.bit_generator.state, "torch": three.get_state()}
    )
    expected = one.random(), two.random(), torch.rand(2, generator=three)
    half = torch.randn(5).bfloat16()
    assert torch.equal(stream_state.read(stream_state.write(half)), half)
    back = stream_state.read(said)
    one.setstate(back["python"])
    two.bit_generator.state = back["numpy"]
    three.set_state(back["torch"])
    assert (one.random(), two.random()) == expected[:2]
    assert torch.equal(torch.rand(2, generator=three), expected[2])


@pytest.mark.parametrize(
    "state",
    [
        object(),
        {"f": len},
        {1: {2}},
        "x" * 70_000,
        torch.zeros(20_000),
        [0] * 70_000,
        torch.zeros(2, dtype=torch.complex64),
        collections.OrderedDict(a=1),
        torch.nn.Parameter(torch.zeros(2)),
    ],
    ids=["object", "code", "set", "text", "tensor", "list", "complex", "ordered", "parameter"],
)
def test_what_is_not_plain_is_not_told(state: Any) -> None:
    with pytest.raises(stream_state.NotPlain):
        stream_state.write(state)


@given(st.binary(max_size=40) | st.sampled_from([
    b'{"zml":["tensor","<O",[1],""]}', b'{"zml":["array","<f4",[-1,7],"AAAA"]}', b'{"zml":["map",[1]]}',
    b'{"zml":["bytes","!"]}', b'{"zml":["array","f4,,",[0],""]}', b'{"zml":["array","(1,",[0],""]}',
    b'{"zml":7}', b'{"zml":["code","x"]}', b"[" * 5000,
]))  # fmt: skip
def test_a_damaged_state_is_refused(data: bytes) -> None:
    try:
        stream_state.read(data)
    except stream_state.NotPlain:
        pass


# -- reading ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("at_once")
def test_a_state_only_saves_time() -> None:
    def reader() -> Reader:
        return Reader(Numbers(50), 4, False, list)

    through, states = reader(), {}
    batches = []
    for position in range(30):
        found = through[Wanted(1, 0, position, tell=True)]
        batches.append(found.batch)
        if found.state is not None:
            states[found.at] = found.state
    assert [*states] == list(range(1, 30))
    assert batches[:13] == plain(50, 4), "the last one of a pass is short"
    assert batches[13:26] == batches[:13], "and the stream begins again"
    for position in (29, 3, 14, 12, 13, 0):
        assert reader()[Wanted(1, 0, position)].batch == batches[position], "from the front"
        for known in range(1, position + 1):
            before = Numbers.read
            assert reader()[Wanted(1, 0, position, known, states[known])].batch == batches[position]
            assert Numbers.read - before <= 4 * (position + 1 - known) + 1
    damaged = reader()[Wanted(1, 0, 9, 5, b"{")]
    assert damaged.batch == batches[9], "then it is read from the front"


def test_a_tail_is_dropped_only_where_the_user_drops_it() -> None:
    dropping = Reader(Numbers(10), 4, True, list)
    assert [dropping[Wanted(1, 0, position)].batch for position in range(4)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7],
    ]  # fmt: skip
    assert Reader(Numbers(3), 4, True, list)[Wanted(1, 0, 0)].failed


# -- divided ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stream", "parts"), [(Numbers, 1), (Sharded, 6), (Shards, 3)])
def test_which_samples_a_batch_holds_does_not_depend_on_who_reads_it(
    stream: Callable[[int], Numbers], parts: int
) -> None:
    def batches(world: int, epochs: int = 3) -> list[dict[int, list[int]]]:
        kept = Kept()
        found: list[dict[int, list[int]]] = [{} for _ in range(epochs)]
        for rank in range(world):
            ledger = DealtWithStates(rank, world, kept)
            loader = ExactStream(DataLoader(stream(70), batch_size=4), ledger, 6, 10)
            assert loader.mine.parts == parts
            for epoch in range(epochs):
                for number, batch in zip(range(rank, 10, world), read(loader), strict=True):
                    found[epoch][number] = batch
        return found

    alone = batches(1)
    assert alone == batches(2) == batches(3) == batches(7)
    first_pass = [n for epoch in alone for batch in epoch.values() for n in batch][:70]
    if stream is Numbers:
        assert first_pass == list(range(70)), "without parts it is the stream's own order"


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("processes", [0, 2])
def test_whoever_takes_over_reads_on_from_a_state_and_trains_the_same_samples(processes: int) -> None:
    def loader(ledger: Any) -> ExactStream:
        return ExactStream(DataLoader(Sharded(4000), batch_size=4, num_workers=processes), ledger, 2, 200)

    kept = Kept()
    whole = loader(DealtWithStates(0, 1, Kept()))
    expected = read(whole)
    assert whole.cut is not None
    for rank in range(2):  # the first three quarters of each worker's share are applied
        done = list(range(rank, 150, 2))
        read(loader(Leased(whole.cut.to_bytes(), done, kept)))
    assert max(kept.states[0]) > 30, "states were told"
    kept.found = Numbers.read = 0
    rest = list(range(150, 200))
    last = loader(Leased(whole.cut.to_bytes(), rest, kept))
    assert read(last) == [expected[batch] for batch in rest]
    assert kept.found
    if not processes:
        assert Numbers.read < 1500, "what was trained is not read again, but for the last few batches"


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("persistent", [False, True])
def test_worker_processes_read_what_one_process_reads(persistent: bool) -> None:
    def epochs(rank: int, processes: int) -> list[list[list[int]]]:
        plain = DataLoader(
            Sharded(300), batch_size=3, num_workers=processes, persistent_workers=persistent and processes > 0
        )
        loader = ExactStream(plain, DealtWithStates(rank, 2, Kept()), 2 * 2 // max(1, processes), 11)
        assert loader.mine.parts == 4
        return [read(loader) for _ in range(3)]

    for rank in range(2):
        assert epochs(rank, 0) == epochs(rank, 2)


def test_what_comes_back_from_a_lost_worker_is_what_that_one_had() -> None:
    ledger = AloneWithStates()
    loader = ExactStream(DataLoader(Sharded(1000), batch_size=2, num_workers=2), ledger, 2, 12)
    expected = read(loader)
    ledger.late = [[7, 0], [11]]
    again = ExactStream(DataLoader(Sharded(1000), batch_size=2, num_workers=2), ledger, 2, 12)
    assert read(again) == [*expected, expected[7], expected[0], expected[11]]
    assert ledger.done[-3:] == [7, 0, 11] and again.samples_of(0) == []


class Unspeakable(Numbers):
    def state_dict(self) -> dict[str, Any]:
        return {"file": open}


def test_a_state_that_cannot_be_told_costs_time_and_nothing_else() -> None:
    ledger = AloneWithStates()
    loader = ExactStream(DataLoader(Unspeakable(40), batch_size=4), ledger, 1, 10)
    assert read(loader) == plain(40, 4) and not ledger.states and loader.silent and loader.warned


def test_states_are_told_of_what_is_applied_and_seldom() -> None:
    ledger = AloneWithStates()
    loader = ExactStream(DataLoader(Numbers(4000), batch_size=4), ledger, 1, 500)
    began = time.monotonic()
    for number, _ in enumerate(loader):
        assert all(position <= number for position in ledger.states.get(0, {}))
    assert 1 <= len(ledger.states[0]) <= 2 + (time.monotonic() - began)


def test_what_can_say_where_it_stands_is_taken_for_exact_and_nothing_else() -> None:
    class Silent(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    assert is_exact(DataLoader(Numbers(3)))
    assert not any(map(is_exact, (DataLoader(Silent()), Numbers(3), DataLoader([1, 2]), None)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: ExactStream(DataLoader(Numbers(3)), AloneWithStates(), 1), "has no length"),
        (lambda: ExactStream(DataLoader(Numbers(3)), AloneWithStates(), 1, 0), "0 batches"),
        (
            lambda: read(ExactStream(DataLoader(Sharded(1), batch_size=2), AloneWithStates(), 4, 8)),
            "part 1 of 4 yields nothing",
        ),
    ],
    ids=["no length", "no batches", "an empty part"],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_the_fix(make: Callable[[], Any], named: str) -> None:
    with pytest.raises(ZmlError, match=named) as refused:
        make()
    assert refused.value.code == "ZML-E301" and refused.value.fix


# -- what goes wrong --------------------------------------------------------------------------------------


class Troubled(Numbers):
    """Cannot read this sample the first time."""

    tries = 0

    def __iter__(self) -> Iterator[int]:
        for number in super().__iter__():
            if number == 9 and Troubled.tries == 0:
                Troubled.tries = 1
                raise OSError("the network is away")
            yield number


def test_whoever_goes_on_after_an_exception_reads_what_is_due() -> None:
    Troubled.tries = 0
    reader = Reader(Troubled(40), 4, False, list)
    found = []
    for position in (0, 1, 2, 2, 3):
        try:
            found.append(reader[Wanted(1, 0, position)].batch)
        except OSError as error:
            assert "batch 2 of part 0 of 1" in error.__notes__[0]
    assert found == plain(40, 4)[:4]


class Shuffled(Numbers):
    """Through a buffer, whose content is not in its state."""

    def __iter__(self) -> Iterator[int]:
        buffer: list[int] = []
        for number in super().__iter__():
            buffer.append(number)
            if len(buffer) > 8:
                yield buffer.pop(number * 7 % 8)
        yield from buffer


class Wrong(Numbers):
    """Right for a while."""

    def state_dict(self) -> Any:
        return {"at": min(self.at, 16)}


class Nothing(Numbers):
    def state_dict(self) -> Any:
        return None


class Raises(Numbers):
    def state_dict(self) -> Any:
        raise RuntimeError("not now")


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("stream", [Shuffled, Wrong, Nothing, Raises])
@pytest.mark.parametrize("processes", [0, 2])
def test_states_that_would_decide_what_is_read_are_found_out_and_not_used(
    stream: Callable[[int], Numbers], processes: int
) -> None:
    def loader(ledger: Any, processes: int) -> ExactStream:
        return ExactStream(DataLoader(stream(400), batch_size=4, num_workers=processes), ledger, 1, 20)

    ledger = AloneWithStates()
    tried, without = loader(ledger, processes), loader(AloneWithStates(), 0)
    without.silent = True
    for _ in range(3):
        assert read(tried) == read(without)
    assert tried.silent and max(ledger.states.get(0, {0: b""})) <= (4 if stream is Wrong else 0)
    assert "the stream is read from further back by whoever takes over" in tried.warned


@dataclass
class Sample:
    number: int
    values: torch.Tensor


class Samples(Shuffled):
    """Items of a kind that only their fields can be compared of."""

    def __iter__(self) -> Iterator[Any]:
        return (Sample(number, torch.full((2,), float("nan"))) for number in super().__iter__())


class Empties(Numbers):
    def state_dict(self) -> Any:
        return []


class Opaque(Numbers):
    def __iter__(self) -> Iterator[Any]:
        return (object() for _ in super().__iter__())


class Sparse(Numbers):
    def __iter__(self) -> Iterator[Any]:
        return (torch.eye(2).to_sparse() for _ in super().__iter__())


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("stream", [Samples, Empties, Opaque, Sparse])
def test_what_cannot_be_compared_or_is_not_the_same_is_told_by_no_state(
    stream: Callable[[int], Numbers],
) -> None:
    reader = Reader(stream(200), 4, False, list)
    found = [reader[Wanted(1, 0, position, tell=True)] for position in range(20)]
    assert not any(each.state for each in found) and found[-1].untold, found[-1]


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]), True),
        (torch.tensor([float("nan")]), torch.tensor([0.0]), False),
        (np.array(["a", [1]], dtype=object), np.array(["a", [1]], dtype=object), True),
        (np.int64(3), np.int64(4), False),
        (collections.UserDict(a=1), collections.UserDict(a=2), False),
        (Sample(1, torch.ones(2)), Sample(1, torch.ones(2)), True),
        (Sample(1, torch.ones(2)), Sample(1, torch.zeros(2)), False),
        ({1, 2}, {1, 3}, False),
        ((1, [None, 2.5]), (1, [None, 2.5]), True),
        (1, True, False),
    ],
)
def test_items_are_compared_by_what_is_in_them(one: Any, other: Any, alike: bool) -> None:
    assert reading.same(one, other) is alike


def test_a_state_that_leads_nowhere_costs_time_and_nothing_else() -> None:
    class Moved(Numbers):
        def __iter__(self) -> Iterator[int]:
            if self.begin == 20:
                raise FileNotFoundError("it has moved")
            return super().__iter__()

    read = Reader(Moved(80), 4, False, list)[Wanted(1, 0, 6, 5, b'{"at":20}')]
    assert read.batch == plain(80, 4)[6] and "it has moved" in read.refused
    stood = Reader(Moved(80), 4, False, list)
    assert stood[Wanted(1, 0, 0)].batch == plain(80, 4)[0]
    expected, Numbers.read = plain(80, 4)[6], 0
    assert stood[Wanted(1, 0, 6, 5, b'{"at":"x"')].batch == expected
    assert Numbers.read == 24, "it has read on from where it stood"


@pytest.mark.usefixtures("at_once")
def test_a_trial_that_fails_once_costs_neither_the_place_nor_the_states() -> None:
    class Busy(Numbers):
        opened = 0

        def __iter__(self) -> Iterator[int]:
            Busy.opened += 1
            if Busy.opened == 3:
                raise OSError("too many requests")
            return super().__iter__()

    reader = Reader(Busy(200), 4, False, list)
    found = [reader[Wanted(1, 0, position, tell=True)] for position in range(20)]
    assert [each.batch for each in found] == plain(200, 4)[:20]
    assert sum(each.state is not None for each in found) == 18 and not found[-1].untold


def test_few_parts_stay_open() -> None:
    reader = Reader(Sharded(4000), 4, False, list)
    for position in range(3):
        for part in range(20):
            reader[Wanted(20, part, position, keep=8)]
            assert len(reader.open) <= 8


def begin_to_count(index: int) -> None:
    Numbers.read = 0


def counting(items: list[int]) -> tuple[list[int], int]:
    """With each batch, how many samples its process has read."""
    return items, Numbers.read


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("persistent", [False, True])
def test_what_comes_back_in_later_epochs_is_read_from_a_state(persistent: bool) -> None:
    ledger = AloneWithStates()
    loader = DataLoader(
        Numbers(4000), batch_size=4, num_workers=1, persistent_workers=persistent, collate_fn=counting,
        worker_init_fn=begin_to_count,
    )  # fmt: skip
    stream = ExactStream(loader, ledger, 1, 12)
    for number in range(12):
        ledger.late = [[3]]
        *epoch, (again, read) = list(stream)
        assert [batch for batch, _ in epoch] == plain(4000, 4)[12 * number : 12 * number + 12]
        assert again == epoch[3][0]
        assert read < 100, "not all that comes before it in the stream"


class Augmented(Numbers):
    """Draws at random while it reads, and says so in no state."""

    def __iter__(self) -> Iterator[Any]:
        return (number + torch.rand(2) for number in super().__iter__())


@pytest.mark.usefixtures("at_once")
def test_what_is_drawn_at_random_is_no_matter_of_the_state() -> None:
    torch.manual_seed(1)
    ledger = AloneWithStates()
    found = [batch.clone() for batch in ExactStream(DataLoader(Augmented(80), batch_size=4), ledger, 1, 20)]
    assert ledger.states
    torch.manual_seed(1)
    torch.empty((), dtype=torch.int64).random_()  # torch's loader draws its own seed
    assert all(map(torch.equal, found, DataLoader(Augmented(80), batch_size=4, generator=torch.Generator())))


@pytest.mark.usefixtures("at_once")
def test_a_state_that_the_data_set_refuses_costs_time_and_nothing_else() -> None:
    class Particular(Numbers):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.begin = state["offset"]

    kept = Kept()
    for position in range(1, 9):
        kept.tell_state(Place(0, position), b'{"at":%d}' % (4 * position))
    token = Cut.first(1, 10, 4, False).to_bytes()
    loader = ExactStream(DataLoader(Particular(80), batch_size=4), Leased(token, [8, 9], kept), 1, 10)
    assert read(loader) == plain(80, 4)[8:10]
    assert "a part of the stream is read from its front" in loader.warned


def test_what_the_script_does_to_its_data_set_later_changes_nothing() -> None:
    stream = Numbers(80)
    loader = ExactStream(DataLoader(stream, batch_size=4), AloneWithStates(), 1, 10)
    stream.end = 7
    assert read(loader) == plain(80, 4)[:10]


def test_a_data_set_that_cannot_be_copied_is_refused_with_the_fix() -> None:
    stream = Numbers(80)
    stream.file = open(__file__)  # type: ignore[attr-defined]
    with stream.file, pytest.raises(ZmlError, match="a Numbers cannot be copied") as refused:  # type: ignore[attr-defined]
        ExactStream(DataLoader(stream, batch_size=4), AloneWithStates(), 1, 10)
    assert "__iter__" in refused.value.fix


def connect(index: int) -> None:
    Connected.here = True


class Connected(Numbers):
    """Needs what its process was given at its start."""

    here = False

    def __iter__(self) -> Iterator[int]:
        assert self.here
        return super().__iter__()


def test_what_comes_back_is_read_in_processes_like_those_of_the_loader_and_draws_nothing() -> None:
    ledger = AloneWithStates()
    ledger.late = [[3, 1]]
    plain_loader = DataLoader(Connected(80), batch_size=4, num_workers=1, worker_init_fn=connect)
    loader = ExactStream(plain_loader, ledger, 1, 5)
    states, found = [], []
    for batch in loader:
        found.append(batch.tolist())
        states.append(torch.get_rng_state())
    expected = plain(80, 4)[:5]
    assert found == [*expected, expected[3], expected[1]]
    assert torch.equal(states[4], states[-1])


def test_many_workers_of_one_part_ask_for_no_state_once_they_read() -> None:
    kept = Kept()
    ledger = DealtWithStates(3, 40, kept)
    ledger.workers = 40
    read(ExactStream(DataLoader(Numbers(40 * 4 * 40), batch_size=4), ledger, 40, 40 * 40))
    assert kept.found <= 1


def test_batches_of_the_stream_itself_are_taken_as_they_are() -> None:
    class Batches(Numbers):
        def __iter__(self) -> Iterator[Any]:
            return (torch.arange(number, number + 3) for number in super().__iter__())

    loader = ExactStream(DataLoader(Batches(6), batch_size=None), AloneWithStates(), 2, 5)
    assert read(loader) == [[n, n + 1, n + 2] for n in range(5)]
