"""The dashboards that say how a training goes: Overview, Workers, Shards, Data and checkpoints.

Overview is where people look first. A straggler, a worker that waits for its data, a dead member and a value that is
not finite each show there, with the dashboard to go to next.
"""

from __future__ import annotations

from ..metrics import catalog as c
from . import measures
from .panels import ALARM, ALL, SHOWN, Dashboard, Panel, Query, Row, unit
from .promql import together

W = ("worker",)
S = ("shard",)
J = ("job_id",)
JW = (*J, *W)
JS = (*J, *S)
HERE = measures.HERE

STATE = Panel(
    number=1, title="State", kind="number", width=4, height=4,
    says="What the job is doing. `zml status` says why.",
    queries=(Query(f"{ALL.of(c.STATE)} == 1", "{{state}}"),),
)  # fmt: skip
PROGRESS = Panel(
    number=2, title="Done", kind="number", unit=unit(c.PROGRESS), width=3, height=4,
    says=c.PROGRESS.help, queries=(Query(ALL.max(c.PROGRESS), "done"),),
)  # fmt: skip
REMAINING = Panel(
    number=3, title="Remaining", kind="number", unit=unit(c.ETA), width=3, height=4,
    says=c.ETA.help, queries=(Query(ALL.max(c.ETA), "remaining"),),
)  # fmt: skip
PACE = Panel(
    number=4, title="Samples per second", kind="number", width=4, height=4,
    says="Of the whole job, over the last seconds.", queries=(Query(ALL.max(c.JOB_RATE), "samples/s"),),
)  # fmt: skip
PRESENT = Panel(
    number=5, title="Members", kind="number", width=5, height=4,
    says="Who is here, and how many were asked for. Fewer: somebody was lost, or has not come yet.",
    queries=(
        Query(ALL.sum(c.MEMBERS, ("member_role",), state=HERE), "{{member_role}}s"),
        Query(ALL.max(c.WANTED, ("member_role",)), "{{member_role}}s wanted"),
    ),
)  # fmt: skip
SAVED = Panel(
    number=6, title="Newest checkpoint", kind="number", unit="s", width=3, height=4,
    says="How long ago it was complete. What was trained since is lost if everything dies at once.",
    queries=(Query(measures.checkpoint_age(ALL, ()), "ago"),),
)  # fmt: skip
ALARMS = Panel(
    number=7, title="Alerts", kind="number", width=2, height=4, steps=((0, "green"), (1, "red")),
    says="Alert rules of zml that fire for this job.",
    queries=(
        Query(f"count({ALARM}) or vector(0)", "firing"),
    ),
)  # fmt: skip
WRONG = Panel(
    number=8, title="What is wrong", kind="list", width=24, height=5,
    says="Alerts that fire. Empty is good. Each alert's description says what to do, and names a panel.",
    queries=(Query(ALARM, rare=True),),
)  # fmt: skip

VALUES = Panel(
    number=10, title="What the script logs", width=12,
    says="The loss, and whatever else goes into `zml.log`: mean over the workers. A gap: it was not finite.",
    queries=(Query(ALL.max(c.VALUE, ("name",)), "{{name}}"),),
)  # fmt: skip
FINITE = Panel(
    number=11, title="Not finite", width=4, least=0, steps=((0, "green"), (1, "red")),
    says="Values that are NaN or infinite now (1), and steps per second left out because their gradient was.",
    queries=(
        Query(f"1 - {ALL.max(c.FINITE, ('name',))}", "{{name}}"),
        Query(ALL.rate(c.LEFT_OUT), "steps left out"),
    ),
)  # fmt: skip
RATE = Panel(
    number=12, title="Samples per second over time", least=0, says="Of the whole job.",
    queries=(Query(ALL.rate(c.JOB_SAMPLES), "samples/s"),),
)  # fmt: skip
WHERE = Panel(
    number=13, title="Where the time of a step goes", kind="stack", unit="s", width=12, least=0,
    says="Mean over all workers. Much data: the loaders are too slow. Much wait: for other workers, the shards or the "
    "network; see Workers and Shards.",
    queries=(Query(measures.phase_time(ALL), "{{phase}}"),),
)  # fmt: skip
SLOWEST = Panel(
    number=14, title="The slowest workers, and the median", unit="s", width=12, least=0,
    says="A worker's own time per step, without what it waits for others. One far above the median is a straggler.",
    queries=(
        Query(f"topk(5, {measures.own_time(ALL, W)})", "{{worker}}"),
        Query(f"quantile(0.5, {measures.own_time(ALL, W)})", "median"),
    ),
)  # fmt: skip
STARVED = Panel(
    number=15, title="Waiting for data", width=6, unit="percentunit", least=0, most=1,
    steps=((0, "green"), (0.5, "red")),
    says="Share of its time that a worker waits for its data loader; the five worst.",
    queries=(Query(f"topk(5, {measures.share(ALL, 'data', W)})", "{{worker}}"),),
)  # fmt: skip
AHEAD = Panel(
    number=16, title="Staleness", width=6, unit="short", least=0,
    says="How far the fastest worker is ahead of the slowest, in steps, and what it may be. At its bound, fast workers "
    "wait.",
    queries=(Query(ALL.max(c.SPREAD), "staleness"), Query(ALL.max(c.BOUND), "bound")),
)  # fmt: skip
BY_STATE = Panel(
    number=17, title="Members by state", width=6, least=0,
    says="lost: not heard for the length of its lease. failed: its script ended with an error.",
    queries=(Query(ALL.sum(c.MEMBERS, ("member_role", "state")), "{{member_role}}s {{state}}"),),
)  # fmt: skip
STEPS = Panel(
    number=18, title="Steps", width=6, least=0, says=c.JOB_STEPS.help + " A flat line: nothing moves.",
    queries=(Query(ALL.max(c.JOB_STEPS), "steps"),),
)  # fmt: skip

