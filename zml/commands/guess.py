"""Did you mean? What is nearest to a word that a person has mistyped: a command, a flag, a member. (Of the names of
runs it is `runs.finding` that knows.)

Pure functions of what was written and what there is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import click

CUTOFF = 0.6
# What others call it, as people write who come from there.
ELSEWHERE = {
    "cancel": "job cancel",
    "check": "doctor",
    "completions": "completion",
    "info": "status",
    "launch": "run",
    "list": "jobs",
    "ls": "jobs",
    "master": "coordinator",
    "py-spy": "stack",
    "queue": "jobs",
    "scheduler": "coordinator",
    "server": "ps",
    "shard": "ps",
    "show": "status",
    "simulator": "simulate",
    "start": "run",
    "stop": "job cancel",
    "torchrun": "run",
    "train": "run",
}


def nearest(word: str, there: Iterable[str], cutoff: float = CUTOFF) -> str | None:
    """The most similar of those that are there; case counts for nothing."""
    by_key: dict[str, str] = {}
    for each in there:
        by_key.setdefault(each.lower(), each)
    found = difflib.get_close_matches(word.lower(), list(by_key), n=1, cutoff=cutoff)
    return by_key[found[0]] if found else None


def command(path: str, word: str, group: click.Group, root: click.Group) -> str:
    """What to do about a word that is no command of `group`, which was reached by `path` ("zml data")."""
    help_ = f"`{path} --help` lists what there is."
    if word.endswith(".py") or Path(word).is_file():
        return f"`zml run {word}` trains it. {help_}"
    if near := nearest(word, group.list_commands(click.Context(group))):
        return f"Did you mean `{path} {near}`?"
    known = dict(every_command(root))
    elsewhere = ELSEWHERE.get(word.lower(), "")
    if elsewhere in known:
        return f"Did you mean `zml {elsewhere}`?"
    inner = {name.rpartition(" ")[2]: name for name in reversed(list(known))}
    if found := nearest(word, inner, 0.8):
        return f"Did you mean `zml {inner[found]}`?"
    return help_


def every_command(group: click.Group, before: str = "") -> Iterator[tuple[str, click.Command]]:
    """All commands below a group, by their words: "data audit". Those that are loaded when asked for are loaded."""
    context = click.Context(group)
    for name in group.list_commands(context):
        each = group.get_command(context, name)
        if each is None:
            continue
        yield f"{before}{name}", each
        if isinstance(each, click.Group):
            yield from every_command(each, f"{before}{name} ")


def fix_of(error: click.UsageError, root: click.Group, argv: Sequence[str] = ()) -> str:
    """One sentence on what to do about a command line that click cannot use."""
    context = error.ctx
    path = context.command_path if context is not None else "zml"
    at = context.command if context is not None else root
    word = unknown_command(error)
    if word is not None and isinstance(at, click.Group):
        return command(path, word, at, root)
    if isinstance(error, click.NoSuchOption):
        flags = [name for parameter in at.params for name in parameter.opts if name.startswith("--")]
        if near := nearest(error.option_name, [*flags, "--help"], 0.75):
            return f"Did you mean {near}?"
        if right := behind_script(error.option_name, argv, at):
            return f"Arguments of your script go after it: `{path} {right}`."
        where = [f"`zml {name}`" for name, each in every_command(root) if error.option_name in _flags(each)]
        if where:
            return f"It is a flag of {' and of '.join(where[:2])}."
    if isinstance(error, click.BadParameter) and isinstance(getattr(error.param, "type", None), click.Choice):
        return f"`{path} --help` says more."
    return f"`{path} --help` lists what there is."


def behind_script(option: str, argv: Sequence[str], of: click.Command) -> str:
    """A flag that no command has, put behind the script that follows it; empty where none does, or none is taken."""
    at = next((place for place, word in enumerate(argv) if word.partition("=")[0] == option), None)
    script = next((word for word in argv[at or 0 :] if word.endswith(".py")), None)
    if at is None or script is None or not any(each.name == "script" for each in of.params):
        return ""
    value = argv[at + 1]
    return " ".join([script, argv[at], *([value] if not value.startswith("-") and value != script else [])])


def unknown_command(error: click.UsageError) -> str | None:
    """The word that is no command; click says it in a class of its own from 8.4 on, and in words before."""
    if (name := getattr(error, "command_name", None)) is not None:
        return str(name)
    head, found = "No such command ", error.message
    return found[len(head) :].rstrip(".").strip("'\"") if found.startswith(head) else None


def said(error: click.UsageError) -> str:
    """What is wrong, without click's own guesses, which the fix has."""
    return (error.message if hasattr(error, "possibilities") else error.format_message()).rstrip(".")


def _flags(of: click.Command) -> list[str]:
    return [name for parameter in of.params for name in parameter.opts]


# -- members --------------------------------------------------------------------------------------------------


def member(word: str, there: Iterable[str]) -> str | None:
    """Which member is meant, exactly: w3, W3, or 3 for worker 3."""
    names = set(there)
    for each in (word, word.lower(), f"w{word}"):
        if each in names:
            return each
    return None


def about_member(word: str, there: Iterable[str]) -> str:
    """What to do about a name that no member has."""
    names = sorted(there, key=lambda name: (name[:1], len(name), name))
    near = nearest(word, names)
    if near is not None:
        return f"Did you mean {near}?"
    return f"There are {', '.join(names[:8])}{' and more' if len(names) > 8 else ''}." if names else ""
