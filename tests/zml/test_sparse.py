"""The sparse codec: what leaves and what waits add up, in every coding, and replicas agree to the bit."""

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lz4.block
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zml.codec import BadFrame, Behind, Kind, NonFinite, by_name, parse, split
from zml.codec.frame import HEADER
from zml.codec.kernels import NOTICE
from zml.codec.sparse import TopK, TopKPacker
from zml.compression import INDICES, VALUES, Compression
from zml.compression import parse as parse_spec
from zml.layout import CHUNK, Chunk, Layout

from .reference import energy, top_k
from .test_codec import publish

Shape = tuple[int, ...]
EPSILON = 2.0**-23


def topk(text: str = "topk:1%") -> TopK:
    codec = by_name(text)
    assert isinstance(codec, TopK)
    return codec


def chunks_of(shapes: Sequence[Shape]) -> tuple[Chunk, ...]:
    return Layout.build([(f"p{i}", shape, 0) for i, shape in enumerate(shapes)], 1).chunks


def heavy(size: int, seed: int) -> Tensor:
    """Student-t with three degrees of freedom."""
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, size).astype(np.float32))


def fill(packer: TopKPacker, seed: int = 0, scale: float = 1.0) -> dict[int, Tensor]:
    for chunk in packer.chunks:
        packer.values[chunk.index].copy_(heavy(chunk.size, seed + chunk.index) * scale)
    return {index: values.clone() for index, values in packer.values.items()}


def residuals(packer: TopKPacker) -> dict[int, Tensor]:
    return {chunk.index: packer.residual(chunk.index).clone() for chunk in packer.chunks}


def decoded(codec: TopK, chunk: Chunk, frame: memoryview | bytes) -> Tensor:
    out = torch.full((chunk.size,), math.nan)
    codec.decode(chunk, frame, out, add=False)
    return out


def opened(codec: TopK, packer: TopKPacker, payload: memoryview) -> dict[int, Tensor]:
    frames = split(payload, [chunk.index for chunk in packer.chunks])
    assert list(frames) == [chunk.index for chunk in packer.chunks]
    for chunk in packer.chunks:
        codec.check(chunk, frames[chunk.index])
    return {chunk.index: decoded(codec, chunk, frames[chunk.index]) for chunk in packer.chunks}


def assert_adds_up(sent: Tensor, after: Tensor, before: Tensor, values: Tensor, decay: float = 1.0) -> None:
    """decode(frame) + e' == decay * e + g, up to a rounding of what was added."""
    wanted = before.double() * float(np.float32(decay)) + values.double()
    size = torch.stack(
        [sent.double().abs(), after.double().abs(), before.double().abs(), values.double().abs()]
    )
    assert ((sent.double() + after.double() - wanted).abs() <= 1e-6 * size.amax(0) + 1e-44).all()


# -- what leaves and what waits ---------------------------------------------------------------------------


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("indices", ["", *INDICES])
def test_frame_and_residual_add_up_in_every_coding(values: str, indices: str) -> None:
    codec = topk(f"topk:2%:{values}:{indices}".rstrip(":"))
    packer = codec.packer(chunks_of([(70, 300), (77,), (), (3, 5), (300, 190), (2_000,)]))
    for step in range(3):
        before, given_ = residuals(packer), fill(packer, seed=10 * step)
        sent = opened(codec, packer, packer.pack())
        for index, after in residuals(packer).items():
            assert_adds_up(sent[index], after, before[index], given_[index])
            if values == "fp32":
                assert torch.equal(sent[index] + after, before[index] + given_[index]) or indices == "dense"


shapes_of = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 130)),
        st.just(()),
        st.tuples(st.integers(1, 90), st.integers(1, 90)),
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    ),
    min_size=1,
    max_size=6,
).filter(lambda shapes: any(math.prod(shape) for shape in shapes))
specials = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 2.0**-126, 1e-20, 65_504.0, 70_000.0, 1e30, -3.3e38, 1e38]


