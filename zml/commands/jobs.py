"""`zml submit`, `zml jobs`, `zml job`, `zml nodes`: jobs of a standing coordinator, which these ask over HTTP.

Everything is imported when a command needs it. With --json, standard output is one JSON value and nothing else; what
happens meanwhile is told on standard error.
"""

from __future__ import annotations

import contextlib
import difflib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .. import errors
from ..errors import NO_SCRIPT, NO_TOKEN, USAGE, ZmlError
from .flags import CONTEXT, KEEPING_FLAGS, TRAINING_FLAGS, InOrder, named_by

if TYPE_CHECKING:
    from ..cluster.client import Client
    from ..cluster.jobs import JobView, Submission

F = TypeVar("F", bound=Callable[..., Any])
STATES = (
    "queued", "starting", "running", "draining", "paused", "succeeded", "failed", "cancelled", "timed_out",
)  # fmt: skip


def server_flags(command: F) -> F:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
        click.option(
            "--token", metavar="FILE", envvar="ZML_TOKEN", help="The file with your token.  [or ZML_TOKEN]"
        ),
        click.option(
            "--server",
            metavar="URL",
            envvar="ZML_SERVER",
            help="Where the coordinator answers.  [or ZML_SERVER; default: http://127.0.0.1:7078]",
        ),
    ):
        command = option(command)
    return command


@contextlib.contextmanager
def connected(server: str | None, token: str | None) -> Iterator[Client]:
    from ..cluster.client import DEFAULT_SERVER, Client

    client = Client(server or DEFAULT_SERVER, token=read_token(token) if token else "", user=who())
    try:
        yield client
    finally:
        client.close()


def read_token(path: str) -> str:
    from ..web.access import read_tokens

    tokens = read_tokens(path)
    if len(tokens) != 1:
        raise ZmlError(NO_TOKEN, f"there are {len(tokens)} tokens in {path}", "Give a file with yours alone.")
    return tokens[0].text


def who() -> str:
    """The user's name, as the system has it."""
    import getpass
    import os

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in containers
        return f"uid-{os.getuid()}"


# -- submitting ----------------------------------------------------------------------------------------------


