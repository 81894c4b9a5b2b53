"""`--compress auto`: what it decides, without a clock; and that workers whose updates are merged decide together."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.simulation import simulate
from tests.zml.cluster import Cluster, Script
from tests.zml.test_cluster import same, trained
from tests.zml.test_updates import Twin
from zml.codec import UNKNOWN
from zml.hyper import (
    NO_WISH,
    BadHyper,
    Hyper,
    Number,
    OptimizerSpec,
    hyper_of,
    read_hyper,
    read_wish,
    write_hyper,
)
from zml.iothread import IoThread
from zml.layout import CHUNK, Bucket, Registration
from zml.messages import Assign, Assignment, Commit, Enter, Finished, JobSpec, Muster, Roster, Seat
from zml.scheduler.ids import JobId
from zml.shard import base
from zml.shard.counted import Last, agreed
from zml.shard.pace import Pace
from zml.shard.shard import Shard
from zml.transport.memory import MemoryNetwork
from zml.worker.auto import (
    AFTER,
    DECIDE_EVERY,
    FIRST,
    LINK_EVERY_S,
    PROBE_BYTES,
    SETTINGS,
    TELLS_S,
    Auto,
    Link,
    Setting,
    choose,
    exchange_s,
    measure,
)
from zml.worker.traffic import Traffic

FAST, SLOW = Link(0.0, 1e15), Link(0.0, 1.0)
JOB = "job"
CHUNK_BYTES = 4 * CHUNK


@given(
    st.integers(1_000, 10**9),
    st.integers(1, 64),
    st.floats(1e5, 1e10),
    st.floats(0, 0.1),
    st.floats(1e-3, 10.0),
    st.booleans(),
)
def test_the_mildest_setting_that_hides_is_chosen(
    elements: int, workers: int, rate: float, latency_s: float, compute_s: float, hidden: bool
) -> None:
    link = Link(latency_s, rate)
    chosen = choose(elements, workers, link, compute_s, hidden)
    place, room_s = SETTINGS.index(chosen), (0.8 if hidden else 0.1) * compute_s
    if place > 0:  # the next milder one would show
        assert exchange_s(SETTINGS[place - 1], elements, workers, link) > room_s
    if place < len(SETTINGS) - 1:
        assert exchange_s(chosen, elements, workers, link) <= max(room_s, 2.2 * latency_s)


def test_a_fast_link_sends_all_as_it_is_and_a_slow_one_little() -> None:
    assert choose(10**6, 4, Link(0, 1e9), compute_s=0.1, hidden=True) == Setting(1.0, "fp32")
    assert choose(10**6, 4, Link(0, 5e7), compute_s=0.1, hidden=True) == Setting(1.0, "bf16")
    assert choose(25 * 10**6, 4, Link(0, 12.5e6), compute_s=0.1, hidden=True) == Setting(0.003, "int4")
    assert choose(10**9, 4, Link(0, 1e6), compute_s=0.1, hidden=False) == SETTINGS[-1]


def test_where_an_empty_message_takes_longer_than_a_step_sending_less_is_of_no_use() -> None:
    assert choose(10**4, 4, Link(0.1, 1e8), compute_s=0.01, hidden=False) == Setting(1.0, "fp32")


def test_settings_become_milder_from_the_last_to_the_first() -> None:
    takes = [exchange_s(setting, 10**7, 4, Link(0, 1e8)) for setting in SETTINGS]
    assert takes == sorted(takes, reverse=True)
    assert [str(setting) for setting in SETTINGS[:5]] == ["fp32", "bf16", "int8", "int4", "topk:30%:int4"]


def test_auto_decides_after_a_few_steps_and_then_now_and_then() -> None:
    auto = Auto(10**6, hidden=True, link=Link(1e-3, 1e9))
    assert auto.setting == FIRST
    assert [auto.step(0.1, 4) for _ in range(AFTER)] == [False] * (AFTER - 1) + [True]
    assert auto.setting == SETTINGS[0] and "the link takes 1000.0 MB/s" in auto.because
    auto.link = Link(1e-3, 1e5)  # others use the link now
    assert [auto.step(0.1, 4) for _ in range(DECIDE_EVERY)][-1] is True
    assert auto.setting == SETTINGS[-1]


def test_auto_stays_as_it_is_while_nothing_is_measured() -> None:
    auto = Auto(10**6, hidden=True)
    assert not any(auto.step(0.1, 4) for _ in range(100)) and auto.setting == FIRST


# -- the link ----------------------------------------------------------------------------------------------


class Wire:
    """What pulling over a link is like, of a model of so many bytes. `hiccups`: what each pull takes besides."""

    def __init__(
        self,
        rate: float,
        latency_s: float,
        model: int = 40 << 20,
        new: int = 0,
        hiccups: Sequence[float] = (),
    ) -> None:
        self.rate, self.latency_s, self.model, self.new = rate, latency_s, model, new
        self.hiccups = iter(hiccups)
        self.took_s, self.largest = 0.0, 0

    def pull(self, size: int) -> tuple[float, int]:
        asked = min(self.model, -(-size // CHUNK_BYTES) * CHUNK_BYTES)
        self.largest = max(self.largest, asked)
        came = asked + self.new
        seconds = self.latency_s + came / self.rate + next(self.hiccups, 0.0)
        self.took_s += seconds
        return seconds, came


@given(
    st.floats(2e4, 1e10),
    st.floats(1e-5, 0.2),
    st.integers(1_000, 1 << 32),
    st.integers(0, 4 << 20),
)
def test_a_link_is_measured_whatever_it_is_and_whatever_comes_besides(
    rate: float, latency_s: float, model: int, new: int
) -> None:
    """`new`: what others' steps bring to each pull, asked for or not."""
    wire = Wire(rate, latency_s, model, new)
    link = measure(wire.pull)
    assert 0 < link.rate <= rate * 1.001 and link.latency_s >= 0
    # Where the largest pull takes hardly longer than an empty one, it can only be said that the rate is that high.
    largest, empty_s = wire.largest, latency_s + new / rate
    if largest / rate > 0.12 * (empty_s + largest / rate):
        assert link.rate == pytest.approx(rate, rel=1e-3)
        assert link.latency_s == pytest.approx(latency_s, abs=1e-6 + 2e-3 * new / rate)
    assert largest == min(model, PROBE_BYTES[1]) or largest / rate >= TELLS_S
    assert wire.took_s <= 11 * empty_s + max(12 * TELLS_S, min(model, CHUNK_BYTES) / rate)


