"""What a shard's step costs beside torch's own: one model, one worker, the same gradients, in turn, one thread.

    python bench/optim.py --parameters 25e6 --optimizer AdamW

Prints the best of several rounds: torch.optim on whole tensors, `Store.apply` on chunks (encoded frames in, new
parameters in the store), `Store.pull_bucket` and `Replica.take` (payload to parameters), and their ratios.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

import torch

from zml.codec import by_name, split
from zml.hyper import OptimizerSpec, hyper_of
from zml.layout import BUCKET_CHUNKS, Layout, buckets
from zml.shard.store import Staged, Store
from zml.worker.binding import Binding
from zml.worker.replica import Replica


def model_of(parameters: int) -> torch.nn.Module:
    """Blocks as of a transformer: matrices, and many short vectors between them."""
    width = 512
    block = 12 * width * width + 13 * width
    return torch.nn.ModuleList(
        torch.nn.ModuleDict(
            {
                "norm": torch.nn.LayerNorm(width),
                "attention": torch.nn.Linear(width, 3 * width),
                "output": torch.nn.Linear(width, width),
                "norm2": torch.nn.LayerNorm(width),
                "up": torch.nn.Linear(width, 4 * width),
                "down": torch.nn.Linear(4 * width, width),
            }
        )
        for _ in range(max(1, round(parameters / block)))
    )


def best_ms(times: list[float]) -> float:
    return 1e3 * min(times)


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    model = model_of(int(arguments.parameters))
    kinds = {"SGD": {"lr": 1e-3, "momentum": 0.9}}
    make = getattr(torch.optim, arguments.optimizer)
    optimizer = make(model.parameters(), **kinds.get(arguments.optimizer, {"lr": 1e-4}))
    layout, spec = Layout.of(model, optimizer), OptimizerSpec.of(optimizer)
    codec = by_name(arguments.compress)
    store = Store(layout, range(len(layout.chunks)), spec, codec)
    worker_codec = by_name(arguments.compress)
    binding = Binding(layout, model)
    replica = Replica(binding, worker_codec)
    everything = buckets(layout, [0] * len(layout.chunks), BUCKET_CHUNKS)

    for chunk in layout.chunks:
        values = torch.empty(chunk.size)
        binding.read(chunk.index, values)
        store.load(chunk.index, values.numpy().data.cast("B"))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3

    packers = {b.index: worker_codec.packer([layout.chunks[c] for c in b.chunks]) for b in everything}
    outgoing: dict[int, memoryview] = {}

    def encode() -> None:
        for bucket in everything:
            packer = packers[bucket.index]
            for index in bucket.chunks:
                for segment in layout.chunks[index].segments:
                    gradient = binding.parameters[segment.parameter].grad
                    assert gradient is not None
                    flat = gradient.view(-1)[segment.start : segment.start + segment.size]
                    packer.values[index][segment.offset : segment.offset + segment.size].copy_(flat)
            outgoing[bucket.index] = packer.pack()

    def apply() -> None:
        step = [Staged(split(outgoing[bucket.index], bucket.chunks)) for bucket in everything]
        store.apply([step], hyper_of(optimizer))

    payloads: list[tuple[tuple[int, ...], list[int], list[int], memoryview]] = []

    def pull() -> None:
        payloads.clear()
        for bucket in everything:
            have = [replica.versions[index] for index in bucket.chunks]
            payloads.append((bucket.chunks, *store.pull_bucket(bucket.chunks, have)))

    def take() -> None:
        for chunks, versions, counts, payload in payloads:
            replica.take(chunks, versions, counts, payload)

    copy_from = torch.randn(layout.size)
    copy_to = torch.empty(layout.size)
    stages: dict[str, Callable[[], object]] = {
        "memcpy": lambda: copy_to.copy_(copy_from),
        "torch step": optimizer.step,
        "encode": encode,
        "apply": apply,
        "pull": pull,
        "take": take,
    }
    times: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(arguments.rounds + 1):
        for name, stage in stages.items():
            begin = time.perf_counter()
            stage()
            times[name].append(time.perf_counter() - begin)
    found = {f"{name} ms": round(best_ms(values[1:]), 2) for name, values in times.items()}
    found["parameters"] = layout.size
    found["apply / torch step"] = round(found["apply ms"] / found["torch step ms"], 3)
    for name in ("encode", "pull", "take"):
        found[f"{name} / memcpy"] = round(found[f"{name} ms"] / found["memcpy ms"], 2)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=float, default=25e6)
    parser.add_argument(
        "--optimizer", default="AdamW", choices=["SGD", "Adam", "AdamW", "Adagrad", "RMSprop"]
    )
    parser.add_argument("--compress", default="none", choices=["none", "bf16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = measure(arguments)
    if arguments.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:20} {value:>12,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
