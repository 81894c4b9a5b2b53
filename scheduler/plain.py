"""State as plain data, and back: what a journal and a snapshot hold of the scheduler's dataclasses.

`plain` makes dicts, lists, strings and numbers; `build` makes the objects again, led by the types that the fields
declare, so that nothing outside of those types can come to be. A dataclass becomes a dict of its fields with the name
of its class under `KIND`, by which a union is told apart. The order of dicts is kept, for seniority hangs on it. A
field that has a default may be missing: what was written before there was such a field is read as ever.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, Literal, NewType, TypeAlias, Union, get_args, get_origin, get_type_hints

KIND = "is"


class NotPlain(ValueError):
    """Data that are not of the type that is meant. Names the place and what was found."""


class _Wrong(Exception):
    """The same, and `place` grows as it is passed up: nobody writes down where they are while all is well."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.place = ""

    def within(self, place: str) -> "_Wrong":
        self.place = place + self.place
        return self


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
    return _named(_builder(kind), data, where)


def build_fields(kind: type, data: Any, where: str) -> Any:
    """A dataclass from its fields, without its name."""
    return _named(_fields_builder(kind, named=False), data, where)


def _named(make: "_Build", data: Any, where: str) -> Any:
    try:
        return make(data)
    except _Wrong as wrong:
        raise NotPlain(f"{where}{wrong.place}: {wrong}") from None


_Build: TypeAlias = Callable[[Any], Any]
"""Makes a value of plain data. Raises _Wrong."""


@cache
def _fields_builder(kind: type, *, named: bool) -> _Build:
    """`named`: the name of the class is among the data, and was read."""

    def of_fields(data: Any) -> Any:
        _must(isinstance(data, dict), data, kind.__name__)
        made_by, expected, needed = _fields_of(kind, named=named)  # not before: a type may hold itself
        if data.keys() != expected:
            if unknown := [name for name in data if name not in expected]:
                raise _Wrong(f"{kind.__name__} has no {unknown[0]!r}")
            if missing := [name for name in needed if name not in data]:
                raise _Wrong(f"{kind.__name__} needs {missing[0]!r}")
            made_by = {name: make for name, make in made_by.items() if name in data}
        name, values = "", {}
        try:
            for name, make in made_by.items():
                values[name] = make(data[name])
        except _Wrong as wrong:
            raise wrong.within(f".{name}") from None
        try:
            return kind(**values)
        except ValueError as bad:
            raise _Wrong(str(bad)) from None

    return of_fields


@cache
def _fields_of(kind: type, *, named: bool) -> tuple[dict[str, _Build], set[str], list[str]]:
    """How to build each field; what may be among the data; and the fields that have to be."""
    hints = get_type_hints(kind)
    made = [each for each in fields(kind) if each.init]
    made_by = {each.name: _builder(hints[each.name]) for each in made}
    needed = [each.name for each in made if each.default is MISSING and each.default_factory is MISSING]
    return made_by, {*made_by, KIND} if named else {*made_by}, needed


@cache
def _builder(kind: Any) -> _Build:
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


def _of_type(kind: type) -> _Build:
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


def _of_union(kinds: Iterable[Any]) -> _Build:
    """Dataclasses by name; of everything else at most one that is not None."""
    classes = {
        kind.__name__: _fields_builder(kind, named=True)
        for kind in kinds
        if isinstance(kind, type) and is_dataclass(kind)
    }
    others = {_bare(kind) for kind in kinds if not is_dataclass(kind)}
    optional = type(None) in others
    rest = [*others - {type(None)}]
    assert len(rest) <= 1, rest
    other = _builder(rest[0]) if rest else None

    def of_union(data: Any) -> Any:
        if data is None and optional:
            return None
        if other is not None and not (isinstance(data, dict) and KIND in data):
            return other(data)
        name = data.get(KIND) if isinstance(data, dict) else None
        of_fields = classes.get(name) if isinstance(name, str) else None
        if of_fields is None:
            raise _Wrong(f"{str(name or data)[:60]!r} where {' or '.join(classes)} is meant")
        return of_fields(data)

    return of_union


def _bare(kind: Any) -> Any:
    """Two new names for one type are one type here."""
    return kind.__supertype__ if isinstance(kind, NewType) else kind


def _of_dict(key: Any, value: Any) -> _Build:
    of_key, of_value = _builder(key), _builder(value)

    def of_dict(data: Any) -> Any:
        _must(isinstance(data, dict), data, "a dict")
        made = {}
        for k, v in data.items():
            known = of_key(k)
            try:
                made[known] = of_value(v)
            except _Wrong as wrong:
                raise wrong.within(f"[{k!r}]") from None
        return made

    return of_dict


def _of_many(make: Any, kind: Any) -> _Build:
    of_each = _builder(kind)

    def of_many(data: Any) -> Any:
        _must(isinstance(data, list | tuple), data, "a list")
        if kind is int and all(type(each) is int for each in data):  # an epoch's batches: millions
            return make(data)
        made: list[Any] = []
        try:
            for each in data:
                made.append(of_each(each))
        except _Wrong as wrong:
            raise wrong.within(f"[{len(made)}]") from None
        return make(made)

    return of_many


def _of_tuple(kind: Any) -> _Build:
    made_by = [_builder(each) for each in get_type_hints(kind).values()]

    def of_tuple(data: Any) -> Any:
        _must(isinstance(data, list | tuple) and len(data) == len(made_by), data, kind.__name__)
        return kind(*(of_each(value) for of_each, value in zip(made_by, data, strict=True)))

    return of_tuple


def _checked(is_right: Callable[[Any], bool], make: _Build, name: str) -> _Build:
    def checked(data: Any) -> Any:
        try:
            right = is_right(data)
        except TypeError:  # what cannot be looked up, because it is a list or a dict
            right = False
        _must(right, data, name)
        return make(data)

    return checked


def _must(right: bool, data: Any, name: str) -> None:
    if not right:
        raise _Wrong(f"{str(data)[:60]!r} where {name} is meant")