@pytest.mark.parametrize("which", range(8))
def test_one_hiccup_does_not_make_a_link_slow(which: int) -> None:
    hiccups = [0.0] * 8
    hiccups[which] = 0.4
    link = measure(Wire(12.5e6, 0.001, hiccups=hiccups).pull)
    assert link.rate == pytest.approx(12.5e6, rel=0.25)


def test_the_link_is_measured_again_when_that_is_long_ago(
    monkeypatch: pytest.MonkeyPatch, io: IoThread
) -> None:
    traffic = Twin(io, compress="auto").traffic
    auto = traffic.auto
    assert auto is not None
    traffic.measure_link()
    first, at = auto.link, auto.link_at
    traffic.look_at_link()
    assert auto.link is first
    assert not auto.is_due(at + LINK_EVERY_S - 1) and auto.is_due(at + LINK_EVERY_S)
    auto.link_at -= LINK_EVERY_S
    traffic.look_at_link()
    assert auto.link is not first and auto.link_at >= at
    Twin(io, compress="topk:50%").traffic.look_at_link()


@pytest.mark.parametrize("staleness", [0, 2])
def test_what_is_pulled_to_measure_comes_from_every_shard_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, io: IoThread, staleness: int
) -> None:
    twin = Twin(io, compress="auto", momentum=0.0, staleness=staleness)
    traffic = twin.traffic
    twin.train(3)
    twin.updates.flush()
    before = {name: value.clone() for name, value in twin.model.state_dict().items()}
    versions = list(traffic.replica.versions)
    asked: list[list[tuple[Bucket, list[int]]]] = []
    pull_all = traffic.client.pull_all

    def noted(wanted: Any, *args: Any) -> Any:
        asked.append(list(wanted))
        return pull_all(wanted, *args)

    monkeypatch.setattr(traffic.client, "pull_all", noted)
    traffic.buckets = tuple(replace(bucket, shard=bucket.index % 2) for bucket in traffic.buckets)
    sizes = [4 * chunk.size for chunk in traffic.layout.chunks]
    turns = traffic._turns()
    assert traffic._pull_again(turns, 0)[1] == 0
    assert traffic._pull_again(turns, 1)[1] > 0 and traffic._pull_again(turns, 10**9)[1] >= sum(sizes)
    for wanted, whole in zip(asked, (0, 2, len(sizes)), strict=True):
        assert {bucket.shard for bucket, _ in wanted} == {0, 1}, (
            "of each shard something, if only nothing new"
        )
        assert sum(have.count(UNKNOWN) for _, have in wanted) == whole
    traffic.measure_link()
    assert list(traffic.replica.versions) == versions
    assert all(torch.equal(value, before[name]) for name, value in twin.model.state_dict().items())
    twin.train(3)
    twin.updates.finish()
    other = Twin(io, compress="auto", momentum=0.0, staleness=staleness)
    other.train(3)
    other.updates.flush()
    other.train(3)
    other.updates.finish()
    expected = other.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in twin.model.state_dict().items())


