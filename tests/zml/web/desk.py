"""A desk in memory that keeps the contract of zml.cluster.jobs.Desk: a small real state machine, without a scheduler.

Jobs wait until a test moves them. What it takes it keeps, and every change wakes those who wait for it.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec

from zml.cluster.jobs import (
    AttemptView,
    Decision,
    Desk,
    Explanation,
    JobView,
    NodeView,
    Problem,
    Submission,
    name_of,
)
from zml.errors import ARCHIVE, BAD_JOB, NO_JOB, REFUSED
from zml.web.bodies import ENDS

NEXT: dict[str, frozenset[str]] = {
    "QUEUED": frozenset({"STARTING", "PAUSED", "CANCELLED"}),
    "STARTING": frozenset({"RUNNING", "DRAINING", "FAILED", "QUEUED"}),
    "RUNNING": frozenset({"DRAINING", "SUCCEEDED", "FAILED", "TIMED_OUT", "QUEUED"}),
    "DRAINING": frozenset({"PAUSED", "CANCELLED", "QUEUED"}),
    "PAUSED": frozenset({"QUEUED", "CANCELLED"}),
    **dict.fromkeys(ENDS, frozenset()),
}
WHY = {
    "QUEUED": "NO_ROOM",
    "STARTING": "STARTS",
    "RUNNING": "RUNS",
    "DRAINING": "DRAINING",
    "PAUSED": "PAUSED",
}


class FakeDesk:
    """`folder` holds archives and output. Time is a counter: every change is one second later."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.views: dict[str, JobView] = {}
        self.keys: dict[tuple[str, str], str] = {}
        self.decisions: dict[str, list[Decision]] = {}
        self.waiters: dict[str, set[asyncio.Event]] = {}
        self.machines: list[NodeView] = []
        self.now = 1_800_000_000.0
        self.on_wait: Callable[[str], None] = lambda job: None
        self.calls: list[str] = []

    # -- what a test does ------------------------------------------------------------------------------------

    def move(self, job: str, state: str, because: str = "", **changes: Any) -> JobView:
        view = self._view(job)
        assert state in NEXT[view.state], f"{view.state} -> {state}"
        self.now += 1.0
        attempts = list(view.attempts)
        if state == "STARTING":
            run_dir = self.folder / job / f"attempt-{len(attempts) + 1}"
            run_dir.mkdir(parents=True)
            attempts.append(AttemptView(number=len(attempts) + 1, run_dir=str(run_dir), began_at=self.now))
            changes |= {"began_at": view.began_at or self.now}
        elif attempts and attempts[-1].ended_at is None and state not in ("RUNNING", "DRAINING"):
            attempts[-1] = msgspec.structs.replace(
                attempts[-1], ended_at=self.now, state=state, exit_code=changes.get("exit_code")
            )
        if state in ENDS:
            changes |= {"ended_at": self.now, "workers": 0, "nodes": []}
        return self._put(
            msgspec.structs.replace(
                view, state=state, why=WHY.get(state, ""), because=because, attempts=attempts, **changes
            )
        )

    def write(self, job: str, name: str, text: str) -> Path:
        path = Path(self._view(job).attempts[-1].run_dir) / name
        with path.open("a") as file:
            file.write(text)
        return path

    def tick(self, job: str) -> None:
        """Something that is not shown has changed."""
        self._put(msgspec.structs.replace(self._view(job), attained_s=self._view(job).attained_s + 1))

    def _put(self, view: JobView) -> JobView:
        self.views[view.id] = view
        self.decisions.setdefault(view.id, []).append(
            Decision(at=self.now, what=view.state, because=view.because)
        )
        for event in self.waiters.pop(view.id, set()):
            event.set()
        return view

    def _view(self, job: str) -> JobView:
        if job not in self.views:
            raise Problem(404, f"there is no job {job}", "`zml jobs --all` lists them.", NO_JOB)
        return self.views[job]

    # -- the contract ----------------------------------------------------------------------------------------

    def submit(self, submission: Submission, user: str, *, key: str = "") -> JobView:
        self.calls.append(f"submit {user} {key}")
        if key and (user, key) in self.keys:
            before = self._view(self.keys[user, key])
            if before.submission != submission:
                raise Problem(422, "this key was used for another job", "Take a new key.", BAD_JOB)
            return before
        for other in submission.after:
            self._view(other)
        if submission.archive and not self.has_archive(submission.archive):
            raise Problem(409, "the archive is not here", "Send it first.", ARCHIVE)
        self.now += 1.0
        job = f"j{len(self.views) + 1}"
        if key:
            self.keys[user, key] = job
        least, most = submission.bounds
        return self._put(
            JobView(
                id=job,
                name=name_of(submission),
                user=user,
                state="QUEUED",
                why="NO_ROOM",
                because=f"it needs {least} CPUs, and 0 are free",
                submitted_at=self.now,
                priority=submission.priority,
                workers_min=least,
                workers_max=most,
                shards=submission.shards,
                submission=submission,
            )
        )

    def jobs(self, *, states: frozenset[str] = frozenset(), user: str = "", newest: int = 0) -> list[JobView]:
        found = [
            msgspec.structs.replace(view, submission=None)
            for view in self.views.values()
            if (not states or view.state in states) and user in ("", view.user)
        ]
        return found[-newest:] if newest else found

    def job(self, job: str) -> JobView:
        return self._view(job)

    def explain(self, job: str) -> Explanation:
        view = self._view(job)
        ahead = []
        if view.state == "QUEUED":
            for each in self.views.values():
                if each.id == job:
                    break
                if each.state == "QUEUED":
                    ahead.append(each.id)
        return Explanation(
            job=view, ahead=ahead[:20], ahead_count=len(ahead), decisions=self.decisions[job][-20:]
        )

    def cancel(self, job: str, because: str) -> JobView:
        view = self._view(job)
        if view.state in ENDS or view.state == "DRAINING":
            return view
        return self.move(job, "DRAINING" if view.state in ("STARTING", "RUNNING") else "CANCELLED", because)

    def pause(self, job: str, because: str) -> JobView:
        view = self._view(job)
        if view.state in ENDS:
            raise Problem(409, f"{job} is over: {view.state}", "", REFUSED)
        if view.state in ("PAUSED", "DRAINING"):
            return view
        return self.move(job, "DRAINING" if view.state in ("STARTING", "RUNNING") else "PAUSED", because)

    def resume(self, job: str) -> JobView:
        view = self._view(job)
        if view.state in ENDS:
            raise Problem(409, f"{job} is over: {view.state}", "", REFUSED)
        return self.move(job, "QUEUED", "it was resumed") if view.state == "PAUSED" else view

    def delete(self, job: str, because: str) -> JobView:
        view = self._view(job)
        if view.state not in ENDS:
            raise Problem(409, f"job {job} is not over: {view.state}", "Cancel it first.", REFUSED)
        return self.views.pop(job)

    def scale(self, job: str, least: int, most: int) -> JobView:
        view = self._view(job)
        if view.state in ENDS:
            raise Problem(409, f"{job} is over: {view.state}", "", REFUSED)
        return self._put(msgspec.structs.replace(view, workers_min=least, workers_max=most))

    def nodes(self) -> list[NodeView]:
        return self.machines

    def has_archive(self, sha256: str) -> bool:
        return (self.folder / f"{sha256}.tar.gz").exists()

    async def take_archive(self, sha256: str, data: AsyncIterator[bytes]) -> None:
        pieces = [piece async for piece in data]
        content = b"".join(pieces)
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Problem(422, "the content has another checksum", "Send it again.", ARCHIVE)
        (self.folder / f"{sha256}.tar.gz").write_bytes(content)

    def archive(self, sha256: str) -> str:
        return str(self.folder / f"{sha256}.tar.gz")

    def log_files(self, job: str, attempt: int | None = None) -> dict[str, str]:
        attempts = self._view(job).attempts
        if attempt is not None and not 1 <= attempt <= len(attempts):
            raise Problem(404, f"{job} has no attempt {attempt}", "", NO_JOB)
        if not attempts:
            return {}
        folder = Path(attempts[-1 if attempt is None else attempt - 1].run_dir)
        return {path.name: str(path) for path in sorted(folder.iterdir())}

    async def changed(self, job: str, within_s: float) -> JobView:
        self._view(job)
        event = asyncio.Event()
        self.waiters.setdefault(job, set()).add(event)
        self.on_wait(job)
        try:
            async with asyncio.timeout(within_s):
                await event.wait()
        except TimeoutError:
            pass
        finally:
            self.waiters.get(job, set()).discard(event)
        return self._view(job)


def keeps_the_contract(desk: FakeDesk) -> Desk:
    """mypy says whether it does."""
    return desk