class Submit(click.Command):
    """Says how a script's own flags are written where one of them was taken for ours."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            ours = [name for option in self.params for name in option.opts if name.startswith("--")]
            near = difflib.get_close_matches(error.option_name, ours, n=1, cutoff=0.75)
            own = f"The script's own flags stand behind --: zml submit train.py -- {error.option_name} ..."
            fix = f"Did you mean {near[0]}?" if near else own
            raise ZmlError(USAGE, f"there is no flag {error.option_name}", fix) from None


@click.command(cls=Submit, context_settings=CONTEXT)
@click.option("-w", "--workers", metavar="MIN..MAX", help="Workers, 4 or 1..4.  [default: 1]")
@click.option("-p", "--shards", type=int, metavar="M", help="Parameter-server shards.  [default: 1]")
@click.option("--replicas", type=int, metavar="R", help="Backups of each shard, 0 or 1.  [default: 0]")
@click.option("--gpus", type=int, metavar="N", help="GPUs of each worker.  [default: 0]")
@click.option("--cpus", type=int, metavar="N", help="CPUs of each worker.  [default: 1]")
@click.option("--memory", metavar="SIZE", help="Memory of each worker: 8GB, 512MB.")
@click.option("--shard-memory", metavar="SIZE", help="Memory of each shard.")
@click.option("--priority", type=int, metavar="N", help="-100 to 100; the higher goes first.  [default: 0]")
@click.option("--after", multiple=True, metavar="JOB", help="Begin when it has succeeded; may be repeated.")
@click.option("--retries", type=int, metavar="N", help="Try again so often when it fails.  [default: 0]")
@click.option("--time-limit", metavar="TIME", help="End it after 2h, 90m, 1h30m of running.")
@click.option("--not-preemptible", is_flag=True, help="Never drain it for others.")
@click.option("--name", metavar="NAME", help="For people.  [default: the script's]")
@click.option(
    "--env",
    multiple=True,
    metavar="K=V",
    help="A variable; K alone: as it is here. May be repeated.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="K=V",
    help="Another setting of zml.toml: worker_restarts=0. May be repeated.",
)
@click.option(
    "--folder", metavar="PATH", help="Where the code is.  [default: here; with --archive, the script's]"
)
@click.option("--archive/--no-archive", default=None, help="Send the code along, where not all nodes see it.")
@click.option("--wait", is_flag=True, help="Stay until it is over; exit code as the job's.")
@TRAINING_FLAGS
@KEEPING_FLAGS
@server_flags
@click.argument("job_or_script", metavar="job.toml | SCRIPT")
@click.argument("args", nargs=-1, type=click.UNPROCESSED, metavar="[-- ARGS...]")
def submit(
    job_or_script: str, args: tuple[str, ...], archive: bool | None, wait: bool, server: str | None,
    token: str | None, as_json: bool, **given: Any,
) -> int:  # fmt: skip
    """Give a job to the cluster.

    A job.toml says the same with keys: script = "train.py", args, workers = "1..4", gpus, memory_mb, time_limit_s,
    tables [settings] and [environment]. Flags change what it says; those of the training are those of zml run.

    With --wait, Ctrl-C detaches, and the job goes on.
    """
    from ..cluster.jobfile import convert, sound

    if archive and given["folder"] is None and not job_or_script.endswith(".toml"):
        given["folder"] = str(Path(job_or_script).parent)
        job_or_script_in = Path(job_or_script).name
    else:
        job_or_script_in = job_or_script
    wanted, place = described(job_or_script_in, args, given)
    submission = convert(wanted, place)
    if not submission.archive:
        must_be_there(submission)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(connected(server, token))
        if archive:
            submission = sent(submission, client, stack)
        sound(submission)
        job = client.submit(submission)
        if not as_json or wait:
            click.echo(submitted(job), err=as_json)
        if not wait:
            if as_json:
                show_json(job)
            return 0
        from . import job_follow

        over = job_follow.wait(client, job.id, quiet_first=job.state == "QUEUED")
        if as_json:
            show_json(over or job)
        return job_follow.exit_code(over)


def described(job_or_script: str, args: tuple[str, ...], given: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The keys of a Submission, from job.toml and flags; and where a mistake in them would be."""
    import os

    from ..cluster import jobfile

    if job_or_script.endswith(".toml"):
        wanted, place = jobfile.read(Path(job_or_script)), job_or_script
        if args:
            wanted["args"] = list(args)
    else:
        wanted, place = (
            {"script": job_or_script, "args": list(args), "folder": os.getcwd()},
            "the command line",
        )
    for key in ("workers", "shards", "replicas", "gpus", "cpus", "priority", "retries", "name"):
        if given[key] is not None:
            wanted[key] = given[key]
    for flag, key in (("memory", "memory_mb"), ("shard_memory", "shard_memory_mb")):
        if given[flag] is not None:
            wanted[key] = jobfile.megabytes(given[flag])
    if given["time_limit"] is not None:
        wanted["time_limit_s"] = jobfile.seconds(given["time_limit"])
    if given["not_preemptible"]:
        wanted["preemptible"] = False
    if given["after"]:
        wanted["after"] = list(given["after"])
    if given["folder"] is not None:
        wanted["folder"] = str(Path(given["folder"]).resolve())
    for text in given["env"]:
        if "=" not in text and text not in os.environ:
            raise ZmlError(
                USAGE, f"--env {text}: there is no such variable here", f"Write --env {text}=VALUE."
            )
        key, value = jobfile.pair(text if "=" in text else f"{text}={os.environ[text]}", "--env", "SEED=1")
        wanted.setdefault("environment", {})[key] = value
    of_training = (*jobfile.SETTINGS, "sync", "asynchronous")
    named = named_by({key: value for key, value in given.items() if key in of_training})
    said = [(key, value, "the flags") for key, value in named.items()]
    for text in given["settings"]:
        key, value = jobfile.pair(text, "--set", "compress=topk:1%")
        said.append((key.replace("-", "_"), value, "--set"))
    for key, value, where in said:
        found = jobfile.setting(key, value, where, exact=where != "--set")
        wanted.setdefault("settings", {})[key] = "async" if key == "staleness" and found is None else found
    return wanted, place


