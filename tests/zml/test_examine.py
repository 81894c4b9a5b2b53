"""A cluster is looked at while it trains: everybody answers or is named, and training does not notice."""

import asyncio
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.simulation import simulate
from tests.zml.cluster import ADDRESS, JOB, Cluster, parameters
from zml.doctor import cluster as asking
from zml.doctor import summary, telling
from zml.doctor.answering import Examinee, check_files
from zml.doctor.cluster import Answers, Asking, Measured, between_machines, rounds
from zml.doctor.findings import COORDINATOR, Check, Link, Machine, Process
from zml.doctor.links import FIRST, PIECE, pieces, probed
from zml.doctor.means import Means, in_thread
from zml.doctor.verdicts import judge
from zml.messages import AnyMessage, Examine, JobSpec, Probe
from zml.status import MemberStatus
from zml.transport import Refusal, Refused
from zml.transport.memory import MemoryEndpoint, MemoryNetwork

SEED = 11
SPEC = JobSpec(workers=2, shards=2)


async def onlooker(cluster: Cluster) -> MemoryEndpoint:
    endpoint = cluster.network.endpoint("onlooker", vocabulary=AnyMessage, handler=lambda *_: None)
    await endpoint.start()
    await endpoint.connect(COORDINATOR, [ADDRESS])
    return endpoint


async def look(cluster: Cluster, wait_s: float = 5.0, told: list[str] | None = None) -> Answers:
    endpoint = await onlooker(cluster)
    tell = told.append if told is not None else lambda _: None
    found = await asking.examine(Asking(endpoint, JOB, wait_s), cluster.coordinator.status(), tell)
    await endpoint.close()
    return found


async def training(network: MemoryNetwork) -> Cluster:
    """A cluster in which both workers have made a few steps."""
    cluster = Cluster(network, SPEC, compute_s=lambda name: 1.0)
    await cluster.start()
    scripts = [cluster.script(name) for name in ("w0", "w1")]
    await cluster.until(lambda: all(script.clock >= 3 for script in scripts))
    return cluster


def test_everybody_answers_and_training_ends_with_the_same_parameters() -> None:
    async def main(watched: bool) -> tuple[list[torch.Tensor], Answers | None]:
        cluster = await training(MemoryNetwork(SEED))
        found = await look(cluster) if watched else None
        assert await cluster.finish() == 0
        return parameters(cluster.scripts["w0"]), found

    (plain, _), (seen, found) = simulate(main(False)), simulate(main(True))
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    assert found is not None
    assert set(found.processes) == {COORDINATOR, "p0", "p1", "w0", "w1"}
    assert {process.versions["torch"] for process in found.processes.values()} == {torch.__version__}
    assert [machine.checks for machine in found.machines.values()] == [[Check("disk", "pass", "as if")]]
    links = {(each.source, each.to): each.link for each in found.links}
    assert set(links) == {
        *((member, COORDINATOR) for member in ("p0", "p1", "w0", "w1")),
        *((worker, shard) for worker in ("w0", "w1") for shard in ("p0", "p1")),
    }
    # There and back at 0.5 to 2 ms each.
    assert all(link.trouble == "" and 0.001 <= link.rtt_s <= 0.004 for link in links.values())
    rated = [pair for pair, link in links.items() if link.up_bps > 0 and link.down_bps > 0]
    assert rated == [("w0", "p0")]  # once between two machines, here of one with itself
    assert (found.silent, found.unmeasured) == ({}, [])


def test_who_does_not_answer_is_named_within_the_deadline() -> None:
    told: list[str] = []

    async def main() -> tuple[Answers, float]:
        cluster = await training(MemoryNetwork(SEED))

        async def hangs(question: Examine, run_dir: str) -> None:
            await asyncio.sleep(1e6)

        cluster.shards[1].examinee.answer = hangs  # type: ignore[method-assign, assignment]
        began = asyncio.get_running_loop().time()
        found = await look(cluster, wait_s=2.0, told=told)
        took = asyncio.get_running_loop().time() - began
        assert await cluster.finish() == 0
        return found, took

    found, took = simulate(main())
    assert found.silent == {"p1": "no answer within 2 s"}
    assert told[:2] == ["processes: coordinator, p0, p1, w0 and 1 more", "processes: p1"]
    assert 2.0 <= took <= 4.0
    bad = [check for check in judge(found) if check.verdict == "fail"]
    assert bad == [Check("answers", "fail", "no answer within 2 s", "`zml stack p1` says where it is.", "p1")]


def test_a_shard_that_a_worker_does_not_reach_is_named_with_both_ends() -> None:
    async def main() -> Answers:
        cluster = await training(MemoryNetwork(SEED))
        cluster.network.partition({"probe-w1"}, {"p0"})
        found = await look(cluster, wait_s=3.0)
        cluster.network.heal()
        assert await cluster.finish() == 0
        return found

    bad = [check for check in judge(simulate(main())) if check.verdict == "fail"]
    assert [(check.name, check.where) for check in bad] == [("link", "w1 -> p0")]
    assert "was knocked at" in bad[0].found and bad[0].fix


