"""Codecs and frames: what goes in comes out, what is lost is kept, no bytes of a peer write where they should not."""

import math
import struct
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zml.codec import (
    UNKNOWN,
    BadFrame,
    Behind,
    Codec,
    Kind,
    NonFinite,
    Packer,
    by_name,
    cut,
    parse,
    read_parameters,
    split,
)
from zml.codec.dense import Bf16, Exact, finite, write_parameters
from zml.codec.frame import HEADER
from zml.layout import CHUNK, Chunk, Layout

NAMES = ["none", "bf16"]
floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120)
values_of = st.lists(floats, min_size=1, max_size=70).map(torch.tensor)


def dense(name: str) -> Exact | Bf16:
    return Exact() if name == "none" else Bf16()


def publish(
    codec: Codec, chunk: Chunk, w: Tensor, p: Tensor, base: int, version: int, budget: int = 0
) -> bytes:
    """One chunk's frame."""
    (frame,) = codec.publish([Behind(chunk, w, p, base, version, budget)])
    return frame


def chunk_of(size: int, index: int = 3) -> Chunk:
    """A chunk of this size that lies between others and holds three parameters, as far as they fit."""
    first = min(size, 5)
    described = [("before", (index * CHUNK,), 0), ("a", (first,), 0), ("b", (size - first,), 0)]
    chunk = Layout.build(described, 1).chunks[index]
    assert chunk.size == size
    return chunk


def encoded(
    codec: Exact | Bf16,
    chunk: Chunk,
    values: Tensor,
    residual: Tensor | None = None,
    absent: frozenset[int] = frozenset(),
) -> bytes:
    out = bytearray(codec.bound(chunk))
    size = codec.encode(chunk, values, residual, memoryview(out), absent)
    assert size <= len(out)
    return bytes(out[:size])


def decoded(codec: Exact | Bf16, chunk: Chunk, frame: bytes | memoryview) -> Tensor:
    out = torch.full((chunk.size,), math.nan)
    codec.decode(chunk, frame, out, add=False)
    return out


def wrecked(chunk: Chunk) -> Tensor:
    """What an untouched buffer looks like."""
    return torch.full((chunk.size,), 7.0)


# -- gradients -------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(values_of)
def test_none_carries_every_bit(values: Tensor) -> None:
    codec, chunk = dense("none"), chunk_of(len(values))
    frame = encoded(codec, chunk, values)
    assert torch.equal(decoded(codec, chunk, frame).view(torch.int32), values.view(torch.int32))
    view = codec.view(chunk, frame)
    assert view is not None
    assert torch.equal(view.view(torch.int32), values.view(torch.int32))


@settings(max_examples=300, deadline=None)
@given(values_of, st.data())
def test_what_bf16_drops_is_in_the_residual(values: Tensor, data: st.DataObject) -> None:
    codec, chunk = dense("bf16"), chunk_of(len(values))
    residual = values.flip(0) * data.draw(st.floats(-1, 1, width=32))
    before = residual.clone()
    sent = decoded(codec, chunk, encoded(codec, chunk, values, residual))
    whole = values + before
    assert torch.equal(sent, whole.bfloat16().float())  # torch rounds to nearest, ties to even
    assert torch.equal(sent + residual, whole)


def test_bf16_rounds_ties_to_even() -> None:
    codec, chunk = dense("bf16"), chunk_of(4)
    one = 1.0
    ulp = 2.0**-7
    values = torch.tensor([one + ulp / 2, one + 1.5 * ulp, one + 0.51 * ulp, -one - ulp / 2])
    assert decoded(codec, chunk, encoded(codec, chunk, values)).tolist() == [1.0, 1 + 2 * ulp, 1 + ulp, -1.0]


