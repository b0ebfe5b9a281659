"""The header of a safetensors file: which bytes are which tensor. Read without trust, written in one fixed form.

8 bytes            length of the header, unsigned, little endian
the header         JSON: {"__metadata__": {str: str}, NAME: {"dtype", "shape", "data_offsets": [start, stop]}, ...}
the data           every tensor's elements in row-major order, little endian, without gaps
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch

from mono_quant_fx.errors import FileFormatError

#: Each element type by its name in a file. Elements below one byte are left out.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: The bytes that hold the header's length, and the largest length that the format allows.
PREFIX = 8
MAX_HEADER = 100_000_000
METADATA = "__metadata__"

_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_DIMS = 64
_LIMIT = 2**63
_LEVELS = 3
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `start` and `stop` are byte offsets in the data part, which begins after the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in the file."""
        return self.stop - self.start


def shown(value: object) -> str:
    """A value for a message: one line, at most 80 characters, whatever a hostile file put into it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def fits(dtype: torch.dtype, shape: Iterable[int]) -> bool:
    """Whether torch can address a tensor of this shape; a size of 0 does not excuse the other sizes."""
    return prod(max(size, 1) for size in shape) * dtype.itemsize < _LIMIT


def parse_header(text: bytes, data_bytes: int) -> tuple[dict[str, str], dict[str, Entry]]:
    """The metadata and the entries, in the order of their bytes, of a file with `data_bytes` bytes of data.

    Raises FileFormatError for whatever is not a sound description of exactly these bytes. Its message names the
    tensor, the value and the rule; the caller adds the file. Time and memory are proportional to the header.

    >>> text = b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
    >>> parse_header(text, 24)[1]["a"]
    Entry(name='a', dtype=torch.float32, shape=(2, 3), start=0, stop=24)
    >>> parse_header(text, 20)
    Traceback (most recent call last):
    mono_quant_fx.errors.FileFormatError: the tensors end at byte 24 of 20 data bytes; they must end together
    """
    header = parse_object(text)
    metadata = _metadata(header.pop(METADATA, {}))
    entries = sorted((_entry(name, fields) for name, fields in header.items()), key=lambda e: (e.start, e.stop))
    end = 0
    for entry in entries:
        if entry.start != end:
            fault = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise FileFormatError(f"tensor {shown(entry.name)} starts at byte {entry.start} and {fault}, at {end}")
        end = entry.stop
    if end != data_bytes:
        raise FileFormatError(f"the tensors end at byte {end} of {data_bytes} data bytes; they must end together")
    return metadata, {entry.name: entry for entry in entries}


def parse_object(text: bytes, what: str = "header") -> dict[str, Any]:
    """A JSON object as a dict. Bytes are not trusted before their nesting is known: a parser recurses into it.

    Raises FileFormatError for anything else, or deeper than three levels; it calls the text `what`.
    """
    if not text.startswith(b"{"):
        raise FileFormatError(f"the {what} starts with {shown(text[:8])}; it must start with '{{'")
    brackets = _outside_strings(text).translate(None, _NOT_BRACKETS)
    for _ in range(_LEVELS):
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    if brackets:
        raise FileFormatError(f"the {what}'s brackets are unbalanced or nested deeper than {_LEVELS} levels")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=partial(_unique, what), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise FileFormatError(f"the {what} is not UTF-8: byte {error.start} is {text[error.start]:#04x}") from None
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of more digits than Python converts
        raise FileFormatError(f"the {what} is not JSON: {str(error).splitlines()[0]}") from None


def _outside_strings(text: bytes) -> bytes:
    """What stands outside the JSON strings; in linear time, for any bytes."""
    without_escapes = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    return re.sub(rb'"[^"]*"?', b"", without_escapes)


def _unique(what: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of the JSON text; the same name twice would hide one of the two."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise FileFormatError(f"the name {shown(name)} stands twice in the {what}; names must be unique")
        found[name] = value
    return found


def _no_constant(text: str) -> None:
    raise FileFormatError(f"the header holds {text}, which is not JSON")


def _metadata(found: object) -> dict[str, str]:
    """Checked metadata, of a file or of a caller."""
    if not isinstance(found, Mapping):
        raise FileFormatError(f"{METADATA} is {shown(found)}; it must map strings to strings")
    for key, value in found.items():
        for text in (key, value):
            if not isinstance(text, str) or not _encodes(text):
                raise FileFormatError(f"{METADATA} holds {shown(key)}: {shown(value)}; it must map strings to strings")
    return dict(found)


def _encodes(text: str) -> bool:
    r"""False for half a surrogate pair, which the JSON escape \ud800 makes and UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_name(name: object) -> str:
    if not isinstance(name, str) or "\0" in name or not _encodes(name):
        raise FileFormatError(f"tensor {shown(name)}: a name must be a string of Unicode text without NUL")
    return name


