"""The packer for gradients on a device makes the frames that the CPU's makes; tried on a GPU where there is one."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from zml.codec import BadFrame, NonFinite, cut
from zml.codec.device import DevicePacker, add_frames
from zml.codec.sparse import TopK, TopKPacker
from zml.compression import VALUES, parse
from zml.layout import Chunk, Layout

SHAPES: Sequence[tuple[int, ...]] = (
    (40, 50),
    (50,),
    (70, 30),
    (),
    (3, 5, 7),
    (9,),
)  # matrices are sampled whole


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def codec_of(text: str) -> TopK:
    return TopK(parse(text))


def chunks_of(shapes: Sequence[tuple[int, ...]], elements: int = 1_300) -> tuple[Chunk, ...]:
    return Layout.build([(f"p{i}", shape, 0) for i, shape in enumerate(shapes)], 1, elements).chunks


class Pair:
    """The same bucket under both packers, with codecs of their own."""

    def __init__(self, text: str, chunks: Sequence[Chunk], seed: int = 1) -> None:
        self.chunks = chunks
        self.codecs = codec_of(text), codec_of(text)
        self.cpu = TopKPacker(self.codecs[0], chunks)
        self.device = DevicePacker(self.codecs[1], chunks, DEVICE)
        self.random = torch.Generator().manual_seed(seed)

    def fill(self, absent: frozenset[int] = frozenset()) -> None:
        for chunk in self.chunks:
            values = torch.randn(chunk.size, generator=self.random) ** 3
            for segment in chunk.segments:
                if segment.parameter in absent:
                    values[segment.offset : segment.offset + segment.size] = 0
            self.cpu.values[chunk.index].copy_(values)
            self.device.values[chunk.index].copy_(values)

    def same_residuals(self) -> bool:
        pairs = [(self.cpu.residual(c.index), self.device.residual(c.index)) for c in self.chunks]
        return all(torch.equal(one, other.cpu()) for one, other in pairs)

    def residuals(self) -> list[Tensor]:
        return [self.device.residual(chunk.index).cpu().clone() for chunk in self.chunks]

    def decoded(self, payload: memoryview) -> list[Tensor]:
        frames = cut(payload, len(self.chunks))
        out = [torch.zeros(chunk.size) for chunk in self.chunks]
        for chunk, frame, values in zip(self.chunks, frames, out, strict=True):
            self.codecs[0].check(chunk, frame)
            self.codecs[0].decode(chunk, frame, values, add=False)
        return out


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("density", ["0.1%", "1%", "10%", "40%", "100%"])
def test_where_the_threshold_is_exact_the_frames_are_the_same(values: str, density: str) -> None:
    pair = Pair(f"topk:{density}:{values}", chunks_of(SHAPES))
    for step, (absent, decay) in enumerate(((set(), 1.0), ({0, 3}, 1.0), ({1}, 0.5), (set(), 0.9))):
        pair.fill(frozenset(absent))
        one = bytes(pair.cpu.pack(absent, decay=decay))
        other = bytes(pair.device.pack(absent, decay=decay))
        assert other == one, f"step {step}"
        assert pair.same_residuals()
        for chunk in pair.chunks:
            here, there = pair.device.sent(chunk.index), pair.cpu.sent(chunk.index)
            assert here is not None and there is not None
            assert torch.equal(here, there)
    assert pair.codecs[0].index_bytes == pair.codecs[1].index_bytes


@pytest.mark.parametrize("indices", ["gap8", "off12", "rice", "bitmap", "dense"])
def test_every_index_coding_is_the_same(indices: str) -> None:
    pair = Pair(f"topk:5%:int4:{indices}", chunks_of(SHAPES))
    for _ in range(3):
        pair.fill()
        assert bytes(pair.device.pack()) == bytes(pair.cpu.pack())
        assert pair.same_residuals()


@pytest.mark.parametrize("text", ["topk:1%:int4", "topk:0.1%:2bit", "topk:5%:int8", "topk:30%:fp16"])
def test_a_sampled_threshold_keeps_about_as_many(text: str) -> None:
    pair = Pair(text, chunks_of(((600, 700), (300,)), 65_536))
    wanted = pair.codecs[0].spec.density * 420_000
    for _ in range(3):
        pair.fill()
        before = [
            total.add(pair.device.values[c.index].cpu())
            for c, total in zip(pair.chunks, pair.residuals(), strict=True)
        ]
        payload = pair.device.pack()
        kept = sum(pair.codecs[0].entries(c, f) for c, f in zip(pair.chunks, cut(payload, 99), strict=True))
        assert 0.8 * wanted <= kept <= 1.25 * wanted
        for total, read, left in zip(before, pair.decoded(payload), pair.residuals(), strict=True):
            assert torch.allclose(read + left, total, rtol=1e-6, atol=1e-6)
        pair.cpu.pack()


def test_with_the_cpu_s_thresholds_large_buckets_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = Pair("topk:1%", chunks_of(((600, 700), (300,), (100, 900)), 65_536))
    for _ in range(3):
        pair.fill()
        expected = bytes(pair.cpu.pack())
        floors = torch.tensor([*pair.cpu._floors.tolist(), torch.inf], device=DEVICE)
        monkeypatch.setattr(pair.device, "_floors", lambda *_, floors=floors: floors)
        assert bytes(pair.device.pack()) == expected
        assert pair.same_residuals()


def test_what_was_packed_can_be_taken_back() -> None:
    for text, decay in (("topk:1%", 1.0), ("topk:10%:2bit", 0.5), ("topk:100%", 1.0)):
        pair = Pair(text, chunks_of(SHAPES))
        pair.fill()
        pair.device.pack()
        before = pair.residuals()
        pair.fill(frozenset({2}))
        first = bytes(pair.device.pack({2}, decay=decay))
        pair.device.take_back()
        for one, other in zip(before, pair.residuals(), strict=True):
            assert torch.allclose(one, other, rtol=1e-6, atol=2e-6)
        pair.device.take_back()  # once
        for one, other in zip(before, pair.residuals(), strict=True):
            assert torch.allclose(one, other, rtol=1e-6, atol=2e-6)
        again = pair.decoded(pair.device.pack({2}, decay=decay))
        for one, other in zip(pair.decoded(memoryview(first)), again, strict=True):
            assert torch.allclose(one, other, rtol=0.2, atol=1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused_by_name_and_changes_nothing(bad: float) -> None:
    pair = Pair("topk:1%", chunks_of(SHAPES))
    pair.fill()
    pair.device.pack()
    before = pair.residuals()
    for parameter in (0, 1, 4):
        pair.fill()
        chunk, segment = next((c, s) for c in pair.chunks for s in c.segments if s.parameter == parameter)
        pair.device.values[chunk.index][segment.offset] = bad
        with pytest.raises(NonFinite) as refused:
            pair.device.pack()
        assert refused.value.parameter == parameter
        assert all(torch.equal(one, other) for one, other in zip(before, pair.residuals(), strict=True))
        pair.device.take_back()
        assert all(torch.equal(one, other) for one, other in zip(before, pair.residuals(), strict=True))


def test_zeros_constants_and_denormals() -> None:
    for value in (0.0, 1.0, 1e-40, -3e38):
        pair = Pair("topk:1%", chunks_of(((30, 40), (5,))))
        for packer in (pair.cpu, pair.device):
            for values in packer.values.values():
                values.fill_(value)
        payload = bytes(pair.device.pack())
        assert payload == bytes(pair.cpu.pack())
        for read, left in zip(pair.decoded(memoryview(payload)), pair.residuals(), strict=True):
            assert torch.allclose(
                read.double() + left.double(), torch.full_like(read, value).double(), rtol=1e-6
            )


def test_equal_elements_keep_neither_larger_ones_nor_another_tensor_from_leaving() -> None:
    pair = Pair("topk:1%", chunks_of(((200, 200), (200, 200)), 65_536))
    first, second = pair.chunks[0], pair.chunks[-1]
    values = torch.full((80_000,), 0.5)
    values[39_900:40_000] = 5.0  # the last of the first matrix
    values[40_000:] = torch.randn(40_000, generator=pair.random)
    for chunk in pair.chunks:
        begin = chunk.index * 65_536
        pair.device.values[chunk.index].copy_(values[begin : begin + chunk.size])
    pair.device.pack()
    sent = [(pair.device.sent(c.index), c.index * 65_536) for c in (first, second)]
    positions = torch.cat([places + begin for places, begin in sent if places is not None])
    assert set(range(39_900, 40_000)) <= set(positions.tolist())
    assert 400 <= (positions < 40_000).sum() <= 816
    assert 300 <= (positions >= 40_000).sum() <= 816


def test_all_of_a_matrix_leaves_where_all_of_it_is_wanted() -> None:
    pair = Pair("topk:1%:fp32:gap8", chunks_of(((400, 400),), 65_536))
    pair.fill()
    pair.device.pack(density=1.0)
    assert all(not left.any() for left in pair.residuals())


def test_a_bucket_of_vectors_only_goes_whole() -> None:
    pair = Pair("topk:1%", chunks_of(((5,), (700,)), 256))
    pair.fill()
    assert bytes(pair.device.pack()) == bytes(pair.cpu.pack())
    assert pair.same_residuals()


def test_a_decay_that_could_not_be_taken_back_is_refused() -> None:
    pair = Pair("topk:1%", chunks_of(SHAPES))
    for decay in (0.0, -1.0, 1.5, 1e-46):
        with pytest.raises(ValueError, match="decay"):
            pair.device.pack(decay=decay)


def test_frames_are_added_on_a_device_as_on_the_cpu() -> None:
    for text in ("topk:1%", "topk:10%:fp32", "topk:100%:2bit"):
        pair = Pair(text, chunks_of(SHAPES))
        starts = [3 + 2_000 * i for i in range(len(pair.chunks))]
        slab = torch.randn(2_000 * len(starts), generator=pair.random)
        expected = slab.clone()
        pair.fill()
        frames = cut(pair.device.pack(), len(pair.chunks))
        for chunk, frame, start in zip(pair.chunks, frames, starts, strict=True):
            pair.codecs[0].decode(chunk, frame, expected[start : start + chunk.size], add=True)
        add_frames(pair.codecs[1], pair.chunks, frames, starts, slab)
        assert torch.equal(slab, expected)
        with pytest.raises(BadFrame):
            add_frames(pair.codecs[1], pair.chunks, [*frames[:-1], frames[-1][:-1]], starts, slab)
        assert torch.equal(slab, expected)


def test_frames_are_whole() -> None:
    pair = Pair("topk:1%", chunks_of(SHAPES))
    pair.fill()
    frames = cut(pair.device.pack(), len(pair.chunks))
    assert len(frames) == len(pair.chunks)
    with pytest.raises(BadFrame):
        pair.codecs[0].check(pair.chunks[0], frames[0][:-1])