def test_with_error_feedback_the_sum_of_what_is_sent_follows_the_sum_of_the_gradients() -> None:
    codec, chunk = dense("bf16"), chunk_of(1_000)
    generator = torch.Generator().manual_seed(5)
    residual, sent, true = (
        torch.zeros(1_000),
        torch.zeros(1_000, dtype=torch.float64),
        torch.zeros(1_000).double(),
    )
    for _ in range(50):
        gradient = torch.randn(1_000, generator=generator)
        true += gradient
        sent += decoded(codec, chunk, encoded(codec, chunk, gradient, residual))
    assert (sent - true).abs().max() < 0.02  # one rounding, not fifty
    assert torch.allclose(sent + residual, true, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_input_makes_the_same_bytes(name: str) -> None:
    values, chunk = torch.randn(999, generator=torch.Generator().manual_seed(1)), chunk_of(999)
    frames = {encoded(dense(name), chunk, values.clone(), torch.zeros(999)) for _ in range(3)}
    assert len(frames) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("at", "parameter"), [(0, 1), (4, 1), (5, 2), (69, 2)])
def test_a_gradient_that_is_not_finite_is_refused_by_parameter(
    name: str, bad: float, at: int, parameter: int
) -> None:
    codec, chunk = dense(name), chunk_of(70)
    values, residual = torch.ones(70), torch.full((70,), 0.25)
    values[at] = bad
    with pytest.raises(NonFinite) as caught:
        encoded(codec, chunk, values, residual)
    assert caught.value.parameter == parameter
    assert torch.equal(residual, torch.full((70,), 0.25))


def test_a_gradient_that_bf16_would_round_to_infinity_is_refused() -> None:
    codec, chunk = dense("bf16"), chunk_of(6)
    values = torch.full((6,), torch.finfo(torch.float32).max)
    assert len(encoded(dense("none"), chunk, values)) == 16 + 24
    with pytest.raises(NonFinite):
        encoded(codec, chunk, values, torch.zeros(6))


def test_large_finite_values_are_finite_though_their_sum_is_not() -> None:
    assert finite(torch.full((100,), 3e38))
    assert not finite(torch.tensor([math.inf, -math.inf]))
    assert not finite(torch.tensor([3e38, 3e38, math.nan]))


def test_an_absent_parameter_sends_nothing_and_keeps_its_residual() -> None:
    codec, chunk = dense("bf16"), chunk_of(12)
    values = torch.arange(12.0) + 0.001
    values[:5] = 0
    residual = torch.full((12,), 0.0003)
    sent = decoded(codec, chunk, encoded(codec, chunk, values, residual, frozenset({1})))
    assert sent[:5].tolist() == [0.0] * 5
    assert torch.equal(residual[:5], torch.full((5,), 0.0003))
    assert torch.equal(sent[5:] + residual[5:], values[5:] + 0.0003)


def test_a_gradient_gathered_in_its_place_is_not_copied_again() -> None:
    codec, chunk = dense("none"), chunk_of(9)
    out = bytearray(codec.bound(chunk))
    place = codec.place(chunk, memoryview(out))
    assert place is not None
    place.copy_(torch.arange(9.0))
    assert codec.encode(chunk, place, None, memoryview(out)) == len(out)
    assert decoded(codec, chunk, bytes(out)).tolist() == list(range(9))
    assert dense("bf16").place(chunk, memoryview(out)) is None


def test_where_a_place_would_not_be_aligned_there_is_none() -> None:
    codec, chunk = dense("none"), chunk_of(9)
    out = memoryview(bytearray(codec.bound(chunk) + 1))[1:]
    assert codec.place(chunk, out) is None
    assert codec.encode(chunk, torch.arange(9.0), None, out) == len(out)
    assert decoded(codec, chunk, out).tolist() == list(range(9))


@pytest.mark.parametrize("name", NAMES)
def test_several_gradients_add_up_in_their_order(name: str) -> None:
    codec, chunk = dense(name), chunk_of(500)
    generator = torch.Generator().manual_seed(2)
    gradients = [torch.randn(500, generator=generator) * 10**power for power in (3, -3, 0, 2)]
    frames = [encoded(codec, chunk, gradient) for gradient in gradients]
    one_by_one = torch.zeros(500)
    for frame in frames:
        codec.decode(chunk, frame, one_by_one, add=True)
    for count in range(1, 5):
        total = wrecked(chunk)
        codec.total(chunk, frames[:count], total)
        wanted = decoded(codec, chunk, frames[0])
        for frame in frames[1:count]:
            wanted = wanted + decoded(codec, chunk, frame)
        assert torch.equal(total, wanted)
    assert torch.equal(total, one_by_one)