def test_where_nothing_is_trained_there_is_nothing_to_measure(io: IoThread) -> None:
    traffic = Twin(io, compress="auto").traffic
    traffic.buckets = ()
    traffic.measure_link()
    assert traffic.auto is not None and traffic.auto.link is None


# -- one setting for all -----------------------------------------------------------------------------------

NUMBERS = hyper_of(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5))


def last(clock: int, wish: int = NO_WISH) -> Last:
    return Last(clock, 0, 0, write_hyper(NUMBERS, wish))


def test_the_sparsest_wish_of_the_newest_clock_is_what_all_have() -> None:
    assert agreed([last(4, 2), last(4, 5), last(4, 3)]) == 5
    assert agreed([last(4, 2), last(3, 9)]) == 2, "that worker is gone, or had no batch"
    assert agreed([last(4), last(4, 0)]) == 0
    assert agreed([last(4), last(4)]) == agreed([]) == NO_WISH, "they compress with something else"


def test_a_wish_travels_behind_the_numbers_and_changes_none() -> None:
    spec = OptimizerSpec("SGD", ({},))
    for wish in (NO_WISH, 0, 7):
        data = write_hyper(NUMBERS, wish)
        assert (read_hyper(data, spec), read_wish(data)) == (NUMBERS, wish)
    for bad in (256, -2):
        with pytest.raises(BadHyper, match="wish"):
            read_hyper(write_hyper(NUMBERS, bad), spec)


def test_who_decides_with_others_wishes_and_adopts_and_who_decides_alone_does_not() -> None:
    auto = Auto(10**6, hidden=False, together=True, link=FAST)
    assert SETTINGS[auto.told] == FIRST, "before it has measured, it wants no change"
    assert auto.adopt(3) and auto.setting == SETTINGS[3] and auto.told == 3
    assert not any(auto.step(0.1, 2) for _ in range(AFTER)), "a wish changes nothing yet"
    assert (
        auto.told == 0
        and auto.setting == SETTINGS[3]
        and "another worker needs it, and this one fp32" in auto.because
    )
    assert auto.adopt(0) and not auto.adopt(0) and not auto.adopt(NO_WISH) and not auto.adopt(200)
    assert auto.setting == SETTINGS[0] and auto.because.startswith("a step computes")
    alone = Auto(10**6, hidden=True)
    assert not alone.adopt(0) and alone.setting == FIRST and alone.told == NO_WISH