OVERVIEW = Dashboard(
    "zml-overview",
    "zml: Overview",
    "How a job goes, and what is wrong with it.",
    (
        Row("Now", (STATE, PROGRESS, REMAINING, PACE, PRESENT, SAVED, ALARMS, WRONG)),
        Row("Learning", (VALUES, FINITE, RATE)),
        Row("Speed", (WHERE, SLOWEST)),
        Row("Members", (STARVED, AHEAD, BY_STATE, STEPS)),
    ),
)

# -- workers -----------------------------------------------------------------------------------------------------

PHASES_NOW = Panel(
    number=101, title="Where the time of a step goes, by worker", kind="bars", unit="s", width=24, height=10, least=0,
    key="worker", split="phase",
    says="Seconds per step. Everybody high in compute: the model. One high in compute: a straggler, and the others "
    "wait for it. High in data: its loader. Everybody high in wait: the shards or the network.",
    queries=(Query(measures.phase_time(SHOWN, W)),),
)  # fmt: skip
PHASES_THEN = Panel(
    number=102, title="Where the time of a step goes, over time", kind="stack", unit="s", width=12, height=9, least=0,
    says="Mean over the workers that are chosen above.",
    queries=(Query(measures.phase_time(SHOWN), "{{phase}}"),),
)  # fmt: skip
OWN = Panel(
    number=103, title="Own time per step", unit="s", width=12, height=9, least=0,
    says="Without what it waits for others: data, compute, encode and apply. A straggler is more than twice as slow "
    "as the median.",
    queries=(Query(measures.own_time(SHOWN, W), "{{worker}}"),),
)  # fmt: skip
TO_MEDIAN = measures.to_median(measures.own_time(SHOWN, JW), J, measures.own_time(ALL, JW))
TABLE = Panel(
    number=104, title="Stragglers first", kind="table", width=24, height=9, key="worker",
    says="Every worker, the slowest first: its own time, as a multiple of the median, and what it spends it on.",
    queries=(
        Query(together("sum", TO_MEDIAN, W), "to the median"),
        Query(measures.own_time(SHOWN, W), "own time"),
        Query(SHOWN.quantile(0.99, c.STEP_TIME, W), "step p99"),
        Query(measures.share(SHOWN, "data", W), "data"),
        Query(measures.share(SHOWN, "compute", W), "compute"),
        Query(measures.share(SHOWN, "wait", W), "wait"),
        Query(SHOWN.rate(c.SAMPLES, W), "samples/s"),
        Query(SHOWN.sum(c.RESTARTS, W), "restarts"),
    ),
    columns=(
        ("to the median", "short"), ("own time", "s"), ("step p99", "s"), ("data", "percentunit"),
        ("compute", "percentunit"), ("wait", "percentunit"),
    ),
)  # fmt: skip
STEP_LINES = Panel(
    number=105, title="Steps: p50 and p99", unit="s", width=8, least=0,
    says="Of the workers that are chosen; read from classes, so that it is as exact as these are narrow.",
    queries=(
        Query(SHOWN.quantile(0.5, c.STEP_TIME), "p50"),
        Query(SHOWN.quantile(0.99, c.STEP_TIME), "p99"),
        Query(SHOWN.mean(c.STEP_TIME), "mean"),
    ),
)  # fmt: skip
STEP_HEAT = Panel(
    number=106, title="Steps by duration", kind="heat", unit="s", width=8,
    says="How many steps took how long. Two bands: two kinds of machines, or of batches.",
    queries=(Query(SHOWN.increase(c.STEP_TIME, ("le",), "_bucket"), "{{le}}"),),
)  # fmt: skip
BESIDE = Panel(
    number=107, title="Push and pull, beside the steps", unit="s", width=8, least=0,
    says="Seconds per step until all shards have counted it, and until parameters are here. They only cost time where "
    "they show as wait.",
    queries=(
        Query(
            f"{SHOWN.rate(c.PHASE, ('worker', 'phase'), phase='=~push|pull')} "
            f"/ on (worker) group_left () {SHOWN.rate(c.STEPS, W)}",
            "{{worker}} {{phase}}",
        ),
    ),
)  # fmt: skip
WORKER_PACE = Panel(
    number=108, title="Samples per second, by worker", kind="stack", least=0,
    says="They add up to the job's.", queries=(Query(SHOWN.rate(c.SAMPLES, W), "{{worker}}"),),
)  # fmt: skip
WORKER_AHEAD = Panel(
    number=109, title="Staleness of steps, p99", least=0, says=c.STALENESS.help,
    queries=(Query(SHOWN.quantile(0.99, c.STALENESS, W), "{{worker}}"),),
)  # fmt: skip
LEFT_OUT = Panel(
    number=110, title="Left out, and started again", least=0,
    says="Steps per second whose gradient was not finite, and scripts that were started again.",
    queries=(
        Query(SHOWN.rate(c.LEFT_OUT, W), "{{worker}} left out"),
        Query(SHOWN.increase(c.RESTARTS, W), "{{worker}} restarts"),
    ),
)  # fmt: skip
WORKER_BYTES = Panel(
    number=111, title="Bytes sent and received, by worker", unit=unit(c.WORKER_SENT, rate=True), width=12, least=0,
    says="Gradients out, parameters in, as they travelled.",
    queries=(
        Query(SHOWN.rate(c.WORKER_SENT, W), "{{worker}} sent"),
        Query(SHOWN.rate(c.WORKER_RECEIVED, W), "{{worker}} received"),
    ),
)  # fmt: skip
WORKER_RATIO = Panel(
    number=112, title="Compression", width=6, least=0,
    says="How many times as much it were without. 1: nothing is saved.",
    queries=(
        Query(f"{SHOWN.rate(c.WORKER_DENSE_SENT)} / {SHOWN.rate(c.WORKER_SENT)}", "gradients"),
        Query(f"{SHOWN.rate(c.WORKER_DENSE_RECEIVED)} / {SHOWN.rate(c.WORKER_RECEIVED)}", "parameters"),
    ),
)  # fmt: skip
LEARNING_RATE = Panel(
    number=113, title="Learning rate", width=6, says="Of the script, and what the shards multiply it with.",
    queries=(
        Query(SHOWN.max(c.LEARNING_RATE), "script"),
        Query(SHOWN.max(c.RATE_FACTOR), "factor"),
    ),
)  # fmt: skip
GPU_BUSY = Panel(
    number=114, title="GPU: busy", unit=unit(c.GPU_USED), least=0, most=1,
    says="As its driver says it. Low: see where the time of a step goes.",
    queries=(Query(SHOWN.max(c.GPU_USED, W), "{{worker}}"),),
)  # fmt: skip
GPU_FULL = Panel(
    number=115, title="GPU: memory", unit="percentunit", least=0, most=1, says="Used of what there is.",
    queries=(Query(f"{SHOWN.max(c.GPU_MEMORY_USED, W)} / {SHOWN.max(c.GPU_MEMORY, W)}", "{{worker}}"),),
)  # fmt: skip
GPU_POWER = Panel(
    number=116, title="GPU: power", unit=unit(c.GPU_POWER), least=0, says=c.GPU_POWER.help,
    queries=(Query(SHOWN.max(c.GPU_POWER, W), "{{worker}}"),),
)  # fmt: skip

