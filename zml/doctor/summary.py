"""How the examination of a cluster is told.

What is well is told in few words, however many machines there are; what is not, one by one. `everything` tells all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from .cluster import Answers, Measured, in_order
from .findings import Check, worst
from .telling import Paint, count, entry, plain, wrapped
from .verdicts import rate, seconds

FEW = 4  # that are listed, where they have found different things


def cluster_lines(
    answers: Answers,
    checks: Sequence[Check],
    where: str,
    width: int,
    paint: Paint = plain,
    *,
    everything: bool = False,
) -> Iterator[str]:
    yield headline(answers, where)
    nodes = answers.by_node()
    for node, members in sorted(nodes.items()):
        yield from wrapped(f"{node}: {', '.join(sorted(members, key=in_order))}", width)
    yield ""
    shown = list(checks) if everything else folded(checks, answers)
    for check in shown:
        alone = len(nodes) == 1 and check.where in nodes  # it goes without saying
        yield from entry(msgspec.structs.replace(check, where="") if alone else check, width, paint)
    yield ""
    yield count(checks)


def headline(answers: Answers, where: str) -> str:
    machines = len({process.node for process in answers.processes.values()})
    return f"{answers.job} at {where}, on {'1 machine' if machines == 1 else f'{machines} machines'}"


def folded(checks: Sequence[Check], answers: Answers) -> list[Check]:
    """What passes is one check for each name, in its place."""
    found: list[Check] = []
    done: set[str] = set()
    for check in checks:
        if check.verdict != "pass":
            found.append(check)
        elif check.name not in done:
            done.add(check.name)
            same = [each for each in checks if each.name == check.name and each.verdict == "pass"]
            found.append(_folded_links(same, answers) if check.name == "link" else _folded(same))
    return found


def _folded(same: Sequence[Check]) -> Check:
    first = same[0]
    texts = list(dict.fromkeys(each.found for each in same))
    if len(texts) == 1:
        where = first.where if len(same) == 1 else ""
        return Check(first.name, "pass", texts[0], "", where)
    if len(same) <= FEW:
        told = "; ".join(f"{each.where}: {each.found}" for each in same)
        return Check(first.name, "pass", told)
    told = f"{len(same)} are well, {first.where} for example: {first.found}"
    return Check(first.name, "pass", told)


def _folded_links(same: Sequence[Check], answers: Answers) -> Check:
    """The slowest says most."""
    if len(same) == 1:
        return same[0]
    well = {each.where for each in same}
    links = [each for each in answers.links if _name(each) in well]
    late = max(links, key=lambda each: each.link.rtt_s)
    told = f"{len(links)} links answer in {seconds(late.link.rtt_s)} ({_name(late)}) or less"
    rated = [each for each in links if each.link.down_bps > 0]
    if rated:
        slow = min(rated, key=lambda each: min(each.link.up_bps, each.link.down_bps))
        up, down = rate(slow.link.up_bps), rate(slow.link.down_bps)
        least = "" if len(rated) == 1 else " or more"
        by = " by shared memory" if slow.link.by == "shared memory" else ""
        told += f"; {_name(slow)} moves {up} there, {down} back{least}{by}"
    return Check("link", "pass", told)


def _name(each: Measured) -> str:
    return f"{each.source} -> {each.to}"


def as_json(answers: Answers, checks: Sequence[Check]) -> dict[str, Any]:
    """For machines, and for bug reports: all of it."""
    return {
        "job": answers.job,
        "verdict": worst(list(checks)),
        "checks": msgspec.to_builtins(checks),
        "members": {
            member: {
                **{k: v for k, v in msgspec.to_builtins(process).items() if k != "checks"},
                "role": answers.role(member),
            }
            for member, process in answers.processes.items()
        },
        "links": [
            {"from": each.source, "to": each.to, **msgspec.to_builtins(each.link)} for each in answers.links
        ],
        "silent": answers.silent,
    }
