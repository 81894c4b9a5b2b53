"""The cluster's whole state as bytes, without holding up whoever talks to it.

A picture is taken between two events: what may still change is copied, what cannot is shared. It is made into bytes in
a thread, job by job, so that no step of that is long.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from ..scheduler.cluster.resources import NodeId
from ..scheduler.cluster.rules import Rules
from ..scheduler.cluster.state import Attempt, Cluster, Job, Leaving, Over, Present, Slot
from ..scheduler.ids import JobId
from ..scheduler.plain import KIND, plain

if TYPE_CHECKING:
    from .docket import Facts

T = TypeVar("T")


class Picture(NamedTuple):
    """The state at one moment; nothing changes it any more."""

    time: float
    jobs: dict[JobId, Job]
    over: dict[JobId, Over]  # frozen
    nodes: dict[NodeId, Present]
    rules: Rules | None  # frozen
    facts: Facts


def take(cluster: Cluster, facts: Facts, now: float) -> Picture:
    return Picture(
        time=now,
        jobs={name: twin(job) for name, job in cluster.jobs.items()},
        over=dict(cluster.over),
        nodes={name: of_present(present) for name, present in cluster.nodes.items()},
        rules=cluster.rules,
        facts=msgspec.structs.replace(
            facts,
            # What they hold is replaced where it changes, and not changed.
            records={name: copy(record) for name, record in facts.records.items()},
            keys=dict(facts.keys),
            discarding=list(facts.discarding),
        ),
    )


def copier(kind: type[T]) -> Callable[[T], T]:
    """Several times as fast as `copy.copy`, of a dataclass whose fields are what it is made of."""
    values = attrgetter(*(field.name for field in fields(kind)))  # type: ignore[arg-type]
    return lambda value: kind(*values(value))


of_job, of_attempt = copier(Job), copier(Attempt)
of_slot, of_leaving, of_present = copier(Slot), copier(Leaving), copier(Present)


def twin(job: Job) -> Job:
    attempt = job.attempt
    made = of_job(job)
    if attempt is None:
        return made
    made.attempt = of_attempt(attempt)
    made.attempt.slots = {name: of_slot(slot) for name, slot in attempt.slots.items()}
    if attempt.leaving is not None:
        made.attempt.leaving = of_leaving(attempt.leaving)
    return made


def told(picture: Picture) -> dict[str, Any]:
    """Plain data, most of it encoded already."""
    cluster = {
        KIND: Cluster.__name__,
        "jobs": {name: encoded(plain(job)) for name, job in picture.jobs.items()},
        "over": {name: encoded(plain(over)) for name, over in picture.over.items()},
        "nodes": {name: encoded(plain(present)) for name, present in picture.nodes.items()},
        "rules": plain(picture.rules),
    }
    facts = msgspec.structs.asdict(picture.facts)
    facts["records"] = {name: encoded(record) for name, record in picture.facts.records.items()}
    return {"time": picture.time, "cluster": cluster, "facts": facts}


def encoded(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(value))
