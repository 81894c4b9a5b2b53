"""Trackers: what they are told, that none can hurt a run, and that TensorBoard reads what is written for it."""

from __future__ import annotations

import errno
import json
import math
import struct
import sys
import threading
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.zml.watched import job
from zml.cluster.jobfile import sound
from zml.cluster.jobs import Submission
from zml.config import as_environment, resolve
from zml.errors import ZmlError
from zml.status import CheckpointStatus, JobStatus
from zml.trackers import RunInfo, Tracker, event_file, feeding, naming
from zml.trackers.feeding import Feeds, run_info
from zml.trackers.tensorboard import Cadence, TensorBoard
from zml.trackers.tensorboard import settings as as_markdown
from zml.trackers.values import KEPT, Axis, numbers, steps

tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
PATIENCE_S = 10.0


class Seen(Tracker):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def begin(self, run: RunInfo) -> None:
        self.told.append(("begin", run.name))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.told.append((step, values["loss"]))

    def end(self, status: str) -> None:
        self.told.append(("end", status))


@pytest.fixture
def run(tmp_path: Path) -> RunInfo:
    folder = tmp_path / "2026-run-1a2b"
    folder.mkdir()
    about = {"script": "train.py", "args": ["--lr", "0.1|x"], "settings": {"workers": 4, "compress": "none"}}
    (folder / "config.json").write_text(json.dumps(about))
    return run_info(folder, 0)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What is logged about trackers."""
    lines: list[tuple[str, dict[str, Any]]] = []
    log = types.SimpleNamespace(warning=lambda what, **more: lines.append((what, more)))
    monkeypatch.setattr(feeding, "log", log)
    return lines


def fed(run: RunInfo, *trackers: Tracker) -> Feeds:
    return Feeds([(type(tracker).__name__, tracker) for tracker in trackers], run)


def after(seconds: float, loss: float | None, **changes: Any) -> JobStatus:
    return job(seconds, values={"loss": loss}, **changes)


# -- values --------------------------------------------------------------------------------------------------


def test_a_status_is_told_as_numbers_by_name() -> None:
    told = numbers(job(60.0, values={"loss": 2.5, "accuracy": None}))
    assert math.isnan(told.pop("accuracy"))
    assert told == pytest.approx({
        "loss": 2.5,
        "zml/epoch": 1.25,
        "zml/samples": 76_800,
        "zml/samples_per_s": 1280,
        "zml/staleness": 1,
        "zml/workers": 4,
        "zml/shards": 2,
        "zml/batches_dealt_again": 2,
        "zml/learning_rate": 0.01,
        "zml/phase_data_s": 0.002,
        "zml/phase_compute_s": 0.06,
        "zml/phase_encode_s": 0.004,
        "zml/phase_wait_s": 0.128,
        "zml/phase_apply_s": 0.006,
        "zml/left_out_steps": 0,
        "zml/sent_bytes": 12_000_000,
        "zml/received_bytes": 24_000_000,
    })  # fmt: skip


def test_what_was_counted_does_not_fall_where_a_worker_goes() -> None:
    whole = job(60.0)
    gone = msgspec.structs.replace(whole.members[0], state="gone")
    less = msgspec.structs.replace(whole, members=[gone, *whole.members[1:]])
    fell = {name for name, value in numbers(less).items() if value != numbers(whole)[name]}
    assert fell == {"zml/workers"}


def test_when_nobody_is_active_any_more_the_steps_are_those_that_were_made() -> None:
    assert steps(job(60.0, steps=0)) == 300
    assert steps(JobStatus(job="job", state="FORMING")) == 0


@settings(deadline=None)
@given(st.lists(st.integers(-1, 1000), max_size=300))
def test_the_checkpoints_that_are_remembered_are_the_newest(numbers: list[int]) -> None:
    axis = Axis()
    for step, number in enumerate(numbers):
        axis.advance(step)
        axis.checkpointed(number)
    told = [number for number in numbers if number >= 0]
    assert len(axis.checkpoints) <= KEPT and (not told or told[-1] in axis.checkpoints)
    assert all(numbers[step] == number for number, step in axis.checkpoints.items())


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(0, 10**9))
def test_the_axis_begins_where_the_runs_before_ended_and_never_falls(counts: list[int], before: int) -> None:
    axis, last = Axis(step=before), before
    for count in counts:
        fell = count < axis.seen
        step = axis.advance(count)
        assert step >= last and (step == last if fell else True)
        last = step
    assert last == before + sum(max(0, b - a) for a, b in zip([0, *counts], counts, strict=False))


# -- feeding -------------------------------------------------------------------------------------------------


def test_a_tracker_is_told_each_step_once_and_the_end(run: RunInfo) -> None:
    seen = Seen()
    feeds = fed(run, seen)
    for status in (after(0.0, None), after(10.0, 3.0), after(10.0, 3.0), after(20.0, 2.0), after(20.0, 1.9)):
        feeds.follow(status)
    feeds.follow(after(20.0, 1.9, state="SUCCEEDED", steps=0))
    feeds.stop()
    feeds.stop()
    assert seen.told == [("begin", "2026-run-1a2b"), (50, 3.0), (100, 2.0), (100, 1.9), ("end", "SUCCEEDED")]


def test_a_coordinator_that_is_started_again_goes_on_with_the_axis(run: RunInfo) -> None:
    first, second = Seen(), Seen()
    feeds = fed(run, first)
    feeds.follow(after(10.0, 3.0))
    feeds.stop()
    again = run_info(run.folder, 0)
    assert (run.again, again.again) == (False, True) and run.key == again.key
    feeds = fed(again, second)
    feeds.follow(after(12.0, 2.9))
    feeds.follow(after(2.0, 2.9))  # all scripts were started again
    feeds.follow(after(4.0, 2.8))
    feeds.stop()
    assert [step for step, _ in second.told[1:-1]] == [60, 70]


def test_a_resumed_run_goes_on_where_the_one_before_had_its_checkpoint(run: RunInfo) -> None:
    feeds = fed(run, Seen())
    feeds.follow(after(10.0, 3.0, checkpoint=CheckpointStatus(path="x", step=150)))
    feeds.follow(after(20.0, 3.0, checkpoint=CheckpointStatus(path="x", step=300)))
    feeds.follow(after(30.0, 3.0, checkpoint=CheckpointStatus(path="x", step=300)))
    feeds.stop()
    folder = run.folder / "checkpoints"
    assert feeding.first_step(str(folder / "step-150"), 150) == 50
    assert feeding.first_step(str(folder / "step-300"), 300) == 100
    assert feeding.first_step(str(folder / "step-300-copied"), 299) == 299
    assert feeding.first_step("/elsewhere/step-7", 7) == 7 and feeding.first_step("", 0) == 0

    (other := run.folder.parent / "resumed").mkdir()
    third = Seen()
    feeds = fed(run_info(other, 1000), third)
    feeds.follow(after(10.0, 2.0))
    feeds.stop()
    assert third.told[1] == (1050, 2.0)


def test_a_slow_tracker_is_told_less_and_nothing_waits_for_it(
    run: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeding, "QUEUE", 3)
    begun, go = threading.Event(), threading.Event()

    class Slow(Seen):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            begun.set()
            assert go.wait(PATIENCE_S)
            super().log(step, values)

    slow, quick = Slow(), Seen()
    feeds = fed(run, slow, quick)
    feeds.follow(after(1.0, 0.0))
    assert begun.wait(PATIENCE_S)
    for second in range(2, 10):
        feeds.follow(after(float(second), 0.0))
    go.set()
    feeds.stop()
    assert [step for step, _ in slow.told[1:-1]] == [5, 35, 40, 45]
    assert feeds.feeds[0].dropped == 5
    assert quick.told[-1] == ("end", "RUNNING") and quick.told[-2] == (45, 0.0)


@pytest.mark.parametrize("place", ["begin", "log", "end"])
def test_what_a_tracker_raises_is_its_last_word_and_hurts_nobody(
    run: RunInfo, place: str, said: list[tuple[str, dict[str, Any]]]
) -> None:
    def broken(*_: Any) -> None:
        raise SystemExit("no")

    bad, good = Seen(), Seen()
    setattr(bad, place, broken)
    feeds = fed(run, bad, good)
    for second in (1.0, 2.0):
        feeds.follow(after(second, 1.0))
    feeds.stop()
    assert feeds.feeds[0].failed and not feeds.feeds[1].failed
    assert good.told == [("begin", run.name), (5, 1.0), (10, 1.0), ("end", "RUNNING")]
    because = {"tracker": "Seen", "because": "SystemExit: no"}
    assert said == [("a tracker has failed and is told nothing more", because)]


def test_whoever_does_not_end_is_left_behind(run: RunInfo, said: list[tuple[str, dict[str, Any]]]) -> None:
    go = threading.Event()

    class Stuck(Seen):
        def end(self, status: str) -> None:
            go.wait(PATIENCE_S)

    feeds = fed(run, Stuck())
    feeds.stop(within_s=0.05)
    assert said == [("a tracker does not end, and is left behind", {"tracker": "Stuck", "waited_s": 0.05})]
    go.set()
    feeds.feeds[0].thread.join(PATIENCE_S)


# -- names ---------------------------------------------------------------------------------------------------


def test_names_come_from_file_flag_and_variable(tmp_path: Path) -> None:
    assert resolve({}, {}, "/dev/null").settings.trackers == ("tensorboard",)
    file = tmp_path / "zml.toml"
    file.write_text('trackers = ["tensorboard", "my.module:Class"]\n')
    found = resolve({}, {}, file)
    assert found.settings.trackers == ("tensorboard", "my.module:Class")
    assert resolve({}, as_environment(found.settings), "/dev/null").settings == found.settings
    none = resolve({"trackers": ("none",)}, {}, file).settings
    assert none.trackers == ()
    assert resolve({}, as_environment(none), file).settings.trackers == ()


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("tensorbord", "Did you mean tensorboard?"),
        ("os.system", "Choose tensorboard, wandb, mlflow, none or pack"),
    ],
)
def test_a_name_that_is_none_is_refused_with_what_was_meant(name: str, fix: str) -> None:
    with pytest.raises(ZmlError) as caught:
        resolve({"trackers": (name,)}, {}, "/dev/null")
    assert caught.value.what == f"--trackers: there is no tracker {name!r}" and caught.value.fix.startswith(
        fix
    )


def test_a_submitted_job_cannot_make_the_coordinator_of_all_load_code() -> None:
    asked = Submission(script="train.py", folder="/code", settings={"trackers": ["evil:Tracker"]})
    with pytest.raises(ZmlError, match="trackers are not a job's to choose"):
        sound(asked)


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stranger's module."""
    module = types.ModuleType("a_strangers_module")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module


