"""`zml top`: what a key does, how fast members are, what is said of them, and the picture, line by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.zml.watched import NOON, STEP_S, USUAL, job, of_shard, of_worker
from zml.cluster.jobs import JobView, NodeView
from zml.commands import cli
from zml.figures import ShardFigures, WorkerFigures
from zml.messages import Failure
from zml.runs import finding, history, rundir
from zml.status import JobStatus, MemberFailure, MemberStatus, encode
from zml.top.keys import decode
from zml.top.known import ROWS, Known, Past, Seen
from zml.top.paces import Trails
from zml.top.picture import Body, body, frame, plain, room
from zml.top.screen import CLUSTER_VIEWS, RUN_VIEWS, Rows, Screen, Sort, press, settled
from zml.top.table import Column, ordered, widths
from zml.top.trouble import sentences, slow
from zml.top.watching import speaks_unicode

NAMES = Rows(names=["w0", "w1", "w2", "w3"], lines=4, columns=["worker", "step"], page=2)


def known(*statuses: JobStatus, **seen: Any) -> Known:
    found = Known()
    for status in statuses:
        found.take(Seen(status=status, at=status.at, **seen))
    return found


def pressed(keys: str | list[str], screen: Screen | None = None, rows: Rows = NAMES, **more: bool) -> Screen:
    screen = screen or Screen(view="workers", chosen="w0")
    for key in keys:
        screen = settled(press(screen, key, rows, **more), rows)
    return screen


def test_steps_go_on_from_where_the_run_before_was() -> None:
    found = known(job(50.0, 64, steps_before=1000))
    text = "\n".join(line.plain for line in plain(found, 100))
    assert found.status is not None and found.said is not None
    assert found.status.steps == found.said.steps + 1000 and f"step {found.status.steps:,}" in text
    assert found.as_json()["status"]["steps"] == found.said.steps  # type: ignore[index]


# -- keys ----------------------------------------------------------------------------------------------------


def test_keys_have_names() -> None:
    assert decode(b"qJ\x1b[A\x1bOB\x1b[5~\t\x1b[Z\r\x7f\xc3\xa9\x1b", final=True) == (
        ["q", "J", "up", "down", "pageup", "tab", "backtab", "enter", "backspace", "é", "esc"],
        b"",
    )
    assert decode(b"\x1b[1;5Cx\x1b[200~", final=True) == (["x"], b"")  # sequences that mean nothing here
    assert decode(b"\x1b\x1b[A", final=True) == (["esc", "up"], b"")
    assert decode(b"a\xff\x00b", final=True) == (["a", "b"], b"")


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(["q", "up", "pagedown", "backtab", "é", "漢", "enter"]), max_size=8), st.data()
)
def test_keys_may_come_in_pieces(keys: list[str], data: st.DataObject) -> None:
    raw = {"up": b"\x1b[A", "pagedown": b"\x1b[6~", "backtab": b"\x1b[Z", "enter": b"\r"}
    sent = b"".join(raw.get(key, key.encode()) for key in keys)
    cut = data.draw(st.integers(0, len(sent)))
    first, rest = decode(sent[:cut], final=False)
    then, left = decode(rest + sent[cut:], final=True)
    assert (first + then, left) == (keys, b"")


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_whatever_comes_is_taken_to_its_end(sent: bytes) -> None:
    keys, rest = decode(sent, final=True)
    assert rest == b"" and len(keys) <= len(sent)
    assert all(len(key) > 1 or key.isprintable() for key in keys)


# -- screen --------------------------------------------------------------------------------------------------


def test_tab_and_numbers_switch_views() -> None:
    assert [pressed(["tab"] * count, Screen()).view for count in range(5)] == [*RUN_VIEWS, "overview"]
    assert pressed(["backtab"], Screen()).view == "events"
    assert pressed("3").view == "shards" and pressed("9").view == "workers"
    cluster = Screen(CLUSTER_VIEWS, "jobs")
    assert pressed("2", cluster).view == "nodes" and pressed("3", cluster).view == "jobs"


def test_the_cursor_moves_and_stays_in_sight() -> None:
    assert pressed("j").chosen == "w1" and pressed("jjk").chosen == "w1" and pressed("k").chosen == "w0"
    end = pressed("G")
    assert (end.chosen, end.first) == ("w3", 2)
    assert (pressed("g", end).chosen, pressed("g", end).first) == ("w0", 0)
    assert pressed(["pagedown"]).chosen == "w2" and pressed(["pagedown", "pagedown"]).chosen == "w3"


def test_the_cursor_stays_on_its_member_while_rows_change() -> None:
    screen = pressed("jj")
    moved = settled(screen, Rows(names=["w9", "w8", "w7", "w2"], lines=4, page=2))
    assert (moved.chosen, moved.first) == ("w2", 2)
    gone = settled(screen, Rows(names=["w0", "w1"], lines=2, page=2))
    assert (gone.chosen, gone.first) == ("w0", 0)
    assert settled(screen, Rows()).chosen == ""


def test_s_sorts_by_the_next_column_and_r_turns_it_round() -> None:
    assert pressed("s").sorts == {"workers": Sort("step", reverse=True)}
    assert pressed("sr").sorts == {"workers": Sort("step", reverse=False)}
    assert pressed("ss").sorts == {"workers": Sort("worker", reverse=False)}
    assert pressed("r").sorts == {"workers": Sort("worker", reverse=True)}


def test_a_filter_is_typed_and_dropped() -> None:
    typing = pressed("/wq1")
    assert typing.typing and typing.filter == "wq1" and not typing.quit
    kept = pressed(["backspace", "enter"], typing)
    assert (kept.typing, kept.filter) == (False, "wq")
    assert pressed("2", kept).filter == "wq"  # in every view
    assert pressed(["esc"], kept).filter == "" and pressed(["esc"], typing).filter == ""


def test_enter_shows_details_and_esc_leads_back() -> None:
    details = pressed(["j", "enter"])
    assert details.details and details.chosen == "w1"
    assert not pressed(["esc"], details).details
    assert pressed(["enter"], Screen(CLUSTER_VIEWS, "jobs", chosen="w2")).enter == "w2"
    assert not pressed(["enter"], Screen()).details  # the overview has no rows
    assert pressed(["esc"], inside=True).back and not pressed(["esc"]).back


def test_help_pause_and_quit() -> None:
    assert pressed("?").help and not pressed("??").help and pressed("?2") == pressed("2")
    assert pressed("p").paused and not pressed("pp").paused
    assert pressed("q").quit and pressed("?q").quit


KEYS = st.sampled_from(
    ["q", "j", "k", "up", "down", "pageup", "pagedown", "home", "end", "G", "g", " ", "tab", "backtab", "left",
     "right", "1", "2", "3", "4", "s", "r", "p", "/", "?", "enter", "esc", "backspace", "w", "1"]
)  # fmt: skip
RUN = known(job(59.0, 20), job(60.0, 20, odd={"w3": {"compute": 0.12}}))


@settings(deadline=None, max_examples=40)
@given(st.lists(KEYS, max_size=10), st.integers(20, 200), st.integers(5, 60), st.booleans())
def test_any_keys_on_any_terminal_give_a_picture_that_fits(
    keys: list[str], width: int, height: int, unicode: bool
) -> None:
    screen = Screen()
    for key in keys:
        shown = body(RUN, screen, width, room(height), unicode=unicode)
        screen = settled(screen, shown.rows)
        screen = press(screen, key, shown.rows)
        assert screen.view in RUN_VIEWS
    shown = body(RUN, screen, width, room(height), unicode=unicode)
    screen = settled(screen, shown.rows)
    lines = frame(RUN, screen, body(RUN, screen, width, room(height)), width, height, unicode=unicode)
    assert len(lines) == height and all(line.cell_len <= width for line in lines)
    if screen.chosen and not screen.scrolls and len(shown.fixed) < room(height):
        assert any(line.plain.startswith(("»", ">")) for line in lines), "the cursor is in sight"
    assert unicode or all(line.plain.isascii() for line in lines)


# -- paces ---------------------------------------------------------------------------------------------------


def test_a_pace_is_what_two_looks_differ_by() -> None:
    workers, shards = known(job(50.0), job(60.0)).paces()
    pace, shard = workers["w0"], shards["p0"]
    assert pace.steps == 50 and pace.step_s == pytest.approx(STEP_S)
    assert pace.own_s == pytest.approx(sum(USUAL.values()))
    assert pace.phases["compute"] == pytest.approx(0.06) and pace.samples_per_s == pytest.approx(320.0)
    assert (pace.staleness, pace.sent_per_s, pace.quiet_s) == (1.0, 50_000, 0.0)
    assert (shard.updates_per_s, shard.received_per_s, shard.sent_per_s) == (5.0, 100_000, 200_000)
    assert shard.apply_s == pytest.approx(0.002)
    assert (shard.saved_in, shard.saved_out) == pytest.approx((0.99, 0.98))


def test_of_one_look_it_is_the_mean_since_the_process_began() -> None:
    workers, shards = known(job(60.0)).paces()
    assert workers["w0"].steps == 300 and workers["w0"].samples_per_s == pytest.approx(320.0)
    assert workers["w0"].step_s == pytest.approx(STEP_S)
    assert shards["p0"].updates_per_s is None and shards["p0"].apply_s == pytest.approx(0.002)


def test_a_process_that_is_another_one_has_no_past() -> None:
    trails = Trails()
    trails.see(job(50.0))
    trails.see(job(60.0))
    anew = job(61.0)
    members = [msgspec.structs.replace(anew.members[0], incarnation=2, figures=of_worker(3, USUAL, STEP_S))]
    trails.see(msgspec.structs.replace(anew, members=members))
    pace = trails.worker("w0")
    assert pace is not None and pace.steps == 3
    assert trails.worker("w1") is None, "who is gone is forgotten"


def test_the_window_moves_and_the_quiet_are_noticed() -> None:
    trails = Trails()
    for second in range(1, 100):
        trails.see(job(float(second)))
    assert trails.workers["w0"].seen[0][0] == NOON + 84.0
    still = job(99.0)
    trails.see(msgspec.structs.replace(still, at=NOON + 130.0))
    pace = trails.worker("w0")
    assert pace is not None and pace.quiet_s == pytest.approx(31.0)


def test_the_past_of_a_run_directory_gives_a_pace_at_the_first_look() -> None:
    rows = [history.member_row(job(second)) for second in (50.0, 55.0)]
    past = Past([history.job_row(job(second)) for second in (50.0, 55.0)], rows)
    found = known(job(60.0), past=past)
    assert found.paces()[0]["w0"].steps == 50
    assert [row.steps for row in found.rows] == [250, 275, 300]
    assert found.values("loss") == pytest.approx([3.5, 3.45, 3.4])


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=30), st.lists(st.integers(0, 2), max_size=30))
def test_whatever_figures_come_no_pace_is_negative(counts: list[int], lives: list[int]) -> None:
    trails = Trails()
    for second, (steps, life) in enumerate(zip(counts, lives, strict=False)):
        worker, shard = WorkerFigures(steps=steps), ShardFigures(updates=steps)
        members = [
            MemberStatus(member="w0", role="worker", state="active", incarnation=life, figures=worker),
            MemberStatus(member="p0", role="shard", state="active", incarnation=life, shard=shard),
        ]
        trails.see(JobStatus(job="job", state="RUNNING", at=float(second), members=members))
        workers, shards = trails.paces()
        assert workers["w0"].steps >= 0 and (shards["p0"].updates_per_s or 0.0) >= 0.0


def test_the_past_that_is_kept_is_bounded_and_even() -> None:
    found = Known()
    for second in range(1, 3 * ROWS):
        found.take(Seen(status=JobStatus(job="job", state="RUNNING", at=float(second), steps=second)))
    gaps = [b.at - a.at for a, b in zip(found.rows, found.rows[1:-1], strict=False)]
    assert len(found.rows) <= ROWS + 2 and found.rows[-1].at == 3 * ROWS - 1
    assert set(gaps) == {4.0}


def test_older_news_do_not_replace_newer_ones() -> None:
    found = known(job(60.0), job(50.0))
    assert found.status is not None and found.status.at == NOON + 60.0
    found.take(Seen(trouble="away"))
    assert found.status is not None and found.seen.trouble == "away"


# -- what a person should look at ----------------------------------------------------------------------------


def test_a_straggler_is_who_takes_long_itself_and_not_who_waits() -> None:
    workers, _ = known(
        job(50.0, odd={"w2": {"compute": 0.15}}), job(60.0, odd={"w2": {"compute": 0.15}})
    ).paces()
    ((name, found),) = slow(workers).items()
    assert (name, found.phase) == ("w2", "compute") and found.ratio == pytest.approx(0.162 / 0.072)
    assert slow({"w0": workers["w2"]}) == {}, "nobody is slow alone"
    two = known(job(60.0, 2, odd={"w1": {"data": 0.1}})).paces()[0]
    assert list(slow(two)) == ["w1"]


def test_who_speaks_seldom_is_not_silent_before_it_was_to_speak() -> None:
    """As members of many jobs on one coordinator."""
    status = job(60.0)
    members = [msgspec.structs.replace(each, heard_s=12.0, every_s=8.0) for each in status.members]
    members[1] = msgspec.structs.replace(members[1], every_s=4.0)
    status = msgspec.structs.replace(status, members=members)
    said = [text for text, _ in sentences(status, known(status).paces()[0])]
    assert said == [f"worker {members[1].member} is silent for 0:12"]


def test_each_trouble_is_said_in_a_sentence() -> None:
    status = job(60.0, odd={"w0": {"data": 0.08}, "w1": {"compute": 0.18}}, values={"loss": None, "x": 1.0})
    members = list(status.members)
    assert members[3].figures is not None
    members[3] = msgspec.structs.replace(
        members[3], figures=msgspec.structs.replace(members[3].figures, left_out=2)
    )
    members[2] = msgspec.structs.replace(members[2], heard_s=5.0)
    members[5] = msgspec.structs.replace(members[5], state="lost", because="silent for 1.5 s")
    status = msgspec.structs.replace(status, members=members)
    said = [text for text, _ in sentences(status, known(status).paces()[0])]
    assert said == [
        "shard p1 is lost: silent for 1.5 s",
        "loss is not finite (NaN or infinite)",
        "2 steps were left out: their gradient was not finite",
        "worker w2 is silent for 0:05",
        "w0 is slow: 2.1 times what the others take, most of it in data",
        "w1 is slow: 2.7 times what the others take, most of it in compute",
    ]


def test_a_loader_that_starves_everybody_is_no_straggler() -> None:
    odd = {f"w{index}": {"data": 0.1} for index in range(4)}
    status = job(60.0, odd=odd)
    assert [text for text, _ in sentences(status, known(status).paces()[0])] == [
        "w0, w1, w2, w3 wait for data 50% of the time: more loader workers help"
    ]


def test_a_job_that_is_well_has_no_sentence() -> None:
    assert sentences(job(60.0), known(job(50.0), job(60.0)).paces()[0]) == []


# -- tables --------------------------------------------------------------------------------------------------


def test_the_least_columns_go_first_where_there_is_no_room() -> None:
    columns: list[Column[str]] = [
        Column("a", 5, 0, lambda row, width: row),
        Column("b", 10, 2, lambda row, width: row, most=20),
        Column("c", 5, 1, lambda row, width: row),
    ]
    assert widths(columns, 100) == {"a": 5, "b": 20, "c": 5}
    assert widths(columns, 25) == {"a": 5, "b": 13, "c": 5}
    assert widths(columns, 20) == {"a": 5, "c": 5}
    assert widths(columns, 3) == {"a": 5}


def test_rows_of_which_nothing_is_known_come_last_either_way() -> None:
    column: Column[float | None] = Column("x", 5, 0, lambda row, width: str(row), lambda row: row)
    assert ordered([2.0, None, 1.0], [column], Sort("x")) == [1.0, 2.0, None]
    assert ordered([2.0, None, 1.0], [column], Sort("x", reverse=True)) == [2.0, 1.0, None]


# -- pictures ------------------------------------------------------------------------------------------------


def screenful(found: Known, screen: Screen, width: int = 80, height: int = 24, **more: Any) -> list[str]:
    shown = body(found, screen, width, room(height), **more)
    screen = settled(screen, shown.rows)
    shown = body(found, screen, width, room(height), **more)
    return [line.plain.rstrip() for line in frame(found, screen, shown, width, height, **more)]


ODD = {"w1": {"data": 0.08}, "w2": {"compute": 0.15}}


def test_the_overview_of_a_running_job() -> None:
    found = known(job(50.0, odd=ODD), job(55.0, odd=ODD), job(60.0, odd=ODD))
    lines = screenful(found, Screen(), now=NOON + 60.0)
    assert lines[:16] == [
        "train.py · staleness 4 · 4 workers, 2 shards                       running  1:00",
        "[1 Overview] 2 Workers  3 Shards  4 Events",
        "epoch 2/5   ━━━━━━━━━━━━━───────────────────────────────────────  25 %  eta 1:10",
        "loss 3.4   accuracy 0.3   1,280 samples/s   step 300   staleness 1",
        "! w1 is slow: 2.1 times what the others take, most of it in data",
        "! w2 is slow: 2.2 times what the others take, most of it in compute",
        "loss        █▅▁  3.5 to 3.4",
        "accuracy    ▁▅█  0.25 to 0.3",
        "samples/s   ▅▅▅  1,280 to 1,280",
        "a step      dddddddcccccccccccccccccccccccccccceewwwwwwwwwwwwwwwwwwwwwwwwwwwwwaa",
        "            200 ms: data 11%  compute 41%  encode 2%  wait 43%  apply 3%",
        "workers     4 of 4 here",
        "shards      2 of 2 here",
        "data        160 of 640 batches applied, 4 with workers, 2 dealt again",
        "checkpoint  step 200, 0:20 ago",
        "",
    ]
    assert lines[16].endswith("generation 1: 4 workers: all are here") and lines[17].endswith("w0 joined")
    assert lines[18:] == [
        *[""] * 5,
        "q quit  tab views  j/k move  enter details  s sort  r reverse  / filter  p pause",
    ]


def test_workers_are_a_table_with_stragglers_in_words() -> None:
    found = known(job(50.0, odd=ODD), job(60.0, odd=ODD))
    lines = screenful(found, Screen(view="workers", chosen="w1"))
    assert lines[2:8] == [
        " d  data   c  compute   e  encode   w  wait   a  apply",
        " worker▲    step   a step  samples/s  stale where it goes",
        " w0          300   200 ms        320      0 cccccewwwwwwwwwwa",
        "»w1          300   200 ms        320      1 dddddddcccccwwwwa slow 2.1x, data",
        " w2          300   200 ms        320      0 cccccccccccccwwwa slow 2.2x, compute",
        " w3          300   200 ms        320      1 cccccewwwwwwwwwwa",
    ]


def test_a_wide_terminal_shows_more_columns() -> None:
    found = known(job(50.0), job(60.0))
    narrow, wide = (screenful(found, Screen(view="workers"), width)[3] for width in (80, 200))
    assert "memory" not in narrow and all(
        word in wide for word in ("memory", "gpu", "heard", "node", "device")
    )
    row = screenful(found, Screen(view="workers"), 200)[5]
    assert all(word in row for word in ("512 MB", "90% 8 GB", "0.1 s", "gpu00", "cuda:1"))


def test_sixty_four_workers_scroll() -> None:
    found = known(job(59.0, 64), job(60.0, 64))
    lines = screenful(found, Screen(view="workers", chosen="w63"))
    assert lines[22].startswith("»w63") and lines[23].endswith("46-64 of 64")
    assert lines[3].startswith(" worker▲"), "the head stays"


def test_a_filter_keeps_what_it_says_and_an_empty_view_says_why() -> None:
    found = known(job(60.0, 12))
    names = body(found, Screen(view="workers", filter="w1"), 80, 20).rows.names
    assert names == ["w1", "w10", "w11"]
    lines = screenful(found, Screen(view="workers", filter="nothing"))
    assert lines[4] == "nothing here has 'nothing' in it; esc drops the filter"


def test_workers_sort_by_their_own_time() -> None:
    found = known(job(50.0, odd=ODD), job(60.0, odd=ODD))
    screen = Screen(view="workers", sorts={"workers": Sort("own time", reverse=True)})
    assert list(body(found, screen, 80, 20).rows.names)[:2] == ["w2", "w1"]


def test_shards_show_what_compression_saved() -> None:
    lines = screenful(known(job(50.0), job(60.0)), Screen(view="shards"))
    assert lines[2:5] == [
        " shard▲  updates/s   apply  queue        in       out  saved in / out",
        "»p0            5.0 2.00 ms      3  100 kB/s  200 kB/s   99.0% / 98.0%",
        " p1            5.0 2.00 ms      3  100 kB/s  200 kB/s   99.0% / 98.0%",
    ]


def test_details_have_everything_of_a_member() -> None:
    found = known(job(50.0), job(60.0))
    worker = "\n".join(screenful(found, Screen(view="workers", chosen="w1", details=True), 80, 60))
    for said in (
        "worker w1 is active",
        "node           gpu00, process 1001",
        "GPU            90% busy, 8 GB used, of 80 GB",
        "learning rate  0.01",
        "sent           50 kB/s, 3 MB in all, 99.0% less than dense",
        "a step takes 200 ms (mean of 50)",
        "compute            60 ms  30%  ccccc",
        "beside it      push 10 ms, pull 4.00 ms",
        "up to 250 ms         300",
    ):
        assert said in worker
    shard = "\n".join(screenful(found, Screen(view="shards", chosen="p0", details=True), 80, 60))
    for said in ("3 MB in 12 chunks, version 300", "1 pulls wait, 2 pushes are staged", "1,200 taken"):
        assert said in shard
    gone = screenful(found, Screen(view="workers", chosen="w77", details=True))
    assert gone[2] == "w77 is not here any more"


def test_events_are_the_newest_first_with_what_scripts_raised() -> None:
    failure = MemberFailure(member="w1", failure=Failure(kind="ValueError", text="bad", at=NOON))
    lines = screenful(known(job(60.0, failures=[failure])), Screen(view="events"))
    assert lines[2] == "w1 raised ValueError: bad"
    assert lines[3].endswith("generation 1: 4 workers: all are here") and lines[4].endswith("w0 joined")


def test_where_the_picture_comes_from_is_said_where_it_is_not_the_coordinator() -> None:
    away = known(job(60.0), trouble="coordinator away: from its files")
    assert screenful(away, Screen())[1].endswith("coordinator away: from its files")
    assert screenful(known(job(60.0)), Screen(), now=NOON + 90.0)[1].endswith("as of 0:30 ago")
    assert screenful(away, Screen(paused=True))[1].endswith("paused, p goes on")
    assert screenful(Known(seen=Seen(trouble="nobody is there")), Screen())[2] == "nobody is there"


def test_nothing_that_a_peer_says_moves_the_cursor() -> None:
    evil = "\x1b[2J\x07\r\n"
    status = job(60.0, script=f"a{evil}.py", because=evil, state="DRAINING", values={f"loss{evil}": 1.0})
    members = [
        msgspec.structs.replace(m, node=evil, device=evil, because=evil, state="lost") for m in status.members
    ]
    status = msgspec.structs.replace(status, members=members)
    found = known(job(50.0), status)
    for view in RUN_VIEWS:
        for details in (False, True):
            lines = screenful(found, Screen(view=view, chosen="w0", details=details), 200, 60)
            assert all(line.isprintable() for line in lines)


JOBS = [
    JobView(id="j2", name="late", user="ann", state="QUEUED", why="", because="no GPU is free", submitted_at=NOON),
    JobView(
        id="j1", name="train", user="bob", state="RUNNING", why="", because="", submitted_at=NOON, began_at=NOON + 10,
        workers=3, workers_max=4, nodes=["n1"],
    ),
]  # fmt: skip
NODES = [NodeView(id="n1", state="UP", rack="r1", gpus=4, cpus=16, memory_mb=65536, gpus_free=1, cpus_free=13,
                  memory_mb_free=32768, jobs=["j1"])]  # fmt: skip


def test_a_cluster_is_its_jobs_and_nodes() -> None:
    found = known()
    found.take(Seen(jobs=JOBS, nodes=NODES, at=NOON + 70))
    jobs = screenful(found, Screen(CLUSTER_VIEWS, "jobs"), now=NOON + 70)
    assert jobs[0] == "2 jobs: 1 running, 1 queued · 1 node, 1 of 4 GPUs free"
    assert jobs[3].split() == ["»running", "j1", "train", "bob", "3", "of", "1..4", "1:00"]
    assert jobs[4].split()[:6] == ["queued", "j2", "late", "ann", "0", "of"] and "no GPU is" in jobs[4]
    nodes = screenful(found, Screen(CLUSTER_VIEWS, "nodes"), now=NOON + 70)
    assert nodes[3].split() == ["»n1", "up", "1/4", "13/16", "32/64", "0:00", "j1"]
    once = [line.plain for line in plain(found, 80, now=NOON + 70)]
    assert once[0] == jobs[0] and any("n1" in line and "1/4" in line for line in once)


def test_one_picture_for_files_has_everything_in_eighty_columns() -> None:
    lines = [line.plain for line in plain(known(job(50.0, 64), job(60.0, 64)), 80)]
    assert all(len(line) <= 80 and line == line.rstrip() and line.isprintable() for line in lines)
    assert sum(line.startswith(" w") and "320" in line for line in lines) == 64
    assert sum(line.startswith(" p") for line in lines) == 2
    assert all(line.plain.isascii() for line in plain(known(job(60.0)), 80, unicode=False))


@pytest.mark.parametrize(
    ("environment", "speaks"),
    [
        ({}, True),
        ({"LANG": "en_US.UTF-8"}, True),
        ({"LANG": "C"}, False),
        ({"LANG": "C", "LC_CTYPE": "C.UTF-8"}, False),  # Python itself has set it
        ({"LANG": "C", "LC_CTYPE": "en_US.UTF-8"}, True),
        ({"LC_ALL": "POSIX", "LANG": "en_US.UTF-8"}, False),
        ({"LC_ALL": "C.UTF-8", "LANG": "C"}, True),
    ],
)
def test_who_says_c_gets_ascii(environment: dict[str, str], speaks: bool) -> None:
    assert speaks_unicode(environment, "utf-8") is speaks
    assert not speaks_unicode(environment, "ascii")


# -- the command ---------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose coordinator is away."""
    folder = tmp_path / "2026-run"
    folder.mkdir()
    (folder / rundir.CONFIG).write_text("{}")
    rows = history.Rows(folder / history.JOB, history.Row, 100)
    members = history.Rows(folder / history.MEMBERS, history.MemberRow, 100)
    for second in (50.0, 55.0, 60.0):
        rows.add(history.job_row(job(second)))
        members.add(history.member_row(job(second)))
    (folder / rundir.NOW).write_bytes(encode(job(60.0)))
    return folder


