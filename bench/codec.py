"""What the sparse codec costs and saves, beside a copy of memory, torch.topk and plain torch operations, in one run.

    python bench/codec.py [--elements 25.6e6] [--densities 0.1 1 5] [--seconds 60] [--threads 1] [--cpu] [--json FILE]

All rows are visited in turn, again and again, so that a busy machine is busy for all of them; the minimum and the
median of the visits are given. One thread, unless told otherwise. `encode` is what a worker does with its buckets
before they leave: values are in the packer, frames come out. `decode` checks a frame for each chunk and adds it.
With --cpu the time that this thread ran is counted: on a machine where others run, too, it is the nearer to the truth.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import lz4.frame
import numpy as np
import torch
from torch import Tensor

from zml.codec import by_name, split
from zml.codec.sparse import TopK, TopKPacker
from zml.compression import VALUES
from zml.layout import CHUNK, Chunk, Layout

BUCKET_CHUNKS = 32
SLOW = 0.15  # seconds: rows that take longer are visited a few times only
SLOW_VISITS = 3


@dataclass
class Row:
    """`prepare` is not timed; it is called before each `run`."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    times: list[float] = field(default_factory=list)

    def visit(self, clock: Callable[[], float]) -> None:
        if len(self.times) >= SLOW_VISITS and min(self.times) > SLOW:
            return
        self.prepare()
        begin = clock()
        self.run()
        self.times.append(clock() - begin)


class Data:
    """Heavy-tailed elements, and fresh ones for every step: error feedback never sees the same gradient twice."""

    def __init__(self, elements: int) -> None:
        rng = np.random.default_rng(1)
        self.pool = torch.from_numpy(rng.standard_t(3, elements).astype(np.float32))
        self._rng = rng

    def into(self, parts: list[Tensor]) -> None:
        at = int(self._rng.integers(len(self.pool)))
        for values in parts:
            first = min(len(values), len(self.pool) - at)
            values[:first] = self.pool[at : at + first]
            values[first:] = self.pool[: len(values) - first]
            at = (at + len(values)) % len(self.pool)


