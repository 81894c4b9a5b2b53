"""Help when it goes wrong: every error has a page that says what to do, and what is mistyped is understood."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete

from tests.test_layers import Module, modules, where
from zml import errors
from zml.commands import cli, completion, guess
from zml.commands.aim import take
from zml.errors import NO_STACK, USAGE
from zml.runs import rundir
from zml.runs.finding import LIST

ROOT = Path(__file__).parent.parent.parent
CODE = re.compile(r"ZML-E\d{3}")
VERBS = re.compile(r"^[A-Z`]")


# -- the error book ------------------------------------------------------------------------------------------


def names_of_codes() -> dict[str, str]:
    """Of each constant of zml.errors, its code."""
    found = {}
    for node in modules()["zml.errors"].tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("page("):
            assert isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Call)
            found[node.targets[0].id] = str(ast.literal_eval(node.value.args[0]))
    return found


def used(module: Module, names: dict[str, str]) -> dict[str, str]:
    """The codes that a module uses, and where: by names that it imports from zml.errors, or as errors.NAME."""
    local = {
        alias.asname or alias.name: alias.name
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").rpartition(".")[2] == "errors"
        for alias in node.names
        if alias.name in names
    }
    found = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in local:
            found[names[local[node.id]]] = where(module, node.lineno)
        elif isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) == "errors":
            found[names[node.attr]] = where(module, node.lineno)
    return found


def test_every_code_in_the_book_is_raised_and_every_code_raised_is_in_the_book() -> None:
    names = names_of_codes()
    assert set(names.values()) == errors.BOOK.keys()
    others = [module for name, module in modules().items() if name != "zml.errors"]
    raised = {code for module in others for code in used(module, names)}
    assert errors.BOOK.keys() - raised == set()
    written = {
        found: where(module, node.lineno)
        for module in others
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for found in CODE.findall(node.value)
        if found not in errors.BOOK
    }
    assert written == {}


def test_an_error_is_made_with_a_code_of_the_book_and_never_with_a_text_in_its_place() -> None:
    names = names_of_codes()
    wrong = []
    for module in modules().values():
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name | ast.Attribute):
                continue
            if (node.func.id if isinstance(node.func, ast.Name) else node.func.attr) != "ZmlError":
                continue
            code = node.args[0]
            if isinstance(code, ast.Constant) or (
                isinstance(code, ast.Name) and code.id.isupper() and code.id not in names
            ):
                wrong.append(f"{where(module, node.lineno)}: {ast.unparse(code)}")
    assert wrong == []


@pytest.mark.parametrize("code", sorted(errors.BOOK))
def test_a_page_says_what_the_matter_is_and_what_to_do(code: str) -> None:
    entry = errors.BOOK[code]
    assert entry.title[0].islower() or entry.title.startswith("Slurm") or entry.title.startswith("zml")
    assert not entry.title.endswith(".")
    assert len(entry.explanation) > 40 and entry.explanation.endswith(".")
    assert len(entry.do) > 20 and entry.do.endswith(".") and VERBS.match(entry.do), entry.do
    commands = dict(guess.every_command(cli.main))
    for written in re.findall(r"`zml ([a-z]+(?: [a-z]+)?)", f"{entry.explanation} {entry.do}"):
        words = written.split()
        assert words[0] in commands or " ".join(words) in commands, f"there is no command zml {written}"
        group = commands.get(words[0])
        if isinstance(group, click.Group) and len(words) > 1:
            assert " ".join(words) in commands, f"there is no command zml {written}"


@pytest.mark.parametrize("code", sorted(errors.BOOK))
def test_flags_that_a_page_names_exist(code: str) -> None:
    entry = errors.BOOK[code]
    flags = {name for _, each in guess.every_command(cli.main) for p in each.params for name in p.opts}
    elsewhere = {"--help", "--cap-add"}  # of every command, and of docker
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", f"{entry.explanation} {entry.do}"))
    assert named - flags - elsewhere == set()


# -- commands ------------------------------------------------------------------------------------------------

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("ZML_", "_ZML"))]:
        monkeypatch.delenv(name)

    def called(*args: str) -> tuple[int, str, str]:
        code = cli.run(args)
        out, err = capsys.readouterr()
        return code, out, err

    return called


def a_run(folder: Path, name: str, *members: str) -> Path:
    run = folder / "runs" / name
    (run / rundir.LOGS).mkdir(parents=True)
    (run / rundir.CONFIG).write_text("{}")
    for member in members:
        (run / rundir.LOGS / f"{member}.jsonl").touch()
    return run


def test_explain_says_what_to_do(call: Call) -> None:
    code, out, _ = call("explain", "E241")
    assert code == 0 and "\n\nWhat to do: Install py-spy" in out
    assert all(len(line) <= 80 for line in out.splitlines())
    told = json.loads(call("explain", "241", "--json")[1])
    assert told["code"] == NO_STACK and told["do"] == errors.BOOK[NO_STACK].do


@pytest.mark.parametrize(
    ("args", "fix"),
    [
        (["stauts"], "Did you mean `zml status`?"),
        (["STATUS"], "Did you mean `zml status`?"),
        (["dcotor"], "Did you mean `zml doctor`?"),
        (["train.py"], "`zml run train.py` trains it. `zml --help` lists what there is."),
        (["audit"], "Did you mean `zml data audit`?"),
        (["data", "adit"], "Did you mean `zml data audit`?"),
        (["ckpt", "lst"], "Did you mean `zml ckpt list`?"),
        (["server"], "Did you mean `zml ps`?"),
        (["train"], "Did you mean `zml run`?"),
        (["qqqqqq"], "`zml --help` lists what there is."),
        (["run", "--workres", "2", "x.py"], "Did you mean --workers?"),
        (["run", "--lr", "0.1", "x.py"], "Arguments of your script go after it: `zml run x.py --lr 0.1`."),
        (["run", "--lr=0.1", "x.py", "-v"], "Arguments of your script go after it: `zml run x.py --lr=0.1`."),
        (
            ["run", "--fast", "-w", "2", "x.py"],
            "Arguments of your script go after it: `zml run x.py --fast`.",
        ),
        (["run", "--fast"], "`zml run --help` lists what there is."),
        (["doctor", "--clustre"], "Did you mean --cluster?"),
        (["status", "--shard", "2"], "It is a flag of `zml ps` and of `zml logs`."),
        (["coordinator", "--qqqq"], "`zml coordinator --help` lists what there is."),
        (["completion", "tcsh"], "`zml completion --help` says more."),
        (["doctor", "runs/x"], "Add --cluster, or leave it out."),
        (["explain", "E999"], "`zml explain` lists all of them."),
    ],
)
def test_what_is_mistyped_is_understood(call: Call, args: list[str], fix: str) -> None:
    code, out, err = call(*args)
    assert (code, out) == (2, "")
    first, second = err.splitlines()
    assert first.startswith("error: ") and first.endswith(f"[{USAGE}]") and "mean" not in first
    assert second == f"  {fix}"


@pytest.mark.parametrize("line", ["doctor --cluster", "stack w0", "status", "resume", "data audit"])
def test_a_run_that_does_not_exist_names_the_nearest(tmp_path: Path, call: Call, line: str) -> None:
    args = line.split()
    assert call(*args, "nowhere")[2].splitlines()[1] == f"  {LIST}"
    a_run(tmp_path, "2026-03-01T12-30-00-train-1a2b")
    a_run(tmp_path, "2026-03-02T12-30-00-other-3c4d")
    for wrong in ("2026-03-01T12-30-00-train-1a2c", "1a2c"):
        code, _, err = call(*args, wrong)
        assert code == 2
        assert err.splitlines()[1] == "  Did you mean 2026-03-01T12-30-00-train-1a2b?"
    assert call(*args, "qqqqqqq")[2].splitlines()[1] == f"  {LIST}"


def test_a_run_is_found_by_its_path_or_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = a_run(tmp_path, "one")
    (run / rundir.COORDINATOR).write_text('{"addresses": ["tcp://10.0.0.1:7"], "pid": 1, "job": "j"}')
    aim = take("one", {})
    assert (aim.settings.coordinator, aim.settings.job, aim.folder) == (
        ("tcp://10.0.0.1:7",),
        "j",
        Path("runs/one"),
    )


def test_a_run_that_is_over_is_not_asked(tmp_path: Path, call: Call) -> None:
    run = a_run(tmp_path, "one")
    assert "has not begun" in call("doctor", "--cluster", "one")[2]
    (run / rundir.STATUS).write_text('{"job": "j", "state": "SUCCEEDED", "exit_code": 0}')
    for args in (["doctor", "--cluster", "one"], ["stack", "w0", "one"]):
        code, _, err = call(*args)
        assert code == 2
        assert err == (
            f"error: runs/one is over: succeeded [{USAGE}]\n  `zml status runs/one` shows how it ended.\n"
        )


def test_a_member_that_does_not_exist_names_the_nearest(tmp_path: Path, call: Call) -> None:
    run = a_run(tmp_path, "one")
    members = [{"member": name, "role": "worker", "state": "active"} for name in ("w0", "w1", "w12", "p0")]
    (run / rundir.NOW).write_text(json.dumps({"job": "j", "state": "RUNNING", "members": members}))
    for wrong, fix in (("w13", "Did you mean w1?"), ("x", "There are p0, w0, w1, w12.")):
        code, _, err = call("stack", wrong, "one")
        assert (code, err) == (2, f"error: there is no member {wrong} [{USAGE}]\n  {fix}\n")


def test_a_member_is_meant_by_its_number_too() -> None:
    there = ["w0", "w3", "p3"]
    assert [guess.member(word, there) for word in ("w3", "W3", "3", "p3", "w9", "4")] == [
        "w3", "w3", "w3", "p3", None, None,
    ]  # fmt: skip


# -- completion ----------------------------------------------------------------------------------------------


PROGRAM = """
import json, sys
from click.shell_completion import BashComplete
from zml.commands import cli, completion

