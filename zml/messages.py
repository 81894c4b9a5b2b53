"""Every message of the system, one frozen struct each: the language of the three roles on two screens.

A message travels as a msgpack map in the header frame (at most 4 KB); what does not fit there, and every
tensor, is the payload. Shapes and dtypes never travel: they come from the registered layout.
Read from top to bottom this is the life of a job. `worker` and `shard` are member ids ("w0", "p1"),
`incarnation` says how often that id has started, and every message of a job names the job.
"""

from typing import ClassVar, Literal

import msgspec

from .figures import ShardFigures, WorkerFigures
from .noise import Estimate
from .rates import Course, Rule, Scaling


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """A message; its tag on the wire is the name of its class."""


class Ok(Message):
    """Done, or already done: twice is the same as once."""


# -- any member -> coordinator: joining, staying, leaving ----------------------------------------------


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for. `staleness` is the bound s: 0 is BSP, None is asynchronous."""

    script: str = ""
    args: list[str] = []
    folder: str = ""
    workers: int = 1
    shards: int = 1
    replicas: int = 0  # backups of each shard
    staleness: int | None = 0
    compress: str = "none"  # as `compression.parse` reads it
    optimizer_on: Literal["auto", "shard", "worker"] = "auto"
    local_steps: int = 1  # optimizer steps between two exchanges
    outer_lr: float = 0.0  # of the shards' rule, where the optimizer runs on the workers; 0: what suits it
    outer_momentum: float = 0.0  # Nesterov
    residual_decay: float = 1.0  # of what topk has left waiting, from one exchange to the next
    warm_up_steps: int = -1  # over which the density falls to what was asked for; -1: what suits it
    on_bad_batch: Literal["stop", "skip"] = "stop"  # that crashes scripts, or has no finite gradient
    bad_batch_kills: int = 2  # crashes that condemn a batch
    lr_scaling: Scaling = "none"  # of the learning rate, with the number of workers
    lr_base_workers: int = 0  # that it is meant for; 0: as many as were asked for
    lr_warm_up_steps: int = 0  # updates over which the rate grows when workers have come
    staleness_damping: bool = False

    @property
    def rates(self) -> Rule:
        """How learning rates follow workers and staleness."""
        base = self.lr_base_workers or self.workers
        return Rule(self.lr_scaling, base, self.lr_warm_up_steps, self.staleness_damping)

    @property
    def mode(self) -> str:
        """The consistency in words."""
        if self.staleness is None:
            return "async"
        return "sync" if self.staleness == 0 else f"staleness {self.staleness}"


class Join(Message, kw_only=True):
    """An agent or a shard asks to be a member. `member` is empty where the coordinator may choose the id."""

    job: str
    role: Literal["worker", "shard"]
    member: str = ""
    node: str
    pid: int
    former: int = 0  # the incarnation of `member` that this process was before
    addresses: list[str] = []  # where a shard takes pushes
    device: str = "cpu"
    metrics: str = ""  # http://HOST:PORT of this process's /metrics


class Joined(Message, kw_only=True):
    """What was asked for is in the payload, a `JobSpec`: a script's arguments may be many."""

    job: str
    member: str
    incarnation: int
    generation: int
    heartbeat_s: float
    lease_s: float
    run_dir: str
    every_s: float = 0.0  # between two heartbeats to begin with, where there are thousands (0: `heartbeat_s`)
    serves: list[tuple[str, int, str]] = []  # by a shard's process: shards, which homes these are, their logs


class Heartbeat(Message):
    """A notice: I am alive, and say so again in `every_s` (0: in what `Joined` said). Renews the lease, which is longer
    in the same proportion; answered by a `Pulse`."""

    job: str
    member: str
    incarnation: int
    every_s: float = 0.0


class Pulse(Message):
    """A notice: the coordinator is alive too, and this is the generation of the job. It wants a heartbeat `every_s` (0:
    as `Joined` said)."""

    job: str
    generation: int
    every_s: float = 0.0