def must_be_there(submission: Submission) -> None:
    """A folder that this machine does not have may be on the nodes all the same; a script in one it has must exist."""
    folder = Path(submission.folder)
    script = folder / submission.script
    if folder.is_dir() and not script.is_file():
        what = "is a folder" if script.is_dir() else "does not exist"
        raise ZmlError(NO_SCRIPT, f"the script {submission.script} {what}", f"It is looked for in {folder}.")


def sent(submission: Submission, client: Client, stack: contextlib.ExitStack) -> Submission:
    """The same job with its code in an archive, which the server has by now."""
    import msgspec

    from ..cluster.archive import pack
    from ..text.console import counted
    from ..text.tables import size

    if submission.archive:
        raise ZmlError(USAGE, "--archive with a job.toml that names an archive", "Leave one of them out.")
    begun = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zml-")))
    packed = pack(Path(submission.folder), begun)
    if Path(submission.script).as_posix() not in packed.names:
        what = f"the script {submission.script} is not among what is packed of {submission.folder}"
        raise ZmlError(NO_SCRIPT, what, "Does .gitignore name it, or does it lie elsewhere? See --folder.")
    for each in packed.left_out:
        click.echo(f"left out: {each}", err=True)
    done = "sent" if client.send_archive(packed.path, packed.sha256) else "the server has"
    what = f"{counted(len(packed.names), 'file')} of {submission.folder}"
    click.echo(f"{done} {what}, {size(packed.path.stat().st_size)}", err=True)
    return msgspec.structs.replace(submission, folder="", archive=packed.sha256)


def submitted(job: JobView) -> str:
    from ..text.job_words import sentence, wanted

    because = sentence(job)
    return f"submitted {job.id} ({job.name}, {wanted(job)})" + (f": {because}" if because else "")


def show_json(what: Any) -> None:
    """For machines, and still readable."""
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(what)).decode())


# -- looking -------------------------------------------------------------------------------------------------


@click.command(context_settings=CONTEXT)
@click.option("-a", "--all", "everything", is_flag=True, help="Those that are over, too.")
@click.option("--user", metavar="NAME", help="Only this user's.")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(STATES, case_sensitive=False),
    metavar="STATE",
    help="Only those in this state; may be repeated.",
)
@click.option(
    "--newest", type=click.IntRange(1, 10_000), default=1_000, help="At most so many.  [default: 1000]"
)
@server_flags
def jobs(
    everything: bool, user: str | None, states: tuple[str, ...], newest: int, server: str | None,
    token: str | None, as_json: bool,
) -> int:  # fmt: skip
    """The jobs of the cluster.

    In order of submission, those that are not over. Time is how long a job has waited, or since it began.
    """
    from ..text.job_views import print_jobs
    from ..web.bodies import LIVE

    asked = tuple(state.upper() for state in states) or (() if everything else LIVE)
    with connected(server, token) as client:
        found = client.jobs(states=asked, user=user or "", newest=newest)
    if as_json:
        show_json(found)
    elif not found:
        whose = f" of {user}" if user else ""
        click.echo(
            f"no jobs{whose}"
            + ("" if everything or states else " that are not over; --all shows those that are")
        )
    else:
        print_jobs(found, time.time())
        if len(found) == newest:
            click.echo(f"the newest {newest:,}; --newest shows more", err=True)
    return 0