def _entry(name: str, fields: object) -> Entry:
    """One item of the header, checked."""
    where = f"tensor {shown(_check_name(name))}"
    if not isinstance(fields, dict) or set(fields) != _FIELDS:
        raise FileFormatError(f"{where} is {shown(fields)}; it must have dtype, shape and data_offsets, no more")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FileFormatError(f"{where} has dtype {shown(dtype)}; known are {', '.join(DTYPES)}")
    _check_shape(where, DTYPES[dtype], shape)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FileFormatError(
            f"{where} has data_offsets {shown(offsets)}; they must be [start, stop], 0 <= start <= stop"
        )
    needed = prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise FileFormatError(
            f"{where} of dtype {dtype} and shape {shown(shape)} takes {needed} bytes; "
            f"its data_offsets {offsets} hold {offsets[1] - offsets[0]}"
        )
    return Entry(name, DTYPES[dtype], tuple(shape), offsets[0], offsets[1])


def _are_sizes(values: object) -> bool:
    """A list of integers from 0 to 2**63 - 1; True and False are none."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _LIMIT for value in values)


def _check_shape(where: str, dtype: torch.dtype, shape: Any) -> None:
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS or not fits(dtype, shape):
        raise FileFormatError(
            f"{where} has shape {shown(shape)}; a shape is at most {_MAX_DIMS} integers >= 0 "
            "that multiply to fewer than 2**63 bytes"
        )


def layout(
    tensors: Sequence[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str], least: int = 0
) -> tuple[bytes, dict[str, Entry]]:
    """The first bytes of a file, prefix and header, and its entries, one after the other in the order given.

    Spaces fill the header up to a multiple of 8 bytes. The data so starts aligned, and each tensor is aligned where
    larger elements stand before smaller ones. More spaces fill it up to `least` bytes, prefix and all. Raises
    FileFormatError for what the format cannot hold.

    >>> head, entries = layout([("a", torch.int8, (3,)), ("b", torch.int8, ())], {})
    >>> len(head) % 8, entries["b"]
    (0, Entry(name='b', dtype=torch.int8, shape=(), start=3, stop=4))
    """
    header: dict[str, Any] = {METADATA: _metadata(metadata)} if metadata else {}
    entries: dict[str, Entry] = {}
    start = 0
    for name, dtype, shape in tensors:
        where = f"tensor {shown(_check_name(name))}"
        if name in entries or name == METADATA:
            rule = "reserved by the format" if name == METADATA else "already taken; names must be unique"
            raise FileFormatError(f"{where}: this name is {rule}")
        if dtype not in DTYPE_NAMES:
            raise FileFormatError(f"{where} has dtype {dtype}, which the format cannot hold; convert the tensor first")
        _check_shape(where, dtype, list(shape))
        entry = Entry(name, dtype, tuple(shape), start, start + prod(shape) * dtype.itemsize)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, entry.stop]}
        entries[name], start = entry, entry.stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * max(0, least - PREFIX - len(text))
    text += b" " * (-len(text) % PREFIX)
    if len(text) > MAX_HEADER:
        raise FileFormatError(f"the header would take {len(text)} bytes; the format allows {MAX_HEADER}: use two files")
    return len(text).to_bytes(PREFIX, "little") + text, entries
