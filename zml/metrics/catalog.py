"""Every metric of the system, declared once. Panels, alert rules and the documentation are made from these entries.

Names keep to Prometheus' conventions (https://prometheus.io/docs/practices/naming/): one prefix, base units, `_total`
for counters, `_ratio` from 0 to 1. Labels are bounded: members, phases and results, never a batch or a step. Which
process it was is in the labels that the scrape adds (`/api/sd`): `role`, `member`, `job_id`, `node`.

No label is called `job` or `instance`: these are Prometheus' own, of the scrape configuration and of the address, and a
label of that name would come back as `exported_job`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..figures import APPLY_BOUNDS_S, STALENESS_BOUNDS, STEP_BOUNDS_S

Kind = Literal["counter", "gauge", "histogram", "info"]
Role = Literal["coordinator", "shard", "worker", "hub"]
EVERYBODY: tuple[Role, ...] = ("coordinator", "shard", "worker", "hub")

METRICS: dict[str, Metric] = {}


@dataclass(frozen=True, slots=True)
class Metric:
    """`name` is as it is scraped: with `_total` for a counter, with `_info` for an info, without `_bucket`."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    roles: tuple[Role, ...] = EVERYBODY
    bounds: tuple[float, ...] = ()  # of a histogram


def metric(
    name: str,
    kind: Kind,
    help_: str,
    labels: Sequence[str] = (),
    roles: Sequence[Role] = EVERYBODY,
    bounds: Sequence[float] = (),
) -> Metric:
    assert name not in METRICS, f"{name} is taken"
    METRICS[name] = entry = Metric(name, kind, help_, tuple(labels), tuple(roles), tuple(bounds))
    return entry


# -- every process ---------------------------------------------------------------------------------------------

BUILD = metric("zml_build_info", "info", "Versions of zml, python and torch.", ("version", "python", "torch"))
UPTIME = metric("zml_start_timestamp_seconds", "gauge", "When the process began, since the Unix epoch.")
MEMORY = metric("zml_resident_memory_bytes", "gauge", "Memory of the process; of a worker, its script's.")
CPU = metric("zml_cpu_seconds_total", "counter", "Processor time of the process.")
FILES = metric("zml_open_files", "gauge", "Files and sockets that the process has open.")
LAG = metric(
    "zml_loop_lag_seconds",
    "histogram",
    "How late the event loop woke.",
    bounds=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
)
LINES = metric("zml_log_messages_total", "counter", "Log lines.", ("level",))
DISK_FREE = metric("zml_disk_free_bytes", "gauge", "Free where the process keeps its files.")
DISK = metric("zml_disk_bytes", "gauge", "Of the disk on which the process keeps its files.")
NET_SENT = metric("zml_net_sent_bytes_total", "counter", "Bytes of messages that left.", ("kind",))
NET_RECEIVED = metric("zml_net_received_bytes_total", "counter", "Bytes of messages that came.", ("kind",))

# -- a worker ----------------------------------------------------------------------------------------------------