WORKERS = Dashboard(
    "zml-workers",
    "zml: Workers",
    "Where their time goes, and who holds up the others.",
    (
        Row("Phases", (PHASES_NOW, PHASES_THEN, OWN, TABLE)),
        Row("Steps", (STEP_LINES, STEP_HEAT, BESIDE, WORKER_PACE, WORKER_AHEAD, LEFT_OUT)),
        Row("Traffic", (WORKER_BYTES, WORKER_RATIO, LEARNING_RATE)),
        Row("GPU", (GPU_BUSY, GPU_FULL, GPU_POWER)),
    ),
    ("job", "worker"),
)

# -- shards ------------------------------------------------------------------------------------------------------

UPDATES = Panel(
    number=201, title="Updates per second", least=0, says=c.UPDATES.help,
    queries=(Query(SHOWN.rate(c.UPDATES, S), "{{shard}}"),),
)  # fmt: skip
APPLY = Panel(
    number=202, title="Updates: p50 and p99", unit="s", least=0,
    says="How long one takes. Long: too few shards, or too few cores for them.",
    queries=(
        Query(SHOWN.quantile(0.5, c.APPLY, S), "{{shard}} p50"),
        Query(SHOWN.quantile(0.99, c.APPLY, S), "{{shard}} p99"),
    ),
)  # fmt: skip
APPLY_HEAT = Panel(
    number=203, title="Updates by duration", kind="heat", unit="s", says="Of the shards that are chosen.",
    queries=(Query(SHOWN.increase(c.APPLY, ("le",), "_bucket"), "{{le}}"),),
)  # fmt: skip
QUEUES = Panel(
    number=204, title="Waiting at the shards", least=0,
    says="Pulls that wait for other workers, pushes that wait for their commit. What grows is not kept up with.",
    queries=(Query(SHOWN.sum(c.QUEUE, ("shard", "queue")), "{{shard}} {{queue}}"),),
)  # fmt: skip
TAKEN = Panel(
    number=205, title="Pushes, by what became of them", least=0,
    says="Duplicates were answered as such and count once. Refused: from members that were fenced.",
    queries=(Query(SHOWN.rate(c.PUSHES, ("result",)), "{{result}}"),),
)  # fmt: skip
PULLS = Panel(
    number=206, title="Pulls per second", least=0, says=c.PULLS.help,
    queries=(Query(SHOWN.rate(c.PULLS, S), "{{shard}}"),),
)  # fmt: skip
SHARD_BYTES = Panel(
    number=207, title="Bytes in and out, by shard", unit=unit(c.SHARD_SENT, rate=True), width=12, least=0,
    says="Gradients in, parameters out, as they travelled.",
    queries=(
        Query(SHOWN.rate(c.SHARD_RECEIVED, S), "{{shard}} in"),
        Query(SHOWN.rate(c.SHARD_SENT, S), "{{shard}} out"),
    ),
)  # fmt: skip
BALANCE = Panel(
    number=208, title="Balance", width=6, least=0, steps=((0, "green"), (1.5, "red")),
    says="Traffic of each shard as a multiple of the mean: 1 is fair. The busiest one sets the pace of all.",
    queries=(
        Query(measures.to_mean(measures.traffic(SHOWN, JS), J, measures.traffic(ALL, JS)), "{{shard}}"),
    ),
)  # fmt: skip
SHARD_RATIO = Panel(
    number=209, title="Compression", width=6, least=0,
    says="How many times as much it were without. 1: nothing is saved.",
    queries=(
        Query(f"{SHOWN.rate(c.SHARD_DENSE_RECEIVED)} / {SHOWN.rate(c.SHARD_RECEIVED)}", "gradients"),
        Query(f"{SHOWN.rate(c.SHARD_DENSE_SENT)} / {SHOWN.rate(c.SHARD_SENT)}", "parameters"),
    ),
)  # fmt: skip
HELD = Panel(
    number=210, title="What they hold", kind="stack", unit="bytes", width=12, least=0,
    says="Parameters and the optimizer's state in memory, the push log on disk.",
    queries=(
        Query(SHOWN.sum(c.PARAMETERS), "parameters"),
        Query(SHOWN.sum(c.OPTIMIZER), "optimizer"),
        Query(SHOWN.sum(c.PUSH_LOG), "push log"),
    ),
)  # fmt: skip
HELD_BY = Panel(
    number=211, title="Parameters, by shard", unit="bytes", width=6, least=0, says=c.PARAMETERS.help,
    queries=(Query(SHOWN.sum(c.PARAMETERS, S), "{{shard}}"),),
)  # fmt: skip
VERSIONS = Panel(
    number=212, title="Versions and chunks", width=6, least=0,
    says="Of a shard's newest chunk. One that falls behind does not get its pushes.",
    queries=(
        Query(SHOWN.max(c.VERSION, S), "{{shard}} version"),
        Query(SHOWN.max(c.CHUNKS, S), "{{shard}} chunks"),
    ),
)  # fmt: skip