@settings(max_examples=300, deadline=None)
@given(shapes_of, st.data())
def test_frame_and_residual_add_up_whatever_is_packed(shapes: list[Shape], data: st.DataObject) -> None:
    values, indices = data.draw(st.sampled_from(VALUES)), data.draw(st.sampled_from(["", *INDICES]))
    codec, chunks = topk(f"topk:1%:{values}:{indices}".rstrip(":")), chunks_of(shapes)
    packer = codec.packer(chunks)
    density = data.draw(st.sampled_from([0.0005, 0.01, 0.05, 0.2, 0.5, 1.0]))
    decay = data.draw(st.sampled_from([1.0, 0.95, 0.5]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    kind = data.draw(st.sampled_from(["heavy", "constant", "zero", "special", "sparse"]))
    absent = data.draw(st.frozensets(st.integers(0, len(shapes)), max_size=2))
    for _ in range(2):
        before = residuals(packer)
        for chunk in chunks:
            drawn = rng.standard_t(3, chunk.size)
            if kind == "constant":
                drawn[:] = 0.3
            elif kind == "zero":
                drawn[:] = 0
            elif kind == "special":
                drawn = rng.choice(specials, chunk.size) / 4
            elif kind == "sparse":
                drawn[rng.random(chunk.size) < 0.99] = 0
            packer.values[chunk.index].copy_(torch.from_numpy(drawn.astype(np.float32)))
            for segment in chunk.segments:
                if segment.parameter in absent:
                    packer.values[chunk.index][segment.offset : segment.offset + segment.size] = 0
        given_ = {index: value.clone() for index, value in packer.values.items()}
        sent = opened(codec, packer, packer.pack(absent, density, decay))
        after = residuals(packer)
        for chunk in chunks:
            positions = packer.sent(chunk.index)
            assert positions is not None and positions.dtype == torch.int64
            assert (positions.diff() > 0).all()
            quiet = torch.ones(chunk.size, dtype=torch.bool)
            quiet[positions] = False
            for segment in chunk.segments:
                part = slice(segment.offset, segment.offset + segment.size)
                if segment.parameter in absent:
                    assert torch.equal(after[chunk.index][part], before[chunk.index][part])
                    assert not sent[chunk.index][part].any()
                    continue
                cut = [tensors[chunk.index][part] for tensors in (sent, after, before, given_)]
                assert_adds_up(cut[0], cut[1], cut[2], cut[3], decay)
                if segment.ndim > 1:
                    assert not sent[chunk.index][part][quiet[part]].any()
        packer.take_back()
        for chunk in chunks:
            peak = (after[chunk.index].abs().maximum(given_[chunk.index].abs())).maximum(
                before[chunk.index].abs()
            )
            gap = (packer.residual(chunk.index) - before[chunk.index]).abs()
            assert (gap <= 1e-5 * peak + 1e-44).all()
        packer.pack(absent, density, decay)


def test_the_same_input_makes_the_same_bytes() -> None:
    payloads = set()
    for _ in range(2):
        packer = topk().packer(chunks_of([(300, 500), (77,)]))
        packers = b""
        for step in range(3):
            fill(packer, seed=step)
            packers += bytes(packer.pack())
        payloads.add(packers)
    assert len(payloads) == 1


def test_what_is_taken_back_leaves_again() -> None:
    packer = topk().packer(chunks_of([(300, 500), (77,)]))
    fill(packer, seed=5)
    first = bytes(packer.pack())
    packer.take_back()
    packer.take_back()  # there is nothing more to take back
    assert all(residual.abs().max() < 1e-5 for residual in residuals(packer).values())
    assert bytes(packer.pack()) == first


def test_all_that_is_packed_arrives_in_the_end() -> None:
    codec = topk("topk:5%:2bit")
    packer = codec.packer(chunks_of([(60, 60), (9,)]))
    came = torch.zeros(3_609)
    given_ = fill(packer)[0]
    came += opened(codec, packer, packer.pack())[0]
    packer.values[0].zero_()
    for _ in range(60):
        came += opened(codec, packer, packer.pack())[0]
    assert torch.allclose(came, given_, atol=0.05, rtol=0)
    for _ in range(200):
        came += opened(codec, packer, packer.pack(density=1.0))[0]
    assert torch.allclose(came, given_, atol=1e-4, rtol=0)


def test_zeros_send_nothing() -> None:
    codec, chunks = topk(), chunks_of([(256, 300)])
    packer = codec.packer(chunks)
    payload = packer.pack()
    assert len(payload) == sum(HEADER.size + 4 for _ in chunks)
    frames = split(payload, [0, 1])
    assert [codec.entries(chunk, frames[chunk.index]) for chunk in chunks] == [0, 0]
    assert [np.asarray(packer.sent(chunk.index)).size for chunk in chunks] == [0, 0]


def test_denormals_wait_until_they_are_more() -> None:
    codec = topk("topk:100%:fp32")
    packer = codec.packer(chunks_of([(4, 4)]))
    packer.values[0].fill_(2.0**-127)
    assert not opened(codec, packer, packer.pack())[0].any()
    assert torch.equal(opened(codec, packer, packer.pack())[0], torch.full((16,), 2.0**-126))


def test_of_equal_elements_a_bounded_part_leaves_at_a_time_and_all_in_turn() -> None:
    codec, (chunk,) = topk("topk:1%"), chunks_of([(200, 200)])
    packer = codec.packer([chunk])
    packer.values[0].fill_(0.5)
    counts = torch.zeros(chunk.size)
    for _ in range(200):
        packer.pack()
        positions = packer.sent(0)
        assert positions is not None and len(positions) <= 8 * 400 + 64
        counts[positions] += 1
    assert counts.min() >= 1


def test_a_matrix_in_several_chunks_has_one_threshold() -> None:
    codec, chunks = topk("topk:1%"), chunks_of([(400, 400)])
    packer = codec.packer(chunks)
    fill(packer)
    packer.values[1].mul_(100)
    packer.pack()
    counts = [len(positions) for chunk in chunks if (positions := packer.sent(chunk.index)) is not None]
    assert counts[1] > 0.8 * sum(counts)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("size", [(100, 100), (300, 700), (1_200, 1_000)])
def test_what_is_kept_is_almost_what_exact_top_k_keeps(size: Shape, density: float) -> None:
    codec, chunks = topk("topk:1%:fp32:rice"), chunks_of([size])
    packer = codec.packer(chunks)
    total = size[0] * size[1]
    for step in range(3):
        before, given_ = residuals(packer), fill(packer, seed=step)
        sums = torch.cat([before[chunk.index] + given_[chunk.index] for chunk in chunks]).numpy()
        packer.pack(density=density)
        kept = np.concatenate([np.asarray(packer.sent(c.index)) + CHUNK * c.index for c in chunks])
        wanted = top_k(sums, max(1, round(density * total)))
        if total <= 16_384:
            assert np.array_equal(kept, wanted)
        assert 0.7 < len(kept) / len(wanted) < 1.4
        assert np.array_equal(kept, top_k(sums, len(kept)))  # nothing larger was left behind
        assert energy(sums, kept) > 0.9 * energy(sums, wanted)


def test_about_as_many_are_kept_as_should_be() -> None:
    codec, chunks = topk("topk:1%"), chunks_of([(1_000, 2_000)])
    for density in (0.001, 0.01):
        packer, ratios = codec.packer(chunks), []
        for step in range(6):
            fill(packer, seed=100 * step)
            packer.pack(density=density)
            kept = sum(len(np.asarray(packer.sent(chunk.index))) for chunk in chunks)
            ratios.append(kept / (2_000_000 * density))
        assert 0.9 < np.mean(ratios) < 1.1
        assert min(ratios) > 0.75 and max(ratios) < 1.3


def test_rows_of_unlike_size_do_not_fool_the_sample() -> None:
    codec, chunks = topk("topk:1%"), chunks_of([(2_048, 512)])
    packer = codec.packer(chunks)
    for step in range(3):
        fill(packer, seed=step)
        for chunk in chunks:  # columns, every 16th: a stride of one line would see one class only
            packer.values[chunk.index].view(-1, 16)[:, 3].mul_(50)
            packer.values[chunk.index].view(-1, 512)[::7].mul_(20)
        packer.pack()
        kept = sum(len(np.asarray(packer.sent(chunk.index))) for chunk in chunks)
        assert 0.6 < kept / 10_486 < 1.6


# -- what is not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_what_is_not_finite_is_refused_by_parameter_and_changes_nothing(bad: float, decay: float) -> None:
    codec, shapes = topk(), [(300, 400), (77,), (5, 5), (11, 4)]
    chunks = chunks_of(shapes)
    packer = codec.packer(chunks)
    for step in range(2):
        fill(packer, seed=step)
        packer.pack(decay=decay)
    before = residuals(packer)
    for at, parameter in [(0, 0), (65_535, 0), (119_999, 0), (120_076, 1), (120_101, 2), (120_145, 3)]:
        fill(packer, seed=9)
        chunk, place = divmod(at, CHUNK)
        packer.values[chunk][place] = bad
        with pytest.raises(NonFinite) as caught:
            packer.pack(decay=decay)
        assert caught.value.parameter == parameter
        for index, residual in residuals(packer).items():
            assert torch.allclose(residual, before[index], atol=2e-5, rtol=1e-5)
        packer.take_back()  # nothing left
        assert torch.equal(packer.residual(0), residuals(packer)[0])


def test_a_sum_that_overflows_is_not_finite() -> None:
    packer = topk("topk:1%:fp32").packer(chunks_of([(400, 400)]))
    for chunk in packer.chunks:
        packer.values[chunk.index].fill_(3e38)
    packer.pack()
    with pytest.raises(NonFinite):
        packer.pack()


def test_a_decay_that_could_not_be_taken_back_is_refused() -> None:
    packer = topk().packer(chunks_of([(4, 4)]))
    for decay in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="decay"):
            packer.pack(decay=decay)


# -- sums and deltas -----------------------------------------------------------------------------------------


def test_several_frames_add_up_in_their_order() -> None:
    codec, (chunk,) = topk("topk:5%"), chunks_of([(100, 90), (31,)])
    frames = []
    for seed in range(3):
        packer = codec.packer([chunk])
        fill(packer, seed)
        frames.append(bytes(packer.pack()))
    one_by_one = torch.zeros(chunk.size)
    for frame in frames:
        codec.decode(chunk, frame, one_by_one, add=True)
    total = torch.full((chunk.size,), math.nan)
    codec.total(chunk, frames, total)
    assert torch.equal(total, one_by_one)
    assert codec.view(chunk, frames[0]) is None
    assert codec.entries(chunk, frames[0]) == 450


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("indices", ["", *INDICES])
def test_replicas_hold_what_was_published_to_the_bit(values: str, indices: str) -> None:
    text = f"topk:1%:{values}:{indices}".rstrip(":")
    shard, workers = topk(text), [topk(text), topk("topk:5%")]
    (chunk,) = chunks_of([(200, 200), (77,), (3, 3)])
    w = heavy(chunk.size, 1)
    p = w.clone()
    replicas = [p.clone(), p.clone()]
    for version in range(6):
        w += heavy(chunk.size, 2 + version) * 0.01
        frame = publish(shard, chunk, w, p, version, version + 1, [500, 0, 100_000, 41, 3_000, 500][version])
        assert parse(frame)[:4] == (2, Kind.DELTA, chunk.index, version)
        for codec, replica in zip(workers, replicas, strict=True):
            codec.advance(chunk, frame, replica, version)
            assert torch.equal(replica.view(torch.int32), p.view(torch.int32))


@pytest.mark.parametrize("values", ["fp32", "int4", "2bit"])
def test_chunks_that_are_published_at_once_are_what_they_are_one_by_one(values: str) -> None:
    """Matrices, vectors, both; nothing to send, everything, and a chunk to which no finite delta leads."""
    chunks = chunks_of([(900, 100), (30,), (40, 40), (65_600,), (500, 300)])
    assert len(chunks) == 5 and chunks[2].segments[0].ndim == 1
    together, apart = topk(f"topk:1%:{values}"), topk(f"topk:1%:{values}")
    ws = [heavy(chunk.size, 3 + chunk.index) for chunk in chunks]
    ws[3][7] = math.inf
    ps = [torch.zeros(chunk.size) for chunk in chunks], [torch.zeros(chunk.size) for chunk in chunks]
    for version in range(4):
        told = [(version, version + 1, (400 * chunk.index + version) % 1_300) for chunk in chunks]
        frames = together.publish(
            [Behind(chunk, w, p, *now) for chunk, w, p, now in zip(chunks, ws, ps[0], told, strict=True)]
        )
        for chunk, w, p, now, frame in zip(chunks, ws, ps[1], told, frames, strict=True):
            assert frame == publish(apart, chunk, w, p, *now)
            kind = Kind.PARAMETERS if chunk.index == 3 else Kind.DELTA
            assert parse(frame).kind == kind and parse(frame).chunk == chunk.index
        for at_once, alone in zip(*ps, strict=True):
            assert torch.equal(at_once.view(torch.int32), alone.view(torch.int32))
        for w in ws:
            w += heavy(len(w), version) * 0.01
    assert together.index_bytes == apart.index_bytes


SHAPES = {
    "a vector behind": [(20, 20), (20,)],
    "a vector between": [(20, 20), (20,), (200, 200)],
    "a vector before": [(77,), (200, 200)],
    "few elements that are chosen from": [(600,), (20, 5)],
    "all alike, matrices only": [(100, 100)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("values", VALUES)
def test_what_is_published_brings_p_closer_to_w_and_follows_from_nothing_else(
    shapes: Sequence[Shape], values: str
) -> None:
    """Whatever was published before, of whichever chunk."""
    (chunk,) = chunks_of(shapes)
    vector = np.zeros(chunk.size, bool)
    for segment in chunk.segments:
        vector[segment.offset : segment.offset + segment.size] = segment.ndim < 2
    steady = torch.ones(chunk.size)
    steady[:: 7 if len(shapes) > 1 else 5] = 3.0
    for w in (heavy(chunk.size, 5), steady, torch.ones(chunk.size)):
        fresh, used = topk(f"topk:1%:{values}"), topk(f"topk:1%:{values}")
        for memory in (used.scratch.total, used.scratch.val):
            memory.fill(777.0)
        used.scratch.pos.fill(9)
        for guess, codec in enumerate((fresh, used)):
            # The threshold of the last delta is a guess for the next, and no more than that.
            publish(codec, chunk, w * (0.1 + 9 * guess), torch.zeros(chunk.size), 0, 1, 50 + 200 * guess)
        ps = torch.zeros(chunk.size), torch.zeros(chunk.size)
        for version in range(3):
            before = np.abs((w - ps[0]).numpy())
            budget = int((~vector).sum()) // 3
            frames = [
                publish(c, chunk, w, p, version, 0, budget) for c, p in zip((fresh, used), ps, strict=True)
            ]
            assert frames[0] == frames[1] and torch.equal(*ps)
            after = np.abs((w - ps[0]).numpy())
            assert (after[vector] <= before[vector] * 2.0**-8 + 1e-37).all(), "rounded to bfloat16"
            assert (after <= before * 1.0001 + 0.4 * before.max()).all()
            assert (after**2).sum() <= (before**2).sum()


def test_where_the_budget_suffices_all_that_differs_goes_out() -> None:
    codec, (chunk,) = topk("topk:1%:fp32"), chunks_of([(200, 200), (77,)])
    w = torch.zeros(chunk.size)
    p = w.clone()
    w[torch.arange(0, 40_000, 100)] = 1.0
    w[40_001] = 0.5
    frame = publish(codec, chunk, w, p, 0, 1, 400)
    assert codec.entries(chunk, frame) == 400
    assert torch.equal(p, w)
    assert len(publish(codec, chunk, w, p, 1, 2, 400)) == HEADER.size + 2 * 77 + 4


def test_with_a_smaller_budget_the_largest_go_out_and_the_rest_later() -> None:
    codec, (chunk,) = topk("topk:1%:fp32"), chunks_of([(200, 200)])
    w, p = heavy(chunk.size, 3), torch.zeros(chunk.size)
    for version in range(4):
        gap = (w - p).numpy()
        frame = publish(codec, chunk, w, p, version, version + 1, 1_000)
        assert codec.entries(chunk, frame) == 1_000
        moved = np.flatnonzero((w - p).numpy() != gap)
        assert np.array_equal(moved, top_k(gap, 1_000))
    for version in range(4, 45):
        publish(codec, chunk, w, p, version, version + 1, 1_000)
    assert torch.allclose(w, p, atol=1e-6)


def test_a_delta_of_zero_budget_moves_vectors_only() -> None:
    codec, (chunk,) = topk(), chunks_of([(9, 9), (5,)])
    w, p = torch.ones(chunk.size), torch.zeros(chunk.size)
    publish(codec, chunk, w, p, 0, 1, 0)
    assert p.tolist() == [0.0] * 81 + [1.0] * 5


@pytest.mark.parametrize(
    ("w_at", "p_at"), [(math.inf, 0.0), (math.nan, 0.0), (3e38, -3e38), (3.402e38, 1.0), (1.0, math.inf)]
)
@pytest.mark.parametrize("place", [5, 90])
def test_where_no_finite_delta_leads_the_parameters_are_sent(w_at: float, p_at: float, place: int) -> None:
    codec, (chunk,) = topk("topk:1%:int4"), chunks_of([(9, 9), (20,)])
    w, p = torch.linspace(-1, 1, 101), torch.zeros(101)
    w[place], p[place] = w_at, p_at
    replica = p.clone()
    frame = publish(codec, chunk, w, p, 4, 9, 50)
    if parse(frame).kind == Kind.DELTA:  # it did lead there, and to something finite
        assert torch.isfinite(p).all()
        codec.advance(chunk, frame, replica, 4)
        assert torch.equal(replica, p)
    else:
        assert parse(frame)[:4] == (0, Kind.PARAMETERS, chunk.index, 9)
        assert torch.equal(p.view(torch.int32), w.view(torch.int32))
    if w_at not in (3.402e38,):
        assert parse(frame).kind == Kind.PARAMETERS


def test_a_delta_that_would_leave_what_is_finite_moves_nothing() -> None:
    codec, (chunk,) = topk("topk:1%:fp32"), chunks_of([(9, 9), (20,)])
    w = torch.full((101,), 3e38)
    frame = publish(codec, chunk, w, torch.zeros(101), 0, 1, 81)
    p = torch.full((101,), 3e38)
    with pytest.raises(BadFrame, match="no longer be finite"):
        codec.advance(chunk, frame, p, 0)
    assert torch.equal(p, w)


# -- codings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("density", "coding"), [(0.001, "rice"), (0.01, "gap8"), (0.05, "gap8"), (0.2, "bitmap"), (0.5, "dense")]
)
def test_positions_are_coded_as_their_density_asks(density: float, coding: str) -> None:
    codec, (chunk,) = topk("topk:1%:int4"), chunks_of([(256, 256)])
    packer = codec.packer([chunk])
    fill(packer)
    payload = packer.pack(density=density)
    assert INDICES[payload[HEADER.size] & 7] == coding


def test_where_twelve_bits_are_less_than_rice_they_are_taken() -> None:
    codec, (chunk,) = topk("topk:1%:int4"), chunks_of([(256, 256)])
    packer = codec.packer([chunk])
    packer.values[0][torch.arange(40) * 4096 // 3] = heavy(40, 1)  # a few, of which Rice expects more
    rice = bytes(packer.pack(density=40 / 65_536))
    assert INDICES[rice[HEADER.size] & 7] in ("off12", "rice")


def test_a_block_too_full_for_its_count_is_coded_otherwise() -> None:
    codec, (chunk,) = topk("topk:1%:int4:off12"), chunks_of([(256, 256)])
    packer = codec.packer([chunk])
    packer.values[0][:300] = 1
    payload = packer.pack(density=300 / 65_536)
    assert INDICES[payload[HEADER.size] & 7] == "rice"
    packer = codec.packer([chunk])
    packer.values[0][:255] = 1
    payload = packer.pack(density=255 / 65_536)
    assert INDICES[payload[HEADER.size] & 7] == "off12"


@pytest.mark.parametrize(
    ("text", "bits"), [("topk:1%:int4", 13.0), ("topk:1%:2bit", 11.7), ("topk:0.1%:int4", 18.8)]
)
def test_an_entry_takes_few_bits(text: str, bits: float) -> None:
    codec, chunks = topk(text), chunks_of([(2_048, 1_024)])
    packer = codec.packer(chunks)
    size = entries = 0
    for step in range(10):
        fill(packer, seed=50 * step)
        payload = packer.pack()
        frames = split(payload, [chunk.index for chunk in chunks])
        size += len(payload)
        entries += sum(codec.entries(chunk, frames[chunk.index]) for chunk in chunks)
    assert 8 * size / entries <= bits


def test_clustered_positions_shrink_under_lz4_and_its_gain_is_counted() -> None:
    codec, (chunk,) = topk("topk:10%:int4"), chunks_of([(256, 256)])
    packer = codec.packer([chunk])
    packer.values[0].view(64, 1024)[:, :100] = heavy(6_400, 1).view(64, 100)
    sent = opened(codec, packer, packer.pack())[0]
    assert codec.index_bytes.after < 0.97 * codec.index_bytes.before
    assert_adds_up(sent, packer.residual(0), torch.zeros(chunk.size), packer.values[0])
    payload = packer.pack()
    assert codec.index_bytes.tried <= codec.index_bytes.before
    assert payload[HEADER.size] & 64


def test_lz4_is_not_kept_where_it_saves_nothing() -> None:
    codec, (chunk,) = topk("topk:1%:int4"), chunks_of([(256, 256)])
    packer = codec.packer([chunk])
    fill(packer)
    payload = packer.pack()
    assert not payload[HEADER.size] & 64
    assert codec.index_bytes.before == codec.index_bytes.after > 600


def lz4_kernels() -> Any:
    from zml.codec.kernels import lz4block

    return lz4block


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.binary(min_size=1, max_size=9), st.integers(1, 60)), min_size=1, max_size=40))
def test_lz4_blocks_are_those_of_everybody_else(parts: list[tuple[bytes, int]]) -> None:
    lz4block = lz4_kernels()
    data = b"".join(part * times for part, times in parts)
    source = np.frombuffer(data, np.uint8)
    out, back = np.zeros(2 * len(data) + 64, np.uint8), np.zeros(len(data) + 8, np.uint8)
    size = lz4block.compress(source, 0, len(data), out, len(out), np.zeros(4096, np.int32))
    assert 0 < size
    assert lz4.block.decompress(out[:size].tobytes(), uncompressed_size=len(data)) == data
    theirs = np.frombuffer(lz4.block.compress(data, store_size=False), np.uint8)
    assert lz4block.decompress(theirs, 0, len(theirs), back, len(data))
    assert back[: len(data)].tobytes() == data
    assert not back[len(data) :].any()