class Returned(Message):
    """A shard has read its push log, or a promoted backup is ready; it lives in this member's process, at `addresses`
    (empty: the member's own). `holds` is the digest of the layout whose chunks it has, or empty."""

    job: str
    member: str
    incarnation: int
    holds: str
    shard: str
    addresses: list[str]


class Vacate(Message):
    """A shard's process is to leave: may it, without being missed? Answered by `Vacated`, or by `Wait` while what it
    has is on the way to others."""

    job: str
    member: str
    incarnation: int
    because: str


class Vacated(Message):
    job: str
    handed_over: bool  # or there is nobody who could take what it has


class Standing(Message, kw_only=True):
    """From now on the backup has all that is acknowledged (`ready`), or: may the shard acknowledge what it lacks?
    Refused where the shard lives elsewhere by now, which then may not acknowledge anything."""

    job: str
    member: str
    incarnation: int
    shard: str
    home: int
    copy: int
    ready: bool
    host: str
    host_incarnation: int
    because: str = ""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a script ended: enough to print the user's own frame, and no local variables."""

    kind: str  # the exception's class, or a signal's name
    text: str = ""
    file: str = ""
    line: int = 0
    source: list[str] = []  # a few lines around `line`
    first_source_line: int = 0
    step: int = -1  # the worker's clock, -1 before the first step
    batch: str = ""  # what was in hand, in words
    log: str = ""
    at: float = 0.0  # seconds since the Unix epoch, to find the first failure


class Exited(Message, kw_only=True):
    """The script of this worker ended: with an exit code, or by a signal."""

    job: str
    member: str
    incarnation: int
    code: int = 0
    signal: int = 0
    failure: Failure | None = None
    returns: bool = False  # its agent starts it again, as the next incarnation
    # An epoch, and how many batches of it the script had begun; None: not known.
    begun: tuple[int, int] | None = None


class Leave(Message):
    """An orderly goodbye: nothing of this member is in flight."""

    job: str
    member: str
    incarnation: int
    because: str


# -- coordinator -> agent and shard: orders --------------------------------------------------------------


class Launch(Message):
    """To an agent: start the script as this worker."""

    job: str
    member: str
    incarnation: int


class Stop(Message):
    """To an agent or a shard: end. An agent gives the script `grace_s` seconds."""

    job: str
    because: str
    grace_s: float = 5.0


class Fenced(Message):
    """To an agent: this incarnation is over; what it still sends is refused."""

    job: str
    member: str
    incarnation: int
    because: str


class Pair(Message):
    """To a shard: keep a copy of yourself in this process, whenever it was lost. Without `addresses`: it is gone.

    The one with the highest `number` counts.
    """

    job: str
    shard: str
    incarnation: int
    number: int
    host: str
    host_incarnation: int
    addresses: list[str]


class Promote(Message):
    """To the process that keeps a backup: it is the shard from now on. `log` names the very copy that is meant."""

    job: str
    shard: str
    incarnation: int
    log: str


class Adopt(Message):
    """To a process that may see the log of one that is gone: read it, and be the shard from now on.

    `empty`: it holds nothing, and is as good without its log.
    """

    job: str
    shard: str
    incarnation: int
    log: str
    empty: bool = False


class Retire(Message):
    """To every other process: this shard serves in its home of this number, and its newest copy is this. What you have
    of it that is older is of no use."""

    job: str
    shard: str
    incarnation: int
    copy: int = 0


class Seat(msgspec.Struct, frozen=True, array_like=True):
    """One active worker of a generation. A founder is waited for from clock 0 on."""

    worker: str
    incarnation: int
    founder: bool


class Settle(Message):
    """To every shard: this worker is lost. Take nothing more from it, and say where it stands: `Stands`."""

    job: str
    worker: str
    incarnation: int
    shard: str = ""


class Stands(Message):
    """What counts of this worker: its steps up to `clock`, and in them `done` of the batches it was given in `epoch`.

    -1 where no step does. The payload are the hyperparameters of the last one.
    """

    clock: int
    epoch: int = -1
    done: int = 0


