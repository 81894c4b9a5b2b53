"""A part of a checkpoint, given byte by byte: the very numbers, and nothing is believed of what does not fit."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.zml.checkpoints import make, numbers, registration
from zml.checkpoint import BadCheckpoint, Checkpoint, read
from zml.checkpoint import partial as module
from zml.checkpoint.partial import Part

MODEL = registration()
CHUNKS = [chunk.index for chunk in MODEL.layout.chunks]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return read(make(tmp_path_factory.mktemp("partial") / "checkpoints", 3, shards=2))


def part_of(whole: Checkpoint, chunks: list[int]) -> Part:
    return Part(whole.path, whole.manifest, MODEL, chunks)


def describe(part: Part, whole: Checkpoint) -> None:
    for name in part.names:
        data = (whole.path / name).read_bytes()
        part.describe(name, data[: part.header_bytes(name, data[:8])])


@given(chunks=st.sets(st.sampled_from(CHUNKS)), most=st.integers(1, 200), chance=st.randoms())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_some_chunks_in_pieces_of_any_size_and_order_are_those_of_the_whole(
    whole: Checkpoint, chunks: set[int], most: int, chance: object
) -> None:
    part = part_of(whole, sorted(chunks))
    describe(part, whole)
    wanted = part.lacks(most)
    assert all(0 < count <= most for _, _, count in wanted)
    chance.shuffle(wanted)  # type: ignore[attr-defined]
    for name, offset, count in wanted:
        part.put(name, offset, (whole.path / name).read_bytes()[offset : offset + count])
    for index in chunks:
        ours, theirs = part.checkpoint.chunk(index), whole.chunk(index)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[kind], theirs[kind]) for kind in ours)
        assert all(array.flags.writeable and array.flags.owndata for array in ours.values())
    needed = sum(array.nbytes for index in chunks for array in whole.chunk(index).values())
    assert sum(count for _, _, count in wanted) == needed, "and nothing else is asked for"


def test_a_manifest_of_another_model_is_refused(whole: Checkpoint) -> None:
    other = registration(described=[("w", (3, 3), 0), ("b", (2,), 1)])
    with pytest.raises(BadCheckpoint, match="is of a model with"):
        Part(whole.path, whole.manifest, other, [0])


def test_a_header_that_claims_more_than_the_file_has_is_refused_before_it_is_read(whole: Checkpoint) -> None:
    part = part_of(whole, CHUNKS)
    name = part.names[0]
    for length in (part.size(name) - 7, 1 << 40, (1 << 64) - 1):
        with pytest.raises(BadCheckpoint, match="has a header of"):
            part.header_bytes(name, length.to_bytes(8, "little"))
    with pytest.raises(BadCheckpoint, match="has a header of"):
        part.header_bytes(name, b"\0" * 7)


@pytest.mark.parametrize("what", ["shape", "name", "twice", "cut"])
def test_a_header_that_does_not_fit_the_model_is_refused(whole: Checkpoint, what: str) -> None:
    part = part_of(whole, CHUNKS)
    name, other = part.names
    data = (whole.path / name).read_bytes()
    header = data[: part.header_bytes(name, data)]
    text = json.loads(header[8:])
    key = next(key for key in text if key.endswith("/w"))
    if what == "shape":
        text[key]["shape"] = [2, text[key]["shape"][0] // 2]
    elif what == "name":
        text["99/w"] = text.pop(key)
    if what == "twice":
        part.describe(name, header)
        with pytest.raises(BadCheckpoint):
            part.describe(other, header)
        return
    raw = json.dumps(text).encode()
    raw += b" " * (len(header) - 8 - len(raw))
    with pytest.raises(BadCheckpoint):
        part.describe(name, header[:8] + (raw[:-9] if what == "cut" else raw))


def test_a_chunk_that_no_file_has_and_one_with_too_many_tensors_are_refused(
    whole: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = part_of(whole, CHUNKS)
    data = (whole.path / part.names[0]).read_bytes()
    part.describe(part.names[0], data[: part.header_bytes(part.names[0], data)])
    with pytest.raises(BadCheckpoint, match="lists no file with chunk"):
        part.lacks(100)
    full = part_of(whole, CHUNKS)
    describe(full, whole)
    monkeypatch.setattr(module, "MOST_PARTS", 4)
    assert max(map(len, numbers(MODEL).values())) == 5
    with pytest.raises(BadCheckpoint, match="has 5 tensors of chunk"):
        full.lacks(100)
