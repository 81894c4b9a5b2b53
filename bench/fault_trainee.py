"""The script that `faults.py` has trained, with zml or under torchrun, while processes are killed.

A step sleeps for most of its time, so that a machine with few cores is no bottleneck. Every process appends a line to
a file of its own after each step: seconds of the monotonic clock, epoch, step, loss. Its name has the worker, the
incarnation and the process; it shows from outside when training stood still, and how many optimizer steps returned.
Each layer is a parameter group: groups have chunks of their own, so that every shard has parameters.

Under torchrun the state is kept as its users keep it: rank 0 writes a checkpoint every so many steps, and a process
that starts reads it. Worker k of n takes batch k, n + k, 2n + k ... of an epoch's order.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, TextIO

import checkout  # noqa: F401
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

FEATURES, CLASSES, BATCH, LR = 16, 4, 8, 0.05
RESULT, CHECKPOINT = "loss.json", "checkpoint.pt"


def samples(count: int, seed: int) -> TensorDataset:
    """A teacher's classes, some of them wrong, so that the loss has a floor."""
    random = torch.Generator().manual_seed(seed)
    teacher = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(4711))
    x = torch.randn(count, FEATURES, generator=random)
    y = (x @ teacher + torch.randn(count, CLASSES, generator=random)).argmax(1)
    return TensorDataset(x, y)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(FEATURES, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, CLASSES)
    )


def opened(folder: Path, worker: str, incarnation: int) -> TextIO:
    return (folder / f"steps-{worker}-{incarnation}-{os.getpid()}.txt").open("a", buffering=1)


def line(file: TextIO, epoch: int, step: int, loss: Tensor) -> None:
    file.write(f"{time.monotonic():.4f} {epoch} {step} {float(loss):.6f}\n")


def score(model: nn.Module, batch: Any) -> dict[str, float]:
    x, y = batch
    with torch.no_grad():
        return {"loss": float(F.cross_entropy(model(x), y, reduction="sum")), "n": float(len(x))}


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, pause: float) -> Tensor:
    x, y = batch
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    time.sleep(pause)
    loss.backward()
    optimizer.step()
    return loss.detach()


def with_zml(a: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    import zml

    seat = json.loads(os.environ.get("ZML_SEAT", "{}"))
    worker, incarnation = seat.get("worker", "alone"), seat.get("incarnation", 1)
    data = samples(a.batches * BATCH, a.seed)
    random = torch.Generator().manual_seed(a.seed)
    train = zml.join(model, optimizer, DataLoader(data, batch_size=BATCH, shuffle=True, generator=random))
    held_out = DataLoader(samples(2048, a.seed + 1), batch_size=256)
    done, totals = 0, {}
    with opened(a.folder, worker, incarnation) as file:
        for epoch in zml.epochs(a.epochs):
            for batch in train:
                loss = step_of(model, optimizer, batch, a.pause)
                line(file, epoch, done := done + 1, loss)
            if epoch == a.epochs - 1:
                totals = zml.evaluate(lambda held: score(model, held), held_out)
    if totals:
        (a.folder / RESULT).write_text(json.dumps(totals["loss"] / totals["n"]))


def with_torch(a: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    import datetime

    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, size, kept = dist.get_rank(), dist.get_world_size(), a.folder / CHECKPOINT
    begin = 0
    if kept.exists():
        state = torch.load(kept)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    parallel = DistributedDataParallel(model)
    data = samples(a.batches * BATCH, a.seed)
    per_epoch = a.batches // size
    with opened(a.folder, str(rank), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))) as file:
        for done in range(begin, a.epochs * per_epoch):
            epoch, at = divmod(done, per_epoch)
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(a.seed + epoch))
            mine = order[(at * size + rank) * BATCH :][:BATCH]
            loss = step_of(parallel, optimizer, data[mine], a.pause)
            line(file, epoch, done + 1, loss)
            if rank == 0 and (done + 1) % a.every == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done + 1}
                torch.save(state, kept.with_suffix(".new"))
                kept.with_suffix(".new").replace(kept)
    if rank == 0:
        totals = [score(model, held) for held in DataLoader(samples(2048, a.seed + 1), batch_size=256)]
        mean = sum(each["loss"] for each in totals) / sum(each["n"] for each in totals)
        (a.folder / RESULT).write_text(json.dumps(mean))
    dist.barrier()
    dist.destroy_process_group()


def alone(epochs: int, batches: int, at_once: int, seed: int, order: int) -> float:
    """The loss of plain Python without any pause, over the same samples in an order of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    data, random = samples(batches * BATCH, seed), torch.Generator().manual_seed(order)
    for _ in range(epochs):
        indices = torch.randperm(len(data), generator=random)
        for begin in range(0, len(data), at_once * BATCH):
            step_of(model, optimizer, data[indices[begin : begin + at_once * BATCH]], 0)
    held_out = samples(2048, seed + 1)[:]
    return score(model, held_out)["loss"] / 2048


def main() -> None:
    parser = argparse.ArgumentParser()
    flag = parser.add_argument
    flag("--way", choices=["zml", "torch"], required=True)
    flag("--folder", type=Path, required=True)
    flag("--epochs", type=int, default=6)
    flag("--batches", type=int, default=180, help="of all workers, per epoch")
    flag("--pause", type=float, default=0.045)
    flag("--every", type=int, default=50, help="steps between two checkpoints, with torch")
    flag("--seed", type=int, default=0)
    a = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(a.seed)
    model = network()
    layers = [{"params": list(layer.parameters())} for layer in model if isinstance(layer, nn.Linear)]
    optimizer = torch.optim.SGD(layers, lr=LR)
    (with_zml if a.way == "zml" else with_torch)(a, model, optimizer)


if __name__ == "__main__":
    main()
