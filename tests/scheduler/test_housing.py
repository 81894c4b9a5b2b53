"""Where shards live: whose backup counts, who is promoted, who is waited for, whatever is said late or twice."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.scheduler.play import JOB, Play, running
from zml.scheduler.actions import (
    Action,
    Adopt,
    Await,
    Fence,
    Finish,
    Ignored,
    Pair,
    Promote,
    Rehome,
    Stop,
    Unpair,
)
from zml.scheduler.events import (
    BackupLost,
    BackupReady,
    Died,
    Left,
    NotPromoted,
    Returned,
    Submitted,
    Ticked,
    Vacating,
)
from zml.scheduler.homes import Home, copy_name
from zml.scheduler.ids import ShardId, shard_id
from zml.scheduler.rules import Rules

P0, P1, P2 = (shard_id(number) for number in range(3))


def pairs(actions: list[Action]) -> list[tuple[str, str, int]]:
    return [(a.shard, a.host, a.host_incarnation) for a in actions if isinstance(a, Pair)]


def of_kind(actions: list[Action], kind: type) -> list[Any]:
    return [action for action in actions if isinstance(action, kind)]


def ready(play: Play, shard: str, copy: int = 1, **other: Any) -> list[Action]:
    """Its home says that its backup is in step."""
    home = play.machine.home(JOB, shard)
    assert home is not None
    host = str(other.get("host") or play.machine.jobs[JOB].place_of_copy(ShardId(shard)))
    said = {
        "member": str(home.host),
        "incarnation": play.incarnation(home.host),
        "home": home.incarnation,
        "host": str(host),
        "host_incarnation": play.incarnation(host) if host != "p9" else 1,
        **other,
    }
    return play.tell(BackupReady(JOB, shard=shard, copy=copy, **said))


def lost(play: Play, shard: str, copy: int = 1) -> list[Action]:
    home = play.machine.home(JOB, shard)
    assert home is not None
    return play.tell(BackupLost(JOB, home.host, play.incarnation(home.host), shard, home.incarnation, copy))


def vacate(play: Play, member: str) -> list[Action]:
    return play.tell(Vacating(JOB, member, play.incarnation(member), "SIGTERM"))


def run_out(play: Play, seconds: float = 150.0) -> list[Action]:
    """Nobody comes back, and everybody who is here is heard, until a patience is over."""
    actions: list[Action] = []
    until = play.now + seconds
    while play.now < until:
        play.now += 0.5
        actions = [*play.hear(*play.alive()), *play.tell(Ticked(JOB))]
        if actions:
            break
    return actions


def with_backups(shards: int = 2, digest: str = "d") -> Play:
    play = running(1, shards, replicas=1)
    play.register("w0", digest=digest)
    for number in range(shards):
        assert ready(play, f"p{number}") == []
    return play


def serves(play: Play, shard: str, host: str, holds: str = "d") -> list[Action]:
    return play.tell(Returned(JOB, host, play.incarnation(host), holds, shard))


@pytest.mark.parametrize(("shards", "replicas"), [(1, 1), (2, 2), (3, -1)])
def test_a_job_with_backups_that_have_no_place_is_refused(shards: int, replicas: int) -> None:
    with pytest.raises(ValueError, match="replicas must be"):
        Submitted(JOB, 1, shards, 0, replicas=replicas)


def test_every_shard_is_told_at_the_beginning_to_keep_its_backup_in_the_next_process() -> None:
    play = Play(1, 3, replicas=1)
    for number in range(3):
        play.join("shard", f"shard-{number}")
    assert pairs(play.join("worker", "agent")) == [("p0", "p1", 1), ("p1", "p2", 1), ("p2", "p0", 1)]
    assert pairs(running(1, 3).fall_silent("p1")) == [], "without replicas nobody is"


@pytest.mark.parametrize("how", ["silent", Left, Died])
def test_a_backup_in_step_is_promoted_at_once_and_serves_when_it_says_so(how: Any) -> None:
    play = with_backups()
    actions = play.fall_silent("p0") if how == "silent" else play.tell(how(JOB, "p0", 1, "SIGTERM"))
    (promote,) = of_kind(actions, Promote)
    assert (promote.shard, promote.host, promote.incarnation, promote.log) == (P0, P1, 2, "p0-1-1")
    assert of_kind(actions, Await) == [], "nobody waits for the process that is gone"
    assert serves(play, "p0", "p1") == [Rehome(JOB, P0, 2, "p0 is back")]
    assert serves(play, "p0", "p1") == [], "twice is the same as once"
    assert play.machine.home(JOB, "p0") == Home(P1, 2, "p0-1-1")
    assert play.machine.waiting_for(JOB) == "waiting for w0 to bring the first parameters"


def test_a_process_that_comes_back_serves_nothing_and_keeps_backups() -> None:
    play = with_backups()
    play.fall_silent("p0")
    serves(play, "p0", "p1")
    actions = play.join("shard", "again", "p0")
    assert pairs(actions) == [("p0", "p0", 2), ("p1", "p0", 2)]
    assert of_kind(actions, Await) == []
    assert play.machine.served_by(JOB, "p0") == []
    assert play.machine.served_by(JOB, "p1") == [(P0, Home(P1, 2, "p0-1-1")), (P1, Home(P1, 1, "p1"))]
    assert ready(play, "p0", 1) == [] and ready(play, "p1", 2) == []
    promotes = of_kind(play.fall_silent("p1"), Promote)
    assert [(p.shard, p.host, p.log) for p in promotes] == [(P0, P0, "p0-2-1"), (P1, P0, "p1-1-2")]


def test_a_backup_that_was_given_up_is_not_promoted_whatever_is_said_of_it_later() -> None:
    play = with_backups()
    assert lost(play, "p0") == []
    assert lost(play, "p0") == [], "twice is the same as once"
    (ignored,) = ready(play, "p0")
    assert isinstance(ignored, Ignored), "this was said before, and comes late"
    (wait,) = of_kind(play.fall_silent("p0"), Await)
    assert wait.shard == P0 and wait.because.endswith("nobody else has its chunks")
    assert of_kind(play.join("shard", "again", "p0"), Await), "its own log has everything"
    assert play.machine.served_by(JOB, "p0") == [(P0, Home(P0, 2, "p0"))]
    assert Rehome(JOB, P0, 2, "p0 is back") in serves(play, "p0", "p0")


def test_a_newer_copy_counts_again_and_an_older_loss_does_not_touch_it() -> None:
    play = with_backups()
    lost(play, "p0", 1)
    assert ready(play, "p0", 2) == []
    assert lost(play, "p0", 1) == []
    (promote,) = of_kind(play.fall_silent("p0"), Promote)
    assert promote.log == "p0-1-2"


@pytest.mark.parametrize(
    "wrong",
    [
        {"home": 2},
        {"host": "p0"},
        {"host": "p9"},
        {"host_incarnation": 2},
        {"incarnation": 2},
        {"member": "p1"},
    ],
)
def test_what_a_stranger_says_of_a_backup_counts_for_nothing(wrong: dict[str, Any]) -> None:
    play = running(1, 2, replicas=1)
    (ignored,) = ready(play, "p0", **wrong)
    assert isinstance(ignored, Ignored)
    assert of_kind(play.fall_silent("p0"), Promote) == []


def test_a_backup_dies_with_its_process() -> None:
    play = with_backups(3)
    actions = play.fall_silent("p1")
    (promote,), (unpair,) = of_kind(actions, Promote), of_kind(actions, Unpair)
    assert (promote.shard, promote.host, unpair.shard) == (P1, P2, P0)
    (wait,) = of_kind(play.fall_silent("p0"), Await)
    assert wait.shard == P0, "its backup was in p1"


def test_when_both_die_the_one_that_served_last_is_waited_for() -> None:
    play = with_backups()
    play.fall_silent("p0")
    serves(play, "p0", "p1")
    waits = of_kind(play.fall_silent("p1"), Await)
    assert sorted(wait.shard for wait in waits) == [P0, P1]
    assert of_kind(play.join("shard", "again", "p0"), Await) == [], "what it has is out of date"
    waits = of_kind(play.join("shard", "again too", "p1"), Await)
    assert sorted(wait.shard for wait in waits) == [P0, P1]
    assert play.machine.served_by(JOB, "p1") == [(P0, Home(P1, 3, "p0-1-1")), (P1, Home(P1, 2, "p1"))]


def test_a_promotion_whose_process_dies_falls_back_on_the_former_log() -> None:
    play = with_backups()
    assert of_kind(play.fall_silent("p0"), Promote)
    waits = of_kind(play.fall_silent("p1"), Await)
    assert sorted(wait.shard for wait in waits) == [P0, P1]
    play.join("shard", "again", "p0")
    assert play.machine.served_by(JOB, "p0") == [(P0, Home(P0, 3, "p0"))]
    (ignored,) = play.tell(Returned(JOB, "p1", 1, "d", "p0"))
    assert isinstance(ignored, Ignored), "the promoted one never served anybody"


def test_a_promotion_that_is_refused_falls_back_and_sends_a_process_that_was_started_meanwhile_back_to_its_log() -> (
    None
):
    play = with_backups()
    play.fall_silent("p0")
    play.join("shard", "again", "p0")
    because = "p1 does not serve its backup of p0"
    assert play.tell(NotPromoted(JOB, P0, 1, because)) == [], "another promotion is meant"
    actions = play.tell(NotPromoted(JOB, P0, 2, because))
    assert [(a.host, a.incarnation, a.log) for a in of_kind(actions, Adopt)] == [("p0", 3, "p0")]
    assert serves(play, "p0", "p0")[0] == Rehome(JOB, P0, 3, "p0 is back")


def test_a_promoted_backup_must_have_the_layout() -> None:
    play = with_backups()
    play.fall_silent("p0")
    actions = serves(play, "p0", "p1", holds="")
    assert of_kind(actions, Stop)[0].member == P1
    assert sorted(wait.shard for wait in of_kind(actions, Await)) == [P0, P1]


def test_a_shard_that_joins_again_over_its_silent_self_is_promoted_and_not_trusted_with_the_old_log() -> None:
    play = with_backups()
    play.now += 0.8
    play.hear("p1", "w0")
    actions = play.join("shard", "again", "p0")
    assert of_kind(actions, Fence) and of_kind(actions, Promote)[0].host == P1
    assert play.machine.served_by(JOB, "p0") == []


# -- a process leaves in order, and comes again -----------------------------------------------------------------


@pytest.mark.parametrize("shards", [2, 3])
def test_a_process_that_is_to_leave_has_what_lives_there_copied_to_the_next_and_promoted_as_soon_as_it_is_in_step(
    shards: int,
) -> None:
    play = running(1, shards)
    play.register("w0")
    (pair,) = vacate(play, "p1")
    to = P2 if shards == 3 else P0
    assert isinstance(pair, Pair) and (pair.shard, pair.host) == (P1, to)
    assert pair.because == f"p1 is to move to {to}"
    assert play.machine.needed_in(JOB, "p1") == [P1] and play.machine.is_leaving(JOB, "p1")
    (promote,) = ready(play, "p1")
    assert isinstance(promote, Promote) and (promote.shard, promote.host, promote.log) == (P1, to, "p1-1-1")
    assert not play.machine.serves_at(JOB, "p1", "p1", 1), "its former home is told so when it asks"
    assert play.machine.needed_in(JOB, "p1") == [P1], "until it is there"
    assert play.machine.waiting_for(JOB) == f"waiting for {to} to serve p1"
    assert serves(play, "p1", str(to)) == [Rehome(JOB, P1, 2, "p1 is back")]
    assert play.machine.needed_in(JOB, "p1") == []
    assert play.tell(Left(JOB, "p1", 1, "SIGTERM")) == [], "nobody waits for it"
    assert play.machine.waiting_for(JOB) == "waiting for w0 to bring the first parameters"


def test_what_is_said_twice_of_a_process_that_leaves_counts_once() -> None:
    play = running(1, 2)
    vacate(play, "p1")
    assert [type(action) for action in vacate(play, "p1")] == [Ignored]
    assert len(ready(play, "p1")) == 1
    assert [type(action) for action in ready(play, "p1")] == [Ignored]


def test_the_last_process_cannot_hand_over_and_is_waited_for_when_it_leaves() -> None:
    play = running(1, 1)
    (ignored,) = vacate(play, "p0")
    assert isinstance(ignored, Ignored) and not play.machine.is_leaving(JOB, "p0")
    assert [type(action) for action in play.tell(Left(JOB, "p0", 1, "SIGTERM"))] == [Await]


def test_a_process_with_a_backup_in_step_hands_over_without_another_copy() -> None:
    play = with_backups(3)
    actions = vacate(play, "p1")
    assert [(a.shard, a.host) for a in of_kind(actions, Promote)] == [("p1", "p2")]
    assert pairs(actions) == [("p0", "p2", 1)], "the backup that was there is made elsewhere"
    assert pairs(serves(play, "p1", "p2")) == [("p1", "p0", 1)], "and p1 has a backup without its own process"


def test_a_shard_moves_home_when_its_process_joins_again() -> None:
    play = running(1, 2)
    play.register("w0")
    vacate(play, "p1")
    ready(play, "p1")
    serves(play, "p1", "p0")
    play.tell(Left(JOB, "p1", 1, "SIGTERM"))
    assert pairs(play.join("shard", "again", "p1")) == [("p1", "p1", 2)]
    assert play.machine.served_by(JOB, "p1") == [], "it has nothing yet"
    (promote,) = of_kind(ready(play, "p1"), Promote)
    assert (promote.shard, promote.host, promote.incarnation) == (P1, P1, 3)
    assert serves(play, "p1", "p1") == [Rehome(JOB, P1, 3, "p1 is back")]


def test_where_a_shard_is_to_move_dies_and_the_next_one_is_asked() -> None:
    play = running(1, 3)
    vacate(play, "p0")
    actions = play.fall_silent("p1")
    assert [(a.shard, a.host, a.number) for a in of_kind(actions, Unpair)] == [("p0", "p1", 2)]
    assert [(a.shard, a.host, a.number) for a in of_kind(actions, Pair)] == [("p0", "p2", 3)]
    ready(play, "p0")
    serves(play, "p0", "p2")
    assert play.machine.needed_in(JOB, "p0") == []
    moves = of_kind(play.join("shard", "again", "p1"), Pair)
    assert [(a.shard, a.host) for a in moves] == [("p0", "p1")], "where it belongs without its own process"


def test_a_move_whose_process_dies_falls_back_on_the_log_that_it_came_from() -> None:
    play = running(1, 2)
    play.register("w0")
    vacate(play, "p1")
    ready(play, "p1")
    actions = play.fall_silent("p0")
    (adopt,) = of_kind(actions, Adopt)
    assert (adopt.shard, adopt.host, adopt.incarnation, adopt.log) == (P1, P1, 3, "p1"), "it goes on itself"
    assert serves(play, "p1", "p1")[0] == Rehome(JOB, P1, 3, "p1 is back")
    assert [fence.member for fence in of_kind(actions, Fence)] == ["p0"]


# -- a process does not come back -------------------------------------------------------------------------------


def test_the_log_of_a_shard_that_does_not_come_back_is_read_by_another_process() -> None:
    play = running(1, 2)
    play.register("w0")
    play.fall_silent("p1")
    (adopt,) = run_out(play)
    assert isinstance(adopt, Adopt) and (adopt.shard, adopt.host, adopt.incarnation) == (P1, P0, 2)
    assert adopt.log == "p1"
    assert serves(play, "p1", "p0") == [Rehome(JOB, P1, 2, "p1 is back")]
    assert play.machine.served_by(JOB, "p0") == [(P0, Home(P0, 1, "p0")), (P1, Home(P0, 2, "p1"))]
    assert pairs(play.join("shard", "again", "p1")) == [("p1", "p1", 2)], "where it belongs"


def test_a_log_that_cannot_be_read_by_another_ends_the_job() -> None:
    play = running(1, 2)
    play.register("w0")
    play.fall_silent("p1")
    run_out(play)
    assert play.tell(NotPromoted(JOB, P1, 1, "another adoption is meant")) == []
    actions = play.tell(NotPromoted(JOB, P1, 2, "p0 cannot read its log"))
    because = (
        "p1 was lost: silent for 1.0 s; it did not come back in time; p0 cannot read its log, "
        "and nobody else can read the log"
    )
    assert {stop.because for stop in of_kind(actions, Stop)} == {because}


def test_everybody_who_may_see_a_log_is_asked_before_the_job_is_given_up() -> None:
    play = running(1, 3)
    play.register("w0")
    play.fall_silent("p1")
    assert [adopt.host for adopt in of_kind(run_out(play), Adopt)] == ["p2"]
    (adopt,) = play.tell(NotPromoted(JOB, P1, 2, "p2 cannot read its log"))
    assert isinstance(adopt, Adopt) and (adopt.host, adopt.incarnation) == (P0, 3)
    assert serves(play, "p1", "p0")[0] == Rehome(JOB, P1, 3, "p1 is back")


def test_a_log_that_is_not_read_in_time_is_given_to_the_next() -> None:
    play = running(1, 3)
    play.register("w0")
    play.fall_silent("p1")
    assert [adopt.host for adopt in of_kind(run_out(play), Adopt)] == ["p2"]
    assert [adopt.host for adopt in of_kind(run_out(play), Adopt)] == ["p0"]
    actions = run_out(play)
    assert of_kind(actions, Stop), "there is nobody else"


def test_a_process_that_comes_back_while_its_log_is_given_to_another_has_nothing_to_serve() -> None:
    play = running(1, 2)
    play.register("w0")
    play.fall_silent("p1")
    run_out(play)
    play.join("shard", "again", "p1")
    assert play.machine.served_by(JOB, "p1") == []
    (adopt,) = play.tell(NotPromoted(JOB, P1, 2, "p0 cannot read its log"))
    assert isinstance(adopt, Adopt) and (adopt.host, adopt.log) == (P1, "p1"), "then it reads it itself"


def test_whoever_reads_the_log_of_another_and_dies_is_followed_by_the_next() -> None:
    play = running(1, 3)
    play.register("w0")
    play.fall_silent("p1")
    assert [adopt.host for adopt in of_kind(run_out(play), Adopt)] == ["p2"]
    play.fall_silent("p2")
    assert {(a.shard, a.host) for a in of_kind(run_out(play), Adopt)} == {("p1", "p0"), ("p2", "p0")}
    serves(play, "p1", "p0")
    serves(play, "p2", "p0")
    play.fall_silent("p0")
    assert of_kind(run_out(play), Stop) or of_kind(run_out(play), Finish), "nobody is left"


class Ring(RuleBasedStateMachine):
    """Three shards with backups; processes die, leave and come back, copies are made and lost, promotions fail, logs
    are read by others.

    What each copy has is modelled as the number of things that were acknowledged when it was in step. Nothing that
    was acknowledged may be missing wherever a shard serves.
    """

    replicas = 1
    patience = Rules(lease_s=1.0, return_s=3.0, promote_s=4.0)

    def __init__(self) -> None:
        super().__init__()
        self.play = running(1, 3, self.patience, replicas=self.replicas)
        self.acknowledged = dict.fromkeys((P0, P1, P2), 0)
        self.has: dict[str, int] = {"p0": 0, "p1": 0, "p2": 0}  # by the name of a log: what is in it
        self.copies: dict[tuple[ShardId, int], int] = {}  # (shard, home) -> newest copy
        self.in_step: dict[
            ShardId, tuple[str, int, str, int]
        ] = {}  # as the home sees it: log, copy, host, its life
        self.processes = 0

    @property
    def runs(self) -> bool:
        """It ends where nobody serves a shard in time."""
        return self.play.state() == "RUNNING"

    def home(self, shard: ShardId) -> Home | None:
        """Where it serves; None while nobody does."""
        if not self.runs:
            return None
        job = self.play.machine.jobs[JOB]
        return None if shard in job.away else job.homes[shard]

    @rule(shard=st.sampled_from((P0, P1, P2)))
    def acknowledges(self, shard: ShardId) -> None:
        if (home := self.home(shard)) is None:
            return
        in_step = self.in_step.get(shard)
        if in_step is not None:
            _, _, host, life = in_step
            if host not in self.play.alive() or self.play.incarnation(host) != life:
                return  # its backup does not answer: it may say nothing before the coordinator knows
            self.has[in_step[0]] += 1
        self.acknowledged[shard] += 1
        self.has[home.log] += 1

    @rule(shard=st.sampled_from((P0, P1, P2)))
    def is_copied(self, shard: ShardId) -> None:
        home = self.home(shard)
        if home is None or shard in self.in_step:
            return
        told = self.play.machine.jobs[JOB].copying.get(shard)
        if told is None:
            return
        host = told.host
        copy = self.copies[shard, home.incarnation] = self.copies.get((shard, home.incarnation), 0) + 1
        log = copy_name(shard, home.incarnation, copy)
        assert log not in self.has, "two histories under one name"
        self.has[log] = self.has[home.log]
        self.in_step[shard] = (log, copy, host, self.play.incarnation(host))
        ready(self.play, shard, copy, host=str(host))

    @rule(shard=st.sampled_from((P0, P1, P2)))
    def gives_its_backup_up(self, shard: ShardId) -> None:
        if self.home(shard) is not None and shard in self.in_step:
            _, copy, _, _ = self.in_step.pop(shard)
            lost(self.play, shard, copy)

    @rule(member=st.sampled_from(("p0", "p1", "p2")))
    def dies(self, member: str) -> None:
        if member in self.play.alive() and self.runs:
            self.forget(member)
            self.play.fall_silent(member)

    def forget(self, member: str) -> None:
        for shard, home in self.play.machine.jobs[JOB].homes.items():
            if home.host == member:
                self.in_step.pop(shard, None)

    @rule(member=st.sampled_from(("p0", "p1", "p2")), gone=st.booleans())
    def leaves(self, member: str, gone: bool) -> None:
        """When it may, or when it has no more time."""
        if member in self.play.alive() and self.runs:
            vacate(self.play, member)
            if gone or not self.play.machine.needed_in(JOB, member):
                self.forget(member)
                self.play.tell(Left(JOB, member, self.play.incarnation(member), "SIGTERM"))

    @precondition(lambda self: self.runs and self.play.machine.jobs[JOB].away)
    @rule()
    def nobody_comes_back_in_time(self) -> None:
        job = self.play.machine.jobs[JOB]
        if any(process not in job.off for process in job.members.alive("shard")):
            run_out(self.play, self.patience.return_s + self.patience.promote_s)

    @rule(member=st.sampled_from(("p0", "p1", "p2")))
    def comes_back(self, member: str) -> None:
        if member not in self.play.alive() and self.runs:
            self.processes += 1
            self.play.join("shard", f"process {self.processes}", member)

    @rule(shard=st.sampled_from((P0, P1, P2)), refused=st.sampled_from([False, False, False, True]))
    def serves_again(self, shard: ShardId, refused: bool) -> None:
        """A promoted backup, or a process that has read its log, says so."""
        if not self.runs:
            return
        job = self.play.machine.jobs[JOB]
        home = job.promoting.get(shard) or job.homes[shard]
        if shard not in job.away or home.host not in self.play.alive():
            return
        if refused and shard in job.promoting:
            self.in_step.pop(shard, None)
            self.play.tell(NotPromoted(JOB, shard, home.incarnation, "no room"))
        elif shard in job.promoting or (shard, home) in self.play.machine.served_by(JOB, home.host):
            self.play.tell(Returned(JOB, home.host, self.play.incarnation(home.host), "", shard))
            self.in_step.pop(shard, None)

    @precondition(lambda self: self.runs)
    @rule()
    def time_passes(self) -> None:
        self.play.now += 0.3
        self.play.hear(*self.play.alive())
        self.play.tell(Ticked(JOB))

    @invariant()
    def nothing_that_was_acknowledged_is_missing_where_a_shard_serves(self) -> None:
        for shard in (P0, P1, P2):
            if (home := self.home(shard)) is not None:
                assert self.has[home.log] >= self.acknowledged[shard], (shard, home)


Ring.TestCase.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
TestRing = Ring.TestCase


class BareRing(Ring):
    """Without backups: what leaves is copied first, and what dies is in its log alone."""

    replicas = 0


BareRing.TestCase.settings = Ring.TestCase.settings
TestBareRing = BareRing.TestCase


def test_a_job_that_ends_over_one_shard_does_not_look_for_the_others_on_their_way() -> None:
    """All three were on their way to a process that dies, and for the first of them there is nobody else."""
    state = Ring()
    state.dies(member="p2")
    state.nobody_comes_back_in_time()
    state.comes_back(member="p0")
    state.nobody_comes_back_in_time()
    state.comes_back(member="p2")
    state.dies(member="p0")
    state.dies(member="p1")
    state.nobody_comes_back_in_time()
    state.nobody_comes_back_in_time()
    state.comes_back(member="p0")
    state.time_passes()
    state.nobody_comes_back_in_time()
    state.nobody_comes_back_in_time()
    state.time_passes()
    state.nobody_comes_back_in_time()
    on_their_way = state.play.machine.jobs[JOB].promoting
    assert len(on_their_way) > 1 and {home.host for home in on_their_way.values()} == {P0}
    state.dies(member="p0")
    assert state.play.state() != "RUNNING" and not state.play.machine.jobs[JOB].away
