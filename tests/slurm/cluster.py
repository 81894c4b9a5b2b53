"""A real Slurm on this machine: munged, slurmctld and one slurmd for each virtual node, in a folder of its own.

Rules: nothing of the system's configuration is read or touched; every daemon is a child of this process and ends with
it; ports are those that the system gives. Virtual nodes have 8 cores, 16 GB and 2 GPUs that are clones of /dev/null,
and names that nothing resolves, as on some real clusters.

Learned from Debian 12's Slurm 22.05: a daemon reads its own argv[0], and under the name slurmctld-wlm drops every
GRES; cgroup/v1 has to be named, or slurmd wants systemd; `cred_expire` is also how long a requeued job is held, by
default 120 s.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NEEDED = {
    "slurmctld": "/usr/sbin/slurmctld-wlm",
    "slurmd": "/usr/sbin/slurmd-wlm",
    "slurmstepd": "/usr/sbin/slurmstepd-wlm",
    "munged": "/usr/sbin/munged",
    "sbatch": "/usr/bin/sbatch",
}
NODES = 4
UP_S = 60.0
COMMAND_S = 30.0
POLL_S = 0.1


def lacking() -> str:
    """Why there can be no Slurm here; empty if there can."""
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    absent = [name for name, path in NEEDED.items() if not Path(path).exists()]
    return f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge" if absent else ""


CONFIGURATION = """
ClusterName=zmltest
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SlurmdTimeout=5
MessageTimeout=3
SlurmctldTimeout=10
ReturnToService=2
KillWait=10
JobRequeue=1
MinJobAge=300
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=8 Boards=1 \
SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=16000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=9
"""


class Slurm:
    """A cluster that is up. `folder` is readable by all: munge insists on that for its socket."""

    def __init__(self, folder: Path, nodes: int = NODES) -> None:
        self.folder = folder
        self.nodes = [f"n{number + 1}" for number in range(nodes)]
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "ZML_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    # -- up and down -------------------------------------------------------------------------------------

    def up(self) -> None:
        self._configure()
        munge = self.folder / "munge"
        self._start(
            "munged",
            [
                NEEDED["munged"],
                "--foreground",
                "--force",
                f"--key-file={munge}/key",
                f"--socket={munge}/socket",
                f"--pid-file={munge}/pid",
                f"--seed-file={munge}/seed",
                f"--log-file={munge}/log",
            ],
        )
        self.until((munge / "socket").exists, "munged listens", UP_S)
        self._start("slurmctld", [str(self.folder / "bin/slurmctld"), "-D"])
        for node in self.nodes:
            self.start_node(node)
        self.until(lambda: len(self.usable()) == len(self.nodes), "all nodes are up", UP_S)

    def _configure(self) -> None:
        folder = self.folder
        os.chmod(folder, 0o755)
        for part in ("bin", "munge", "state", "dev", *(f"spool/{node}" for node in self.nodes)):
            (folder / part).mkdir(parents=True)
        for name in ("slurmctld", "slurmd", "slurmstepd"):
            (folder / "bin" / name).symlink_to(NEEDED[name])
        key = folder / "munge/key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        for number in range(2):  # a GPU's file has to be a device
            os.mknod(folder / f"dev/gpu{number}", 0o20666, os.makedev(1, 3))
        (folder / "gres.conf").write_text(
            f"NodeName=n[1-{len(self.nodes)}] Name=gpu File={folder}/dev/gpu[0-1]\n"
        )
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        first = ports_in_a_row(len(self.nodes) + 1)
        text = CONFIGURATION.format(
            folder=folder,
            controller=first,
            first=first + 1,
            last=first + len(self.nodes),
            nodes=len(self.nodes),
        )
        (folder / "slurm.conf").write_text(text)

    def _start(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def start_node(self, node: str) -> None:
        # -b: as a machine that has just booted; a node that was down is believed at once.
        self._start(
            node,
            [
                str(self.folder / "bin/slurmd"),
                "-D",
                "-b",
                "-N",
                node,
                "-d",
                str(self.folder / "bin/slurmstepd"),
            ],
        )

    def kill_node(self, node: str) -> None:
        """As when its power fails: nothing on it says a last word."""
        daemon = self.daemons[node]
        daemon.kill()
        daemon.wait()
        for pid in [*self._stepds(node), *self.tasks(node)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def down(self) -> None:
        if "slurmctld" in self.daemons and self.daemons["slurmctld"].poll() is None:
            self.command("scancel", "--quiet", *self.jobs(), check=False)
            try:
                self.until(lambda: not self.jobs(), "all jobs end", 30.0)
            except AssertionError:
                pass
        for name in reversed(list(self.daemons)):
            daemon = self.daemons[name]
            if daemon.poll() is None:
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        for pid in [*self._stepds(), *self.tasks()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    # -- looking -----------------------------------------------------------------------------------------

    def command(self, *words: str, check: bool = True, cwd: Path | None = None, **env: str) -> str:
        done = subprocess.run(
            words,
            env={**self.environment, **env},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
        )
        assert not check or done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def usable(self) -> set[str]:
        return set(self.command("sinfo", "-h", "-N", "-t", "idle,mix,alloc", "-o", "%N", check=False).split())

    def jobs(self) -> list[str]:
        return self.command("squeue", "-h", "-o", "%i", check=False).split()

    def about(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode ..."""
        text = self.command("scontrol", "show", "job", "-o", job, check=False)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def state(self, job: str) -> str:
        return self.about(job).get("JobState", "")

    def steps(self, job: str) -> dict[str, str]:
        """The step id of each member that has one."""
        lines = self.command("squeue", "-h", "-s", "-j", job, "-o", "%j %i", check=False).splitlines()
        return dict(line.split() for line in lines if len(line.split()) == 2)

    def tasks(self, node: str = "") -> list[int]:
        """Processes of jobs of this cluster, or of one node."""
        marks = [
            f"SLURM_CONF={self.folder}/slurm.conf".encode(),
            f"SLURMD_NODENAME={node}".encode() if node else b"SLURMD_NODENAME=",
        ]
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    variables = (entry / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                ours = marks[0] in variables
                there = any(v.startswith(marks[1]) for v in variables) if not node else marks[1] in variables
                if ours and there:
                    found.append(int(entry.name))
        return found

    def _stepds(self, node: str = "") -> list[int]:
        """slurmstepd overwrites its command line and environment; its node's log stays open."""
        logs = {str(self.folder / f"slurmd-{each}.log") for each in ([node] if node else self.nodes)}
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and os.readlink(entry / "exe") == NEEDED["slurmstepd"]:
                    opened = {os.readlink(fd) for fd in (entry / "fd").iterdir()}
                    if opened & logs:
                        found.append(int(entry.name))
            except OSError:
                continue
        return found

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, f"{what}: not within {seconds:g} s\n{self.last_words()}"
            time.sleep(POLL_S)
        return found

    def last_words(self) -> str:
        texts = []
        for file in sorted(self.folder.glob("*.log")):
            lines = file.read_text(errors="replace").splitlines()[-5:]
            texts.append(f"--- {file.name}\n" + "\n".join(lines))
        return "\n".join(texts)


def ports_in_a_row(count: int) -> int:
    """The first of so many TCP ports of 127.0.0.1 that nobody listens on now, below those that the system gives."""
    for _ in range(200):
        first = 10_000 + secrets.randbelow(20_000)
        sockets: list[socket.socket] = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
        return first
    raise AssertionError(f"no {count} free ports in a row")


@contextmanager
def slurm(nodes: int = NODES) -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="zml-slurm-", dir="/tmp"))
    cluster = Slurm(folder, nodes)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)