def test_the_workers_that_there_are_now_decide_and_not_those_that_were_asked_for() -> None:
    link, compute_s = Link(0, 8e6), 0.1
    few, many = Auto(10**6, hidden=True, link=link), Auto(10**6, hidden=True, link=link)
    for _ in range(AFTER):
        few.step(compute_s, 1)
        many.step(compute_s, 16)
    assert (few.setting, many.setting) == tuple(choose(10**6, n, link, compute_s, True) for n in (1, 16))
    assert SETTINGS.index(few.setting) < SETTINGS.index(many.setting)


def shard_of_nothing(compress: str = "auto", staleness: int | None = 0) -> Shard:
    """Of a job with w0 and w1; all that it gets of a step is its commit."""
    model = torch.nn.Linear(5, 3)
    registration = Registration.of(model, torch.optim.SGD(model.parameters(), lr=0.5))
    shard = Shard(JobId(JOB), "p1")
    assignment = msgspec.msgpack.encode(Assignment(registration.to_bytes(), [0]))
    shard.order(Assign(JOB, "p1", staleness, compress), assignment)
    seats = [Seat("w0", 1, True), Seat("w1", 1, True)]
    shard.order(Roster(JOB, 1), msgspec.msgpack.encode(Muster(seats)))
    for worker in ("w0", "w1"):
        shard.handle(worker, Enter(JOB, worker, 1), None)
    return shard


def commit(shard: Shard, worker: str, clock: int, wish: int) -> None:
    shard.handle(worker, Commit(JOB, worker, 1, clock, 0), memoryview(write_hyper(NUMBERS, wish)))


def test_a_shard_that_is_made_of_anothers_state_says_the_same() -> None:
    shard = shard_of_nothing()
    commit(shard, "w0", 0, 6)
    assert shard.setting == NO_WISH, "w1 is missing"
    commit(shard, "w1", 0, 2)
    assert shard.setting == 6
    copy = Shard(JobId(JOB), "p1")
    base.become(copy, base.state_of(shard))
    assert copy.setting == 6
    for worker in ("w0", "w1"):
        copy.handle(worker, Enter(JOB, worker, 1, known=True), None)
    commit(copy, "w0", 1, 1)
    commit(copy, "w1", 1, 2)
    assert copy.setting == 2


def test_a_lost_workers_wish_counts_where_its_commit_did_not_come() -> None:
    """It may have come elsewhere, and all shards are to say the same."""
    shard = shard_of_nothing()
    commit(shard, "w0", 0, 1)
    owed = Finished("w1", 1, 0, 0, 1, write_hyper(NUMBERS, 8))
    shard.roster(2, [Seat("w0", 1, True)], [owed])
    assert shard.setting == 8
    commit(shard, "w0", 1, 1)
    assert shard.setting == 1, "and is gone with the next clock"


@pytest.mark.parametrize(("compress", "rates"), [("auto", [0.5, 0.25, 1.0]), ("topk:1%", [0.5, 0.5, 1.0])])
@pytest.mark.parametrize("staleness", [2, None])
def test_with_a_staleness_bound_an_update_is_merged_as_its_own_worker_says(
    monkeypatch: pytest.MonkeyPatch, compress: str, rates: list[float], staleness: int | None
) -> None:
    """With `auto` workers differ in how sparse their updates are; else the senior worker, w0, speaks for all."""
    seen: list[Number] = []
    monkeypatch.setattr(Pace, "alone", lambda pace, store, pushes, hyper: seen.append(hyper[0]["lr"]))
    shard = shard_of_nothing(compress, staleness)
    for worker, clock, rate in (("w0", 0, 0.5), ("w1", 0, 0.25), ("w0", 1, 1.0)):
        hyper = write_hyper([{**NUMBERS[0], "lr": rate}])
        shard.handle(worker, Commit(JOB, worker, 1, clock, 0), memoryview(hyper))
    assert seen == rates and shard.setting == NO_WISH


