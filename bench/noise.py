"""What does measuring the gradient noise scale cost a shard? One pass over all gradients, in every EVERY-th step.

    python bench/noise.py --workers 4

`step` is `Store.apply` with fp32 gradients of all workers of a clock, `measured` the same with their norms; they take
turns, on the same gradients. `share` is what measuring adds to the steps on average, at one in `shard.pace.EVERY`. One
thread, as a shard has, and its CPU time, because others may use the cores; medians of many rounds.
"""

import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import checkout  # noqa: F401
import click
import torch

from zml.codec import by_name, cut
from zml.hyper import OptimizerSpec, hyper_of
from zml.layout import Layout, buckets
from zml.shard.pace import EVERY
from zml.shard.store import Staged, Store

RULES: dict[str, dict[str, Any]] = {"SGD": {"lr": 1e-3, "momentum": 0.9}, "AdamW": {"lr": 1e-4}}
WIDTH, AT_MOST = 1024, 0.02


def steps(store: Store, layout: Layout, compress: str, workers: int) -> list[list[Staged]]:
    """One clock: a step of each worker, checked as when it came."""
    codec, found = by_name(compress), []
    for worker in range(workers):
        random = torch.Generator().manual_seed(worker)
        pushes = []
        for bucket in buckets(layout, [0] * len(layout.chunks)):
            packer = codec.packer([layout.chunks[index] for index in bucket.chunks])
            for index in bucket.chunks:
                torch.randn(layout.chunks[index].size, generator=random, out=packer.values[index])
            frames = cut(memoryview(bytes(packer.pack())), len(bucket.chunks))
            pushes.append(Staged(dict(zip(bucket.chunks, frames, strict=True))))
            store.check(pushes[-1])
        found.append(pushes)
    return found


def measure(rule: str, elements: float, workers: int, compress: str, rounds: int) -> dict[str, float]:
    layout = Layout.build([("matrix", (max(1, round(elements / WIDTH)), WIDTH), 0)], 1)
    optimizer = getattr(torch.optim, rule)([torch.zeros(1, requires_grad=True)], **RULES[rule])
    store = Store(layout, range(len(layout.chunks)), OptimizerSpec.of(optimizer), by_name(compress))
    for chunk in layout.chunks:
        store.load(chunk.index, torch.zeros(chunk.size).numpy().data.cast("B"))
    given, hypers = steps(store, layout, compress, workers), hyper_of(optimizer)
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(2 * rounds + 4):
        began = time.thread_time()
        store.apply(given, hypers, measure=bool(turn % 2))
        if turn >= 4:
            times[bool(turn % 2)].append(time.thread_time() - began)
    step, measured = (1e3 * statistics.median(times[how]) for how in (False, True))
    return {"step_ms": step, "measured_ms": measured, "share": (measured - step) / step / EVERY}


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--elements", type=float, default=10e6, show_default=True)
@click.option("--workers", type=click.IntRange(2), multiple=True, default=(2, 8), show_default=True)
@click.option("--compress", type=click.Choice(["none", "bf16"]), multiple=True, default=("none", "bf16"))
@click.option("--rounds", type=click.IntRange(1), default=30, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(
    elements: float, workers: Sequence[int], compress: Sequence[str], rounds: int, as_json: bool
) -> None:
    torch.set_num_threads(1)
    rows = [
        {"rule": rule, "workers": n, "compress": how, **measure(rule, elements, n, how, rounds)}
        for rule in RULES
        for how in compress
        for n in workers
    ]
    if as_json:
        click.echo(json.dumps({"elements": elements, "every": EVERY, "rows": rows}))
        return
    click.echo(f"{'':8}{'':6}{'workers':>8}{'step ms':>10}{'measured':>10}{'share':>8}   one step in {EVERY}")
    for row in rows:
        click.echo(
            f"{row['rule']:8}{row['compress']:6}{row['workers']:8}{row['step_ms']:10.1f}"
            f"{row['measured_ms']:10.1f}{100 * row['share']:7.2f}%"
        )
    worst = max(row["share"] for row in rows)
    click.echo(f"at most {100 * AT_MOST:g} %: {'reached' if worst <= AT_MOST else 'missed'}")


if __name__ == "__main__":
    main()