# -- parameters and deltas -----------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(values_of, st.integers(0, 2**32 - 1))
def test_parameters_come_back_to_the_bit(values: Tensor, version: int) -> None:
    chunk = chunk_of(len(values))
    frame = write_parameters(chunk, values, version)
    assert parse(frame) == (0, Kind.PARAMETERS, chunk.index, version, 4 * len(values))
    assert torch.equal(read_parameters(chunk, frame, version).view(torch.int32), values.view(torch.int32))


@settings(max_examples=200, deadline=None)
@given(st.lists(values_of, min_size=2, max_size=5))
def test_a_replica_that_adds_the_deltas_holds_what_was_published(history: list[Tensor]) -> None:
    size = min(len(values) for values in history)
    chunk, shard, worker = chunk_of(size), dense("bf16"), dense("bf16")
    p = history[0][:size].clone()
    replica = p.clone()
    for version, w in enumerate(history[1:]):
        frame = publish(shard, chunk, w[:size], p, version, version + 1)
        assert parse(frame)[:4] == (1, Kind.DELTA, chunk.index, version)
        worker.advance(chunk, frame, replica, version)
        assert torch.equal(replica, p)


def test_what_a_delta_drops_goes_out_with_the_next() -> None:
    chunk, codec = chunk_of(300), dense("bf16")
    w = torch.randn(300, generator=torch.Generator().manual_seed(3))
    p = torch.zeros(300)
    gaps = []
    for version in range(3):
        publish(codec, chunk, w, p, version, version + 1)
        gaps.append((w - p).abs().max().item())
    assert gaps[0] > 0
    assert gaps[2] < gaps[0] / 2**14


def test_where_no_delta_leads_the_parameters_are_sent() -> None:
    chunk, codec = chunk_of(3), dense("bf16")
    w, p = torch.tensor([1.0, math.inf, math.nan]), torch.zeros(3)
    frame = publish(codec, chunk, w, p, 4, 9)
    assert parse(frame)[:4] == (0, Kind.PARAMETERS, chunk.index, 9)
    assert torch.equal(p.view(torch.int32), w.view(torch.int32))
    assert torch.equal(read_parameters(chunk, frame, 9).view(torch.int32), w.view(torch.int32))


def test_none_publishes_the_parameters() -> None:
    chunk, codec = chunk_of(3), dense("none")
    w, p = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
    frame = publish(codec, chunk, w, p, 0, 1)
    assert read_parameters(chunk, frame, 1).tolist() == p.tolist() == [1, 2, 3]
    with pytest.raises(BadFrame):
        codec.advance(chunk, frame, p, 1)


# -- frames of a hostile peer ------------------------------------------------------------------------------------


