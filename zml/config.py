"""The settings of a job, and who set each: a flag, else a ZML_* variable, else zml.toml, else the default.

It reads no environment by itself: the command line hands in what it found. An unknown key is an error that
names the nearest known one, because a misspelt setting that is silently ignored costs a night
of training.
"""

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from . import compression
from .address import host_and_port
from .errors import CONFIG, USAGE, ZmlError
from .plan import runs_on
from .tracing import sampling
from .trackers import naming

FILE = "zml.toml"
PREFIX = "ZML_"
COMPRESSIONS = (
    "Write none, bf16, topk:1% (or another density, with :int4 or another coding of values) or auto."
)
TRACES = "Write 1/N for one step in N, slow for none but slow and failed ones, or off."
# Variables that are no settings: what processes of zml tell each other, and where the file and the API are.
NOT_SETTINGS = frozenset(
    {"ZML_CONFIG", "ZML_FAILURE", "ZML_LEAVE", "ZML_PARENT", "ZML_SEAT", "ZML_SERVER", "ZML_TOKEN"}
)
COORDINATOR_ADDRESS = "tcp://127.0.0.1:7077"
ANY_PORT = "tcp://127.0.0.1:0"

AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]
AtLeastTwo = Annotated[int, msgspec.Meta(ge=2)]
Bound = Annotated[int, msgspec.Meta(ge=0)]
PerBucket = Annotated[int, msgspec.Meta(ge=1, le=15)]  # more would not fit into a message of 4 MB
Seconds = Annotated[float, msgspec.Meta(gt=0)]
SecondsOrNone = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Rate = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Decay = Annotated[float, msgspec.Meta(ge=1e-6, le=1)]
OrAuto = Annotated[int, msgspec.Meta(ge=-1)]
KeepOutput = Literal["first", "all", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be chosen. Times are seconds; paths are relative to the working folder."""

    job: str = "job"
    attempt: str = ""  # what a node says to the processes that it starts: whose members they are
    workers: AtLeastOne = 1
    shards: AtLeastOne = 1
    replicas: Bound = 0  # backups of each shard, in the process of the next one: 0 or 1
    staleness: Bound | None = (
        0  # the bound s: 0 is BSP, None is asynchronous ("async" in files and variables)
    )
    compress: str = "none"  # none, bf16, topk:DENSITY[:VALUES], auto
    optimizer_on: Literal["auto", "shard", "worker"] = "auto"  # auto: worker with topk and local steps
    local_steps: AtLeastOne = 1  # optimizer steps between two exchanges
    outer_lr: Rate = 0.0  # with the optimizer on the workers, of the shards' rule; 0: what suits it
    outer_momentum: Fraction = 0.0  # and their Nesterov momentum
    warm_up_steps: OrAuto = -1  # over which topk's density falls to what was asked for; -1: 5 % of the run
    residual_decay: Decay = 1.0  # topk keeps so much of what has waited, from one exchange to the next
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"  # in sync, of the learning rate with the workers
    lr_base_workers: Bound = 0  # that the script's learning rate is meant for; 0: as many as are asked for
    lr_warm_up_steps: Bound = 0  # updates over which the rate grows when workers have come
    staleness_damping: bool = False  # with a bound or async: the rate by the updates that a gradient is late
    push_log: Literal["on", "off"] = "on"  # whether shards write down what they take, to be started again
    shared_folder: Literal["auto", "no"] = "auto"  # no: shards send and fetch checkpoints, whatever they see
    resume: str = ""  # a run or checkpoint to go on from
    checkpoint_steps: Bound = 0  # a checkpoint after so many steps; 0: none
    checkpoint_minutes: Rate = 10.0  # and after so many minutes; 0: none. One at the end there is always
    keep_last: AtLeastOne = 3  # checkpoints that stay, the newest
    keep_every_steps: Bound = 0  # and the first of every so many steps; 0: none
    on_bad_batch: Literal["stop", "skip"] = "stop"  # that crashes scripts, or whose gradient is not finite
    bad_batch_kills: AtLeastTwo = 2  # scripts that crash over a batch before it is condemned
    bind: tuple[str, ...] = ()  # empty: what suits the role, on loopback
    coordinator: tuple[str, ...] = (COORDINATOR_ADDRESS,)  # the nearest first
    http: str = "127.0.0.1:0"  # where /metrics is, or off. Port 0: a coordinator's is 7078 if that is free
    http_tokens: str = ""  # a file: who may ask from other machines, which needs one
    keys: str = ""  # folder with CURVE keys; empty: none, and then nothing beyond this machine is let in
    run_dir: str = ""  # empty: a new folder below `runs`
    runs: str = "runs"
    heartbeat_s: Seconds = 0.15
    lease_s: Seconds = 1.5
    join_timeout_s: Seconds = 60.0  # how long the asked-for members may take to appear
    drain_s: Seconds = 60.0  # how long a drain, of a job or of one worker, may take before it becomes a stop
    coordinator_away_s: Seconds = 600.0  # how long members go on without their coordinator
    coordinator_restarts: Bound = 5  # times that `zml run` starts it again, with less than a minute between
    shard_restarts: Bound = 5  # the same of each shard
    worker_restarts: Bound = 3  # times within an hour that a worker which died is started again
    restart_on_error: bool = False  # and after an exception, too
    return_s: SecondsOrNone = 60.0  # how long the job waits for a shard, or its last worker, to come back
    patience_s: Seconds = 600.0  # how long one step may wait for other members
    bucket_chunks: PerBucket = 8  # chunks of 65,536 elements in one message: 8 are 2 MB of fp32
    keep_output: KeepOutput = "first"  # which workers' printed lines `zml run` shows
    trackers: tuple[str, ...] = ("tensorboard",)  # or wandb, mlflow, package.module:Class
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    trace: str = "off"  # off, 1/N, slow; with an OTEL_EXPORTER_OTLP_ENDPOINT in the environment 1/100

    @property
    def mode(self) -> str:
        """The consistency in words."""
        if self.staleness is None:
            return "async"
        return "sync" if self.staleness == 0 else f"staleness {self.staleness}"


KINDS: dict[str, Any] = typing.get_type_hints(Settings, include_extras=True)
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Settings)}


def variable(name: str) -> str:
    return PREFIX + name.upper()


@dataclass(frozen=True, slots=True)
class Resolved:
    """Settings with, for each, the place that decided it: "flag", "ZML_WORKERS", "zml.toml" or "default"."""

    settings: Settings
    origins: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        return {"settings": msgspec.to_builtins(self.settings), "origins": dict(self.origins)}


def resolve(
    flags: Mapping[str, Any], environment: Mapping[str, str], file: str | Path | None = None
) -> Resolved:
    """Settle every value. `flags` holds only what was given. Raises ZmlError naming place, key and value.

    `file` must exist; without it ZML_CONFIG names one, and without that ./zml.toml is read if it is there.
    """
    values: dict[str, Any] = {}
    origins = dict.fromkeys(KINDS, "default")

    given = file or environment.get("ZML_CONFIG")
    path = Path(given or FILE)
    if given or path.exists():
        for key, value in read_file(path).items():
            name = known(key.replace("-", "_"), key, str(path), list(KINDS))
            values[name] = checked(name, value, f"{path}: {key}", exact=True)
            origins[name] = str(path)

    for key in sorted(environment):
        if not key.startswith(PREFIX) or key in NOT_SETTINGS:
            continue
        name = known(key.removeprefix(PREFIX).lower(), key, "the environment", map(variable, KINDS))
        values[name] = checked(name, environment[key], key, exact=False)
        origins[name] = key

    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        values[name] = checked(name, value, flag, exact=False, code=USAGE)
        origins[name] = "flag"

    if origins["trace"] == "default" and (asked := sampling.asked_by(environment)) is not None:
        origins["trace"], values["trace"] = asked

    settings = Settings(**values)
    if settings.http != "off":
        try:
            host_and_port(settings.http)
        except ZmlError as bad:
            raise ZmlError(
                CONFIG, f"http = {settings.http} ({origins['http']}): {bad.what}", bad.fix
            ) from None
    if settings.lease_s < 3 * settings.heartbeat_s:
        raise ZmlError(
            CONFIG,
            f"lease_s = {settings.lease_s:g} ({origins['lease_s']}) is less than three heartbeats of "
            f"{settings.heartbeat_s:g} s ({origins['heartbeat_s']}): a late one would end a membership",
            "Make lease_s at least three times heartbeat_s.",
        )
    if settings.local_steps > 1 and settings.optimizer_on == "shard":
        raise ZmlError(
            CONFIG,
            f"local_steps = {settings.local_steps} ({origins['local_steps']}) with optimizer_on = shard "
            f"({origins['optimizer_on']}): local steps are steps of an optimizer on the worker",
            "Leave out one of the two.",
        )
    about_rates(settings, origins)
    about_updates(settings, origins)
    if settings.replicas > 1:
        raise ZmlError(
            CONFIG,
            f"replicas = {settings.replicas} ({origins['replicas']}): a shard has one backup at most",
            "Choose 0 or 1.",
        )
    if settings.replicas and settings.shards < 2:
        raise ZmlError(
            CONFIG,
            f"replicas = 1 ({origins['replicas']}) with shards = 1 ({origins['shards']}): the backup of a shard lives "
            "in the process of another shard, and there is none",
            "Ask for 2 shards or more, or leave replicas out: the push log alone lets a shard come back.",
        )
    return Resolved(settings, origins)


def about_rates(settings: Settings, origins: Mapping[str, str]) -> None:
    """Raises ZmlError where a rule on learning rates would not mean what it says."""
    asked = f"lr_scaling = {settings.lr_scaling} ({origins['lr_scaling']})"
    mode = f"{settings.mode} ({origins['staleness']})"
    if settings.lr_scaling != "none" and settings.staleness != 0:
        raise ZmlError(
            CONFIG,
            f"{asked} with {mode}: each worker's gradient is an update of its own there, and more workers do not make "
            "the batch of an update larger",
            "Leave lr_scaling out, or train in sync. --staleness-damping is what suits late gradients.",
        )
    coded = compression.parse(settings.compress)
    where = runs_on(settings.optimizer_on, coded, settings.local_steps)
    if settings.lr_scaling != "none" and where == "worker":
        raise ZmlError(
            CONFIG,
            f"{asked} with the optimizer on the workers, as with compress = {coded} and local_steps = "
            f"{settings.local_steps}: the rate of the script is that of one worker's own steps there, and the mean of "
            "the workers' updates is multiplied with sqrt(workers) already where it has become short",
            "Leave lr_scaling out. --outer-lr sets another factor for the mean.",
        )
    if settings.staleness_damping and settings.staleness == 0:
        raise ZmlError(
            CONFIG,
            f"staleness_damping = true ({origins['staleness_damping']}) with {mode}: no gradient is late there",
            "Leave it out, or choose --staleness N or --async.",
        )
    if settings.lr_scaling == "none":
        for name in ("lr_warm_up_steps", "lr_base_workers"):
            if value := getattr(settings, name):
                raise ZmlError(
                    CONFIG,
                    f"{name} = {value} ({origins[name]}) without lr_scaling: nothing changes the learning rate",
                    "Add --lr-scaling linear or sqrt.",
                )


def about_updates(settings: Settings, origins: Mapping[str, str]) -> None:
    """Raises ZmlError where something is to become of the workers' updates, or of what waits, and there is none."""
    coded = compression.parse(settings.compress)
    idle: dict[str, tuple[str, str]] = {}
    if runs_on(settings.optimizer_on, coded, settings.local_steps) == "shard":
        idle["outer_lr"] = idle["outer_momentum"] = (
            "the optimizer runs on the shards, and merges no updates of workers",
            "choose --compress topk:1%, --local-steps or --optimizer-on worker",
        )
    if not coded.sparse:
        idle["residual_decay"] = ("nothing waits that could fade", "choose --compress topk:1% or auto")
    if coded.kind != "topk":
        idle["warm_up_steps"] = ("no density falls to what was asked for", "choose --compress topk:1%")
    for name, (because, fix) in idle.items():
        value = getattr(settings, name)
        if value not in (0, DEFAULTS[name]):
            raise ZmlError(
                CONFIG,
                f"{name} = {value:g} ({origins[name]}) with compress = {coded} ({origins['compress']}) and "
                f"optimizer_on = {settings.optimizer_on} ({origins['optimizer_on']}): {because}",
                f"Leave {name} out, or {fix}.",
            )


def read_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ZmlError(CONFIG, f"there is no configuration file {path}", "Check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ZmlError(CONFIG, f"{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ZmlError(CONFIG, f"{path} is not TOML: {error}", "Correct that line.") from None


def known(name: str, written: str, place: str, candidates: Iterable[str]) -> str:
    if name in KINDS:
        return name
    raise unknown(written, candidates, place, "`zml config show` lists every key.")


def unknown(
    key: str, candidates: Iterable[str], place: str, otherwise: str, *, code: str = CONFIG
) -> ZmlError:
    """With the nearest of those that there are, else what to do `otherwise`."""
    near = difflib.get_close_matches(key, list(candidates), n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else otherwise
    return ZmlError(code, f"{place} has an unknown key {key}", hint)


def checked(name: str, value: Any, place: str, *, exact: bool, code: str = CONFIG) -> Any:
    """The value in its type. `exact` is for TOML, which has types; variables and flags may be text."""
    written = value
    if name == "staleness" and isinstance(value, str) and value in ("sync", "async"):
        value = 0 if value == "sync" else None
    elif name in ("bind", "coordinator", "trackers") and isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    elif isinstance(value, tuple):
        value = list(value)
    if name == "compress":
        try:
            return str(compression.parse(str(value)))
        except ValueError as bad:
            raise ZmlError(code, f"{place}: {bad}", COMPRESSIONS) from None
    if name == "trace":
        try:
            return sampling.checked(str(value))
        except ValueError as bad:
            raise ZmlError(code, f"{place}: {bad}", TRACES) from None
    try:
        found = msgspec.convert(value, type=KINDS[name], strict=exact)
        return tuple(naming.checked(found, place, code)) if name == "trackers" else found
    except msgspec.ValidationError as error:
        because = str(error).replace("`", "")
        choices = typing.get_args(KINDS[name]) if typing.get_origin(KINDS[name]) is Literal else ()
        fix = f"Choose one of: {', '.join(choices)}." if choices else ""
        raise ZmlError(code, f"{place} = {written!r}: {because[0].lower()}{because[1:]}", fix) from None


def as_environment(settings: Settings) -> dict[str, str]:
    """The settings as ZML_* variables: how a launcher hands all of them to the processes that it starts."""
    told: dict[str, str] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name == "staleness" and value is None:
            value = "async"
        told[variable(field.name)] = ",".join(value) if isinstance(value, tuple) else str(value)
    return told
