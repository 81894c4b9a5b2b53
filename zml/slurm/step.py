"""One member as a step of the allocation: the srun command, and what srun is not to know.

Rules, each learned from a real Slurm: every step says its memory, or the first takes all of it and the next one
waits; the steps share nothing (`--exact`), but what is started in the place of a dead one overlaps, because what that
one had is freed late or never; a step's end touches no other. The batch script's own variables are also srun's
options (SLURM_MEM_PER_NODE beside --mem ends srun), so those that say how much are taken out.
"""

from collections.abc import Mapping, Sequence

from .shape import COORDINATOR, Needs

# Prefixes of variables by which srun takes options, and sbatch tells what the batch script has.
SAID_BY_FLAGS = (
    "SLURM_CPUS_PER_",
    "SLURM_DISTRIBUTION",
    "SLURM_EXACT",
    "SLURM_EXCLUSIVE",
    "SLURM_GPUS",
    "SLURM_GPU_",
    "SLURM_GRES",
    "SLURM_KILL_BAD_EXIT",
    "SLURM_MEM_",
    "SLURM_NNODES",
    "SLURM_NO_KILL",
    "SLURM_NPROCS",
    "SLURM_NTASKS",
    "SLURM_OPEN_MODE",
    "SLURM_OVERLAP",
    "SLURM_STEP",
    "SLURM_TASKS_PER_NODE",
    "SLURM_THREADS_PER_CORE",
    "SLURM_TRES_",
    "SLURM_WAIT",
    "SRUN_CPUS_PER_TASK",
    "CUDA_VISIBLE_DEVICES",  # the batch step's: all of the node's
    "ROCR_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "ZML_PARENT",  # whose child a process is, which srun's tasks are not
)


def command(
    member: str,
    node: str,
    needs: Needs,
    role: Sequence[str],
    *,
    again: bool = False,
    more: Sequence[str] = (),
) -> list[str]:
    """`again`: in the place of a step that has ended. `more`: options of the user's, a container image say."""
    shares = again or member == COORDINATOR
    return [
        "srun",
        f"--job-name={member}",
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={node}",
        "--overlap" if shares else "--exact",
        f"--cpus-per-task={needs.cpus}",
        f"--mem={needs.memory_mb}M",
        f"--gres=gpu:{needs.gpus}" if needs.gpus else "--gres=none",
        "--kill-on-bad-exit=0",
        "--no-kill",
        "--wait=0",
        "--input=none",
        "--unbuffered",
        "--export=ALL",
        "--mpi=none",
        *more,
        *role,
    ]


def environment(batch: Mapping[str, str]) -> dict[str, str]:
    """What srun and the member behind it get of the batch script's variables."""
    return {key: value for key, value in batch.items() if not key.startswith(SAID_BY_FLAGS)}
