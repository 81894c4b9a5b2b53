"""Errors that people read: what happened, to whom, what to do. Each has a stable code that `zml explain` tells more of.

The first digit of a code says where: 1 usage and configuration, 2 forming and keeping a cluster, 3 data,
4 files, 5 the user's script. A code is never given a second meaning. Each page says what the matter is, what zml did
about it, and what a person is to do. tests/zml/test_help.py holds that every code is raised, and every one raised is
here.
"""

import signal
from dataclasses import dataclass

INTERRUPTED = 130  # what a command ends with after Ctrl-C
EX_TEMPFAIL = 75  # and where it has left in order: safe to run again


def ended_by(name: str) -> int:
    """What a process ends with that a signal of this name has ended, as of shells: 130 by Ctrl-C, 143 by SIGTERM."""
    return 128 + signal.Signals[name]


@dataclass(frozen=True, slots=True)
class Entry:
    """One page of the error book. `explanation` is the cause and what zml did, `do` what a person can do about it.
    `exit_code` is what a command ends with when this error ends it."""

    title: str
    explanation: str
    exit_code: int = 1
    do: str = ""


BOOK: dict[str, Entry] = {}


def page(code: str, title: str, explanation: str, do: str = "", *, exit_code: int = 1) -> str:
    """Enter one error in the book; returns the code, so that a module can name its errors at its head."""
    assert code not in BOOK, f"{code} is taken"
    BOOK[code] = Entry(title, " ".join(explanation.split()), exit_code, " ".join(do.split()))
    return code


class ZmlError(Exception):
    """An error for a person. `fix` is one sentence that begins with a verb; it may be empty."""

    def __init__(self, code: str, what: str, fix: str = "") -> None:
        super().__init__(what)
        assert code in BOOK, f"{code} is not in the error book"
        self.code = code
        self.what = what
        self.fix = fix

    @property
    def exit_code(self) -> int:
        return BOOK[self.code].exit_code

    def __str__(self) -> str:
        fix = f"\n  {self.fix}" if self.fix else ""
        return f"{self.code}: {self.what}{fix}"


