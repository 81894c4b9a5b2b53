"""Where processes go: few nodes, one rack, best fit; shards apart from their backups."""

from collections import Counter
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.scheduler.cluster.views import GPU, node, nodes, on, request
from zml.scheduler.cluster.placement import Room, extend, mend, pack, place, ring, shrink
from zml.scheduler.cluster.resources import NodeId, Resources


def room(*free: int, racks: str = "") -> Room:
    """Nodes n0, n1, ... with so many GPUs free; `racks` is a letter for each."""
    return Room([node(f"n{i}", gpus=g, rack=racks[i : i + 1]) for i, g in enumerate(free)])


def test_workers_go_where_they_fit_most_tightly() -> None:
    assert pack(room(4, 2, 3), GPU, 2) == ("n1", "n1")
    assert pack(room(4, 2, 3), GPU, 3) == ("n2",) * 3


def test_workers_go_on_as_few_nodes_as_will_do() -> None:
    assert Counter(pack(room(2, 4, 1, 2), GPU, 6) or ()) == {"n1": 4, "n0": 2}
    assert pack(room(1, 1), GPU, 3) is None


def test_one_rack_is_better_than_fewer_leftovers() -> None:
    assert Counter(pack(room(3, 2, 2, 3, racks="abba"), GPU, 4) or ()) == {"n1": 2, "n2": 2}
    assert Counter(pack(room(3, 2, 1, 3, racks="abba"), GPU, 6) or ()) == {"n0": 3, "n3": 3}


def test_more_workers_go_beside_those_that_are_there() -> None:
    asked = request("a", 1, 8)
    grown = extend(room(4, 1, 4, racks="abb"), asked, on("n1"), 4)
    assert grown is not None and Counter(grown.workers) == {"n1": 2, "n2": 2}
    assert grown.shards == ("n1",)


def test_those_go_first_who_stand_alone() -> None:
    assert shrink(on("n0", "n1", "n1", "n2", "n2", shards=("n2",)), 4).workers == ("n1", "n1", "n2", "n2")
    assert Counter(shrink(on("n0", "n1", "n1", "n1", shards=("n1",)), 3).workers) == {"n1": 3}


def test_a_lost_worker_is_replaced_as_far_as_there_is_room_and_a_lost_shard_must_be() -> None:
    asked = request("a", 1, 4, shards=2, replicas=1)
    left = room(1, 0)
    mended = mend(left, asked, on("gone", "gone", "n0", shards=("gone", "n0")))
    assert mended is not None
    assert (Counter(mended.workers), mended.shards) == ({"n0": 2}, ("n1", "n0"))
    heavy = replace(asked, shard=Resources(memory_mb=1))
    assert mend(left, heavy, on("n0", shards=("gone", "n0"))) is None


def test_shards_that_leave_no_room_for_workers_go_elsewhere() -> None:
    machines = (node("n0", cpus=2), node("n1", gpus=0, cpus=1))
    asked = request("a", 2, worker=Resources(cpus=1, gpus=1), shard=Resources(cpus=1))
    assert place(Room(machines), asked, 2) == on("n0", "n0", shards=("n1",))


def test_placing_leaves_the_room_as_it_was() -> None:
    free = Room(nodes(3))
    before = dict(free.free), free.counts(GPU).total
    assert place(free, request("a", 5, shards=3, replicas=1, shard=Resources(cpus=1)), 5) is not None
    assert (dict(free.free), free.counts(GPU).total) == before


@given(st.lists(st.integers(1, 6), min_size=2, max_size=6))
def test_no_shard_is_beside_its_backup_where_no_node_has_more_than_half(counts: list[int]) -> None:
    wanted = sum(counts)
    order = ring({NodeId(f"n{i}"): count for i, count in enumerate(counts)}, wanted)
    assert Counter(order) == {f"n{i}": count for i, count in enumerate(counts)}
    if max(counts) <= wanted // 2:
        assert all(order[k] != order[(k + 1) % wanted] for k in range(wanted))


@given(st.integers(2, 9), st.integers(2, 6))
def test_shards_are_spread_and_kept_from_their_backups(shards: int, machines: int) -> None:
    asked = request("a", 1, shards=shards, replicas=1, shard=Resources(cpus=1))
    placed = place(Room(nodes(machines)), asked, 1)
    assert placed is not None
    load = Counter(placed.shards)
    assert max(load.values()) == -(-shards // machines)
    if max(load.values()) <= shards // 2:
        assert all(placed.shards[k] != placed.shards[(k + 1) % shards] for k in range(shards))