_W: tuple[Role, ...] = ("worker",)
STEPS = metric("zml_worker_steps_total", "counter", "Steps that its scripts have finished.", ("worker",), _W)
SAMPLES = metric("zml_worker_samples_total", "counter", "Samples in them.", ("worker",), _W)
LEFT_OUT = metric(
    "zml_worker_left_out_steps_total", "counter", "Steps whose gradient was not finite.", ("worker",), _W
)
STEP_TIME = metric(
    "zml_worker_step_duration_seconds", "histogram", "How long steps take.", ("worker",), _W, STEP_BOUNDS_S
)
PHASE = metric(
    "zml_worker_phase_seconds_total",
    "counter",
    "Where the time goes: data, compute, encode, wait and apply add up to the training thread's time; "
    "push and pull run beside it.",
    ("worker", "phase"),
    _W,
)
STALENESS = metric(
    "zml_worker_staleness_steps",
    "histogram",
    "How many steps ahead of the slowest worker steps began.",
    ("worker",),
    _W,
    STALENESS_BOUNDS,
)
WORKER_SENT = metric(
    "zml_worker_sent_bytes_total", "counter", "Gradients, as they were sent.", ("worker",), _W
)
WORKER_RECEIVED = metric(
    "zml_worker_received_bytes_total", "counter", "Parameters, as they came.", ("worker",), _W
)
WORKER_DENSE_SENT = metric(
    "zml_worker_dense_sent_bytes_total",
    "counter",
    "The same gradients, were they sent whole.",
    ("worker",),
    _W,
)
WORKER_DENSE_RECEIVED = metric(
    "zml_worker_dense_received_bytes_total", "counter", "The same parameters, sent whole.", ("worker",), _W
)
LEARNING_RATE = metric("zml_worker_learning_rate", "gauge", "Of the first parameter group.", ("worker",), _W)
GPU_USED = metric("zml_gpu_utilization_ratio", "gauge", "How busy its GPU is.", ("worker",), _W)
GPU_MEMORY_USED = metric("zml_gpu_memory_used_bytes", "gauge", "Memory used on its GPU.", ("worker",), _W)
GPU_MEMORY = metric("zml_gpu_memory_bytes", "gauge", "Memory of its GPU.", ("worker",), _W)
GPU_POWER = metric("zml_gpu_power_watts", "gauge", "What its GPU draws.", ("worker",), _W)
RESTARTS = metric("zml_worker_restarts_total", "counter", "Scripts that were started again.", ("worker",), _W)

# -- a shard -----------------------------------------------------------------------------------------------------

_S: tuple[Role, ...] = ("shard",)
UPDATES = metric("zml_ps_updates_total", "counter", "Updates made to the parameters.", ("shard",), _S)
VERSION = metric("zml_ps_version", "gauge", "Of its newest chunk.", ("shard",), _S)
CHUNKS = metric("zml_ps_chunks", "gauge", "Chunks that live here.", ("shard",), _S)
PARAMETERS = metric("zml_ps_parameter_bytes", "gauge", "Of the parameters that live here.", ("shard",), _S)
OPTIMIZER = metric("zml_ps_optimizer_bytes", "gauge", "Of the optimizer's state.", ("shard",), _S)
PUSH_LOG = metric("zml_ps_push_log_bytes", "gauge", "Of the push log on disk.", ("shard",), _S)
PUSHES = metric(
    "zml_ps_pushes_total", "counter", "Pushes and commits, by what became of them.", ("shard", "result"), _S
)
PULLS = metric("zml_ps_pulls_total", "counter", "Pulls.", ("shard",), _S)
QUEUE = metric(
    "zml_ps_queue_depth", "gauge", "Pulls that wait, and pushes that are staged.", ("shard", "queue"), _S
)
APPLY = metric(
    "zml_ps_apply_duration_seconds", "histogram", "How long updates take.", ("shard",), _S, APPLY_BOUNDS_S
)
SHARD_SENT = metric("zml_ps_sent_bytes_total", "counter", "Parameters, as they were sent.", ("shard",), _S)
SHARD_RECEIVED = metric("zml_ps_received_bytes_total", "counter", "Gradients, as they came.", ("shard",), _S)
SHARD_DENSE_SENT = metric(
    "zml_ps_dense_sent_bytes_total", "counter", "The same parameters, were they sent whole.", ("shard",), _S
)
SHARD_DENSE_RECEIVED = metric(
    "zml_ps_dense_received_bytes_total", "counter", "The same gradients, sent whole.", ("shard",), _S
)

# -- the coordinator: of the whole job ---------------------------------------------------------------------------

