"""When somebody should look: the alerts, in the words of whoever is woken by them.

Each names the member, says what to do, and which panel shows it. The expression is a value that is there while all is
well, and a condition on it, so that a rule can be seen to work before it fires. Series are told apart by Prometheus'
`job`, the scrape configuration, beside zml's `job_id`: two coordinators may each have a job of one name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..metrics import catalog as c
from ..stragglers import BAD, STARVED
from . import machines, measures, training
from .panels import Dashboard, Panel
from .promql import Scope, readable, together

HEAD = """Alerts of zml. Each says what to do in its description, and names the dashboard's panel that shows it.
`severity` is critical where training stands still or may be for nothing, else warning."""
RULES = Scope("5m")
LONG = Scope("15m")
J = ("job", "job_id")
JW = (*J, "worker")
JS = (*J, "shard")
JM = (*J, "role", "member")
NODE = ("job", "node")
ON = f"on ({', '.join(J)})"
RUNNING = f"{ON} {together('max', 'min_over_time(' + RULES.of(c.STATE, state='RUNNING') + '[5m])', J)} == 1"
SHARD = f"on ({', '.join(JS)})"
OF_JOB = "{{ with $labels.job_id }} of {{ . }}{{ end }}"
PROCESS = "{{ $labels.role }} {{ $labels.member }}" + OF_JOB


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """It fires when `value` meets `when` for so long. `says` ends in what to do."""

    name: str
    value: str
    when: str
    for_: str
    severity: Literal["critical", "warning"]
    summary: str
    says: str
    shown: tuple[Dashboard, Panel]

    @property
    def expr(self) -> str:
        return f"{self.value} {self.when}"


def grown(metric: c.Metric, by: tuple[str, ...], window: str) -> str:
    """How much a gauge rose within a window, whichever process told it."""
    series = RULES.of(metric)
    newest = together("max", f"max_over_time({series}[{window}])", by)
    return f"{newest} - {together('min', f'min_over_time({series}[{window}])', by)}"


def enough(role: str) -> str:
    """As many members of a role are here as were asked for."""
    here = RULES.sum(c.MEMBERS, J, member_role=role, state=measures.HERE)
    return f"{here} >= {ON} {RULES.max(c.WANTED, J, member_role=role)}"


def usual_gap() -> str:
    """Seconds between checkpoints, of those within a day; nothing before the second one."""
    at = RULES.of(c.CHECKPOINT_AT)
    span = (
        f"{together('max', f'max_over_time({at}[1d])', J)} - {together('min', f'min_over_time({at}[1d])', J)}"
    )
    return f"({span}) / {together('sum', f'changes({at}[1d])', J)}"


STEPS = RULES.of(c.JOB_STEPS)
ANSWER = together("sum", 'up{role!=""}', J)  # how many processes of a job do
HUB = together("sum", 'up{role="hub"}', J)

ALERTS = (
    Alert(
        name="ZmlNoStep",
        value=f"{together('max', STEPS, J)} - {together('max', f'{STEPS} offset 5m', J)}",
        when=f"== 0 and {RUNNING}",
        for_="30s",
        severity="critical",
        summary="{{ $labels.job_id }} has made no step for 5 minutes",
        says="The job is running, and nothing moves. `zml status` says who is waited for; `zml stack "
        "WORKER` shows where a script hangs; the logs of the shards show what they refuse.",
        shown=(training.OVERVIEW, training.STEPS),
    ),
    Alert(
        name="ZmlStraggler",
        value=measures.to_median(measures.own_time(RULES, JW), J),
        when=f"> {BAD:g}",
        for_="2m",
        severity="warning",
        summary="{{ $labels.worker }} of {{ $labels.job_id }} takes {{ $value | humanize }} times as long "
        "as the median",
        says="Its own time per step, without what it waits for others. In sync everybody waits for it. The "
        "panel shows in which phase: compute, and its machine is slower, shared or hot; data, and its "
        "storage is. Replace it, or let the others go ahead with --staleness.",
        shown=(training.WORKERS, training.OWN),
    ),
    Alert(
        name="ZmlDataStarved",
        value=measures.share(RULES, "data", JW),
        when=f"> {STARVED:g}",
        for_="2m",
        severity="warning",
        summary="{{ $labels.worker }} of {{ $labels.job_id }} waits for its data {{ $value | humanizePercentage }} "
        "of the time",
        says="The loader is slower than the model. Give the DataLoader more processes (num_workers), move "
        "work out of __getitem__, or the data nearer.",
        shown=(training.DATA, training.LOADERS),
    ),
    Alert(
        name="ZmlStalenessAtBound",
        value=RULES.max(c.SPREAD, J),
        when=f">= {ON} ({RULES.max(c.BOUND, J)} > 0)",
        for_="5m",
        severity="warning",
        summary="the workers of {{ $labels.job_id }} are as far apart as they may be: {{ $value }} steps",
        says="Fast workers wait for the slowest one all the time. See who it is on Workers; replace it, or "
        "allow more with --staleness.",
        shown=(training.OVERVIEW, training.AHEAD),
    ),
    Alert(
        name="ZmlCheckpointOld",
        value=measures.checkpoint_age(RULES, J),
        when=f"> {ON} 2 * ({usual_gap()}) and {RUNNING}",
        for_="1m",
        severity="warning",
        summary="the newest checkpoint of {{ $labels.job_id }} is {{ $value | humanizeDuration }} old",
        says="Twice as old as checkpoints are apart as a rule. What was trained since is lost if everything "
        "dies at once. `zml events` says why none is taken.",
        shown=(training.DATA, training.SAVED_AGO),
    ),
    Alert(
        name="ZmlCheckpointFailed",
        value=LONG.increase(c.CHECKPOINTS, J, result="failed"),
        when="> 0",
        for_="30s",
        severity="critical",
        summary="a checkpoint of {{ $labels.job_id }} failed",
        says="The one before stays as it is. `zml events` says why; often the disk is full, or a shard was "
        "lost meanwhile.",
        shown=(training.DATA, training.SAVED_HOW),
    ),
    Alert(
        name="ZmlValueNotFinite",
        value=together("min", RULES.of(c.FINITE), (*J, "name")),
        when="== 0",
        for_="30s",
        severity="critical",
        summary="{{ $labels.name }} of {{ $labels.job_id }} is not finite",
        says="It is NaN or infinite, and training on may be for nothing. Stop it, and go on from a "
        "checkpoint with a lower learning rate, clipped gradients, or without the batch that did it.",
        shown=(training.OVERVIEW, training.FINITE),
    ),
    Alert(
        name="ZmlStepsLeftOut",
        value=RULES.increase(c.LEFT_OUT, JW),
        when="> 0",
        for_="30s",
        severity="warning",
        summary="{{ $labels.worker }} of {{ $labels.job_id }} leaves steps out: their gradient is not finite",
        says="The parameters are safe. A few at the start are usual with a GradScaler; many mean that "
        "training diverges. The worker's log names the batches.",
        shown=(training.WORKERS, training.LEFT_OUT),
    ),
    Alert(
        name="ZmlShardLost",
        value=together("max", RULES.of(c.HEARD, member_role="shard"), (*J, "id")),
        when=f"> 15 unless {ON} {enough('shard')}",
        for_="15s",
        severity="critical",
        summary="shard {{ $labels.id }} of {{ $labels.job_id }} was not heard for {{ $value | humanizeDuration }}",
        says="Nobody trains without it. It is started again where it was if its machine is there; else "
        "start `zml ps --shard` where its push log is. Nothing that was acknowledged is lost.",
        shown=(machines.RUNTIME, machines.HEARD),
    ),
    Alert(
        name="ZmlWorkerLost",
        value=together("max", RULES.of(c.HEARD, member_role="worker"), (*J, "id")),
        when=f"> 15 unless {ON} {enough('worker')}",
        for_="1m",
        severity="warning",
        summary="worker {{ $labels.id }} of {{ $labels.job_id }} was not heard for {{ $value | humanizeDuration }}",
        says="The others go on, and its batches were dealt again. Start `zml worker` on another machine to "
        "have as many as were asked for.",
        shown=(machines.RUNTIME, machines.HEARD),
    ),
    Alert(
        name="ZmlMemberRestarts",
        value=grown(c.LIVES, (*J, "member_role", "id"), "30m"),
        when=">= 3",
        for_="30s",
        severity="warning",
        summary="{{ $labels.member_role }} {{ $labels.id }} of {{ $labels.job_id }} has started {{ $value }} "
        "more times in 30 minutes",
        says="It dies again and again. Its log and `zml events` say of what; short of memory is the usual "
        "cause.",
        shown=(machines.RUNTIME, machines.STARTS),
    ),
    Alert(
        name="ZmlCoordinatorRestarts",
        value=grown(c.BOOTS, J, "30m"),
        when=">= 3",
        for_="30s",
        severity="critical",
        summary="the coordinator of {{ $labels.job_id }} has started {{ $value }} more times in 30 minutes",
        says="Training goes on meanwhile, but after five in quick succession it is not started again. Its "
        "log says of what it dies.",
        shown=(machines.RUNTIME, machines.STARTS),
    ),
    Alert(
        name="ZmlBatchesReissued",
        value=f"{LONG.increase(c.REISSUED, J)} / {LONG.increase(c.STEPS, J)}",
        when=f"> 0.05 and {ON} {LONG.increase(c.REISSUED, J)} >= 3",
        for_="2m",
        severity="warning",
        summary="{{ $value | humanizePercentage }} of the batches of {{ $labels.job_id }} are dealt again",
        says="Workers are lost before they push, and what they computed is computed again. Each batch still "
        "counts once. See who does not stay; if machines are taken away, ask for a warning before (SIGTERM).",
        shown=(training.DATA, training.REISSUED),
    ),
    Alert(
        name="ZmlLoopLag",
        value=RULES.quantile(0.99, c.LAG, JM),
        when="> 0.1",
        for_="2m",
        severity="warning",
        summary=f"{PROCESS} answers {{{{ $value | humanizeDuration }}}} late",
        says="Its event loop is held up: too many processes for the cores, swapping, or a disk that blocks. "
        "Members may be taken for lost.",
        shown=(machines.RUNTIME, machines.LAG),
    ),
    Alert(
        name="ZmlShardImbalance",
        value=measures.to_mean(measures.traffic(RULES, JS), J),
        # One chunk cannot be divided, and little traffic need not be.
        when=f"> 1.5 and {SHARD} ({measures.traffic(RULES, JS)}) > 1e6 and {SHARD} {RULES.max(c.CHUNKS, JS)} > 1",
        for_="5m",
        severity="warning",
        summary="shard {{ $labels.shard }} of {{ $labels.job_id }} moves {{ $value | humanize }} times the "
        "mean",
        says="The busiest shard sets the pace of all. A model of few chunks cannot be divided evenly: fewer "
        "shards are as fast. Else one of them came late; chunks move at the next epoch.",
        shown=(training.SHARDS, training.BALANCE),
    ),
    Alert(
        name="ZmlTargetDown",
        value='up{role!="", member!=""}',
        # Where nobody of a job answers it has ended, as far as can be seen from here: its coordinator says no more.
        when=f"== 0 and {ON} ({ANSWER} > 0 or {HUB} == 0)",
        for_="1m",
        severity="critical",
        summary=f"{PROCESS} does not answer Prometheus",
        says="The process hangs, is gone, or a firewall is between: {{ $labels.instance }} on {{ $labels.node }}. "
        "`zml status` says whether the coordinator hears it.",
        shown=(machines.RUNTIME, machines.UP),
    ),
    Alert(
        name="ZmlLogErrors",
        value=RULES.increase(c.LINES, JM, level="=~error|critical"),
        when="> 0",
        for_="30s",
        severity="warning",
        summary=f"{PROCESS} logs errors",
        says="`zml logs --level error` shows them.",
        shown=(machines.RUNTIME, machines.LINES),
    ),
    Alert(
        name="ZmlDiskFull",
        value=together("min", f"{RULES.of(c.DISK_FREE)} / {RULES.of(c.DISK)}", NODE),
        when="< 0.05",
        for_="1m",
        severity="critical",
        summary="{{ $value | humanizePercentage }} of the disk of {{ $labels.node }} is free",
        says="Of the one on which runs are kept there. Checkpoints fail first, then shards cannot write "
        "down what they take. Make room, or keep fewer checkpoints (keep_last).",
        shown=(machines.RUNTIME, machines.DISK),
    ),
    Alert(
        name="ZmlDiskFilling",
        value=together("min", f"predict_linear({RULES.of(c.DISK_FREE)}[1h], 4 * 3600)", NODE),
        # A straight line through a few minutes, in which a run has just begun to write, says nothing.
        when=f"< 0 and on ({', '.join(NODE)}) {together('min', f'{RULES.of(c.DISK_FREE)} offset 15m', NODE)}",
        for_="10m",
        severity="warning",
        summary="the disk of {{ $labels.node }} is full within 4 hours if it goes on like this",
        says="The one on which runs are kept there. Make room, or keep fewer checkpoints (keep_last).",
        shown=(machines.RUNTIME, machines.DISK),
    ),
)  # fmt: skip


def rule_file() -> dict[str, Any]:
    """All alerts as one group of rules."""
    return {"groups": [{"name": "zml", "rules": [rule(alert) for alert in ALERTS]}]}


def rule(alert: Alert) -> dict[str, Any]:
    dashboard, panel = alert.shown
    return {
        "alert": alert.name,
        "expr": readable(alert.expr),
        "for": alert.for_,
        "labels": {"severity": alert.severity},
        "annotations": {
            "summary": alert.summary,
            "description": alert.says,
            "panel": f"{dashboard.title} / {panel.title}",
            "dashboard": f"/d/{dashboard.uid}?viewPanel={panel.number}&var-job={{{{ $labels.job_id }}}}",
        },
    }
