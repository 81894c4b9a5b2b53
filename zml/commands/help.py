"""`zml doctor`, `zml stack`, `zml explain`, `zml completion`: help when it goes wrong.

Everything is imported when a command needs it. With --json, standard output is one JSON value and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import errors
from ..errors import NO_STACK, USAGE, ZmlError
from .completion import SHELLS
from .flags import CONTEXT, KEY_FLAG, MEMBER_FLAGS, settle
from .jobs import explain_job, is_code, server_flags

if TYPE_CHECKING:
    from ..doctor.cluster import Answers
    from ..doctor.findings import Check
    from ..stack import Stack
    from .aim import Aim

WIDEST = 120
STACK_WAIT_S = 15.0


def width() -> int:
    """80 columns off a terminal."""
    return min(shutil.get_terminal_size().columns, WIDEST) if sys.stdout.isatty() else 80


# -- is it well? ---------------------------------------------------------------------------------------------


@click.command(context_settings=CONTEXT)
@click.option("--cluster", is_flag=True, help="Look at a cluster that runs, and at all its machines.")
@MEMBER_FLAGS
@KEY_FLAG
@click.option("--job", metavar="NAME", help="Of a coordinator of many jobs: which.")
@click.option("--config", metavar="FILE", help="Settings.  [default: zml.toml, if it is there]")
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(1, 60),
    default=20.0,
    metavar="S",
    help="For an answer of a member.  [default: 20]",
)
@click.option("-a", "--all", "everything", is_flag=True, help="Every check of every member and link.")
@click.option("--json", "as_json", is_flag=True, help="All of it, for machines and bug reports.")
@click.argument("run", required=False)
def doctor(
    cluster: bool, run: str | None, wait_s: float, everything: bool, as_json: bool, **given: Any
) -> int:
    """Is this machine fit to take part? Is a cluster well?

    With --cluster: the versions, limits and GPUs of all members, the disk and the clock of each machine, and the links
    between them. RUN is a run directory; without it and --coordinator, the run below ./runs that goes on. Training goes
    on meanwhile: 4 MB each way go over one link between each two machines, a few small messages over the others, and
    each run directory is written 5 times 4 KB.

    The exit code is 1 if a check fails.
    """
    from ..doctor.findings import worst

    if not cluster:
        if run or given["coordinator"]:
            what = "a RUN" if run else "--coordinator"
            raise ZmlError(USAGE, f"{what} is for --cluster", "Add --cluster, or leave it out.")
        return look_here(as_json, given)
    from ..doctor import summary

    found, checks, aim = look_around(run, wait_s, given)
    where = aim.settings.coordinator
    if as_json:
        click.echo(json.dumps({"coordinator": list(where), **summary.as_json(found, checks)}, indent=2))
    else:
        for line in summary.cluster_lines(found, checks, where[0], width(), paint(), everything=everything):
            click.echo(line)
    return 1 if worst(checks) == "fail" else 0


def look_here(as_json: bool, given: dict[str, Any]) -> int:
    from ..doctor import telling
    from ..doctor.findings import worst
    from ..doctor.machine import examine

    checks = examine(Path(settle({"config": given["config"]}).settings.runs))
    if as_json:
        told = [{f: getattr(c, f) for f in ("name", "verdict", "found", "fix")} for c in checks]
        click.echo(json.dumps(told, indent=2))
    else:
        for line in telling.lines(checks, width(), paint()):
            click.echo(line)
    return 1 if worst(checks) == "fail" else 0


def look_around(run: str | None, wait_s: float, given: dict[str, Any]) -> tuple[Answers, list[Check], Aim]:
    """Ask everybody. Raises ZmlError where the coordinator does not answer."""
    import asyncio

    from .. import observe
    from ..doctor import cluster, verdicts
    from ..logs import outlets as logs
    from . import aim

    aimed = aim.take(run, given)
    aim.must_go_on(aimed)
    logs.silence()

    async def ask() -> Answers:
        endpoint = await observe.connect(aimed.settings)
        try:
            status = await observe.status(endpoint, aimed.settings.job)
            return await cluster.examine(cluster.Asking(endpoint, status.job, wait_s), status, passing)
        finally:
            passing("")
            await endpoint.close()

    found = asyncio.run(ask())
    return found, verdicts.judge(found), aimed


def passing(text: str) -> None:
    """One line of a terminal that the next one takes the place of; nothing where nobody watches."""
    from ..text.ansi import printable

    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        line = f"waiting for {printable(text)}"[: width() - 1] if text else ""
        click.echo(f"\r{line}\x1b[K", nl=False, err=True)


def paint() -> Any:
    from ..doctor import telling

    return telling.plain if os.environ.get("NO_COLOR") else telling.coloured


# -- where is it? --------------------------------------------------------------------------------------------


@click.command(context_settings=CONTEXT)
@MEMBER_FLAGS
@KEY_FLAG
@click.option("--job", metavar="NAME", help="Of a coordinator of many jobs: which.")
@click.option("--config", metavar="FILE", help="Settings.  [default: zml.toml, if it is there]")
@click.option("-a", "--all", "everything", is_flag=True, help="All threads, whatever they are in.")
@click.option("--json", "as_json", is_flag=True, help="All threads, for machines.")
@click.argument("member")
@click.argument("run", required=False)
def stack(member: str, run: str | None, everything: bool, as_json: bool, **given: Any) -> int:
    """In which line is a worker or a shard?

    MEMBER is w3, p0 or coordinator; of a worker it is the script that is looked at. The process goes on: it is neither
    stopped nor slowed down, and no values are shown. RUN is a run directory; without it and --coordinator, the run
    below ./runs that goes on.

    A process of another machine is asked through the coordinator. py-spy is used where it is installed and may trace;
    without it the process itself writes where it is.
    """
    from ..text.stack_view import shown

    found = find_stack(member, run, given)
    if found.trouble:
        raise ZmlError(
            NO_STACK, f"{found.member} on {found.node or 'its machine'}: {found.trouble}", found.note
        )
    if as_json:
        import msgspec

        own = found.own
        told = msgspec.to_builtins(found)
        told["own"] = msgspec.to_builtins(own[1]) if own is not None else None
        click.echo(json.dumps(told, indent=2))
        return 0
    bold = (lambda text: text) if os.environ.get("NO_COLOR") else lambda text: click.style(text, bold=True)
    for line in shown(found, width(), everything=everything, bold=bold):
        click.echo(line)
    return 0


def find_stack(member: str, run: str | None, given: dict[str, Any]) -> Stack:
    """On this machine by the run directory, else through the coordinator. Raises ZmlError."""
    from .. import stack as stacks
    from ..runs import rundir
    from . import aim, guess

    aimed = aim.take(run, given)
    name = member
    if aimed.folder is not None:
        newest = rundir.newest_status(aimed.folder)
        names = [each.member for each in newest.members] if newest is not None else []
        known = guess.member(member, [*names, "coordinator"])
        if names and known is None:
            raise ZmlError(USAGE, f"there is no member {member}", guess.about_member(member, names))
        name = known or member
        there = stacks.recorded(aimed.folder, name)
        if there is not None and stacks.lives(there[1]):
            return stacks.of(name, there[1].pid, there)
    aim.must_go_on(aimed)
    return ask_for_stack(name, aimed)


def ask_for_stack(member: str, aimed: Aim) -> Stack:
    """Through the coordinator, from the member itself: of its own process, or of its script's. Raises ZmlError."""
    import asyncio

    from .. import observe
    from ..doctor import cluster
    from ..logs import outlets as logs
    from ..stack import Stack
    from . import guess

    logs.silence()

    async def ask() -> Stack:
        endpoint = await observe.connect(aimed.settings)
        try:
            status = await observe.status(endpoint, aimed.settings.job)
            names = [each.member for each in status.members]
            name = guess.member(member, [*names, "coordinator"])
            if name is None:
                raise ZmlError(USAGE, f"there is no member {member}", guess.about_member(member, names))
            asking = cluster.Asking(endpoint, status.job, STACK_WAIT_S)
            try:
                return await asking.ask(name, "stack", Stack)
            except cluster.Silent as silent:
                node = next((each.node for each in status.members if each.member == name), "")
                on = f"on {node}" if node else "on its machine"
                fix = f"Run `zml stack {name} RUN` {on}, where it needs nobody's answer."
                raise ZmlError(NO_STACK, f"{name} {on} does not say: {silent}", fix) from None
        finally:
            await endpoint.close()

    return asyncio.run(ask())


