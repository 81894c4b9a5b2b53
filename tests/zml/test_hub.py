"""The coordinator of many jobs keeps its promises, whatever nodes, members, disks and networks do."""

import asyncio
import errno
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import msgspec
import pytest

from tests.simulation import simulate
from tests.zml.hub import ADDRESS, FakeCluster, FakeNode
from zml import link
from zml.cluster import attempts, hub
from zml.cluster.attempts import BEATS, resolve_for, slower
from zml.cluster.desk import JobDesk
from zml.cluster.jobs import Problem, Submission
from zml.cluster.retention import Retention
from zml.cluster.wire import Ceased, Goodbye, NodeBeat, Offer, Run, Runs, Vocabulary
from zml.coordinator.heartbeats import Heartbeats
from zml.errors import NO_CHECKPOINT, ZmlError
from zml.lease import COORDINATOR, ping_s
from zml.messages import Exited, Heartbeat, Join, Leave
from zml.records import NoRoom
from zml.runs import rundir
from zml.scheduler.cluster.plan import Plan, Quota, View
from zml.scheduler.cluster.retention import Keep
from zml.scheduler.ids import JobId
from zml.scheduler.plain import plain
from zml.transport import Refusal, Refused

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    return simulate(main)


def states(cluster: FakeCluster, job: str) -> list[str]:
    return [attempt.state for attempt in cluster.desk.job(job).attempts]


