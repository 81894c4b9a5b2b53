"""What a lost worker leaves behind is settled once, whoever asks for it, and what a shard is to count is paid."""

import asyncio
from collections.abc import Iterable, Sequence

from tests.simulation import simulate
from zml.coordinator.rosters import Account, Rosters
from zml.messages import Finished, Roster, Settle, Stands
from zml.scheduler.ids import JobId, Seat, WorkerId

LOST, STAYS = Seat(WorkerId("w1"), 1, True), Seat(WorkerId("w0"), 1, True)


class Ledger:
    def __init__(self) -> None:
        self.settled: list[tuple[str, int]] = []

    def members(self, seats: Iterable[Seat]) -> None:
        pass

    def settle(self, worker: WorkerId, incarnation: int, clock: int, epoch: int, done: int) -> None:
        self.settled.append((worker, clock))


class Debts:
    def __init__(self) -> None:
        self.owed: list[tuple[str, Finished]] = []

    def owe(self, shard: str, step: Finished) -> None:
        self.owed.append((shard, step))

    def to(self, shard: str) -> Sequence[Finished]:
        return [step for name, step in self.owed if name == shard]

    def paid(self, shard: str, step: Finished) -> None:
        self.owed.remove((shard, step))


def test_a_worker_that_is_settled_twice_at_once_leaves_no_debt_behind() -> None:
    """The second time a shard is asked it has the next roster, and knows nothing of that worker any more: all others
    had answered before, and what they said was not to be counted by it once more."""

    async def main() -> tuple[Debts, Ledger]:
        knows = {"p0": True, "p1": True}
        is_back = asyncio.Event()
        asked_p1 = 0

        async def ask(shard: str, message: Settle) -> Account | None:
            nonlocal asked_p1
            if shard == "p1":
                asked_p1 += 1
                await asyncio.sleep(0.1 * asked_p1)  # the answers come one after the other
                await is_back.wait()
            return Account(Stands(5, 1, 3) if knows[shard] else Stands(-1), b"")

        async def bring(shard: str, message: Roster, payload: bytes) -> bool:
            knows[shard] = False
            return True

        debts, ledger = Debts(), Ledger()
        rosters = Rosters(JobId("job"), ledger, lambda: ["p0", "p1"], ask, bring, debts)
        rosters.announce(1, [STAYS, LOST])
        await asyncio.gather(*rosters.tasks())
        knows.update(p0=True, p1=True)
        is_back.set()
        rosters.announce(2, [STAYS])
        await asyncio.sleep(0.05)
        await rosters.settle_now("w1", 1)
        await asyncio.gather(*rosters.tasks())
        return debts, ledger

    debts, ledger = simulate(main())
    assert debts.owed == []
    assert ledger.settled == [("w1", 5)]


def test_a_shard_that_lacks_the_last_step_of_a_lost_worker_is_given_it() -> None:
    async def main() -> tuple[list[Finished], Debts]:
        brought: list[Finished] = []

        async def ask(shard: str, message: Settle) -> Account | None:
            return Account(Stands(5, 1, 3) if shard == "p0" else Stands(4, 1, 2), b"")

        async def bring(shard: str, message: Roster, payload: bytes) -> bool:
            brought.extend(debts.to(shard))
            return True

        debts = Debts()
        rosters = Rosters(JobId("job"), Ledger(), lambda: ["p0", "p1"], ask, bring, debts)
        rosters.announce(1, [STAYS, LOST])
        await asyncio.gather(*rosters.tasks())
        rosters.announce(2, [STAYS])
        await asyncio.sleep(1)
        return brought, debts

    brought, debts = simulate(main())
    assert [(step.worker, step.clock, step.done) for step in brought] == [("w1", 5, 3)]
    assert debts.owed == [], "and it is owed no more"