def test_off_a_terminal_it_is_one_picture(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["top", str(run)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\r" not in said
    lines = said.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].startswith("train.py") and lines[1] == "coordinator away: from its files"
    assert any(line.startswith("loss        █▅▁") for line in lines)


def test_for_machines_it_is_the_status_and_the_paces(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["top", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"]["steps"] == 300 and found["trouble"] == "coordinator away: from its files"
    assert found["workers"]["w0"]["step_s"] == pytest.approx(STEP_S)
    assert found["shards"]["p1"]["updates_per_s"] == 5.0


def test_how_a_run_ended_is_told_from_its_directory(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended = job(70.0, state="FAILED", because="w1 raised ValueError")
    (run / rundir.STATUS).write_bytes(encode(ended))
    assert cli.run(["top", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-2:] == ["failed", "1:10"] and "w1 raised ValueError" in lines
    assert "away" not in lines[1]


def test_a_run_is_named_as_for_the_other_commands(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / rundir.CONFIG).write_text("{}")
    monkeypatch.setenv("ZML_RUNS", str(run.parent))
    for said in (run.name, run.name[:-1]):
        assert cli.run(["top", said, "--server", "http://127.0.0.1:9"]) == 0
        assert capsys.readouterr().out.startswith("train.py")


def test_where_there_is_nothing_the_error_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.run(["top", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert cli.run(["top", "--server", "http://127.0.0.1:9", "--once"]) == 4
    assert "no coordinator answers at http://127.0.0.1:9" in capsys.readouterr().err
    assert cli.run(["top", "j77", "--server", "http://127.0.0.1:9"]) == 2
    assert "there is no run j77, and no coordinator answers" in capsys.readouterr().err
    monkeypatch.setattr("zml.cluster.client.DEFAULT_SERVER", "http://127.0.0.1:9")
    assert cli.run(["top", "j77"]) == 2
    assert capsys.readouterr().err == f"error: there is no run j77 [ZML-E101]\n  {finding.LIST}\n"


def test_a_shard_alone_is_no_reason_to_divide_by_nothing() -> None:
    empty = of_shard(0)
    members = [MemberStatus(member="p0", role="shard", state="active", shard=empty)]
    found = known(JobStatus(job="job", state="FORMING", at=NOON, members=members))
    assert isinstance(body(found, Screen(view="shards"), 80, 20), Body)
    assert plain(found, 80)[0].plain.startswith("job ·")
