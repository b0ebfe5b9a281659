"""Dataclasses as plain JSON data and back: what is read is checked against the declared types, field by field."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar, Union

from mono_quant_fx.errors import FileFormatError, MonoQuantError

T = TypeVar("T")

#: Infinities and NaN are no JSON.
_UNSAYABLE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def to_plain(value: Any, brief: bool = False) -> Any:
    """Dataclasses become dicts of the fields that take part in repr; tuples become lists, odd floats strings.

    Args:
        brief: leaves out fields that have their default value.

    >>> to_plain((1, math.inf, "a"))
    [1, 'inf', 'a']
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.repr}
        left_out = {f.name for f in dataclasses.fields(value) if brief and _is_default(f, kept.get(f.name))}
        return {name: to_plain(v, brief) for name, v in kept.items() if name not in left_out}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, tuple | list):
        return [to_plain(v, brief) for v in value]
    if isinstance(value, dict):
        return {k: to_plain(v, brief) for k, v in value.items()}
    return value


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    return type(value) is type(field.default) and value == field.default


def from_plain(kind: type[T], data: object, where: str) -> T:
    """The dataclass (or other annotated type) that `data` describes; unknown and missing fields are errors.

    Args:
        where: what errors call the place.

    Raises:
        FileFormatError: names the place, the value and the type that is needed.
    """
    value: T = _read(kind, data, where)
    return value


def _read(kind: Any, data: Any, where: str) -> Any:
    if kind is Any:
        return data
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, data, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _union(arguments, data, where)
    if origin is tuple or origin is list:
        return _sequence(origin, arguments, data, where)
    if origin is dict:
        _need(isinstance(data, dict), "an object", data, where)
        return {k: _read(arguments[1], v, f"{where}.{k}") for k, v in data.items()}
    return _scalar(kind, data, where)


def _scalar(kind: Any, data: Any, where: str) -> Any:
    if kind is float:
        if isinstance(data, str) and data in _UNSAYABLE:
            return _UNSAYABLE[data]
        _need(type(data) in (int, float), "a number", data, where)
        return float(data)
    if kind in (None, type(None)):
        _need(data is None, "null", data, where)
        return None
    _need(type(data) is kind, getattr(kind, "__name__", str(kind)), data, where)
    return data


def _union(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    rest = [k for k in kinds if k is not type(None)]
    for kind in rest[:-1]:
        try:
            return _read(kind, data, where)
        except FileFormatError:
            continue
    return _read(rest[-1], data, where)


def _sequence(origin: Callable[..., Any], kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    _need(isinstance(data, list), "a list", data, where)
    if origin is tuple and not (len(kinds) == 2 and kinds[1] is Ellipsis):
        _need(len(data) == len(kinds), f"{len(kinds)} items", data, where)
    else:
        kinds = kinds[:1] * len(data)
    return origin(_read(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, data, strict=True)))


def _dataclass(kind: Any, data: Any, where: str) -> Any:
    _need(isinstance(data, dict), "an object", data, where)
    hints = _hints(kind)
    unknown = data.keys() - hints.keys()
    _need(not unknown, f"no field {min(unknown, default='')!r}", "", where)
    values = {name: _read(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    try:
        return kind(**values)
    except (TypeError, ValueError, MonoQuantError) as e:
        raise FileFormatError(f"{where}: {e}") from e


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.repr}


def _need(is_so: bool, what: str, data: Any, where: str) -> None:
    if not is_so:
        shown = repr(data) if isinstance(data, str | int | float | bool | None) else type(data).__name__
        raise FileFormatError(f"{where}: {what} needed" + (f", not {shown[:60]}" if shown != "''" else ""))
