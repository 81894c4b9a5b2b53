"""What zml.slurm decides without asking Slurm: who runs where, what a step is told, what the script says, what
follows."""

import json
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from zml.commands.cli import main
from zml.errors import ALLOCATION, EX_TEMPFAIL, ZmlError
from zml.slurm import address, commands, hostlist, role, step
from zml.slurm.folder import JobFolder, job_name, running_job
from zml.slurm.head import START_S, is_silent
from zml.slurm.shape import COORDINATOR, Needs, Shape, another_place, megabytes, node_range
from zml.slurm.verdict import FRUITLESS_MOST, End, Exit, Requeue, verdict

ONE = Needs(cpus=2, memory_mb=4096, gpus=1)
SHARD = Needs(cpus=1, memory_mb=2048)


def shape(workers: int, shards: int, per_node: int = 0) -> Shape:
    return Shape(workers=workers, shards=shards, worker=ONE, shard=SHARD, workers_per_node=per_node)


# -- who runs where ------------------------------------------------------------------------------------------


def test_members_are_dealt_in_a_ring_and_the_first_shard_is_not_beside_the_coordinator() -> None:
    assert shape(3, 2).placed(["a", "b", "c"]) == {
        "coordinator": "a",
        "p0": "b",
        "p1": "c",
        "w0": "a",
        "w1": "b",
        "w2": "c",
    }


@given(workers=st.integers(1, 40), shards=st.integers(1, 12), nodes=st.integers(1, 12))
def test_every_node_is_asked_for_what_the_fullest_one_needs(workers: int, shards: int, nodes: int) -> None:
    wanted, names = shape(workers, shards), [f"n{number}" for number in range(nodes)]
    each, places = wanted.per_node(nodes), wanted.placed(names)
    assert len(places) == 1 + workers + shards
    counts = Counter(node for member, node in places.items() if member != COORDINATOR)
    assert max(counts.values()) - min(counts.get(name, 0) for name in names) <= 1
    for name in names:
        here = [wanted.needs(member) for member, node in places.items() if node == name]
        cpus = sum(needs.cpus for needs in here) - (1 if name == names[0] else 0)  # the coordinator shares
        assert cpus <= each.cpus
        assert sum(needs.memory_mb for needs in here) <= each.memory_mb
        assert sum(needs.gpus for needs in here) <= each.gpus


def test_workers_per_node_are_as_many_as_the_nodes_that_came() -> None:
    assert shape(1, 1, per_node=2).workers_on(3) == 6
    assert sum(member.startswith("w") for member in shape(1, 1, per_node=2).placed(["a", "b", "c"])) == 6


def test_a_shard_moves_to_the_emptiest_node_that_is_left() -> None:
    places = {"coordinator": "a", "p0": "b", "w0": "a", "w1": "c"}
    assert another_place("p0", places, ["a", "c", "d"], "b") == "d"
    assert another_place("p0", places, ["a", "b", "c"], "b") == "c"
    assert another_place("p0", places, ["b"], "b") is None


@pytest.mark.parametrize(("text", "found"), [("4", (4, 4)), ("2-4", (2, 4))])
def test_nodes_are_a_number_or_a_range(text: str, found: tuple[int, int]) -> None:
    assert node_range(text) == found


@pytest.mark.parametrize("text", ["", "0", "4-2", "-1", "2-", "-", "two", "1-2-3"])
def test_other_numbers_of_nodes_are_refused(text: str) -> None:
    with pytest.raises(ZmlError, match="no number of nodes"):
        node_range(text)


def test_memory_is_written_as_slurm_writes_it() -> None:
    assert [megabytes(text, "--mem") for text in ("512M", "4G", "1.5g", "2048K", "300")] == [
        512,
        4096,
        1536,
        2,
        300,
    ]
    for text in ("", "G", "0", "-1G", "inf", "nanG", "4 apples"):
        with pytest.raises(ZmlError, match="no amount of memory"):
            megabytes(text, "--mem")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("n[1-3,7],login-a", ["n1", "n2", "n3", "n7", "login-a"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("r[1-2]n[1-2]x", ["r1n1x", "r1n2x", "r2n1x", "r2n2x"]),
    ],
)
def test_names_of_nodes_are_taken_apart_as_slurm_does(text: str, found: list[str]) -> None:
    assert hostlist.names(text) == found