class Finished(msgspec.Struct, frozen=True, array_like=True):
    """A lost worker's last step that counts: whichever shard has it staged and not counted is to count it now."""

    worker: str
    incarnation: int
    clock: int
    epoch: int
    done: int
    hyper: bytes


class Roster(Message):
    """To every shard: the workers of this generation. The payload is a `Muster`."""

    job: str
    generation: int
    shard: str = ""


class Muster(msgspec.Struct, frozen=True, array_like=True):
    """In order of seniority, and what is to count before they take over."""

    seats: list[Seat]
    finished: list[Finished] = []


class Assignment(msgspec.Struct, frozen=True, array_like=True):
    """The payload of an Assign: a `layout.Registration` as its bytes, and the shard's index of each chunk.

    The buckets are cut along `placement` once and for all. Where shards have joined since, `holders` says which of
    them has each bucket now, and `edition` how often that was decided.
    """

    registration: bytes
    placement: list[int]
    holders: list[int] = []  # by bucket; empty: as it was placed
    edition: int = 0


class Assign(Message):
    """To every shard, and again with every edition: layout and placement are in the payload, an `Assignment`.

    `checkpoint`: the folder, on the coordinator's machine, whose parameters and optimizer state the chunks begin with.
    """

    job: str
    shard: str
    staleness: int | None
    compress: str
    checkpoint: str = ""
    manifest: str = ""  # the xxh3 of that checkpoint's, by which a shard knows it
    rates: Rule = Rule()
    course: Course = Course()  # of the learning rate in that checkpoint
    noise: bool = False  # gradients come, whole, and several at once: measure their noise


# -- buckets move to a shard that has joined (see `shard.ceding`) ------------------------------------------


class Cede(Message):
    """To the shard that holds these buckets, while `checkpoint`, as a Hold has it, is in force: give them to another.
    The payload is the `Front` that all have agreed on. Answered by `Ok` when the other has them."""

    job: str
    checkpoint: int
    edition: int  # that is being decided
    buckets: list[int]
    to: str  # the member in whose process the other shard lives, and its name
    addresses: list[str] = []
    shard: str = ""


class Graft(Message):
    """From one shard to another: a piece of the buckets that it cedes, a `ceding.Parcel`."""

    job: str
    shard: str
    edition: int
    number: int = 0  # of the piece
    more: bool = False


# -- coordinator -> shard: a checkpoint (see `shard.holding`) ----------------------------------------------


class Mark(Message):
    """In BSP: mark what you have once you have made the updates of all clocks up to this one, and none of a later one.
    Answered by `Marked` then, or at once where a later one is made."""

    job: str
    checkpoint: int
    clock: int
    shard: str = ""


class Marked(Message):
    """The payload is a `Front`: of the cut, or of now where it was not made."""

    cut: bool
    bytes: int = 0
    held_s: float = 0.0  # that it took


class Hold(Message):
    """Let nothing more count for now. Answered by `Held`."""

    job: str
    checkpoint: int
    shard: str = ""


class Align(Message):
    """Let count what counts elsewhere: the payload is `holding.furthest`. Answered by `Held`."""

    job: str
    checkpoint: int
    shard: str = ""


class Held(Message):
    """The payload is a `Front`."""


class Front(msgspec.Struct, frozen=True, kw_only=True):
    """Where a shard stands, by worker."""

    generation: int
    stands: dict[str, int]  # clock of each active worker
    counted: dict[str, int]  # clock of the newest step that counts
    applied: dict[str, tuple[int, int, int, int]]  # newest in the parameters: clock, epoch, done, incarnation
    updates: int  # made to the parameters
    course: Course  # of the learning rate
    orphans: bool  # a step of a worker that is gone counts, and is not in the parameters yet


class Snap(Message):
    """Mark what you have, and go on, if you still stand as agreed (the payload: a `Front`). Answered by `Snapped`."""

    job: str
    checkpoint: int
    shard: str = ""


