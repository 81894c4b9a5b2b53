"""The dashboard on a server that is there anyway: a coordinator's, or a hub's.

Rule: what it takes is loaded when the mount is called, which is when somebody has called first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiohttp import web

    from ..cluster.jobs import Desk
    from ..status import JobStatus


def of_run(folder: Path, live: Callable[[], JobStatus]) -> Callable[[web.Application], None]:
    """Of the run whose coordinator this process is."""

    def mount(app: web.Application) -> None:
        from . import serving, sources

        serving.mount(app, sources.OneRun(folder, live))

    return mount


def of_hub(desk: Desk, folder: Path) -> Callable[[web.Application], None]:
    """Of all jobs of the hub whose state lies in this folder."""

    def mount(app: web.Application) -> None:
        from . import serving, sources

        serving.mount(app, sources.HubRuns(desk, folder.name))

    return mount
