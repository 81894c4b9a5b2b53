"""The sbatch script, as text that people read and change. It runs nothing.

Rule: what is in it is either Slurm's (the #SBATCH lines) or one command, `zml slurm head`, with the job's own flags; a
value that could end its line is refused.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import USAGE, ZmlError
from .shape import Needs

WARN_S = 120  # before the time limit: to finish a step and to write a checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """`options` are sbatch's, name and value; an empty value is a flag. `words` are what the batch step runs, and
    `parts` groups of words that stand on a line of their own, the user's script last."""

    title: str
    name: str
    nodes: str
    each: Needs
    requeue: bool
    options: Sequence[tuple[str, str]] = ()
    setup: Sequence[str] = ()  # lines of shell before it
    words: Sequence[str] = ()
    parts: Sequence[Sequence[str]] = ()
    about: str = ""  # the words, in a comment before them

    def text(self) -> str:
        given = {name for name, _ in self.options}
        log = "%x-%A_%a.out" if "array" in given else "%x-%j.out"
        ours = [
            ("job-name", self.name, ""),
            ("nodes", self.nodes, ""),
            ("ntasks-per-node", "1", "the steps inside divide a node as they need it"),
            ("cpus-per-task", str(self.each.cpus), "of each node: the fullest one's workers and shards"),
            ("mem", f"{self.each.memory_mb}M", "the same"),
            *([("gpus-per-node", str(self.each.gpus), "one for each worker")] if self.each.gpus else []),
            ("signal", f"B:TERM@{WARN_S}", "before the time limit: finish the step, take a checkpoint"),
            ("requeue" if self.requeue else "no-requeue", "", ""),
            ("no-kill", "", "a node that dies takes its own members along, and not the job"),
            ("open-mode", "append", "the log goes on after a requeue"),
            ("output", log, ""),
        ]
        lines = ["#!/bin/bash", f"# {self.title}"]
        for name, value, why in ours:
            if name not in given and not (name == "gpus-per-node" and given & {"gres", "gpus"}):
                lines.append(_option(name, value, why))
        lines += [_option(name, value, "") for name, value in self.options]
        lines += ["", *(_one_line(line, "--setup") for line in self.setup), *([""] if self.setup else [])]
        lines += [f"# {self.about}"] if self.about else []
        commands = ["exec " + shlex.join(self.words), *(shlex.join(part) for part in self.parts)]
        lines.append(" \\\n    ".join(commands))
        for part in self.parts:
            for word in part:
                _one_line(word, "an argument")
        return "\n".join(lines) + "\n"


def _option(name: str, value: str, why: str) -> str:
    _one_line(value, f"--{name}")
    written = f"#SBATCH --{name}" + (f"={_quoted(value)}" if value else "")
    return f"{written:<40} # {why}" if why else written


def _quoted(value: str) -> str:
    """sbatch takes #SBATCH lines apart as a shell does."""
    return shlex.quote(value) if any(letter in value for letter in " \t\"'#\\") else value


def _one_line(text: str, whose: str) -> str:
    if any(letter in text for letter in "\n\r\0"):
        raise ZmlError(USAGE, f"{whose} has a line end in it: {text!r}", "Write it on one line.")
    return text