completion.teach(cli.main)
shell = BashComplete(cli.main, {}, "zml", "_ZML_COMPLETE")
found = []
for line in json.loads(sys.argv[1]):
    *words, last = line.split(" ")[1:]
    found.append([[each.type, each.value] for each in shell.get_completions(words, last)])
heavy = {"torch", "numpy", "zmq", "uvloop"} & set(sys.modules)
print(json.dumps([found, sorted(heavy)]))
"""


def test_runs_members_and_files_are_completed_without_loading_anything_heavy(tmp_path: Path) -> None:
    a_run(tmp_path, "2026-03-01-a", "w0", "w10", "w2", "p0", "coordinator", "run", "w0.script")
    a_run(tmp_path, "2026-03-02-b", "w5")
    runs = ["runs/2026-03-02-b", "runs/2026-03-01-a"]
    lines: dict[str, list[str]] = {
        "zml doctor --cluster ": runs,
        "zml stack w0 ": runs,
        "zml stack w0 runs/2026-03-01": runs[1:],
        "zml stack ": ["w5"],
        "zml timeline runs/2026-03-01-a --worker ": ["coordinator", "p0", "w0", "w2", "w10"],
        "zml run ": ["file "],
        "zml worker --keys ": ["dir "],
        "zml sta": ["status", "stack"],
        "zml completion ": ["bash", "zsh", "fish"],
        "zml explain E24": ["E241"],
        "zml job show ": [],  # nobody answers, and that is no error
    }
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("ZML_", "_ZML"))}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(list(lines))],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT), "ZML_SERVER": "127.0.0.1:1"},
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    found, heavy = json.loads(ended.stdout)
    offered = [[value if kind == "plain" else f"{kind} {value}" for kind, value in each] for each in found]
    assert dict(zip(lines, offered, strict=True)) == lines
    assert heavy == []


def test_every_shell_gets_a_script_that_asks_zml() -> None:
    for shell in completion.SHELLS:
        text = completion.source(shell, cli.main)
        assert f"{completion.VARIABLE}={shell}_complete" in text and text.endswith("\n")
    checked = subprocess.run(["bash", "-n"], input=completion.source("bash", cli.main), text=True)
    assert checked.returncode == 0


def test_a_proposal_that_cannot_be_made_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(context: click.Context) -> list[tuple[str, str]]:
        raise OSError("no disk")

    offers = completion.Offers(fails)
    assert offers.shell_complete(click.Context(cli.main), click.Argument(["run"]), "") == []
    assert BashComplete(cli.main, {}, "zml", completion.VARIABLE).get_completions([], "compl")[0].value == (
        "completion"
    )
