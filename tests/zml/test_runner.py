"""A script under `zml.agent.runner` behaves as under plain python; what it adds is the account of a failure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from zml.agent import runner
from zml.messages import Failure

ROOT = Path(__file__).resolve().parents[2]
Ended = subprocess.CompletedProcess[str]


def run(script: Path | str, *args: str, cwd: Path, plain: bool = False, failure: Path | None = None) -> Ended:
    command = [sys.executable, str(script), *args] if plain else runner.command(str(script), args)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if failure is not None:
        environment["ZML_FAILURE"] = str(failure)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def told(path: Path) -> Failure:
    return msgspec.json.decode(path.read_bytes(), type=Failure)


def script(folder: Path, text: str, name: str = "train.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


SELF = """
import json, sys, __main__
import beside
if __name__ == "__main__":
    print(json.dumps({
        "argv": sys.argv, "path0": sys.path[0], "file": __file__, "main": __main__.__dict__ is globals(),
        "beside": beside.NAME, "spec": __spec__, "doc": __doc__, "names": sorted(globals()),
    }))
"""


@pytest.mark.parametrize("relative", ["project/train.py", "./project/../project/train.py"])
def test_a_script_sees_what_it_sees_under_plain_python(tmp_path: Path, relative: str) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    script(folder, SELF)
    script(folder, "NAME = 'mine'", "beside.py")
    here = run(relative, "--lr", "0.1", cwd=tmp_path)
    plain = run(relative, "--lr", "0.1", cwd=tmp_path, plain=True)
    assert here.returncode == plain.returncode == 0
    assert json.loads(here.stdout) == json.loads(plain.stdout)
    assert json.loads(here.stdout)["argv"] == [relative, "--lr", "0.1"]
    assert not (folder / "__pycache__" / "train.cpython-311.pyc").exists()


def test_modules_of_the_working_folder_do_not_shadow_ours(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    script(tmp_path, "raise RuntimeError('not me')", "msgspec.py")
    script(tmp_path, "raise RuntimeError('not me')", "traceback.py")
    path = script(tmp_path / "project", "print('ran')")
    assert run(path, cwd=tmp_path).stdout == "ran\n"


def test_a_users_scheduler_and_transport_are_the_users(tmp_path: Path) -> None:
    script(tmp_path, "WHOSE = 'user'", "scheduler.py")
    script(tmp_path, "WHOSE = 'user'", "transport.py")
    path = script(
        tmp_path, "import scheduler, transport, zml.errors; print(scheduler.WHOSE, transport.WHOSE)"
    )
    assert run(path, cwd=tmp_path).stdout == "user user\n"


@pytest.mark.parametrize(
    "ending",
    ["import sys; sys.exit()", "import sys; sys.exit(3)", "import sys; sys.exit('text')", "exit(0)", "1 + 1"],
)
def test_it_ends_as_under_plain_python(tmp_path: Path, ending: str) -> None:
    path = script(tmp_path, ending)
    failure = tmp_path / "failure.json"
    here, plain = run(path, cwd=tmp_path, failure=failure), run(path, cwd=tmp_path, plain=True)
    assert (here.returncode, here.stdout, here.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert not failure.exists()


FAILS = """\
import helper

SECRET = "patient 4711"


def step(n):
    if n == 3:
        helper.check(n)
    return n


for n in range(5):
    step(n)