def header(codec: int, kind: int, chunk: int, version: int, body: int, zero: int = 0) -> bytes:
    return HEADER.pack(codec, kind, zero, chunk, version, body)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "change",
    [
        {"codec": 9},
        {"codec": "other"},
        {"kind": Kind.DELTA},
        {"kind": Kind.PARAMETERS},
        {"kind": 77},
        {"chunk": 2},
        {"chunk": 2**32 - 1},
        {"version": 1},
        {"zero": 1},
        {"body": 0},
        {"body": 2**32 - 1},
        {"cut": 1},
        {"cut": 9},
        {"more": 1},
        {"more": 400},
        {"trail": 4},
    ],
    ids=str,
)
def test_a_frame_that_is_not_the_one_asked_for_writes_nothing(
    name: str, change: dict[str, int | str]
) -> None:
    codec, chunk = dense(name), chunk_of(10)
    frame = encoded(codec, chunk, torch.ones(10))
    fields = {"codec": codec.id, "kind": 0, "chunk": 3, "version": 0, "body": len(frame) - 16, "zero": 0}
    for key, value in change.items():
        if key == "cut":
            frame = frame[: -int(value)]
            fields["body"] -= int(value)
        elif key == "more":
            frame += bytes(int(value))
            fields["body"] += int(value)
        elif key == "trail":
            frame += bytes(int(value))
        else:
            fields[key] = 1 - codec.id if value == "other" else int(value)
    frame = header(**fields) + frame[16:]
    out = wrecked(chunk)
    attempts: list[Callable[[], object]] = [
        lambda: codec.check(chunk, frame),
        lambda: codec.view(chunk, frame),
        lambda: codec.decode(chunk, frame, out, add=False),
        lambda: codec.decode(chunk, frame, out, add=True),
        lambda: codec.total(chunk, [encoded(codec, chunk, torch.ones(10)), frame], out),
    ]
    for attempt in attempts:
        with pytest.raises(BadFrame):
            attempt()
    assert torch.equal(out, wrecked(chunk))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=1_500, deadline=None)
@given(st.binary(max_size=80))
def test_random_bytes_write_nothing(name: str, data: bytes) -> None:
    codec, chunk = dense(name), chunk_of(10)
    out = wrecked(chunk)
    attempts: list[Callable[[], object]] = [
        lambda: codec.decode(chunk, data, out, add=True),
        lambda: codec.advance(chunk, data, out, 0),
        lambda: read_parameters(chunk, data, 0),
        lambda: parse(data),
    ]
    for attempt in attempts:
        with pytest.raises(BadFrame):
            attempt()
    assert torch.equal(out, wrecked(chunk))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=1_500, deadline=None)
@given(st.data())
def test_a_damaged_frame_writes_nothing_unless_only_its_values_are_damaged(
    name: str, data: st.DataObject
) -> None:
    codec, chunk = dense(name), chunk_of(10)
    whole = encoded(codec, chunk, torch.ones(10))
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    sound = len(damaged) == len(whole) and damaged[:16] == whole[:16]
    out = wrecked(chunk)
    try:
        codec.decode(chunk, bytes(damaged), out, add=False)
    except BadFrame:
        assert not sound
        assert torch.equal(out, wrecked(chunk))
    else:
        assert sound


@pytest.mark.parametrize("change", [{"version": 4}, {"chunk": 1}, {"kind": 0}, {"codec": 0}, {"body": 22}])
def test_a_delta_from_another_version_moves_nothing(change: dict[str, int]) -> None:
    codec, chunk = dense("bf16"), chunk_of(10)
    body = publish(codec, chunk, torch.ones(10), torch.zeros(10), 5, 6)[16:]
    fields = {"codec": 1, "kind": 1, "chunk": 3, "version": 5, "body": 20} | change
    p = wrecked(chunk)
    with pytest.raises(BadFrame):
        codec.advance(chunk, header(**fields) + body + bytes(fields["body"] - 20), p, 5)
    assert torch.equal(p, wrecked(chunk))
    codec.advance(chunk, header(1, 1, 3, 5, 20) + body, p, 5)
    assert torch.equal(p, wrecked(chunk) + 1)


# -- payloads ------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=6), st.integers(0, 8))
def test_frames_of_a_payload_are_cut_where_they_end(bodies: list[int], most: int) -> None:
    frames = [header(1, 0, index, 0, size) + bytes(size) for index, size in enumerate(bodies)]
    payload = b"".join(frames)
    if len(frames) > most:
        with pytest.raises(BadFrame):
            cut(payload, most)
        return
    assert cut(payload, most) == frames
    assert split(payload, range(10)) == dict(enumerate(frames))


@settings(max_examples=1_500, deadline=None)
@given(st.binary(max_size=100))
def test_random_payloads_are_refused_or_whole(data: bytes) -> None:
    try:
        frames = cut(data, 3)
    except BadFrame:
        return
    assert b"".join(frames) == data


