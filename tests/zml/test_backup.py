"""A copy piece by piece: in any order, cut anywhere, and broken for good where it cannot be followed."""

import asyncio
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.simulation import simulate
from zml.messages import Assign, Copy, Message, Ok, Roster
from zml.messages import Muster as Seats
from zml.scheduler.ids import JobId
from zml.shard import mirror
from zml.shard.backup import Backup
from zml.shard.base import state_of
from zml.shard.mirror import PIECE_BYTES, pieces
from zml.shard.pushlog import LENGTH
from zml.shard.shard import Shard
from zml.transport import Refusal


async def nothing(core: Shard, message: Assign, payload: bytes | memoryview) -> None:
    pass


def copy(number: int, kind: str, head: bytes = b"", *, more: bool = False, attempt: int = 1) -> Copy:
    return Copy(
        job="job",
        shard="p0",
        home=1,
        copy=attempt,
        number=number,
        kind=kind,  # type: ignore[arg-type]
        head=head,
        more=more,
    )


def a_copy(messages: list[tuple[Message, bytes]]) -> list[tuple[Copy, memoryview]]:
    """The pieces of an empty shard that then takes these messages."""
    account = msgspec.msgpack.encode(state_of(Shard(JobId("job"), "p0")).account)
    found = [(copy(0, "account"), memoryview(account)), (copy(1, "end"), memoryview(b""))]
    for message, payload in messages:
        found.append((copy(len(found), "message", msgspec.msgpack.encode(message)), memoryview(payload)))
    return found


def rosters(count: int) -> list[tuple[Message, bytes]]:
    return [(Roster("job", number), msgspec.msgpack.encode(Seats([]))) for number in range(1, count + 1)]


def backup(folder: Path | None = None) -> Backup:
    return Backup(copy(0, "account"), lambda name: folder / name if folder is not None else None, nothing)


async def give(one: Backup, message: Copy, payload: memoryview) -> Message:
    answer: Any = one.take(message, payload)
    return answer if isinstance(answer, Message) else await answer


@pytest.mark.parametrize("seed", range(20))
def test_pieces_in_any_order_make_the_same_shard_and_none_is_answered_before_those_in_front(
    seed: int,
) -> None:
    print(f"seed {seed}")

    async def main() -> None:
        dice, one = random.Random(seed), backup()
        whole = a_copy(rosters(9))
        shuffled = [*whole, *dice.sample(whole, 3)]
        dice.shuffle(shuffled)
        came: set[int] = set()
        answers: dict[int, asyncio.Future[Message]] = {}
        for message, payload in shuffled:
            if message.number in answers and not answers[message.number].done():
                continue  # the transport hands a message that was doubled over once
            came.add(message.number)
            answers[message.number] = asyncio.ensure_future(give(one, message, payload))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            without_gap = next(number for number in range(len(whole) + 1) if number not in came)
            assert {number for number, answer in answers.items() if answer.done()} == set(range(without_gap))
        core = await one.serve()
        assert core.generation == 9

    simulate(main())


@given(head=st.binary(max_size=5000), size=st.sampled_from([0, 1, 100, 70_000]), cut=st.integers(1, 40_000))
def test_a_message_is_the_same_wherever_it_is_cut(head: bytes, size: int, cut: int) -> None:
    payload = random.Random(size).randbytes(size)
    before, mirror.PIECE_BYTES = mirror.PIECE_BYTES, cut
    try:
        found = list(pieces(head, payload))
    finally:
        mirror.PIECE_BYTES = before
    assert [more for _, _, more in found] == [True] * (len(found) - 1) + [False]
    assert all(len(part) <= cut for _, part, _ in found)
    assert all(len(begins) <= mirror.HEAD_BYTES for begins, _, _ in found)
    whole = b"".join(part for _, part, _ in found)
    if len(head) > mirror.HEAD_BYTES:
        assert whole == LENGTH.pack(len(head)) + head + payload and found[0][0] == b""
    else:
        assert whole == payload and found[0][0] == head


def test_a_payload_of_usual_size_is_not_copied() -> None:
    payload = bytearray(PIECE_BYTES)
    ((_, part, _),) = pieces(b"head", payload)
    payload[7] = 9
    assert part[7] == 9


def test_a_copy_in_parts_and_with_a_long_head_is_put_together() -> None:
    async def main() -> None:
        one = backup()
        sent = a_copy([])
        roster, payload = rosters(1)[0]
        record = msgspec.msgpack.encode(roster)
        whole = LENGTH.pack(len(record)) + record + payload
        sent += [
            (copy(2, "message", more=True), memoryview(whole[:3])),
            (copy(3, "message", more=True), memoryview(whole[3:9])),
            (copy(4, "message"), memoryview(whole[9:])),
        ]
        for message, part in sent:
            assert await give(one, message, part) == Ok()
        assert (await one.serve()).generation == 1

    simulate(main())


@pytest.mark.parametrize("bad", [b"", b"\xff", msgspec.msgpack.encode(Ok())])
def test_what_cannot_be_followed_breaks_a_copy_for_good(bad: bytes) -> None:
    async def main() -> None:
        one = backup()
        for message, part in a_copy(rosters(1)):
            await give(one, message, part)
        await give(one, copy(3, "message", bad), memoryview(b""))
        while not one.broken:
            await asyncio.sleep(0.01)
        with pytest.raises(Refusal):
            one.take(copy(4, "message"), memoryview(b""))
        with pytest.raises(Refusal):
            await one.serve()

    simulate(main())


def test_a_copy_that_is_not_complete_does_not_serve_and_takes_nothing_after_it_was_asked_to() -> None:
    async def main() -> None:
        one = backup()
        first, second = a_copy([])
        await give(one, *first)
        with pytest.raises(Refusal, match="not complete"):
            await one.serve()
        with pytest.raises(Refusal, match="takes nothing more"):
            one.take(*second)

    simulate(main())


def test_a_piece_that_is_far_ahead_is_refused() -> None:
    async def main() -> None:
        one = backup()
        ahead = [asyncio.ensure_future(give(one, copy(n, "message"), memoryview(b""))) for n in range(1, 513)]
        await asyncio.sleep(0)
        with pytest.raises(Refusal, match="0 was to follow"):
            one.take(copy(513, "message"), memoryview(b""))
        one.close()
        await asyncio.gather(*ahead, return_exceptions=True)

    simulate(main())


def test_a_copy_that_is_given_up_leaves_no_folder(tmp_path: Path) -> None:
    async def main() -> None:
        one = backup(tmp_path)
        for message, part in a_copy(rosters(2)):
            await give(one, message, part)
        while not one.whole:
            await asyncio.sleep(0.01)
        assert [path.name for path in tmp_path.iterdir()] == ["p0-1-1"]
        one.drop()
        assert list(tmp_path.iterdir()) == []

    simulate(main())