@pytest.mark.parametrize(
    "text", ["n[", "n]", "n[1", "n[a]", "n[3-1]", "n1,", ",n1", "n[1-]", "n[1-999999999]", "a b"]
)
def test_what_is_no_list_of_nodes_is_refused(text: str) -> None:
    with pytest.raises(ZmlError, match="no list of nodes"):
        hostlist.names(text)


@given(st.text(alphabet="n0123456789[],- ", max_size=20))
def test_any_text_is_a_list_of_nodes_or_refused(text: str) -> None:
    try:
        assert all(name for name in hostlist.names(text))
    except ZmlError as refused:
        assert refused.code == "ZML-E101"


# -- a step --------------------------------------------------------------------------------------------------


def test_a_step_says_its_memory_and_shares_nothing_until_it_replaces_a_dead_one() -> None:
    first = step.command("w1", "n2", ONE, ["role"], more=["--container-image=x.sqsh"])
    assert first[0] == "srun" and first[-2:] == ["--container-image=x.sqsh", "role"]
    wanted = {"--exact", "--mem=4096M", "--gres=gpu:1", "--nodelist=n2", "--kill-on-bad-exit=0", "--no-kill"}
    assert wanted <= set(first)
    again = step.command("p0", "n2", SHARD, ["role"], again=True)
    assert "--overlap" in again and "--exact" not in again and "--gres=none" in again
    assert "--overlap" in step.command("coordinator", "n1", SHARD, ["role"])


def test_a_step_does_not_inherit_what_the_batch_script_was_given() -> None:
    batch = {
        "SLURM_JOB_ID": "7",
        "SLURM_CONF": "/x",
        "SLURM_MEM_PER_NODE": "3000",
        "SLURM_NTASKS": "4",
        "SLURM_GPUS_PER_NODE": "2",
        "SLURM_TASKS_PER_NODE": "1(x4)",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "ZML_PARENT": "12",
        "PATH": "/bin",
    }
    assert step.environment(batch) == {"SLURM_JOB_ID": "7", "SLURM_CONF": "/x", "PATH": "/bin"}


# -- the script ----------------------------------------------------------------------------------------------


def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> Result:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    return CliRunner().invoke(main, ["slurm", "script", "--python", "python", *words])


def test_the_script_has_what_was_asked_for_and_bash_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = "-N 2-4 -w 4 -p 2 --gpus-per-worker 1 --time 1:00:00 --partition gpu --staleness 2"
    more = ["--sbatch=--comment=why not", "--container-image", "my img.sqsh", "--setup", "module load cuda"]
    done = script(tmp_path, monkeypatch, *asked.split(), *more, "train.py", "--name", "it's $HOME", "-w", "9")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    said = {line.partition(" #")[0].rstrip() for line in lines if line.startswith("#SBATCH")}
    assert said >= {
        "#SBATCH --nodes=2-4",
        "#SBATCH --gpus-per-node=2",  # with 2 nodes; more are no trouble
        "#SBATCH --cpus-per-task=5",
        "#SBATCH --mem=13312M",  # two workers, a shard, and the coordinator
        "#SBATCH --time=1:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --comment='why not'",
        "#SBATCH --signal=B:TERM@120",
        "#SBATCH --requeue",
    }
    assert "module load cuda" in lines
    subprocess.run(["bash", "-n"], input=done.output, text=True, check=True)
    command = done.output.partition("exec ")[2].replace("\\\n", " ")
    words = shlex.split(command)
    assert words[:6] == ["python", "-P", "-m", "zml", "slurm", "head"]
    assert words[words.index("--") + 1 :] == ["train.py", "--name", "it's $HOME", "-w", "9"]
    assert "--srun=--container-image=my img.sqsh" in words
    assert words[words.index("--staleness") + 1] == "2"
    assert "--partition" not in words and "--time" not in words


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "no script"),
        (["nowhere.py"], "does not exist"),
        (["-N", "none", "train.py"], "no number of nodes"),
        (["--gpus-per-worker", "2", "train.py"], "one GPU"),
        (["-w", "2", "--workers-per-node", "2", "train.py"], "exclude each other"),
        (["--mem-per-worker", "lots", "train.py"], "no amount of memory"),
        (["--join", "runs/slurm-1", "train.py"], "Leave the script out"),
        (["--sync", "--async", "train.py"], "exclude each other"),
        (["--sbatch", "-x y", "train.py"], "no long option"),
        (["--partition", "a\n#SBATCH --uid=0", "train.py"], "line end"),
        (["train.py", "two\nlines"], "line end"),
    ],
)
def test_what_cannot_be_is_said_before_it_waits_in_a_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], complaint: str
) -> None:
    done = script(tmp_path, monkeypatch, *words)
    assert isinstance(done.exception, ZmlError)
    assert complaint in f"{done.exception.what} {done.exception.fix}"