def test_questions_that_mean_nothing_are_refused_and_change_nothing() -> None:
    async def main() -> list[str]:
        cluster = await training(MemoryNetwork(SEED))
        endpoint = await onlooker(cluster)
        said = []
        for question in (
            Examine(job=JOB, member="w7", what="process", within_s=1.0),
            Examine(job=JOB, member="p0", what="link", to="p1", within_s=1.0),
            Examine(job=JOB, member="w0", what="link", to="p9", within_s=1.0),
            Examine(job="other", member="w0", what="process", within_s=1.0),
        ):
            with pytest.raises(Refused) as refused:
                await endpoint.request(COORDINATOR, question, timeout_s=5)
            said.append(refused.value.because)
        await endpoint.close()
        assert await cluster.finish() == 0
        return said

    assert simulate(main()) == [
        "there is no member w7",
        "p0 has no link to p1",
        "w0 has no link to p9",
        "this coordinator serves job job, not other",
    ]


def test_one_examination_of_a_kind_at_a_time() -> None:
    async def main() -> None:
        endpoint = MemoryNetwork(SEED).endpoint("m", vocabulary=AnyMessage, handler=lambda *_: None)
        gate = asyncio.Event()

        async def slow(function: object) -> Machine:
            await gate.wait()
            return Machine(node="n", checks=[])

        examinee = Examinee(endpoint, means=Means(look=slow))
        question = Examine(job=JOB, member="m", what="machine", within_s=1.0)
        first = asyncio.ensure_future(examinee.answer(question, ""))
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match="is being examined already"):
            await examinee.answer(question, "")
        gate.set()
        answer, payload = await first
        assert answer.member == "m" and json.loads(payload)["checks"] == []
        await examinee.answer(question, "")  # and then again

    simulate(main())


def test_what_is_looked_at_in_a_thread_comes_back_with_its_errors() -> None:
    def fails() -> None:
        raise OSError("no disk")

    async def main() -> int:
        with pytest.raises(OSError, match="no disk"):
            await in_thread(fails)
        return await in_thread(lambda: 7)

    assert asyncio.run(main()) == 7


def test_a_probe_is_answered_with_as_much_as_was_asked_for_and_no_more_than_a_piece() -> None:
    assert probed(Probe(JOB))[1] is None
    for asked, sent in ((1000, 1000), (PIECE + 1, PIECE), (-1, None)):
        payload = probed(Probe(JOB, back=asked))[1]
        assert (len(payload) if payload is not None else None) == sent


@given(st.floats(1.0, 1e12), st.integers(1, 64 << 20))
def test_a_link_is_never_given_more_than_it_moves_in_half_a_second(bps: float, most: int) -> None:
    sizes = pieces(bps, most)
    assert sum(sizes) <= min(bps * 0.5, most)
    assert all(0 < size <= PIECE for size in sizes)
    assert not sizes or sum(sizes) > FIRST


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(8, 15)), unique=True))
def test_no_machine_takes_part_in_two_measurements_at_a_time(numbers: list[tuple[int, int]]) -> None:
    def node(member: str) -> str:
        return f"n{int(member[1:]) % 5}"

    pairs = [(f"w{a}", f"p{b}") for a, b in numbers]
    full = between_machines(pairs, node)
    assert {(node(a), node(b)) for a, b in full} == {(node(a), node(b)) for a, b in pairs}
    planned = rounds(full, node)
    assert sorted(pair for together in planned for pair in together) == sorted(full)
    for together in planned:
        for at, one in enumerate(together):
            for other in together[:at]:
                assert not {node(one[0]), node(one[1])} & {node(other[0]), node(other[1])}


# -- what it adds up to --------------------------------------------------------------------------------------


def member(name: str, node: str, state: str = "active", because: str = "") -> MemberStatus:
    role = "worker" if name.startswith("w") else "shard"
    return MemberStatus(member=name, role=role, state=state, node=node, because=because)


def answers(nodes: dict[str, str], **links: Link) -> Answers:
    """Members by node; links as w0_p0."""
    found = Answers(job=JOB, members=[member(name, node) for name, node in nodes.items()])
    found.processes = {
        name: Process(node=node, pid=1, versions={"zml": "1.0", "torch": "2.13.0"})
        for name, node in {COORDINATOR: "a", **nodes}.items()
    }
    found.machines = {
        node: Machine(node=node, checks=[Check("disk", "pass", f"{n} GB free")])
        for n, node in enumerate(sorted(set(nodes.values())))
    }
    found.links = [
        Measured(name.partition("_")[0], name.partition("_")[2], link) for name, link in links.items()
    ]
    return found


def wrong(found: Answers) -> list[tuple[str, str, str]]:
    return [(check.name, check.verdict, check.where) for check in judge(found) if check.verdict != "pass"]


GOOD = Link(rtt_s=0.0004, up_bps=1.1e8, down_bps=1.1e8, mtu=1500, by="socket")


