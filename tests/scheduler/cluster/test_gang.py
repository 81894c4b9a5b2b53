"""A round: gangs, preemption, reservations, backfill, reasons."""

from dataclasses import replace

from tests.scheduler.cluster.views import node, nodes, on, request, told, view
from zml.scheduler.cluster.order import in_order, shortest_left
from zml.scheduler.cluster.plan import Candidate, Quota, Why
from zml.scheduler.cluster.policies import POLICIES
from zml.scheduler.cluster.resources import Resources

fifo, las = POLICIES["fifo"], POLICIES["las"]


def test_a_gang_begins_whole_or_not_at_all() -> None:
    a, b = Candidate(request=request("a", 3)), Candidate(request=request("b", 2, submitted=1))
    plan = fifo(view(2, nodes(1), a, b))
    assert told(plan) == {"a": ("STARTS", ("n00",) * 3), "b": ("BEHIND", None)}
    assert plan.verdicts[b.request.job].because == (
        "2 workers with 1 GPU each are free, but others go first, a the first of them"
    )


def test_who_has_something_keeps_it_where_it_is() -> None:
    a = Candidate(request=request("a", 2), allocation=on("n01", "n01"))
    assert told(fifo(view(2, nodes(2), a))) == {"a": ("RUNS", ("n01", "n01"))}


def test_a_job_of_higher_priority_drains_the_last_in_the_order_and_waits_for_it() -> None:
    a = Candidate(request=request("a", 2), allocation=on("n00", "n00"))
    b = Candidate(request=request("b", 2, submitted=1), allocation=on("n00", "n00"))
    c = Candidate(request=request("c", 2, submitted=2, priority=1))
    machines = nodes(1)
    first = las(view(3, machines, a, b, c))
    assert told(first) == {"a": ("RUNS", ("n00",) * 2), "b": ("PREEMPTED", None), "c": ("NO_ROOM", None)}
    assert first.verdicts[b.request.job].because == "c (priority 1) goes first and needs 2 GPUs of n00"
    assert first.verdicts[c.request.job].because == (
        "2 workers with 1 GPU each will be free on n00: it waits for b to give it up"
    )
    leaving = replace(b, draining=True)
    second = las(view(4, machines, a, leaving, c))
    assert told(second) == {"a": ("RUNS", ("n00",) * 2), "b": ("DRAINING", None), "c": ("NO_ROOM", None)}
    third = las(view(5, machines, a, replace(b, allocation=None), c))
    assert told(third) == {"a": ("RUNS", ("n00",) * 2), "b": ("BEHIND", None), "c": ("STARTS", ("n00",) * 2)}


def test_what_is_coming_free_for_one_is_not_given_to_another() -> None:
    leaving = Candidate(request=request("a", 2), allocation=on("n00", "n00"), draining=True)
    big = Candidate(request=request("b", 4, submitted=1))
    small = Candidate(request=request("c", 2, submitted=2))
    plan = fifo(view(3, nodes(1), leaving, big, small))
    assert told(plan) == {"a": ("DRAINING", None), "b": ("NO_ROOM", None), "c": ("BEHIND", None)}


def test_too_big_is_told_from_no_room() -> None:
    machines = (node("n0", gpus=2), node("n1", gpus=2))
    busy = Candidate(request=request("a", 3, preemptible=False), allocation=on("n0", "n0", "n1"))
    five = Candidate(request=request("b", 5, submitted=1))
    wide = Candidate(request=request("c", 1, worker=Resources(gpus=3), submitted=1))
    four = Candidate(request=request("d", 4, submitted=1))
    plan = fifo(view(2, machines, busy, five, wide, four))
    assert {job: why for job, (why, _) in told(plan).items()} == {
        "a": "RUNS",
        "b": "TOO_BIG",
        "c": "TOO_BIG",
        "d": "NO_ROOM",
    }
    assert plan.verdicts[four.request.job].because == (
        "it needs 4 workers with 1 GPU each at once; there is room for 1 of its workers; a has the rest"
    )
    two = Candidate(request=request("f", 5))
    assert fifo(view(2, (node("n0"),), two)).verdicts[two.request.job].because == (
        "5 workers with 1 GPU each do not fit on the 1 node that is here, even if it were empty"
    )


