"""The dashboards that say how the processes and machines do: Runtime, and of many jobs the Cluster."""

from __future__ import annotations

from ..metrics import catalog as c
from .panels import ALL, Dashboard, Panel, Query, Row, unit
from .training import DATA, OVERVIEW, SHARDS, WORKERS

M = ("role", "member")
ID = ("member_role", "id")

UP = Panel(
    number=401, title="Processes that answer", least=0, most=1, steps=((0, "red"), (1, "green")),
    says="1: Prometheus got its metrics. 0: it did not; the process hangs, is gone, or a firewall is between.",
    queries=(
        Query('min by (role, member) (up{role!="", member!="", job_id=~"${job:regex}|"})', "{{role}} {{member}}"),
    ),
)  # fmt: skip
HEARD = Panel(
    number=402, title="Heard by the coordinator", unit=unit(c.HEARD), least=0, says=c.HEARD.help,
    queries=(Query(ALL.max(c.HEARD, ID), "{{id}}"),),
)  # fmt: skip
STARTS = Panel(
    number=403, title="Starts", least=0,
    says="How often a member has started, and how many processes have been the coordinator. Each step up is a restart.",
    queries=(
        Query(ALL.max(c.LIVES, ID), "{{id}}"),
        Query(ALL.max(c.BOOTS), "coordinator"),
    ),
)  # fmt: skip
LAG = Panel(
    number=404, title="Event loops: p99 of how late they woke", unit="s", least=0, steps=((0, "green"), (0.1, "red")),
    says="A loop that wakes late answers late: heartbeats, too. Long: too little processor time, or swapping.",
    queries=(Query(ALL.quantile(0.99, c.LAG, M), "{{role}} {{member}}"),),
)  # fmt: skip
LAG_HEAT = Panel(
    number=405, title="Event loops: how late they woke", kind="heat", unit="s", says="All processes together.",
    queries=(Query(ALL.increase(c.LAG, ("le",), "_bucket"), "{{le}}"),),
)  # fmt: skip
LINES = Panel(
    number=406, title="Warnings and errors in the logs", least=0,
    says="Lines per second. `zml logs --level warning` shows them.",
    queries=(Query(ALL.rate(c.LINES, ("role", "member", "level"), level="=~warning|error|critical"),
                   "{{member}} {{level}}"),),
)  # fmt: skip
ALL_LINES = Panel(
    number=407, title="Log lines", least=0, says="Per second, by level.",
    queries=(Query(ALL.rate(c.LINES, ("level",)), "{{level}}"),),
)  # fmt: skip
MEMORY = Panel(
    number=408, title="Memory", unit=unit(c.MEMORY), least=0, says=c.MEMORY.help,
    queries=(Query(ALL.sum(c.MEMORY, M), "{{role}} {{member}}"),),
)  # fmt: skip
CPU = Panel(
    number=409, title="Processor", unit=unit(c.CPU, rate=True), least=0, says="100 % is one core.",
    queries=(Query(ALL.rate(c.CPU, M), "{{role}} {{member}}"),),
)  # fmt: skip
FILES = Panel(
    number=410, title="Open files and sockets", least=0,
    says="What only grows is a leak, and ends at `ulimit -n`.",
    queries=(Query(ALL.sum(c.FILES, M), "{{role}} {{member}}"),),
)  # fmt: skip
DISK = Panel(
    number=411, title="Disk: free", unit="percentunit", least=0, most=1, steps=((0, "red"), (0.05, "green")),
    says="Where a process keeps its files: logs, push logs, checkpoints. A full disk costs checkpoints first.",
    queries=(Query(f"min by (role, member, node) ({ALL.of(c.DISK_FREE)} / {ALL.of(c.DISK)})",
                   "{{node}} {{role}} {{member}}"),),
)  # fmt: skip
DISK_BYTES = Panel(
    number=412, title="Disk: free bytes", unit=unit(c.DISK_FREE), least=0, says=c.DISK_FREE.help,
    queries=(Query(f"min by (node) ({ALL.of(c.DISK_FREE)})", "{{node}}"),),
)  # fmt: skip
NET = Panel(
    number=413, title="Bytes of messages, by kind", unit=unit(c.NET_SENT, rate=True), least=0,
    says="What left and what came, of all processes: gradients and parameters should outweigh the rest by far.",
    queries=(
        Query(ALL.rate(c.NET_SENT, ("kind",)), "{{kind}} sent"),
        Query(ALL.rate(c.NET_RECEIVED, ("kind",)), "{{kind}} received"),
    ),
)  # fmt: skip
UPTIME = Panel(
    number=414, title="Running since", kind="table", width=8, key="member",
    says="Seconds since each process began.",
    queries=(Query(f"time() - max by (member) ({ALL.of(c.UPTIME)})", "for"),), columns=(("for", "s"),),
)  # fmt: skip
BUILD = Panel(
    number=415, title="Versions", width=8, least=0,
    says="Processes by version. More than one line: not all machines have the same.",
    queries=(Query(f"count by (version, python, torch) ({ALL.of(c.BUILD)})",
                   "zml {{version}}, python {{python}}, torch {{torch}}"),),
)  # fmt: skip

