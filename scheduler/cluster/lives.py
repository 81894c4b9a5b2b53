"""How attempts live and end, and jobs with them: the part of the cluster's machine that is about one job at a time.

What an attempt was asked to do it has to do by a deadline: to begin, to leave, to stop, to be gone. After the last one
its processes are killed, and the attempt is over for the machine whatever its own coordinator thinks. Where one of its
scripts has come to its end, the others' ends are near, mostly: the attempt is let alone, but not for ever.

Rule: that a deadline has come is found once (`_overdue`), where time passes, and the finding says which. What follows
from it does not ask the time again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import inf
from typing import TypeAlias

from ..explain import counted
from ..ids import JobId
from .actions import Action, Bury, Close, Drain, Finish, Ignored, Quit, Stop
from .events import Began, Ended, Gone, Late, Outcome, TimeUp
from .request import Request
from .rules import Rules
from .state import Attempt, Cluster, Job, Leaving, Over, Standing, Then

EXIT_CANCELLED = 130  # whether it waited or ran: its script's own 75 would say that it goes on
EXIT_TIMED_OUT = 124  # as timeout(1)
EXIT_LOST = 1

Actions: TypeAlias = Iterator[Action]


class Lives:
    """A part of `machine.Machine`."""

    rules: Rules
    cluster: Cluster

    # -- one attempt -------------------------------------------------------------------------------------

    def _gone(self, event: Gone, now: float) -> Actions:
        found = self._attempt(event.job, event.attempt)
        if found is None or event.slot not in found[1].slots:
            yield Ignored(event.job, f"{event.job}.{event.attempt} {event.slot} was gone before")
            return
        job, attempt = found
        attempt.stopping = attempt.stopping or (event.done and event.slot[0] == "p")
        if event.done and not attempt.finishing:
            attempt.finishing, attempt.finishing_until = True, now + self.rules.finish_s
        yield from self._slot_gone(job, attempt, event.slot, event.because, now)

    def _slot_gone(self, job: Job, attempt: Attempt, slot: str, because: str, now: float) -> Actions:
        job.count(now)
        was_leaving = self.cluster.lift(job, attempt, slot).leaving
        if attempt.outcome is None:
            yield Bury(job.id, attempt.number, slot, because)
        if attempt.is_to_go_on:
            if attempt.began is None and not was_leaving:
                # The others would wait for it, and hold their nodes.
                yield from self._leave(job, Then.TRY_AGAIN, f"{slot}: {because}", now, at_once=True)
            elif not attempt.slots:
                # Nobody is left who could go on; its coordinator would only wait.
                said = f"nothing of it is left: {because}"
                yield from self._leave(job, Then.TRY_AGAIN, said, now, at_once=True)
        if not attempt.slots and attempt.outcome is not None:
            yield from self._close(job, attempt, now)

    def _began(self, event: Began, now: float) -> Actions:
        found = self._attempt(event.job, event.attempt)
        if found is None or found[1].began is not None:
            yield Ignored(event.job, f"{event.job}.{event.attempt} does not begin")
            return
        job, attempt = found
        attempt.began, job.false_starts = now, 0
        job.first_began = job.first_began or now

    def _ended(self, event: Ended, now: float) -> Actions:
        found = self._attempt(event.job, event.attempt)
        if found is None or found[1].outcome is not None:
            yield Ignored(event.job, f"{event.job}.{event.attempt} was over before")
            return
        job, attempt = found
        job.count(now)
        attempt.outcome, attempt.exit_code = event.outcome, event.exit_code
        attempt.because, attempt.ended = event.because, now
        attempt.kill_at = now + self.rules.stop_s  # they know, and go by themselves
        if not attempt.slots:
            yield from self._close(job, attempt, now)

    def _close(self, job: Job, attempt: Attempt, now: float) -> Actions:
        """Nothing of the attempt is left."""
        assert attempt.outcome is not None
        yield Close(job.id, attempt.number, attempt.outcome, attempt.exit_code, attempt.because)
        job.count(now)
        job.ran_s, job.attempt, job.since = job.ran(now), None, now
        then = attempt.leaving.then if attempt.leaving is not None else None
        because = attempt.leaving.because if attempt.leaving is not None else attempt.because
        code = attempt.exit_code
        if attempt.outcome is Outcome.SUCCEEDED:
            yield from self._finish(job, Standing.SUCCEEDED, 0, attempt.because, now)
        elif then is Then.CANCEL:
            yield from self._finish(job, Standing.CANCELLED, EXIT_CANCELLED, because, now)
        elif then is Then.TIME_UP:
            yield from self._finish(job, Standing.TIMED_OUT, EXIT_TIMED_OUT, because, now)
        elif then is Then.PAUSE:
            job.paused = because
        elif then is Then.TRY_AGAIN:
            yield from self._lose(job, attempt, because, now)
        elif then is Then.REQUEUE or attempt.outcome is Outcome.DRAINED:
            job.losses = 0  # its turn comes again
        elif attempt.outcome is Outcome.CANCELLED:
            yield from self._finish(job, Standing.CANCELLED, EXIT_CANCELLED, because, now)
        elif attempt.outcome is Outcome.FAILED:
            job.failures += 1
            if job.failures > job.request.retries:
                yield from self._finish(job, Standing.FAILED, code or EXIT_LOST, because, now)
            else:
                job.not_before = now + self.rules.pause_s(job.failures)
        else:
            yield from self._lose(job, attempt, because, now)

    def _lose(self, job: Job, attempt: Attempt, because: str, now: float) -> Actions:
        """Machines ended it, or kept it from beginning: it is tried again, but not for ever."""
        rules = self.rules
        if attempt.began is None:
            job.false_starts += 1
        elif attempt.ended - attempt.began > rules.healthy_s:
            job.losses = 1
        else:
            job.losses += 1
        if job.false_starts >= rules.false_starts:
            what = f"{counted(job.false_starts, 'attempt')} in a row did not begin, the last one: {because}"
            yield from self._finish(job, Standing.FAILED, EXIT_LOST, what, now)
        elif job.losses >= rules.losses:
            what = f"{counted(job.losses, 'attempt')} in a row were lost, the last one: {because}"
            yield from self._finish(job, Standing.FAILED, EXIT_LOST, what, now)
        else:
            job.not_before = now + rules.pause_s(max(job.false_starts, job.losses))

    # -- deadlines ---------------------------------------------------------------------------------------

    def _leave(self, job: Job, then: Then, because: str, now: float, *, at_once: bool = False) -> Actions:
        """Ask an attempt to go. The later word counts, but what was cancelled stays so."""
        attempt = job.attempt
        assert attempt is not None
        if not attempt.is_to_go_on:
            if attempt.leaving is None:
                attempt.leaving = Leaving(then, because, inf, stopped=True)
            elif attempt.leaving.then not in (Then.CANCEL, Then.TIME_UP):
                attempt.leaving.then, attempt.leaving.because = then, because
            return
        at_once = at_once or attempt.began is None  # nothing is there yet to be saved
        patience_s = self.rules.stop_s if at_once else self.rules.drain_s
        attempt.leaving = Leaving(then, because, now + patience_s, stopped=at_once)
        order = Stop if at_once else Drain
        yield order(job.id, attempt.number, because)

    def _due(self, job: Job) -> float:
        """When time will have done something to this job."""
        attempt = job.attempt
        if attempt is None:
            return inf
        if attempt.outcome is not None:
            return attempt.kill_at
        if attempt.leaving is not None:
            return attempt.leaving.until
        due = min((slot.until for slot in attempt.slots.values()), default=inf)
        if attempt.began is None:
            return min(due, attempt.placed + self.rules.start_s)
        if attempt.finishing:
            due = min(due, attempt.finishing_until)
        return min(due, limit_of(job, attempt.began))

    def _overdue(self, job: Job, now: float) -> TimeUp:
        """What is late of a job to which time has done something."""
        attempt = job.attempt
        assert attempt is not None
        if attempt.outcome is not None:
            return TimeUp(job.id, Late.CLEAR)
        if attempt.leaving is not None:
            return TimeUp(job.id, Late.STOP if attempt.leaving.stopped else Late.DRAIN)
        if late := [name for name, slot in attempt.slots.items() if slot.until <= now]:
            return TimeUp(job.id, Late.LEAVE, late)
        if attempt.began is None:
            return TimeUp(job.id, Late.BEGIN)
        is_over = limit_of(job, attempt.began) <= now
        return TimeUp(job.id, Late.LIMIT if is_over or not attempt.finishing else Late.FINISH)

    def _was_overdue(self, job: Job, now: float) -> TimeUp:
        """The same where it was not written down. Only the time limit tells what it was without the rules of then:
        where that was not over, workers were late, and if by today's rules none was, it was the first to leave."""
        found, attempt = self._overdue(job, now), job.attempt
        assert attempt is not None
        if attempt.began is None or limit_of(job, attempt.began) <= now:
            return found
        if found.what not in (Late.LIMIT, Late.FINISH):
            return found
        leaving = [name for name, slot in attempt.slots.items() if slot.leaving]
        first = min((attempt.slots[name].until for name in leaving), default=inf)
        return TimeUp(job.id, Late.LEAVE, [name for name in leaving if attempt.slots[name].until <= first])

    def _time_up(self, event: TimeUp, now: float) -> Actions:
        job, rules = self.cluster.jobs[event.job], self.rules
        attempt = job.attempt
        assert attempt is not None
        if event.what is None:
            event = self._was_overdue(job, now)
        match event.what:
            case Late.CLEAR:
                attempt.kill_at = now + rules.stop_s  # once more, should it not be heard
                because = f"it is still there {rules.stop_s:g} s after its job"
                yield from self._kill(job, attempt, [*attempt.slots], because)
            case Late.DRAIN:
                assert attempt.leaving is not None
                attempt.leaving.stopped, attempt.leaving.until = True, now + rules.stop_s
                yield Stop(job.id, attempt.number, f"it has not left after {rules.drain_s:g} s")
            case Late.STOP:
                # Its coordinator does not come to an end either.
                because = f"it has not stopped after {rules.stop_s:g} s"
                slots = [*attempt.slots]
                yield from self._ended(Ended(job.id, attempt.number, Outcome.LOST, EXIT_LOST, because), now)
                yield from self._kill(job, attempt, slots, because)
            case Late.LEAVE:
                for name in event.slots:
                    attempt.slots[name].until = now + rules.stop_s
                yield from self._kill(job, attempt, event.slots, f"it has not left after {rules.drain_s:g} s")
            case Late.BEGIN:
                because = f"not everybody was there after {rules.start_s:g} s"
                yield from self._leave(job, Then.TRY_AGAIN, because, now)
            case Late.FINISH:
                attempt.finishing_until = inf
            case Late.LIMIT:
                because = f"the time limit of {job.request.time_limit_s:g} s is over"
                yield from self._leave(job, Then.TIME_UP, because, now)

    def _kill(self, job: Job, attempt: Attempt, slots: list[str], because: str) -> Actions:
        for name in slots:
            if (place := attempt.slots.get(name)) is not None:
                yield Quit(job.id, attempt.number, name, place.node, True, because)

    # -- ends ------------------------------------------------------------------------------------------------

    def _finish(self, job: Job, standing: Standing, code: int, because: str, now: float) -> Actions:
        """A job is over, and with it those that were to come after its success. A chain of them may be long."""
        cluster = self.cluster
        ending = [(job, standing, code, because)]
        while ending:
            one, standing, code, because = ending.pop()
            cluster.over[one.id] = Over(
                one.request, standing, code, because, now, one.attempts, one.attained_s, one.first_began
            )
            del cluster.jobs[one.id]
            yield Finish(one.id, standing, code, because)
            for other in [other for other in cluster.jobs.values() if one.id in other.request.after]:
                if standing is Standing.SUCCEEDED:
                    other.request = without(other, one.id)
                elif all(other is not each[0] for each in ending):
                    said = f"it was to come after {one.id}, which ended {standing.name}"
                    ending.append((other, Standing.CANCELLED, EXIT_CANCELLED, said))
        while len(cluster.over) > self.rules.remembered:
            del cluster.over[next(iter(cluster.over))]

    def _may_still_begin(self, job: Job, now: float) -> Actions:
        """A job that comes after one that did not succeed never begins."""
        for name in job.request.after:
            over = self.cluster.over.get(name)
            if over is not None and over.standing is Standing.SUCCEEDED:
                job.request = without(job, name)
            elif name not in self.cluster.jobs:
                how = "is not known" if over is None else f"ended {over.standing.name}"
                because = f"it was to come after {name}, which {how}"
                yield from self._finish(job, Standing.CANCELLED, EXIT_CANCELLED, because, now)
                return

    def _attempt(self, name: JobId, number: int) -> tuple[Job, Attempt] | None:
        job = self.cluster.jobs.get(name)
        if job is None or job.attempt is None or job.attempt.number != number:
            return None
        return job, job.attempt


def limit_of(job: Job, began: float) -> float:
    """When an attempt that began then will have run for as long as its job may."""
    limit = job.request.time_limit_s
    return inf if limit is None else began + limit - job.ran_s


def without(job: Job, name: JobId) -> Request:
    """What it asked for, but for this job that it was to come after."""
    return replace(job.request, after=tuple(each for each in job.request.after if each != name))