_C: tuple[Role, ...] = ("coordinator", "hub")
_J = ("job_id",)
STATE = metric(
    "zml_job_state", "gauge", "1 for the state that the job is in, 0 for the others.", ("job_id", "state"), _C
)
VALUE = metric(
    "zml_train_value",
    "gauge",
    "What the script logs, mean over the workers; NaN where it is.",
    ("job_id", "name"),
    _C,
)
FINITE = metric(
    "zml_train_value_finite",
    "gauge",
    "1 where the value that the script logs is finite.",
    ("job_id", "name"),
    _C,
)
JOB_STEPS = metric("zml_job_steps", "gauge", "Steps of the worker that has made the most.", _J, _C)
JOB_SAMPLES = metric("zml_job_samples_total", "counter", "Samples that were trained on.", _J, _C)
JOB_RATE = metric("zml_job_samples_per_second", "gauge", "Over the last seconds.", _J, _C)
PROGRESS = metric("zml_job_progress_ratio", "gauge", "Share of the job that is done.", _J, _C)
ETA = metric("zml_job_remaining_seconds", "gauge", "Until it is done, at the pace of so far.", _J, _C)
EPOCH = metric("zml_data_epoch", "gauge", "The epoch that is open.", _J, _C)
EPOCH_PROGRESS = metric("zml_data_epoch_progress_ratio", "gauge", "Share of it that is committed.", _J, _C)
LEASED = metric("zml_data_leases_outstanding", "gauge", "Batches that workers hold.", _J, _C)
COMMITTED = metric(
    "zml_data_batches_committed", "gauge", "Batches of the open epoch that are applied.", _J, _C
)
SKIPPED = metric("zml_data_batches_skipped", "gauge", "Batches of the open epoch that are left out.", _J, _C)
REISSUED = metric(
    "zml_data_leases_reissued_total",
    "counter",
    "Batches that were dealt again when a worker was lost.",
    _J,
    _C,
)
SPREAD = metric("zml_job_staleness_steps", "gauge", "The largest seen lately.", _J, _C)
BOUND = metric(
    "zml_job_staleness_bound_steps", "gauge", "What it may be; +Inf where it is not bound.", _J, _C
)
RATE_FACTOR = metric(
    "zml_job_learning_rate_factor", "gauge", "What the shards multiply the script's rate with.", _J, _C
)
MEMBERS = metric(
    "zml_members", "gauge", "Members, by role and state.", ("job_id", "member_role", "state"), _C
)
WANTED = metric("zml_members_wanted", "gauge", "Members that were asked for.", ("job_id", "member_role"), _C)
HEARD = metric(
    "zml_member_heard_seconds",
    "gauge",
    "How long ago a member was heard that has not ended in order.",
    ("job_id", "member_role", "id"),
    _C,
)
LIVES = metric(
    "zml_member_incarnation", "gauge", "How often a member has started.", ("job_id", "member_role", "id"), _C
)
BOOTS = metric("zml_coordinator_boots", "gauge", "Processes that have been this job's coordinator.", _J, _C)
CHECKPOINT_AT = metric(
    "zml_checkpoint_last_success_timestamp_seconds", "gauge", "When the newest was complete.", _J, _C
)
CHECKPOINT_STEP = metric("zml_checkpoint_last_step", "gauge", "The step of the newest.", _J, _C)
CHECKPOINT_SIZE = metric(
    "zml_checkpoint_size_bytes", "gauge", "Of what the shards hold in the newest.", _J, _C
)
CHECKPOINT_TIME = metric(
    "zml_checkpoint_duration_seconds",
    "gauge",
    "Of the newest: held, that training stood still, and whole.",
    ("job_id", "phase"),
    _C,
)
CHECKPOINTS = metric(
    "zml_checkpoints_total", "counter", "Checkpoints, by how they ended.", ("job_id", "result"), _C
)

# -- a coordinator of many jobs ----------------------------------------------------------------------------------

_H: tuple[Role, ...] = ("hub",)
JOBS = metric("zml_cluster_jobs", "gauge", "Jobs, by state.", ("state",), _H)
NODES = metric("zml_cluster_nodes", "gauge", "Nodes, by state.", ("state",), _H)
GPUS = metric("zml_cluster_gpus", "gauge", "GPUs of the nodes, used and free.", ("state",), _H)
CPUS = metric("zml_cluster_cpus", "gauge", "Processors of the nodes, used and free.", ("state",), _H)