SHARDS = Dashboard(
    "zml-shards",
    "zml: Shards",
    "How the parameter-server shards keep up, and whether they share the load.",
    (
        Row("Updates", (UPDATES, APPLY, APPLY_HEAT, QUEUES, TAKEN, PULLS)),
        Row("Traffic", (SHARD_BYTES, BALANCE, SHARD_RATIO)),
        Row("State", (HELD, HELD_BY, VERSIONS)),
    ),
    ("job", "shard"),
)

# -- data and checkpoints ----------------------------------------------------------------------------------------

EPOCH = Panel(
    number=301, title="Epoch", kind="number", width=4, height=8, says=c.EPOCH.help,
    queries=(Query(SHOWN.max(c.EPOCH), "epoch"),),
)  # fmt: skip
EPOCH_DONE = Panel(
    number=302, title="Progress of the epoch", unit="percentunit", least=0, most=1, says=c.EPOCH_PROGRESS.help,
    queries=(Query(SHOWN.max(c.EPOCH_PROGRESS), "committed"),),
)  # fmt: skip
BATCHES = Panel(
    number=303, title="Batches of the epoch", width=12, least=0,
    says="Committed: their gradient is in the parameters. Leased: workers hold them. Skipped: left out, as you asked "
    "for with on_bad_batch. `zml data audit` proves that each counted once.",
    queries=(
        Query(SHOWN.max(c.COMMITTED), "committed"),
        Query(SHOWN.max(c.LEASED), "leased"),
        Query(SHOWN.max(c.SKIPPED), "skipped"),
    ),
)  # fmt: skip
REISSUED = Panel(
    number=304, title="Dealt again", width=12, least=0,
    says=c.REISSUED.help + " Per step: many mean that workers do not stay.",
    queries=(
        Query(f"{SHOWN.rate(c.REISSUED)} / {ALL.rate(c.STEPS)}", "per step"),
        Query(SHOWN.max(c.REISSUED), "in all"),
    ),
)  # fmt: skip
LOADERS = Panel(
    number=305, title="Waiting for data, by worker", unit="percentunit", width=12, least=0, most=1,
    steps=((0, "green"), (0.5, "red")),
    says="Share of its time. More than half: more loader processes (num_workers), or faster storage.",
    queries=(Query(measures.share(SHOWN, "data", W), "{{worker}}"),),
)  # fmt: skip
SAVED_AGO = Panel(
    number=311, title="Age of the newest checkpoint", unit="s", least=0,
    says="A saw whose teeth are as high as checkpoints are apart. It climbs on: they are no longer taken.",
    queries=(Query(measures.checkpoint_age(SHOWN, ()), "age"),),
)  # fmt: skip
SAVED_TIME = Panel(
    number=312, title="How long it took", unit="s", least=0, says=c.CHECKPOINT_TIME.help,
    queries=(Query(SHOWN.max(c.CHECKPOINT_TIME, ("phase",)), "{{phase}}"),),
)  # fmt: skip
SAVED_SIZE = Panel(
    number=313, title="Size of the newest", unit="bytes", width=4, least=0, says=c.CHECKPOINT_SIZE.help,
    queries=(Query(SHOWN.max(c.CHECKPOINT_SIZE), "size"),),
)  # fmt: skip
SAVED_STEP = Panel(
    number=314, title="Step of the newest", kind="number", width=4, says=c.CHECKPOINT_STEP.help,
    queries=(Query(SHOWN.max(c.CHECKPOINT_STEP), "step"),),
)  # fmt: skip
SAVED_HOW = Panel(
    number=315, title="Checkpoints, by how they ended", width=24, height=6, least=0,
    says="Failed ones change nothing: the one before stays. `zml events` says why.",
    queries=(Query(SHOWN.sum(c.CHECKPOINTS, ("result",)), "{{result}}"),),
)  # fmt: skip

DATA = Dashboard(
    "zml-data",
    "zml: Data and checkpoints",
    "What became of the samples, and what would be lost.",
    (
        Row("Data", (EPOCH, EPOCH_DONE, BATCHES, REISSUED, LOADERS)),
        Row("Checkpoints", (SAVED_AGO, SAVED_TIME, SAVED_SIZE, SAVED_STEP, SAVED_HOW)),
    ),
    ("job", "worker"),
)
