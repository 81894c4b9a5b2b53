"""What the answers of a cluster add up to: one line for each thing, and what to do where it is not well.

A pure function of the answers. What a member or a machine has found of itself is taken over; what only shows when
several are compared is found here: versions, clocks, links.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from statistics import median

from .cluster import Answers, Measured
from .findings import COORDINATOR, Check, Link, Verdict

SKEW_S = 0.5  # logs and failures of several machines are put in order by their clocks
RTT_S = 0.1
LEAST_BPS = 5e6  # below it even compressed gradients take long
SHARE = 0.25  # of what the other links between machines do
ENOUGH = 3  # links, to say what is usual
TOLD = ("zml", "python", "torch")
REACH = "Look at its log; open the port in the firewall, and give all roles --keys of one cluster."


def judge(answers: Answers) -> list[Check]:
    """In the order in which they are told."""
    told = {check.name for process in answers.processes.values() for check in process.checks}
    return [
        *members(answers),
        *versions(answers),
        *(own for member, process in answers.processes.items() for own in _at(member, process.checks)),
        *(
            own
            for node, machine in sorted(answers.machines.items())
            for own in _at(node, machine.checks)
            if own.name not in told  # of that process itself, and every one has said it
        ),
        *skews(answers),
        *links(answers),
    ]


def _at(where: str, checks: list[Check]) -> Iterator[Check]:
    for check in checks:
        yield Check(check.name, check.verdict, check.found, check.fix, where)


def members(answers: Answers) -> Iterator[Check]:
    for each in answers.members:
        if each.state in ("lost", "failed"):
            fix = f"Its log says more: logs/{each.member}.jsonl in the run directory."
            yield Check("members", "warn", f"{each.state}: {each.because}", fix, each.member)
    for who, because in answers.silent.items():
        known = who in _names(answers)  # or it is a machine
        fix = f"`zml stack {who}` says where it is." if known else "`zml doctor` on that machine says more."
        yield Check("answers", "fail", because, fix, who)
    if not answers.silent:
        count = len(answers.processes)
        yield Check("answers", "pass", f"all {count} processes on {_machines(len(answers.machines))}")


def _names(answers: Answers) -> set[str]:
    return {COORDINATOR, *(each.member for each in answers.members)}


def _machines(count: int) -> str:
    return "1 machine" if count == 1 else f"{count} machines"


def versions(answers: Answers) -> Iterator[Check]:
    """zml itself must be the same everywhere, the others had better be."""
    packages = sorted({name for process in answers.processes.values() for name in process.versions})
    differ = False
    for name in packages:
        found = {who: process.versions.get(name, "none") for who, process in answers.processes.items()}
        counts = Counter(found.values())
        if len(counts) < 2:
            continue
        differ = True
        usual = counts.most_common(1)[0][0]
        others = {who: text for who, text in found.items() if text != usual}
        told = ", ".join(f"{who} has {text}" for who, text in sorted(others.items())[:4])
        more = f" and {len(others) - 4} more differ" if len(others) > 4 else ""
        verdict: Verdict = "fail" if name == "zml" else "warn"
        why = "one reads what another has written" if name == "zml" else "two versions may behave in two ways"
        fix = f"Install {name} {usual} there, too: {why}."
        yield Check("versions", verdict, f"{name} is {usual}, but {told}{more}", fix)
    if not differ and answers.processes:
        same = next(iter(answers.processes.values())).versions
        told = ", ".join(f"{name} {same[name]}" for name in TOLD if name in same)
        yield Check("versions", "pass", f"{told} on all")


def skews(answers: Answers) -> Iterator[Check]:
    """Of each machine against the coordinator's, by its fastest link."""
    best: dict[str, Link] = {}
    for each in answers.links:
        if each.to == COORDINATOR and each.link.reached:
            node = answers.node(each.source)
            if node not in best or each.link.rtt_s < best[node].rtt_s:
                best[node] = each.link
    for node, link in sorted(best.items()):
        ahead = -link.skew_s
        way = "ahead of" if ahead > 0 else "behind"
        told = f"{seconds(abs(ahead))} {way} the coordinator's, give or take {seconds(link.rtt_s / 2)}"
        if abs(ahead) <= link.rtt_s / 2:
            told = f"that of the coordinator, give or take {seconds(link.rtt_s / 2)}"
        if abs(ahead) - link.rtt_s / 2 > SKEW_S:
            fix = "Start chrony or systemd-timesyncd there: logs are put in order by these clocks."
            yield Check("clock skew", "warn", told, fix, node)
        else:
            yield Check("clock skew", "pass", told, "", node)