def test_a_job_is_submitted_runs_and_ends(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        node = cluster.node("n1")
        job = cluster.submit(workers=2)
        running = await cluster.until_state(job, "RUNNING")
        assert (running.workers, running.nodes) == (2, ["n1"])
        assert sorted(node.members) == [(f"{job}.1", slot) for slot in ("p0", "w0", "w1")]
        done = await cluster.until_state(job, "SUCCEEDED")
        assert (done.exit_code, states(cluster, job)) == (0, ["SUCCEEDED"])
        assert not node.members and not cluster.hub.attempts.lives, "nothing of it is left"
        strange = Submission(script="s/my script\n.py", folder="/")
        assert (running.name, cluster.desk.submit(strange, "ada").name) == ("train", "my-script-")
        await cluster.close()

    run(main())


def test_what_was_decided_about_a_job_is_told_whole_and_by_the_next_coordinator_too(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        job = cluster.submit(workers="1..2", retries=2)
        cluster.desk.pause(job, "lunch")
        cluster.desk.resume(job)
        cluster.desk.scale(job, 1, 1)
        cluster.codes = {f"{job}.1": 3}
        cluster.node("n1")
        await cluster.until(lambda: len(cluster.desk.job(job).attempts) == 2, "it is tried again")
        await cluster.until_state(job, "RUNNING")
        told = [(each.what, each.because) for each in cluster.desk.explain(job).decisions]
        assert told == [
            ("pause is asked for", "lunch"),
            ("resume is asked for", "it is to go on when its turn comes"),
            ("scale is asked for", "it is to have 1 worker"),
            ("attempt 1 begins with 1 worker", "it begins with 1 worker on n1"),
            ("w0 starts on n1", "it begins with 1 worker on n1"),
            ("attempt 1 has failed", told[5][1]),
            ("is tried again in 2 s", "retry 1 of 2"),
            ("attempt 2 begins with 1 worker", "it begins with 1 worker on n1"),
            ("w0 starts on n1", "it begins with 1 worker on n1"),
        ]
        assert "3" in told[5][1]
        before = cluster.desk.explain(job).decisions
        await cluster.kill()
        await cluster.start()
        assert cluster.desk.explain(job).decisions == before
        await cluster.close()

    run(main())


def test_a_newcomer_begins_at_once_where_there_is_room_and_nobody_waits(tmp_path: Path) -> None:
    """It does not wait for the next round, which is some time away."""

    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        cluster.node("n1")
        await cluster.until(lambda: cluster.desk.nodes(), "the node is here")
        await asyncio.sleep(1.0)
        cluster.hub.round_s.clear()
        cluster.hub.rested_until = asyncio.get_running_loop().time() + 100.0
        first, second = cluster.submit(), cluster.submit()
        await asyncio.sleep(0.05)
        assert all(cluster.desk.job(job).nodes == ["n1"] for job in (first, second))
        assert not cluster.hub.round_s, "and no round was needed"
        large = cluster.submit(workers=4)  # there is no room for it
        small = cluster.submit()  # there is, but somebody waits, and all have to be looked at
        await asyncio.sleep(1.0)
        assert {cluster.desk.job(job).state for job in (large, small)} == {"QUEUED"}
        await cluster.until_state(large, "SUCCEEDED")
        await cluster.until_state(small, "SUCCEEDED")
        await cluster.close()

    run(main())


def test_a_policy_that_makes_a_mistake_is_asked_again(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        policy, asked = cluster.policy, 0

        def mistaken(view: View) -> Plan:
            nonlocal asked
            asked += 1
            if asked < 3:
                raise ZeroDivisionError
            return policy(view)

        cluster.policy = mistaken
        await cluster.start()
        cluster.node("n1")
        await cluster.until_state(cluster.submit(workers="1..2"), "SUCCEEDED")
        await cluster.close()

    run(main())


def test_jobs_that_are_over_go_with_their_files_but_for_those_that_others_need(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        cluster.node("n1", cpus=1)
        used, unused = "a" * 64, "b" * 64
        (tmp_path / "archives").mkdir()
        archives = [tmp_path / "archives" / f"{sha256}.tar.gz" for sha256 in (used, unused)]
        for archive in archives:
            archive.write_bytes(b"code")
        jobs = [cluster.submit(args=["x"] * number) for number in range(3)]
        for job in jobs:
            await cluster.until_state(job, "SUCCEEDED")
        args = [f"--from={tmp_path}/jobs/{jobs[1]}/1"]
        asked = Submission(script="train.py", archive=used, after=[jobs[0]], args=args)
        running = cluster.desk.submit(asked, "ada").id
        for archive in archives:
            os.utime(archive, (0, 0))
        await cluster.until_state(running, "RUNNING")
        for refused in (running, jobs[0]):
            with pytest.raises(Problem) as problem:
                cluster.desk.delete(refused, "asked")
            assert problem.value.status == 409
        remains = cluster.hub.remains
        remains._remove = lambda path: None  # type: ignore[method-assign]
        remains.docket.discarded = lambda job: None  # type: ignore[method-assign]
        Retention(cluster.hub, Keep(jobs=0)).look()
        await asyncio.sleep(0)
        assert [view.id for view in cluster.desk.jobs()] == [jobs[0], jobs[1], running]
        assert [path.name for path in (tmp_path / "archives").iterdir()] == [f"{used}.tar.gz"]
        assert (tmp_path / "jobs" / jobs[2]).is_dir()

        await cluster.kill()  # before it was deleted
        await cluster.start()
        keeping = Retention(cluster.hub, Keep())
        keeping.look()
        await cluster.until(lambda: not cluster.hub.docket.facts.discarding, "it is gone")
        assert not (tmp_path / "jobs" / jobs[2]).exists() and (tmp_path / "jobs" / jobs[1]).exists()
        await cluster.until_state(running, "SUCCEEDED")
        assert cluster.desk.delete(jobs[1], "asked").state == "SUCCEEDED"
        await cluster.until(lambda: not cluster.hub.docket.facts.discarding, "it is gone")
        assert not (tmp_path / "jobs" / jobs[1]).exists()
        await cluster.kill()
        await cluster.start()
        assert [view.id for view in cluster.desk.jobs()] == [jobs[0], running]
        await cluster.close()

    run(main())


def test_a_node_that_stays_silent_is_lost_and_its_job_goes_on_elsewhere(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        first = cluster.node("n1", cpus=1)
        job = cluster.submit()
        await cluster.until_state(job, "RUNNING")
        cluster.node("n2", cpus=1)
        first.die()
        done = await cluster.until_state(job, "SUCCEEDED")
        assert [node.id for node in cluster.desk.nodes()] == ["n2"]
        assert states(cluster, job)[1:] == ["SUCCEEDED"], done
        await cluster.close()

    run(main())


@pytest.mark.parametrize("away_s", [0.5, 8.0])
def test_another_coordinator_on_the_same_journal_goes_on_with_the_same_attempts(
    tmp_path: Path, away_s: float
) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path, script_s=60.0)
        await cluster.start()
        nodes = [cluster.node(name) for name in ("n1", "n2")]
        jobs = [cluster.submit() for _ in range(6)]
        waits = cluster.submit(workers=8)
        for job in jobs:
            await cluster.until_state(job, "RUNNING")
        await cluster.kill()
        await asyncio.sleep(away_s)
        await cluster.start()
        members = [member for node in nodes for member in node.members.values()]
        for member in members:
            member.heard = 0
        await cluster.until(lambda: all(member.heard for member in members), "everybody is heard", 30.0)
        assert [cluster.desk.job(job).state for job in jobs] == ["RUNNING"] * 6
        assert cluster.desk.job(waits).state == "QUEUED"
        for job in (*jobs, waits):
            await cluster.until_state(job, "SUCCEEDED")
            assert states(cluster, job) == ["SUCCEEDED"], "no attempt began anew"
        assert sum(node.launched for node in nodes) == 6 + 8, "no script either"
        await cluster.close()

    run(main())


@pytest.mark.parametrize("slow", [False, True], ids=["", "of which a slow disk leaves some for later"])
def test_what_goes_on_is_read_before_anybody_is_heard(
    tmp_path: Path, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "READ_FIRST_S", 0.0 if slow else 3600.0)
    read_then: list[int] = []

    async def listen(endpoint: Any) -> None:
        read_then.append(sum(read.done() for read in cluster.hub.attempts.ahead.values()))
        await link.listen(endpoint)

    cluster = FakeCluster(tmp_path, script_s=100.0)

    async def main() -> None:
        await cluster.start()
        cluster.node("n1", cpus=8)
        jobs = await cluster.running(3)
        await cluster.kill()
        listens_at = cluster.hub.attempts.run_dir(jobs[0], 1) / rundir.COORDINATOR
        before = listens_at.read_bytes()
        listens_at.write_bytes(b"elsewhere")
        monkeypatch.setattr(hub, "listen", listen)
        await cluster.start()
        assert slow or read_then == [3]
        await cluster.until(lambda: not cluster.hub.attempts.returning, "all attempts go on")
        assert not cluster.hub.attempts.ahead, "each was used"
        for job in jobs:
            await cluster.until_state(job, "SUCCEEDED")
            assert states(cluster, job) == ["SUCCEEDED"]
        assert listens_at.read_bytes() == before, "it is said where the coordinator listens now"
        await cluster.close()

    run(main())


@pytest.mark.parametrize("cancelled", [False, True], ids=["ended at once", "cancelled before it was begun"])
def test_what_was_read_and_is_not_used_is_closed_again(tmp_path: Path, cancelled: bool) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path, script_s=100.0)
        await cluster.start()
        cluster.node("n1", cpus=8)
        jobs = await cluster.running(3)
        await cluster.kill()
        await asyncio.sleep(1.0)
        before = os.listdir("/proc/self/fd")
        await cluster.start()
        assert len(cluster.hub.attempts.ahead) == 3
        if cancelled:
            for job in jobs:
                cluster.hub.attempts.close(JobId(job), 1)
            assert not cluster.hub.attempts.ahead and not cluster.hub.attempts.returning
        await cluster.close()
        await asyncio.sleep(1.0)
        assert len(os.listdir("/proc/self/fd")) == len(before)

    run(main())


def test_an_attempt_whose_journal_is_damaged_is_told_of_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path, script_s=100.0)
        await cluster.start()
        cluster.node("n1", cpus=8)
        jobs = await cluster.running(3)
        await cluster.kill()
        state = cluster.hub.attempts.run_dir(jobs[1], 1) / rundir.COORDINATOR_STATE
        (records,) = state.glob("*.records")
        records.write_bytes(b"\xff" + records.read_bytes()[1:])
        await cluster.start()
        await cluster.until(lambda: not cluster.hub.attempts.returning, "attempts are back")
        assert cluster.hub.attempts.not_back == [attempts.attempt_name(JobId(jobs[1]), 1)]
        for job in jobs:
            await cluster.until_state(job, "SUCCEEDED")
        assert states(cluster, jobs[1]) == ["LOST", "SUCCEEDED"]
        await cluster.close()

    run(main())


def test_checkpoints_are_read_whole_by_those_alone_who_begin_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[bool] = []

    def load_from(place: Any, skip: Any, deep: bool) -> None:
        read.append(deep)
        raise ZmlError(NO_CHECKPOINT, "there is none")

    monkeypatch.setattr(attempts, "find", lambda folder: folder)
    monkeypatch.setattr(attempts, "load_from", load_from)

    async def main() -> None:
        cluster = FakeCluster(tmp_path, script_s=100.0)
        await cluster.start()
        first = cluster.node("n1")
        job = cluster.submit()
        await cluster.until_state(job, "RUNNING")
        first.die()
        cluster.node("n2")
        await cluster.until(lambda: len(cluster.desk.job(job).attempts) == 2, "it is tried again")
        await cluster.until_state(job, "RUNNING")
        assert read == [True]
        await cluster.kill()
        await cluster.start()
        await cluster.until_state(job, "SUCCEEDED")
        assert read == [True, False] and states(cluster, job)[1:] == ["SUCCEEDED"]
        await cluster.close()

    run(main())


def test_an_attempt_that_was_closed_before_it_was_read_leaves_no_folder(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        submission = Submission(script="train.py", folder="/")
        with pytest.raises(FileNotFoundError, match=r"j7\.1 was closed"):
            cluster.hub.attempts._read(JobId("j7.1"), JobId("j7"), 1, 1, submission)
        assert not (tmp_path / "jobs" / "j7").exists()
        await cluster.close()

    run(main())


def test_a_node_that_comes_back_is_told_to_run_what_it_does_not_run(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path, script_s=100.0)
        await cluster.start()
        node = cluster.node("n1")
        job = cluster.submit()
        await cluster.until_state(job, "RUNNING")
        before, worker = list(node.runs), (f"{job}.1", "w0")
        assert {slot for _, slot in before} == {"w0", "p0"}
        await cluster.kill()
        await cluster.start()
        await asyncio.sleep(20.0)
        assert node.runs == before
        await cluster.kill()
        node.members.pop(worker).vanish()  # it had not heard of it
        await cluster.start()
        await asyncio.sleep(20.0)
        assert node.runs == [*before, worker]
        await cluster.close()

    run(main())


def test_an_order_to_run_something_is_not_repeated_once_that_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node does not take it yet, and says that it is not there when it is to be ended."""
    takes, early = FakeNode.handle, True

    def not_yet(self: FakeNode, peer: str, message: Any, payload: memoryview | None) -> Any:
        if isinstance(message, Run) and early:
            raise Refusal("early", "its former self is still to be told of")
        return takes(self, peer, message, payload)

    async def main() -> None:
        nonlocal early
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        node = cluster.node("n1")
        job = cluster.submit()
        await cluster.until(lambda: cluster.hub.nodes.orders.tasks, "it is told to run it")
        cluster.desk.cancel(job, "ada")
        await cluster.until_state(job, "CANCELLED")
        early = False
        await asyncio.sleep(60.0)
        assert not node.runs and not node.members
        await cluster.close()

    monkeypatch.setattr(FakeNode, "handle", not_yet)
    run(main())


def test_a_job_that_ended_while_nobody_coordinated_has_ended(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path, script_s=10.0)
        await cluster.start()
        node = cluster.node("n1")
        job = cluster.submit()
        await cluster.until_state(job, "RUNNING")
        await cluster.kill()
        await asyncio.sleep(12.0)
        await cluster.start()
        await cluster.until_state(job, "SUCCEEDED")
        assert states(cluster, job) == ["SUCCEEDED"] and not node.members
        await cluster.close()

    run(main())


def test_a_full_disk_changes_nothing_and_all_goes_on_when_there_is_room(tmp_path: Path) -> None:
    def full(*parts: Any) -> int:
        raise NoRoom(errno.ENOSPC, "no room for 30 bytes", "here")

    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        cluster.node("n1")
        job = cluster.submit()
        await cluster.until_state(job, "RUNNING")
        append, cluster.journal._records.append = cluster.journal._records.append, full  # type: ignore[method-assign]
        before = plain(cluster.hub.machine.cluster)
        for _ in range(2):
            with pytest.raises(Problem) as refused:
                cluster.submit()
            assert (refused.value.status, "no room" in refused.value.what) == (507, True)
        assert plain(cluster.hub.machine.cluster) == before
        assert [view.id for view in cluster.desk.jobs()] == [job]
        with pytest.raises(Problem, match="no room"):
            cluster.desk.cancel(job, "not needed")
        await asyncio.sleep(5.0)
        assert cluster.hub.attempts.lives, "nobody was told to end"
        cluster.journal._records.append = append  # type: ignore[method-assign]
        cancelled = await cluster.until_state(job, "CANCELLED")
        assert cancelled.because == "not needed"
        assert cluster.submit() == "j2", "the number was not given away"
        await cluster.until_state("j2", "SUCCEEDED")
        await cluster.close()

    run(main())


def test_who_submits_as_the_disk_gets_full_is_told_not_to_do_it_twice(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        cluster.node("n1")
        append, room = cluster.journal._records.append, 1

        def filling(*parts: Any) -> int:
            nonlocal room
            if not room:
                raise NoRoom(errno.ENOSPC, "no room for 30 bytes", "here")
            room -= 1
            return append(*parts)

        cluster.journal._records.append = filling  # type: ignore[method-assign]
        with pytest.raises(Problem, match=r"job j1 is not written down whole yet.*no room") as told:
            cluster.submit()
        assert told.value.status == 507 and "Do not send it again" in told.value.fix
        room = 10**6
        await cluster.until_state("j1", "SUCCEEDED")
        assert len(cluster.desk.jobs()) == 1
        await cluster.close()

    run(main())


def test_an_archive_is_kept_whole_or_not_at_all_and_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(3_000_000)
    sha256 = hashlib.sha256(data).hexdigest()
    synced_by: list[threading.Thread] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced_by.append(threading.current_thread()))

    async def pieces(most: int) -> AsyncIterator[bytes]:
        for at in range(0, most, 70_000):
            yield data[at : min(at + 70_000, most)]

    async def main() -> None:
        hub: Any = SimpleNamespace(folder=tmp_path, docket=None)
        desk = JobDesk(hub)
        with pytest.raises(Problem, match="are not"):
            await desk.take_archive(sha256, pieces(2_999_999))
        assert list((tmp_path / "archives").iterdir()) == []
        await desk.take_archive(sha256, pieces(len(data)))
        assert Path(desk.archive(sha256)).read_bytes() == data

    asyncio.run(main())
    assert len(synced_by) == 2 and threading.main_thread() not in synced_by


def test_a_submission_of_which_only_half_is_written_was_none(tmp_path: Path) -> None:
    """The process died between its two records: nobody was told that it was taken."""

    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        hub = cluster.hub
        hub.dispatch = lambda event: []  # type: ignore[method-assign]
        with pytest.raises(AssertionError):
            cluster.submit(key="k")
        await cluster.kill()
        await cluster.start()
        assert cluster.desk.jobs() == []
        cluster.node("n1")
        job = cluster.submit(key="k")
        await cluster.until_state(job, "SUCCEEDED")
        await cluster.close()

    run(main())


def test_a_node_that_comes_with_strangers_running_is_told_to_end_them(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        node = cluster.node("n1")
        job = cluster.submit()
        await cluster.until_state(job, "RUNNING")
        node.strangers = [(f"{job}.7", "w0"), (f"{job}.1", "w5"), ("j99.1", "p0"), ("nonsense", "w0")]
        await node.offer()
        await cluster.until(lambda: not node.strangers, "they are told to end")
        assert all(quit.at_once for quit in node.quits)
        assert cluster.desk.job(job).state == "RUNNING" and len(node.members) == 2
        await cluster.until_state(job, "SUCCEEDED")
        await cluster.close()

    run(main())


@pytest.mark.parametrize("seed", range(3))
def test_orders_that_are_lost_on_the_way_are_repeated(tmp_path: Path, seed: int) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path, seed)
        await cluster.start()
        node = cluster.node("n1")
        await cluster.until(lambda: cluster.desk.nodes(), "the node is here")
        cluster.network.loss = 0.3
        jobs = [cluster.submit() for _ in range(4)]
        for job in jobs:
            await cluster.until(
                lambda job=job: cluster.desk.job(job).ended_at is not None,  # type: ignore[misc]
                f"{job} ends (seed {seed})",
            )
        assert {cluster.desk.job(job).state for job in jobs} == {"SUCCEEDED"}
        await cluster.until(lambda: not node.members, "nothing is left")
        await cluster.close()

    run(main())


def test_the_same_submission_twice_is_one_job(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        assert cluster.submit(key="k") == cluster.submit(key="k") == "j1"
        assert cluster.submit(key="k", user="bob") == "j2", "keys are each user's own"
        assert cluster.submit() == "j3" and cluster.submit() == "j4"
        await cluster.kill()
        await cluster.start()
        assert cluster.submit(key="k") == "j1", "also for the next coordinator"
        assert len(cluster.desk.jobs()) == 4
        await cluster.close()

    run(main())


def test_hostile_messages_change_nothing(tmp_path: Path) -> None:
    """Of somebody who has come in, and says what is not so."""

    async def main() -> None:
        cluster = FakeCluster(tmp_path, script_s=120.0)
        await cluster.start()
        node, other = cluster.node("n1", cpus=1), cluster.node("n2", cpus=1)
        job = cluster.submit()
        await cluster.until_state(job, "RUNNING")
        busy, idle = (node, other) if node.members else (other, node)
        await asyncio.sleep(2.0)
        before = plain(cluster.hub.machine.cluster)
        attempt = f"{job}.1"

        nothing = lambda peer, message, payload: None  # noqa: E731
        stranger = cluster.network.endpoint("mallory", vocabulary=Vocabulary, handler=nothing)
        await stranger.start()
        await stranger.connect(COORDINATOR, [ADDRESS])

        def offer(**more: Any) -> Offer:
            asked: dict[str, Any] = {"node": "n3", "boot": "b", "cpus": 1, "gpus": 0, "memory_mb": 1}
            return Offer(**(asked | more))

        runs = msgspec.json.encode(Runs([]))
        refused: list[tuple[Any, bytes | None]] = [
            (Ceased(busy.name, attempt, "w0", "so", True), None),
            (Goodbye(busy.name, busy.boot, True, "so"), None),
            (Goodbye("", "", False, "so"), None),
            (offer(node=busy.name), runs),  # another boot, while it is well
            (offer(node="../../etc"), runs),
            (offer(node=""), runs),
            (offer(cpus=-5), runs),
            (offer(memory_mb=1 << 62), runs),
            (offer(cost_per_hour=float("nan")), runs),
            (offer(), b"{"),
            (Run(attempt, "w0"), None),
            (Exited(job=attempt, member="w0", incarnation=2), None),
            (Exited(job=attempt, member="w9", incarnation=1), None),
            (Join(job="j9.1", role="worker", member="w0", node="n1", pid=1), None),
            (Join(job=job, role="worker", member="w0", node="n1", pid=1), None),
            (Leave("j1.x", "w0", 1, "so"), None),
        ]
        for message, payload in refused:
            with pytest.raises(Refused):
                await stranger.request(COORDINATOR, message, payload, timeout_s=30)
                raise AssertionError(f"taken: {message}")
        for notice in (
            NodeBeat(busy.name, busy.boot),
            Heartbeat(attempt, "w0", 1),
            Heartbeat("j9.9", "w0", 1),
        ):
            stranger.notify(COORDINATOR, notice)
        # A node that is here, and speaks of what is not its own.
        for ceased in (
            Ceased(idle.name, attempt, "w0", "so", True),
            Ceased(idle.name, attempt, "p0", "so", False),
            Ceased(idle.name, f"{job}.2", "w0", "so", False),
        ):
            await idle.endpoint.request(COORDINATOR, ceased, timeout_s=30)
        with pytest.raises(Refused):
            await idle.endpoint.request(COORDINATOR, Ceased(idle.name, "j1", "w0", "so", True), timeout_s=30)
        await asyncio.sleep(2.0)
        assert plain(cluster.hub.machine.cluster) == before
        assert cluster.desk.job(job).state == "RUNNING"
        await cluster.until_state(job, "SUCCEEDED")
        await cluster.close()

    run(main())


def test_a_process_that_its_node_never_heard_of_keeps_nothing_from_ending(tmp_path: Path) -> None:
    """The coordinator dies between writing down that a job begins and telling the node."""

    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        node = cluster.node("n1", cpus=2)
        await cluster.until(lambda: cluster.desk.nodes(), "the node is there")
        cluster.hub.nodes.run = lambda action: None  # type: ignore[method-assign]
        job = cluster.submit()
        await cluster.until(lambda: cluster.desk.job(job).nodes, "it is to begin")
        await cluster.kill()
        await cluster.start()
        cluster.desk.cancel(job, "not needed")
        done = await cluster.until_state(job, "CANCELLED")
        assert done.because == "not needed" and not node.members
        (view,) = cluster.desk.nodes()
        assert view.cpus_free == 2, "nothing is held for it"
        await cluster.close()

    run(main())


def test_who_waits_for_news_is_not_told_that_time_passes(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path, script_s=300.0)
        await cluster.start()
        cluster.node("n1")
        job = cluster.submit()
        await cluster.until_state(job, "RUNNING")
        loop = asyncio.get_running_loop()
        begin = loop.time()
        view = await cluster.desk.changed(job, 30.0)
        assert loop.time() - begin == pytest.approx(30.0, abs=1.0) and view.state == "RUNNING"
        waiting = asyncio.ensure_future(cluster.desk.changed(job, 30.0))
        await asyncio.sleep(1.0)
        cluster.desk.pause(job, "lunch")
        assert (await waiting).state == "DRAINING" and loop.time() - begin < 35.0
        await cluster.close()

    run(main())


def test_where_thousands_are_members_all_are_heard_seldomer_unless_they_ask_for_it() -> None:
    usual = Submission(script="t.py", folder="/code")
    hurried = msgspec.structs.replace(usual, settings={"lease_s": 3.0})
    settings = resolve_for(usual, 1).settings
    assert [slower(settings, usual, members) for members in (3, BEATS, 5 * BEATS)] == [1.0, 1.0, 5.0]
    assert slower(resolve_for(hurried, 1).settings, hurried, 5 * BEATS) == 1.0


def test_each_process_of_a_member_is_expected_as_seldom_as_it_was_told_to_speak() -> None:
    """Also one that takes another's place, whose heartbeats are nothing new."""
    paced: list[tuple[str, float]] = []
    hall: Any = SimpleNamespace(
        docket=SimpleNamespace(resumed=False),
        begun=SimpleNamespace(heartbeat_s=1.0),
        job="j",
        dispatch=lambda event: None,
        endpoint=SimpleNamespace(pace=lambda peer, ping_s: paced.append((peer, ping_s))),
    )
    members = [1.0]
    heartbeats = Heartbeats(hall, lambda: members[0])
    assert heartbeats.begin("first", "w0", 1) == 1.0 and paced == []
    members[0] = 8.0
    assert [heartbeats.begin(peer, "w0", 2) for peer in ("second", "third")] == [8.0, 8.0]
    assert paced == [("second", ping_s(8.0)), ("third", ping_s(8.0))]


@pytest.mark.parametrize(("usual_s", "told_s"), [(0.15, 0.0), (2.0, 2.0)])
def test_a_member_that_was_asked_to_speak_seldom_is_not_called_silent_for_it(
    usual_s: float, told_s: float
) -> None:
    told: list[float] = []
    hall: Any = SimpleNamespace(
        docket=SimpleNamespace(resumed=False),
        begun=SimpleNamespace(heartbeat_s=usual_s),
        job="j",
        machine=SimpleNamespace(generation=lambda job: 1),
        is_current=lambda member, incarnation: True,
        is_member_at=lambda member, peer: True,
        dispatch=lambda event: None,
        endpoint=SimpleNamespace(notify=lambda peer, message: None),
        board=SimpleNamespace(heard=lambda member, now, every_s: told.append(every_s)),
    )

    async def main() -> None:
        Heartbeats(hall, lambda: 1.0).take("peer", Heartbeat("j", "w0", 1))

    run(main())
    assert told == [told_s]


def test_one_greeting_that_took_long_puts_off_no_other(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path, script_s=600.0)
        await cluster.start()
        cluster.node("n1")
        loop = asyncio.get_running_loop()
        for times, within_s in ([30.0, 0.001, 30.0], 1.0), ([30.0, 20.0, 30.0], 300.0):
            cluster.hub.greet_s.extend(times)
            await cluster.until_state(cluster.submit(), "RUNNING")
            begin = loop.time()
            await cluster.until_state(cluster.submit(), "RUNNING")
            assert loop.time() - begin < within_s
        await cluster.close()

    run(main())


@pytest.mark.parametrize("every_s", [0.01, 0.4, 2.0])
def test_a_node_is_missed_however_often_others_are_heard_once_all_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_s: float
) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path, script_s=1000.0)
        await cluster.start()
        nodes = [cluster.node(name) for name in ("n1", "n2")]
        await cluster.until(lambda: len(cluster.desk.nodes()) == 2, "the nodes are here")
        loop, behind = asyncio.get_running_loop(), [True]
        began = loop.time()
        monkeypatch.setattr(
            cluster.hub.endpoint, "catch_up", lambda: loop.time() - began if behind[0] else 0.0
        )
        job = cluster.submit()
        cluster.desk.cancel(job, "for a try")
        nodes[1].die()
        await asyncio.sleep(20.0)
        assert len(cluster.desk.nodes()) == 2, "what it has said since may not have been read"
        behind[0], caught_up = False, loop.time()
        number = 0
        while len(cluster.desk.nodes()) == 2:
            assert loop.time() < caught_up + 10.0
            cluster.submit(key=f"k{number % 3}")
            cluster.hub.look_again()
            number += 1
            await asyncio.sleep(every_s)
        await cluster.close()

    run(main())


def test_all_members_speak_seldomer_when_others_come_and_nobody_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path, script_s=400.0)
        await cluster.start()
        node = cluster.node("n1", cpus=64)
        first = cluster.submit()
        await cluster.until_state(first, "RUNNING")
        member = node.members[f"{first}.1", "w0"]

        async def heard_in(seconds: float) -> int:
            before = member.heard
            await asyncio.sleep(seconds)
            return member.heard - before

        assert await heard_in(40.0) == pytest.approx(40, abs=2)
        monkeypatch.setattr(attempts, "BEATS", 2)
        jobs = await cluster.running(7)
        await asyncio.sleep(60.0)
        assert await heard_in(80.0) == pytest.approx(10, abs=1), "16 members at two heartbeats a second"
        jobs.append(cluster.submit())
        await cluster.until_state(jobs[-1], "RUNNING")
        newcomer = node.members[f"{jobs[-1]}.1", "w0"]
        assert newcomer.lease is not None and newcomer.lease.first_s == pytest.approx(9.0), (
            "from the first on"
        )
        await asyncio.sleep(30.0)
        hall = cluster.hub.attempts.lives[attempts.attempt_name(first, 1)].coordinator
        assert hall is not None
        assert {each.every_s for each in hall.status().members} == {9.0}, (
            "and it is known who speaks how often"
        )
        # Another coordinator does not know how seldom they speak until it has heard them.
        await cluster.kill()
        await cluster.start()
        await asyncio.sleep(60.0)
        assert await heard_in(45.0) == pytest.approx(5, abs=1)
        for job in [first, *jobs]:
            await cluster.until_state(job, "SUCCEEDED")
            assert states(cluster, job) == ["SUCCEEDED"]
        await cluster.close()

    run(main())


