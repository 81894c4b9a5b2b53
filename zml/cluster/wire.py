"""What a node and the coordinator of many jobs say to each other; members of jobs speak as ever (`messages`).

node                       coordinator
Offer      ------------->              resources, and what runs there
           <-------------  Offered
NodeBeat   ------------->              a notice, answered by NodePulse or Strange
           <-------------  Run, Quit   orders, repeated until they are taken; twice is the same as once
Output     ------------->              what a process has printed, where the node does not see the coordinator's folder
           <-------------  Stored
Ceased     ------------->              a process has ended for good
"""

from typing import Any, ClassVar

import msgspec

from ..messages import AnyMessage, Message

OUTPUT_BYTES = 256 << 10  # of a piece


class Offer(Message, kw_only=True):
    """A machine offers its resources. The payload is a `Runs`."""

    node: str
    boot: str  # another one each time that the node's process starts: then nothing of before runs
    cpus: int
    gpus: int
    memory_mb: int
    rack: str = ""
    cost_per_hour: float = 0.0
    machine: str = ""  # the host's own name, whatever the node is called
    hosts: tuple[str, ...] = ()  # by which what runs there answers HTTP


class Runs(msgspec.Struct, frozen=True):
    """What runs on a node: attempts and slots."""

    slots: list[tuple[str, str]]


class Offered(Message):
    """Accepted; what runs there and should not is ended by orders that follow."""

    heartbeat_s: float


class NodeBeat(Message):
    """A notice: the node is alive."""

    node: str
    boot: str


class NodePulse(Message):
    """A notice: so is the coordinator."""


class Strange(Message):
    """A notice: this node is not known, or was given up. It is to offer itself again."""


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What a node needs to know of an attempt to start a process of it."""

    run_dir: str  # where the attempt's files lie, if this node sees them
    mark: str = ""  # a folder that it sees just if it sees them
    coordinator: list[str]  # addresses
    settings: dict[str, Any]  # of the training, that were chosen
    environment: dict[str, str]  # of the user's script
    script: str
    args: list[str]
    folder: str  # to run it in; empty: in the archive
    archive: str = ""  # the checksum
    archive_at: str = ""  # a path, for a node that sees it; another one asks for it (`Want`)
    gpus: int = 0  # of each worker
    cpus: int = 1
    memory_mb: int = 0  # of each worker, and of each shard; 0: no limit
    shard_memory_mb: int = 0


class Run(Message):
    """Start a process of an attempt, unless it runs. The payload is a `Work`."""

    job: str  # the attempt's name, which is the job's name to its members
    slot: str  # the member's name


class Quit(Message):
    """End that process, if it is there: with SIGTERM, so that it leaves in order, or with SIGKILL."""

    job: str
    slot: str
    at_once: bool
    because: str


class LetGo(Message):
    """The coordinator needs this node no more: it is to leave as if it had been told by a signal."""

    because: str


class Ceased(Message):
    """A process of an attempt has ended, and is not started again. `done`: it came to its end."""

    node: str
    job: str
    slot: str
    because: str
    done: bool


class Want(Message):
    """A node does not see this archive, and wants its bytes from `offset` on. Answered by `Have`."""

    idempotent: ClassVar[bool] = True  # answered again rather than kept: the answer is large
    sha256: str
    offset: int


class Have(Message):
    """The payload are bytes of the archive, 1 MB at most; it has `bytes` in all."""

    bytes: int


class Output(Message):
    """The next bytes of an output of a process of an attempt are the payload, `OUTPUT_BYTES` at most; in the file on
    the coordinator's side they begin at `at`. What is there already counts once. At -1: how far is it?"""

    node: str
    job: str
    slot: str
    name: str  # of the file, such as "w0.out"
    at: int


class Stored(Message):
    """The file has so many bytes by now. `full`: it takes no more."""

    bytes: int
    full: bool


class Goodbye(Message):
    """A node wants to go. `empty`: nothing runs there, and it goes now; else all of it is to leave in order."""

    node: str
    boot: str
    empty: bool
    because: str


NodeMessage = (
    Offer
    | Offered
    | NodeBeat
    | NodePulse
    | Strange
    | Run
    | Quit
    | LetGo
    | Ceased
    | Want
    | Have
    | Output
    | Stored
    | Goodbye
)
Vocabulary = AnyMessage | NodeMessage
