"""Packing the difference between two states: the frames of what waited and what was added, without adding it up."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zml.codec import NonFinite, by_name
from zml.codec.runs import Run, joined
from zml.codec.sparse import TopKPacker
from zml.layout import CHUNK

from .test_sparse import assert_adds_up, chunks_of, heavy, opened, shapes_of, topk

MIXED = [(70, 300), (77,), (), (3, 5), (300, 190), (2_000,)]


def packer_of(text: str = "topk:2%", shapes: Sequence[tuple[int, ...]] = MIXED) -> TopKPacker:
    packer = topk(text).packer(chunks_of(shapes))
    assert packer.differing() is packer
    return packer


def states(packer: TopKPacker, seed: int) -> torch.Tensor:
    """Fill the base and the values; returns their difference."""
    base, values, _ = packer.slabs()
    base.zero_()
    values.zero_()
    for run in packer.runs:
        base[run.at : run.at + run.size] = heavy(run.size, seed + run.at)
        values[run.at : run.at + run.size] = heavy(run.size, seed + run.at + 1)
    return base - values


def test_a_difference_leaves_as_if_it_had_waited() -> None:
    packer, plain = packer_of(), packer_of()
    packer.slabs()[2].fill_(7)  # whatever was there before
    difference = states(packer, 5)
    plain.slabs()[1].copy_(difference)
    assert bytes(packer.pack_difference()) == bytes(plain.pack())
    for run in packer.runs:
        place = slice(run.at, run.at + run.size)
        assert torch.equal(packer.slabs()[2][place], plain.slabs()[2][place])


@settings(max_examples=60, deadline=None)
@given(shapes_of, st.integers(0, 1000), st.sampled_from(["1%", "20%", "100%"]))
def test_what_is_sent_and_what_stays_add_up_to_the_difference(
    shapes: list[tuple[int, ...]], seed: int, density: str
) -> None:
    packer = packer_of(f"topk:{density}:int8", shapes)
    difference = states(packer, seed)
    before = packer.slabs()[1].clone()
    sent = opened(packer.codec, packer, packer.pack_difference())
    given_ = torch.zeros_like(before)
    packer.give(given_)
    wanted = packer.by_chunk(difference)
    for index, after in packer.by_chunk(packer.slabs()[2]).items():
        assert_adds_up(sent[index], after, torch.zeros_like(after), wanted[index])
        assert torch.equal(packer.by_chunk(given_)[index], sent[index])
    assert torch.equal(packer.slabs()[1], before)
    places = packer.places()
    assert (np.diff(places) > 0).all()
    chosen = set(places.tolist())
    vectors = {
        at for run in packer.runs for at in range(run.at, run.at + run.size) if len(shapes[run.parameter]) < 2
    }
    assert not chosen & vectors
    assert set(torch.nonzero(given_).view(-1).tolist()) <= chosen | vectors


def test_places_are_those_of_each_chunk() -> None:
    packer = packer_of("topk:1%", [(3, CHUNK), (40, 50), (9,)])
    states(packer, 3)
    packer.pack_difference()
    found = []
    for chunk, start in zip(packer.chunks, packer._starts, strict=True):
        sent = packer.sent(chunk.index)
        assert sent is not None
        found += (sent + start).tolist()
    assert packer.places().tolist() == found and len(found) > 1000


def test_before_anything_was_packed_nothing_is_given() -> None:
    packer = packer_of()
    slab = packer.slabs()[1].clone()
    packer.give(slab)
    assert torch.equal(slab, packer.slabs()[1]) and not len(packer.places())


def test_what_is_taken_back_is_in_the_next_difference() -> None:
    packer = packer_of()
    states(packer, 11)
    first = bytes(packer.pack_difference())
    packer.take_back()
    assert not len(packer.places())
    assert bytes(packer.pack_difference()) == first


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_by_parameter(bad: float) -> None:
    packer = packer_of()
    states(packer, 2)
    values = packer.slabs()[1]
    run = next(run for run in packer.runs if run.parameter == 4)
    values[run.at + 17] = bad
    with pytest.raises(NonFinite) as refused:
        packer.pack_difference()
    assert refused.value.parameter == 4
    values[run.at + 17] = 1.0
    packer.pack_difference()


def test_codecs_that_send_everything_make_no_differences() -> None:
    for name in ("none", "bf16"):
        assert by_name(name).packer(chunks_of([(4, 4)])).differing() is None


def test_neighbours_are_joined() -> None:
    pieces = [Run(0, 0, 0, 16), Run(0, 16, 16, 16), Run(0, 40, 32, 8), Run(1, 48, 40, 8), Run(1, 56, 64, 8)]
    assert joined(pieces) == (Run(0, 0, 0, 32), Run(0, 40, 32, 8), Run(1, 48, 40, 8), Run(1, 56, 64, 8))
    assert joined([]) == ()


def test_a_matrix_over_many_chunks_is_one_run() -> None:
    packer = packer_of("topk:1%", [(4, CHUNK)])
    assert packer.runs == (Run(0, 0, 0, 4 * CHUNK),)