class Snapped(Message):
    bytes: int
    held_s: float  # how long nothing counted


class Write(Message, omit_defaults=True):
    """Write what was marked into this folder, under this name, or send it in `Piece`s where the folder is not there.
    Answered by `Written` when it is safe on disk, or all pieces have been taken."""

    job: str
    checkpoint: int
    folder: str
    name: str
    shard: str = ""
    trace: str = ""  # a `traceparent`, while traces are made


class Written(Message):
    bytes: int
    xxh3: str
    stalled_s: float = 0.0  # that updates waited for copies of what they change


class Release(Message):
    """Go on, whether there was a copy or not. Twice is the same as once."""

    job: str
    checkpoint: int
    shard: str = ""


# -- script -> coordinator ----------------------------------------------------------------------------------


class Register(Message):
    """A script shows its layout (payload: `layout.Registration`) and asks where its chunks live."""

    job: str
    worker: str
    incarnation: int
    digest: str  # of the payload, so that a coordinator can compare layouts without understanding them
    chunks: int


class Registered(Message, kw_only=True):
    """Where the chunks live is in the payload, `Homes`."""

    job: str
    generation: int
    initialiser: str  # whose parameters become version 0
    staleness: int | None
    compress: str
    workers: int
    epoch: int  # the epoch that the job is in: a late worker starts there
    steps: int = 0  # of the run that this one resumes


class Homes(msgspec.Struct, frozen=True, array_like=True):
    """Shards, where each takes pushes, and of every chunk the index of its shard in `shards`."""

    shards: list[str]
    addresses: list[list[str]]
    placement: list[int]
    note: bytes = b""  # the senior worker's newest, for who begins in a later epoch than the first
    holders: list[int] = []  # by bucket, as an Assignment has it
    edition: int = 0


class OpenEpoch(Message, kw_only=True):
    """A script is at the start of an epoch of `batches` batches. The payload is its sampler's generator state."""

    job: str
    worker: str
    incarnation: int
    epoch: int
    batches: int
    samples: int = 0  # in all of them, and in each but the last: for the accounts
    batch_size: int = 0


class EpochOpened(Message):
    """All workers draw the order of this epoch from one generator state, the senior worker's: the payload."""

    job: str
    epoch: int
    first_clock: int
    opener: str = ""  # the senior worker, which is to send its `Note` now; empty where the epoch is over


class Note(Message):
    """The state of learning rate schedules at the start of this epoch: the payload, JSON (`worker.schedules.Told`)."""

    job: str
    worker: str
    incarnation: int
    epoch: int


class Take(Message, kw_only=True):
    """Give me up to `most` batches of this epoch. The payload, if any: [first, last] runs of batches that are applied.

    With `hold` the answer may take a second, where there is nothing to give for now. The worker stands at `clock`, and
    `have` batches of the epoch have reached it: what was in a lost answer comes again. `most` is 0 where the worker
    leaves and only tells.
    """

    job: str
    worker: str
    incarnation: int
    epoch: int
    clock: int
    most: int
    have: int
    hold: bool


class Taken(Message):
    job: str
    epoch: int
    batches: list[int]
    suspects: list[int] = []  # of these: scripts have crashed with them in hand


class Wait(Message):
    """Not yet, and this is who is waited for. Ask again."""

    job: str
    waiting_for: list[str]
    because: str
    dealt_again: bool = False  # to a Take: workers came or went, and who rests must rest longer
    moved: int = 0  # another number than before: they are busy with it, and this wait uses up no patience


class EpochOver(Message):
    job: str
    epoch: int
    next_clock: int  # the first clock of the next epoch, for every worker


class Drained(Message):
    """Instead of batches: the job is being drained. Finish, save, leave."""

    job: str
    because: str


class Contents(Message):
    """The samples of a batch under suspicion, before a script computes it: the payload, a msgpack array of indices."""

    job: str
    worker: str
    incarnation: int
    epoch: int
    batch: int


