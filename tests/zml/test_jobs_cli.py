"""`zml submit`, `jobs`, `job`, `nodes` and `explain JOB`: what they ask, what they say, and how they end."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from rich.cells import cell_len

from tests.zml.web.serving import Limits, Served, served
from zml.cluster import jobfile
from zml.cluster.archive import unpack
from zml.cluster.client import Client
from zml.cluster.jobs import NAME, NAME_IN_WORDS, NodeView, Submission, name_of
from zml.commands import cli, job_follow
from zml.errors import NO_TOKEN, ZmlError

ROOT = Path(__file__).resolve().parents[2]


class Called(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Called]


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Served]:
    folder = tmp_path / "server"
    folder.mkdir()
    with served(folder, limits=Limits(poll_s=0.01)) as api:
        yield api


@pytest.fixture
def call(
    api: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> Call:
    """A command in this process, in a folder with a script, told of the server by ZML_SERVER."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "train.py").write_text("print('hello')\n")
    monkeypatch.chdir(work)
    for name in [name for name in os.environ if name.startswith("ZML_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ZML_SERVER", api.url)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("USER", "ann")
    monkeypatch.setenv("LOGNAME", "ann")

    def called(*args: str) -> Called:
        code = cli.run(args)
        out, err = capfdbinary.readouterr()
        return Called(code, out.decode(), err.decode())

    return called


# -- submitting ----------------------------------------------------------------------------------------------


def test_a_script_is_submitted_with_what_was_asked_for(call: Call, api: Served, tmp_path: Path) -> None:
    assert call("submit", "train.py") == Called(
        0, "submitted j1 (train, 1 worker, 1 shard): it needs 1 CPUs, and 0 are free\n", ""
    )
    assert (api.desk.views["j1"].user, api.desk.views["j1"].submission) == (
        "ann",
        Submission(script="train.py", folder=str(tmp_path / "work")),
    )
    full = call(
        *"submit train.py -w 1..4 -p 2 --replicas 1 --gpus 1 --cpus 8 --memory 8GB --shard-memory 512".split(),
        *"--priority 5 --after j1 --retries 3 --time-limit 2h --name big --env SEED=1 --env USER".split(),
        *"--set compress=topk:1% --set staleness=async --set local-steps=4 --not-preemptible".split(),
        *"-- --lr 0.1 --workers x".split(),
    )
    assert full.code == 0, full
    assert api.desk.views["j2"].submission == Submission(
        script="train.py", args=["--lr", "0.1", "--workers", "x"], folder=str(tmp_path / "work"), name="big",
        workers="1..4", shards=2, replicas=1, gpus=1, cpus=8, memory_mb=8192, shard_memory_mb=512, priority=5,
        after=["j1"], retries=3, time_limit_s=7200.0, preemptible=False,
        environment={"SEED": "1", "USER": "ann"},
        settings={"compress": "topk:1%:int4", "staleness": "async", "local_steps": 4},
    )  # fmt: skip
    flags = (
        "--async --compress topk:1% --local-steps 4 --checkpoint-steps 50 --keep-every 500 --set keep-last=9"
    )
    assert call("submit", *flags.split(), "train.py").code == 0
    third = api.desk.views["j3"].submission
    assert third is not None and third.settings == {
        "compress": "topk:1%:int4", "staleness": "async", "local_steps": 4, "checkpoint_steps": 50,
        "keep_every_steps": 500, "keep_last": 9,
    }  # fmt: skip
    shown = json.loads(call("submit", "train.py", "--json").out)
    assert (shown["id"], shown["state"], shown["submission"]["script"]) == ("j4", "QUEUED", "train.py")


def test_a_job_file_says_it_key_for_key_and_flags_change_it(call: Call, api: Served, tmp_path: Path) -> None:
    code = tmp_path / "elsewhere"
    (code / "src").mkdir(parents=True)
    (code / "src" / "t.py").write_text("")
    (code / "job.toml").write_text(
        'script = "t.py"\nfolder = "src"\nargs = ["--lr", "0.1"]\nworkers = "2..8"\ngpus = 1\npriority = 3\n'
        '[settings]\nstaleness = 4\n[environment]\nSEED = "1"\n'
    )
    assert call("submit", str(code / "job.toml"), "--priority", "7", "--env", "A=b").code == 0
    assert api.desk.views["j1"].submission == Submission(
        script="t.py", folder=str(code / "src"), args=["--lr", "0.1"], workers="2..8", gpus=1, priority=7,
        settings={"staleness": 4}, environment={"SEED": "1", "A": "b"},
    )  # fmt: skip
    assert call("submit", str(code / "job.toml"), "--", "--lr", "1").code == 0
    again = api.desk.views["j2"].submission
    assert again is not None and again.args == ["--lr", "1"]


def test_code_travels_as_an_archive_and_once(call: Call, api: Served, tmp_path: Path) -> None:
    (tmp_path / "work" / "src").mkdir()
    (tmp_path / "work" / "src" / "t.py").write_text("import helper")
    (tmp_path / "work" / "src" / "helper.py").write_text("")
    first = call("submit", "--archive", "src/t.py", "--", "x")
    assert (first.code, first.out.partition(" (")[0]) == (0, "submitted j1")
    assert first.err.startswith(f"sent 2 files of {tmp_path / 'work' / 'src'}, ")
    job = api.desk.views["j1"].submission
    assert job is not None and job.archive and (job.script, job.folder, job.args) == ("t.py", "", ["x"])
    at = unpack(Path(api.desk.archive(job.archive)), job.archive, tmp_path / "node")
    assert sorted(os.listdir(at)) == ["helper.py", "t.py"]
    again = call("submit", "--archive", "--folder", ".", "src/t.py")
    other = api.desk.views["j2"].submission
    assert (
        again.code == 0
        and other is not None
        and (other.script, other.archive == job.archive) == ("src/t.py", False)
    )
    assert call("submit", "--archive", "src/t.py").err.startswith("the server has ")
    third = api.desk.views["j3"].submission
    assert third is not None and third.archive == job.archive


def test_a_script_that_does_not_travel_is_told_before_anything_is_sent(call: Call, api: Served) -> None:
    Path("venv").mkdir()
    Path("venv/t.py").write_text("")
    ended = call("submit", "--archive", "--folder", ".", "venv/t.py")
    assert (ended.code, ended.err.partition(" of /")[0]) == (
        2,
        "error: the script venv/t.py is not among what is packed",
    )
    bytes_ = call("submit", "train.py", "--", os.fsdecode(b"\xff"))
    assert (bytes_.code, bytes_.err.splitlines()[0]) == (
        2,
        "error: a name or an argument that is not UTF-8 [ZML-E223]",
    )
    assert api.desk.views == {} and not list(Path(api.desk.folder).glob("*.tar.gz"))


@pytest.mark.parametrize(
    ("args", "error", "fix"),
    [
        (["train.py", "--wrokers", "3"], "there is no flag --wrokers", "Did you mean --workers?"),
        (
            ["train.py", "--lr", "1"],
            "there is no flag --lr",
            "The script's own flags stand behind --: zml submit train.py -- --lr ...",
        ),
        (["nowhere.py"], "the script nowhere.py does not exist", "It is looked for in"),
        (["."], "the script . is a folder", "It is looked for in"),
        (["train.py", "-w", "4..2"], "workers = 4..2", "Write 1 to 10,000, or MIN..MAX within that."),
        (["train.py", "-w", "many"], "workers = many", "Write 1 to 10,000, or MIN..MAX within that."),
        (["train.py", "-w", "0"], "workers = 0", "Write 1 to 10,000, or MIN..MAX within that."),
        (["workers.toml"], "workers = 1.5", "Write 1 to 10,000, or MIN..MAX within that."),
        (["train.py", "--sync", "--staleness", "2"], "--sync, --staleness and --async exclude", "Give one of them."),
        (["train.py", "--compress", "zip"], "the flags: compress", ""),
        (["train.py", "--set", "compres=x"], "--set has an unknown key compres", "Did you mean compress?"),
        (["train.py", "--set", "shards=2"], "--set: shards is no setting of one job", "The submission or the cluster"),
        (["train.py", "--set", "compress"], "--set compress is not KEY=VALUE", "Write --set compress=topk:1%."),
        (["train.py", "--env", "NOT_THERE"], "--env NOT_THERE: there is no such variable", "Write --env NOT_THERE="),
        (["train.py", "--env", "ZML_X=1"], "environment: ZML_X", "Variables of that kind are zml's own"),
        (["train.py", "--memory", "lots"], "'lots' is no amount of memory", "Write 8GB, or 512MB."),
        (["train.py", "--time-limit", "soon"], "'soon' is no time", "Write 2h, 90m, 1h30m, or seconds."),
        (["train.py", "--after", "j9"], "there is no job j9", ""),
        (["train.py", "--replicas", "1"], "replicas = 1 with shards = 1", "Write 0, or 1 with 2 shards or more."),
        (["none.toml"], "there is no configuration file none.toml", "Check the path."),
        (["bad.toml"], "bad.toml has an unknown key wrokers", "Did you mean workers?"),
        (["empty.toml"], "empty.toml names no script", 'Add script = "train.py".'),
        (["kind.toml"], "kind.toml: gpus: expected int, got str", "Correct that key."),
        (["train.py", "--name", "my job"], "the command line: name = 'my job'", f"Write {NAME_IN_WORDS}."),
        (["train.py", "--name", "n" * 65], "the command line: name = 'nnn", f"Write {NAME_IN_WORDS}."),
        (["train.py", "--name", "name\n"], r"the command line: name = 'name\n'", f"Write {NAME_IN_WORDS}."),
        (["train.py", "--name", ""], "the command line: name = ''", f"Write {NAME_IN_WORDS}."),
        (["name.toml"], "name.toml: name: expected str | null, got int", "Correct that key."),
        (["both.toml", "--archive"], "--archive with a job.toml that names an archive", "Leave one of them out."),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_two_lines_and_nothing_is_submitted(
    call: Call, api: Served, args: list[str], error: str, fix: str
) -> None:
    Path("bad.toml").write_text('script = "train.py"\nwrokers = 3\n')
    Path("empty.toml").write_text("gpus = 1\n")
    Path("workers.toml").write_text('script = "train.py"\nworkers = "1.5"\n')
    Path("kind.toml").write_text('script = "train.py"\ngpus = "two"\n')
    Path("name.toml").write_text('script = "train.py"\nname = 5\n')
    Path("both.toml").write_text(f'script = "train.py"\narchive = "{"0" * 64}"\n')
    ended = call("submit", *args)
    first, second = ended.err.splitlines()
    assert first.startswith(f"error: {error}") and second.startswith(f"  {fix}")
    assert (ended.out, ended.code in (2, 3), api.desk.views) == ("", True, {})


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("train.py", "train"),
        ("src/Train_2.1-b.py", "Train_2.1-b"),
        ("s/my scr\xeept\n.py", "my-scr-pt-"),
        ("_train.py", "train"),
        (".hidden", "hidden"),
        ("\x1b[31m.py", "31m"),
        ("\u5b66\u7fd2.py", "job"),
        ("/", "job"),
        ("l" * 200 + ".py", "l" * 64),
    ],
)
def test_a_job_without_a_name_is_called_as_its_script_as_far_as_names_go(script: str, name: str) -> None:
    assert name_of(Submission(script=script)) == name
    assert re.search(NAME, name)
    assert name_of(Submission(script=script, name="other")) == "other"


def test_a_script_with_a_strange_name_is_submitted_and_listed_in_one_line(call: Call, api: Served) -> None:
    script = "my scr\xeept\n.py"
    Path(script).touch()
    assert call("submit", script).out.startswith("submitted j1 (my-scr-pt-, ")
    assert [line.split()[:2] for line in call("jobs").out.splitlines()[1:]] == [["j1", "my-scr-pt-"]]
    assert api.desk.views["j1"].submission == Submission(script=script, folder=os.getcwd())


def test_times_and_sizes_are_read_as_people_write_them() -> None:
    times = {"2h": 7200, "90m": 5400, "1h30m": 5400, "45s": 45, "3600": 3600, "1d": 86400, "1D2H": 93600}
    assert {text: jobfile.seconds(text) for text in times} == times
    sizes = {"8GB": 8192, "512": 512, "512MB": 512, "1.5G": 1536, "1TiB": 2**20, "0.1m": 1}
    assert {text: jobfile.megabytes(text) for text in sizes} == sizes
    for text in ("", "0", "h", "2w", "-1h", "1h 30m", "30m1h"):
        with pytest.raises(ZmlError):
            jobfile.seconds(text)


# -- looking -------------------------------------------------------------------------------------------------


def test_jobs_are_listed(call: Call, api: Served) -> None:
    assert call("jobs").out == "no jobs that are not over; --all shows those that are\n"
    call("submit", "train.py", "-w", "1..4")
    call("submit", "train.py", "--name", "a-name-that-is-longer-than-fits")
    api.do(lambda: api.desk.move("j1", "STARTING", "it begins", workers=2, nodes=["n1"]))
    api.do(lambda: api.desk.cancel("j2", "enough"))
    lines = call("jobs").out.splitlines()
    assert lines[0].split() == ["job", "name", "user", "state", "workers", "time", "because"]
    assert [line.split()[:7] for line in lines[1:]] == [["j1", "train", "ann", "starting", "2", "of", "1..4"]]
    assert "a-name-that-is-" in call("jobs", "--all").out
    assert [each["id"] for each in json.loads(call("jobs", "--json", "--all").out)] == ["j1", "j2"]
    assert [each["id"] for each in json.loads(call("jobs", "--json", "--state", "Cancelled").out)] == ["j2"]
    assert json.loads(call("jobs", "--json", "--user", "bob").out) == []
    assert (
        call("jobs", "--user", "bob").out == "no jobs of bob that are not over; --all shows those that are\n"
    )
    wrong = call("jobs", "--state", "asleep")
    assert wrong.code == 2 and "'queued'" in wrong.err


def test_a_job_is_shown_and_one_that_is_not_there_is_guessed(call: Call, api: Served) -> None:
    call("submit", "train.py", "--gpus", "1", "--set", "compress=topk:1%", "--", "--lr", "0.1 x")
    api.do(lambda: api.desk.move("j1", "STARTING", "it begins", workers=1, nodes=["n1"]))
    out = call("job", "show", "j1").out
    for said in ("j1, called train, of ann", "starting, ran", "it begins", "train.py --lr '0.1 x'", "1 CPU, 1 GPU",
                 "compress = topk:1%:int4", "attempt-1"):  # fmt: skip
        assert said in out
    assert json.loads(call("job", "show", "j1", "--json").out)["attempts"][0]["number"] == 1
    all_of_them = "`zml jobs --all` lists them."
    for command in (("job", "show"), ("job", "logs"), ("job", "logs", "-f"), ("job", "cancel"), ("explain",)):
        for asked, fix in (
            ("train", f"Did you mean j1, which is called train? {all_of_them}"),
            ("j11", f"Did you mean j1? {all_of_them}"),
            ("never", all_of_them),
        ):
            ended = call(*command, asked)
            assert (ended.code, ended.err) == (2, f"error: there is no job {asked} [ZML-E222]\n  {fix}\n")
    call("submit", "train.py", "--name", "never")
    call("submit", "train.py", "--name", "never")
    assert "Did you mean j3, which is called never?" in call("explain", "never").err
    wrong = call("job", "show", "../x").err
    assert (
        wrong.startswith(f"error: job = '../x': expected {NAME_IN_WORDS} [")
        and "`zml jobs --all` lists" in wrong
    )


def test_what_a_job_that_is_there_lacks_is_not_taken_for_another_job(call: Call, api: Served) -> None:
    call("submit", "train.py")
    call("submit", "train.py")
    api.do(lambda: api.desk.move("j2", "STARTING"))
    for more in (["--attempt", "7"], ["--attempt", "7", "w0.out"], ["--attempt", "7", "--list"]):
        ended = call("job", "logs", "j2", *more)
        assert ended.code == 2 and ended.err.startswith("error: j2 has no attempt 7 [ZML-E222]\n")
        assert "Did you mean" not in ended.err


def test_why_a_job_waits_is_explained_and_so_is_an_error(call: Call, api: Served) -> None:
    for _ in range(2):
        call("submit", "train.py")
    lines = call("explain", "j2").out.splitlines()
    assert lines[:5] == [
        "j2 (train) waits: what it needs is not free.",
        "  it needs 1 CPUs, and 0 are free",
        "  It asks for 1 worker, 1 shard, and has no worker.",
        "  1 job goes before it: j1",
        "",
    ]
    assert lines[5] == "decided:" and lines[6].endswith("queued: it needs 1 CPUs, and 0 are free")
    assert json.loads(call("explain", "j2", "--json").out)["ahead"] == ["j1"]
    assert call("explain", "E222").out.startswith("ZML-E222: there is no such job")
    assert json.loads(call("explain", "222", "--json").out)["code"] == "ZML-E222"
    assert call("explain", "j9").code == 2


def test_nodes_are_listed(call: Call, api: Served) -> None:
    assert "`zml node`" in call("nodes").out
    node = NodeView(
        id="n1", state="UP", rack="r1", gpus=4, cpus=32, memory_mb=131_072, gpus_free=1, cpus_free=8,
        memory_mb_free=65_536, jobs=["j1"], heard_s=0.2,
    )  # fmt: skip
    api.do(lambda: api.desk.machines.append(node))
    lines = call("nodes").out.splitlines()
    assert lines[1].split() == ["n1", "up", "r1", "1/4", "8/32", "64/128", "0:00", "j1"]
    assert msgspec.json.decode(call("nodes", "--json").out, type=list[NodeView]) == [node]
    assert "pool" not in call("nodes").out


def test_with_the_nodes_comes_what_the_pool_says(call: Call, tmp_path: Path) -> None:
    because = "1 node cannot come: PartitionTimeLimit; more are asked for in 20 s"
    with served(tmp_path, pool=lambda: because) as api:
        with contextlib.closing(Client(api.url)) as client:
            found = client.nodes_and_pool()
        assert (found.nodes, found.pool) == ([], because)
        assert call("nodes", "--server", api.url).out.splitlines()[-1] == f"pool: {because}"


def test_what_is_printed_fits_80_columns(api: Served, call: Call, tmp_path: Path) -> None:
    """On a terminal, as `script` makes one."""
    call("submit", "train.py", "-w", "100..1000", "--name", "n" * 64)
    api.do(lambda: api.desk.move("j1", "STARTING", "because " * 30, workers=999, nodes=["n1"]))
    for args in ("jobs", "job show j1", "submit --help", "job logs --help"):
        ended = subprocess.run(
            ["script", "-qec", f"stty cols 80; {sys.executable} -P -m zml {args}", "/dev/null"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "TERM": "dumb"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode == 0, ended
        for line in ended.stdout.splitlines():
            if "job show" not in args:  # its lines are sentences, which the terminal folds
                assert cell_len(line) <= 80, line


# -- changing ------------------------------------------------------------------------------------------------


def test_a_job_is_paused_resumed_scaled_and_cancelled(call: Call, api: Served) -> None:
    call("submit", "train.py")
    assert call("job", "pause", "j1", "--because", "lunch").out == "j1 paused: paused by ann: lunch\n"
    assert call("job", "resume", "j1").out == "j1 queued: it was resumed\n"
    assert call("job", "scale", "j1", "-w", "2..8").out.endswith("  It may have 2..8 workers, 1 shard.\n")
    assert (api.desk.views["j1"].workers_min, api.desk.views["j1"].workers_max) == (2, 8)
    assert json.loads(call("job", "cancel", "j1", "--json").out)["state"] == "CANCELLED"
    assert call("job", "cancel", "j1").code == 0
    late = call("job", "pause", "j1")
    assert (late.code, late.err) == (
        4,
        "error: j1 is over: CANCELLED [ZML-E206]\n  `zml explain ZML-E206` says more.\n",
    )
    wrong = call("job", "scale", "j1", "-w", "x")
    assert wrong.code == 2 and wrong.err.startswith(
        "error: workers = x [ZML-E223]\n  Write 1 to 10,000, or MIN..MAX within that.\n"
    )


def test_a_job_that_is_over_is_deleted(call: Call, api: Served) -> None:
    call("submit", "train.py")
    early = call("job", "delete", "j1")
    assert (early.code, early.err.splitlines()[0]) == (4, "error: job j1 is not over: QUEUED [ZML-E206]")
    call("job", "cancel", "j1")
    assert call("job", "delete", "j1").out == "j1 is deleted; it was cancelled\n"
    assert not api.desk.views and call("job", "delete", "j1").code == call("job", "show", "j1").code != 0


def test_an_order_is_for_as_many_jobs_as_are_named_and_one_that_fails_keeps_no_other_from_it(
    call: Call,
) -> None:
    for _ in range(3):
        call("submit", "train.py")
    call("job", "cancel", "j2")
    ended = call("job", "pause", "j1", "j2", "j9", "j3", "j1")
    assert (ended.code, ended.out) == (2, "j1 paused: paused by ann\nj3 paused: paused by ann\n")
    assert "j2 is over" in ended.err and "j9" in ended.err
    resumed = call("job", "resume", "j1", "j3", "--json")
    assert [each["id"] for each in json.loads(resumed.out)] == ["j1", "j3"]


def test_an_order_can_be_waited_for(call: Call, api: Served) -> None:
    call("submit", "train.py")
    api.do(lambda: api.desk.move("j1", "STARTING"))
    api.desk.on_wait = lambda job: api.later(lambda: api.desk.move(job, "CANCELLED", "it was told to"))
    ended = call("job", "cancel", "--wait", "j1")
    assert (ended.code, ended.out) == (0, "j1 cancelled: it was told to\n")
    assert [line[9:] for line in ended.err.splitlines()] == [
        "j1 draining: cancelled by ann",
        "j1 cancelled: it was told to",
    ]


# -- waiting -------------------------------------------------------------------------------------------------


def script(api: Served, *moves: tuple[Any, ...]) -> None:
    """Move a job on, one step whenever somebody waits for it."""
    left = list(moves)

    def on_wait(job: str) -> None:
        if left:
            state, because, changes = left.pop(0)
            api.later(lambda: api.desk.move(job, state, because, **changes))

    api.desk.on_wait = on_wait


def test_wait_tells_what_happens_and_ends_as_the_job_does(call: Call, api: Served) -> None:
    script(
        api,
        ("STARTING", "it begins", {"workers": 2, "nodes": ["n1", "n2"]}),
        ("RUNNING", "all are here", {}),
        ("FAILED", "w1 raised ValueError", {"exit_code": 3}),
    )
    ended = call("submit", "--wait", "train.py")
    assert ended.code == 3
    assert ended.out == "submitted j1 (train, 1 worker, 1 shard): it needs 1 CPUs, and 0 are free\n"
    assert [line[9:] for line in ended.err.splitlines()] == [
        "j1 starting, 2 workers on n1, n2: it begins",
        "j1 running, 2 workers on n1, n2: all are here",
        "j1 failed, exit code 3: w1 raised ValueError",
    ]
    assert call("job", "show", "--wait", "j1").code == 3


@pytest.mark.parametrize(
    ("state", "exit_code", "code"),
    [("SUCCEEDED", None, 0), ("SUCCEEDED", 0, 0), ("TIMED_OUT", None, 1), ("FAILED", 75, 75)],
)
def test_the_exit_code_is_the_job_s(
    call: Call, api: Served, state: str, exit_code: int | None, code: int
) -> None:
    script(api, ("STARTING", "", {}), ("RUNNING", "", {}), (state, "", {"exit_code": exit_code}))
    ended = call("submit", "--wait", "--json", "train.py")
    assert (ended.code, json.loads(ended.out)["state"]) == (code, state)


def test_ctrl_c_detaches_and_the_job_goes_on(call: Call, api: Served) -> None:
    me = threading.main_thread().ident
    assert me is not None
    api.desk.on_wait = lambda job: signal.pthread_kill(me, signal.SIGINT)
    ended = call("submit", "--wait", "train.py")
    assert (ended.code, ended.err.splitlines()) == (
        130,
        ["", "detached; j1 goes on", "  `zml job show --wait j1` looks again, `zml job cancel j1` ends it."],
    )
    assert api.desk.views["j1"].state == "QUEUED"


def test_who_waits_outlasts_a_restart_of_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_follow, "AGAIN_S", 0.05)
    with served(tmp_path) as first:
        client = Client(first.url, user="ann")
        job = client.submit(Submission(script="t.py", folder="/code"))
        waiting = threading.Event()
        first.desk.on_wait = lambda job: waiting.set()
        ended: list[Any] = []
        thread = threading.Thread(target=lambda: ended.append(job_follow.wait(client, job.id)))
        thread.start()
        assert waiting.wait(10)
        port, desk = first.url.rpartition(":")[2], first.desk
    with served(tmp_path, f"127.0.0.1:{port}") as second:
        second.do(lambda: second.desk.views.update(desk.views))
        second.do(lambda: second.desk.cancel("j1", "enough"))
        thread.join(20)
    client.close()
    assert not thread.is_alive() and ended[0].state == "CANCELLED"


def test_a_request_that_broke_is_sent_again_and_submits_once(tmp_path: Path) -> None:
    with served(tmp_path) as api:
        client = Client(api.url, user="ann")
        submit, told = api.desk.submit, []

        def breaks(submission: Submission, user: str, *, key: str = "") -> Any:
            job = submit(submission, user, key=key)
            told.append(key)
            if len(told) == 1:  # it is taken, and the answer is lost
                for each in api.server.runner.server.connections:  # type: ignore[union-attr]
                    each.force_close()
            return job

        api.desk.submit = breaks  # type: ignore[method-assign]
        job = client.submit(Submission(script="t.py", folder="/code"))
        client.close()
        assert (job.id, len(told), len(set(told)), list(api.desk.views)) == ("j1", 2, 1, ["j1"])


# -- output --------------------------------------------------------------------------------------------------


def test_what_a_job_printed_is_shown(call: Call, api: Served) -> None:
    call("submit", "train.py")
    nothing = call("job", "logs", "j1")
    assert (nothing.code, nothing.err.splitlines()[0]) == (2, "error: j1 has printed nothing yet [ZML-E101]")
    assert call("job", "logs", "j1", "--list").out == "j1 has printed nothing yet\n"
    api.do(lambda: api.desk.move("j1", "STARTING"))
    api.desk.write("j1", "w0.jsonl", "{}\n")
    assert call("job", "logs", "j1") == nothing, "what zml itself says is not what the script printed"
    for name in ("p0.out", "w1.out", "w0.out", "w0.jsonl"):
        api.desk.write("j1", name, f"{name}\nübrig\n")
    assert call("job", "logs", "j1").out == "w0.out\nübrig\n"
    assert call("job", "logs", "j1", "p0.out", "-n", "1").out == "übrig\n"
    assert [line.split()[0] for line in call("job", "logs", "j1", "--list").out.splitlines()[1:]] == [
        "p0.out", "w0.jsonl", "w0.out", "w1.out",
    ]  # fmt: skip
    assert json.loads(call("job", "logs", "j1", "--json").out)["attempt"] == 1
    wrong = call("job", "logs", "j1", "w0.oot")
    assert wrong.err == "error: j1 has no output called w0.oot [ZML-E222]\n  Did you mean w0.out?\n"


def test_a_list_of_outputs_is_not_asked_for_with_one_of_them(call: Call, api: Served) -> None:
    call("submit", "train.py")
    for args, said in [
        (("w0.out", "--json"), "--json with NAME"),
        (("-f", "-n", "3", "--json"), "--json with --follow and --tail"),
        (("w0.out", "--list"), "--list with NAME"),
    ]:
        refused = call("job", "logs", "j1", *args)
        assert (refused.code, refused.out) == (2, "")
        assert refused.err.startswith(f"error: {said}: it lists what there is [ZML-E101]")


def test_what_zml_says_is_shown_where_a_job_ended_and_its_script_never_printed(
    call: Call, api: Served
) -> None:
    call("submit", "train.py")
    api.do(lambda: api.desk.move("j1", "STARTING"))
    api.desk.write("j1", "w0.jsonl", "{}\n")
    api.do(lambda: api.desk.move("j1", "FAILED"))
    assert call("job", "logs", "j1")[:2] == (0, "{}\n")


def steps(api: Served, *calls: Callable[[], Any]) -> None:
    """One step whenever somebody waits for a job."""
    left = list(calls)
    api.desk.on_wait = lambda job: api.later(left.pop(0)) if left else None


def test_logs_are_followed_over_attempts_until_the_job_is_over(call: Call, api: Served) -> None:
    call("submit", "train.py")
    desk = api.desk

    def first() -> None:
        desk.move("j1", "STARTING")
        desk.write("j1", "w0.out", "first\n")
        desk.move("j1", "QUEUED", "it was preempted")

    def end() -> None:
        desk.write("j1", "w0.out", "second\n")
        desk.move("j1", "RUNNING")
        desk.move("j1", "SUCCEEDED")

    steps(
        api, first, lambda: desk.move("j1", "STARTING"), end
    )  # the second attempt is there before its output
    ended = call("job", "logs", "-f", "j1")
    assert (ended.code, ended.out) == (0, "first\nsecond\n")
    assert [line.partition(":")[0] for line in ended.err.splitlines()] == ["zml", "zml"]
    assert ended.err.splitlines()[-1] == "zml: j1 attempt 2"


def test_an_output_that_is_named_is_waited_for_where_nothing_is_there_yet(call: Call, api: Served) -> None:
    call("submit", "train.py")

    def all_of_it() -> None:
        api.desk.move("j1", "STARTING")
        api.desk.write("j1", "w1.out", "one\ntwo\n")
        api.desk.move("j1", "FAILED")

    steps(api, all_of_it)
    assert call("job", "logs", "-f", "-n", "1", "j1", "w1.out") == Called(0, "two\n", "")
    wrong = call("job", "logs", "-f", "j1", "w9.out")
    assert (wrong.code, wrong.err.splitlines()[1]) == (2, "  Did you mean w1.out?")


def test_what_is_followed_without_a_name_is_what_a_script_prints(call: Call, api: Served) -> None:
    """And not what zml says before that."""
    call("submit", "train.py")
    desk = api.desk

    def first() -> None:
        desk.move("j1", "STARTING")
        desk.write("j1", "w0.jsonl", "{}\n")

    def end() -> None:
        desk.write("j1", "w0.out", "hello\n")
        desk.move("j1", "FAILED")

    steps(api, first, end)
    assert call("job", "logs", "-f", "j1")[:2] == (0, "hello\n")


def test_a_followed_log_goes_on_where_its_connection_broke(call: Call, api: Served) -> None:
    call("submit", "train.py")
    api.do(lambda: api.desk.move("j1", "STARTING"))
    api.desk.write("j1", "w0.out", "one\n")

    def breaks() -> None:
        for each in api.server.runner.server.connections:  # type: ignore[union-attr]
            each.force_close()
        api.desk.write("j1", "w0.out", "two\n")
        steps(api, end)

    def end() -> None:
        api.desk.move("j1", "RUNNING")
        api.desk.move("j1", "SUCCEEDED")

    read, looked = api.desk.job, []

    def job(name: str) -> Any:
        looked.append(name)
        if len(looked) == 6:  # the follower looks whether the job is over
            api.later(breaks)
        return read(name)

    api.desk.job = job  # type: ignore[method-assign,assignment]
    assert call("job", "logs", "-f", "j1")[:2] == (0, "one\ntwo\n")
    assert len(looked) > 6


def test_a_reader_that_goes_away_costs_no_traceback(call: Call, api: Served) -> None:
    call("submit", "train.py")
    api.do(lambda: api.desk.move("j1", "STARTING"))
    api.desk.write("j1", "w0.out", "line\n" * 200_000)
    ended = subprocess.run(
        ["sh", "-c", f"{sys.executable} -P -m zml job logs j1 | head -1"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.stdout, ended.stderr) == ("line\n", "")


# -- the server ----------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_told_with_how_to_start_one(call: Call) -> None:
    for server in ("http://127.0.0.1:1", "127.0.0.1:1"):
        ended = call("jobs", "--server", server)
        assert (ended.code, ended.out, ended.err.splitlines()) == (
            4,
            "",
            [
                "error: no coordinator answers at http://127.0.0.1:1: connection refused [ZML-E202]",
                "  Start one with `zml coordinator --cluster FOLDER`, or name another with --server or ZML_SERVER.",
            ],
        )
    for server in ("ftp://x", "http://", "http://x:y"):
        assert call("jobs", "--server", server).code == 2


def test_a_server_of_another_kind_is_told_apart(call: Call, tmp_path: Path) -> None:
    program = (
        "import http.server as h; s = h.HTTPServer(('127.0.0.1', 0), h.SimpleHTTPRequestHandler);"
        "print(s.server_port, flush=True); s.serve_forever()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as other:
        try:
            assert other.stdout is not None
            ended = call("jobs", "--server", f"http://127.0.0.1:{other.stdout.readline().strip()}")
        finally:
            other.terminate()
    assert ended.code == 4 and "does not speak as a coordinator" in ended.err


def test_a_token_is_read_from_a_file_of_its_owner(tmp_path: Path, call: Call) -> None:
    tokens, mine = tmp_path / "tokens", tmp_path / "mine"
    tokens.write_text(f"ann {'a' * 32}\nbob {'b' * 32}\n")
    mine.write_text("b" * 32 + "\n")
    for path in (tokens, mine):
        path.chmod(0o600)
    (tmp_path / "other").mkdir()
    with served(tmp_path / "other", tokens=str(tokens)) as api:
        without = call("jobs", "--server", api.url)
        assert (without.code, without.err.splitlines()) == (
            3,
            [
                f"error: the request carries no token [{NO_TOKEN}]",
                "  Give the file with your token by --token or ZML_TOKEN.",
            ],
        )
        assert call("submit", "train.py", "--server", api.url, "--token", str(mine)).code == 0
        assert api.desk.views["j1"].user == "bob"
        assert call("jobs", "--server", api.url, "--token", str(tokens)).err.startswith(
            "error: there are 2 tokens"
        )
        mine.chmod(0o644)
        assert "others than its owner may read" in call("jobs", "--server", api.url, "--token", str(mine)).err


def test_commands_load_no_more_than_they_need(api: Served, call: Call) -> None:
    program = (
        "import json, sys; from zml.commands.cli import run; run(sys.argv[1:]);"
        "print(json.dumps(sorted({'torch', 'numpy', 'zmq', 'aiohttp', 'uvloop'} & set(sys.modules))), file=sys.stderr)"
    )
    for args in (["jobs"], ["submit", "train.py"], ["nodes", "--json"], ["explain", "j1"]):
        ended = subprocess.run(
            [sys.executable, "-P", "-c", program, *args],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.stderr == "[]\n", args


def test_the_user_s_name_is_made_one_that_can_be_sent() -> None:
    for user, sent in (
        ("ann", "ann"),
        ("Dömäne\\ann smith", "D-m-ne-ann-smith"),
        ("..", "anonymous"),
        ("", None),
    ):
        assert Client(user=user).headers.get("Zml-User") == sent
