"""Real processes: the executable as a user would start it, in a folder of its own, with a small script."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.uncompiled import PYTHONPATH

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 90.0
POLL_S = 0.05

SCRIPT = """
import argparse, json, os, sys, time

parser = argparse.ArgumentParser()
parser.add_argument("--optimizer", default="SGD")
parser.add_argument("--schedule", default="step")
parser.add_argument("--clip", type=float, default=0.0)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--samples", type=int, default=192)
parser.add_argument("--pause", type=float, default=0.0)
parser.add_argument("--save", default="model.safetensors")
parser.add_argument("--keep", default="")
parser.add_argument("--trouble", default="")
parser.add_argument("--at", type=int, default=3)
parser.add_argument("--on", default="")
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--odd", action="store_true")
parser.add_argument("--loaders", type=int, default=0)
parser.add_argument("--evaluate", action="store_true")
a = parser.parse_args()
me = os.environ.get("ZML_SEAT", "")

def trouble(step):
    if a.trouble and step == a.at and f'"{a.on}"' in me.replace('"worker":', ''):
        if a.trouble == "raise":
            raise ValueError("the data of this batch are odd")
        if a.trouble == "nan":
            return float("nan")
        if a.trouble == "kill":
            os.kill(os.getpid(), 9)
        if a.trouble == "hang":
            print("hanging", flush=True)
            time.sleep(600)
        if a.trouble == "raise once" and '"incarnation":1' in me:
            raise ValueError("this once")
        if a.trouble == "exit":
            sys.exit(7)
    return 1.0

trouble(-1)  # before torch is loaded, which takes seconds
import torch, torch.nn.functional as F
import zml
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x = torch.randn(a.samples, 16)
y = (x @ torch.randn(16) > 0).long()
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Dropout(0.1), torch.nn.Linear(32, 2))
model.add_module("extra", torch.nn.Linear(16, 2))  # has a gradient in some steps only, and part of it never
if a.odd:
    model[0].bias.requires_grad_(False)
    model.extra.bias.requires_grad_(True)
else:
    model.extra.requires_grad_(False)

def forward(bx, step):
    out = bx
    for layer in list(model)[:4]:
        out = layer(out)
    return out + bx @ model.extra.weight.T if a.odd and step % 3 == 1 else out

if a.optimizer == "SGD":
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
else:
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
if a.schedule == "step":
    sched = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
else:
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, a.epochs)
train = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, num_workers=a.loaders)
train = zml.join(model, opt, train)
step = 0
for epoch in zml.epochs(a.epochs):
    for bx, by in train:
        loss = F.cross_entropy(forward(bx, step), by) * trouble(step)
        if step % a.accumulate == 0:
            opt.zero_grad()
        loss.backward()
        if (step + 1) % a.accumulate:
            step += 1
            continue
        if a.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), a.clip)
        opt.step()
        zml.log(loss=loss)
        time.sleep(a.pause)
        step += 1
    sched.step()
    if a.evaluate:
        found = zml.evaluate(lambda batch: {"n": len(batch[0])}, DataLoader(TensorDataset(x, y), batch_size=8))
        print(f"evaluated {found['n']:g}", flush=True)
    print(f"epoch {epoch} done", flush=True)
zml.save(a.save)
if a.keep:  # this worker's own copy
    from safetensors.torch import save_file
    save_file(model.state_dict(), f"{a.keep}-{json.loads(me)['worker']}.safetensors")
print(f"steps {step}", flush=True)
"""


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("ZML_")}
    return {**kept, "PYTHONPATH": PYTHONPATH, "NO_COLOR": "1", "ZML_HTTP": "off", **more}


class Process:
    """A started command, its output in a file."""

    def __init__(self, folder: Path, name: str, command: Sequence[str], env: dict[str, str]) -> None:
        self.name = name
        self.out = folder / f"{name}.txt"
        with self.out.open("wb") as file:
            self.process = subprocess.Popen(
                command, cwd=folder, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def text(self) -> str:
        return self.out.read_text(errors="replace")

    def wait(self, seconds: float = DEADLINE_S) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} does not end within {seconds:g} s:\n{self.text}") from None

    def send(self, number: int) -> None:
        self.process.send_signal(number)


class Playground:
    """A folder with `train.py`, and whatever is started in it; nothing of it is left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "train.py").write_text(SCRIPT)
        self.processes: list[Process] = []

    def start(self, *command: str, name: str = "", prefix: Sequence[str] = (), **env: str) -> Process:
        name = name or f"{len(self.processes)}-{command[0]}"
        zml = [*prefix, sys.executable, "-m", "zml", *command]
        process = Process(self.folder, name, zml, environment(**env))
        self.processes.append(process)
        return process

    def run(self, *command: str, **env: str) -> tuple[int, str]:
        """To the end; the exit code and all it printed."""
        process = self.start(*command, **env)
        return process.wait(), process.text

    def plain(self, *args: str) -> None:
        done = subprocess.run(
            [sys.executable, "train.py", *args],
            cwd=self.folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert done.returncode == 0, done.stderr

    def run_dir(self) -> Path:
        (file,) = self.folder.glob("runs/*/coordinator.json")
        return file.parent

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run_dir() / "status.json").read_text())
        return found

    def live(self, *where: str) -> dict[str, Any]:
        """The status of the job that is going on; {} while nobody answers."""
        code, text = self.run("status", "--json", *where)
        found: dict[str, Any] = json.loads(text) if code == 0 else {}
        return found

    def until(self, condition: Callable[[], Any], what: str, seconds: float = DEADLINE_S) -> Any:
        end = time.monotonic() + seconds
        while not (found := condition()):
            texts = "\n".join(f"--- {p.name}\n{p.text}" for p in self.processes[-6:])
            assert time.monotonic() < end, f"{what}: not within {seconds:g} s\n{texts}"
            time.sleep(POLL_S)
        return found

    def script_lines(self, member: str) -> str:
        files = list(self.folder.glob(f"**/logs/{member}.out"))
        return "".join(file.read_text() for file in files)

    def pids(self, *words: str) -> list[int]:
        """Processes of this playground whose command line has all these words."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                where = os.readlink(entry / "cwd")
            except OSError:
                continue
            if where == str(self.folder) and all(word in line for word in words):
                found.append(int(entry.name))
        return found

    def clean_up(self) -> None:
        for process in self.processes:
            if process.process.poll() is None:
                os.killpg(process.process.pid, signal.SIGKILL)
                process.process.wait()
        for pid in self.pids("zml"):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def playground(folder: Path) -> Iterator[Playground]:
    place = Playground(folder)
    try:
        yield place
    finally:
        place.clean_up()


def same_model(one: Path, other: Path) -> bool:
    """To the last bit."""
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