def test_what_a_quota_can_never_allow_is_refused_and_not_left_to_wait(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        cluster.hub.quotas = {"ada": Quota(workers=2, cpus=4)}
        with pytest.raises(Problem, match="ada may hold 2 workers at most, and this job needs 3"):
            cluster.submit(workers=3)
        with pytest.raises(Problem, match="ada may hold 4 CPUs at most, and this job needs 6"):
            cluster.submit(workers=2, cpus=3)
        assert not cluster.desk.jobs()
        job = cluster.submit(workers="1..8")
        assert cluster.submit(workers=3, user="bob")
        with pytest.raises(Problem, match="ada may hold 2 workers at most, and this job needs 4"):
            cluster.desk.scale(job, 4, 8)
        assert cluster.desk.job(job).workers_min == 1
        await cluster.close()

    run(main())


def test_an_attempt_that_nobody_cancelled_is_not_called_so(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path, script_s=100.0)
        await cluster.start()
        first = cluster.node("n1")
        moved, late = cluster.submit(), cluster.submit(time_limit_s=60.0)
        cancelled = cluster.submit()
        for job in (moved, late, cancelled):
            await cluster.until_state(job, "RUNNING")
        cluster.desk.cancel(cancelled, "ada")
        await cluster.until_state(cancelled, "CANCELLED")
        first.die()
        cluster.node("n2")
        await cluster.until_state(late, "TIMED_OUT")
        await cluster.until_state(moved, "SUCCEEDED")

        def ends(job: str) -> list[tuple[str, int | None]]:
            return [(each.state, each.exit_code) for each in cluster.desk.job(job).attempts]

        assert ends(cancelled)[-1] == ("CANCELLED", 130)
        assert ends(moved) == [("STOPPED", None), ("SUCCEEDED", 0)]
        assert ends(late)[-1] == ("TIMED_OUT", 124)
        again = cluster.desk.job(moved)
        await cluster.kill()
        await cluster.start()
        assert cluster.desk.job(moved) == again, "and its next coordinator says the same"
        await cluster.close()

    run(main())


def test_a_job_whose_script_never_joined_is_told_so_where_it_ends(tmp_path: Path) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path)
        await cluster.start()
        cluster.node("n1")
        job = cluster.submit()
        await cluster.until_state(job, "SUCCEEDED")
        assert cluster.desk.job(job).because == (
            "the worker finished, and no script called zml.join: nothing was trained together [ZML-E507]"
        )
        await cluster.close()

    run(main())


