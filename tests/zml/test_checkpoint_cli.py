"""`zml ckpt`: what it says and how it ends; and what `diff` and `export` make of checkpoints."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.zml.checkpoints import Chunks, make, numbers, registration
from zml.checkpoint import Difference, Skipped, diff, export, read
from zml.checkpoint.exporting import split
from zml.commands import cli
from zml.commands.ckpt import job_lines
from zml.config import Settings, resolve
from zml.coordinator.checkpoints import describe_job
from zml.coordinator.coordinating import beginning
from zml.coordinator.facts import Noted
from zml.errors import DISK_FULL, ZmlError
from zml.launch import local
from zml.layout import Layout, Registration
from zml.messages import JobSpec
from zml.rates import Course
from zml.scheduler.batches import Ledger
from zml.shard.optim import OptimizerSpec, UpdateRule


class Called(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[list[str]]:
        return [line.split() for line in self.out.splitlines()]


Call = Callable[..., Called]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`zml ckpt` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("ZML_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_COLOR", "1")

    def called(*args: str | Path) -> Called:
        code = cli.run(["ckpt", *map(str, args)])
        return Called(code, *capsys.readouterr())

    return called


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Of the newest of two runs; it has three checkpoints, of which the last is damaged."""
    for name in ("2026-01-01-old", "2026-01-02-new"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text("{}")
    root = tmp_path / "runs" / "2026-01-02-new" / "checkpoints"
    for step in (100, 200, 300):
        make(root, step)
    damage(root / "step-000000300" / "shard-0001.safetensors")
    return root


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


# -- commands ------------------------------------------------------------------------------------------------


def test_list_shows_every_checkpoint_of_the_newest_run(call: Call, root: Path) -> None:
    os.truncate(root / "step-000000200" / "job.json", 0)
    found = call("list")
    assert (found.code, found.err) == (0, "")
    assert found.lines[0] == ["checkpoint", "step", "epoch", "created", "because", "size", "state"]
    assert found.lines[1][:3] == ["step-000000100", "100", "2"]
    assert (
        found.out.splitlines()[1]
        .split("2  2026")[1]
        .startswith("-02-02 02:40 UTC  at step 100  2.08 kB  sizes right")
    )
    assert (
        found.out.splitlines()[2].split(maxsplit=1)[1].strip()
        == "job.json has 0 bytes, the manifest lists 64"
    )
    assert found.lines[3][0] == "step-000000300" and len(found.lines) == 4


def test_list_for_machines_says_the_same(call: Call, root: Path) -> None:
    (root / "step-000000200" / "MANIFEST.json").unlink()
    found = json.loads(call("list", "--json", root.parent).out)
    assert [each["name"] for each in found] == ["step-000000100", "step-000000200", "step-000000300"]
    assert found[1] == {
        "name": "step-000000200",
        "path": str(root / "step-000000200"),
        "wrong": "MANIFEST.json is missing",
    }
    assert found[0]["wrong"] is None and found[0]["because"] == "at step 100" and found[0]["bytes"] == 2_080


def test_list_loads_neither_torch_nor_numpy(root: Path) -> None:
    import subprocess
    import sys

    program = (
        "import sys; from zml.commands.cli import run; run(['ckpt', 'list', sys.argv[1]]);"
        " print(sorted(sys.modules))"
    )
    here = Path(__file__).resolve().parents[2]
    ended = subprocess.run(
        [sys.executable, "-P", "-c", program, root],
        env={**os.environ, "PYTHONPATH": str(here)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "step-000000100" in ended.stdout and "'xxhash'" in ended.stdout
    assert not any(f"'{name}'" in ended.stdout for name in ("torch", "numpy", "zmq", "numba"))


def test_verify_reads_every_byte_and_ends_with_1_if_one_is_wrong(call: Call, root: Path) -> None:
    found = call("verify", root)
    assert found.code == 1
    assert [line[-1] for line in found.lines[1:3]] == ["whole", "whole"]
    assert "shard-0001.safetensors has changed: its xxh3 is " in found.out
    said = json.loads(call("verify", "--json").out)
    assert [each["wrong"] is None for each in said] == [True, True, False]
    one = call("verify", root / "step-000000200")
    assert (one.code, len(one.lines)) == (0, 2)


def test_a_run_goes_on_from_the_newest_that_is_whole_and_says_what_it_skipped(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    about = {**resolve({}, {}).as_json(), "script": "train.py", "args": [], "folder": str(tmp_path)}
    (root.parent / "config.json").write_text(json.dumps(about))
    begun: list[str] = []
    monkeypatch.setattr(local, "run", lambda resolved, *more, **how: begun.append(resolved.settings.resume))
    assert cli.run(["resume", str(root.parent)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("skipped step-000000300: shard-0001.safetensors")
    assert said[1].startswith("resuming at step 200, in epoch 2")
    assert begun == [str(root / "step-000000200")]
    skipped: list[Skipped] = []
    found = beginning(str(root.parent), skipped.append, begun=False)
    assert found is not None and found.path.name == "step-000000200"
    assert [str(each) for each in skipped] == said[:1]


GIVEN_AGAIN = {
    "checkpoint_steps": ("--checkpoint-steps", 7),
    "checkpoint_minutes": ("--checkpoint-minutes", 2.5),
    "keep_last": ("--keep-last", 5),
    "keep_every_steps": ("--keep-every", 100),
    "keep_output": ("--keep-output", "all"),
    "worker_restarts": ("--worker-restarts", 9),
    "http": ("--http", "off"),
    "workers": ("-w", 2),
    "log_level": ("--log-level", "debug"),
}


def test_whatever_a_run_takes_it_takes_when_it_is_gone_on_with(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [{p.name for p in cli.main.commands[name].params} for name in ("run", "resume")]
    assert names[0] - names[1] == {"script", "args", "resume"} and names[1] - names[0] == {"run"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    about = {**resolve({}, {}).as_json(), "script": "train.py", "args": [], "folder": str(tmp_path)}
    (root.parent / "config.json").write_text(json.dumps(about))
    begun: list[Settings] = []
    monkeypatch.setattr(local, "run", lambda resolved, *more, **how: begun.append(resolved.settings))
    flags = [str(word) for flag in GIVEN_AGAIN.values() for word in flag]
    assert cli.run(["resume", str(root.parent), "--restart-on-error", *flags]) == 0
    assert begun[0].restart_on_error
    assert {name: getattr(begun[0], name) for name in GIVEN_AGAIN} == {
        name: value for name, (_, value) in GIVEN_AGAIN.items()
    }


def test_show_says_what_is_in_the_newest(call: Call, root: Path) -> None:
    (root / "step-000000300" / "MANIFEST.json").unlink()
    found = call("show")
    assert (found.code, found.err) == (0, "skipped step-000000300: MANIFEST.json is missing\n")
    for text in (
        "step        200, epoch 2",
        "model       26 elements in 4 parameters",
        "optimizer   AdamW, 2 groups; saved: w, exp_avg, exp_avg_sq, step, stepped",
        "job         clock 6, mode sync, workers 2, lr 0.1",
        "embed.weight  5 x 3           0",
        "scale         one number      1",
        "shard-0001.safetensors  556 B",
    ):
        assert text in found.out
    said = json.loads(call("show", "--json", root / "step-000000100").out)
    assert said["step"] == 100 and said["versions"] == [6, 6] and said["ledger"]["seed"] == 7
    assert said["tensors"][0] == {"name": "embed.weight", "shape": [5, 3], "group": 0, "frozen": False}
    assert said["files"].keys() == read(root / "step-000000100").manifest.files.keys()


def test_show_says_of_a_job_what_a_person_can_read() -> None:
    spec = JobSpec(
        script="train.py", args=["--lr", "0 1"], folder="/here", workers=3, shards=2, staleness=None
    )
    noted = Noted(4, bytes(300))
    described = describe_job(spec, 1200, Ledger(), noted, Course())
    assert dict(job_lines(described)) == {
        "script": "train.py --lr '0 1', in /here",
        "asked for": "3 workers, 2 shards, staleness async",
        "job": "steps 1200, epoch 0",
        "schedules": "as of epoch 4, 300 bytes",
    }
    scaled = describe_job(JobSpec(lr_scaling="linear"), 1, Ledger(), None, Course(factor=1.5))
    assert dict(job_lines(scaled)) == {
        "asked for": "1 worker, 1 shard, lr_scaling linear",
        "job": "steps 1, epoch 0",
        "rate": "x 1.5",
    }
    assert list(job_lines({})) == []
    assert dict(job_lines({"spec": 7, "note": "?", "steps": None})) == {"job": "steps None"}


def test_show_cuts_a_long_list_of_parameters_and_says_so(call: Call, tmp_path: Path) -> None:
    model = registration(described=[(f"layer{i}", (2,), 0) for i in range(50)])
    make(tmp_path / "checkpoints", 1, model=model, chunks=numbers(model))
    found = call("show", tmp_path)
    assert "layer39" in found.out and "layer40" not in found.out
    assert found.out.endswith("and 10 more; --all shows them\n")
    assert "layer49" in call("show", "--all", tmp_path).out


def test_a_damaged_or_missing_one_is_told_in_two_lines_with_exit_code_1(call: Call, root: Path) -> None:
    bad = root / "step-000000300"
    found = call("export", bad, "-o", "out")
    assert found.code == 1 and found.out == "" and not Path("out").exists()
    assert f"error: the checkpoint {bad} is not usable: shard-0001.safetensors has changed" in found.err
    assert "[ZML-E401]" in found.err and len(found.err.splitlines()) == 2
    for step in (100, 200):
        os.truncate(root / f"step-000000{step}" / "MANIFEST.json", 9)
    found = call("diff", root, root)
    assert found.code == 1 and "none of the 3 checkpoints in" in found.err and "[ZML-E402]" in found.err
    old = call("show", "runs/2026-01-01-old")
    assert old.code == 1 and "the run runs/2026-01-01-old has no checkpoint [ZML-E402]" in old.err


def test_a_question_that_makes_no_sense_ends_with_2(call: Call, root: Path, tmp_path: Path) -> None:
    questions: list[tuple[list[str | Path], str]] = [
        (["list", "nowhere"], "there is no run nowhere"),
        (["diff", root], "Missing argument 'B'"),
        (["prune", root / "step-000000100"], "step-000000100 is one checkpoint"),
        (["export", root, "-o", "out", "--split", "much"], "'much' is no size"),
        (["prune", "--keep-last", "0"], "Invalid value for '--keep-last'"),
    ]
    for args, text in questions:
        found = call(*args)
        assert found.code == 2 and text in found.err, args
    (tmp_path / "empty").mkdir()
    os.chdir(tmp_path / "empty")
    found = call("list")
    assert found.code == 2 and "there is no run below runs" in found.err


def test_help_lists_the_commands_in_their_order(call: Call) -> None:
    listed = call().out.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in listed] == ["list", "verify", "show", "diff", "export", "prune"]
    assert call("--help").out == call().out


def test_every_code_of_a_checkpoint_is_explained(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    for code in ("E401", "E402", "E403", "E404"):
        assert cli.run(["explain", code]) == 0
        assert "Exit code 5." in capsys.readouterr().out


def test_prune_deletes_the_old_and_keeps_the_newest_that_is_whole(call: Call, root: Path) -> None:
    make(root, 50)
    said = call("prune", "--keep-last", "1", "--dry-run")
    assert said.out.splitlines()[:2] == ["would delete step-000000050", "would delete step-000000100"]
    assert len(os.listdir(root)) == 5
    done = call("prune", "--keep-last", "1")
    assert done.out.splitlines()[:2] == ["deleted step-000000050", "deleted step-000000100"]
    assert done.out.splitlines()[2].startswith("2 checkpoints stay in ") and done.code == 0
    assert sorted(os.listdir(root)) == ["LATEST", "step-000000200", "step-000000300"]
    damage(root / "step-000000200" / "shard-0000.safetensors")
    found = call("prune", "--keep-last", "1")
    assert found.code == 1 and "none of the 2 checkpoints in" in found.err and len(os.listdir(root)) == 3


def test_prune_keeps_one_of_every_so_many_steps(call: Call, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (50, 120, 180, 230, 260, 310):
        make(root, step)
    assert call("prune", root, "--keep-last", "1", "--keep-every", "100").code == 0
    assert sorted(os.listdir(root)) == ["LATEST", *(f"step-{step:09}" for step in (120, 230, 310))]


# -- diff ----------------------------------------------------------------------------------------------------


def pair(tmp_path: Path, change: Callable[[Chunks], None]) -> list[Difference]:
    first, second = numbers(registration()), numbers(registration())
    change(second)
    a = read(make(tmp_path / "a" / "checkpoints", 1, chunks=first))
    return list(diff(a, read(make(tmp_path / "b" / "checkpoints", 1, chunks=second))))


def test_diff_measures_each_parameter_and_its_state(tmp_path: Path, call: Call) -> None:
    before = numbers(registration())

    def change(chunks: Chunks) -> None:
        chunks[1]["w"][0] += 0.5  # of embed.weight, which lies in chunks 0 and 1
        chunks[2]["exp_avg"][:] = 0
        chunks[3]["w"][2] = -0.0  # of scale
        before[3]["w"][2] = 0.0

    found = {(d.parameter, d.part): d for d in pair(tmp_path, change)}
    differ = sorted(key for key, d in found.items() if not d.equal)
    assert differ == [("body.weight", "exp_avg"), ("embed.weight", "w"), ("scale", "w")]
    changed = found["embed.weight", "w"]
    whole = np.concatenate([before[0]["w"], before[1]["w"][:7]]).astype(float)
    assert changed.elements == 15 and math.isclose(changed.largest, 0.5, rel_tol=1e-6)
    assert math.isclose(changed.relative, 0.5 / float(np.linalg.norm(whole)), rel_tol=1e-6)
    said = call("diff", "a", "b")
    assert said.code == 1 and len(said.lines) == 5
    assert said.out.endswith("of 4 parameters 2 differ, and the optimizer's state of 1\n")
    assert (
        call("diff", "a", "a").out
        == "all 4 parameters are equal to the bit, and so is the optimizer's state\n"
    )
    assert call("diff", "a", "a").code == 0
    everything = json.loads(call("diff", "--json", "a", "b").out)
    assert everything["equal"] is False and len(everything["differences"]) == len(found) == 12


def test_diff_tells_nan_from_numbers_and_says_null_to_machines(tmp_path: Path, call: Call) -> None:
    def change(chunks: Chunks) -> None:
        chunks[3]["w"][2] = np.nan

    found = {(d.parameter, d.part): d for d in pair(tmp_path, change)}
    assert math.isnan(found["scale", "w"].largest) and not found["scale", "w"].equal
    said = json.loads(call("diff", "--json", "a", "b").out)["differences"]
    assert [each["largest"] for each in said if not each["equal"]] == [None]


def test_diff_compares_by_name_whatever_the_chunks_are(tmp_path: Path) -> None:
    """Other chunks, other shards; a parameter more, one less, one of another shape."""
    described = [("scale", (), 1), ("embed.weight", (5, 3), 0), ("body.weight", (4, 2), 0), ("new", (3,), 0)]
    one, other = registration(), registration(4, described)
    first, second = numbers(one), numbers(other)
    slab = np.concatenate([first[i]["w"] for i in one.layout.groups[0].chunks])
    for chunk in other.layout.chunks:
        for segment in chunk.segments:
            at = slice(segment.offset, segment.offset + segment.size)
            if other.layout.parameters[segment.parameter].name == "embed.weight":
                second[chunk.index]["w"][at] = slab[segment.start : segment.start + segment.size]
    a = read(make(tmp_path / "a", 1, model=one, chunks=first))
    b = read(make(tmp_path / "b", 1, model=other, chunks=second, shards=3))
    found = {(d.parameter, d.part): d for d in diff(a, b)}
    assert found["embed.weight", "w"].equal and found["embed.weight", "step"].equal
    assert not found["embed.weight", "exp_avg"].equal
    assert {key[0]: d.only for key, d in found.items() if d.only and key[1] == "w"} == {
        "body.weight": "shape",
        "body.bias": "a",
        "new": "b",
    }


# -- export --------------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(40, 7)
        self.body = torch.nn.Linear(7, 9)
        self.norm = torch.nn.LayerNorm(9)
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.empty = torch.nn.Parameter(torch.zeros(0, 3))
        self.fixed = torch.nn.Parameter(torch.randn(5), requires_grad=False)


def trained(tmp_path: Path, seed: int = 0) -> tuple[Net, Path]:
    """A model and its checkpoint, with the state that the shards' own rule has after some steps."""
    torch.manual_seed(seed)
    net = Net()
    optimizer = torch.optim.Adam([each for each in net.parameters() if each.requires_grad])
    model = Registration(Layout.of(net, optimizer, 64), OptimizerSpec.of(optimizer))
    layout = model.layout
    parameters = dict(net.named_parameters())
    chunks: Chunks = {}
    for chunk in layout.chunks:
        w = torch.empty(chunk.size)
        for segment in chunk.segments:
            flat = parameters[layout.parameters[segment.parameter].name].detach().reshape(-1)
            w[segment.offset : segment.offset + segment.size] = flat[
                segment.start : segment.start + segment.size
            ]
        chunks[chunk.index] = {"w": w.numpy()}
    return net, make(tmp_path / "checkpoints", 5, model=model, chunks=chunks)


def test_export_loads_with_plain_torch_and_equals(tmp_path: Path, call: Call) -> None:
    from safetensors import safe_open

    net, path = trained(tmp_path)
    assert call("export", path, "-o", "out").lines == [["out/model.safetensors", "2.06", "kB"]]
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    fresh = Net()
    fresh.load_state_dict(loaded, strict=True)
    for name, parameter in net.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], parameter), name
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]


def test_export_above_the_limit_is_several_files_and_an_index(tmp_path: Path, call: Call) -> None:
    net, path = trained(tmp_path)
    found = call("export", path, "-o", "out", "--split", "0.3kB")
    names = [line[0].removeprefix("out/") for line in found.lines]
    assert (
        names[-1] == "model.safetensors.index.json"
        and names[0] == f"model-00001-of-0000{len(names) - 1}.safetensors"
    )
    assert sorted(names) == sorted(os.listdir(tmp_path / "out")) and len(names) > 3
    index = json.loads((tmp_path / "out" / names[-1]).read_text())
    assert index["metadata"] == {"total_size": sum(4 * each.numel() for each in net.parameters())}
    together: dict[str, torch.Tensor] = {}
    for name in names[:-1]:
        part = load_file(tmp_path / "out" / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == part.keys()
        together |= part
    fresh = Net()
    fresh.load_state_dict(together, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), net.parameters(), strict=True))


def test_export_into_one_file_and_never_over_another(tmp_path: Path, call: Call) -> None:
    _, path = trained(tmp_path)
    assert call("export", path, "-o", "deep/er/net.safetensors", "--split", "1").code == 0
    before = (tmp_path / "deep/er/net.safetensors").read_bytes()
    again = call("export", path, "-o", "deep/er/net.safetensors")
    assert again.code == 2 and "is already there" in again.err
    assert call("export", path, "-o", "deep/er/net.safetensors", "--force").code == 0
    assert (tmp_path / "deep/er/net.safetensors").read_bytes() == before


def test_an_export_that_finds_the_disk_full_leaves_nothing(tmp_path: Path) -> None:
    from tests.zml.test_checkpoint_faults import Power

    _, path = trained(tmp_path)
    checkpoint = read(path)
    failed = 0
    for at in range(1, 200):
        disk = Power(at, 28)
        try:
            files = export(checkpoint, tmp_path / "out", 800, disk=disk)
        except ZmlError as error:
            failed += 1
            assert error.code == DISK_FULL and os.listdir(tmp_path / "out") == []
        else:
            assert at > disk.calls and len(files) == 4
            break
        finally:
            disk.release()
    assert failed > 20


def test_split_keeps_neighbours_together_below_the_limit() -> None:
    assert split([3, 3, 3, 9, 1, 0], 6) == [[0, 1], [2], [3], [4, 5]]
    assert split([9], 6) == [[0]] and split([0, 7], 6) == [[0], [1]]


def test_what_the_update_rule_says_of_itself_comes_back_from_disk(tmp_path: Path) -> None:
    """The state of `shard.optim.UpdateRule`, also where segments have histories of their own, goes on to the bit."""
    model = registration()
    rules: dict[int, Any] = {}
    chunks: Chunks = {}
    hyper = [{"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False, "maximize": False,
              "decoupled_weight_decay": True}] * 2  # fmt: skip
    numbers_of = model.optimizer.accept(hyper)
    torch.manual_seed(3)
    for chunk in model.layout.chunks:
        w = torch.randn(chunk.size)
        rule = UpdateRule(model.optimizer, chunk, w)
        for step in range(3):
            absent = {1} if step == 1 else set()
            if {segment.parameter for segment in chunk.segments} <= absent:
                continue
            rule.step(torch.randn(chunk.size), numbers_of[chunk.group], absent)
        rules[chunk.index] = rule, w
        chunks[chunk.index] = {"w": w.numpy()} | {name: t.numpy().copy() for name, t in rule.state().items()}
    checkpoint = read(make(tmp_path / "checkpoints", 3, model=model, chunks=chunks))
    for chunk in model.layout.chunks:
        parts = {
            name: torch.from_numpy(array.copy()) for name, array in checkpoint.chunk(chunk.index).items()
        }
        w = parts.pop("w")
        again = UpdateRule(model.optimizer, chunk, w)
        again.load_state(parts)
        old, old_w = rules[chunk.index]
        gradient = torch.randn(chunk.size)
        old.step(gradient, numbers_of[chunk.group])
        again.step(gradient, numbers_of[chunk.group])
        assert torch.equal(w, old_w)
