"""What `--compress` says: `none`, `bf16`, `topk:1%`, `topk:0.1%:2bit`, `auto`. This module imports no torch.

    topk:DENSITY[:VALUES][:INDICES]     in this order or the other; DENSITY as 1% or 0.01

DENSITY is the part of the elements that leaves with a step, the rest waits in the residual. VALUES is how a kept
element is written, INDICES how its position is: one of `INDICES`, or nothing, and then the smallest is found.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

KINDS = ("none", "bf16", "topk", "auto")
VALUES = ("fp32", "fp16", "bf16", "int8", "int4", "2bit")
INDICES = ("gap8", "off12", "rice", "bitmap", "dense")
DEFAULT_VALUES = "int4"


@dataclass(frozen=True, slots=True)
class Compression:
    """`density` is in (0, 1]; it and `values` have a meaning for `topk` only. `indices`: "" for what is smallest."""

    kind: str
    density: float = 1.0
    values: str = DEFAULT_VALUES
    indices: str = ""

    @property
    def sparse(self) -> bool:
        """Some elements leave, the others wait."""
        return self.kind in ("topk", "auto")

    @property
    def coded(self) -> "Compression":
        """What frames are coded with: `auto` decides on the density alone."""
        return Compression("topk", 0.01) if self.kind == "auto" else self

    def __str__(self) -> str:
        if self.kind != "topk":
            return self.kind
        parts = ["topk", f"{100 * self.density:.10g}%", self.values]
        return ":".join([*parts, self.indices] if self.indices else parts)


def parse(text: str) -> Compression:
    """The meaning of a `--compress` text. Raises ValueError with a sentence that says what is wrong, and what is
    nearest."""
    kind, *rest = text.strip().lower().split(":")
    if kind not in KINDS:
        raise ValueError(f"{text!r} is no compression: {_nearest(kind, KINDS)}")
    if kind != "topk":
        if rest:
            raise ValueError(f"{text!r}: {kind} takes no {':'.join(rest)!r}; write {kind!r}")
        return Compression(kind)
    if not rest or not rest[0]:
        raise ValueError(f"{text!r} does not say which part of the elements to send; write 'topk:1%'")
    values = indices = ""
    for word in rest[1:]:
        if word in VALUES and not values:
            values = word
        elif word in INDICES and not indices:
            indices = word
        elif word in VALUES or word in INDICES:
            before = values if word in VALUES else indices
            raise ValueError(
                f"{text!r} says {before!r} and {word!r}, which is the same question answered twice"
            )
        else:
            raise ValueError(f"{text!r}: {word!r} is no coding: {_nearest(word, (*VALUES, *INDICES))}")
    return Compression("topk", _density(text, rest[0]), values or DEFAULT_VALUES, indices)


def _density(text: str, word: str) -> float:
    try:
        number = float(word.removesuffix("%"))
    except ValueError:
        raise ValueError(f"{text!r}: {word!r} is no density; write 'topk:1%' or 'topk:0.01'") from None
    if number == 1 and not word.endswith("%"):
        raise ValueError(
            f"{text!r} could be read in two ways; write 'topk:1%' or, for all elements, 'topk:100%'"
        )
    density = number / 100 if word.endswith("%") else number
    if 1e-6 <= density <= 1:
        return density
    if 1 < density <= 100 and not word.endswith("%"):
        raise ValueError(f"{text!r}: a density of {word} is more than everything; write 'topk:{word}%'")
    raise ValueError(
        f"{text!r}: a density is above 0 (0.0001%) and at most 100%, not {word}; write 'topk:1%'"
    )


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else f"it is one of {', '.join(known)}"
