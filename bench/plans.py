"""How long does a policy think? One round over many jobs, each policy, on a cluster that is full and wanted by more.

    python bench/plans.py                            # 1,000 jobs on 250 nodes of 4 GPUs
    python bench/plans.py --jobs 5000 --nodes 1000

Jobs ask for 1 to 8 workers and may have up to 16; half of them have a profile, half of them run when measuring begins;
20 rounds of 60 s follow, in which each plan is carried out and a job in a hundred ends and another comes. Times are of
the policy alone, of the processor: others on the machine do not count.
"""

import time
from dataclasses import replace
from random import Random

import checkout  # noqa: F401  (puts this checkout on the path)
import click

from zml.scheduler.cluster.goodput import Batches, Learner, Line, Throughput
from zml.scheduler.cluster.plan import Candidate, View
from zml.scheduler.cluster.policies import POLICIES
from zml.scheduler.cluster.request import Request
from zml.scheduler.cluster.resources import Node, NodeId, Resources
from zml.scheduler.ids import JobId

ROUNDS = 20


def learner(random: Random) -> Learner:
    model = Throughput(
        grad=Line(random.uniform(0.01, 0.1), random.uniform(1e-4, 1e-2)),
        together=Line(random.uniform(0.0, 0.05), random.uniform(0.0, 0.01)),
        apart=Line(random.uniform(0.01, 0.1), random.uniform(0.0, 0.02)),
        gamma=random.uniform(1.0, 3.0),
    )
    batches = Batches(asked=128, most=8192, least_local=16, most_local=512)
    return Learner(model, random.uniform(100.0, 10_000.0), batches, 16)


def candidate(number: int, now: float, random: Random) -> Candidate:
    request = Request(
        job=JobId(f"j{number}"),
        user=f"u{number % 17}",
        least=random.choice((1, 1, 1, 2, 4, 8)),
        most=16,
        worker=Resources(gpus=1, cpus=random.choice((2, 4)), memory_mb=random.choice((4_000, 8_000, 16_000))),
        shard=Resources(cpus=1, memory_mb=2_000),
        shards=random.choice((1, 2)),
        submitted=now,
    )
    return Candidate(request=request, since=now, profile=learner(random) if random.random() < 0.5 else None)


@click.command()
@click.option("--jobs", default=1_000, show_default=True)
@click.option("--nodes", default=250, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(jobs: int, nodes: int, seed: int) -> None:
    offers = Resources(gpus=4, cpus=32, memory_mb=256_000)
    machines = tuple(Node(id=NodeId(f"n{i}"), offers=offers, rack=f"r{i // 20}") for i in range(nodes))
    click.echo(f"{jobs:,} jobs on {nodes:,} nodes, seed {seed}: ms a round")
    for name, policy in POLICIES.items():
        random, now, made = Random(seed), 0.0, jobs
        here = [candidate(i, float(i), random) for i in range(jobs)]
        now = float(jobs)
        took = []
        for _ in range(ROUNDS):
            began = time.process_time()
            plan = policy(View(now=now, nodes=machines, jobs=tuple(here)))
            took.append((time.process_time() - began) * 1_000)
            after = []
            for job in here:
                has = plan.verdicts[job.request.job].allocation
                served = 60.0 * len(has.workers) if has is not None else 0.0
                changed = job.allocation is not None and has != job.allocation
                after.append(
                    replace(
                        job, allocation=has, attained_s=job.attained_s + served, changes=job.changes + changed
                    )
                )
            now += 60.0
            here = [job for job in after if random.random() > 0.01]
            while len(here) < jobs:
                here.append(candidate(made, now, random))
                made += 1
        running = sum(job.allocation is not None for job in here)
        took.sort()
        click.echo(
            f"{name:<7} first and worst {max(took):6.0f}   median {took[ROUNDS // 2]:6.0f}   "
            f"({running} jobs run)"
        )


if __name__ == "__main__":
    main()
