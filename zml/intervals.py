"""Numbers as sorted [first, last] intervals, both ends in: a few pairs for thousands of batches."""

from collections.abc import Sequence


def intervals(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """No two of them touch. Numbers may come in any order, each once."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found
