"""A hundred deaths: a language model is trained while one process after the other is killed, whichever it may be.

    python bench/kills.py                                100 kills, a quarter of an hour
    python bench/kills.py --kills 20 --every 3 --seed 7
    python bench/kills.py -- --compress topk:1% --staleness 2

`zml run -w 3 -p 2` trains `examples/char_lm.py`. At random moments, `--every` seconds apart on average, a random one
of its processes gets SIGKILL: an agent with its script, a script alone, a shard, the coordinator. Nobody waits until
the former has healed, so that several may be away at once, and nobody helps. When all kills are done the training
comes to its end; where it ends before, the bench fails and `--epochs` should be larger. Before it the same training
runs undisturbed, for the loss.

It ends with 0 if the training did, and `zml data audit` finds every batch of every epoch once.
"""

import json
import random
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import checkout  # noqa: F401
import click
from faults import HERE, LIMITS, Failed, Training, audit, kill, parent, run_dir_of, training

START_S, END_S = 120.0, 3600.0
EXAMPLE = HERE.parent / "examples" / "char_lm.py"
LOSS = re.compile(r"validation loss ([\d.]+)")


def living(made: Training) -> dict[str, list[list[int]]]:
    """What can be killed now: the processes of each victim, by kind."""
    agents = made.pids("zml worker")
    scripts = [pid for pid in made.pids("zml.agent.runner") if parent(pid) in agents]
    return {
        # An agent before its script, which it would start again.
        "worker": [[agent, *(pid for pid in scripts if parent(pid) == agent)] for agent in agents],
        "script": [[pid] for pid in scripts],
        "shard": [[pid] for pid in made.pids("zml ps")],
        "coordinator": [[pid] for pid in made.pids("zml coordinator")],
    }


def strike(made: Training, dice: random.Random) -> str:
    """The kind that was killed; empty if there is nothing to kill."""
    there = {kind: victims for kind, victims in living(made).items() if victims}
    if not there or made.over:
        return ""
    kind = dice.choice(sorted(there))
    for pid in dice.choice(there[kind]):
        kill(pid)
    return kind


def final_loss(text: str) -> float | None:
    found = LOSS.findall(text)
    return float(found[-1]) if found else None


@contextmanager
def kept(made: Training, folder: Path | None) -> Iterator[None]:
    """What the run has written is kept for whoever wants to know why it failed."""
    try:
        yield
    except Failed:
        if folder is not None:
            shutil.copytree(run_dir_of(made), folder, dirs_exist_ok=True)
        raise


def run(
    flags: tuple[str, ...],
    epochs: int,
    kills: int,
    every: float,
    dice: random.Random,
    keep: Path | None = None,
) -> tuple[Counter[str], list[dict[str, int]], float | None, float]:
    """The kills by kind, the ledger's account of each epoch, the loss at the end, seconds. Raises Failed."""
    killed: Counter[str] = Counter()
    script = [str(EXAMPLE), "--epochs", str(epochs), "--layers", "2", "--width", "64"]
    command = [sys.executable, "-m", "zml", "run", "-w", "3", "-p", "2", "--cpu", *flags, *script]
    begin = time.monotonic()
    with training(command, **LIMITS) as made, kept(made, keep):
        made.until(lambda: "epoch 1/" in made.text, "the first epoch", START_S)
        while killed.total() < kills:
            time.sleep(dice.expovariate(1 / every))  # nobody waits for the former to heal
            if made.over:
                raise Failed(f"after {killed.total()} kills it ended:\n{made.text[-3000:]}")
            if kind := strike(made, dice):
                killed[kind] += 1
                click.echo(f"{time.monotonic() - begin:6.0f} s: {kind}", err=True)
        made.until(lambda: made.over, "the end", END_S)
        if made.process.returncode:
            raise Failed(f"it ended with {made.process.returncode}:\n{made.text[-3000:]}")
        return killed, audit(run_dir_of(made)), final_loss(made.text), time.monotonic() - begin


@click.command(context_settings={"help_option_names": ["-h", "--help"]}, help=__doc__)
@click.option("--kills", type=click.IntRange(1), default=100, show_default=True)
@click.option("--every", type=float, default=5.0, show_default=True, help="Seconds between two kills, mean.")
@click.option("--epochs", type=click.IntRange(1), default=40, show_default=True)
@click.option("--calm/--no-calm", default=True, show_default=True, help="The undisturbed run.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--keep", type=click.Path(path_type=Path), metavar="FOLDER", help="For a run that fails.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE")
@click.argument("flags", nargs=-1)
def main(
    kills: int,
    every: float,
    epochs: int,
    calm: bool,
    seed: int,
    keep: Path | None,
    json_file: Path | None,
    flags: tuple[str, ...],
) -> None:
    dice = random.Random(seed)
    try:
        undisturbed = run(flags, epochs, 0, every, dice) if calm else None
        killed, rows, loss, seconds = run(flags, epochs, kills, every, dice, keep)
    except Failed as failed:
        raise click.ClickException(str(failed)) from None
    sums = {
        name: sum(row[name] or 0 for row in rows)
        for name in ("batches", "committed", "reissued", "duplicates", "missing")
    }
    click.echo(
        f"{killed.total()} kills ({', '.join(f'{n} {kind}' for kind, n in sorted(killed.items()))}) in {seconds:.0f} s"
    )
    click.echo(
        f"{len(rows)} of {epochs} epochs: {', '.join(f'{name} {value:,}' for name, value in sums.items())}"
    )
    if undisturbed is not None:
        click.echo(f"validation loss {loss}; undisturbed {undisturbed[2]} ({undisturbed[3]:.0f} s)")
    else:
        click.echo(f"validation loss {loss}")
    if json_file:
        found = {
            "kills": killed,
            "seconds": seconds,
            "seed": seed,
            "epochs": rows,
            "loss": loss,
            "calm": undisturbed,
        }
        json_file.write_text(json.dumps(found, indent=1))
    if len(rows) != epochs or sums["duplicates"] or sums["missing"] or sums["committed"] != sums["batches"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