"""


def test_a_failure_names_the_users_innermost_frame_with_its_source(tmp_path: Path) -> None:
    path = script(tmp_path, FAILS)
    script(
        tmp_path,
        "import json\n\ndef check(n):\n    patient = 'row 12'\n    json.loads('{bad')\n",
        "helper.py",
    )
    failure = tmp_path / "failure.json"
    ended = run(path, cwd=tmp_path, failure=failure)
    assert ended.returncode == 1
    account = told(failure)
    assert account.kind == "JSONDecodeError"
    assert account.text.startswith("Expecting property name")
    assert Path(account.file).name == "helper.py"  # not json/decoder.py, where it was raised
    assert account.line == 5
    assert account.source == ["def check(n):", "    patient = 'row 12'", "    json.loads('{bad')"]
    assert account.first_source_line == 3
    assert account.step == -1
    assert account.at > 1.7e9
    assert "patient 4711" not in failure.read_text()  # source lines, but no values of variables


def test_the_traceback_is_pythons_own_without_the_launchers_frames(tmp_path: Path) -> None:
    path = script(tmp_path, FAILS)
    script(tmp_path, "def check(n):\n    raise ValueError(f'no {n}') from KeyError('cause')\n", "helper.py")
    here, plain = run(path, cwd=tmp_path), run(path, cwd=tmp_path, plain=True)
    assert here.stderr == plain.stderr
    assert "ValueError: no 3" in here.stderr


def test_a_syntax_error_is_a_failure_with_its_line(tmp_path: Path) -> None:
    path = script(tmp_path, "x = 1\nif x\n    pass\n")
    failure = tmp_path / "failure.json"
    here, plain = run(path, cwd=tmp_path, failure=failure), run(path, cwd=tmp_path, plain=True)
    assert (here.returncode, here.stderr) == (1, plain.stderr)
    account = told(failure)
    assert (account.kind, account.text, account.line) == ("SyntaxError", "expected ':'", 2)
    assert account.source == ["x = 1", "if x", "    pass"]


def test_the_runtimes_clock_is_in_the_account(tmp_path: Path) -> None:
    path = script(
        tmp_path, "import zml.agent.runner\nzml.agent.runner.current_step = lambda: 17\nraise ValueError\n"
    )
    failure = tmp_path / "failure.json"
    assert run(path, cwd=tmp_path, failure=failure).returncode == 1
    assert told(failure).step == 17


def test_the_scripts_own_excepthook_is_used(tmp_path: Path) -> None:
    path = script(
        tmp_path, "import sys\nsys.excepthook = lambda *what: print('hook', what[0].__name__)\n1 / 0\n"
    )
    ended = run(path, cwd=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "hook ZeroDivisionError\n", "")


def test_a_huge_message_still_fits_a_header(tmp_path: Path) -> None:
    line = "x = '" + "é" * 3000 + "'"
    path = script(tmp_path, f"{line}\n{line}\nraise ValueError(x * 1000); {line}\n{line}\n{line}\n")
    failure = tmp_path / "failure.json"
    assert run(path, cwd=tmp_path, failure=failure).returncode == 1
    account = told(failure)
    assert account.text.endswith("é…")
    assert len(msgspec.msgpack.encode(account)) < 3000


def test_a_missing_script_is_told_and_costs_no_traceback(tmp_path: Path) -> None:
    failure = tmp_path / "failure.json"
    ended = run("nowhere.py", cwd=tmp_path, failure=failure)
    assert (ended.returncode, ended.stderr) == (
        2,
        "error: there is no script nowhere.py: No such file or directory\n",
    )
    assert told(failure).kind == "ZML-E103"


def test_ctrl_c_ends_with_130_and_no_traceback(tmp_path: Path) -> None:
    path = script(
        tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n[0 for _ in range(10**9)]\n"
    )
    ended = run(path, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (130, "")


def test_printed_lines_leave_at_once(tmp_path: Path) -> None:
    """A pipe would otherwise hold them back until it has 8 KB: os._exit shows what had left before."""
    path = script(tmp_path, "import os\nprint('step 1')\nos._exit(9)\n")
    assert run(path, cwd=tmp_path).stdout == "step 1\n"


def test_worker_processes_of_a_script_find_its_functions(tmp_path: Path) -> None:
    """As a DataLoader with num_workers does under the start method "spawn"."""
    text = """
import multiprocessing
def double(x):
    return 2 * x
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(double, [1, 2]))
"""
    ended = run(script(tmp_path, text), cwd=tmp_path)
    assert (ended.stdout, ended.returncode) == ("[2, 4]\n", 0), ended.stderr


def test_an_error_of_ours_ends_in_the_line_of_the_script_that_met_it(tmp_path: Path) -> None:
    done = run(script(tmp_path, "import zml\n\nzml.save('model.safetensors')\n"), cwd=tmp_path)
    assert done.returncode == 1
    assert 'train.py", line 3' in done.stderr and "ZML-E501" in done.stderr
    assert "script.py" not in done.stderr, "where zml noticed it is of no use to the reader"