def test_a_tracker_of_a_strangers_is_made_by_its_path(foreign: Any) -> None:
    foreign.Own = Seen
    ((name, made),) = naming.make(["a_strangers_module:Own"])
    assert name == "a_strangers_module:Own" and isinstance(made, Seen)


def test_a_tracker_that_cannot_be_had_is_an_error_at_the_start(foreign: Any) -> None:
    def raises() -> None:
        raise OSError("no such device")

    foreign.Raises, foreign.Nothing = raises, dict
    for path, what in (
        ("a_strangers_module:Missing", "AttributeError"),
        ("a_strangers_module:Raises", "OSError: no such device"),
        ("a_strangers_module:Nothing", "has no method begin"),
        ("no_such_module_anywhere:Tracker", "ModuleNotFoundError"),
    ):
        with pytest.raises(ZmlError) as caught:
            naming.make([path])
        assert caught.value.code == "ZML-E131" and what in caught.value.what and caught.value.fix


def test_a_package_that_is_not_installed_is_named_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(naming.NEEDS, "wandb", "no_such_package_anywhere")
    with pytest.raises(ZmlError) as caught:
        naming.make(["wandb"])
    assert "needs the package no_such_package_anywhere" in caught.value.what
    assert "pip install no_such_package_anywhere" in caught.value.fix


