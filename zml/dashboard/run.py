"""One run directory, read as it is asked for: files in, views out.

Rule: what has not changed is not read again, and nothing is read whole that may be long. Everything here blocks, and is
called in a thread; several may ask at once. A file that is missing, torn or foreign is as one that says nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from ..checkpoint import BadCheckpoint, entries, read_manifest
from ..checkpoint.folder import hidden
from ..errors import ZmlError
from ..files import read_regular
from ..logs import reading as logreading
from ..logs.reading import Line, Wanted
from ..logs.reading.files import sources as log_sources
from ..runs import audit, history, rundir
from ..runs.history import Row
from ..scheduler.audit import audit as prove
from ..scheduler.explain import name_samples
from ..status import JobStatus
from . import members, overview, steps, telling
from .findings import Errors, Evidence
from .growing import Growing, ends
from .rates import NOTHING, Lately, Trim, lately, row_of
from .views import (
    CheckpointLine,
    Checkpoints,
    Config,
    Data,
    EpochLine,
    Events,
    LogLine,
    Logs,
    Overview,
    RunLine,
    Series,
    Setting,
    Shards,
    Waterfall,
    Workers,
    tone_of,
)

WINDOW_S = 30.0  # what "lately" is
POINT_S, POINTS = 2.0, 30  # between two statuses whose figures are kept, and how many are
AGAIN_S = 0.5  # an overview that is younger is given again
AUDIT_S = 10.0  # the proof is not made more often; a long one ten times its own length
AUDIT_BYTES = 256 * 2**20  # of a journal that is proved here
GONE_S = 60.0  # without news, of a run in a list
MOST_CHECKPOINTS = 500
MOST_FIGURE_ROWS = 2 * members.POINTS
ERROR_LINES = 200
ERROR_BYTES = 2**20  # of logs that are looked through for errors
LOG_BYTES = 32 * 2**20  # and for one page of lines
MOST_LINES = 2000
MESSAGE_CHARS = 4000

Live = Callable[[], JobStatus]


class Run:
    """`live`: asks the run's coordinator, in this process; without it, what the run directory says. It is asked by
    `ask`, in the coordinator's loop, for only there its status holds still."""

    def __init__(self, folder: Path, name: str = "", live: Live | None = None) -> None:
        self.folder = folder.absolute()
        self.name = name or self.folder.name
        self.live = live
        self.said: JobStatus | None = None
        self.asked_at = -1.0
        self.rows = Growing(self.folder / history.JOB, Row, 2 * history.JOB_ROWS)
        self.figures = Growing(self.folder / history.MEMBERS, Trim, MOST_FIGURE_ROWS)
        self.log_folder = self.folder / rundir.LOGS
        self.lock = threading.Lock()  # over what is kept below
        self.proving = threading.Lock()  # which may take seconds
        self.noting = threading.Lock()  # over the next two
        self.points: deque[Trim] = deque(maxlen=POINTS)  # out of statuses, the oldest first
        self.mark: tuple[int, int, float] | None = None  # steps and samples, and when they were first seen
        self.proof: tuple[str, float, Data] | None = None  # of which journal, until when it is good
        self.logged: tuple[str, dict[str, Errors]] = ("", {})
        self.told: tuple[str, Events] | None = None
        self.shown: tuple[float, Overview] | None = None
        self.settings_: tuple[str, dict[str, Any]] | None = None

    # -- what the files say ----------------------------------------------------------------------------------

    def ask(self) -> None:
        """In the loop, and quick: before anything is read in a thread."""
        if self.live is not None and time.monotonic() - self.asked_at > AGAIN_S:
            self.said, self.asked_at = self.live(), time.monotonic()

    def status(self) -> JobStatus:
        """The newest. Of a run that has written none yet, an empty one."""
        if self.said is not None:
            return self.said
        found = rundir.newest_status(self.folder)
        if found is None:
            about = self.config_json()
            began = about.get("started_at")
            at = float(began) if isinstance(began, int | float) else 0.0
            found = JobStatus(
                job="", state="STARTING", script=str(about.get("script", "")), started_at=at, at=at
            )
        return found

    def config_json(self) -> dict[str, Any]:
        path = self.folder / rundir.CONFIG
        version = version_of(path)
        if self.settings_ is None or self.settings_[0] != version:
            try:
                found = msgspec.json.decode(read_regular(path), type=dict[str, Any])
            except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
                found = {}
            self.settings_ = (version, found)
        return self.settings_[1]

    def setting(self, name: str, default: Any) -> Any:
        settings = self.config_json().get("settings")
        return settings.get(name, default) if isinstance(settings, dict) else default

    def lately(self, status: JobStatus) -> Lately:
        """Out of the ends of the file: the first page does not wait for the rest."""
        rows = self.with_points(ends(self.folder / history.MEMBERS, Trim), status)
        return lately(rows, None if status.over else WINDOW_S) if rows else NOTHING

    def with_points(self, rows: list[Trim], status: JobStatus) -> list[Trim]:
        """Rows of a long run are minutes apart: what statuses said since somebody looks comes between them."""
        if status.over:
            return rows
        with self.noting:
            newest = self.points[-1].at if self.points else 0.0
            if status.steps > 0 and status.at >= newest + POINT_S:
                self.points.append(row_of(status))
            points = list(self.points)
        known = {row.at for row in rows}
        return sorted([*rows, *(each for each in points if each.at not in known)], key=lambda row: row.at)

    def stands_since(self, status: JobStatus) -> float:
        with self.noting:
            if self.mark is None or self.mark[:2] != (status.steps, status.samples):
                self.mark = (status.steps, status.samples, status.at)
            return self.mark[2]

    def evidence(self, status: JobStatus) -> Evidence:
        now = time.time()
        silent = 0.0
        alive: bool | None = None
        if self.live is None and not status.over:
            written = modified(self.folder / rundir.NOW)
            silent = max(0.0, now - (written or status.at or now))
            alive = self.coordinator_lives()
        return Evidence(
            status=status,
            now=now,
            lately=self.lately(status),
            rows=self.rows.look(),
            errors=self.errors(),
            silent_s=silent,
            alive=alive,
            checkpoint_minutes=number(self.setting("checkpoint_minutes", 0.0)),
            checkpoint_steps=int(number(self.setting("checkpoint_steps", 0))),
            silence_expected=self.live is not None,
            stands_since=self.stands_since(status),
        )

    def coordinator_lives(self) -> bool | None:
        """None: it is on another machine, or has not begun."""
        listening = rundir.listening(self.folder)
        if listening is None or not any(
            each.startswith("ipc://") or "//127." in each for each in listening.addresses
        ):
            return None
        return rundir.alive(listening.pid)

    def errors(self) -> dict[str, Errors]:
        """What processes logged as errors, among the newest lines."""
        version = log_version(self.log_folder)
        if self.logged[0] != version:
            found: dict[str, Errors] = {}
            page = logreading.newest(
                self.log_folder, Wanted(level="error"), ERROR_LINES, budget_bytes=ERROR_BYTES
            )
            for line in page.lines:
                before = found.get(line.member, Errors(0, ""))
                found[line.member] = Errors(before.count + 1, line.message)
            self.logged = (version, found)
        return self.logged[1]

    def versions(self) -> dict[str, str]:
        checkpoints = self.folder / rundir.CHECKPOINTS
        timeline = self.folder / rundir.TIMELINE
        return {
            "series": version_of(self.folder / history.JOB),
            "members": version_of(self.folder / history.MEMBERS),
            "events": version_of(self.folder / rundir.EVENTS),
            "checkpoints": version_of(checkpoints),
            "logs": log_version(self.log_folder),
            "steps": newest_of(timeline),
            "data": version_of(self.folder / rundir.STATUS) + version_of(self.folder / rundir.NOW),
        }

    # -- pages -------------------------------------------------------------------------------------------------

    def overview(self) -> Overview:
        with self.lock:
            now = time.monotonic()
            if self.shown is None or now - self.shown[0] > AGAIN_S:
                bound = self.setting("staleness", 0)
                made = overview.overview(
                    self.name,
                    self.evidence(self.status()),
                    self.versions(),
                    self.events().events,
                    bound if isinstance(bound, int) else None,
                )
                self.shown = (time.monotonic(), made)
            return self.shown[1]

    def series(self) -> Series:
        before = self.status().steps_before
        return overview.series(self.rows.look(), self.events().events, before=before)

    def workers(self, *, whole: bool = False) -> Workers:
        status = self.status()
        rows = self.with_points(self.figures.look(), status)
        return members.workers(status, lately(rows, None if whole or status.over else WINDOW_S), rows)

    def shards(self) -> Shards:
        status = self.status()
        rows = self.with_points(self.figures.look(), status)
        return members.shards(status, lately(rows, None if status.over else WINDOW_S), rows)

    def waterfall(self, clock: int | None) -> Waterfall:
        return steps.waterfall(self.folder / rundir.TIMELINE, clock)

    def events(self) -> Events:
        version = version_of(self.folder / rundir.EVENTS)
        if self.told is None or self.told[0] != version:
            self.told = (version, telling.read(self.folder / rundir.EVENTS))
        return self.told[1]

    def logs(self, wanted: Wanted, most: int, cursor: str = "") -> Logs:
        """The newest lines, or with a cursor those since. Raises logreading.BadCursor."""
        most = max(1, min(most, MOST_LINES))
        page = (
            logreading.after(self.log_folder, cursor, wanted, most, budget_bytes=LOG_BYTES)
            if cursor
            else logreading.newest(self.log_folder, wanted, most, budget_bytes=LOG_BYTES)
        )
        return Logs(
            lines=[log_line(line) for line in page.lines],
            cursor=page.cursor,
            complete=page.complete and (cursor != "" or len(page.lines) < most),
            members=log_members(self.log_folder),
        )

    def config(self) -> Config:
        about, status = self.config_json(), self.status()
        settings, origins = about.get("settings"), about.get("origins")
        origins = origins if isinstance(origins, dict) else {}
        known = [
            (title, shown(about[key]))
            for key, title in (
                ("script", "script"),
                ("args", "arguments"),
                ("folder", "working folder"),
                ("zml", "zml"),
                ("python", "python"),
                ("torch", "torch"),
            )
            if key in about
        ]
        listening = rundir.listening(self.folder)
        addresses = [("listens at", ", ".join(listening.addresses))] if listening else []
        return Config(
            settings=[
                Setting(name=str(key), value=shown(value), origin=str(origins.get(key, "")))
                for key, value in (settings.items() if isinstance(settings, dict) else ())
            ],
            about=[*known, ("run directory", str(self.folder)), *addresses],
            nodes=[
                (each.member, f"{each.node or 'unknown'}, {each.device}, process {each.pid or 'unknown'}")
                for each in status.members
            ],
        )

    def checkpoints(self) -> Checkpoints:
        root, status = self.folder / rundir.CHECKPOINTS, self.status()
        lines = []
        try:
            found = entries(root)
            partial = sorted(name for name in os.listdir(root) if is_partial(name))
        except OSError:
            found, partial = [], []
        for entry in found[-MOST_CHECKPOINTS:]:
            newest = entry is found[-1]
            try:
                manifest = read_manifest(root / entry.name)
            except BadCheckpoint as bad:
                lines.append(line_of(entry.name, state="wrong", wrong=bad.because))
                continue
            lines.append(
                CheckpointLine(
                    name=entry.name,
                    step=manifest.step,
                    epoch=manifest.epoch,
                    created=manifest.created,
                    because=manifest.because,
                    bytes=manifest.bytes,
                    files=len(manifest.files),
                    parameters=manifest.parameters,
                    newest=newest,
                    state="complete",
                    wrong="",
                )
            )
        lines += [line_of(name, state="being written") for name in partial[:8]]
        return Checkpoints(
            folder=str(root),
            checkpoints=lines,
            last=overview.checkpoint(status.checkpoint),
            every_minutes=number(self.setting("checkpoint_minutes", 0.0)),
            every_steps=int(number(self.setting("checkpoint_steps", 0))),
        )

    def data(self) -> Data:
        """With the proof of `zml data audit`: made anew when the journal has grown, but not all the time."""
        now = overview.data(self.status().data)
        folder = self.folder / rundir.COORDINATOR_STATE
        if not self.proving.acquire(blocking=False):
            if (last := self.proof) is not None:
                return msgspec.structs.replace(last[2], now=now)
            return Data(state="unknown", says="It is being checked.", at=time.time(), epochs=[], now=now)
        try:
            version = f"{total_bytes(folder)}"
            if self.proof is not None and (self.proof[0] == version or time.monotonic() < self.proof[1]):
                return msgspec.structs.replace(self.proof[2], now=now)
            began = time.monotonic()
            proof = msgspec.structs.replace(self._prove(folder, int(version)), now=now)
            took = time.monotonic() - began
            self.proof = (version, time.monotonic() + max(AUDIT_S, 10 * took), proof)
            return proof
        finally:
            self.proving.release()

    def _prove(self, folder: Path, size: int) -> Data:
        nothing = overview.data(JobStatus(job="", state="").data)
        if size > AUDIT_BYTES:
            says = f"The journal has {size / 1e6:,.0f} MB: `zml data audit {self.name}` proves it."
            return Data(state="unknown", says=says, at=time.time(), epochs=[], now=nothing)
        try:
            accounts = prove(audit.read_calls(self.folder))
        except ZmlError as error:
            return Data(state="unknown", says=error.what, at=time.time(), epochs=[], now=nothing)
        sentences = list(audit.lines(accounts))
        return Data(
            state="proved" if all(account.sound for account in accounts) else "wrong",
            says=sentences[-1],
            at=time.time(),
            epochs=[
                EpochLine(
                    epoch=account.epoch,
                    batches=account.batches,
                    samples=account.samples,
                    committed=account.committed,
                    reissued=account.reissued,
                    skipped=len(account.skipped),
                    duplicates=account.duplicates,
                    missing=account.missing,
                    unleased=account.unleased,
                    to_go=account.to_go,
                    closed=account.closed,
                    sound=account.sound,
                    faults=account.faults[:20],
                    left_out=[
                        f"{each.worker} left out batch {each.batch} ({name_samples(each.samples)}): {each.because}"
                        for each in account.skipped[:20]
                    ],
                )
                for account in accounts
            ],
            now=nothing,
        )

    def line(self) -> RunLine:
        """In a list of runs."""
        status = self.status()
        silent_s = 0.0 if status.over else time.time() - (modified(self.folder / rundir.NOW) or status.at)
        gone = silent_s > GONE_S and self.coordinator_lives() is not True
        return RunLine(
            name=self.name,
            script=status.script.rpartition("/")[2],
            state=status.state,
            tone="warn" if gone else tone_of(status.state),
            because=status.because or ("nothing has been heard of it for a while" if gone else ""),
            silent_s=round(silent_s) if gone else 0,
            began=status.started_at,
            at=status.at,
            steps=overview.steps_of(status),
            progress=1.0 if status.state == "SUCCEEDED" else status.progress,
            values=dict(list(status.values.items())[:3]),
            workers=len(status.of("worker")),
        )