def test_a_cluster_that_is_well_has_nothing_wrong() -> None:
    found = answers({"p0": "a", "w0": "b"}, w0_p0=GOOD, w0_coordinator=Link(rtt_s=0.0003, skew_s=0.0001))
    assert wrong(found) == []
    assert {check.name for check in judge(found)} == {"answers", "versions", "disk", "clock skew", "link"}


def test_what_only_shows_by_comparison_is_found() -> None:
    nodes = {"p0": "a", "w0": "b", "w1": "c", "w2": "d"}
    slow = Link(rtt_s=0.0004, up_bps=1.1e8, down_bps=1.1e7, mtu=1500, by="socket")
    odd = Link(rtt_s=0.0004, up_bps=1.1e8, down_bps=1.1e8, mtu=9000, by="socket")
    late = Link(rtt_s=0.001, skew_s=-3.0)
    found = answers(nodes, w0_p0=GOOD, w1_p0=slow, w2_p0=odd, w1_coordinator=late)
    found.processes["w2"] = Process(node="d", pid=1, versions={"zml": "0.9", "torch": "2.13.0"})
    found.processes["w0"] = Process(node="b", pid=1, versions={"zml": "1.0", "torch": "2.4.0"})
    found.members.append(member("w3", "e", "lost", "silent for 1.6 s"))
    found.unmeasured = [("w2", "p0")]
    assert wrong(found) == [
        ("members", "warn", "w3"),
        ("versions", "warn", ""),
        ("versions", "fail", ""),
        ("clock skew", "warn", "c"),
        ("link", "warn", "w1 -> p0"),
        ("MTU", "warn", ""),
        ("links", "warn", ""),
    ]
    told = {check.name: check for check in judge(found) if check.verdict != "pass"}
    assert told["versions"].found == "zml is 1.0, but w2 has 0.9"
    assert told["clock skew"].found == "3 s ahead of the coordinator's, give or take 0.5 ms"
    assert all(check.fix for check in told.values())


def test_large_messages_that_do_not_arrive_are_told_from_a_link_that_is_dead() -> None:
    half = Link(rtt_s=0.0004, mtu=9000, trouble="small messages arrive, but 64 KB on the way there do not")
    found = answers({"p0": "a", "w0": "b", "w1": "c"}, w0_p0=half, w1_p0=Link(trouble="refused"))
    bad = {check.where: check for check in judge(found) if check.verdict == "fail"}
    assert set(bad) == {"w0 -> p0", "w1 -> p0"}
    assert "MTU" in bad["w0 -> p0"].fix and "firewall" in bad["w1 -> p0"].fix


def test_what_is_well_is_told_in_few_lines_and_what_is_not_one_by_one() -> None:
    nodes = {"p0": "a", **{f"w{n}": f"n{n}" for n in range(40)}}
    links = {f"w{n}_p0": GOOD for n in range(40)}
    links["w7_p0"] = Link(trouble="no answer from tcp://10.0.0.1:7077 in 5 s")
    found = answers(nodes, **links)
    checks = judge(found)
    lines = list(summary.cluster_lines(found, checks, ADDRESS, 80))
    body = lines[lines.index("") + 1 :]
    assert len(body) < 20 and all(len(line) <= 80 for line in body)
    assert any(line.startswith("fail  link            w7 -> p0: no answer from") for line in body)
    assert body[-1] == f"{len(checks) - 1} passed, 0 warnings, 1 failed"
    everything = list(summary.cluster_lines(found, checks, ADDRESS, 80, everything=True))
    assert len(everything) > len(checks)


def test_names_from_elsewhere_move_no_cursor() -> None:
    check = Check("disk", "warn", "full\x1b[2J\n on /dev/\rsda", "Make\x07 room.", "node\x1b]0;")
    assert all(line.isprintable() for line in telling.entry(check, 80, telling.plain))


def test_json_holds_all_that_was_found() -> None:
    found = answers({"p0": "a", "w0": "b"}, w0_p0=GOOD)
    told = json.loads(json.dumps(summary.as_json(found, judge(found))))
    assert told["verdict"] == "pass" and told["silent"] == {}
    assert told["links"] == [
        {"from": "w0", "to": "p0", "rtt_s": 0.0004, "skew_s": 0.0, "up_bps": 1.1e8, "down_bps": 1.1e8,
         "mtu": 1500, "by": "socket", "trouble": ""}
    ]  # fmt: skip
    assert [(name, each["role"]) for name, each in told["members"].items()] == [
        (COORDINATOR, "coordinator"),
        ("p0", "shard"),
        ("w0", "worker"),
    ]


def test_a_member_whose_files_are_nearly_all_open_says_so() -> None:
    assert check_files().name == "open files"
    assert (check_files(8192, 4000).verdict, check_files(8192, 4000).found) == ("pass", "8192")
    assert (check_files(8192, 5000).verdict, check_files(8192, 5000).found) == ("warn", "5000 of 8192 in use")
    assert check_files(1024, 10).verdict == "warn"
