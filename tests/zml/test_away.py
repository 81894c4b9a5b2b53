"""A node knows whether it sees the coordinator's folder, and keeps what it writes itself for a day."""

import os
from pathlib import Path

from zml.cluster.away import KEPT_S, Away, mark_of


def test_a_mark_is_made_once_and_tells_folders_of_one_name_apart(tmp_path: Path) -> None:
    mark = mark_of(tmp_path / "cluster")
    assert mark == mark_of(tmp_path / "cluster") and Path(mark).is_dir()
    assert Path(mark).name != Path(mark_of(tmp_path / "other")).name


def test_whoever_sees_the_mark_writes_into_the_run_directory_itself(tmp_path: Path) -> None:
    mark = mark_of(tmp_path / "cluster")
    there = tmp_path / "cluster" / "jobs" / "j1" / "2"  # it is still to be made
    sees = Away(tmp_path / "runs", "n1", shared=True)
    assert sees.run_dir("j1.2", str(there), mark) == there
    assert not (tmp_path / "runs").exists()


def test_who_does_not_see_it_or_is_not_to_has_a_folder_of_its_own(tmp_path: Path) -> None:
    mark = mark_of(tmp_path / "cluster")
    there = tmp_path / "cluster" / "jobs" / "j1" / "2"
    there.mkdir(parents=True)  # a path of that name says nothing
    elsewhere = str(tmp_path / "cluster" / "marks" / "0123456789abcdef")
    for shared, what in ((True, elsewhere), (False, mark)):
        away = Away(tmp_path / "runs", "n1", shared=shared)
        mine = away.run_dir("j1.2", str(there), what)
        assert mine == tmp_path / "runs" / "away" / Path(what).name / "n1" / "jobs" / "j1" / "2"
        assert (mine / "logs").is_dir()
        away.close()


def test_what_lies_there_goes_a_day_after_its_last_process(tmp_path: Path) -> None:
    mark = str(tmp_path / "marks" / "0123456789abcdef")
    mine, other, dead = (Away(tmp_path / "runs", name, shared=True) for name in ("n1", "n2", "n3"))
    paths = {
        (away.node, attempt): away.run_dir(attempt, "/no/such", mark)
        for away in (mine, other, dead)
        for attempt in ("j1.1", "j1.2", "j2.1")
    }
    dead.close()
    now = paths["n1", "j1.1"].stat().st_mtime + KEPT_S + 60
    os.utime(paths["n1", "j2.1"], (now, now))
    mine.tidy({paths["n1", "j1.1"]}, now)
    left = {key for key, path in paths.items() if path.exists()}
    of_others = {("n2", attempt) for attempt in ("j1.1", "j1.2", "j2.1")}
    assert left == of_others | {("n1", "j1.1"), ("n1", "j2.1")}, "busy, young, or a living node's"
    mine.close()
    other.close()