def test_who_is_kept_waiting_by_one_is_told_by_whom() -> None:
    dear = Candidate(request=request("a", 1, priority=5))
    cheap = Candidate(request=request("b", 1, submitted=1))
    said = fifo(view(2, nodes(1, gpus=1), dear, cheap)).verdicts[cheap.request.job].because
    assert said == "1 worker with 1 GPU is free, but others go first, a (priority 5) the first of them"


def test_who_cannot_stay_because_its_node_leaves_is_not_told_of_others() -> None:
    a = Candidate(request=request("a", 2), allocation=on("n0", "n0"))
    machines = (replace(node("n0"), leaving=True), node("n1", gpus=2), node("n2", gpus=1))
    b = Candidate(request=request("b", 2, preemptible=False), allocation=on("n1", "n1"))
    plan = fifo(view(2, machines, b, a))
    assert plan.verdicts[a.request.job].why is Why.PREEMPTED
    assert plan.verdicts[a.request.job].because == (
        "it cannot stay as it is on n0: it needs 2 workers with 1 GPU each at once; there is room for 1 of its workers"
    )


def test_too_big_says_what_there_is_too_little_of() -> None:
    machines = (node("n0", gpus=2, memory_mb=8_000), node("n1", gpus=2, memory_mb=4_000))
    worker = Resources(gpus=1, memory_mb=1)
    wide = Candidate(request=request("a", worker=Resources(gpus=3)))
    heavy = Candidate(request=request("b", worker=worker, shard=Resources(memory_mb=9_000)))
    many = Candidate(request=request("c", 2, worker=worker, shard=Resources(memory_mb=3_000), shards=4))
    said = [verdict.because for verdict in fifo(view(1, machines, wide, heavy, many)).verdicts.values()]
    assert said == [
        "no node has 3 GPUs for one worker; the most that any of 2 offers is 2 GPUs, 64 CPUs, 8,000 MB",
        "no node has 9,000 MB for one shard; the most that any of 2 offers is 2 GPUs, 64 CPUs, 8,000 MB",
        "2 workers with 1 GPU, 1 MB each and 4 shards with 3,000 MB each do not fit on the 2 nodes that are here, "
        "even if they were empty",
    ]
    assert fifo(view(1, (), wide)).verdicts[wide.request.job].because == "no node is here"


def test_a_preemptible_job_may_use_what_the_first_in_line_cannot_and_is_drained_once_it_can() -> None:
    fixed = Candidate(request=request("a", 3, preemptible=False), allocation=on("n00", "n00", "n00"))
    head, small = (
        Candidate(request=request("b", 4, submitted=1)),
        Candidate(request=request("c", submitted=2)),
    )
    assert told(fifo(view(3, nodes(1), fixed, head, small))) == {
        "a": ("RUNS", ("n00",) * 3),
        "b": ("NO_ROOM", None),
        "c": ("STARTS", ("n00",)),
    }
    small = replace(small, allocation=on("n00"))
    assert told(fifo(view(4, nodes(1), head, small))) == {"b": ("NO_ROOM", None), "c": ("PREEMPTED", None)}


def test_what_cannot_be_drained_begins_behind_the_first_in_line_only_if_it_ends_in_time() -> None:
    fixed = Candidate(
        request=request("a", 3, preemptible=False, time_limit_s=100), allocation=on("n00", "n00", "n00")
    )
    head = Candidate(request=request("b", 4, submitted=1))

    def verdict(limit: float | None) -> Why:
        small = Candidate(request=request("c", submitted=2, preemptible=False, time_limit_s=limit))
        return fifo(view(3, nodes(1), fixed, head, small)).verdicts[small.request.job].why

    assert [verdict(None), verdict(101), verdict(100)] == [Why.BEHIND, Why.BEHIND, Why.STARTS]


