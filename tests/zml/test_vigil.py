"""Time is looked at when it is due, however often others ask for it, and silence is found after reading alone."""

import asyncio

import pytest

from tests.simulation import simulate
from zml.coordinator.vigil import BEHIND_S, Vigil


def test_a_look_that_is_due_is_put_off_by_nobody() -> None:
    async def main() -> list[float]:
        loop, looked = asyncio.get_running_loop(), []
        vigil = Vigil(lambda: 0.0, lambda unread_s: looked.append(loop.time()))
        begin = loop.time()
        vigil.look_at(begin + 1.0)
        while loop.time() < begin + 3.0:
            vigil.look_at(loop.time() + 0.5)
            await asyncio.sleep(0.2)
        vigil.end()
        vigil.look_at(begin)
        await asyncio.sleep(2.0)
        assert not vigil.is_set
        return [round(at - begin, 3) for at in looked]

    assert simulate(main())[:3] == [0.5, 1.1, 1.7]


def test_who_is_behind_looks_again_a_little_later() -> None:
    async def main() -> list[tuple[float, float]]:
        loop, looked, unread = asyncio.get_running_loop(), [], [3.0, 2.0, 0.0, 0.0]
        begin = loop.time()

        def look(unread_s: float) -> None:
            looked.append((round(loop.time() - begin, 3), unread_s))
            if unread:
                vigil.look_at(begin)

        vigil = Vigil(lambda: unread.pop(0), look)
        vigil.look_at(begin)
        await asyncio.sleep(5.0)
        return looked

    (first, a), (second, b), (third, c), (fourth, d) = simulate(main())
    assert (a, b, c, d) == (3.0, 2.0, 0.0, 0.0)
    assert [second - first, third - second] == pytest.approx([BEHIND_S, BEHIND_S]) and fourth - third < 0.01