# Exit codes: 0 done, 1 the script failed, 2 usage, 3 configuration, 4 no cluster, 5 data or files,
# 75 saved and safe to run again, 130 Ctrl-C, 143 SIGTERM.
USAGE = page(
    "ZML-E101",
    "the command line is not usable",
    """A flag, an argument or their combination is wrong; the message names it. Nothing was started and
    nothing changed.""",
    """Read the second line of the message: it names the nearest command, flag, run or member. `zml COMMAND
    --help` lists what there is.""",
    exit_code=2,
)
CONFIG = page(
    "ZML-E102",
    "the configuration is not usable",
    """zml.toml or a ZML_* variable has an unknown key, a value of the wrong kind, or two settings
    contradict each other. Nothing was started: a setting that is silently ignored costs a night of
    training.""",
    """Correct the key that the message names, in the file or variable that it names. `zml config show`
    lists every setting, its value and where it comes from.""",
    exit_code=3,
)
NO_SCRIPT = page(
    "ZML-E103",
    "the script was not found",
    """The path is taken relative to the folder in which the command was given. A coordinator passes it on
    to the workers as it is, so on several machines it has to lead to the script on each.""",
    """Check the path. Where the machines see no common folder, give the script to each `zml worker` itself,
    or submit the folder with `zml submit --archive`.""",
    exit_code=2,
)
NO_GPU = page(
    "ZML-E104",
    "there is no such GPU",
    """`zml worker --gpu K` uses one GPU, counted from 0 as nvidia-smi does. The message lists those that
    are here; none is listed either where nvidia-smi is missing or cannot reach the driver.""",
    """Choose one of these, or --cpu. `zml doctor` says whether the driver works, and whether torch is built
    for it.""",
    exit_code=2,
)
NO_TRACES = page(
    "ZML-E105",
    "traces are asked for and cannot be made here",
    """The setting `trace`, or an OTEL_EXPORTER_OTLP_ENDPOINT in the environment, turns tracing on. It needs the extra
    `otel` (OpenTelemetry's SDK and its exporter for OTLP over HTTP) in every process' environment, and variables that
    name a receiver of that protocol, mostly at port 4318.""",
    "Install zml-train[otel] where the message says that it is missing; `zml run --trace off` trains without traces.",
    exit_code=3,
)
TRACKER = page(
    "ZML-E131",
    "a tracker cannot be used",
    """Trackers are named in the setting `trackers`, or with --tracker: tensorboard, wandb, mlflow, or a class of one's
    own as package.module:Class. One that is named must be there when the run begins; the message says what it lacks.
    What a tracker does wrong later costs its values, and never the run.""",
    "Install what it lacks, or leave it out of `trackers` in zml.toml.",
    exit_code=3,
)
PORT_IN_USE = page(
    "ZML-E201",
    "the address is in use",
    "Another process listens there; often it is an older coordinator that still runs.",
    """End that process (`ss -ltnp` shows it), choose another port with --bind, or port 0 to let the
    operating system choose.""",
    exit_code=4,
)
UNREACHABLE = page(
    "ZML-E202",
    "the coordinator did not answer",
    """Nothing answers at this address, or what answers is another coordinator than the one that is meant, or does not
    accept this member's key. A member has tried until join_timeout_s was over, and then ended.""",
    """Check that the coordinator runs, that address and port are right (coordinator.json in the run
    directory has them) and not closed by a firewall, and that both sides use --keys of one cluster.""",
    exit_code=4,
)
OPEN_BIND = page(
    "ZML-E203",
    "an address beyond this machine needs keys",
    """Without keys anybody who reaches the port could join the job, read its parameters and change them.
    zml did not listen.""",
    """Make keys with `zml keys FOLDER`, and give --keys FOLDER to every role. On one machine, listen on
    127.0.0.1.""",
    exit_code=3,
)
FENCED = page(
    "ZML-E204",
    "this member was fenced",
    """The coordinator did not hear from it for the length of its lease, or a newer process took its place.
    What it still sends is refused, so that nothing counts twice; its batches went to other workers, and
    training went on.""",
    """Nothing, if it has joined again: a worker does so by itself, worker_restarts times an hour. If it
    happens again and again, the machine is frozen or cut off for longer than lease_s: `zml doctor
    --cluster` looks at its link, and lease_s may be set higher.""",
)
LOST = page(
    "ZML-E205",
    "a process that is needed no longer answers",
    """The message says which process, and for how long it was waited for. What shards had acknowledged is
    in their push logs, and comes back with them.""",
    """Look at the end of its log in logs/ of the run directory. `zml stack MEMBER` says in which line it
    is, if it still runs; started again with the same --run-dir, a coordinator or a shard goes on where
    it was.""",
    exit_code=4,
)
REFUSED = page(
    "ZML-E206",
    "a request was refused",
    "The other side understood the request and said no. Nothing has changed.",
    """The message says why; look at `zml status`, or at `zml job show` for a job of a cluster, for the
    state that forbids it.""",
    exit_code=4,
)
BAD_KEYS = page(
    "ZML-E207",
    "the keys are not usable",
    """A key file is missing, damaged, or readable by others; secret keys must have mode 0600. The process
    did not start without them.""",
    """`chmod 600` the file that is named if only its mode is wrong. Else make a new set with `zml keys
    FOLDER` and copy it to every machine.""",
    exit_code=3,
)
NOT_FORMED = page(
    "ZML-E208",
    "the cluster did not form",
    """A process that was asked for did not start, or did not reach the coordinator in time. Everything that
    had started was ended again.""",
    """The message names the process; the end of its log in logs/ says why. Where it is only slow, set
    join_timeout_s higher. `zml doctor` on that machine finds what it lacks.""",
    exit_code=4,
)
LOG_DAMAGED = page(
    "ZML-E209",
    "a shard cannot use its push log",
    """What a shard takes it first writes to its push log (`state/pN` in the run directory), so that it can
    be started again with nothing lost. The log cannot be read or written; the message names the file
    and the place. A torn end, as a dying process leaves it, is no damage.""",
    """Make room or mend the permissions if the file cannot be written. If it is damaged, `zml resume RUN`
    goes on from the newest checkpoint.""",
    exit_code=4,
)
NO_TOKEN = page(
    "ZML-E221",
    "the API lets nobody in without a token",
    """Beyond loopback the HTTP API answers only requests that carry a token: `Authorization: Bearer TOKEN`.
    The server reads its tokens from a file of mode 0600 with a line for each, USER TOKEN, and an
    `admin` behind it for those who may change the jobs of others.""",
    """Give commands the file with yours: --token FILE, or ZML_TOKEN. `openssl rand -hex 32` makes a token;
    the server's file is named with --tokens.""",
    exit_code=3,
)
NO_JOB = page(
    "ZML-E222",
    "there is no such job",
    "The coordinator knows no job of this name, or no output of that name in the job.",
    """`zml jobs` lists the jobs that are not over, `zml jobs --all` also those that are, as long as they
    are kept.""",
    exit_code=2,
)
BAD_JOB = page(
    "ZML-E223",
    "the job cannot be taken as it is described",
    """A key of job.toml, a flag or a field of the request is unknown, has a value that means nothing, or
    contradicts another. Nothing was submitted.""",
    """Correct what the message names. `zml submit --help` lists the flags; the keys of job.toml have the
    same names.""",
    exit_code=2,
)
ARCHIVE = page(
    "ZML-E224",
    "the folder cannot be sent, or what was sent cannot be used",
    """`zml submit --archive` packs the folder of the script, but for what .gitignore names: code, not data.
    It is refused where it is large. What arrives is unpacked only if its checksum is right and it holds
    nothing but files, folders and links within itself.""",
    """Put the large files that the message names into .gitignore and let the script read them from where
    all nodes see them; or submit without --archive, from a folder that all nodes see.""",
    exit_code=5,
)
NOT_ALLOWED = page(
    "ZML-E225",
    "the API refused a request",
    """Where tokens name users, a job is changed by whom it belongs to, or by an admin. On loopback,
    requests are refused whose Host is not this machine or that a web page of another origin made: a
    browser is not to be led here.""",
    """Use the token of the job's owner or of an admin. From another machine, use its real address and a
    token instead of a forwarded port under another name.""",
    exit_code=4,
)
SLURM = page(
    "ZML-E231",
    "Slurm refuses, or is not here",
    """`zml slurm` works through Slurm's own commands: sbatch, srun, scontrol, squeue and scancel. One of
    them is not on the PATH, said no, or did not answer; the message has its words.""",
    """Run it on a login node, and correct what Slurm names: partition, account, time, memory. `sinfo` lists
    the partitions.""",
    exit_code=4,
)
ALLOCATION = page(
    "ZML-E232",
    "the allocation cannot run the job",
    """Every node has to see the run directory, which is below --runs, and to reach the first node, where
    the coordinator is. The message names the node and what it lacks.""",
    """Choose a folder on a file system that all nodes share with --runs, and the network with --interface.
    `srun zml doctor` looks at each node.""",
    exit_code=4,
)
NO_STACK = page(
    "ZML-E241",
    "it cannot be seen where a process is",
    """`zml stack` looks with py-spy, which needs the right to trace, or has the process itself write where
    it is, which scripts, shards and coordinators that zml has started do on a signal. Neither was
    possible; the message says why. The process was not touched.""",
    """Install py-spy with `pip install 'zml-train[debug]'`. In a container add --cap-add SYS_PTRACE,
    elsewhere run it as root or the same user. For a process of another machine, run `zml stack` there.""",
    exit_code=4,
)
LOADER = page(
    "ZML-E301",
    "this loader cannot be divided over workers",
    """zml divides map-style data sets by the order that their sampler draws. It knows torch's own samplers
    (sequential, random, subset, weighted); for others the order would differ between workers, and
    samples be lost or doubled.""",
    """Use one of these samplers. A stream (IterableDataset) is divided where it has state_dict() and
    load_state_dict(state), with zml.join(..., batches=1000), and by best effort where it has a method
    zml_shard(index, count): zml.join(..., batches=1000, data="best effort").""",
)
EPOCH_DIFFERS = page(
    "ZML-E302",
    "the workers disagree about an epoch",
    """Every worker must see the same data set, batch size and drop_last, or batches have no common meaning.
    The worker that differs was stopped before it took a batch.""",
    """Compare the data and the arguments on the machine that the message names with the others: a file that
    is missing or half copied is the usual cause.""",
    exit_code=5,
)
BAD_BATCH = page(
    "ZML-E303",
    "a batch has crashed several scripts",
    """The scripts of several workers ended by a signal or an exception while they had this batch in hand,
    the last one with no other. The job was stopped rather than leave samples out silently; the message
    names them, by their index in the data set.""",
    """Look at these samples. To go on without such batches, use --on-bad-batch skip; `zml data audit` then
    says which were left out.""",
    exit_code=5,
)
EVALUATION = page(
    "ZML-E304",
    "this evaluation cannot be divided over workers",
    """zml.evaluate divides the batches of a sequential DataLoader, and adds up what the function returns
    for each: a dict of at most 32 names with floats or tensors of one element.""",
    """Return sums, and divide after zml.evaluate. Let every worker see the same data set and batch size,
    and make the same evaluations after each epoch.""",
    exit_code=5,
)
BAD_CHECKPOINT = page(
    "ZML-E401",
    "a checkpoint is not usable",
    """A checkpoint counts only if its manifest and every file that it lists verify, byte for byte. The
    message names the file and what is wrong with it. It was not used, not even in part.""",
    """Take an older one: `zml ckpt verify RUN` reads every byte of all of them and says which are whole.""",
    exit_code=5,
)
NO_CHECKPOINT = page(
    "ZML-E402",
    "there is no usable checkpoint",
    """None of the run's checkpoints verifies, or it has none. The message says what was skipped and why.""",
    """Start anew with `zml run`. --checkpoint-minutes and --checkpoint-steps say how often one is taken.""",
    exit_code=5,
)
DISK_FULL = page(
    "ZML-E403",
    "the disk is full",
    """A checkpoint or an export needs more room than there is, and what was begun of it is removed again;
    the checkpoints before it are as they were, and training goes on.""",
    """Make room: `zml ckpt prune` deletes old checkpoints, and never the last that verifies. --keep-last
    says how many stay.""",
    exit_code=5,
)
NOT_WRITTEN = page(
    "ZML-E404",
    "a checkpoint or an export could not be written",
    """The file system refused it, for the reason given. What was begun is removed again; the checkpoints
    before it are as they were.""",
    """Mend what the reason names (permissions, a quota, a file system that is read-only or gone), or write
    elsewhere with --run-dir.""",
    exit_code=5,
)
RUN_FILES = page(
    "ZML-E405",
    "a file of the run is damaged",
    """What the run has written down cannot be read back: the disk was full, or the file was changed. The
    message names the file and the place; nothing was changed in it.""",
    """Take the file from a copy if there is one. Training and resuming do not need it: what they need is in
    state/ and checkpoints/.""",
    exit_code=5,
)
JOURNAL = page(
    "ZML-E411",
    "the coordinator's journal cannot be used",
    """The coordinator writes down what it decides before it says it, in state/coordinator of the run
    directory, and a new one goes on from there. Every record and snapshot has a checksum; the message
    names the file and the place that do not fit. Nothing behind such a place can be believed, so the
    coordinator does not begin.""",
    """Go on from the newest checkpoint with `zml resume RUN`. Or move the folder away: the job in this run
    directory begins anew then, and parameters that were saved are where they were.""",
    exit_code=5,
)
HELD = page(
    "ZML-E412",
    "another coordinator goes on with this job",
    """Two coordinators with one journal would give every batch out twice. The message names the process
    that holds the folder; the lock ends with that process.""",
    """Use the one that runs, or end it first. On NFS, locks work between machines from version 4 on, and
    not with the option nolock.""",
    exit_code=4,
)
LOG_HELD = page(
    "ZML-E413",
    "another process is this shard",
    """What a shard has taken is in one push log, `state/pN` of the run directory, and two processes that
    write to it would lose pushes. The lock ends with the process that the message names.""",
    "Use the one that runs, or end it first; or give this one another number with --shard.",
    exit_code=4,
)
BAD_TRACE = page(
    "ZML-E421",
    "a workload or the measurements of a model cannot be read",
    """zml simulate reads workloads in the format of the Pollux artifact (name, time, application,
    num_replicas, batch_size) or of the Philly trace (timestamp, duration, num_gpus), and a folder of
    measurements per model. File, and line where there is one, are named.""",
    "Correct that line. What is needed of each is in `zml simulate --help`.",
    exit_code=5,
)
NO_MATPLOTLIB = page(
    "ZML-E422",
    "matplotlib is not installed, so there is nothing to draw with",
    "Only plots need matplotlib; tables and --json need nothing further.",
    "Install it with `pip install 'zml-train[bench]'`, or leave the plot out.",
    exit_code=2,
)
NOT_JOINED = page(
    "ZML-E501",
    "the script has not joined",
    "`zml.epochs`, `zml.log` and `zml.save` speak of the model that `zml.join` was given.",
    "Call `train = zml.join(model, optimizer, train)` before them, and once.",
)
NOT_FINITE = page(
    "ZML-E502",
    "a gradient is not finite",
    """NaN or Inf in one gradient would reach every worker and could not be taken back, so the step is
    refused and the script stopped before anything is sent. The parameters of the other workers are as
    they were.""",
    """Look at the loss and the learning rate of the steps before; gradient clipping, warm-up and a lower
    rate help. If single batches are bad, --on-bad-batch skip leaves them out.""",
)
CLOSURE = page(
    "ZML-E503",
    "optimizer.step(closure) cannot be distributed",
    """An optimizer that evaluates the model inside its step (LBFGS) needs the updated parameters before the
    shards have made them.""",
    """Use SGD, Adam, AdamW, Adagrad or RMSprop without a closure: loss.backward(), then optimizer.step().""",
)
LAYOUT_DIFFERS = page(
    "ZML-E504",
    "the workers disagree about the model",
    """Every worker must build the same model and optimizer: same names, shapes, order and parameter groups.
    The worker that differs was stopped before it sent a gradient.""",
    """Compare the script, its arguments and the version of torch on that machine with the others: `zml
    doctor --cluster` lists versions that differ.""",
)
NOT_A_NUMBER = page(
    "ZML-E505",
    "zml.log got something that is not a number",
    """What is logged is averaged over steps and workers, so it must be a float or a tensor with exactly one
    element.""",
    "Give the value that the message names as a number: loss.mean(), len(x), float(x).",
)
SHOWN = page(
    "ZML-E506",
    "the model shows the published parameters, and cannot be trained",
    """Inside of `with zml.published():` the model holds what the whole job has learned, not what this worker
    goes on with. A step, zml.save or zml.evaluate there would lose what this worker has not sent yet, and gradients
    that were computed there are not those of the model that makes the next step.""",
    "Only look at the model there: leave the `with` block first. zml.save and zml.evaluate need no such block.",
)
NEVER_JOINED = page(
    "ZML-E507",
    "no script called zml.join",
    """A script that does not call zml.join runs as it would without zml: each worker has done the same, from its first
    line to its last, and the shards held nothing. zml shows what the first worker prints, so that this looks like one
    training. The scripts ended well, and so did the job.""",
    """Call `train = zml.join(model, optimizer, train)` before the loop, on every path that leads to it. A script that
    is not to train with others needs no `zml run`.""",
    exit_code=0,
)
WRAPPED = page(
    "ZML-E511",
    "the model is wrapped for another kind of distribution",
    """DistributedDataParallel, FSDP and DataParallel exchange gradients themselves. zml takes the plain
    module and does that through hooks.""",
    "Leave the wrapper and init_process_group out, and give zml.join the model itself.",
)
OPTIMIZER = page(
    "ZML-E512",
    "this optimizer cannot run on the shards",
    """The shards rebuild the optimizer from its class name and its numbers, never from a pickle. They know
    SGD, Adam, AdamW, Adagrad and RMSprop of torch.optim, not subclasses of them, whose code the shards
    do not have.""",
    "Use one of these, or let the workers run yours: --optimizer-on worker.",
)
NOT_HELD = page(
    "ZML-E513",
    "a parameter has no optimizer",
    """A parameter with requires_grad that no group of the optimizer holds would never be trained: rarely
    meant. zml.join takes one optimizer, so that a parameter which a second one holds is refused, too.""",
    """Give it to the optimizer, or freeze it with requires_grad_(False) before zml.join. What a
    second optimizer would hold goes into a param group of the first.""",
)
FOREIGN = page(
    "ZML-E514",
    "the optimizer holds a parameter that the model does not have",
    """The optimizer was made for another model, or before the model was changed (a copy, a new head, load
    with assign).""",
    "Make the optimizer last, from the parameters of the very model that zml.join gets.",
)
TENSOR = page(
    "ZML-E515",
    "a parameter cannot be trained by zml",
    """Parameters are dense tensors of float16, bfloat16, float32 or float64 that exist in memory. Complex,
    integer, sparse, sharded (DTensor), lazy and meta parameters, and sparse gradients, are refused by
    name.""",
    """Initialise or convert the parameter that is named before zml.join; for embeddings leave sparse=True
    out.""",
)
EMPTY_MODEL = page(
    "ZML-E516",
    "the model has no parameters",
    "There is nothing to train in the model given to zml.join.",
    """Assign the layers as attributes of the module, or in nn.ModuleList: torch does not see those in a
    plain list.""",
)
STEPPED = page(
    "ZML-E517",
    "the optimizer has already made steps",
    """Momentum and moments that the optimizer holds before zml.join stay on this worker: the shards would
    begin without them, and the loss would jump without a word.""",
    "Join before the first step. To go on from a run of zml, use `zml resume`.",
)