class Skip(Message):
    """This batch is left out, if the job allows it. The payload: its samples, as in a Contents."""

    job: str
    worker: str
    incarnation: int
    epoch: int
    batch: int
    because: str


class Evaluate(Message, kw_only=True):
    """Give me batches of this evaluation, the `number`th after `epoch`. The payload, if any: results that are done.

    `attempt` is what the last answer said, empty in the first request. `holds` are the batches that this worker has and
    has told no result of.
    """

    job: str
    worker: str
    incarnation: int
    epoch: int
    number: int
    batches: int
    attempt: str
    holds: list[int]
    hold: bool


class Result(msgspec.Struct, frozen=True, array_like=True):
    """In the payload of an Evaluate, a list of these: what the script's function returned for one batch."""

    batch: int
    numbers: dict[str, float]


class Evaluating(Message):
    """Compute these. With another `attempt` than before, forget everything and begin anew: no result is known."""

    job: str
    attempt: str
    batches: list[int]


class Totals(Message):
    """Every result is in; the totals are the payload."""

    job: str


class Report(Message, kw_only=True):
    """A notice: what the script logged, and the steps and samples that it has finished. One that is lost is no loss."""

    job: str
    worker: str
    incarnation: int
    steps: int
    epoch: int
    epochs: int = 0
    samples: int = 0
    staleness: int = 0
    values: dict[str, float] = {}
    figures: WorkerFigures | None = None


class Gauge(Message, kw_only=True):
    """A notice from the process in which a shard lives: what it sees of its updates. One that is lost is no loss."""

    job: str
    member: str
    incarnation: int
    shard: str
    updates: int
    factor: float = 1.0  # on the learning rate of the newest update
    because: str = ""
    change: tuple[float, str] = (1.0, "")  # the last time that it changed for long: the factor, and why
    late: float = 0.0  # updates, mean over the newest gradients, where staleness is damped
    damping: float = 1.0  # and the mean factor
    noise: Estimate = Estimate(0, 0.0, 0.0)
    holders: int = 1  # shards with chunks, whose noise adds up
    # By number of workers: steps seen, and the median of the newest ones' seconds.
    step_times: list[tuple[int, int, float]] = []
    figures: ShardFigures | None = None


class Where(Message):
    """A shard does not answer, or not any more: where is it now? Answered by `Moved`, or by `Wait` while it is away."""

    idempotent: ClassVar[bool] = True
    job: str
    worker: str
    incarnation: int
    shard: str
    edition: int = 0  # that the worker knows


class Moved(Message):
    """A shard's process, and where it takes pushes. Also a notice to every script, when a shard has come back.

    To a worker that asks with an older edition the payload is the newest `Homes`, without a note.
    """

    job: str
    shard: str
    incarnation: int
    addresses: list[str]


MOST_PARTS = 1_024  # of a stream
MOST_STATE = 64 << 10  # bytes of one state of it


class StreamAt(Message):
    """A notice: the batch before `position` in this part of the script's stream is applied. The payload is the stream's
    state there (`worker.stream_state`). Lost ones are not missed."""

    job: str
    worker: str
    incarnation: int
    part: int
    position: int


class FindStream(Message):
    """Which state of this part is kept, at `position` or before it?"""

    idempotent: ClassVar[bool] = True
    job: str
    worker: str
    incarnation: int
    part: int
    position: int


class StreamFound(Message):
    """The payload is the state before the `position`th batch; none where the part is to be read from its front."""

    job: str
    position: int


class Claim(Message):
    """May I be the one that writes this file? The first to ask is; payload none."""

    job: str
    worker: str
    incarnation: int
    what: str


class TakeCheckpoint(Message):
    """Anybody may ask for one. Answered by `Checkpointed` when it is on disk."""

    job: str
    because: str


class Checkpointed(Message):
    """`path` is empty where none could be taken."""

    path: str