def test_submit_answers_programs_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("print(1)")
    monkeypatch.setattr("zml.slurm.commands.submit", lambda text: "17")
    done = CliRunner().invoke(main, ["slurm", "submit", "--json", "train.py"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"id": "17", "log": "train-17.out", "run_dir": "runs/slurm-17"}
    done = CliRunner().invoke(main, ["slurm", "submit", "--json", "--join", "runs/slurm-17", "-w", "4"])
    assert json.loads(done.stdout)["run_dir"] == "runs/slurm-17"


def test_without_slurm_submit_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    monkeypatch.setenv("PATH", str(tmp_path))
    done = CliRunner().invoke(main, ["slurm", "submit", "train.py"])
    assert isinstance(done.exception, ZmlError)
    assert done.exception.code == "ZML-E231" and "no command sbatch" in done.exception.what


def test_what_sbatch_complains_of_is_one_line() -> None:
    text = (
        "sbatch: error: invalid partition specified: nowhere\n"
        "sbatch: error: Batch job submission failed: Invalid partition name specified\n"
    )
    assert commands.said(text) == (
        "invalid partition specified: nowhere; Batch job submission failed: Invalid partition name specified"
    )


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "examples/slurm").glob("*.sbatch")), ids=lambda f: f.name
)
def test_an_example_is_what_the_command_on_its_first_lines_prints(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made again, so that examples and command do not part."""
    monkeypatch.chdir(file.parents[2])
    lines = file.read_text().splitlines(keepends=True)
    said = [line for line in lines if not line.startswith("##")]
    command = "".join(
        line.removeprefix("##").replace("\\\n", " ") for line in lines if line.startswith("##  ")
    )
    words = shlex.split(command)
    assert words[:3] == ["zml", "slurm", "script"]
    done = CliRunner().invoke(main, words[1:])
    assert done.exit_code == 0, done.exception
    assert "".join(said) == done.output


# -- which address -------------------------------------------------------------------------------------------


def test_the_loopback_is_taken_only_where_slurm_says_so_or_there_is_one_node() -> None:
    assert address.choose([("NodeAddr", "127.0.1.1"), ("n1", "10.0.0.4")], 4) == "10.0.0.4"
    assert address.choose([("NodeAddr", "127.0.0.1")], 4) == "127.0.0.1"
    assert address.choose([("n1", "127.0.1.1")], 1) == "127.0.1.1"
    with pytest.raises(ZmlError, match="no address that the other nodes could reach") as refused:
        address.choose([("n1", "127.0.1.1")], 2)
    assert refused.value.code == ALLOCATION and "--interface" in refused.value.fix
    with pytest.raises(ZmlError, match="no name of it resolves"):
        address.choose([], 2)


def test_an_interface_has_an_address_or_the_others_are_named() -> None:
    assert address.of_interface("lo") == "127.0.0.1"
    with pytest.raises(ZmlError, match="no network interface ib7") as refused:
        address.of_interface("ib7")
    assert "lo" in refused.value.fix
    assert address.towards("127.0.0.1") == "127.0.0.1"
    assert address.resolve("no-such-node.invalid") == []


# -- the role ------------------------------------------------------------------------------------------------


def test_a_role_fills_in_what_only_its_node_knows(tmp_path: Path) -> None:
    argv = ["--gpu", str(tmp_path), "tcp://127.0.0.1:7", "--", "worker", "--bind", "tcp://{here}:0"]
    orders = role.understand(argv)
    found = role.arguments(orders, {"CUDA_VISIBLE_DEVICES": "3"})
    assert found == ["worker", "--gpu", "3", "--bind", "tcp://127.0.0.1:0"]
    with pytest.raises(ZmlError, match="no GPU that has a number"):
        role.arguments(orders, {"CUDA_VISIBLE_DEVICES": "MIG-1"})
    with pytest.raises(ZmlError, match=r"n7 .* does not see"):
        role.arguments(role.understand(["/nowhere", "--", "ps"]), {"SLURMD_NODENAME": "n7"})


def test_a_job_without_its_batch_host_is_headless() -> None:
    assert role.is_headless({"BatchHost": "n1"}, ["n2", "n3"])
    assert not role.is_headless({"BatchHost": "n1"}, ["n1", "n3"])
    assert not role.is_headless({"BatchHost": "n1"}, [])  # Slurm has not said
    assert not role.is_headless({}, ["n1"])


def test_a_silent_shard_is_replaced_once_and_then_has_time_to_start() -> None:
    assert not is_silent("p0", 0.0, 100.0, 100.5)
    assert is_silent("p0", 0.0, 100.0, 101.0)
    assert not is_silent("p0", 101.0, 100.0, 110.0)  # the one in its place
    assert is_silent("p0", 101.0, 100.0, 101.0 + START_S)
    assert not is_silent(
        "w0", 0.0, 100.0, 900.0
    )  # an agent comes back by itself, or srun says that it does not


# -- the job's folder ----------------------------------------------------------------------------------------


def test_an_arrays_task_is_named_alone() -> None:
    assert job_name({"SLURM_JOB_ID": "12"}) == "12"
    task = {"SLURM_JOB_ID": "10", "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "3"}
    assert job_name(task) == "10_3"  # 10 alone would be all tasks
    with pytest.raises(ZmlError, match="no allocation"):
        job_name({})


def test_attempts_follow_each_other_and_keys_stay(tmp_path: Path) -> None:
    folder = JobFolder.of(tmp_path, {"SLURM_JOB_ID": "5"})
    folder.make()
    keys = (folder.keys / "coordinator.key").read_bytes()
    assert (folder.path.name, folder.keys.stat().st_mode & 0o777) == ("slurm-5", 0o700)
    assert folder.ended() is None and folder.resume_from(print) is None and folder.fruitless() == 0
    for number in range(11):
        run = folder.next_attempt()
        assert run.name == f"attempt-{number}"
        run.mkdir()
        (run / "config.json").write_text("{}")
        folder.point_at(run)
    assert folder.attempts()[-1].name == "attempt-10" and folder.fruitless() == 11
    assert running_job(folder.path) == (folder.path / "attempt-10", folder.keys)
    assert running_job(folder.path / "attempt-2") == (folder.path / "attempt-2", folder.keys)
    again = JobFolder.of(tmp_path, {"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "1"})
    again.make()
    assert again.path == folder.path and (again.keys / "coordinator.key").read_bytes() == keys


def test_a_cluster_that_counts_from_one_again_mixes_no_jobs(tmp_path: Path) -> None:
    first = JobFolder.of(tmp_path, {"SLURM_JOB_ID": "5"})
    first.make()
    second = JobFolder.of(tmp_path, {"SLURM_JOB_ID": "5"})
    second.make()
    assert (first.path.name, second.path.name) == ("slurm-5", "slurm-5.2")
    assert JobFolder.of(tmp_path, {"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "2"}).path == second.path


# -- what follows --------------------------------------------------------------------------------------------


def end(code: int, *, lost: bool = False, fruitless: int = 0, state: str = "RUNNING") -> End:
    return End(code, lost, fruitless, state)


def test_only_what_can_help_is_run_again() -> None:
    for code in (0, 1, 2, 3, 5, 7, 130, 143):
        assert verdict(end(code, lost=True), may_requeue=True) == Exit(code)
    assert verdict(end(EX_TEMPFAIL), may_requeue=True) == Requeue(75, "it was told to go")
    assert verdict(end(4, lost=True), may_requeue=True) == Requeue(4, "it has lost nodes that it needs")
    assert verdict(end(4), may_requeue=True) == Exit(4)
    assert isinstance(verdict(end(EX_TEMPFAIL), may_requeue=False), Exit)
    assert isinstance(verdict(end(EX_TEMPFAIL, state=""), may_requeue=True), Requeue)


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED", "PENDING", "TIMEOUT"])
def test_what_slurm_is_ending_already_is_left_to_slurm(state: str) -> None:
    follows = verdict(end(EX_TEMPFAIL, state=state), may_requeue=True)
    assert isinstance(follows, Exit) and follows.code == 75 and state in follows.because


def test_a_job_that_never_comes_to_a_checkpoint_is_not_requeued_for_ever() -> None:
    assert isinstance(verdict(end(75, fruitless=FRUITLESS_MOST - 1), may_requeue=True), Requeue)
    follows = verdict(end(75, fruitless=FRUITLESS_MOST), may_requeue=True)
    assert isinstance(follows, Exit) and "checkpoint" in follows.because