# -- TensorBoard ---------------------------------------------------------------------------------------------


def test_checksums_are_those_of_the_standard() -> None:
    # RFC 3720, appendix B.4.
    assert event_file.crc32c(bytes(32)) == 0x8A9136AA
    assert event_file.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert event_file.crc32c(bytes(range(32))) == 0x46DD794E
    assert event_file.crc32c(b"123456789") == 0xE3069283


names = st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable())
values = st.dictionaries(names, st.floats(), max_size=8)


@settings(deadline=None)
@given(st.integers(0, 2**62), values, st.floats(0, 2e9))
def test_what_is_written_is_read_by_protobuf(step: int, said: dict[str, float], at: float) -> None:
    from tensorboard.compat.proto.event_pb2 import Event

    raw = event_file.scalars(at, step, said)
    (length,) = struct.unpack("<Q", raw[:8])
    assert raw[8:12] == event_file.masked(raw[:8]) and raw[-4:] == event_file.masked(raw[12:-4])
    read = Event.FromString(raw[12:-4])
    assert len(raw) == 16 + length and (read.step, read.wall_time) == (step, at)
    told = {value.tag: value.simple_value for value in read.summary.value}
    assert told.keys() == said.keys()
    for name, value in said.items():
        rounded = struct.unpack("<f", event_file.single(1, value)[1:])[0]
        assert told[name] == rounded or (math.isnan(told[name]) and math.isnan(value))