class Claimed(Message):
    job: str
    granted: bool
    owner: str


class Depart(Message):
    """This worker's last step counts and its batches are told: it asks for nothing more, and its agent will leave."""

    job: str
    worker: str
    incarnation: int


class Departed(Message):
    job: str
    last: bool  # every other worker that is a member has departed, too: save what there is


class Keep(Message):
    """A notice to the senior's script: write your optimizer's state into `folder` or, if it is not there, send it."""

    job: str
    checkpoint: str
    folder: str


class Piece(Message):
    """The next bytes of a file of a checkpoint, 1 MB at most, are the payload. What is there already counts once.

    From the senior's script, or from a shard that does not see the folder, after whose name the checkpoint is called.
    """

    job: str
    member: str
    incarnation: int
    checkpoint: str
    name: str
    offset: int


class Kept(Message):
    """These files of a checkpoint, (name, bytes, xxh3), are written or sent. None where there is no state."""

    job: str
    member: str
    incarnation: int
    checkpoint: str
    files: list[tuple[str, int, str]]


class Fetch(Message):
    """A script or a shard wants bytes of a file of the checkpoint that the job goes on from: a `Fetched`."""

    idempotent: ClassVar[bool] = True  # answered again rather than kept: the answer is large
    job: str
    member: str
    incarnation: int
    name: str
    offset: int
    most: int = 1 << 20  # bytes, and no more than this


class Fetched(Message):
    """The payload are its bytes from `offset` on, as many as were asked for or as there are. `path` may be on the
    script's own machine, too."""

    job: str
    bytes: int  # of the whole file, -1 where there is none
    xxh3: str = ""  # of the whole file
    path: str = ""
    piece: str = ""  # xxh3 of the payload


class Loaded(Message):
    """The initialiser has brought every chunk to its shard."""

    job: str
    worker: str
    incarnation: int


# -- script -> shard: one gradient -----------------------------------------------------------------------------


class Enter(Message):
    """A worker comes, late or again. The shard answers with the slowest clock and waits for it from there.

    `known`: it is there already, and makes itself known to a shard that was started again; nothing else changes.
    """

    job: str
    worker: str
    incarnation: int
    known: bool = False
    edition: int = 0  # of the placement, as the worker knows it: both must know the same


class Entered(Message):
    clock: int


class Load(Message):
    """The initial parameters of one bucket, fp32, chunk after chunk; from the initialiser only."""

    job: str
    worker: str
    incarnation: int
    bucket: int


class Push(Message):
    """The gradient of one bucket at one clock: codec frames in the payload. Staged until its `Commit`."""

    job: str
    worker: str
    incarnation: int
    clock: int
    bucket: int
    absent: list[int] = []  # parameters (by index) that had no gradient
    seen: int = -1  # newest version of its chunks that it was computed with, where staleness is damped


class Commit(Message, omit_defaults=True):
    """All buckets of this clock are staged, on every shard: count them. Payload: the hyperparameters per group.

    In this step and those before are the first `done` of the batches that this incarnation was given in `epoch`.
    `trace` is there while traces are made: the step's `traceparent`, and those of steps to be kept (`tracing.span`).
    """

    job: str
    worker: str
    incarnation: int
    clock: int
    buckets: int
    epoch: int = -1
    done: int = 0
    trace: str = ""


class Published(Message):
    """In a shard's own log: here the chunks of a bucket were brought to their newest version for workers."""

    bucket: int


class Advance(Message):
    """This worker has finished every clock below `clock`: it rests until then."""

    job: str
    worker: str
    incarnation: int
    clock: int


class Pull(Message, omit_defaults=True):
    """The parameters of one bucket, new enough to start `clock`. `have` is the version held, per chunk. `trace` as in a
    Commit; empty where the pull belongs to no step."""

    idempotent: ClassVar[bool] = True  # answered again rather than kept: the answer is large
    job: str
    worker: str
    incarnation: int
    clock: int
    bucket: int
    have: list[int]
    trace: str = ""