class Sparse:
    """The codec, as training uses it: a packer per bucket."""

    def __init__(self, text: str, data: Data, threads: int) -> None:
        elements = len(data.pool)
        width = 1_024
        shape = [(elements // width, width)] + ([(1, elements % width)] if elements % width else [])
        layout = Layout.build([(f"w{i}", each, 0) for i, each in enumerate(shape)], 1)
        self.chunks: tuple[Chunk, ...] = layout.chunks
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads)
        self.codecs = [self._codec(text) for _ in range(threads)]
        cuts = [self.chunks[at : at + BUCKET_CHUNKS] for at in range(0, len(self.chunks), BUCKET_CHUNKS)]
        self.packers: list[TopKPacker] = [
            self.codecs[index % threads].packer(cut) for index, cut in enumerate(cuts)
        ]
        self.data = data
        self.frames: list[bytes] = []
        self.out = torch.zeros(elements)
        self.entries = 0

    @staticmethod
    def _codec(text: str) -> TopK:
        codec = by_name(text)
        assert isinstance(codec, TopK)
        return codec

    def refill(self) -> None:
        self.data.into([values for packer in self.packers for values in packer.values.values()])

    def _parallel(self, work: Callable[[int], object]) -> None:
        if self.threads == 1:
            work(0)
        else:
            list(self.pool.map(work, range(self.threads)))

    def encode(self) -> None:
        def some(thread: int) -> None:
            for packer in self.packers[thread :: self.threads]:
                packer.pack()

        self._parallel(some)

    def collect(self) -> None:
        """The frames of the next pack."""
        self.refill()
        self.frames = []
        for packer in self.packers:
            cut = split(packer.pack(), [chunk.index for chunk in packer.chunks])
            self.frames += [bytes(cut[chunk.index]) for chunk in packer.chunks]
        codec = self.codecs[0]
        self.entries = sum(codec.entries(c, f) for c, f in zip(self.chunks, self.frames, strict=True))

    def decode(self) -> None:
        def some(thread: int) -> None:
            codec = self.codecs[thread]
            for chunk, frame in list(zip(self.chunks, self.frames, strict=True))[thread :: self.threads]:
                begin = chunk.index * CHUNK
                codec.decode(chunk, frame, self.out[begin : begin + chunk.size], add=True)

        self._parallel(some)


class Plain:
    """The same job in torch operations: a sampled threshold, nonzero, gather, int64 and fp32, LZ4."""

    def __init__(self, density: float, data: Data) -> None:
        self.density = density
        self.data = data
        self.residual = torch.zeros_like(data.pool)
        self.values = data.pool.clone()

    def refill(self) -> None:
        self.data.into([self.values])

    def encode(self) -> int:
        total = self.residual.add_(self.values)
        sample = total[:: 101 if self.density >= 0.005 else 11].abs()
        threshold = sample.kthvalue(len(sample) - max(1, round(self.density * len(sample))) + 1).values
        positions = torch.nonzero(total.abs() >= threshold).view(-1)
        chosen = total[positions]
        total[positions] = 0
        sizes = [len(lz4.frame.compress(part.numpy().tobytes())) for part in (positions, chosen)]
        return sum(sizes)

    def top_k(self) -> Tensor:
        return torch.topk(self.values.abs(), round(self.density * len(self.values)), sorted=False).indices


def entropy_bits(density: float) -> float:
    """Of a position, per entry, where every element is kept with the same probability."""
    d = density
    return -(d * math.log2(d) + (1 - d) * math.log2(1 - d)) / d


def codec_rows(data: Data, densities: list[float], threads: int) -> tuple[list[Row], dict[float, Sparse]]:
    copy = torch.zeros_like(data.pool)
    source = data.pool.clone()
    rows = [Row("memcpy", lambda: np.copyto(copy.numpy(), source.numpy()))]
    sparse: dict[float, Sparse] = {}
    for density in densities:
        coded = Sparse(f"topk:{100 * density:g}%", data, threads)
        reader = Sparse(f"topk:{100 * density:g}%", data, threads)
        for _ in range(3):
            reader.collect()
        plain = Plain(density, data)
        sparse[density] = coded
        rows += [
            Row(f"encode {density:.1%}", coded.encode, coded.refill),
            Row(f"decode + apply {density:.1%}", reader.decode),
            Row(f"torch ops {density:.1%}", plain.encode, plain.refill),
            Row(f"torch.topk {density:.1%}", plain.top_k),
        ]
    return rows, sparse


def measure(
    rows: list[Row], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, dict[str, float]]:
    end = time.monotonic() + seconds
    while time.monotonic() < end or min(len(row.times) for row in rows) < SLOW_VISITS:
        for row in rows:
            row.visit(clock)
    base = min(rows[0].times)
    middle = statistics.median(rows[0].times)
    return {
        row.name: {
            "ms": 1e3 * min(row.times),
            "median_ms": 1e3 * statistics.median(row.times),
            "x": min(row.times) / base,
            "median_x": statistics.median(row.times) / middle,
            "visits": len(row.times),
        }
        for row in rows
    }


# -- bits, clusters, errors ----------------------------------------------------------------------------------


def clustered(elements: int) -> Data:
    """Rows of a matrix differ: 1 in 50 is twenty times as large, as embeddings of the words in a batch are."""
    data = Data(elements)
    rows = data.pool[: elements // 1_024 * 1_024].view(-1, 1_024)
    rows[torch.from_numpy(np.random.default_rng(2).random(len(rows)) < 0.02)] *= 20
    return data


def bits(text: str, data: Data, steps: int = 4, refill: bool = True) -> dict[str, float]:
    """Bits per kept entry, all in: headers, counts, scales."""
    sparse = Sparse(text, data, 1)
    for packer in sparse.packers:  # the same rows are large in every step
        for chunk in packer.chunks:
            packer.values[chunk.index].copy_(data.pool[chunk.index * CHUNK :][: chunk.size])
    size = entries = 0
    for _ in range(steps):
        if refill:
            sparse.refill()
        for packer in sparse.packers:
            payload = packer.pack()
            size += len(payload)
            cut = split(payload, [chunk.index for chunk in packer.chunks])
            entries += sum(sparse.codecs[0].entries(chunk, cut[chunk.index]) for chunk in packer.chunks)
    gain = sparse.codecs[0].index_bytes
    return {
        "bits": 8 * size / entries,
        "kept": entries / (steps * len(data.pool)),
        "index_bits": 8 * gain.before / entries,
        "index_bits_lz4": 8 * gain.after / entries,
    }


def value_error(values: str, density: float, data: Data) -> float:
    """Squared error of the kept entries over their squares."""
    sparse = Sparse(f"topk:{100 * density:g}%:{values}", data, 1)
    sparse.refill()
    error = energy = 0.0
    for packer in sparse.packers:
        before = {chunk.index: packer.values[chunk.index].clone() for chunk in packer.chunks}
        packer.pack()
        for chunk in packer.chunks:
            positions = packer.sent(chunk.index)
            error += float(packer.residual(chunk.index)[positions].double().square().sum())
            energy += float(before[chunk.index][positions].double().square().sum())
    return error / energy


def sizes(elements: int, densities: list[float]) -> dict[str, Any]:
    iid, rows = Data(elements), clustered(elements)
    found: dict[str, Any] = {"iid": {}, "clustered": {}, "value_error": {}}
    for density in densities:
        for values in ("int4", "2bit"):
            text = f"topk:{100 * density:g}%:{values}"
            found["iid"][text] = bits(text, iid) | {"entropy_index_bits": entropy_bits(density)}
            found["clustered"][text] = bits(text, rows, refill=False)
        found["iid"][f"topk:{100 * density:g}%:int4:rice"] = bits(f"topk:{100 * density:g}%:int4:rice", iid)
        found["value_error"][f"{density:.1%}"] = {
            values: value_error(values, density, iid) for values in VALUES
        }
    return found


# -- a table -------------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    print(f"{'row':28} {'ms':>9} {'median':>9} {'x memcpy':>9} {'median':>8} {'visits':>7}")
    for name, row in result["times"].items():
        numbers = f"{row['ms']:9.2f} {row['median_ms']:9.2f} {row['x']:9.2f} {row['median_x']:8.2f}"
        print(f"{name:28} {numbers} {row['visits']:7.0f}")
    for kind in ("iid", "clustered"):
        print(f"\n{kind:28} {'bits/entry':>10} {'kept':>8} {'index':>7} {'with LZ4':>9} {'entropy':>8}")
        for text, row in result["sizes"][kind].items():
            entropy = f"{row['entropy_index_bits']:8.2f}" if "entropy_index_bits" in row else ""
            counts = f"{row['bits']:10.2f} {row['kept']:8.3%} {row['index_bits']:7.2f} {row['index_bits_lz4']:9.2f}"
            print(f"{text:28} {counts} {entropy}")
    print("\nsquared error of kept entries")
    for density, errors in result["sizes"]["value_error"].items():
        print(f"{density:8}", "  ".join(f"{values} {error:.2e}" for values, error in errors.items()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--elements", type=float, default=25.6e6)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 1, 5], help="per cent")
    parser.add_argument("--seconds", type=float, default=60, help="to spend on timings")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", action="store_true", help="count the thread's own time; with --threads 1")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.cpu and arguments.threads > 1:
        parser.error("--cpu counts one thread")
    torch.set_num_threads(arguments.threads)
    elements, densities = int(arguments.elements), [density / 100 for density in arguments.densities]
    load = os.getloadavg()[0]
    rows, _ = codec_rows(Data(elements), densities, arguments.threads)
    result = {
        "elements": elements,
        "threads": arguments.threads,
        "load_before": load,
        "clock": "cpu" if arguments.cpu else "wall",
        "times": measure(rows, arguments.seconds, time.thread_time if arguments.cpu else time.perf_counter),
        "sizes": sizes(min(elements, 4_194_304), densities),
    }
    print(
        f"{elements:,} float32, {arguments.threads} thread(s), load before {load:.1f}, {sys.version.split()[0]}\n"
    )
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
