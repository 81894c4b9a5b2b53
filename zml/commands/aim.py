"""Which run, and which coordinator, does a command mean? For commands that take a RUN, or --coordinator, or neither."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import Settings
from ..errors import USAGE, ZmlError
from ..runs import finding, rundir
from .flags import settle

CALL_S = 0.5


@dataclass(frozen=True, slots=True)
class Aim:
    """`settings` say where the coordinator listens and which job is meant; `folder` is its run directory, if there is
    one on this machine."""

    settings: Settings
    folder: Path | None
    named: bool = True  # by a person; else it is the default address

    def nobody_is_there(self) -> bool:
        """Nobody has named an address, and the system says that nothing listens at the default one: there is no need to
        wait for an answer."""
        return not self.named and self.folder is None and all(map(_is_closed, self.settings.coordinator))


def _is_closed(address: str) -> bool:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), CALL_S).close()
    except ConnectionRefusedError:
        return True
    except (OSError, ValueError):
        return False
    return False


def take(run: str | None, given: Mapping[str, Any]) -> Aim:
    """Without a run and an address: the run below ./runs that goes on, else the default address. Raises ZmlError."""
    resolved = settle(given)
    settings = resolved.settings
    if run:
        folder = finding.find(run, Path(settings.runs))
    elif resolved.origins["coordinator"] != "default":
        return Aim(settings, Path(settings.run_dir) if settings.run_dir else None)
    else:
        running = finding.running(Path(settings.runs))
        if not running:
            return Aim(settings, None, named=False)
        folder = running[0]
    here = rundir.listening(folder)
    if here is None:
        return Aim(settings, folder)
    settings = replace(settings, coordinator=tuple(here.addresses), job=here.job or settings.job)
    return Aim(settings, folder)


def must_go_on(aim: Aim) -> None:
    """Raises ZmlError where the run is over, or has not begun: nobody would answer."""
    if aim.folder is None:
        return
    over = rundir.last_status(aim.folder)
    if over is not None:
        fix = f"`zml status {aim.folder}` shows how it ended."
        raise ZmlError(USAGE, f"{aim.folder} is over: {over.state.lower()}", fix)
    if rundir.listening(aim.folder) is None:
        raise ZmlError(USAGE, f"{aim.folder} has not begun", "Wait for its coordinator to listen.")
