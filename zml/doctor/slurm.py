"""Inside a Slurm job, is all there that `zml slurm` and a person's own batch script need to know?"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping

from .findings import Check

JOB = "SLURM_JOB_ID"
NEEDED = (JOB, "SLURM_JOB_NODELIST", "SLURM_NNODES")
COMMANDS = ("srun", "scontrol", "squeue")


def check(environ: Mapping[str, str], which: Callable[[str], str | None] = shutil.which) -> Check:
    if not environ.get(JOB):
        told = "not inside a job" if which("sbatch") else "there is none here"
        return Check("Slurm", "pass", told)
    job = f"job {environ[JOB]}"
    if missing := [name for name in NEEDED if not environ.get(name)]:
        fix = "Start zml from the batch script itself, or with srun: sudo, ssh and env -i lose variables."
        return Check("Slurm", "warn", f"{job}, but {', '.join(missing)} is not set", fix)
    if absent := [name for name in COMMANDS if which(name) is None]:
        fix = "Put Slurm's commands on the PATH of the job: `zml slurm` works through them."
        return Check("Slurm", "warn", f"{job}, but there is no command {absent[0]}", fix)
    return Check("Slurm", "pass", f"{job} on {environ['SLURM_NNODES']} nodes: {environ[NEEDED[1]]}")
