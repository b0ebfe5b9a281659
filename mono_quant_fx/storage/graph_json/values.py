"""The arguments of a graph's nodes as plain JSON data, and back, with every type spelled out.

None, booleans, integers, finite floats, strings and lists stand for themselves; all else is an object with one key
that says what it is: {"node": "relu"}, {"tuple": [1, 2]}, {"dtype": "float32"}, {"float": "inf"}.
"""

from __future__ import annotations

import contextlib
import math
import reprlib
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import fx

from mono_quant_fx.errors import FileFormatError, GraphFormatError, NotSelfContainedError
from mono_quant_fx.files.json_records import from_plain

T = TypeVar("T")

#: Python's parser gives up near 200 nested brackets, and a graph is code; no model comes near this.
MAX_DEPTH = 32
_LONGEST_INTEGER = 64

#: Quantized types need a quantizer that no file holds; those of fewer than 8 bits have no kernels.
_WORDS = (
    "float16 bfloat16 float32 float64 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu int8 "
    "int16 int32 int64 uint8 uint16 uint32 uint64 bool complex32 complex64 complex128"
)
DTYPES = {name: getattr(torch, name) for name in _WORDS.split() if hasattr(torch, name)}
_LAYOUTS = {"strided": torch.strided}
_MEMORY_FORMATS = {str(v)[6:]: v for v in vars(torch).values() if isinstance(v, torch.memory_format)}
_DEVICES = ("cpu", "cuda", "mps", "xpu")
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def show(value: Any) -> str:
    """A short repr for messages, whatever the value is."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer too long for decimal digits
        return f"a very large {type(value).__name__}"


def need(holds: bool, what: str, value: Any, rule: str) -> None:
    """Raises GraphFormatError unless a rule holds."""
    if not holds:
        raise GraphFormatError(f"{what} is {show(value)}; {rule}")


def fields(data: Any, what: str, required: str, optional: str = "") -> dict[str, Any]:
    """`data` if it is an object with these keys (words) and no other.

    Raises:
        GraphFormatError: it is not.
    """
    need(isinstance(data, dict), what, data, f"an object with {required} is needed")
    missing = [key for key in required.split() if key not in data]
    extra = [key for key in data if not isinstance(key, str) or key not in (*required.split(), *optional.split())]
    if missing or extra:
        problem = f"lacks {', '.join(missing)}" if missing else f"has the unknown key {show(extra[0])}"
        raise GraphFormatError(
            f"{what} {problem}; its keys are {required}{' and, optionally, ' * bool(optional)}{optional}"
        )
    return data


def items(data: Any, what: str) -> list[Any]:
    """`data` if it is a list, else GraphFormatError."""
    need(isinstance(data, list), what, data, "a list is needed")
    return data


@contextlib.contextmanager
def within(place: str) -> Iterator[None]:
    """Puts a place in front of the message of an error on its way out."""
    try:
        yield
    except (GraphFormatError, NotSelfContainedError) as error:
        raise type(error)(f"{place}: {error}") from error.__cause__


def value_to_json(value: Any, depth: int = 0) -> Any:
    """An argument of a node as JSON data.

    Raises:
        NotSelfContainedError: its type has no form in JSON.

    >>> value_to_json((1, [torch.float32, float("inf")]))
    {'tuple': [1, [{'dtype': 'float32'}, {'float': 'inf'}]]}
    """
    if depth > MAX_DEPTH:
        raise NotSelfContainedError(f"an argument is nested more than {MAX_DEPTH} deep")
    if isinstance(value, fx.Node):
        return {"node": value.name}
    plain = _plain_to_json(value)
    if plain is not NotImplemented:
        return plain
    inner = [value_to_json(v, depth + 1) for v in _parts(value)]
    if isinstance(value, list):
        return inner
    if isinstance(value, dict):
        return {"dict": [[value_to_json(k), v] for k, v in zip(value, inner, strict=True)]}
    return {{torch.Size: "size", slice: "slice", range: "range"}.get(type(value), "tuple"): inner}


def _plain_to_json(value: Any) -> Any:
    """The form of a value that holds no others; NotImplemented for one that does."""
    kind = type(value)
    if value is None or kind in (bool, str) or (kind is int and value.bit_length() < _LONGEST_INTEGER):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if kind is complex and math.isfinite(value.real) and math.isfinite(value.imag):
        return {"complex": [value.real, value.imag]}
    if value is ...:
        return {"ellipsis": True}
    for key, known in (("dtype", DTYPES), ("layout", _LAYOUTS), ("memory_format", _MEMORY_FORMATS)):
        if isinstance(value, type(next(iter(known.values())))):
            return {key: _known(str(value)[6:], known, key)}
    if isinstance(value, torch.device):
        _known(value.type, _DEVICES, "device")
        return {"device": str(value)}
    return NotImplemented


def _known(name: str, known: Container[str], what: str) -> str:
    if name not in known:
        raise NotSelfContainedError(f"it has the {what} {name} as an argument, which a stored graph may not name")
    return name


def _parts(value: Any) -> list[Any]:
    """What a container holds; NotSelfContainedError for what is none."""
    kind = type(value)
    if kind in (tuple, torch.Size) or (isinstance(value, list) and kind.__name__ in ("list", "immutable_list")):
        return list(value)
    if isinstance(value, dict) and kind.__name__ in ("dict", "immutable_dict"):
        return list(value.values())
    if kind in (slice, range):
        return [value.start, value.stop, value.step]
    raise NotSelfContainedError(
        f"it has an argument of type {kind.__module__}.{kind.__qualname__}, {show(value)}, which has no form in JSON; "
        "numbers, strings, tuples, lists, dicts, slices, dtypes and devices do"
    )


def value_from_json(data: Any, nodes: Mapping[str, fx.Node] | None = None, depth: int = 0) -> Any:
    """The inverse of value_to_json; `nodes` are those that may be named, by name.

    Raises:
        GraphFormatError: the data are none of its forms.
    """
    if depth > MAX_DEPTH:
        raise GraphFormatError(f"an argument is nested more than {MAX_DEPTH} deep")
    if data is None or type(data) in (bool, str):
        return data
    if type(data) is int:
        need(data.bit_length() < _LONGEST_INTEGER, "an integer", data, f"it has to fit into {_LONGEST_INTEGER} bits")
        return data
    if type(data) is float:
        need(math.isfinite(data), "a number", data, 'write {"float": "inf"}, "-inf" or "nan"')
        return data
    if type(data) is list:
        return [value_from_json(v, nodes, depth + 1) for v in data]
    need(type(data) is dict and len(data) == 1, "an argument", data, "an object with one key that says what it is")
    key, inner = next(iter(data.items()))
    if key == "node":
        return _node(inner, nodes)
    if key == "dict":
        return dict(_pair(pair, nodes, depth) for pair in items(inner, "a dict"))
    if key in _SEQUENCES:
        return _sequence(key, [value_from_json(v, nodes, depth + 1) for v in items(inner, f"a {key}")])
    need(isinstance(key, str) and key in _SCALARS, "the kind of an argument", key, "it is none of the known ones")
    return _SCALARS[key](inner)


def _node(name: Any, nodes: Mapping[str, fx.Node] | None) -> fx.Node:
    known = nodes or {}
    need(isinstance(name, str) and name in known, "a node", name, "no node before this one has the name")
    return known[name]


def _pair(pair: Any, nodes: Mapping[str, fx.Node] | None, depth: int) -> tuple[Any, Any]:
    need(isinstance(pair, list) and len(pair) == 2, "an item of a dict", pair, "it is a list of key and value")
    need(type(pair[0]) in (str, int), "a key of a dict", pair[0], "it is a string or an integer")
    return value_from_json(pair[0]), value_from_json(pair[1], nodes, depth + 1)


def _sequence(kind: str, values: list[Any]) -> Any:
    if kind == "tuple":
        return tuple(values)
    if kind == "slice":
        need(len(values) == 3, "a slice", values, "it has start, stop and step")
        return slice(*values)
    need(all(type(v) is int for v in values), f"a {kind}", values, "it holds integers")
    if kind == "size":
        return torch.Size(values)
    need(len(values) == 3 and values[2] != 0, "a range", values, "it has start, stop and a step that is not 0")
    return range(*values)


_SEQUENCES = ("tuple", "slice", "size", "range")


def _one_of(known: Mapping[str, Any], what: str) -> Callable[[Any], Any]:
    def find(name: Any) -> Any:
        need(isinstance(name, str) and name in known, what, name, f"known are {', '.join(list(known)[:8])} and so on")
        return known[name]

    return find


def _device(name: Any) -> torch.device:
    kind, _, index = name.partition(":") if isinstance(name, str) else ("", "", "")
    numbered = index == "" or (index.isascii() and index.isdigit() and len(index) <= 3)
    need(
        kind in _DEVICES and numbered, "a device", name, f"it is one of {', '.join(_DEVICES)}, with :N after it or not"
    )
    return torch.device(f"{kind}:{index}" if index else kind)


def _complex(parts: Any) -> complex:
    finite = isinstance(parts, list) and all(type(p) in (int, float) and math.isfinite(p) for p in parts)
    need(finite and len(parts) == 2, "a complex number", parts, "it is a list of two finite numbers")
    return complex(*parts)


def _ellipsis(data: Any) -> Any:
    need(data is True, "an ellipsis", data, "it is true")
    return ...


_SCALARS: dict[str, Callable[[Any], Any]] = {
    "dtype": _one_of(DTYPES, "a dtype"),
    "layout": _one_of(_LAYOUTS, "a layout"),
    "memory_format": _one_of(_MEMORY_FORMATS, "a memory format"),
    "float": _one_of(_FLOATS, "a float"),
    "device": _device,
    "complex": _complex,
    "ellipsis": _ellipsis,
}


def record_from_json(kind: type[T], data: Any, what: str) -> T:
    """A dataclass from what records.to_plain wrote.

    Raises:
        GraphFormatError: a field is missing, unknown or of another type.
    """
    try:
        return from_plain(kind, data, what)
    except FileFormatError as error:
        raise GraphFormatError(str(error)) from error
