"""Learning rate schedules of the script: found without a line in it, told as plain numbers, given to a late worker.

A scheduler lives in the script's memory and steps in the body of its loop, which a worker that comes late, or resumes,
has not run for the epochs before. So the senior worker tells the coordinator at the start of each epoch what its
schedulers and its optimizer's groups say, and who begins at a later epoch than the first takes that over before it.
A schedule that steps with every batch is therefore taken over as it stood at the start of the epoch, no later.

Rule: a scheduler only takes values of the kinds that it has itself; what does not fit stays as it was, and is named.
Lambdas and other code never travel: each script has its own, as in torch's own state_dict.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import msgspec
import structlog
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

MOST_BYTES = 64 << 10  # of what is told of one epoch
MOST_DEPTH = 12
NOT_FINITE = ("inf", "-inf", "nan")  # as text, for JSON has no such numbers
# How a group's step is computed is a matter of each worker's device, and no schedule's.
OWN = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})

log = structlog.get_logger()


class Told(msgspec.Struct, forbid_unknown_fields=True):
    """What travels: numbers of each parameter group, and (kind, state) of each scheduler, at the start of `epoch`."""

    epoch: int
    groups: list[dict[str, Any]] = []
    schedulers: list[tuple[str, dict[str, Any]]] = []


class NotPlain(ValueError):
    """No number, text, list or map of such."""


# -- finding -----------------------------------------------------------------------------------------------


def find(optimizer: Optimizer, before: Iterable[Any] = ()) -> list[Any]:
    """The optimizer's schedulers that are not part of another one, by their kinds.

    `before`: those found before. Behind a `gc.freeze()` of the script's nobody lists them any more; those that it has
    frozen before the first look are not found, for nothing leads to them but what holds them.
    """
    # By `type`, not `isinstance`: that asks __class__, and proxies among all objects may answer by doing something.
    known = {LRScheduler, *_below(LRScheduler)}
    listed = [each for each in gc.get_objects() if type(each) in known]
    found = list({id(each): each for each in (*before, *listed)}.values())
    found = [each for each in found if vars(each).get("optimizer") is optimizer]
    inside = {id(part) for each in found for part in _parts(each)}
    return sorted((each for each in found if id(each) not in inside), key=kind)


def _below(family: type) -> Iterator[type]:
    each: type
    for each in family.__subclasses__():
        yield each
        yield from _below(each)


def kind(scheduler: Any) -> str:
    """Its class, with those of the schedulers inside: `SequentialLR(LinearLR, CosineAnnealingLR)`."""
    inside = ", ".join(kind(part) for part in _parts(scheduler))
    return type(scheduler).__name__ + (f"({inside})" if inside else "")


def _parts(scheduler: Any) -> list[Any]:
    inside = vars(scheduler).get("_schedulers")
    return list(inside) if isinstance(inside, list | tuple) else []


# -- telling -----------------------------------------------------------------------------------------------


class Schedules:
    """One optimizer's schedulers. To look for them takes 30 ms, among all objects that there are."""

    def __init__(self, optimizer: Optimizer, worker: str) -> None:
        self.optimizer = optimizer
        self.worker = worker
        self._named = False  # what cannot be told, once
        self._known: list[weakref.ref[Any]] | None = None  # the script's own: they go when it lets them go

    def look(self) -> Self:
        self._known = [weakref.ref(each) for each in find(self.optimizer, self._living())]
        return self

    def tell(self, epoch: int) -> tuple[Told, list[str]]:
        return tell(self.optimizer, self._alive(), epoch)

    def note(self, epoch: int) -> bytes:
        """For who comes later, at the start of this epoch."""
        told, left_out = self.look().tell(epoch)
        if left_out and not self._named:
            log.info("not told of the learning rate schedule", worker=self.worker, what=left_out)
            self._named = True
        return write(told)

    def begin(self, epoch: int, note: bytes, kept: Told | None) -> None:
        """This worker begins in this epoch: with what the checkpoint kept of it, else with the senior's note.

        In the first epoch the schedules are right as the script has made them.
        """
        told = kept if kept is not None and kept.epoch == epoch else read(note) if epoch > 0 else None
        if told is None:
            if epoch > 0:
                log.warning("no learning rate schedule to go on from", worker=self.worker, epoch=epoch)
            return
        odd = give(self.optimizer, self.look()._alive(), told)
        if told.epoch != epoch:
            odd.append(f"it is told of epoch {told.epoch + 1}, and this is epoch {epoch + 1}")
        rates = [float(group["lr"]) for group in self.optimizer.param_groups if "lr" in group]
        log.info("learning rate taken over", worker=self.worker, epoch=epoch, lr=rates[:4])
        if odd:
            log.warning("not all of the learning rate schedule fits", worker=self.worker, what=odd)

    def _alive(self) -> list[Any]:
        if self._known is None:
            self.look()
        return self._living()

    def _living(self) -> list[Any]:
        return [each for ref in self._known or () if (each := ref()) is not None]