# -- what does it mean? --------------------------------------------------------------------------------------


@click.command(context_settings=CONTEXT)
@server_flags
@click.argument("code", required=False, metavar="[JOB | CODE]")
def explain(code: str | None, server: str | None, token: str | None, as_json: bool) -> int:
    """Why is a job not running? What does an error mean?

    Of a JOB: who is ahead of it, and what was decided about it. Of a CODE, such as ZML-E204: what it means, what zml
    did and what to do; without any, a list of all errors.
    """
    from dataclasses import asdict

    if code is not None and not is_code(code):
        return explain_job(code, server, token, as_json)
    if code is None:
        titles = {known: entry.title for known, entry in sorted(errors.BOOK.items())}
        listed = [f"{known}  {title}" for known, title in titles.items()]
        click.echo(json.dumps(titles, indent=2) if as_json else "\n".join(listed))
        return 0
    wanted = f"ZML-E{code.upper().removeprefix('ZML-').removeprefix('E')}"
    if wanted not in errors.BOOK:
        raise ZmlError(USAGE, f"there is no error {code}", "`zml explain` lists all of them.")
    entry = errors.BOOK[wanted]
    if as_json:
        click.echo(json.dumps({"code": wanted, **asdict(entry)}, indent=2))
        return 0
    for line in told(wanted, entry):
        click.echo(line)
    return 0


def told(code: str, entry: errors.Entry) -> Iterator[str]:
    yield f"{code}: {entry.title}"
    yield ""
    yield textwrap.fill(entry.explanation, 80)
    yield ""
    yield textwrap.fill(f"What to do: {entry.do}", 80)
    yield ""
    yield f"Exit code {entry.exit_code}."


# -- completion ----------------------------------------------------------------------------------------------

ADD = {
    "bash": 'eval "$(zml completion bash)"   in ~/.bashrc',
    "zsh": 'eval "$(zml completion zsh)"   in ~/.zshrc, behind compinit',
    "fish": "zml completion fish > ~/.config/fish/completions/zml.fish",
}


@click.command(context_settings=CONTEXT)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> int:
    """Print what makes Tab complete zml's commands.

    \b
    bash    eval "$(zml completion bash)"    in ~/.bashrc
    zsh     eval "$(zml completion zsh)"     in ~/.zshrc, behind compinit
    fish    zml completion fish > ~/.config/fish/completions/zml.fish

    Commands, flags, run directories, members, jobs and files are completed.
    """
    from .completion import source

    root = context.find_root().command
    assert isinstance(root, click.Group)
    click.echo(source(shell, root), nl=False)
    if sys.stdout.isatty():
        click.echo(f"\n# To have it in every shell: {ADD[shell]}", err=True)
    return 0