# -- files ---------------------------------------------------------------------------------------------------------


def version_of(path: Path) -> str:
    """Another one when the file or folder has changed; empty where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{found.st_ino:x}.{found.st_size:x}.{found.st_mtime_ns:x}"


def newest_of(folder: Path) -> str:
    try:
        return str(max((each.stat().st_mtime_ns for each in os.scandir(folder)), default=0))
    except OSError:
        return ""


def log_version(folder: Path) -> str:
    """Another one when there is more to read."""
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                total += entry.stat(follow_symlinks=False).st_size
    except OSError:
        pass
    return str(total)


def log_members(folder: Path) -> list[str]:
    """Whose logs there are: workers and shards by number, then the rest."""
    found = {source.member for source in log_sources(folder)}
    return sorted(found, key=lambda name: (not name[1:].isdigit(), name[:1], len(name), name))


def log_line(line: Line) -> LogLine:
    return LogLine(
        at=line.time,
        level=line.level,
        member=line.member[:80],
        role=line.role[:40],
        message=cut(line.message, MESSAGE_CHARS),
        details=[cut(each, 500) for each in logreading.details(line)[:24]],
        failure=[cut(each, 500) for each in logreading.failure(line)[-24:]],
        step=line.step,
    )


def cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def modified(path: Path) -> float | None:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return None


def total_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*.records"):
        try:
            total += os.stat(path).st_size
        except OSError:
            continue
    return total


def is_partial(name: str) -> bool:
    found = hidden(name)
    return found is not None and found.kind == "partial"


def line_of(name: str, state: Any, wrong: str = "") -> CheckpointLine:
    return CheckpointLine(
        name=name,
        step=None,
        epoch=None,
        created="",
        because="",
        bytes=None,
        files=None,
        parameters=None,
        newest=False,
        state=state,
        wrong=wrong,
    )


def number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def shown(value: Any) -> str:
    """A setting as a person writes it."""
    if value is None:
        return "async"
    if isinstance(value, list):
        return " ".join(str(each) for each in value)
    return ("on" if value else "off") if isinstance(value, bool) else str(value)