def test_a_run_is_read_by_tensorboard_itself(run: RunInfo) -> None:
    feeds = fed(run, TensorBoard())
    for second, loss in ((2.0, 3.5), (4.0, None), (6.0, 2.5)):
        feeds.follow(after(second, loss))
    feeds.stop()
    feeds = fed(run_info(run.folder, 0), TensorBoard())  # the coordinator is another process by now
    feeds.follow(after(8.0, 2.0))
    feeds.follow(after(8.0, 2.0, state="SUCCEEDED"))
    feeds.stop()
    assert [feed.failed for feed in feeds.feeds] == [False]

    read = tensorboard.EventAccumulator(str(run.folder / "tensorboard"))
    read.Reload()
    losses = [(each.step, each.value) for each in read.Scalars("loss")]
    assert [step for step, _ in losses] == [10, 20, 30, 40]
    assert [value for _, value in losses if not math.isnan(value)] == [3.5, 2.5, 2.0] and math.isnan(
        losses[1][1]
    )
    assert [each.value for each in read.Scalars("zml/workers")] == [4.0] * 4
    (text,) = read.Tensors("settings")
    assert text.tensor_proto.string_val == [as_markdown(run).encode()]
    assert read.SummaryMetadata("settings").plugin_data.plugin_name == "text"


def test_settings_are_a_table_that_nothing_breaks_out_of(run: RunInfo) -> None:
    assert as_markdown(run).splitlines() == [
        "| setting | value |",
        "|---|---|",
        "| script | `train.py --lr '0.1\\|x'` |",
        "| `workers` | `4` |",
        "| `compress` | `none` |",
    ]


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(0, 20_000))
def test_a_long_run_is_written_ever_more_rarely(evenly: int, count: int) -> None:
    cadence = Cadence(evenly)
    kept = sum(cadence.keeps() for _ in range(count))
    assert kept <= evenly * (1 + math.log2(count / evenly + 1))
    assert kept >= min(count, evenly)


def test_the_last_values_are_written_whatever_was_left_out(run: RunInfo) -> None:
    tracker = TensorBoard()
    tracker.cadence = Cadence(2)
    tracker.begin(run)
    for step in range(1, 9):
        tracker.log(step, {"loss": float(step)})
    tracker.end("SUCCEEDED")
    read = tensorboard.EventAccumulator(str(run.folder / "tensorboard"))
    read.Reload()
    assert [each.step for each in read.Scalars("loss")] == [1, 2, 4, 6, 8]


class Full:
    """A file on a disk that has room for so many bytes more, and may refuse to be cut."""

    def __init__(self, file: Any, room: int, cuts: bool = True) -> None:
        self.file, self.room, self.cuts = file, room, cuts

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken: int = self.file.write(data[: self.room])
        self.room -= taken
        return taken

    def truncate(self, size: int) -> None:
        if not self.cuts:
            raise OSError(errno.EIO, "Input/output error")
        self.file.truncate(size)

    def close(self) -> None:
        self.file.close()
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("cuts", [True, False])
@pytest.mark.parametrize("room", [0, 1, 30])
def test_a_full_disk_leaves_a_whole_file_and_the_newest_values_follow(
    run: RunInfo, room: int, cuts: bool
) -> None:
    tracker: Any = TensorBoard()
    tracker.begin(run)
    tracker.log(1, {"loss": 1.0})
    real, (path,) = tracker.file, (run.folder / "tensorboard").iterdir()
    whole = path.read_bytes()
    tracker.file = Full(real, room, cuts)
    for step in (2, 3):
        tracker.log(step, {"loss": float(step)})
    assert not cuts or path.read_bytes() == whole
    tracker.file = Full(real, 10**6)  # somebody has made room
    tracker.log(4, {"loss": 4.0})
    tracker.log(5, {"loss": 5.0})
    tracker.file = Full(real, 0)
    tracker.log(6, {"loss": 6.0})
    tracker.end("SUCCEEDED")
    read = tensorboard.EventAccumulator(str(run.folder / "tensorboard"))
    read.Reload()
    assert [(each.step, each.value) for each in read.Scalars("loss")] == [(1, 1.0), (4, 4.0), (5, 5.0)]


def test_values_that_found_no_room_are_the_last_ones_where_none_come_after(run: RunInfo) -> None:
    tracker: Any = TensorBoard()
    tracker.begin(run)
    real = tracker.file
    tracker.file = Full(real, 30)
    tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"loss": 2.0})
    tracker.file = Full(real, 10**6)
    tracker.end("SUCCEEDED")
    read = tensorboard.EventAccumulator(str(run.folder / "tensorboard"))
    read.Reload()
    assert [each.step for each in read.Scalars("loss")] == [2]


