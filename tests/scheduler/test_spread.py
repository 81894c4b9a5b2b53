"""What moves to a shard that joins: its fair share, from those that hold the most, and nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from zml.scheduler.spread import Portion, next_portion


def spread(holders: list[int], weights: list[int], newcomers: list[int], most: int = 1) -> list[Portion]:
    portions = []
    while (portion := next_portion(holders, weights, newcomers, most)) is not None:
        holders = portion.applied_to(holders)
        portions.append(portion)
        assert len(portions) <= len(holders), "it does not end"
    return portions


def loads(holders: list[int], weights: list[int]) -> dict[int, int]:
    found: dict[int, int] = {}
    for bucket, shard in enumerate(holders):
        found[shard] = found.get(shard, 0) + weights[bucket]
    return found


def test_a_third_shard_gets_a_third() -> None:
    holders = [0, 1] * 6
    portions = spread(holders, [5] * 12, [2])
    assert [(portion.source, portion.target) for portion in portions] == [(0, 2), (1, 2)] * 2
    assert all(len(portion.buckets) == 1 for portion in portions)


def test_what_fits_into_one_portion_goes_from_one_shard_to_one() -> None:
    portions = spread([0] * 9, [2] * 9, [1], most=6)
    assert [portion.buckets for portion in portions] == [(6, 7, 8), (5,)]


def test_nothing_moves_without_a_newcomer_nor_from_a_last_bucket() -> None:
    assert next_portion([0, 0, 0, 1], [1] * 4, [], 1) is None
    assert next_portion([0, 1], [9, 9], [2], 1) is None


def test_of_two_newcomers_the_emptier_one_is_first() -> None:
    portions = spread([0] * 6, [1] * 6, [1, 2])
    assert [portion.target for portion in portions] == [1, 2, 1, 2]


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40).flatmap(
        lambda holders: st.tuples(
            st.just(holders), st.lists(st.integers(1, 9), min_size=len(holders), max_size=len(holders))
        )
    ),
    st.sets(st.integers(4, 6), min_size=1),
    st.integers(1, 30),
)
def test_only_newcomers_get_something_and_never_more_than_who_gives(
    case: tuple[list[int], list[int]], newcomers: set[int], most: int
) -> None:
    holders, weights = case
    before = list(holders)
    for portion in spread(holders, weights, sorted(newcomers), most):
        assert portion.target in newcomers and portion.source != portion.target
        assert all(holders[bucket] == portion.source for bucket in portion.buckets)
        weight = sum(weights[bucket] for bucket in portion.buckets)
        assert weight <= most or len(portion.buckets) == 1
        had = loads(holders, weights)[portion.source]
        holders = portion.applied_to(holders)
        assert loads(holders, weights)[portion.target] < had
        assert loads(holders, weights).get(portion.source, 0) > 0, "its last bucket was taken"
    moved = [bucket for bucket, holder in enumerate(holders) if holder != before[bucket]]
    assert all(holders[bucket] in newcomers for bucket in moved)
    # Nobody else could give a bucket without having less than the newcomer then.
    load = loads(holders, weights)
    least = min(load.get(shard, 0) for shard in newcomers)
    for bucket, holder in enumerate(holders):
        if holders.count(holder) > 1 and holder not in newcomers:
            assert least + weights[bucket] >= load[holder]
