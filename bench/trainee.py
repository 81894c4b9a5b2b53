"""The script that `train.py` has trained, in each way: alone, with torch.distributed, with zml.

Everything but the exchange of gradients is the same in all ways: the model, a multilayer perceptron whose parameters
are many for the little it computes; the images of Fashion-MNIST in one shuffled order; worker k of n takes batch
k, n + k, 2n + k ... of it, and one process alone takes n batches at once. So every synchronous way sees the same
samples in the same step.

The worker that records keeps the time of each step and a copy of the parameters every few steps, which counts: some
milliseconds, and some tens of them where zml first has to show what the job has published. When its training is over it
computes the loss of the copies on held-out images: evaluation takes no time of the training.
"""

import argparse
import gzip
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import zml

FASHION = Path("/usr/share/datasets/fashion-mnist")
RECORD = "TRAINEE_RECORD"  # the folder for this worker's times and losses; without it nothing is kept
TIMES, BEGAN, RESULT = "steps.txt", "began-{}.txt", "result.json"
Step = Callable[[Tensor, Tensor], None]


def network(width: int) -> nn.Sequential:
    """10,017,802 parameters at a width of 2,048; an image costs two multiplications for each, forward."""
    layers: list[nn.Module] = []
    for inner in (28 * 28, width, width):
        layers += [nn.Linear(inner, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def images(folder: Path, what: str) -> tuple[Tensor, Tensor]:
    """All of "train" or "t10k", flat and scaled to about mean 0 and deviation 1, and their labels."""

    def read(name: str, header: int) -> np.ndarray:
        packed = folder / f"{name}.gz"
        data = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / name).read_bytes()
        return np.frombuffer(data, dtype=np.uint8, offset=header)

    x = read(f"{what}-images-idx3-ubyte", 16).reshape(-1, 28 * 28)
    y = read(f"{what}-labels-idx1-ubyte", 8)
    return (torch.from_numpy(x.astype(np.float32)) / 255 - 0.286) / 0.353, torch.from_numpy(
        y.astype(np.int64)
    )


class Recorder:
    """Of one worker: when each step ended, and the parameters every few steps. Step 0 is before the first."""

    def __init__(self, model: nn.Module, folder: str, steps: int, every: int) -> None:
        self.model = model
        self.every = every
        self.folder = Path(folder)
        self.done = 0
        self.ends: list[float] = []
        self.copies = torch.empty(steps // every + 1, sum(p.numel() for p in model.parameters())).fill_(0)
        self.times = (self.folder / TIMES).open("w", buffering=1)
        self.keep()

    def step(self) -> None:
        self.done += 1
        if self.done % self.every == 0:
            self.keep()
        self.ends.append(time.monotonic())
        self.times.write(f"{self.ends[-1]:.4f}\n")

    @torch.no_grad()
    def keep(self) -> None:
        """What the job has learned: with the optimizer on the workers a worker's own model is more than that."""
        with zml.published():
            self._copy()

    def _copy(self) -> None:
        row, at = self.copies[self.done // self.every], 0
        for parameter in self.model.parameters():
            row[at : at + parameter.numel()].view_as(parameter).copy_(parameter)
            at += parameter.numel()

    @torch.no_grad()
    def finish(self, x: Tensor, y: Tensor) -> None:
        """Evaluate the copies, with all cores: nothing else of this system computes any more."""
        torch.set_num_threads(os.cpu_count() or 1)
        losses: list[tuple[int, float]] = []
        for number in range(self.done // self.every + 1):
            nn.utils.vector_to_parameters(self.copies[number], self.model.parameters())
            losses.append((number * self.every, float(F.cross_entropy(self.model(x), y))))
            self.times.write("evaluated\n")  # a sign of life
        result = {"ends": self.ends, "losses": losses}
        (self.folder / RESULT).write_text(json.dumps(result))


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def dealt(data: TensorDataset, batch: int, worker: int, workers: int) -> DataLoader[Any]:
    """Worker k's batches of the common order, as zml deals them."""
    batches = [range(at, at + batch) for at in range(0, len(data), batch)]
    return DataLoader(data, batch_sampler=batches[worker::workers])  # type: ignore[arg-type]


# -- ways ------------------------------------------------------------------------------------------------------------


def with_torch(a: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """DistributedDataParallel over gloo with one of torch's own hooks, or local SGD with torch's own averager."""
    import datetime

    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{a.master}",
        rank=a.rank,
        world_size=a.workers,
        timeout=datetime.timedelta(seconds=a.patience),
    )
    if a.hook == "local":
        averager = PeriodicModelAverager(period=a.period, warmup_steps=0)
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)
        inner = plain(model, optimizer)

        def step(x: Tensor, y: Tensor) -> None:
            inner(x, y)
            averager.average_parameters(model.parameters())

        # The averager counts from 0 and averages at counts that the period divides: let it be after whole periods.
        averager.step = 1
        return step
    # PowerSGD's hook waits for further collectives in the threads that gloo has for them: with several buckets
    # under way all of these threads wait for each other. One bucket it is, unless asked otherwise.
    size = {"bucket_cap_mb": a.bucket_mb} if a.bucket_mb else {}
    parallel = DistributedDataParallel(model, **size)
    if a.hook == "fp16":
        parallel.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif a.hook == "bf16":
        parallel.register_comm_hook(None, default_hooks.bf16_compress_hook)
    elif a.hook == "powersgd":
        state = powerSGD_hook.PowerSGDState(
            process_group=None,
            matrix_approximation_rank=a.powersgd_rank,
            start_powerSGD_iter=a.powersgd_start,
            use_error_feedback=True,
            warm_start=True,
        )
        parallel.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    dist.barrier()
    return plain(parallel, optimizer)


def once(loader: Iterable[Any]) -> Iterator[Any]:
    yield from loader


def main() -> None:
    parser = argparse.ArgumentParser()
    flag = parser.add_argument
    flag("--way", choices=["alone", "torch", "zml"], default="alone")
    flag("--hook", choices=["none", "fp16", "bf16", "powersgd", "local"], default="none")
    flag("--rank", type=int, default=0)
    flag("--workers", type=int, default=4)
    flag("--master", default="127.0.0.1:29500")
    flag("--patience", type=float, default=120.0)
    flag("--bucket-mb", type=int, default=0)
    flag("--powersgd-rank", type=int, default=4)
    flag("--powersgd-start", type=int, default=10)
    flag("--period", type=int, default=8)
    flag("--data", type=Path, default=FASHION)
    flag("--steps", type=int, default=40)
    flag("--batch-size", type=int, default=16)
    flag("--width", type=int, default=2048)
    flag("--optimizer", choices=["sgd", "adamw"], default="sgd")
    flag("--lr", type=float, default=0.03)
    flag("--momentum", type=float, default=0.9)
    flag("--seed", type=int, default=0)
    flag("--every", type=int, default=4)
    flag("--held-out", type=int, default=1000)
    a = parser.parse_args()

    torch.manual_seed(a.seed)
    torch.set_num_threads(1)
    model = network(a.width)
    if a.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=a.lr, momentum=a.momentum)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr)
    x, y = images(a.data, "train")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(a.seed))
    order = order.repeat(-(-a.steps * a.workers * a.batch_size // len(order)))
    order = order[: a.steps * a.workers * a.batch_size]
    data = TensorDataset(x[order], y[order])
    folder = os.environ.get(RECORD)
    recorder = Recorder(model, folder, a.steps, a.every) if folder else None
    epochs: Iterable[int] = range(1)
    if a.way == "zml":
        loader = zml.join(model, optimizer, DataLoader(data, batch_size=a.batch_size))
        epochs = zml.epochs(1)
        step = plain(model, optimizer)
    elif a.way == "torch":
        loader = dealt(data, a.batch_size, a.rank, a.workers)
        step = with_torch(a, model, optimizer)
    else:
        loader = DataLoader(data, batch_size=a.workers * a.batch_size)
        step = plain(model, optimizer)
    (Path(os.environ["TRAINEE_BEGAN"]) / BEGAN.format(os.getpid())).write_text(str(time.monotonic()))
    for _ in epochs:
        for bx, by in loader:
            step(bx, by)
            if recorder:
                recorder.step()
    if recorder:
        recorder.finish(*(each[: a.held_out] for each in images(a.data, "t10k")))


if __name__ == "__main__":
    main()