def test_a_file_that_cannot_be_begun_is_an_error(run: RunInfo) -> None:
    (run.folder / "tensorboard").touch()
    with pytest.raises(OSError, match="tensorboard"):
        TensorBoard().begin(run)


# -- others, with fakes of their modules ---------------------------------------------------------------------


class Recorded:
    """A module whose calls are kept: name, arguments, keywords."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **keywords: Any) -> Any:
            self.calls.append((name, args, keywords))
            return self if name == "init" else types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

        return call


@pytest.fixture
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    monkeypatch.setitem(sys.modules, request.param, recorded)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    return recorded


def spent(run: RunInfo, name: str, state: str) -> None:
    feeds = Feeds(naming.make([name]), run)
    feeds.follow(after(10.0, 3.0))
    feeds.follow(after(10.0, 3.0, state=state))
    feeds.stop()
    assert not feeds.feeds[0].failed


@pytest.mark.parametrize("fake", ["wandb"], indirect=True)
def test_wandb_goes_on_with_its_run(run: RunInfo, fake: Recorded) -> None:
    spent(run, "wandb", "RUNNING")
    spent(run_info(run.folder, 0), "wandb", "FAILED")
    assert [name for name, _, _ in fake.calls] == [
        "Settings",
        "init",
        "log",
        "finish",
        "Settings",
        "init",
        "log",
        "finish",
    ]
    began = fake.calls[1][2]
    assert (began["id"], began["name"], began["resume"]) == (run.key, run.name, "allow")
    assert began["config"]["workers"] == 4 and began["config"]["script"] == "train.py"
    assert fake.calls[5][2]["id"] == run.key
    assert fake.calls[2][1][0]["loss"] == 3.0 and fake.calls[2][2] == {"step": 50}
    assert (fake.calls[3][2], fake.calls[7][2]) == ({"exit_code": 0}, {"exit_code": 1})


@pytest.mark.parametrize("fake", ["wandb"], indirect=True)
@pytest.mark.parametrize(
    ("state", "code"), [("RUNNING", 0), ("SUCCEEDED", 0), ("FAILED", 1), ("CANCELLED", 1)]
)
def test_wandb_is_told_of_a_failure_only_where_there_was_one(
    run: RunInfo, fake: Recorded, state: str, code: int
) -> None:
    spent(run, "wandb", state)
    assert fake.calls[-1] == ("finish", (), {"exit_code": code})


@pytest.mark.parametrize("fake", ["mlflow"], indirect=True)
def test_mlflow_goes_on_with_its_run(run: RunInfo, fake: Recorded) -> None:
    spent(run, "mlflow", "RUNNING")
    spent(run_info(run.folder, 0), "mlflow", "CANCELLED")
    assert [name for name, _, _ in fake.calls] == [
        "start_run",
        "log_params",
        "log_metrics",
        "start_run",
        "log_metrics",
        "end_run",
    ]
    assert fake.calls[0][2]["run_name"] == run.name and fake.calls[3][2] == {"run_id": "abc"}
    assert fake.calls[1][1][0] == {"workers": "4", "compress": "none", "args": "--lr 0.1|x"}
    assert fake.calls[2][1][0]["zml/samples_per_s"] == 1280 and fake.calls[2][2] == {"step": 50}
    assert fake.calls[5][1] == ("KILLED",)


@pytest.mark.parametrize("fake", ["mlflow"], indirect=True)
def test_mlflow_begins_no_other_run_where_its_server_cannot_be_reached(
    run: RunInfo, fake: Recorded, monkeypatch: pytest.MonkeyPatch, said: list[tuple[str, dict[str, Any]]]
) -> None:
    spent(run, "mlflow", "RUNNING")
    asked: list[dict[str, Any]] = []

    def unreachable(**keywords: Any) -> None:
        asked.append(keywords)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(fake, "start_run", unreachable, raising=False)
    feeds = Feeds(naming.make(["mlflow"]), run_info(run.folder, 0))
    feeds.stop()
    assert asked == [{"run_id": "abc"}] and feeds.feeds[0].failed
    assert [more["because"] for _, more in said] == ["ConnectionError: no route to host"]
    assert (run.folder / "state" / "mlflow").read_text() == "abc\n"


def test_a_name_that_mlflow_refuses_is_changed() -> None:
    from zml.trackers.mlflow import named

    assert named("loss (train) %") == "loss _train_ _" and named("zml/a-b.c: d") == "zml/a-b.c: d"
