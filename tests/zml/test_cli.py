"""The executable from outside: what it loads, what it says, and how it ends."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import zml
from zml import config, errors
from zml.commands import cli
from zml.commands.flags import settle
from zml.status import JobStatus, decode, encode

ROOT = Path(__file__).resolve().parents[2]
Ended = subprocess.CompletedProcess[str]
BARE = {key: value for key, value in os.environ.items() if not key.startswith("ZML_")}


def run(*args: str, cwd: Path, **environment: str) -> Ended:
    return subprocess.run(
        [sys.executable, "-P", "-m", "zml", *args],
        cwd=cwd,
        env={**BARE, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


class Called(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Call = Callable[..., Called]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """A command in this process, in an empty folder: faster than a process each, and the same code."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("ZML_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_COLOR", "1")

    def called(*args: str) -> Called:
        code = cli.run(args)
        return Called(code, *capsys.readouterr())

    return called


def loaded(*args: str, cwd: Path) -> set[str]:
    """The packages that a command has imported when it ends."""
    program = (
        "import json, sys; from zml.commands.cli import run; sys.stdout = sys.stderr; run(sys.argv[1:]);"
        "print(json.dumps([name for name in sys.modules if '.' not in name]), file=sys.__stdout__)"
    )
    ended = subprocess.run(
        [sys.executable, "-P", "-c", program, *args],
        cwd=cwd,
        env={**BARE, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(json.loads(ended.stdout))


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["run", "--help"],
        ["worker", "--help"],
        ["version"],
        ["explain"],
        ["config", "show"],
        ["doctor"],
        ["run", "nowhere.py"],
        ["worker", "--gpu", "99"],
    ],
)
def test_neither_torch_nor_zmq_is_loaded_before_it_is_needed(tmp_path: Path, args: list[str]) -> None:
    assert not loaded(*args, cwd=tmp_path) & {"torch", "numpy", "zmq", "uvloop"}


def test_the_package_itself_loads_nothing_heavy(tmp_path: Path) -> None:
    program = "import sys, zml; print(sorted({'torch', 'zmq', 'click', 'rich', 'numpy'} & set(sys.modules)))"
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**BARE, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.stdout == "[]\n"


