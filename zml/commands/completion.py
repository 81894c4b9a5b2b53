"""What a shell offers when Tab is pressed: commands, flags and choices are click's own; runs, members, jobs and files
are found here.

Rules: it only looks at names and ages of files, asks nobody but the coordinator of a cluster, which has JOB_S to
answer, and never fails: a shell has no place for an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem, get_completion_class

from .guess import every_command

if TYPE_CHECKING:
    Text = click.ParamType[str]
else:
    Text = click.ParamType  # which takes no argument before click 8.4

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_ZML_COMPLETE"
JOB_S = 0.3
MOST = 100
# Parameters by what they mean, as the commands name them.
RUNS = {"run", "runs", "a", "b", "resume", "first", "second"}
JOBS = {"job", "wanted", "after"}
MEMBERS = {"member", "names", "worker"}
FILES = {"FILE", "SCRIPT", "job.toml | SCRIPT", "PATH"}
FOLDERS = {"FOLDER", "DIR"}


class Offers(Text):
    """Text, for which there are proposals: (value, what is said beside it)."""

    name = "text"

    def __init__(self, find: Callable[[click.Context], Iterable[tuple[str, str]]]) -> None:
        self.find = find

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        found: list[CompletionItem] = []
        try:
            for value, about in self.find(ctx):
                if value.startswith(incomplete) and len(found) < MOST:
                    found.append(CompletionItem(value, help=about or None))
        except Exception:  # whatever it is, a line that is being typed is no place to say so
            pass
        return found


class Paths(Text):
    """Text, for which the shell itself proposes files or folders."""

    name = "text"

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type=self.kind)]


def teach(root: click.Group) -> None:
    """Let parameters of all commands propose what they mean. For a process that completes and does nothing else."""
    runs, members, jobs = Offers(run_names), Offers(member_names), Offers(job_names)
    for name, command in every_command(root):
        for param in command.params:
            if not isinstance(param.type, click.types.StringParamType):
                continue
            metavar = param.metavar or param.human_readable_name
            if param.name in RUNS or "RUN" in metavar.upper().split():
                param.type = runs
            elif param.name in JOBS and (name.startswith("job") or param.name == "after"):
                param.type = jobs
            elif param.name == "code":
                param.type = Offers(codes_and_jobs)
            elif param.name in MEMBERS:
                param.type = members
            elif param.name == "script" or metavar in FILES:
                param.type = Paths("file")
            elif metavar in FOLDERS:
                param.type = Paths("dir")


def source(shell: str, root: click.Group) -> str:
    """The script that makes a shell ask."""
    kind = get_completion_class(shell)
    assert kind is not None, "one of SHELLS"
    of_it = kind(root, {}, "zml", VARIABLE)
    return (of_it.source_template % of_it.source_vars()).strip() + "\n"


def run_names(context: click.Context) -> Iterator[tuple[str, str]]:
    """Run directories as they would be typed, the newest first."""
    from ..runs.finding import age, all_runs
    from ..runs.rundir import STATUS

    for folder in sorted(all_runs(_runs()), key=age, reverse=True)[:MOST]:
        yield str(folder), "" if (folder / STATUS).exists() else "not over"


def member_names(context: click.Context) -> Iterator[tuple[str, str]]:
    """Of the run that is named in the line already, else of the newest: whoever has a log there."""
    from ..runs.finding import newest
    from ..runs.rundir import LOGS

    # Behind an option that has no value yet, click has not said which argument is which.
    named = context.params.get("run") or next(
        (word for word in context.args if Path(word, LOGS).is_dir()), ""
    )
    folder = Path(named) if named else newest(_runs())
    if folder is None:
        return
    names = {file.name.partition(".")[0] for file in (folder / LOGS).glob("*.jsonl")}
    names = {name for name in names if name == "coordinator" or re.fullmatch(r"[pw]\d+", name)}
    for name in sorted(names, key=lambda each: (each[:1], len(each), each)):
        yield name, ""


def job_names(context: click.Context) -> Iterator[tuple[str, str]]:
    """Those that are not over, from the cluster's coordinator, if it answers at once."""
    import http.client
    import json
    import os
    from urllib.parse import urlsplit

    from ..cluster.client import DEFAULT_SERVER
    from ..web.bodies import LIVE, PREFIX
    from .jobs import read_token

    server = context.params.get("server") or os.environ.get("ZML_SERVER") or DEFAULT_SERVER
    parts = urlsplit(server if "://" in server else f"http://{server}")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    headers = {}
    if token := context.params.get("token") or os.environ.get("ZML_TOKEN"):
        headers["Authorization"] = f"Bearer {read_token(token)}"
    states = "".join(f"state={state}&" for state in LIVE)
    connection = kind(parts.hostname or "", parts.port, timeout=JOB_S)
    try:
        connection.request("GET", f"{PREFIX}/jobs?{states}newest={MOST}", headers=headers)
        found = json.load(connection.getresponse())["jobs"]
    finally:
        connection.close()
    for each in found:
        yield each["id"], f"{each['name']} {each['state'].lower()}"


def codes_and_jobs(context: click.Context) -> Iterator[tuple[str, str]]:
    """What can be explained."""
    from ..errors import BOOK

    for code, entry in sorted(BOOK.items()):
        yield code.removeprefix("ZML-"), entry.title
    yield from job_names(context)


def _runs() -> Path:
    from .flags import settle

    return Path(settle({}).settings.runs)