RUNTIME = Dashboard(
    "zml-runtime",
    "zml: Runtime",
    "How its processes do, whatever they compute.",
    (
        Row("Alive", (UP, HEARD, STARTS)),
        Row("Loops and logs", (LAG, LAG_HEAT, LINES)),
        Row("Resources", (MEMORY, CPU, FILES, DISK, DISK_BYTES, BUILD)),
        Row("Messages", (NET, UPTIME, ALL_LINES)),
    ),
)

# -- a coordinator of many jobs ----------------------------------------------------------------------------------

JOBS = Panel(
    number=501, title="Jobs", kind="stack", width=12, least=0,
    says="By state. Many that are queued while GPUs are free: `zml explain JOB` says why one waits.",
    queries=(Query(ALL.sum(c.JOBS, ("state",)), "{{state}}"),),
)  # fmt: skip
NODES = Panel(
    number=502, title="Nodes", kind="stack", width=12, least=0, says=c.NODES.help,
    queries=(Query(ALL.sum(c.NODES, ("state",)), "{{state}}"),),
)  # fmt: skip
GPUS = Panel(
    number=503, title="GPUs", kind="stack", width=12, least=0, says=c.GPUS.help,
    queries=(Query(ALL.sum(c.GPUS, ("state",)), "{{state}}"),),
)  # fmt: skip
CPUS = Panel(
    number=504, title="Processors", kind="stack", width=12, least=0, says=c.CPUS.help,
    queries=(Query(ALL.sum(c.CPUS, ("state",)), "{{state}}"),),
)  # fmt: skip
EACH = Panel(
    number=505, title="Running jobs", kind="table", width=24, height=10, key="job_id",
    says="All of them, the slowest last.",
    queries=(
        Query("max by (job_id) (zml_job_samples_per_second)", "samples/s"),
        Query("max by (job_id) (zml_job_progress_ratio)", "done"),
        Query("max by (job_id) (zml_job_remaining_seconds)", "remaining"),
        Query('sum by (job_id) (zml_members{member_role="worker", state=~"joined|active"})', "workers"),
    ),
    columns=(("samples/s", "short"), ("done", "percentunit"), ("remaining", "s"), ("workers", "short")),
)  # fmt: skip

CLUSTER = Dashboard(
    "zml-cluster",
    "zml: Cluster",
    "Of a coordinator with many jobs: what they wait for, and what the machines do.",
    (Row("Machines", (JOBS, NODES, GPUS, CPUS)), Row("Jobs", (EACH,))),
    (),
)

DASHBOARDS = (OVERVIEW, WORKERS, SHARDS, DATA, RUNTIME, CLUSTER)
