"""Time and numbers as pictures of one line: bars of letters, and sparklines. Pure: numbers in, text out.

Rule: colour never says what a letter or a word does not, so that a picture in a file, without colour or in ASCII tells
the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.text import Text

from ..figures import PHASES

STYLES = {
    "data": "black on magenta",
    "compute": "black on green",
    "encode": "black on cyan",
    "wait": "black on yellow",
    "apply": "white on blue",
}
PLAIN = "black on white"
BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.:-=+*#"  # by how much ink they have
REPLACED = str.maketrans({"·": "-", "…": "~", "━": "=", "─": "-", "│": "|", "▲": "^", "▼": "v", "»": ">"})


def cells(parts: Sequence[float], whole: float, width: int) -> list[int]:
    """How many of `width` characters each part gets where `whole` fills them: rounded at the parts' ends, so that what
    is drawn never drifts from the sum."""
    ends, total = [], 0.0
    for part in parts:
        total += max(0.0, part)
        ends.append(min(width, round(width * total / whole)) if whole > 0 else 0)
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def phases(spent: Mapping[str, float], whole: float, width: int, names: Sequence[str] = PHASES) -> Text:
    """The parts of a step in this order, each as its first letter; `whole` seconds are `width` characters."""
    counts = cells([spent.get(name, 0.0) for name in names], whole, width)
    drawn = [
        (name[0] * count, STYLES.get(name, PLAIN)) for name, count in zip(names, counts, strict=True) if count
    ]
    return Text.assemble(*drawn)


def legend(names: Sequence[str] = PHASES) -> Text:
    """d data  c compute ..., in the colours of the bars."""
    text = Text()
    for name in names:
        text.append(f" {name[0]} ", STYLES.get(name, PLAIN)).append(f" {name}  ")
    text.rstrip()
    return text


def spark(values: Sequence[float | None], width: int, *, unicode: bool) -> str:
    """The course of a number, the newest at the right: means of as many neighbours as need be; a gap where nothing
    finite is known."""
    blocks = BLOCKS if unicode else ASCII_BLOCKS
    means = condensed(values, width)
    known = [mean for mean in means if mean is not None]
    if not known:
        return ""
    low, span = min(known), max(known) - min(known)
    drawn = ""
    for mean in means:
        if mean is None:
            drawn += " "
        else:
            drawn += blocks[round((len(blocks) - 1) * ((mean - low) / span if span > 0 else 0.5))]
    return drawn


def condensed(values: Sequence[float | None], count: int) -> list[float | None]:
    """At most `count` values: each the mean of the finite ones among its neighbours, None where there is none."""
    if len(values) <= count or count < 1:
        return list(values)[: max(0, count)]
    means: list[float | None] = []
    for index in range(count):
        part = values[index * len(values) // count : (index + 1) * len(values) // count]
        known = [value for value in part if value is not None]
        means.append(sum(known) / len(known) if known else None)
    return means


def ascii_only(text: Text) -> Text:
    """The same for a terminal that shows nothing else; as long, and in the same styles."""
    plain = text.plain.translate(REPLACED)
    if not plain.isascii():
        plain = "".join(c if c.isascii() else "?" for c in plain)
    return Text(plain, style=text.style, spans=list(text.spans), no_wrap=True, end=text.end)
