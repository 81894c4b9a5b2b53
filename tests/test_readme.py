"""What the README says is true: its links lead somewhere, its commands and flags exist, its error codes are known."""

import re
import shlex
from pathlib import Path

import click
import pytest

from zml.commands.cli import main
from zml.errors import BOOK

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(
    {
        line.partition("#")[0].strip()
        for line in [*TEXT.splitlines(), *re.findall(r"`(zml [^`]+)`", TEXT)]
        if re.match(r"( {4})?zml (run|coordinator|ps|worker|keys|status|doctor|config|explain)\b", line)
    }
)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", TEXT))))
def test_a_link_leads_to_a_file(link: str) -> None:
    assert (ROOT / link).exists()


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_and_its_flags_exist(line: str) -> None:
    _, name, *words = shlex.split(line)
    command = main.commands[name]
    known = {flag for option in command.params if isinstance(option, click.Option) for flag in option.opts}
    until_script = next((i for i, word in enumerate(words) if word.endswith(".py")), len(words))
    assert {word for word in words[:until_script] if word.startswith("-")} <= known


def test_the_readme_has_commands_at_all() -> None:
    assert len(COMMANDS) >= 4


def test_a_make_target_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)", TEXT)):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_an_error_code_is_in_the_book() -> None:
    assert set(re.findall(r"ZML-E\d{3}\b", TEXT)) <= BOOK.keys()
