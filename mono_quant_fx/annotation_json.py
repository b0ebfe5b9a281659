"""QuantAnnotation as JSON data and back: every field but `stored`, which only lives until lowering."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mono_quant_fx.annotation import MergedRows, ObservedInput, QuantAnnotation, WeightUser
from mono_quant_fx.config import QuantScheme
from mono_quant_fx.errors import ConfigError, GraphFormatError, NotSelfContainedError
from mono_quant_fx.json_values import fields, items, need, value_from_json, value_to_json


def annotation_to_json(annotation: QuantAnnotation) -> dict[str, Any]:
    """The fields by name; those that have their default value are left out.

    Raises:
        NotSelfContainedError: it still holds codes that no pass has put into the graph.
    """
    if annotation.stored is not None:
        raise NotSelfContainedError(
            f"the codes of {annotation.weight} were found but not put into the graph; run Int4GroupwiseLowering first"
        )
    return _to_json(annotation)


def annotation_from_json(data: Any) -> QuantAnnotation:
    """The inverse of annotation_to_json.

    Raises:
        GraphFormatError: a field is missing, unknown or of another type.
    """
    found: QuantAnnotation = _from_json(QuantAnnotation, data, "an annotation")
    return found


def _to_json(value: Any) -> Any:
    """A dataclass as an object, a tuple as a list, a dict with its own keys, all else as an argument of a node."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = [f for f in dataclasses.fields(value) if not _is_default(f, getattr(value, f.name))]
        return {f.name: _to_json(getattr(value, f.name)) for f in kept}
    if isinstance(value, tuple | list):
        return [_to_json(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _to_json(v) for k, v in value.items()}
    return value_to_json(value)


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    return field.default is not dataclasses.MISSING and type(value) is type(field.default) and value == field.default


def _from_json(kind: type, data: Any, what: str) -> Any:
    known = [f for f in dataclasses.fields(kind) if f.name != "stored"]
    needed = [f.name for f in known if f.default is f.default_factory is dataclasses.MISSING]
    fields(data, what, " ".join(needed), " ".join(f.name for f in known if f.name not in needed))
    try:
        return kind(
            **{f.name: _READERS[str(f.type)](data[f.name], f"{what}'s {f.name}") for f in known if f.name in data}
        )
    except ConfigError as error:
        raise GraphFormatError(f"{what}: {error}") from error


Reader = Callable[[Any, str], Any]


def _one(kind: type, *others: type) -> Reader:
    def read(data: Any, what: str) -> Any:
        value = value_from_json(data)
        need(type(value) in (kind, *others), what, data, f"a {kind.__name__} is needed")
        return value

    return read


def _optional(reader: Reader) -> Reader:
    return lambda data, what: None if data is None else reader(data, what)


def _many(reader: Reader) -> Reader:
    return lambda data, what: tuple(reader(v, what) for v in items(data, what))


def _object(kind: type) -> Reader:
    return lambda data, what: _from_json(kind, data, what)


def _table(reader: Reader) -> Reader:
    def read(data: Any, what: str) -> Any:
        need(isinstance(data, dict) and all(type(k) is str for k in data), what, data, "an object is needed")
        return {k: reader(v, what) for k, v in data.items()}

    return read


_NUMBER = _one(float, int)
#: A field's type, as its class spells it -> what reads it.
_READERS: dict[str, Reader] = {
    "str": _one(str),
    "int": _one(int),
    "bool": _one(bool),
    "str | None": _optional(_one(str)),
    "int | None": _optional(_one(int)),
    "float | None": _optional(_NUMBER),
    "tuple[int, ...]": _many(_one(int)),
    "dict[str, tuple[float, ...]]": _table(_many(_NUMBER)),
    "QuantScheme | None": _optional(_object(QuantScheme)),
    "MergedRows | None": _optional(_object(MergedRows)),
    "tuple[WeightUser, ...]": _many(_object(WeightUser)),
    "tuple[ObservedInput, ...]": _many(_object(ObservedInput)),
}
