"""What a step costs a shard when gradients are sparse, against a copy of the parameters in the same run, one thread.

    python bench/shard_step.py --workers 8 --compress topk:1%

`apply` is `Store.apply` with the frames of all workers of a clock; `publish` is `Store.pull_bucket` for every bucket by
a worker that has the version before: deltas are made, logged and copied into payloads. `check` is what the shard has
done before, when the pushes came. `torch` is the same step by torch's own optimizer after the same decoding. Gradients
are heavy-tailed (Student's t, 3 degrees of freedom) in one large matrix. Each figure is the least of many rounds, in
which all rows take turns.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import checkout  # noqa: F401
import torch

import zml.shard.store
from zml.codec import Codec, by_name, cut
from zml.hyper import Hyper, OptimizerSpec, hyper_of
from zml.layout import Bucket, Layout, buckets
from zml.shard.store import Staged, Store

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 1e-3}),
    "SGD, momentum": ("SGD", {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}),
    "Adam": ("Adam", {"lr": 1e-4}),
    "AdamW": ("AdamW", {"lr": 1e-4}),
}
STEPS = 3  # different ones, in turn
WIDTH = 1024


class Rule:
    """A store with one optimizer, and the steps that it is given in turn."""

    def __init__(
        self, name: str, layout: Layout, found: Sequence[Bucket], compress: str, delta: float | None
    ) -> None:
        kind, options = RULES[name]
        optimizer = getattr(torch.optim, kind)([torch.zeros(1, requires_grad=True)], **options)
        self.hypers: list[Hyper] = hyper_of(optimizer)
        self.found = found
        self.delta = delta
        self.store = Store(layout, range(len(layout.chunks)), OptimizerSpec.of(optimizer), by_name(compress))
        random = torch.Generator().manual_seed(0)
        for chunk in layout.chunks:
            values = torch.randn(chunk.size, generator=random) / 32
            self.store.load(chunk.index, values.numpy().data.cast("B"))
        self.have = [0] * len(layout.chunks)
        self.bytes = 0

    def apply(self, step: list[list[Staged]]) -> None:
        self.store.apply(step, self.hypers)

    def publish(self) -> None:
        self.bytes = 0
        if self.delta is not None:
            for held in self.store._held.values():
                held.budget = round(self.delta * held.chunk.size)
        for bucket in self.found:
            versions, _, payload = self.store.pull_bucket(
                bucket.chunks, [self.have[i] for i in bucket.chunks]
            )
            self.bytes += len(payload)
            for index, version in zip(bucket.chunks, versions, strict=True):
                self.have[index] = version


def push(codec: Codec, layout: Layout, found: Sequence[Bucket], seed: int) -> list[bytes]:
    """One worker's payloads for one clock, bucket by bucket."""
    random = torch.Generator().manual_seed(seed)
    payloads = []
    for bucket in found:
        packer = codec.packer([layout.chunks[index] for index in bucket.chunks])
        for index in bucket.chunks:
            normal = torch.randn((4, layout.chunks[index].size), generator=random)
            spread = normal[1:].square_().mean(0).sqrt_()
            torch.div(normal[0], spread, out=packer.values[index])  # Student's t, 3 degrees of freedom
        payloads.append(bytes(packer.pack()))
    return payloads


def stage(payload: bytes, bucket: Bucket) -> Staged:
    frames = cut(memoryview(payload), len(bucket.chunks))
    return Staged(dict(zip(bucket.chunks, frames, strict=True)))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = max(1, round(arguments.elements / WIDTH))
    layout = Layout.build([("matrix", (rows, WIDTH), 0)], 1)
    found = buckets(layout, [0] * len(layout.chunks))
    codec = by_name(arguments.compress)
    pushes = [
        [push(codec, layout, found, 100 * step + worker) for worker in range(arguments.workers)]
        for step in range(STEPS)
    ]
    rules = {name: Rule(name, layout, found, arguments.compress, arguments.delta) for name in arguments.rules}
    slow = {}
    if arguments.torch:
        slow = {name: Rule(name, layout, found, arguments.compress, arguments.delta) for name in rules}
    source, target = torch.randn(layout.size), torch.empty(layout.size)
    times: dict[str, list[float]] = {}
    clock = time.thread_time if arguments.cpu else time.perf_counter

    def timed(name: str, call: Any, *given: Any) -> Any:
        begin = clock()
        result = call(*given)
        times.setdefault(name, []).append(clock() - begin)
        return result

    def checked(step: Sequence[Sequence[bytes]]) -> list[list[Staged]]:
        staged = [[stage(p, b) for p, b in zip(worker, found, strict=True)] for worker in step]
        for worker in staged:
            for one in worker:
                next(iter(rules.values())).store.check(one)
        return staged

    for turn in range(arguments.rounds + 2):
        timed("memcpy", target.copy_, source)
        step = timed("check", checked, pushes[turn % STEPS])
        for name, rule in rules.items():
            timed(f"{name}: apply", rule.apply, step)
            timed(f"{name}: publish", rule.publish)
        for name, rule in slow.items():
            kept, zml.shard.store.fused_state = zml.shard.store.fused_state, lambda *_: None  # type: ignore[assignment]
            timed(f"{name}: torch", rule.apply, step)
            zml.shard.store.fused_state = kept
        if turn < 2:
            times.clear()  # the first step makes the state, the first delta its memory

    least = {name: min(values) for name, values in times.items()}
    for name in rules:
        least[f"{name}: apply + publish"] = least[f"{name}: apply"] + least[f"{name}: publish"]
    copy = least["memcpy"]
    upward = sum(len(payload) for worker in pushes[0] for payload in worker)
    return {
        "elements": layout.size,
        "workers": arguments.workers,
        "compress": arguments.compress,
        "load": round(os.getloadavg()[0], 2),
        "bytes up, one worker": upward // arguments.workers,
        "bytes down": {name: rule.bytes for name, rule in rules.items()},
        "ms": {name: round(1e3 * value, 3) for name, value in least.items()},
        "x memcpy": {name: round(value / copy, 2) for name, value in least.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--elements", type=float, default=25.6e6)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--compress", default="topk:1%")
    parser.add_argument("--delta", type=float, help="density of deltas; left out: what the store decides")
    parser.add_argument(
        "--cpu", action="store_true", help="CPU time of the thread, where others use the cores"
    )
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--torch", action="store_true", help="torch's own optimizers as well")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments)
    if arguments.json:
        print(json.dumps(found))
        return 0
    print(
        f"{found['workers']} workers, {found['elements']:,} elements, {found['compress']}, load {found['load']}; "
        f"bytes up of one worker {found['bytes up, one worker']:,}"
    )
    print(f"{'':34}{'ms':>10}{'x memcpy':>10}{'bytes down':>14}")
    for name, value in found["ms"].items():
        rule, _, what = name.partition(": ")
        down = f"{found['bytes down'][rule]:14,}" if what == "publish" else ""
        print(f"{name:34}{value:10.2f}{found['x memcpy'][name]:10.2f}{down}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