def test_where_nobody_knows_when_the_first_in_line_can_begin_nothing_ends_in_time() -> None:
    fixed = Candidate(request=request("a", 2, preemptible=False), allocation=on("n00", "n00"))
    head = Candidate(request=request("b", 4, submitted=1, priority=-1))
    small = request("c", 2, submitted=2, priority=-1, preemptible=False, time_limit_s=30 * 86_400.0)
    assert told(fifo(view(3, nodes(1), fixed, head, Candidate(request=small))))["c"] == ("BEHIND", None)
    brief = Candidate(request=replace(small, time_limit_s=1.0))
    assert told(fifo(view(3, nodes(1), fixed, head, brief)))["c"] == ("BEHIND", None)
    drained = Candidate(request=replace(small, preemptible=True))
    assert told(fifo(view(3, nodes(1), fixed, head, drained)))["c"] == ("STARTS", ("n00",) * 2)


def test_it_may_begin_then_where_the_first_in_line_can_have_nothing() -> None:
    fixed = Candidate(request=request("a", 2, preemptible=False), allocation=on("n00", "n00"))
    head = Candidate(request=request("b", 4, submitted=1))
    cpus = request("c", 2, submitted=2, preemptible=False, worker=Resources(cpus=32))
    machines = (*nodes(1), node("n01", gpus=0))
    assert told(fifo(view(3, machines, fixed, head, Candidate(request=cpus))))["c"] == (
        "STARTS",
        ("n01",) * 2,
    )
    heavy = replace(head, request=replace(head.request, shard=Resources(memory_mb=1)))
    machines = (node("n00", memory_mb=1), node("n01", gpus=0, memory_mb=1))
    assert told(fifo(view(3, machines, fixed, heavy, Candidate(request=cpus))))["c"] == ("BEHIND", None)


def test_a_time_limit_is_about_how_long_a_job_has_run_and_not_with_how_many_workers() -> None:
    fixed = Candidate(
        request=request("a", 2, preemptible=False, time_limit_s=1_000),
        allocation=on("n00", "n00"),
        attained_s=2_000.0,  # its workers waited long for each other
        ran_s=700.0,
    )
    head = Candidate(request=request("b", 4, submitted=1))
    wide = request("c", 1, 4, submitted=2, preemptible=False, time_limit_s=1_000)

    def begins(ran_s: float) -> bool:
        job = Candidate(request=wide, attained_s=800.0, ran_s=ran_s)
        return fifo(view(1_000, nodes(1), fixed, head, job)).verdicts[wide.job].why is Why.STARTS

    assert [begins(200.0), begins(699.0), begins(700.0)] == [False, False, True]


def test_who_has_the_least_left_of_his_time_limit_is_the_shortest() -> None:
    long = Candidate(request=request("a", 1, 4, time_limit_s=1_000), attained_s=800.0, ran_s=200.0)
    short = Candidate(request=request("b", submitted=1, time_limit_s=500), attained_s=0.0)
    none = Candidate(request=request("c"))
    order = in_order(view(1_000, nodes(1), long, none, short), shortest_left)
    assert [job.request.job for job in order] == ["b", "a", "c"]


def test_it_may_also_begin_in_what_the_first_in_line_leaves_over() -> None:
    fixed = Candidate(
        request=request("a", 3, preemptible=False, time_limit_s=100), allocation=on("n00", "n00", "n00")
    )
    head = Candidate(request=request("b", 6, submitted=1))
    small = [Candidate(request=request(f"c{i}", submitted=2, preemptible=False)) for i in range(3)]
    plan = fifo(view(3, nodes(2), fixed, head, *small))
    assert [plan.verdicts[job.request.job].why for job in small] == [Why.STARTS, Why.STARTS, Why.BEHIND]


def test_workers_above_the_least_are_given_up_before_jobs_are() -> None:
    a = Candidate(request=request("a", 1, 4), allocation=on("n00", "n00", "n00"))
    b = Candidate(request=request("b", 1, submitted=1), allocation=on("n00"))
    c = Candidate(request=request("c", 2, submitted=2))
    assert told(fifo(view(3, nodes(1), a, b, c))) == {
        "a": ("SHRINKS", ("n00",)),
        "b": ("RUNS", ("n00",)),
        "c": ("NO_ROOM", None),
    }


