"""Stands in for `zml` in the launcher's tests: the three roles as processes that do what the script's name says.

They meet in the run directory: a member that joins leaves a file in `joined/`, a worker that is done one in `done/`.
Each holds to its parent as the real ones do, and leaves its process id in `pids/`.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from zml.launch import tether

FOREVER = threading.Event()  # never set: whoever waits for it is killed


def flag(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def leave(folder: Path, kind: str, name: str, text: str = "") -> None:
    (folder / kind).mkdir(exist_ok=True)
    partial = folder / kind / f".{name}"
    partial.write_text(text)
    partial.rename(folder / kind / name)  # whole or not at all: this process may be killed at any moment


def wait_for(path: Path) -> None:
    while not path.exists():
        FOREVER.wait(0.02)


def coordinator(folder: Path, script: str) -> int:
    if script == "no_coordinator.py":
        print("error: the address is in use [ZML-E201]\n  Choose another.", file=sys.stderr)
        return 4
    if script == "deaf_coordinator.py":
        FOREVER.wait()
    leave(folder, ".", "args.json", json.dumps(sys.argv[1:]))
    partial = folder / "coordinator.json.partial"
    addresses = [sys.argv[i + 1] for i, part in enumerate(sys.argv) if part == "--bind"]
    partial.write_text(json.dumps({"addresses": addresses, "pid": os.getpid(), "job": "job"}))
    partial.rename(folder / "coordinator.json")
    if script == "dies.py" or (script == "dies_once.py" and not (folder / "died").exists()):
        wait_for(folder / "joined" / "w1")
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    workers = int(os.environ["ZML_WORKERS"])
    shards = 0 if script == "ends_early.py" else int(os.environ["ZML_SHARDS"])
    for shard in range(shards):
        wait_for(folder / "joined" / f"p{shard}")
    for worker in range(workers):
        wait_for(folder / "joined" / f"w{worker}")
    leave(folder, ".", "formed")
    for worker in range(workers):
        wait_for(folder / "done" / f"w{worker}")
    codes = [int((folder / "done" / f"w{worker}").read_text()) for worker in range(workers)]
    code = max(codes)
    status: dict[str, Any] = {"job": "job", "state": "FAILED" if code else "SUCCEEDED", "exit_code": code}
    joined = sorted(path.name for path in (folder / "joined").iterdir())
    status["members"] = [
        {"member": name, "role": "worker" if name[0] == "w" else "shard", "state": "done"} for name in joined
    ]
    status["script"] = script
    partial.write_text(json.dumps(status))
    partial.rename(folder / "status.json")
    return code


def member(folder: Path, name: str, script: str) -> int:
    leave(folder, "environment", name, json.dumps(dict(os.environ)))
    if script == "bad_shard.py" and name == "p0":
        print("Traceback\nerror: no room for chunks [ZML-E999]\n  Buy some.", file=sys.stderr)
        return 5
    if (script, name) in (("late.py", "w1"), ("ends_early.py", "p0")):
        FOREVER.wait()
    leave(folder, "joined", name)
    if name.startswith("p"):
        wait_for(folder / "status.json")
        return 0
    wait_for(folder / "formed")
    loses_one = script in ("loses_one.py", "holds_its_output.py", "waits_to_be_told.py") and name == "w1"
    if loses_one and not (folder / "lost").exists():
        (folder / "lost").touch()
        if script == "holds_its_output.py":
            subprocess.Popen([sys.executable, "-P", str(Path(__file__)), "holder", str(folder)])
            wait_for(folder / "held")
        os.kill(os.getpid(), signal.SIGKILL)
    if loses_one and script == "waits_to_be_told.py":
        wait_for(folder / "told")
    if script == "fences_one.py" and name == "w1" and not (folder / "lost").exists():
        (folder / "lost").touch()
        print("error: w1#1 was fenced: silent for 1.5 s [ZML-E204]", file=sys.stderr)
        return 1
    print(f"{name} line 1\n{name} line \x1b[1m2\x1b[0m é", flush=True)
    print(f"{name} has something to say of itself", file=sys.stderr)
    grandchild = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__)), "script", str(folder), name],
        env={**os.environ, **tether.environment()},
        start_new_session=True,
    )
    if script == "long.py":
        wait_for(folder / "drain")
        print(f"{name} saved", flush=True)
    if script == "stubborn.py" or script == "forever.py":
        FOREVER.wait()
    grandchild.kill()
    grandchild.wait()
    leave(folder, "done", name, "3" if script == "fails.py" and name == "w1" else "0")
    wait_for(folder / "status.json")
    if script == "lingers.py" and name == "w0":
        FOREVER.wait()
    return 0


def main() -> int:
    role = sys.argv[1]
    if role == "holder":  # what a process has started may outlive it, and its output with it
        (Path(sys.argv[2]) / "held").touch()
        while not any((Path(sys.argv[2]) / end).exists() for end in ("told", "status.json")):
            FOREVER.wait(0.02)
        return 0
    tether.hold()
    if role == "script":
        leave(Path(sys.argv[2]), "pids", f"{sys.argv[3]}.script", str(os.getpid()))
        FOREVER.wait()
    folder = Path(flag("--run-dir"))
    name = {"coordinator": "coordinator", "ps": "p", "worker": ""}[role]
    name += flag("--shard") if role == "ps" else flag("--name") if role == "worker" else ""
    leave(folder, "pids", name, str(os.getpid()))
    script = json.loads((folder / "config.json").read_text())["script"]
    return coordinator(folder, script) if role == "coordinator" else member(folder, name, script)


if __name__ == "__main__":
    sys.exit(main())
