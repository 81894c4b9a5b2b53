"""State as plain data, and back: what a journal and a snapshot hold of the scheduler's dataclasses.

`plain` makes dicts, lists, strings and numbers; `build` makes the objects again, led by the types that the fields
declare, so that nothing outside of those types can come to be. A dataclass becomes a dict of its fields with the name
of its class under `KIND`, by which a union is told apart. The order of dicts is kept, for seniority hangs on it.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, Literal, NewType, Union, get_args, get_origin, get_type_hints

KIND = "is"


class NotPlain(ValueError):
    """Data that are not of the type that is meant. Names the place and what was found."""


def plain(value: Any) -> Any:
    """A value of any type that `build` knows, as plain data."""
    match value:
        case Enum():
            return value.name
        case None | bool() | int() | float() | str() | bytes():
            return value
        case bytearray():
            return bytes(value)
        case list() | tuple() | deque():
            return (
                list(value) if all(type(each) is int for each in value) else [plain(each) for each in value]
            )
        case set() | frozenset():
            return [plain(each) for each in sorted(value)]
        case dict():
            return {plain(key): plain(each) for key, each in value.items()}
    return {KIND: type(value).__name__, **plain_fields(value)}


def plain_fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass; those that its constructor derives from the others are left out."""
    assert is_dataclass(value), f"{type(value).__name__} is not plain"
    return {field.name: plain(getattr(value, field.name)) for field in fields(value) if field.init}


def build(kind: Any, data: Any, where: str) -> Any:
    """The value of type `kind` that `plain` has made these data of. Raises NotPlain; `where` names the place."""
    return _builder(kind)(data, where)


def build_fields(kind: type, data: Any, where: str) -> Any:
    """A dataclass from its fields, without its name."""
    _must(isinstance(data, dict), data, kind.__name__, where)
    kinds = _kinds(kind)
    if unknown := [name for name in data if name not in kinds]:
        raise NotPlain(f"{where}: {kind.__name__} has no {unknown[0]!r}")
    if missing := [name for name in kinds if name not in data]:
        raise NotPlain(f"{where}: {kind.__name__} needs {missing[0]!r}")
    values = {name: build(kinds[name], each, f"{where}.{name}") for name, each in data.items()}
    try:
        return kind(**values)
    except ValueError as bad:
        raise NotPlain(f"{where}: {bad}") from None


@cache
def _kinds(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind) if field.init}


@cache
def _builder(kind: Any) -> Callable[[Any, str], Any]:
    """How to build a value of this type."""
    origin, args = get_origin(kind), get_args(kind)
    if isinstance(kind, NewType):
        return _builder(kind.__supertype__)
    if origin in (Union, UnionType):
        return _of_union(args)
    if origin is Literal:
        return _checked(lambda data: data in args, lambda data: data, " or ".join(map(repr, args)))
    if origin is dict:
        return _of_dict(*args)
    if origin in (list, set, deque):
        return _of_many(origin, args[0])
    if origin is tuple:
        assert len(args) == 2 and args[1] is Ellipsis, kind
        return _of_many(tuple, args[0])
    if isinstance(kind, type):
        return _of_type(kind)
    raise TypeError(f"{kind} is not plain")


def _of_type(kind: type) -> Callable[[Any, str], Any]:
    if issubclass(kind, Enum):
        return _checked(lambda data: data in kind.__members__, lambda data: kind[data], kind.__name__)
    if is_dataclass(kind):
        return _of_union((kind,))
    if issubclass(kind, tuple):  # a NamedTuple
        return _of_tuple(kind)
    if kind is bytearray:
        return _checked(lambda data: type(data) is bytes, bytearray, "bytes")
    if kind is float:
        return _checked(lambda data: type(data) in (int, float), float, "float")
    if kind is type(None):
        return _checked(lambda data: data is None, lambda data: data, "nothing")
    assert kind in (bool, int, str, bytes), f"{kind} is not plain"
    return _checked(lambda data: type(data) is kind, lambda data: data, kind.__name__)


def _of_union(kinds: Iterable[Any]) -> Callable[[Any, str], Any]:
    """Dataclasses by name; of everything else at most one that is not None."""
    classes: dict[str, type] = {
        kind.__name__: kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)
    }
    others = {_bare(kind) for kind in kinds if not is_dataclass(kind)}
    optional = type(None) in others
    rest = [*others - {type(None)}]
    assert len(rest) <= 1, rest

    def of_union(data: Any, where: str) -> Any:
        if data is None and optional:
            return None
        if rest and not (isinstance(data, dict) and KIND in data):
            return build(rest[0], data, where)
        name = data.get(KIND) if isinstance(data, dict) else None
        kind = classes.get(name) if isinstance(name, str) else None
        if kind is None:
            raise NotPlain(f"{where}: {str(name or data)[:60]!r} where {' or '.join(classes)} is meant")
        return build_fields(kind, {key: each for key, each in data.items() if key != KIND}, where)

    return of_union


def _bare(kind: Any) -> Any:
    """Two new names for one type are one type here."""
    return kind.__supertype__ if isinstance(kind, NewType) else kind


def _of_dict(key: Any, value: Any) -> Callable[[Any, str], Any]:
    def of_dict(data: Any, where: str) -> Any:
        _must(isinstance(data, dict), data, "a dict", where)
        return {build(key, k, where): build(value, v, f"{where}[{k!r}]") for k, v in data.items()}

    return of_dict


def _of_many(make: Any, kind: Any) -> Callable[[Any, str], Any]:
    def of_many(data: Any, where: str) -> Any:
        _must(isinstance(data, list | tuple), data, "a list", where)
        if kind is int and all(type(each) is int for each in data):  # an epoch's batches: millions
            return make(data)
        return make(build(kind, each, f"{where}[{place}]") for place, each in enumerate(data))

    return of_many


def _of_tuple(kind: Any) -> Callable[[Any, str], Any]:
    kinds = list(get_type_hints(kind).values())

    def of_tuple(data: Any, where: str) -> Any:
        right = isinstance(data, list | tuple) and len(data) == len(kinds)
        _must(right, data, kind.__name__, where)
        return kind(*(build(each, value, where) for each, value in zip(kinds, data, strict=True)))

    return of_tuple


def _checked(
    is_right: Callable[[Any], bool], make: Callable[[Any], Any], name: str
) -> Callable[[Any, str], Any]:
    def checked(data: Any, where: str) -> Any:
        try:
            right = is_right(data)
        except TypeError:  # what cannot be looked up, because it is a list or a dict
            right = False
        _must(right, data, name, where)
        return make(data)

    return checked


def _must(right: bool, data: Any, name: str, where: str) -> None:
    if not right:
        raise NotPlain(f"{where}: {str(data)[:60]!r} where {name} is meant")
