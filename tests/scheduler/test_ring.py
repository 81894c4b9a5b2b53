"""The placement: nobody holds much more than the mean, and a newcomer moves hardly more than it takes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zml.scheduler.ids import ChunkKey, ShardId, shard_id
from zml.scheduler.ring import capacity, place, point

ids = st.text(st.characters(codec="utf-8"), max_size=10)


def chunks(number: int, job: str = "") -> list[ChunkKey]:
    return [ChunkKey(f"{job}{index}") for index in range(number)]


def shards(number: int) -> list[ShardId]:
    return [shard_id(index) for index in range(number)]


def loads(placement: tuple[int, ...], number: int) -> list[int]:
    return [placement.count(shard) for shard in range(number)]


def moved(before: tuple[int, ...], after: tuple[int, ...]) -> int:
    return sum(a != b for a, b in zip(before, after, strict=True))


def test_the_largest_of_8_shards_holds_at_most_1_1_of_the_mean_of_400_chunks() -> None:
    assert max(loads(place(chunks(400), shards(8)), 8)) <= 55


@pytest.mark.parametrize("number", [400, 2000])
def test_one_shard_more_moves_at_most_1_5_of_its_share(number: int) -> None:
    before = place(chunks(number), shards(1))
    for n in range(1, 33):
        after = place(chunks(number), shards(n + 1))
        assert moved(before, after) <= 1.5 / (n + 1) * number, n
        assert max(loads(after, n + 1)) <= max(1.1 * number / (n + 1), -(-number // (n + 1)))
        before = after


@settings(deadline=None, max_examples=60)
@given(ids, st.integers(1, 31), st.integers(12, 30))
def test_load_and_movement_are_bounded_whatever_the_chunks_are_called(
    job: str, n: int, per_shard: int
) -> None:
    number = per_shard * (n + 1)
    before, after = place(chunks(number, job), shards(n)), place(chunks(number, job), shards(n + 1))
    assert moved(before, after) <= 1.5 / (n + 1) * number
    for placement, count in ((before, n), (after, n + 1)):
        assert max(loads(placement, count)) <= capacity(number, count, 1.1)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 40), st.sampled_from([1.0, 1.1, 1.5, 3.0]))
def test_no_size_is_too_small(number: int, count: int, vnodes: int, bound: float) -> None:
    placement = place(chunks(number), shards(count), vnodes=vnodes, bound=bound)
    assert len(placement) == number and set(placement) <= set(range(count))
    assert max(loads(placement, count)) <= capacity(number, count, bound)


def test_two_chunks_on_two_shards_are_one_each() -> None:
    assert sorted(place(chunks(2), shards(2))) == [0, 1]


def test_fewer_chunks_than_shards_are_all_on_different_shards() -> None:
    placement = place(chunks(3), shards(8))
    assert len(set(placement)) == 3


def test_a_chunk_goes_to_the_first_point_clockwise_where_nobody_is_full() -> None:
    keys, two = chunks(50), shards(2)
    points = sorted(
        (point(f"{shard}/{vnode}"), index) for index, shard in enumerate(two) for vnode in range(8)
    )
    expected = tuple(next((owner for at, owner in points if at >= point(key)), points[0][1]) for key in keys)
    assert place(keys, two, vnodes=8, bound=2.0) == expected


def test_the_placement_is_the_same_on_every_machine() -> None:
    assert place(chunks(12), shards(3)) == (1, 1, 2, 0, 2, 1, 2, 0, 1, 2, 0, 0)


def test_capacity_is_never_less_than_what_must_be_held() -> None:
    assert capacity(400, 8, 1.1) == 55
    assert capacity(401, 8, 1.1) == 55, "rounded down: 55.1 would be above the bound"
    assert capacity(7, 3, 1.1) == 3, "2 each would leave one over"
    assert capacity(0, 3, 1.1) == 0
