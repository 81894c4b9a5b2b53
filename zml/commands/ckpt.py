"""`zml ckpt`: what checkpoints a run has, whether they are whole, what is in them, and the model for others.

Exit codes, as of diff: 0 yes, 1 no (one is damaged, two differ, there is none), 2 the question makes no sense.
Only `prune` changes anything below a run. A job may be running all the while.
"""

import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import BAD_CHECKPOINT, NO_CHECKPOINT, NOT_WRITTEN, USAGE, ZmlError

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint, Difference, Manifest
    from ..checkpoint.finding import Place

SHOWN = 40  # parameters, unless all are asked for
SAID = ("script", "args", "folder", "workers", "shards")  # of a job, apart from the rest
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


class Questions(click.Group):
    """A checkpoint that is damaged or not there is an answer here, with exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        from .cli import say_error

        try:
            return super().invoke(ctx)
        except ZmlError as error:
            if error.code not in (BAD_CHECKPOINT, NO_CHECKPOINT):
                raise
            say_error(error)
            return 1


@click.group(cls=Questions, invoke_without_command=True)
@click.pass_context
def ckpt(context: click.Context) -> None:
    """List, check, compare, export and delete checkpoints.

    RUN is a run directory, its `checkpoints` folder, or one checkpoint in it; or a run's name below ./runs, or the
    beginning or end of one; without it, the newest run. Of a run, the newest checkpoint is meant where one is needed.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
RUN = click.argument("run", required=False)


def place(run: str | None) -> "Place":
    """Where RUN leads; without it, the newest run below the folder of the settings. Raises ZmlError."""
    from ..checkpoint.finding import find
    from ..runs import finding
    from .flags import settle

    runs = Path(settle({}).settings.runs)
    if run is not None:
        return find(Path(run) if finding.is_folder(Path(run)) else finding.find(run, runs))
    newest = finding.newest(runs)
    if newest is None:
        raise ZmlError(USAGE, f"there is no run below {runs}", "Name a run directory or a checkpoint.")
    return find(newest)


def load(run: str | None, deep: bool) -> "Checkpoint":
    """The checkpoint that is named, or the newest of the run that verifies; what is skipped is said."""
    from ..checkpoint.finding import load_from

    return load_from(place(run), lambda each: click.echo(str(each), err=True), deep)


def about(path: Path, manifest: "Manifest | None", wrong: str | None) -> dict[str, Any]:
    """One checkpoint in a list, for machines."""
    found: dict[str, Any] = {"name": path.name, "path": str(path), "wrong": wrong}
    if manifest is not None:
        for key in ("step", "epoch", "created", "because", "parameters", "bytes"):
            found[key] = getattr(manifest, key)
        found["files"] = len(manifest.files)
    return found


