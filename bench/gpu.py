"""The sparse codec where gradients live on a GPU, against that GPU's own memory and torch's own Top-K, in one run.

    python bench/gpu.py                     a table; --json for a machine
    python bench/gpu.py --device cpu        the same code where there is no GPU: a check, not a measurement

copy                a copy of the dense fp32 gradient inside the device's memory: the bandwidth that there is
to host             the same gradient to the host's memory, pinned: what compression is there to avoid
torch.topk          on the magnitudes, all at once
choose              per bucket: residual, threshold, choice, and the copy of the entries to the host; with the kernels
                    of picking_triton where there are any, and with torch's operations
encode, whole       the same, the frames written by one thread of the host, and the residual updated
encode on the host  instead: the gradient copied there bucket by bucket, and the CPU's packer, one thread
decode and apply    the frames read by one thread of the host, their entries copied and added on the device

Gradients are heavy-tailed (Student's t, 3 degrees of freedom). Each figure is the least of many rounds; the device is
waited for before a clock is read.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import checkout  # noqa: F401
import numpy as np
import torch

from zml.codec import cut
from zml.codec.device import DevicePacker, add_frames
from zml.codec.picking import TorchPicker
from zml.codec.sparse import TopK, TopKPacker
from zml.compression import parse
from zml.layout import Layout, buckets

WIDTH = 1024


def heavy_tailed(size: int, device: torch.device) -> torch.Tensor:
    normal = torch.randn((4, size), device=device)
    return normal[0] / normal[1:].square().mean(0).sqrt()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    layout = Layout.build([("matrix", (max(1, round(arguments.elements / WIDTH)), WIDTH), 0)], 1)
    found = buckets(layout, [0] * len(layout.chunks), arguments.bucket_chunks)
    gradient = heavy_tailed(layout.size, device)
    target = torch.empty_like(gradient)
    host = torch.empty(layout.size, pin_memory=on_gpu)
    least: dict[str, float] = {}

    def timed(name: str, call: Callable[[], object], rounds: int) -> None:
        for turn in range(rounds + 2):
            if on_gpu:
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            call()
            if on_gpu:
                torch.cuda.synchronize(device)
            if turn >= 2:  # allocations, choices of algorithms, compiling
                least[name] = min(least.get(name, float("inf")), time.perf_counter() - begin)

    timed("copy", lambda: target.copy_(gradient), arguments.rounds)
    timed("to host", lambda: host.copy_(gradient), arguments.rounds)
    bits: dict[str, float] = {}
    for density in arguments.densities:
        codec = TopK(parse(f"topk:{100 * density:g}%:{arguments.values}"))
        packers = []
        for bucket in found:
            packer = DevicePacker(codec, [layout.chunks[index] for index in bucket.chunks], device)
            for index in bucket.chunks:
                chunk = layout.chunks[index]
                start = index * layout.chunk_elements
                packer.values[index].copy_(gradient[start : start + chunk.size])
            packers.append(packer)
        payloads: list[memoryview] = []
        kept = int(density * layout.size)

        def choose(
            torch_ops: bool = False, packers: list[DevicePacker] = packers, density: float = density
        ) -> None:
            for packer in packers:
                total = packer._residual + packer._values
                wanted = np.rint(packer._sizes * density).astype(np.int64)
                floors, rooms = packer._floors(total, wanted), 2 * wanted + 16
                pick = TorchPicker(packer._slice_of, packer._vectors) if torch_ops else packer._pick
                pick(total, floors, rooms)

        def pack(packers: list[DevicePacker] = packers, payloads: list[memoryview] = payloads) -> None:
            payloads[:] = [packer.pack() for packer in packers]

        on_host = [(packer, codec.packer(packer.chunks)) for packer in packers]

        def there(pairs: list[tuple[DevicePacker, TopKPacker]] = on_host) -> None:
            for packer, other in pairs:
                for index, values in packer.values.items():
                    other.values[index].copy_(values)
                other.pack()

        def apply(
            packers: list[DevicePacker] = packers, payloads: list[memoryview] = payloads, codec: TopK = codec
        ) -> None:
            for packer, payload in zip(packers, payloads, strict=True):
                starts = [chunk.index * layout.chunk_elements for chunk in packer.chunks]
                add_frames(codec, packer.chunks, cut(payload, len(starts)), starts, target)

        at = f"{100 * density:g} %"
        timed(f"torch.topk, {at}", lambda kept=kept: torch.topk(gradient.abs(), kept, sorted=False), 3)  # type: ignore[misc]
        timed(f"choose, torch ops, {at}", lambda choose=choose: choose(True), arguments.rounds)  # type: ignore[misc]
        timed(f"choose, {at}", choose, arguments.rounds)
        timed(f"encode, whole, {at}", pack, arguments.rounds)
        timed(f"encode on the host, {at}", there, arguments.rounds)
        timed(f"decode and apply, {at}", apply, arguments.rounds)
        entries = sum(
            codec.entries(chunk, frame)
            for packer, payload in zip(packers, payloads, strict=True)
            for chunk, frame in zip(packer.chunks, cut(payload, len(packer.chunks)), strict=True)
        )
        bits[at] = round(8 * sum(map(len, payloads)) / entries, 2)
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "elements": layout.size,
        "values": arguments.values,
        "chunks in a bucket": arguments.bucket_chunks,
        "bits per entry": bits,
        "ms": {name: round(1e3 * value, 4) for name, value in least.items()},
        "x copy": {name: round(value / least["copy"], 2) for name, value in least.items()},
        "GB/s of gradient": {name: round(4 * layout.size / value / 1e9, 1) for name, value in least.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--elements", type=float, default=25.6e6)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.001, 0.01, 0.05])
    parser.add_argument("--values", default="int4")
    parser.add_argument("--bucket-chunks", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no GPU here (torch.cuda.is_available() is False): nothing was measured.")
        print("bench/gpu.py --device cpu runs the same code on the CPU.")
        return 0
    torch.set_num_threads(1)
    found = measure(arguments)
    if arguments.json:
        print(json.dumps(found))
        return 0
    print(
        f"{found['device']}, {found['elements']:,} elements, {found['values']}, "
        f"bits per entry {found['bits per entry']}"
    )
    print(f"{'':30}{'ms':>12}{'x copy':>10}{'GB/s':>10}")
    for name, value in found["ms"].items():
        print(f"{name:30}{value:12.3f}{found['x copy'][name]:10.2f}{found['GB/s of gradient'][name]:10.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