def half_kernels() -> Any:
    from zml.codec.kernels import values

    return values


def test_sixteen_bits_are_rounded_as_torch_rounds() -> None:
    values = half_kernels()
    bits = np.random.default_rng(4).integers(0, 2**32, 20_000, dtype=np.uint32)
    floats = torch.from_numpy(bits.view(np.float32).copy())
    floats = torch.cat([floats, torch.logspace(-30, 20, 2_000, 2.0), -torch.logspace(-30, 20, 2_000, 2.0)])
    floats = floats[floats.isfinite()]
    for kind, ours in ((torch.bfloat16, values.bf16_bits), (torch.float16, values.fp16_bits)):
        info = torch.finfo(kind)
        wanted = floats.clamp(info.min, info.max).to(kind).clamp(info.min, info.max).view(torch.int16)
        got = [ours(int(word)) for word in floats.numpy().view(np.uint32)]
        assert np.array_equal(np.array(got, np.uint16), wanted.numpy().view(np.uint16))


def test_a_value_too_large_for_its_coding_leaves_in_parts() -> None:
    codec = topk("topk:100%:fp16")
    packer = codec.packer(chunks_of([(2, 2)]))
    packer.values[0].fill_(100_000)
    came = opened(codec, packer, packer.pack())[0]
    assert came.tolist() == [65_504.0] * 4
    packer.values[0].zero_()
    came += opened(codec, packer, packer.pack())[0]
    assert came.tolist() == pytest.approx([100_000.0] * 4, rel=1e-3)