class Delta(Message):
    """Frames in the payload: `frames[i]` of them for the i-th chunk of the bucket, which brings it to `versions[i]`."""

    bucket: int
    versions: list[int]
    frames: list[int]
    staleness: int  # the puller's clock minus the slowest
    workers: int  # that are waited for, or would be in BSP
    setting: int = -1  # of `worker.auto`, that all compress with from here on; -1: each worker finds its own


# -- shard -> its backup ---------------------------------------------------------------------------------------


class Copy(Message, kw_only=True):
    """Piece `number` of a copy: first the shard's state (`base`), then every message that it takes, in their order.
    Answered when it and all before it are there. An empty `head` stands at the start of the payload, as in the push
    log; where there is `more`, the payload goes on in the next piece."""

    job: str
    shard: str
    home: int
    copy: int
    number: int
    kind: Literal["account", "tensor", "end", "message"]
    head: bytes = b""
    more: bool = False


# -- whoever started a member's process -> coordinator ------------------------------------------------------------


class Ended(Message):
    """A process has ended: the one that joined from this node with this id. Nothing is changed where the member has
    said goodbye before, or is another process by now."""

    idempotent: ClassVar[bool] = True
    job: str
    member: str
    node: str
    pid: int
    because: str


# -- anyone -> coordinator: looking -------------------------------------------------------------------------------


class Ask(Message):
    """What is going on? The answer's payload is the status as JSON (`status.JobStatus`)."""

    idempotent: ClassVar[bool] = True
    job: str = ""


class Status(Message):
    job: str


class Examine(Message, kw_only=True):
    """How is this member, how is its link to another, where is its script? The coordinator answers for itself and hands
    on what is for others. Answered by `Examined`."""

    idempotent: ClassVar[bool] = True
    job: str
    member: str
    what: Literal["process", "machine", "link", "stack"]
    within_s: float
    to: str = ""  # of a link: a shard, or the coordinator
    addresses: list[str] = []  # of that shard; the coordinator fills them in
    bulk_bytes: int = 0  # to send there and to have sent back, at most


class Examined(Message):
    """The payload is JSON: one of `doctor.findings`, or a `stack.Stack`."""

    job: str
    member: str


class Probe(Message):
    """How long does an answer take? A payload is for its length alone; so many bytes are to come `back`."""

    idempotent: ClassVar[bool] = True
    job: str
    back: int = 0


class Probed(Message):
    at: float  # by the clock of whoever answers, in seconds since the Unix epoch


class Drain(Message):
    """Finish the step, save, leave."""

    job: str
    because: str


AnyMessage = (
    Ok
    | Join
    | Joined
    | Heartbeat
    | Pulse
    | Returned
    | Vacate
    | Vacated
    | Standing
    | Pair
    | Promote
    | Adopt
    | Retire
    | Copy
    | Exited
    | Leave
    | Launch
    | Stop
    | Fenced
    | Settle
    | Stands
    | Roster
    | Assign
    | Cede
    | Graft
    | Mark
    | Marked
    | Hold
    | Align
    | Held
    | Snap
    | Snapped
    | Write
    | Written
    | Release
    | Register
    | Registered
    | OpenEpoch
    | EpochOpened
    | Note
    | Take
    | Taken
    | Wait
    | EpochOver
    | Drained
    | Contents
    | Skip
    | StreamAt
    | FindStream
    | StreamFound
    | Evaluate
    | Evaluating
    | Totals
    | Report
    | Gauge
    | Claim
    | Claimed
    | TakeCheckpoint
    | Checkpointed
    | Where
    | Moved
    | Depart
    | Departed
    | Keep
    | Piece
    | Kept
    | Fetch
    | Fetched
    | Loaded
    | Enter
    | Entered
    | Load
    | Push
    | Commit
    | Advance
    | Pull
    | Delta
    | Ended
    | Ask
    | Status
    | Examine
    | Examined
    | Probe
    | Probed
    | Drain
)
