"""`zml obs`: what other programs need to show and watch a cluster."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from urllib.parse import urlsplit

import click

from ..address import PORT
from ..errors import NO_TOKEN, USAGE, ZmlError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
COORDINATOR = f"http://127.0.0.1:{PORT}"
PROMETHEUS = "http://127.0.0.1:9090"


@click.group(context_settings=CONTEXT)
def obs() -> None:
    """Prometheus, Grafana, logs and traces: their configurations."""


@obs.command(context_settings=CONTEXT)
@click.option(
    "--coordinator-http",
    "coordinators",
    multiple=True,
    metavar="URL",
    help="Where a coordinator answers HTTP; may be repeated.  "
    f"[default: that of the run that goes on here, else {COORDINATOR}]",
)
@click.option(
    "--token-file",
    metavar="F",
    help="A file with the token that Prometheus shows, where the coordinator asks for one.",
)
@click.option(
    "--prometheus",
    default=PROMETHEUS,
    metavar="URL",
    help=f"Where Grafana finds Prometheus.  [default: {PROMETHEUS}]",
)
@click.option("--force", is_flag=True, help="Replace files that are there.")
@click.option("--json", "as_json", is_flag=True, help="The paths, for machines.")
@click.argument("folder", metavar="DIR")
def export(
    folder: str,
    coordinators: tuple[str, ...],
    token_file: str | None,
    prometheus: str,
    force: bool,
    as_json: bool,
) -> int:
    """Write their configurations into a folder.

    For Prometheus, Grafana, Fluentd, Fluent Bit and an OpenTelemetry collector. Prometheus then finds every process by
    itself, alerts say what is wrong and what to do, and Grafana has a dashboard for each subject. DIR/README.txt says
    how to start each. Nothing is started, and files that are there stay.
    """
    from ..obs.export import ABOUT, Kit, files, write
    from .flags import settle

    where = Path(folder).absolute()
    runs = Path(settle({}).settings.runs).absolute()
    kit = Kit(
        folder=where,
        coordinators=[
            address(url, "--coordinator-http") for url in coordinators or (going_on(runs) or COORDINATOR,)
        ],
        token_file=usable(Path(token_file).absolute()) if token_file is not None else None,
        prometheus=address(prometheus, "--prometheus"),
        runs=runs,
    )
    written = write(where, files(kit), force=force)
    names = [str(path.relative_to(where)) for path in written]
    if as_json:
        click.echo(json.dumps({"folder": str(where), "files": names}, indent=2))
        return 0
    click.echo(f"{folder}, for {' and '.join(kit.coordinators)}:")
    width = max(len(name) for name in names)
    for name in names:
        click.echo(f"  {name:<{width}}  {ABOUT.get(name, '')}".rstrip())
    click.echo(f"Start: prometheus --config.file={shlex.quote(str(Path(folder, 'prometheus.yml')))}")
    click.echo(f"{Path(folder, 'README.txt')} says the rest.")
    return 0


def going_on(runs: Path) -> str:
    """Where the newest run that goes on answers; empty where there is none."""
    from ..runs import finding, rundir

    found = (rundir.listening(folder) for folder in finding.running(runs))
    return next((each.http for each in found if each is not None and each.http), "")


def address(url: str, flag: str) -> str:
    """http://HOST:PORT, without what people add to it. Raises ZmlError."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or parts.query
        or parts.fragment
        or parts.username
    ):
        example = COORDINATOR if flag == "--coordinator-http" else PROMETHEUS
        raise ZmlError(USAGE, f"{flag} {url} is no address such as {example}", "Write http://HOST:PORT.")
    if port == 0:
        raise ZmlError(USAGE, f"{flag} {url} has no port that can be reached", "Write the one it listens on.")
    return url.rstrip("/")


def usable(path: Path) -> Path:
    """The file, if what Prometheus would send is a token and nothing else. Raises ZmlError."""
    from ..web.access import read_tokens

    tokens = read_tokens(path)
    if len(tokens) != 1 or path.read_text(encoding="utf-8").strip() != tokens[0].text:
        raise ZmlError(
            NO_TOKEN,
            f"{path} holds more than one token, and Prometheus sends the file as it is",
            "Give a file with the token alone: no user before it, no comment.",
        )
    return path
