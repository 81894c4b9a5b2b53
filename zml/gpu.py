"""Which GPUs this machine has, asked of nvidia-smi: an agent must know and must not load torch for it. And how the one
that a script computes on is doing."""

import importlib.util
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import NO_GPU, ZmlError
from .figures import GpuFigures

QUERY = ("nvidia-smi", "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits")
TIMEOUT_S = 20.0  # a driver that wakes up takes seconds
EVERY_S = 2.0  # between two looks at how a GPU is doing


@dataclass(frozen=True, slots=True)
class Gpu:
    index: int  # as nvidia-smi counts
    name: str
    memory_mb: int


def found() -> list[Gpu]:
    """All GPUs, none where there is no nvidia-smi or it cannot reach the driver."""
    if shutil.which(QUERY[0]) is None:
        return []
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse(answer.stdout)


def parse(text: str) -> list[Gpu]:
    """nvidia-smi's lines; what is not a GPU is passed over."""
    gpus = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3 and parts[0].isdigit():
            gpus.append(Gpu(int(parts[0]), parts[1], int(parts[2]) if parts[2].isdigit() else 0))
    return gpus


def device(index: int, gpus: list[Gpu]) -> str:
    """ "cuda:K" for a GPU that is there. Raises ZmlError(NO_GPU) that says which are."""
    if any(gpu.index == index for gpu in gpus):
        return f"cuda:{index}"
    if not gpus:
        raise ZmlError(NO_GPU, f"there is no GPU {index}: nvidia-smi finds none here", "Use --cpu.")
    there = ", ".join(f"{gpu.index} ({gpu.name}, {gpu.memory_mb / 1024:.0f} GB)" for gpu in gpus)
    raise ZmlError(
        NO_GPU, f"there is no GPU {index}; this machine has {there}", "Choose one of these, or --cpu."
    )


def share_out(workers: int, gpus: list[Gpu], environ: Mapping[str, str]) -> list[str]:
    """A device for each of several workers on this machine: in turn, of those that the user lets us see."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        allowed = [part.strip() for part in visible.split(",") if part.strip()]
        gpus = [gpu for gpu in gpus if str(gpu.index) in allowed]
    if not gpus:
        return ["cpu"] * workers
    return [f"cuda:{gpus[worker % len(gpus)].index}" for worker in range(workers)]


class Watch:
    """How the GPU that a script sees is doing, looked at in a thread of its own, for a driver may take long to answer.

    It asks NVIDIA's library by nvidia-ml-py, where that is installed; where not, or without a GPU, `now` stays None.
    """

    def __init__(self, visible: str) -> None:
        """`visible` is what CUDA_VISIBLE_DEVICES says: the first device is the script's."""
        self.now: GpuFigures | None = None
        self.device = visible.split(",")[0].strip()
        if self.device and self.device != "-1" and importlib.util.find_spec("pynvml") is not None:
            # A daemon: nobody waits for it at the end.
            threading.Thread(target=self._look, name="zml-gpu", daemon=True).start()

    def _look(self) -> None:
        import pynvml

        try:
            pynvml.nvmlInit()
            if self.device.isdigit():
                handle = pynvml.nvmlDeviceGetHandleByIndex(int(self.device))
            else:
                handle = pynvml.nvmlDeviceGetHandleByUUID(self.device)
        except pynvml.NVMLError:
            return
        while True:
            self.now = figures(pynvml, handle)
            time.sleep(EVERY_S)


def figures(nvml: Any, handle: Any) -> GpuFigures:
    """What the driver says; what it does not know of this device is None."""

    def asked(ask: Callable[[Any], Any]) -> Any:
        try:
            return ask(handle)
        except nvml.NVMLError:
            return None

    rates = asked(nvml.nvmlDeviceGetUtilizationRates)
    memory = asked(nvml.nvmlDeviceGetMemoryInfo)
    power_mw = asked(nvml.nvmlDeviceGetPowerUsage)
    return GpuFigures(
        utilization=None if rates is None else rates.gpu / 100,
        memory_used_bytes=None if memory is None else int(memory.used),
        memory_bytes=None if memory is None else int(memory.total),
        power_w=None if power_mw is None else power_mw / 1000,
    )
