"""Slurm's commands, called: sbatch, scontrol, squeue, scancel. What they refuse is an error that people read.

Rule: every call has a deadline. Those that only ask are safe to repeat; `sbatch` is not, and is not repeated.
"""

import shutil
import subprocess
from collections.abc import Mapping, Sequence

from ..errors import SLURM, ZmlError
from .hostlist import names

ANSWER_S = 60.0  # a slurmctld that is busy takes its time; its own clients give up after MessageTimeout


def call(words: Sequence[str], *, text: str = "", environ: Mapping[str, str] | None = None) -> str:
    """What the command prints. Raises ZmlError where it is missing, refuses, or does not answer."""
    name = words[0]
    if shutil.which(name) is None:
        raise ZmlError(
            SLURM,
            f"there is no command {name} here",
            "Run it where Slurm's commands are: on a login node, mostly.",
        )
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, text=True, errors="replace", timeout=ANSWER_S, env=environ
        )
    except subprocess.TimeoutExpired:
        raise ZmlError(
            SLURM, f"{name} has not answered for {ANSWER_S:g} s", "Ask `sinfo` whether slurmctld is there."
        ) from None
    except OSError as error:
        raise ZmlError(SLURM, f"{name} cannot be run: {error.strerror}") from None
    if done.returncode:
        raise ZmlError(SLURM, f"{name} refuses: {said(done.stderr) or f'exit code {done.returncode}'}", FIX)
    return done.stdout


FIX = "Change the option that it names, or ask `sinfo` what this cluster has."


def said(stderr: str) -> str:
    """A command's complaint in one line, without its name and Slurm's words about it."""
    lines = []
    for line in stderr.splitlines():
        words = line.strip()
        for prefix in (
            "sbatch:",
            "scontrol:",
            "squeue:",
            "scancel:",
            "srun:",
            "slurm_load_jobs",
            "error:",
            "fatal:",
        ):
            words = words.removeprefix(prefix).strip()
        if words and words not in lines:
            lines.append(words)
    return "; ".join(lines)


def submit(script: str, *options: str) -> str:
    """The id of the new job."""
    return call(["sbatch", "--parsable", *options], text=script).strip().partition(";")[0]


def requeue(job: str) -> None:
    call(["scontrol", "requeue", job])


def state(job: str) -> str:
    """RUNNING, COMPLETING ...; of a job that Slurm has forgotten nothing."""
    return call(["squeue", "--noheader", f"--jobs={job}", "--format=%T"]).strip()


def nodes_of(job: str) -> list[str]:
    """The nodes that are still in the allocation: with --no-kill, one that is down is not."""
    return names(call(["squeue", "--noheader", f"--jobs={job}", "--format=%N"]).strip())


def fields(text: str) -> dict[str, str]:
    """Key=value words, as `scontrol show -o` prints them; of one that comes twice the last."""
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def job_fields(job: str) -> dict[str, str]:
    return fields(call(["scontrol", "show", "job", "--oneliner", job]))


def node_address(node: str) -> str:
    """As Slurm itself reaches it: a name or a number."""
    return fields(call(["scontrol", "show", "node", "--oneliner", node])).get("NodeAddr", "")