def tell(optimizer: Optimizer, schedulers: Iterable[Any], epoch: int) -> tuple[Told, list[str]]:
    """What they say now, which is at most MOST_BYTES of JSON; and the names of what is not in it."""
    left_out: list[str] = []
    groups = [numbers(group) for group in optimizer.param_groups]
    parts: list[tuple[str, Any, Told]] = [("the groups' numbers", None, Told(epoch, groups=groups))]
    for scheduler in schedulers:
        name = kind(scheduler)
        try:
            state = plain(scheduler.state_dict(), type(scheduler).__name__, left_out)
        except Exception as error:  # of a class of the user's own
            left_out.append(f"{name}: {error}")
            continue
        parts.append((name, state, Told(epoch, schedulers=[(name, state)])))
    told, size = Told(epoch), 0
    for name, state, alone in parts:
        size += len(write(alone))
        if size > MOST_BYTES:
            left_out.append(f"{name}: too long")
            size -= len(write(alone))
        elif state is None:
            told.groups = groups
        else:
            told.schedulers.append((name, state))
    return told, left_out


def write(told: Told) -> bytes:
    return json.dumps(msgspec.to_builtins(told), allow_nan=False, separators=(",", ":")).encode()


def numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of one parameter group: lr, initial_lr, momentum, betas ..."""
    found = {}
    for key, value in group.items():
        if key in OWN or isinstance(value, bool):
            continue
        try:
            said = plain(value, key, [])
        except NotPlain:
            continue
        if _is_number(said) or (isinstance(said, list) and all(_is_number(each) for each in said)):
            found[key] = said
    return found


def _is_number(said: Any) -> bool:
    return (isinstance(said, int | float) and not isinstance(said, bool)) or said in NOT_FINITE


def plain(value: Any, where: str, left_out: list[str], depth: int = 0) -> Any:
    """The same as JSON can say it; what it cannot say is left out of maps, by name. Raises NotPlain."""
    if depth > MOST_DEPTH:
        raise NotPlain(where)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else repr(float(value))
    if isinstance(value, list | tuple):
        return [plain(each, where, left_out, depth + 1) for each in value]
    if isinstance(value, Mapping):
        found = {}
        for key, each in value.items():
            name = f"{where}.{key}"
            try:
                if not isinstance(key, str | int):
                    raise NotPlain(name)
                found[str(key)] = plain(each, name, left_out, depth + 1)
            except NotPlain:
                left_out.append(name)
        return found
    if getattr(value, "size", None) is not None and hasattr(value, "item"):  # a tensor or a number of numpy's
        if (value.numel() if isinstance(value, Tensor) else value.size) == 1:
            return plain(value.item(), where, left_out, depth + 1)
    raise NotPlain(where)


# -- giving ------------------------------------------------------------------------------------------------


def read(data: bytes) -> Told | None:
    """What was told; None where it cannot be read."""
    try:
        return msgspec.json.decode(data, type=Told) if len(data) <= MOST_BYTES else None
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def give(optimizer: Optimizer, schedulers: Iterable[Any], told: Told) -> list[str]:
    """Let these schedulers and the optimizer's groups go on from what was told; returns what could not be given."""
    odd: list[str] = []
    theirs = list(told.schedulers)
    for scheduler in schedulers:
        name = kind(scheduler)
        same = [state for each, state in theirs if each == name]
        if not same:
            odd.append(f"{name} is only here")
            continue
        try:
            mine = scheduler.state_dict()
            state = max(
                same, key=lambda said: _alike(mine, said)
            )  # of several, the one made with its numbers
            theirs.remove((name, state))
            scheduler.load_state_dict(_state(scheduler, mine, state, odd))
        except Exception as error:  # of a class of the user's own
            odd.append(f"{name}: {error}")
    odd += [f"{name} is not here" for name, _ in theirs]
    if len(told.groups) != len(optimizer.param_groups):
        odd.append(f"{len(optimizer.param_groups)} parameter groups are here, and {len(told.groups)} there")
        return odd
    for index, (group, said) in enumerate(zip(optimizer.param_groups, told.groups, strict=True)):
        for key, value in said.items():
            if key in OWN:
                continue
            try:
                _set(group, key, value)
            except NotPlain:
                odd.append(f"{key} of group {index}")
    return odd