def job_lines(job: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """job.json for people: what was asked for, as far as it is not what everybody has. Another version may have written
    it, so that nothing is taken for granted; --json shows all of it."""
    from msgspec import to_builtins

    from ..messages import JobSpec
    from ..text.console import counted

    rest = dict(job)
    spec, note, course = (found_in(rest.pop(key, None)) for key in ("spec", "note", "course"))
    if spec:
        usual = to_builtins(JobSpec())
        args = spec.get("args")
        words = [
            str(word) for word in (spec.get("script"), *(args if isinstance(args, list) else ())) if word
        ]
        if words:
            yield "script", f"{shlex.join(words)}, in {spec.get('folder') or '?'}"
        members = [
            counted(spec[f"{role}s"], role)
            for role in ("worker", "shard")
            if isinstance(spec.get(f"{role}s"), int)
        ]
        more = {key: value for key, value in spec.items() if key not in SAID and value != usual.get(key)}
        chosen = [f"{key} {'async' if value is None else value}" for key, value in more.items()]
        yield "asked for", ", ".join([*members, *chosen])
    if rest:
        yield "job", ", ".join(f"{key} {value}" for key, value in rest.items())
    if note:
        yield "schedules", f"as of epoch {note.get('epoch')}, {len(str(note.get('note', ''))) // 2:,} bytes"
    if spec.get("lr_scaling", "none") != "none" and "factor" in course:
        yield "rate", f"x {course['factor']}"


def found_in(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def examine(where: "Place", check: Callable[[Path], "Manifest"]) -> list[dict[str, Any]]:
    """What `check` says of each, the oldest first."""
    from ..checkpoint import BadCheckpoint, entries

    found = []
    for path in [where.one] if where.one else [where.root / each.name for each in entries(where.root)]:
        try:
            found.append(about(path, check(path), None))
        except BadCheckpoint as error:
            found.append(about(path, None, error.because))
    return found


def print_list(where: "Place", found: list[dict[str, Any]], good: str, as_json: bool) -> None:
    from ..text.tables import print_table, size

    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    if not found:
        click.echo(f"no checkpoints in {where.root}")
        return
    rows = []
    for each in found:
        row = [""] * 5
        if each["wrong"] is None:
            created = each["created"][:16].replace("T", " ") + " UTC"
            row = [str(each["step"]), str(each["epoch"] + 1), created, each["because"], size(each["bytes"])]
        rows.append([each["name"], *row, each["wrong"] or good])
    print_table(("checkpoint", "step>", "epoch>", "created", "because", "size>", "state"), rows, "state")


# -- commands ------------------------------------------------------------------------------------------------


@ckpt.command("list")
@AS_JSON
@RUN
def list_(run: str | None, as_json: bool) -> int:
    """The checkpoints of a run, the oldest first.

    Manifests are read and sizes compared; `verify` reads every byte.
    """
    from ..checkpoint import read_manifest

    where = place(run)
    print_list(where, examine(where, read_manifest), "sizes right", as_json)
    return 0


@ckpt.command()
@AS_JSON
@RUN
def verify(run: str | None, as_json: bool) -> int:
    """Read every byte of every checkpoint of a run.

    The exit code is 1 if one is not whole, or if there is none.
    """
    from ..checkpoint import read

    where = place(run)
    found = examine(where, lambda path: read(path).manifest)
    print_list(where, found, "whole", as_json)
    return 0 if found and all(each["wrong"] is None for each in found) else 1


@ckpt.command()
@click.option("--all", "everything", is_flag=True, help=f"All parameters, not the first {SHOWN}.")
@AS_JSON
@RUN
def show(run: str | None, everything: bool, as_json: bool) -> int:
    """What is in a checkpoint.

    Step, files, optimizer, parameters, the job's settings. All but the tensors' bytes is checked.
    """
    from ..text.ansi import printable
    from ..text.tables import print_table, size

    checkpoint = load(run, deep=False)
    layout, optimizer = checkpoint.registration.layout, checkpoint.registration.optimizer
    manifest, versions = checkpoint.manifest, checkpoint.versions.values()
    frozen = len(layout.groups) - 1
    if as_json:
        said = about(checkpoint.path, manifest, None) | {
            "layout": manifest.layout,
            "files": {name: {"bytes": f.bytes, "xxh3": f.xxh3} for name, f in manifest.files.items()},
            "optimizer": {"name": optimizer.name, "groups": list(optimizer.fixed)},
            "chunks": {"count": len(layout.chunks), "elements": layout.chunk_elements},
            "versions": [min(versions), max(versions)],
            "parts": checkpoint.parts,
            "tensors": [
                {"name": p.name, "shape": p.shape, "group": p.group, "frozen": p.group == frozen}
                for p in layout.parameters
            ],
            "job": checkpoint.job,
            "ledger": checkpoint.ledger,
        }
        click.echo(json.dumps(said, indent=2))
        return 0
    low, high = min(versions), max(versions)
    for key, text in (
        ("checkpoint", str(checkpoint.path)),
        ("step", f"{manifest.step}, epoch {manifest.epoch + 1}"),
        ("created", f"{manifest.created}, {manifest.because}"),
        ("model", f"{manifest.parameters:,} elements in {len(layout.parameters):,} parameters"),
        (
            "optimizer",
            f"{optimizer.name}, {len(optimizer.fixed)} groups; saved: {', '.join(checkpoint.parts)}",
        ),
        ("chunks", f"{len(layout.chunks):,}, version {low if low == high else f'{low} to {high}'}"),
        *job_lines(checkpoint.job),
    ):
        click.echo(f"{key:<11} {printable(text)}")
    click.echo()
    print_table(
        ("file", "size>", "xxh3"), [[name, size(f.bytes), f.xxh3] for name, f in manifest.files.items()]
    )
    click.echo()
    shown = layout.parameters if everything else layout.parameters[:SHOWN]
    rows = [
        [
            p.name,
            " x ".join(map(str, p.shape)) or "one number",
            "frozen" if p.group == frozen else str(p.group),
        ]
        for p in shown
    ]
    print_table(("parameter", "shape", "group>"), rows)
    if len(shown) < len(layout.parameters):
        click.echo(f"and {len(layout.parameters) - len(shown):,} more; --all shows them")
    return 0


@ckpt.command()
@click.option("--all", "everything", is_flag=True, help="What is equal, too.")
@AS_JSON
@click.argument("a")
@click.argument("b")
def diff(a: str, b: str, everything: bool, as_json: bool) -> int:
    """How two checkpoints differ, parameter by parameter.

    Largest absolute difference, and the norm of the difference relative to A's. The exit code is 1 if a bit differs.
    """
    from .. import checkpoint
    from ..text.tables import print_table

    first, second = load(a, deep=True), load(b, deep=True)
    found = list(checkpoint.diff(first, second))
    optimizers = [each.registration.optimizer.name for each in (first, second)]
    same = all(each.equal for each in found)
    if as_json:
        rows = [{k: _finite(v) for k, v in asdict(each).items()} for each in found]
        said = {"a": str(first.path), "b": str(second.path), "equal": same, "optimizers": optimizers}
        click.echo(json.dumps(said | {"differences": rows}, indent=2))
        return 0 if same else 1
    shown = [each for each in found if everything or not each.equal]
    if shown:
        print_table(
            ("parameter", "part", "elements>", "max |a-b|>", "relative>", ""), [_row(each) for each in shown]
        )
    if optimizers[0] != optimizers[1]:
        click.echo(f"the optimizers differ: {optimizers[0]} and {optimizers[1]}")
    names = {each.parameter for each in found}
    differ = {each.parameter for each in found if not each.equal and each.part == "w"}
    state = {each.parameter for each in found if not each.equal and each.part != "w"}
    click.echo(
        f"of {len(names):,} parameters {len(differ):,} differ, and the optimizer's state of {len(state):,}"
        if not same
        else f"all {len(names):,} parameters are equal to the bit, and so is the optimizer's state"
    )
    return 0 if same else 1


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(each: "Difference") -> list[str]:
    if each.only:
        why = "another shape" if each.only == "shape" else f"only in {each.only.upper()}"
        return [each.parameter, each.part, f"{each.elements:,}", "", "", why]
    said = "equal" if each.equal else ""
    return [
        each.parameter,
        each.part,
        f"{each.elements:,}",
        f"{each.largest:.3g}",
        f"{each.relative:.3g}",
        said,
    ]


@ckpt.command()
@click.option(
    "-o", "--output", required=True, metavar="PATH", help="A folder, or one file that ends in .safetensors."
)
@click.option(
    "--split",
    default="5GB",
    metavar="SIZE",
    help="More than so much goes into several files.  [default: 5GB]",
)
@click.option("--force", is_flag=True, help="Replace what is there.")
@RUN
def export(run: str | None, output: str, split: str, force: bool) -> int:
    """The model alone, as plain safetensors in float32.

    `safetensors.torch.load_file` and `load_state_dict` read it, and so does what reads files from the Hugging Face
    hub. It has the model's parameters; buffers, such as running means, are not in a checkpoint.
    """
    from .. import checkpoint
    from ..text.tables import size

    limit = _bytes(split)
    taken = load(run, deep=True)
    for path in checkpoint.export(taken, Path(output), limit, force=force):
        click.echo(f"{path}  {size(path.stat().st_size)}")
    return 0


def _bytes(text: str) -> int:
    read = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if read is None or float(read[1]) <= 0:
        raise ZmlError(USAGE, f"{text!r} is no size", "Write a number of bytes, or 500MB, or 5GB.")
    return int(float(read[1]) * UNITS[read[2]])


@ckpt.command()
@click.option(
    "--keep-last", type=click.IntRange(min=1), default=3, metavar="N", help="The newest N stay.  [default: 3]"
)
@click.option(
    "--keep-every",
    type=click.IntRange(min=0),
    default=0,
    metavar="STEPS",
    help="And one of every so many steps.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@RUN
def prune(run: str | None, keep_last: int, keep_every: int, dry_run: bool) -> int:
    """Delete old checkpoints of a run.

    The newest that is whole stays, whatever was asked for; where none is whole, all stay.
    """
    from .. import checkpoint
    from ..checkpoint.retention import newest_whole

    where = place(run)
    if where.one is not None:
        raise ZmlError(USAGE, f"{where.one} is one checkpoint", "Name the run whose checkpoints may go.")
    there = checkpoint.entries(where.root)
    verified = newest_whole(where.root)
    if there and not verified:
        raise ZmlError(
            NO_CHECKPOINT, f"none of the {len(there)} checkpoints in {where.root} is whole; all of them stay"
        )
    if dry_run:
        gone = [each.name for each in checkpoint.to_drop(there, keep_last, keep_every, verified)]
    else:
        try:
            gone = checkpoint.prune(where.root, keep_last, keep_every, verified)
        except OSError as error:
            raise ZmlError(NOT_WRITTEN, f"cannot delete below {where.root}: {error.strerror}") from None
    for name in gone:
        click.echo(f"{'would delete' if dry_run else 'deleted'} {name}")
    stay = len(there) - len(gone)
    click.echo(f"{stay} {'checkpoint stays' if stay == 1 else 'checkpoints stay'} in {where.root}")
    return 0
