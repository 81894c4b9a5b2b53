"""GPUs, their driver, and whether that is new enough for the CUDA that torch was built for.

Nothing here loads torch: which CUDA it is built for stands in its version.py, which is read as text.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from .. import gpu
from .findings import Check
from .installed import version

SMI = "nvidia-smi"
SMI_S = 10.0  # less than an examination of a cluster waits for a machine


def checks() -> Iterator[Check]:
    cuda = built_for()
    if shutil.which(SMI) is None:
        yield check_gpus([], cuda)
        return
    said, trouble = smi()
    yield check_driver(said, trouble, cuda)
    if not trouble:
        yield check_gpus(gpu.found(), cuda)


def smi() -> tuple[str, str]:
    """What nvidia-smi prints, and why it does not."""
    try:
        answer = subprocess.run([SMI], capture_output=True, text=True, timeout=SMI_S)
    except subprocess.TimeoutExpired:
        return "", f"{SMI} has not answered for {SMI_S:g} s"
    except OSError as error:
        return "", f"{SMI}: {error.strerror}"
    if answer.returncode != 0:
        lines = (answer.stdout + answer.stderr).strip().splitlines()
        return "", lines[0] if lines else f"{SMI} ended with exit code {answer.returncode}"
    return answer.stdout, ""


def built_for() -> str | None:
    """The CUDA of the torch that is installed: "12.6"; empty for a build without; None where it cannot be told."""
    try:
        path = Path(str(metadata.distribution("torch").locate_file("torch/version.py")))
        found = re.search(r"^cuda(?:\s*:[^=]*)?\s*=\s*(?:None|'([^']*)')", path.read_text(), re.MULTILINE)
    except (metadata.PackageNotFoundError, OSError):
        return None
    return None if found is None else found[1] or ""


def check_driver(said: str, trouble: str, cuda: str | None) -> Check:
    """Code that is built for CUDA x.y runs with every driver for x, whatever its y."""
    if trouble:
        fix = "Load the driver (`modprobe nvidia`), or start the machine again after an update of it."
        return Check("GPU driver", "fail", trouble, fix)
    driver = re.search(r"Driver Version:\s*([\d.]+)", said)
    most = re.search(r"CUDA Version:\s*([\d.]+)", said)
    found = f"{driver[1] if driver else 'unknown'}, for CUDA {most[1] if most else 'unknown'}"
    if cuda and most and version(most[1])[:1] < version(cuda)[:1]:
        fix = f"Update the driver, or install a torch that is built for CUDA {version(most[1])[0]}."
        return Check("GPU driver", "fail", f"{found}; torch is built for CUDA {cuda}", fix)
    if cuda:
        found += f"; torch is built for CUDA {cuda}"
    return Check("GPU driver", "pass", found)


def check_gpus(gpus: list[gpu.Gpu], cuda: str | None) -> Check:
    if not gpus:
        return Check("GPUs", "pass", "none: workers take --cpu")
    found = ", ".join(f"{each.index} {each.name} ({each.memory_mb / 1024:.0f} GB)" for each in gpus)
    if cuda == "":
        fix = "Install a torch with CUDA: https://pytorch.org/get-started/locally has the command."
        return Check("GPUs", "warn", f"{found}; but this torch is built without CUDA", fix)
    return Check("GPUs", "pass", found)