def links(answers: Answers) -> Iterator[Check]:
    rates = [
        min(each.link.up_bps, each.link.down_bps)
        for each in answers.links
        if each.link.down_bps > 0 and _between(answers, each)
    ]
    usual = median(rates) if len(rates) >= ENOUGH else 0.0
    for each in answers.links:
        yield link(each, usual if _between(answers, each) else 0.0)
    mtus = {
        f"{each.source} -> {each.to}": each.link.mtu
        for each in answers.links
        if each.link.mtu and _between(answers, each)
    }
    if len(set(mtus.values())) > 1:
        least = min(mtus, key=mtus.__getitem__)
        told = f"{mtus[least]} on the way {least}, {max(mtus.values())} on others"
        fix = "Give all machines of the network the same MTU: `ip link set DEVICE mtu N`."
        yield Check("MTU", "warn", told, fix)
    if answers.unmeasured:
        first = " -> ".join(answers.unmeasured[0])
        told = f"there was no time for {len(answers.unmeasured)} of the links, {first} among them"
        yield Check("links", "warn", told, "Give more: --wait 60.")


def _between(answers: Answers, each: Measured) -> bool:
    return answers.node(each.source) != answers.node(each.to)


def link(each: Measured, usual_bps: float) -> Check:
    """One pair. `usual_bps`: what links like it do; 0 where that is not known."""
    found, where = each.link, f"{each.source} -> {each.to}"
    if not found.reached:
        return Check("link", "fail", found.trouble, REACH, where)
    told = told_link(found)
    if found.trouble:
        fix = "Make the MTU of both machines and of what is between them the same, or smaller: large packets are lost."
        return Check("link", "fail", f"{told}; {found.trouble}", fix, where)
    slowest = min(found.up_bps, found.down_bps)
    if slowest > 0 and slowest < usual_bps * SHARE:
        fix = "Look at the cable, the port and `ethtool` of this machine: others are faster."
        return Check("link", "warn", f"{told}; links between machines do {rate(usual_bps)}", fix, where)
    if 0 < slowest < LEAST_BPS:
        fix = "Send less over it: --compress topk:1%, --local-steps 8."
        return Check("link", "warn", told, fix, where)
    if found.rtt_s > RTT_S:
        fix = "Look at what else the two machines and the network do: answers wait somewhere."
        return Check("link", "warn", told, fix, where)
    return Check("link", "pass", told, "", where)


def told_link(found: Link) -> str:
    parts = [f"answers in {seconds(found.rtt_s)}"]
    if found.up_bps > 0:
        parts.append(f"{rate(found.up_bps)} there")
    if found.down_bps > 0:
        parts.append(f"{rate(found.down_bps)} back")
    by = " by shared memory" if found.by == "shared memory" else ""
    return ", ".join(parts) + by


def seconds(value: float) -> str:
    if value < 0.0995:
        return f"{1e3 * value:.2g} ms" if value < 0.00995 else f"{1e3 * value:.0f} ms"
    return f"{value:.2g} s" if value < 9.95 else f"{value:,.0f} s"


def rate(bps: float) -> str:
    """Bytes per second."""
    for unit, size in (("GB/s", 1e9), ("MB/s", 1e6)):
        if bps >= size:
            return f"{bps / size:.3g} {unit}" if bps < 999.5 * size else f"{bps / size:,.0f} {unit}"
    return f"{bps / 1e3:.3g} kB/s"