def test_a_push_brings_a_chunk_once_and_only_those_of_its_bucket() -> None:
    frame = header(0, 0, 4, 0, 4) + bytes(4)
    assert split(frame, (4, 5)) == {4: frame}
    for payload, chunks in (
        (frame + frame, (4, 5)),
        (frame, (5, 6)),
        (frame[:-1], (4,)),
        (frame + b"x", (4, 5)),
    ):
        with pytest.raises(BadFrame):
            split(payload, chunks)


def test_a_frame_at_an_odd_address_is_read_all_the_same() -> None:
    chunk = chunk_of(10)
    for name in NAMES:
        codec = dense(name)
        frame = encoded(codec, chunk, torch.arange(10.0))
        for shift in range(1, 4):
            moved = memoryview(bytes(shift) + frame)[shift:]
            assert decoded(codec, chunk, moved).tolist() == list(range(10))
            out = torch.zeros(10)
            codec.total(chunk, [moved, frame], out)
            assert out.tolist() == [2.0 * i for i in range(10)]
    parameters = memoryview(bytes(3) + write_parameters(chunk, torch.arange(10.0), 1))[3:]
    assert read_parameters(chunk, parameters, 1).tolist() == list(range(10))


def test_the_header_is_sixteen_bytes_little_endian() -> None:
    chunk = chunk_of(2)
    frame = encoded(dense("none"), chunk, torch.tensor([1.0, -2.0]))
    assert frame == struct.pack("<BBHIIIff", 0, 0, 0, 3, 0, 8, 1.0, -2.0)
    assert UNKNOWN == -1


def test_there_is_no_codec_of_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="one of none, bf16, topk, auto"):
        by_name("zip")


# -- packers ---------------------------------------------------------------------------------------------


def packed(name: str, sizes: tuple[int, ...] = (12, 7)) -> tuple[Packer, list[Chunk]]:
    chunks = [chunk_of(size, index) for index, size in enumerate(sizes, start=2)]
    return dense(name).packer(chunks), chunks


@pytest.mark.parametrize("name", NAMES)
def test_what_is_taken_back_leaves_again_with_the_next_pack(name: str) -> None:
    packer, chunks = packed(name)
    for chunk in chunks:
        packer.values[chunk.index].copy_(torch.linspace(-1, 1, chunk.size) / 3)
    first = bytes(packer.pack())
    packer.take_back()
    assert bytes(packer.pack()) == first
    assert packer.sent(chunks[0].index) is None


@pytest.mark.parametrize("name", NAMES)
def test_frames_and_residual_add_up_over_many_packs(name: str) -> None:
    packer, chunks = packed(name)
    values = {chunk.index: torch.linspace(-1, 1, chunk.size) / 3 for chunk in chunks}
    codec, came = dense(name), {chunk.index: torch.zeros(chunk.size) for chunk in chunks}
    for _ in range(64):
        for index, wanted in values.items():
            packer.values[index].copy_(wanted)
        for chunk, frame in zip(
            chunks, split(packer.pack(), [c.index for c in chunks]).values(), strict=True
        ):
            codec.decode(chunk, frame, came[chunk.index], add=True)
    for index, wanted in values.items():  # without feedback bfloat16 would be off by up to 64 * 2 ** -10
        assert torch.allclose(came[index], 64 * wanted, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_pack_that_is_refused_leaves_the_other_chunks_as_they_were(name: str) -> None:
    packer, chunks = packed(name)
    for chunk in chunks:
        packer.values[chunk.index].copy_(torch.linspace(-1, 1, chunk.size) / 3)
    first = bytes(packer.pack())
    packer.take_back()
    packer.values[chunks[1].index][6] = math.inf
    with pytest.raises(NonFinite):
        packer.pack()
    packer.values[chunks[1].index][6] = torch.tensor(1.0) / 3
    packer.values[chunks[1].index].copy_(torch.linspace(-1, 1, chunks[1].size) / 3)
    assert bytes(packer.pack()) == first