def test_help_names_every_command(tmp_path: Path) -> None:
    ended = run("--help", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert run(cwd=tmp_path).stdout == ended.stdout  # without a command, help is what is wanted
    listed = ended.stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == list(cli.main.commands)
    for line in listed:
        assert line.endswith((".", "?")) and not line.endswith("..."), "one sentence that fits its line"


@pytest.mark.parametrize(
    ("args", "error", "code"),
    [
        (["rnu"], "error: No such command 'rnu'", 2),
        (["run"], "error: Missing argument 'SCRIPT'", 2),
        (["run", "-w", "x", "t.py"], "error: Invalid value for '-w' / '--workers'", 2),
        (["run", "-w", "0", "t.py"], "error: --workers = 0: expected int >= 1", 2),
        (["run", "--staleness", "-1", "t.py"], "error: --staleness = -1: expected int >= 0", 2),
        (
            ["run", "--sync", "--async", "t.py"],
            "error: --sync, --staleness and --async exclude each other",
            2,
        ),
        (["run", "--workres", "2", "t.py"], "error: No such option '--workres'", 2),
        (["run", "--compress", "zip", "t.py"], "error: --compress: 'zip' is no compression", 2),
        (["run", "nowhere.py"], "error: the script nowhere.py does not exist", 2),
        (["run", "."], "error: the script . is a folder", 2),
        (["worker", "t.py"], "error: a worker takes either --gpu K or --cpu", 2),
        (["worker", "--gpu", "0", "--cpu"], "error: a worker takes either --gpu K or --cpu", 2),
        (["worker", "--gpu", "999"], "error: there is no GPU 999", 2),
        (["worker", "--cpu", "nowhere.py"], "error: the script nowhere.py does not exist", 2),
        (["ps"], "error: Missing option '--shard'", 2),
        (["ps", "--shard", "-1"], "error: Invalid value for '--shard'", 2),
        (["coordinator", "--cluster", ""], "error: --cluster is empty", 2),
        (
            ["coordinator", "--cluster", "c", "--compress", "bf16"],
            "error: --compress does nothing with --cluster",
            2,
        ),
        (["coordinator", "--cluster", "c", "-w", "3"], "error: --workers does nothing with --cluster", 2),
        (["coordinator", "--cluster", "c", "--job", "x"], "error: --job does nothing with --cluster", 2),
        (["node", "--name", "a b"], "error: 'a b' is no name of a node", 2),
        (["explain", "E999"], "error: there is no error E999", 2),
        (["status", "nowhere"], "error: there is no run nowhere", 2),
        (["config", "show", "--config", "none.toml"], "error: there is no configuration file none.toml", 3),
    ],
)
def test_a_mistake_is_told_in_two_lines_without_a_traceback(
    tmp_path: Path, call: Call, args: list[str], error: str, code: int
) -> None:
    ended = call(*args)
    assert ended.stderr.startswith(error)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert "Traceback" not in ended.stderr
    first, *fix = ended.stderr.splitlines()
    assert first.endswith("]") and "[ZML-E" in first
    assert len(fix) == 1 and fix[0].startswith("  ")
    assert list(tmp_path.iterdir()) == []  # and nothing was left behind


def test_a_misspelt_variable_or_key_stops_every_role_before_it_starts(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.py").write_text("")
    monkeypatch.setenv("ZML_LEASE", "3")
    for args in (["run", "t.py"], ["coordinator"], ["ps", "--shard", "0"], ["worker", "--cpu"], ["status"]):
        ended = call(*args)
        assert (ended.returncode, ended.stderr) == (
            3,
            "error: the environment has an unknown key ZML_LEASE [ZML-E102]\n  Did you mean ZML_LEASE_S?\n",
        )


def test_an_error_can_be_explained_by_its_number(call: Call) -> None:
    for way in ("ZML-E204", "zml-e204", "E204", "204"):
        ended = call("explain", way)
        assert ended.returncode == 0
        assert ended.stdout.startswith("ZML-E204: this member was fenced\n\n")
        assert ended.stdout.endswith("Exit code 1.\n")
    assert len(call("explain").stdout.splitlines()) == len(errors.BOOK)


def test_config_show_says_where_each_value_comes_from(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZML_STALENESS", "async")
    (tmp_path / "zml.toml").write_text('shards = 3\ncoordinator = ["tcp://a:1", "tcp://b:2"]\n')
    ended = call("config", "show")
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert ["workers", "1", "default"] in lines
    assert ["shards", "3", "zml.toml"] in lines
    assert ["staleness", "async", "ZML_STALENESS"] in lines
    assert ["coordinator", "tcp://a:1,", "tcp://b:2", "zml.toml"] in lines
    assert ["outer_lr", "auto", "default"] in lines and ["checkpoint_steps", "never", "default"] in lines
    assert len({line.rfind("default") for line in ended.stdout.splitlines() if "default" in line}) == 1
    assert len(lines) == len(config.KINDS)
    told = json.loads(call("config", "show", "--json").stdout)
    assert (told["settings"]["shards"], told["origins"]["shards"]) == (3, "zml.toml")


def test_version_says_what_zml_stands_on(call: Call) -> None:
    told = json.loads(call("version", "--json").stdout)
    assert told["zml"] == zml.__version__
    assert told["python"] == sys.version.split()[0]
    assert {"torch", "pyzmq", "msgpack", "msgspec", "uvloop", "lz4"} <= told.keys()
    assert call("--version").stdout == f"zml {zml.__version__}\n"


def test_doctor_answers_for_people_and_for_machines(call: Call) -> None:
    told = json.loads(call("doctor", "--json").stdout)
    ended = call("doctor")
    assert {check["verdict"] for check in told} <= {"pass", "warn", "fail"}
    assert ended.returncode == (1 if any(check["verdict"] == "fail" for check in told) else 0)
    *lines, nothing, count = ended.stdout.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [
        check["verdict"] for check in told
    ]
    assert nothing == "" and count.endswith(" failed")


def test_a_reader_that_goes_away_costs_no_traceback(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = subprocess.run(
            [sys.executable, "-P", "-m", "zml", "explain"],
            cwd=tmp_path,
            env={**BARE, "PYTHONPATH": str(ROOT)},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


def settled(*args: str) -> Any:
    """The settings that a command line makes."""
    with cli.main.commands["run"].make_context("run", list(args)) as context:
        given = {key: value for key, value in context.params.items() if key not in ("script", "args", "cpu")}
        return settle(given).settings, context.params["script"], context.params["args"]


@pytest.mark.parametrize(
    ("args", "staleness"),
    [([], 0), (["--sync"], 0), (["--staleness", "0"], 0), (["--staleness", "4"], 4), (["--async"], None)],
)
def test_the_mode_flags(args: list[str], staleness: int | None) -> None:
    assert settled(*args, "t.py")[0].staleness == staleness


def test_zero_is_a_value_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZML_STALENESS", "4")
    assert settled("--staleness", "0", "t.py")[0].staleness == 0


def test_a_mode_flag_overrides_another_mode_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zml.toml").write_text('staleness = "async"\n')
    assert settled("t.py")[0].staleness is None
    assert settled("--sync", "t.py")[0].staleness == 0


def test_what_follows_the_script_is_the_scripts() -> None:
    settings, script, args = settled("-w", "2", "t.py", "-w", "9", "--help", "--", "x")
    assert (settings.workers, script, args) == (2, "t.py", ("-w", "9", "--help", "--", "x"))


def test_keys_are_made_once_and_readable_by_their_owner_only(tmp_path: Path, call: Call) -> None:
    made = call("keys", "keys")
    assert (made.returncode, made.stderr) == (0, "")
    assert [line.split("  ") for line in made.stdout.splitlines()] == [
        ["keys/coordinator.key", "for its owner only"],
        ["keys/worker.key", "for its owner only"],
        ["keys/authorized.toml", "for every machine"],
        ["Give --keys keys to every role."],
    ]
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "keys").iterdir()}
    assert modes == {"coordinator.key": 0o600, "worker.key": 0o600, "authorized.toml": 0o644}
    secret = (tmp_path / "keys" / "worker.key").read_text().split('secret = "')[1].split('"')[0]
    assert secret not in made.stdout

    again = call("keys", "keys")
    assert again.returncode == 3
    assert again.stderr.startswith("error: keys/coordinator.key: this key exists")
    assert call("keys", "keys", "--name", "gpu03").returncode == 0
    assert "gpu03" in (tmp_path / "keys" / "authorized.toml").read_text()


def test_a_coordinator_that_cannot_listen_leaves_no_run(tmp_path: Path, call: Call) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for flags in (["--bind", f"tcp://127.0.0.1:{port}"], ["--http", f"127.0.0.1:{port}"]):
            ended = call("coordinator", *flags)
            assert ended.returncode == 4 and "[ZML-E201]" in ended.stderr, ended.stderr
    assert list((tmp_path / "runs").iterdir()) == []


def test_status_shows_how_a_run_ended(tmp_path: Path, call: Call) -> None:
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    over = JobStatus(
        job="job", state="SUCCEEDED", script="t.py", started_at=1e9, at=1e9 + 65, exit_code=0, samples=10
    )
    (folder / "status.json").write_bytes(encode(over))
    ended = call("status", "runs/one")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "succeeded  1:05" in ended.stdout
    assert "t.py finished after 1:05: 10 samples" in ended.stdout
    assert decode(call("status", "--json", "runs/one").stdout.encode()) == over


def test_a_coordinator_that_does_not_answer_is_an_error_with_its_address(tmp_path: Path) -> None:
    address = "ipc:///nowhere/zml-test"
    asked = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "zml", *args, "--coordinator", address],
            cwd=tmp_path,
            env={**BARE, "PYTHONPATH": str(ROOT), "ZML_JOIN_TIMEOUT_S": "0.5"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for args in (["status"], ["worker", "--cpu"], ["ps", "--shard", "0"])
    ]
    for process in asked:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 4, said
        assert said.startswith("error: ") and address in said
        assert "Traceback" not in said
