"""Where shards live, decided: what becomes of them when a process goes or comes, and whose backup counts (`homes` has
the rule).

A part of the machine. A promotion has two steps: from the moment a process is lost, or the copy of a shard that is to
move is in step, the shard is on the way to it (`promoting`), and it lives there once that says that it serves; until
then the former home's log is the shard. Where nobody else has it and its process does not come back in time, another is
asked to read that very log, which it can where both see one disk.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TypeAlias

from .actions import Action, Adopt, Await, Fence, Grow, Ignored, Pair, Promote, Rehome, Stop, Unpair
from .events import BackupLost, BackupReady, NotPromoted, Returned, Vacating
from .homes import Backup, Copying, Home, around, copy_name
from .ids import JobId, MemberId, Name, ShardId, as_member, shard_id
from .membership import Alive, Fate, Gone, how_it_ended
from .rules import Rules
from .state import Cause, Draining, Forming, Job, Running, Unknown

ALONE = "; nobody else has its chunks"
EXIT_LOST = 4  # of the job's command, where a process that is needed was lost

Actions: TypeAlias = Iterator[Action]


class Housing:
    """What the machine does with homes and backups."""

    rules: Rules

    jobs: dict[JobId, Job]

    def _admit(self, job: Job, name: Name, peer: str) -> Actions:
        raise NotImplementedError

    def _close(
        self,
        job: Job,
        member: MemberId,
        fate: Fate,
        because: str,
        exit_code: int = 0,
        back_by: float | None = None,
    ) -> Gone:
        raise NotImplementedError

    def _finish(self, job: Job, cause: Cause, exit_code: int, because: str, now: float) -> Actions:
        raise NotImplementedError

    # -- looking -------------------------------------------------------------------------------------

    def home(self, job: JobId, shard: str) -> Home | None:
        """Where this shard lives, or is to be waited for; None before the job runs."""
        found = self.jobs.get(job)
        return found.homes.get(ShardId(shard)) if found is not None else None

    def is_to_live_at(self, job: JobId, shard: str, host: str) -> bool:
        """Does this shard live in this process, or is it promoted there?"""
        found = self.jobs.get(job)
        home = found and (found.promoting.get(ShardId(shard)) or found.homes.get(ShardId(shard)))
        return home.host == host if home else shard == host

    def serves_at(self, job: JobId, shard: str, host: str, incarnation: int) -> bool:
        """Is this home of the shard its home, and is it not on the way to another?"""
        found = self.jobs.get(job)
        if found is None or shard in found.promoting:
            return False
        home = found.homes.get(ShardId(shard))
        return home is not None and (home.host, home.incarnation) == (host, incarnation)

    def is_leaving(self, job: JobId, host: str) -> bool:
        """Was this process taken from the ring, because it is to leave?"""
        found = self.jobs.get(job)
        return found is not None and ShardId(host) in found.off

    def is_last(self, job: JobId, host: str) -> bool:
        """Is there no other process that could take what this one has?"""
        found = self.jobs.get(job)
        if found is None:
            return True
        others = (other for other in found.members.alive("shard") if other != host)
        return all(other in found.off for other in others)

    def needed_in(self, job: JobId, host: str) -> list[ShardId]:
        """The shards that live in this process, or are on the way to it."""
        found = self.jobs.get(job)
        if found is None:
            return []
        return [
            shard
            for shard, home in found.homes.items()
            if host == home.host or (shard in found.promoting and found.promoting[shard].host == host)
        ]

    def served_by(self, job: JobId, host: str) -> list[tuple[ShardId, Home]]:
        """The shards that live in this process, or will when it has read their logs."""
        found = self.jobs.get(job)
        if found is None:
            return []
        if isinstance(found.phase, Forming):
            record = found.members.alive("shard")[ShardId(host)]
            return [(ShardId(host), Home(ShardId(host), record.incarnation, host))]
        homes = found.homes.items()
        return [(shard, home) for shard, home in homes if home.host == host and shard not in found.promoting]

    def moves(self, job: JobId, because: str) -> list[Promote | Adopt | Pair]:
        """What is under way between homes, to be ordered again by who has taken another's place."""
        found = self.jobs[job]
        here = found.members.alive("shard")
        orders: list[Promote | Adopt | Pair] = []
        for shard, home in found.promoting.items():
            kind = Adopt if home.log == found.homes[shard].log else Promote
            orders.append(kind(job, shard, home.host, home.incarnation, home.log, because))
        for shard, copying in found.copying.items():
            record = here.get(copying.host)
            if shard not in found.away and record and record.incarnation == copying.host_incarnation:
                orders.append(self._order(found, shard, copying))
        return orders

    # -- coming back -----------------------------------------------------------------------------------

    def _readmit(self, job: Job, name: Name, peer: str, now: float) -> Actions:
        """A shard's process has been started again. It reads its logs before it serves what lives there."""
        here = shard_id(name.number)
        job.off.discard(here)
        for refused in job.refused.values():
            refused.discard(here)
        if isinstance(former := job.members.records.get(here), Alive):
            because = f"{here} joined again as incarnation {former.incarnation + 1}"
            yield Fence(job.id, here, former.incarnation, because)
            self._close(job, here, Fate.LOST, because, EXIT_LOST)
            yield from self._promote_from(job, here, because, now)
            if not job.under_way:
                return  # whoever asks again is told that it is over
        yield from self._admit(job, name, peer)
        for shard, home in self.served_by(job.id, here):
            job.homes[shard] = replace(home, incarnation=home.incarnation + 1)
            until = job.away[shard] = now + self.rules.return_s
            yield Await(job.id, shard, until, f"{here} was started again, and reads what it had")
        yield from self._spread(job, now)

    def _grow(self, job: Job, name: Name, peer: str, now: float) -> Actions:
        """One more shard. Nothing lives there yet, and it has its place on the ring."""
        here = shard_id(name.number)
        job.shards += 1
        yield from self._admit(job, name, peer)
        record = job.members.alive("shard")[here]
        job.homes[here] = Home(here, record.incarnation, here)
        yield Grow(job.id, here, record.incarnation, f"{here} joined, and is to get its share")
        yield from self._spread(job, now)

    def _resume(self, job: Job, event: Returned, now: float) -> Actions:
        """The shard has its chunks, or shows that it has not."""
        assert isinstance(job.phase, Running | Draining)
        member, parameters = as_member(event.member), job.phase.parameters
        shard = ShardId(event.shard or event.member)
        home = job.promoting.get(shard) or job.homes.get(shard)
        if shard not in job.away or home is None or home.host != event.member:
            if home is None or home.host != event.member:
                yield Ignored(job.id, f"{event.member} is not where {shard} is to live")
            return
        needs = "" if isinstance(parameters, Unknown) else parameters.layout.digest
        if needs and event.holds != needs:
            held = "other chunks" if event.holds else "nothing"
            because = (
                f"{shard} was started again with {held} in its log, and cannot take the place of the former"
            )
            self._close(job, member, Fate.FAILED, because, EXIT_LOST)
            yield Stop(job.id, member, because)
            yield from self._unhouse(job, ShardId(member), because, now, alone="")
            return
        if job.promoting.pop(shard, None) is not None:
            job.homes[shard] = home
        job.given_up.pop(shard, None)
        job.refused.pop(shard, None)
        del job.away[shard]
        yield Rehome(job.id, shard, home.incarnation, f"{shard} is back")
        job.copying.pop(shard, None)  # it has to be told, whatever its former self was told
        yield from self._pair(job, shard, now)

    # -- copies, where they belong -----------------------------------------------------------------------

    def _spread(self, job: Job, now: float) -> Actions:
        """The ring has changed, or who is there: every shard is to have its copy where it belongs."""
        for shard in job.homes:
            yield from self._pair(job, shard, now)

    def _pair(self, job: Job, shard: ShardId, now: float) -> Actions:
        """Where a shard serves and the place of its copy is here, the copy is to be there. A shard that is misplaced
        moves to it."""
        if shard in job.away:
            return
        if (host := job.place_of_copy(shard)) is None:
            return
        incarnation = job.members.alive("shard")[host].incarnation
        former, backup = job.copying.get(shard), job.backups.get(shard)
        if job.is_misplaced(shard) and backup is not None and backup.host == host:
            yield from self._hand_over(job, shard, f"{shard} belongs in {host}", now)
        elif former is None or (former.host, former.host_incarnation) != (host, incarnation):
            copying = job.copying[shard] = Copying(job.next_copying(shard), host, incarnation)
            yield self._order(job, shard, copying)

    def _order(self, job: Job, shard: ShardId, copying: Copying) -> Pair:
        host = copying.host
        because = f"{host} keeps the backup of {shard}"
        if job.is_misplaced(shard):
            because = f"{shard} is to move to {host}"
        return Pair(job.id, shard, host, copying.host_incarnation, copying.number, because)

    def _vacate(self, job: Job, event: Vacating, now: float) -> Actions:
        """A process is to leave: what it has goes where it belongs without it."""
        host = ShardId(event.member)
        if host in job.off:
            yield Ignored(job.id, f"{host} has said before that it is to leave")
            return
        if self.is_last(job.id, host):
            yield Ignored(job.id, f"there is no other process for what {host} has")
            return
        job.off.add(host)
        yield from self._spread(job, now)

    # -- going, and living elsewhere -------------------------------------------------------------------

    def _unhouse(self, job: Job, host: ShardId, because: str, now: float, alone: str = ALONE) -> Actions:
        """A shard's process is gone: what lived there is promoted, or waited for."""
        yield from self._promote_from(job, host, because, now)
        if not job.under_way:
            return
        for shard, home in job.homes.items():
            if home.host == host and shard not in job.promoting:
                until = job.away.setdefault(shard, now + self.rules.return_s)
                yield Await(job.id, shard, until, f"{because}{alone}")
        yield from self._spread(job, now)

    def _promote_from(self, job: Job, host: ShardId, because: str, now: float) -> Actions:
        for shard in [shard for shard, backup in job.backups.items() if backup.host == host]:
            del job.backups[shard]
        for shard in [shard for shard, copying in job.copying.items() if copying.host == host]:
            gone = job.copying.pop(shard)
            if shard not in job.away and job.homes[shard].host != host:
                number = job.next_copying(shard)
                yield Unpair(job.id, shard, host, gone.host_incarnation, number, because)
        for shard, home in list(job.homes.items()):
            if home.host == host and shard in job.backups:
                yield from self._hand_over(job, shard, because, now)
        for shard in [shard for shard, home in job.promoting.items() if home.host == host]:
            if not job.under_way:
                return  # it was over with the one before, for which there was nobody
            yield from self._fall_back(job, shard, f"{because}; the backup of {shard} was there", now)

    def _hand_over(self, job: Job, shard: ShardId, because: str, now: float) -> Actions:
        """The backup of a shard is in step, and is to serve in its place."""
        home, backup = job.homes[shard], job.backups.pop(shard)
        log = copy_name(shard, home.incarnation, backup.copy)
        new = job.promoting[shard] = Home(backup.host, home.incarnation + 1, log)
        job.away[shard] = now + self.rules.promote_s
        told = f"{because}; its backup in {new.host} serves"
        yield Promote(job.id, shard, new.host, new.incarnation, log, told)

    def _do_without(self, job: Job, now: float) -> Actions:
        """A shard that was to come back, or to be taken over, has had its time."""
        shard = next(shard for shard, until in job.away.items() if until <= now)
        if (home := job.promoting.get(shard)) is not None:
            because = f"{home.host} did not serve {shard} within {self.rules.promote_s:g} s"
            yield from self._not_promoted(job, NotPromoted(job.id, shard, home.incarnation, because), now)
            return
        host, within = job.homes[shard].host, f"within {self.rules.return_s:g} s"
        record = job.members.records[host]
        if not isinstance(record, Gone):
            because = f"{host} did not finish reading the log of {shard} {within}"
            yield from self._finish(job, Cause.SHARD_LOST, EXIT_LOST, because, now)
            return
        because = f"{how_it_ended(host, record)}; it did not come back {within}"
        job.off.add(host)
        lived = [each for each, home in job.homes.items() if home.host == host]
        for each in lived:
            if each not in job.promoting and job.under_way:
                yield from self._adopt(job, each, because, now, "nobody else has its chunks")
        if job.under_way:
            yield from self._spread(job, now)

    def _adopt(self, job: Job, shard: ShardId, because: str, now: float, or_else: str) -> Actions:
        """The former home's log has everything: whoever may see it is asked to read it, its own process first. When
        nobody can, the job is over."""
        home, here = job.homes[shard], job.members.alive("shard")
        refused = job.refused.get(shard, set())
        order = [home.host, *(process for process in around(shard, job.shards) if process not in job.off)]
        host = next((process for process in order if process in here and process not in refused), None)
        if host is None:
            yield from self._finish(job, Cause.SHARD_LOST, EXIT_LOST, f"{because}, and {or_else}", now)
            return
        new = job.promoting[shard] = Home(host, home.incarnation + 1, home.log)
        job.away[shard] = now + self.rules.promote_s
        yield Adopt(job.id, shard, host, new.incarnation, home.log, f"{because}; {host} is to read its log")

    def _not_promoted(self, job: Job, event: NotPromoted, now: float) -> Actions:
        home, former = job.promoting.get(event.shard), job.homes.get(event.shard)
        if home is None or former is None or home.incarnation != event.home:
            return
        if home.log != former.log:
            yield from self._fall_back(job, event.shard, event.because, now)
            return
        job.refused.setdefault(event.shard, set()).add(home.host)
        self._give_back(job, event.shard)
        record, because = job.members.records[former.host], event.because
        if isinstance(record, Gone):
            because = f"{how_it_ended(former.host, record)}; it did not come back in time; {because}"
        yield from self._adopt(job, event.shard, because, now, "nobody else can read the log")

    def _give_back(self, job: Job, shard: ShardId) -> None:
        """Whoever was to serve it does not. What is still said from there must not count for its next home."""
        promoted = job.promoting.pop(shard)
        job.homes[shard] = replace(job.homes[shard], incarnation=promoted.incarnation)

    def _fall_back(self, job: Job, shard: ShardId, because: str, now: float) -> Actions:
        """A promotion did not come about, and nobody was served there: the former home's log has everything. Its
        process, if it is here, has said nothing since, or was started again and told that it need not read."""
        self._give_back(job, shard)
        if job.homes[shard].host in job.members.alive("shard"):
            yield from self._adopt(job, shard, because, now, "nobody else has its chunks")
        else:
            until = job.away[shard] = now + self.rules.return_s
            yield Await(job.id, shard, until, f"{because}{ALONE}")

    def _back_up(self, job: Job, event: BackupReady, now: float) -> Actions:
        shard = ShardId(event.shard)
        home, record = job.homes.get(shard), job.members.alive("shard").get(ShardId(event.host))
        if home is None or (home.host, home.incarnation) != (event.member, event.home) or shard in job.away:
            yield Ignored(job.id, f"{event.member} is not where {shard} lives")
            return
        if event.copy <= job.given_up.get(shard, 0):
            yield Ignored(job.id, f"copy {event.copy} of {shard} was given up before")
        elif record is None or record.incarnation != event.host_incarnation:
            yield Ignored(job.id, f"the process that keeps copy {event.copy} of {shard} is gone")
        elif event.host != job.place_of_copy(shard):
            yield Ignored(job.id, f"{event.host} is not where a copy of {shard} is to be")
        else:
            job.backups[shard] = Backup(ShardId(event.host), event.host_incarnation, event.copy)
            if job.is_misplaced(shard):
                yield from self._hand_over(job, shard, f"{shard} belongs in {event.host}", now)

    def _expose(self, job: Job, event: BackupLost, now: float) -> Actions:
        shard = ShardId(event.shard)
        if not self.serves_at(job.id, shard, event.member, event.home):
            yield Ignored(job.id, f"{event.member} is not where {shard} lives")
            return
        job.given_up[shard] = max(event.copy, job.given_up.get(shard, 0))
        if (backup := job.backups.get(shard)) is not None and backup.copy <= event.copy:
            del job.backups[shard]