def test_training_goes_on_over_a_change_of_the_setting_and_loses_no_update(io: IoThread) -> None:
    """One worker, with plain SGD: what has arrived in the end is what torch makes of the same gradients."""
    twin = Twin(io, compress="auto", momentum=0.0)
    auto = twin.traffic.auto
    assert auto is not None
    seen = []
    for link in (FAST, SLOW):
        auto.link, auto.wait = link, 3
        for _ in range(5):
            twin.train(1)
            twin.train_plain(1)
            seen.append(auto.setting)
    assert seen[0] == FIRST and SETTINGS[0] in seen and seen[-1] == SETTINGS[-1]
    twin.updates.finish()
    assert twin.off_by() < 1e-3


class Settings:
    """With which setting each worker has sent each clock. `links`: what each is to have measured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, links: dict[str, Link]) -> None:
        self.sent: dict[int, dict[str, Setting]] = {}
        self.links = links
        self.former = Traffic._written
        monkeypatch.setattr(Traffic, "_written", lambda traffic, hyper: self.written(traffic, hyper))

    def written(self, traffic: Traffic, hyper: Sequence[Hyper]) -> bytes:
        worker, auto = traffic.client.seat.worker, traffic.auto
        assert auto is not None
        auto.link = self.links[worker]
        self.sent.setdefault(traffic.clock, {})[worker] = auto.setting
        return self.former(traffic, hyper)

    @property
    def newest(self) -> dict[str, Setting]:
        return self.sent[max(self.sent, default=-1)] if self.sent else {}

    def alike(self) -> bool:
        return all(len(set(settings.values())) == 1 for settings in self.sent.values())


def test_synchronous_workers_send_alike_whatever_their_links_and_whoever_dies(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The one with the slow link decides, until it is gone; a shard and the coordinator die meanwhile."""
    settings = Settings(monkeypatch, {"w0": FAST, "w1": FAST, "w2": SLOW, "w3": FAST})

    async def main() -> list[Script]:
        spec = JobSpec(workers=3, shards=2, compress="auto")
        cluster = Cluster(MemoryNetwork(5), spec, folder=tmp_path, state=tmp_path / "state")
        await cluster.start()
        scripts = [cluster.script(f"w{index}", batches=90) for index in range(3)]
        await cluster.until(lambda: SETTINGS[-1] in settings.newest.values())
        cluster.kill_coordinator()
        cluster.kill_shard(1)
        await asyncio.sleep(2.0)
        cluster.start_shard(1)
        await cluster.restart_coordinator()
        scripts.append(cluster.script("w3", batches=90, seed=99))
        await cluster.until(lambda: "w3" in settings.newest)
        assert set(settings.newest.values()) == {SETTINGS[-1]}
        cluster.kill("w2")
        assert await cluster.finish() == 0, [script.error for script in scripts]
        return scripts

    scripts = simulate(main())
    left = {(epoch, batch) for epoch in range(2) for batch in range(90)} - set(trained(scripts))
    assert len(left) <= 1, "the last step of w2 may count though nobody was there to hear it"
    assert settings.alike(), settings.sent
    assert [set(settings.sent[clock].values()) for clock in (min(settings.sent), max(settings.sent))] == [
        {FIRST},
        {SETTINGS[0]},
    ]
    same([scripts[0], scripts[1], scripts[3]])


@pytest.mark.parametrize("staleness", [2, None])
def test_with_a_staleness_bound_each_worker_has_its_own(
    monkeypatch: pytest.MonkeyPatch, staleness: int | None
) -> None:
    settings = Settings(monkeypatch, {"w0": FAST, "w1": SLOW})

    async def main() -> list[Script]:
        spec = JobSpec(workers=2, shards=2, compress="auto", staleness=staleness)
        cluster = Cluster(MemoryNetwork(5), spec)
        await cluster.start()
        scripts = [cluster.script(f"w{index}", batches=40) for index in range(2)]
        assert await cluster.finish() == 0, [script.error for script in scripts]
        return scripts

    scripts = simulate(main())
    assert trained(scripts) == [(epoch, batch) for epoch in range(2) for batch in range(40)]
    newest = {
        worker: setting for _, sent in sorted(settings.sent.items()) for worker, setting in sent.items()
    }
    assert newest == {"w0": SETTINGS[0], "w1": SETTINGS[-1]}
