"""What is installed is what lies here: every package, and every file of them that is no code."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_package_is_named() -> None:
    folders: set[str] = set()
    for package, folder in {"zml": "zml", "zml.transport": "transport", "zml.scheduler": "scheduler"}.items():
        for path in (ROOT / folder).rglob("*.py"):
            folders.add(".".join((package, *path.parent.relative_to(ROOT / folder).parts)))
    assert folders == set(SETUPTOOLS["packages"])


def test_every_other_file_is_taken_along() -> None:
    (patterns,) = SETUPTOOLS["package-data"].values()
    taken = {path for pattern in patterns for path in (ROOT / "zml").glob(pattern) if path.is_file()}
    there = {
        path
        for path in (ROOT / "zml").rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert len(taken) > 20 and there == taken
