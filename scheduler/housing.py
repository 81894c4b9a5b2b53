"""Where shards live, decided: what becomes of them when a process goes, and whose backup counts (`homes` has the rule).

A part of the machine. A promotion has two steps: from the moment a process is lost its shard is on the way to the
backup (`promoting`), and it lives there once that says that it serves; until then the former home's log is the shard.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TypeAlias

from .actions import Action, Await, Fence, Ignored, Pair, Promote, Rehome, Stop, Unpair
from .events import BackupLost, BackupReady, NotPromoted, Returned
from .homes import Backup, Home, copy_name, other_process
from .ids import JobId, MemberId, Name, ShardId, as_member, shard_id
from .membership import Alive, Fate, Gone
from .rules import Rules
from .state import Draining, Forming, Job, Running, Unknown

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

    def moves(self, job: JobId, because: str) -> list[Action]:
        """What is under way between homes, to be ordered again by who has taken another's place."""
        found = self.jobs[job]
        promoting = [
            Promote(job, shard, home.host, home.incarnation, home.log, because)
            for shard, home in found.promoting.items()
        ]
        return [*promoting, *(order for shard in found.homes for order in self._pair(found, shard))]

    # -- coming back -----------------------------------------------------------------------------------

    def _readmit(self, job: Job, name: Name, peer: str, now: float) -> Actions:
        """A shard's process has been started again. It reads its logs before it serves what lives there."""
        here = shard_id(name.number)
        if isinstance(former := job.members.records.get(here), Alive):
            because = f"{here} joined again as incarnation {former.incarnation + 1}"
            yield Fence(job.id, here, former.incarnation, because)
            self._close(job, here, Fate.LOST, because, EXIT_LOST)
            yield from self._promote_from(job, here, because, now)
        yield from self._admit(job, name, peer)
        for shard, home in self.served_by(job.id, here):
            job.homes[shard] = replace(home, incarnation=home.incarnation + 1)
            until = job.away[shard] = now + self.rules.return_s
            yield Await(job.id, shard, until, f"{here} was started again, and reads what it had")
        for shard, home in job.homes.items():
            if home.host != here:
                yield from self._pair(job, shard)

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
        del job.away[shard]
        yield Rehome(job.id, shard, home.incarnation, f"{shard} is back")
        yield from self._pair(job, shard)

    # -- going, and living elsewhere -------------------------------------------------------------------

    def _pair(self, job: Job, shard: ShardId) -> Actions:
        """Where a shard serves and its other process is here, its backup is to be there."""
        if not job.replicas or shard in job.away:
            return
        host = other_process(shard, job.homes[shard].host, job.shards)
        if (record := job.members.alive("shard").get(host)) is not None:
            because = f"{host} keeps the backup of {shard}"
            yield Pair(job.id, shard, host, record.incarnation, because)

    def _unhouse(self, job: Job, host: ShardId, because: str, now: float, alone: str = ALONE) -> Actions:
        """A shard's process is gone: what lived there is promoted, or waited for."""
        yield from self._promote_from(job, host, because, now)
        for shard, home in job.homes.items():
            if home.host == host and shard not in job.promoting:
                until = job.away.setdefault(shard, now + self.rules.return_s)
                yield Await(job.id, shard, until, f"{because}{alone}")

    def _promote_from(self, job: Job, host: ShardId, because: str, now: float) -> Actions:
        for shard in [shard for shard, backup in job.backups.items() if backup.host == host]:
            gone = job.backups.pop(shard)
            yield Unpair(job.id, shard, host, gone.host_incarnation, because)
        for shard, home in list(job.homes.items()):
            if home.host == host and (backup := job.backups.pop(shard, None)) is not None:
                log = copy_name(shard, home.incarnation, backup.copy)
                new = job.promoting[shard] = Home(backup.host, home.incarnation + 1, log)
                job.away[shard] = now + self.rules.return_s
                told = f"{because}; its backup in {new.host} serves"
                yield Promote(job.id, shard, new.host, new.incarnation, log, told)
        for shard in [shard for shard, home in job.promoting.items() if home.host == host]:
            yield from self._fall_back(job, shard, f"{because}; the backup of {shard} was there", now)

    def _not_promoted(self, job: Job, event: NotPromoted, now: float) -> Actions:
        home = job.promoting.get(event.shard)
        if home is not None and home.incarnation == event.home:
            yield from self._fall_back(job, event.shard, event.because, now)

    def _fall_back(self, job: Job, shard: ShardId, because: str, now: float) -> Actions:
        """A promotion did not come about, and nobody was served there: the former home's log has everything."""
        promoted = job.promoting.pop(shard)
        # What is still said from there must not count for the former home's next life.
        home = job.homes[shard] = replace(job.homes[shard], incarnation=promoted.incarnation)
        yield Await(job.id, shard, job.away[shard], f"{because}{ALONE}")
        record = job.members.records[home.host]
        if isinstance(record, Alive):  # it was started again, and told that it need not read its log
            yield Fence(job.id, home.host, record.incarnation, because)
            self._close(job, home.host, Fate.LOST, because, EXIT_LOST)
            yield from self._unhouse(job, home.host, because, now)

    def _back_up(self, job: Job, event: BackupReady, now: float) -> Actions:
        shard = ShardId(event.shard)
        home, record = job.homes.get(shard), job.members.alive("shard").get(ShardId(event.host))
        if (
            home is None
            or (home.host, home.incarnation) != (event.member, event.home)
            or shard in job.away
            or not job.replicas
        ):
            yield Ignored(job.id, f"{event.member} is not where {shard} lives")
        elif event.copy <= job.given_up.get(shard, 0):
            yield Ignored(job.id, f"copy {event.copy} of {shard} was given up before")
        elif (
            record is None
            or record.incarnation != event.host_incarnation
            or event.host != other_process(shard, home.host, job.shards)
        ):
            yield Ignored(job.id, f"the process that keeps copy {event.copy} of {shard} is gone")
        else:
            job.backups[shard] = Backup(ShardId(event.host), event.host_incarnation, event.copy)

    def _expose(self, job: Job, event: BackupLost, now: float) -> Actions:
        shard = ShardId(event.shard)
        home = job.homes.get(shard)
        if home is None or (home.host, home.incarnation) != (event.member, event.home):
            yield Ignored(job.id, f"{event.member} is not where {shard} lives")
            return
        job.given_up[shard] = max(event.copy, job.given_up.get(shard, 0))
        if (backup := job.backups.get(shard)) is not None and backup.copy <= event.copy:
            del job.backups[shard]
