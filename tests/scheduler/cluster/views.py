"""Views for tests: nodes and jobs in few words."""

from zml.scheduler.cluster.plan import Allocation, Candidate, Plan, View
from zml.scheduler.cluster.request import Request
from zml.scheduler.cluster.resources import NOTHING, Node, NodeId, Resources
from zml.scheduler.ids import JobId

GPU = Resources(gpus=1)


def node(name: str, gpus: int = 4, cpus: int = 64, memory_mb: int = 0, rack: str = "") -> Node:
    return Node(id=NodeId(name), offers=Resources(cpus=cpus, gpus=gpus, memory_mb=memory_mb), rack=rack)


def nodes(count: int, gpus: int = 4) -> tuple[Node, ...]:
    return tuple(node(f"n{i:02}", gpus) for i in range(count))


def request(
    name: str,
    least: int = 1,
    most: int | None = None,
    *,
    submitted: float = 0.0,
    priority: int = 0,
    user: str = "",
    preemptible: bool = True,
    time_limit_s: float | None = None,
    worker: Resources = GPU,
    shard: Resources = NOTHING,
    shards: int = 1,
    replicas: int = 0,
) -> Request:
    return Request(
        job=JobId(name),
        user=user,
        least=least,
        most=max(least, most or least),
        shards=shards,
        replicas=replicas,
        worker=worker,
        shard=shard,
        priority=priority,
        preemptible=preemptible,
        time_limit_s=time_limit_s,
        submitted=submitted,
    )


def on(*names: str, shards: tuple[str, ...] | None = None) -> Allocation:
    workers = tuple(NodeId(name) for name in names)
    return Allocation(workers, workers[:1] if shards is None else tuple(NodeId(name) for name in shards))


def view(now: float, machines: tuple[Node, ...], *jobs: Candidate) -> View:
    return View(now=now, nodes=machines, jobs=jobs)


def told(plan: Plan) -> dict[str, tuple[str, tuple[str, ...] | None]]:
    """Each job's reason and its workers' nodes."""
    return {
        job: (verdict.why.name, None if verdict.allocation is None else verdict.allocation.workers)
        for job, verdict in plan.verdicts.items()
    }