def test_nothing_begins_on_a_node_that_nobody_has_heard_since_the_coordinator_came_back(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        cluster = FakeCluster(tmp_path, script_s=30.0)
        await cluster.start()
        dies, stays = cluster.node("n1", cpus=8), cluster.node("n2", cpus=2)
        await cluster.until(lambda: len(cluster.desk.nodes()) == 2, "both are here")
        first = cluster.submit()
        await cluster.until_state(first, "RUNNING")
        dies.die()
        await cluster.kill()
        await cluster.start()
        loop = asyncio.get_running_loop()
        back_at, jobs = loop.time(), [cluster.submit() for _ in range(2)]
        await asyncio.sleep(10.0)
        heard = {node.id: node.heard_s for node in cluster.desk.nodes()}
        assert heard["n1"] == pytest.approx(loop.time() - back_at, abs=0.1) and heard["n2"] < 2.0
        await cluster.until(lambda: cluster.desk.job(jobs[0]).nodes, "it begins")
        for job in jobs:
            await cluster.until_state(job, "SUCCEEDED")
            assert len(cluster.desk.job(job).attempts) == 1
        assert not dies.runs or {job for job, _ in dies.runs} == {f"{first}.1"}
        assert {f"{job}.1" for job in jobs} <= {job for job, _ in stays.runs}
        assert [node.id for node in cluster.desk.nodes()] == ["n2"]
        await cluster.close()

    run(main())
