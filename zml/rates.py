"""The learning rate follows the number of workers, and late gradients count less: two rules, as pure functions.

**Scaling** (sync). An update is made with the mean of n workers' gradients, where the script's rate is meant for
`base` workers: a batch n / base times as large. The rate of that update is the script's times n / base (`linear`;
Goyal et al., "Accurate, Large Minibatch SGD", 2017) or times the root of it (`sqrt`; Krizhevsky, "One weird trick for
parallelizing convolutional neural networks", 2014, and usual with Adam). When somebody has come, or more begin than
`base`, the factor grows over `warm_up_steps` updates from the old one to the new one (Goyal et al., section 2.2). A
fall acts at once: a rate that is too large for its batch is what the warm-up is there to avoid.

torch's SGD multiplies with the rate outside of the momentum, so that a changed rate needs no momentum correction (Goyal
et al., section 3, remark 2).

Rule: the factor of an update is a function of whose steps are in it and in those before, of nothing else. All shards
count the same steps (`shard`), so they use the same factor to the bit, in whatever order messages come; a push log read
again gives it again. That a worker of the roster has no step in an update says little: towards the end of an epoch some
have no batch left. So who takes part is looked at anew with each epoch, and within one it only grows; an update with
fewer steps has the factor of its own number all the same.

**Damping** (staleness bound, async). A gradient that was computed on parameters which the shard has made tau updates to
since is applied with the rate divided by max(1, tau) (Zhang et al., "Staleness-aware Async-SGD for Distributed Deep
Learning", IJCAI 2016). More workers do not make batches larger there, and so there is no scaling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import msgspec

Scaling = Literal["none", "linear", "sqrt"]


class Rule(msgspec.Struct, frozen=True, array_like=True):
    """What was asked for."""

    scaling: Scaling = "none"
    base: int = 1  # workers that the script's rate is meant for
    warm_up_steps: int = 0
    damping: bool = False

    def share(self, workers: float) -> float:
        """The factor of an update with so many workers' steps, after all warm-up."""
        if self.scaling == "none":
            return 1.0
        ratio = workers / self.base
        return ratio if self.scaling == "linear" else math.sqrt(ratio)

    def damped(self, staleness: int) -> float:
        """The factor of a gradient that is so many updates late."""
        return 1.0 / max(1, staleness) if self.damping else 1.0


class Course(msgspec.Struct, frozen=True):
    """The factor of the newest update, and what the next one's depends on.

    `crew` is empty before the first update, and in a job that goes on from a checkpoint, whose workers are others.
    """

    crew: dict[str, int] = {}  # worker -> incarnation, of all who had a step in this epoch
    workers: int = 0  # that had a step in the newest update; 0: there was none yet
    most: int = 0  # that had one in the same update, in this epoch
    epoch: int = -1
    begin: float = 1.0  # where the warm-up began
    made: int = 0  # updates since then
    level: float = 1.0  # of `most`, with its warm-up
    factor: float = 1.0  # of the newest update: the level, but no more than its own number of steps is worth

    def next(self, rule: Rule, epoch: int, steps: Mapping[str, int]) -> Course:
        """After one more update of this epoch, with these workers' steps (worker -> incarnation)."""
        count = len(steps)
        opens = epoch > self.epoch
        crew = dict(steps) if opens else {**self.crew, **steps}
        most = count if opens else max(self.most, count)
        # Who had no step in the newest update may have had no batch: it has not come now.
        stayed = sum(self.crew.get(worker) == incarnation for worker, incarnation in steps.items())
        before = min(self.most, max(self.workers, stayed))
        begin, made = self.begin, min(self.made + 1, rule.warm_up_steps)
        if not self.workers:  # the script's own rate is the old one
            before, begin, made = rule.base, rule.share(count), rule.warm_up_steps
        if count > before:
            begin, made = min(self.level, rule.share(before)), 0
        done = (made + 1) / rule.warm_up_steps if made < rule.warm_up_steps else 1.0
        goal = rule.share(most)
        level = goal if done >= 1.0 else begin + (goal - begin) * done
        return Course(crew, count, most, epoch, begin, made, level, min(level, rule.share(count)))

    def kept(self) -> Course:
        """The same for a job that goes on from here with other workers."""
        return msgspec.structs.replace(self, crew={}, workers=self.most)

    def warming(self, rule: Rule) -> bool:
        return self.workers > 0 and self.made + 1 < rule.warm_up_steps


def why(rule: Rule, course: Course) -> str:
    """The factor's reason, for people; empty where there is none."""
    if rule.scaling == "none" or not course.workers:
        return ""
    asked = f"{rule.base} {'was' if rule.base == 1 else 'were'} asked for"
    meant = f"{counted(course.most)} where {asked}, {rule.scaling}"
    if course.workers < course.most:
        return f"{meant}; {course.workers} in the newest update"
    if course.warming(rule):
        return f"{meant}; warm-up step {course.made + 1} of {rule.warm_up_steps} from {course.begin:.3g}"
    return meant


def counted(workers: int) -> str:
    return f"{workers} worker{'' if workers == 1 else 's'}"