def _set(group: dict[str, Any], key: str, value: Any) -> None:
    """One number of a group. A tensor stays the same tensor: a captured graph may read it."""
    fitted = fit(group[key], value) if key in group else value
    if key in group and isinstance(group[key], Tensor):
        group[key].fill_(fitted.item())
    else:
        group[key] = fitted


def _alike(mine: Mapping[str, Any], said: Mapping[str, Any]) -> int:
    own = plain(mine, "", [])
    return sum(key in own and own[key] == value for key, value in said.items())


def _state(
    scheduler: Any, mine: Mapping[str, Any], said: Mapping[str, Any], odd: list[str]
) -> dict[str, Any]:
    """The scheduler's state with what was told of it."""
    merged, parts = dict(mine), _parts(scheduler)
    for key, value in said.items():
        try:
            if key == "_schedulers" and parts:
                pairs = zip(parts, mine[key], value, strict=True)
                merged[key] = [_state(part, own, state, odd) for part, own, state in pairs]
            elif key in mine:
                merged[key] = fit(mine[key], value)
            elif not hasattr(type(scheduler), key):  # made with the first step, say; never a method
                merged[key] = value
        except NotPlain:
            odd.append(f"{key} of {type(scheduler).__name__}")
    return merged


def fit(mine: Any, said: Any) -> Any:
    """What was said, as a value of the kind of `mine`. Raises NotPlain if it is of another."""
    match mine:
        case Tensor():
            return mine.detach().clone().fill_(_number(said))
        case bool() | str():
            if type(said) is type(mine):
                return said
        case int() | float():
            return _number(said)
        case None:
            if not isinstance(said, list | dict):
                return said
        case list() | tuple():
            if isinstance(said, list) and len(said) == len(mine):
                return type(mine)(fit(own, each) for own, each in zip(mine, said, strict=True))
        case Mapping():
            if isinstance(said, dict):
                return _fit_map(mine, said)
        case _ if hasattr(mine, "item"):  # a number of numpy's
            return type(mine)(_number(said))
    raise NotPlain(said)


def _fit_map(mine: Mapping[Any, Any], said: Mapping[str, Any]) -> Any:
    fitted: Any = copy.copy(mine)  # a Counter stays one
    own = {str(key): key for key in mine}  # numbers as keys became texts on their way
    for key, value in said.items():
        if key in own:
            fitted[own[key]] = fit(mine[own[key]], value)
        elif all(isinstance(each, str) for each in mine):
            fitted[key] = value
    return fitted


def _number(said: Any) -> Any:
    if not _is_number(said):
        raise NotPlain(said)
    return float(said) if isinstance(said, str) else said