@click.command(context_settings=CONTEXT)
@server_flags
def nodes(server: str | None, token: str | None, as_json: bool) -> int:
    """The nodes of the cluster.

    What each has, what of it is free, and how long ago it was heard.
    """
    from ..text.job_views import print_nodes

    with connected(server, token) as client:
        found = client.nodes_and_pool()
    if as_json:
        show_json(found.nodes)
        return 0
    if found.nodes:
        print_nodes(found.nodes)
    else:
        click.echo("no nodes; `zml node` on a machine offers it to the cluster")
    if found.pool:
        click.echo(f"pool: {found.pool}")
    return 0


def explain_job(job: str, server: str | None, token: str | None, as_json: bool) -> int:
    """What `zml explain JOB` does."""
    from ..text.job_views import explanation

    with connected(server, token) as client:
        found = client.explain(job)
    if as_json:
        show_json(found)
    else:
        for line in explanation(found, time.time()):
            click.echo(line)
    return 0


# -- one job -------------------------------------------------------------------------------------------------


@click.group(cls=InOrder, context_settings=CONTEXT, invoke_without_command=True)
@click.pass_context
def job(context: click.Context) -> None:
    """Show, follow, cancel, pause, resume, scale or delete a job."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@job.command("show", context_settings=CONTEXT)
@click.option("--wait", is_flag=True, help="Stay until it is over; exit code as the job's.")
@server_flags
@click.argument("job")
def show(job: str, wait: bool, server: str | None, token: str | None, as_json: bool) -> int:
    """What is known of a job."""
    from ..text.job_views import print_job
    from . import job_follow

    with connected(server, token) as client:
        found: JobView | None = job_follow.wait(client, job) if wait else client.job(job)
    if found is not None:
        show_json(found) if as_json else print_job(found, time.time())
    return job_follow.exit_code(found) if wait else 0


@job.command("logs", context_settings=CONTEXT)
@click.option("-f", "--follow", is_flag=True, help="Go on until the job is over.")
@click.option("-n", "--tail", type=click.IntRange(0, 100_000), metavar="N", help="Only the last N lines.")
@click.option(
    "--attempt", type=click.IntRange(1), default=None, metavar="K", help="Which one.  [default: the latest]"
)
@click.option("--list", "list_", is_flag=True, help="What there is, and how large.")
@server_flags
@click.argument("job")
@click.argument("name", required=False, default="")
def logs(
    job: str, name: str, follow: bool, tail: int | None, attempt: int | None, list_: bool, server: str | None,
    token: str | None, as_json: bool,
) -> int:  # fmt: skip
    """What a job has printed.

    NAME is one of those that --list shows; without it, the first worker's output. With --json, the list.
    """
    from ..text.tables import print_table, size
    from . import job_follow

    shows = [("NAME", name), ("--follow", follow), ("--tail", tail is not None)]
    if (list_ or as_json) and (beside := [each for each, given in shows if given]):
        flag = "--json" if as_json else "--list"
        raise ZmlError(
            USAGE,
            f"{flag} with {' and '.join(beside)}: it lists what there is",
            f"Leave out {flag}, or the other.",
        )
    with connected(server, token) as client:
        if list_ or as_json:
            found = client.logs(job, attempt or 0)
            if as_json:
                show_json(found)
            elif not found.files:
                click.echo(f"{job} has printed nothing yet")
            else:
                print_table(("name", "size>"), [[each.name, size(each.bytes)] for each in found.files])
            return 0
        return job_follow.show(client, job, name, attempt=attempt or 0, tail=tail, follow=follow)


def order(name: str, about: str, done: Callable[[JobView], bool], reason: bool) -> None:
    """A command that changes jobs, says what became of each, and may wait for that."""

    def run(
        wanted: tuple[str, ...],
        wait: bool,
        server: str | None,
        token: str | None,
        as_json: bool,
        **given: str,
    ) -> int:
        from ..text.job_views import event
        from . import job_follow

        changed: list[JobView] = []
        failed: list[ZmlError] = []
        with connected(server, token) as client:
            for each in dict.fromkeys(wanted):
                try:
                    changed.append(getattr(client, name)(each, *given.values()))
                except ZmlError as error:  # the others are changed nevertheless
                    failed.append(error)
            for number, found in enumerate(changed if wait else ()):
                if not done(found):
                    changed[number] = job_follow.until(client, found.id, done, quiet_first=False)
        if as_json and changed:
            show_json(changed if len(wanted) > 1 else changed[0])
        elif not as_json:
            for found in changed:
                click.echo(event(found))
        for told in failed[:-1]:
            click.echo(f"error: {told}", err=True)
        if failed:
            raise failed[-1]
        return 0

    run.__doc__ = about
    if reason:
        run = click.option("--because", default="", metavar="TEXT", help="Why; it stays with the job.")(run)
    run = click.option("--wait", is_flag=True, help="Return when that has happened.")(server_flags(run))
    jobs_argument = click.argument("wanted", nargs=-1, required=True, metavar="JOB...")
    job.command(name, context_settings=CONTEXT)(jobs_argument(run))


def _over(found: JobView) -> bool:
    from ..web.bodies import ENDS

    return found.state in ENDS


order(
    "cancel",
    "End jobs.\n\nWhat runs finishes its step and saves; what waits never begins.",
    _over,
    reason=True,
)
order(
    "pause",
    "Let jobs rest.\n\nEach saves, leaves its nodes, and goes on from there after `zml job resume`.",
    lambda found: found.state == "PAUSED" or _over(found),
    reason=True,
)
order(
    "resume",
    "Let paused jobs go on.\n\nEach waits its turn as before.",
    lambda found: found.state == "RUNNING" or _over(found),
    reason=False,
)


@job.command("delete", context_settings=CONTEXT)
@server_flags
@click.argument("wanted", nargs=-1, required=True, metavar="JOB...")
def delete(wanted: tuple[str, ...], server: str | None, token: str | None, as_json: bool) -> int:
    """Forget jobs that are over, and delete their files.

    A job that another one comes after, or whose folder another one names, stays until that is over.
    """
    gone: list[JobView] = []
    failed: list[ZmlError] = []
    with connected(server, token) as client:
        for each in dict.fromkeys(wanted):
            try:
                gone.append(client.delete(each))
            except ZmlError as error:  # the others go nevertheless
                failed.append(error)
    if as_json and gone:
        show_json(gone if len(wanted) > 1 else gone[0])
    elif not as_json:
        for found in gone:
            click.echo(f"{found.id} is deleted; it was {found.state.lower().replace('_', ' ')}")
    for told in failed[:-1]:
        click.echo(f"error: {told}", err=True)
    if failed:
        raise failed[-1]
    return 0


@job.command("scale", context_settings=CONTEXT)
@click.option("-w", "--workers", required=True, metavar="MIN..MAX", help="How many it may have from now on.")
@server_flags
@click.argument("job")
def scale(job: str, workers: str, server: str | None, token: str | None, as_json: bool) -> int:
    """Change how many workers a job may have."""
    from ..text.job_views import event
    from ..text.job_words import wanted

    with connected(server, token) as client:
        found = client.scale(job, workers)
    if as_json:
        show_json(found)
    else:
        click.echo(f"{event(found)}\n  It may have {wanted(found)}.")
    return 0


def is_code(text: str) -> bool:
    """Whether `zml explain` is asked about an error: E204, ZML-E204, 204."""
    import re

    return re.fullmatch(r"(?i)(ZML-)?E?\d{3}", text) is not None and (
        not text.isdigit() or f"ZML-E{text}" in errors.BOOK
    )