def test_a_job_that_was_drained_in_two_steps_counts_once_for_whoever_comes_next() -> None:
    a = Candidate(request=request("a", 2))
    b = Candidate(request=request("b", 1, submitted=1))
    c = Candidate(request=request("c", 1, submitted=2), allocation=on("n00"))
    d = Candidate(request=request("d", 1, 2, submitted=3), allocation=on("n00", "n00"))
    plan = fifo(view(4, nodes(1, gpus=3), a, b, c, d))
    assert told(plan) == {"a": ("NO_ROOM", None), "b": ("NO_ROOM", None)} | dict.fromkeys(
        "cd", ("PREEMPTED", None)
    )
    assert "it waits for c to give it up" in plan.verdicts[b.request.job].because


def test_what_is_left_over_lets_jobs_grow_in_their_order() -> None:
    a = Candidate(request=request("a", 1, 3), allocation=on("n00"))
    b = Candidate(request=request("b", 1, 4, submitted=1))
    plan = fifo(view(3, nodes(1), a, b))
    assert told(plan) == {"a": ("GROWS", ("n00",) * 3), "b": ("STARTS", ("n00",))}


def test_a_job_moves_off_a_node_that_leaves_and_is_preempted_where_there_is_no_room() -> None:
    gone = replace(node("n00"), leaving=True)
    a = Candidate(request=request("a", 1, 2), allocation=on("n00", "n01"))
    b = Candidate(request=request("b", 4, submitted=1), allocation=on("n00", "n00", "n00", "n00"))
    plan = fifo(view(3, (gone, node("n01")), a, b))
    assert told(plan) == {"a": ("RUNS", ("n01", "n01")), "b": ("PREEMPTED", None)}


def test_a_quota_stops_what_would_begin_or_grow_beyond_it() -> None:
    a = Candidate(request=request("a", 1, 4, user="ada"), allocation=on("n00"))
    b = Candidate(request=request("b", 2, submitted=1, user="ada"))
    c = Candidate(request=request("c", 1, submitted=2, user="bob"))
    seen = replace(view(3, nodes(2), a, b, c), quotas={"ada": Quota(gpus=2)})
    plan = fifo(seen)
    assert told(plan) == {"a": ("GROWS", ("n00",) * 2), "b": ("QUOTA", None), "c": ("STARTS", ("n00",))}
    assert plan.verdicts[b.request.job].because == "with it, ada would hold 3 GPUs of 2 allowed"


def test_what_is_on_its_way_out_counts_against_a_quota_until_it_is_gone() -> None:
    leaving = Candidate(request=request("a", 2, user="ada"), allocation=on("n00", "n00"), draining=True)
    new = Candidate(request=request("b", 2, user="ada", submitted=1))
    for quota in (Quota(gpus=3), Quota(workers=3)):
        seen = replace(view(3, nodes(2), leaving, new), quotas={"ada": quota})
        assert told(fifo(seen)) == {"a": ("DRAINING", None), "b": ("QUOTA", None)}
        seen = replace(view(3, nodes(2), new), quotas={"ada": quota})
        assert told(fifo(seen))["b"] == ("STARTS", ("n00",) * 2)
        seen = replace(seen, held={"ada": Resources(gpus=2)}, held_workers={"ada": 2})
        assert told(fifo(seen))["b"] == ("QUOTA", None)


def test_what_a_round_takes_away_is_not_yet_there_for_another_job_of_its_user() -> None:
    a = Candidate(request=request("a", 4, user="ada", submitted=1), allocation=on(*["n00"] * 4))
    b = Candidate(request=request("b", 4, user="bob", priority=1))
    c = Candidate(request=request("c", 2, user="ada"))
    machines = (node("n00"), node("n01", gpus=2))
    seen = replace(view(3, machines, a, b, c), quotas={"ada": Quota(gpus=4)})
    assert told(fifo(seen)) == {"a": ("PREEMPTED", None), "b": ("NO_ROOM", None), "c": ("QUOTA", None)}