# -- what --compress says ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("none", Compression("none")),
        ("bf16", Compression("bf16")),
        ("auto", Compression("auto")),
        ("topk:1%", Compression("topk", 0.01, "int4")),
        ("TopK:0.1%:2bit", Compression("topk", 0.001, "2bit")),
        ("topk:0.01:fp16:rice", Compression("topk", 0.01, "fp16", "rice")),
        ("topk:100%:bitmap:int8", Compression("topk", 1.0, "int8", "bitmap")),
        ("topk:100%", Compression("topk", 1.0, "int4")),
    ],
)
def test_what_is_said_is_understood_and_said_again(text: str, wanted: Compression) -> None:
    assert parse_spec(text) == wanted
    assert parse_spec(str(wanted)) == wanted


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "one of none, bf16, topk, auto"),
        ("bf61", "did you mean 'bf16'"),
        ("top:1%", "did you mean 'topk'"),
        ("none:1%", "none takes no '1%'"),
        ("topk", "write 'topk:1%'"),
        ("topk:", "write 'topk:1%'"),
        ("topk:many", "'many' is no density"),
        ("topk:0%", "above 0"),
        ("topk:-1%", "above 0"),
        ("topk:nan", "above 0"),
        ("topk:101%", "at most 100%"),
        ("topk:5", "write 'topk:5%'"),
        ("topk:1", "write 'topk:1%' or, for all elements, 'topk:100%'"),
        ("topk:1.0:int8", "could be read in two ways"),
        ("topk:1%:int44", "did you mean 'int4'"),
        ("topk:1%:int4:int8", "answered twice"),
        ("topk:1%:rise", "did you mean 'rice'"),
        ("topk:1%:xyz", "one of fp32, "),
    ],
)
def test_what_cannot_be_meant_is_answered_with_what_can(text: str, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_spec(text)
    assert says in str(caught.value)


def test_auto_is_no_codec_by_itself() -> None:
    with pytest.raises(ValueError, match="auto"):
        by_name("auto")
    assert topk("topk:0.1%:2bit").name == "topk:0.1%:2bit"


# -- compiling ------------------------------------------------------------------------------------------------


def in_a_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True
    )
    return done.stdout + done.stderr


def test_kernels_that_were_compiled_before_are_loaded_in_silence() -> None:
    topk()  # compiled here at the latest
    said = in_a_process(
        "from zml.codec.kernels import prepare; prepare(print); prepare(print); print('ready')"
    )
    assert said == "ready\n"


def test_codecs_that_send_everything_do_not_load_a_compiler() -> None:
    code = "import sys; from zml.codec import by_name; by_name('bf16'); print('numba' in sys.modules)"
    assert in_a_process(code) == "False\n"


def test_where_the_package_cannot_be_written_the_users_cache_holds_the_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from zml.codec import kernels

    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mkdir: Callable[..., None] = Path.mkdir

    def read_only(self: Path, *arguments: Any, **keywords: Any) -> None:
        if "__pycache__" in self.parts:
            raise PermissionError(self)
        mkdir(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "mkdir", read_only)
    folder = kernels._folder("1.0")
    assert folder.parent == tmp_path / "zml"
    assert folder != kernels._folder("2.0")  # what another compiler made is not used
    assert NOTICE.startswith("compiling")
