"""Everything that can be wrong with a saved model's tensors and graph, found without running the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from mono_quant_fx.errors import FileFormatError, GraphFormatError
from mono_quant_fx.files.header import DTYPE_NAMES, Entry, shown
from mono_quant_fx.files.reader import TensorFile
from mono_quant_fx.graph.annotation import QuantAnnotation
from mono_quant_fx.graph.weight_ops import matrix_shape
from mono_quant_fx.numerics.affine import code_range, num_groups
from mono_quant_fx.process.surroundings import in_plain_surroundings
from mono_quant_fx.storage.loading import Header, own_graph, read_header
from mono_quant_fx.storage.saving import DIGESTS
from mono_quant_fx.storage.statements import graph_faults, table_faults

LAYOUTS = ("rows", "columns", "transposed_conv")
#: Endings of names under which codes and qparams are stored.
STORED = ("_packed", "_scale", "_zero_point")


class Problem(NamedTuple):
    """What is wrong (one line), and with what: a tensor's or weight's name, or a part of the header."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{shown(self.where)} {self.what}"


@dataclass
class Findings:
    """What was looked at, and what is wrong with it."""

    tensors: int
    weights: int
    problems: list[Problem] = field(default_factory=list)


@in_plain_surroundings
def verify_file(file: TensorFile) -> Findings:
    """Checks a file that save wrote: plan, shapes, codes, scales, zero points, names and digests.

    Raises:
        FileFormatError: the header is damaged, or of another file; then there is nothing to check against.
    """
    header = read_header(file)
    found = Findings(len(file.entries), sum(entry.lowered for entry in header.plan))
    owned: set[str] = set()
    for entry in header.plan:
        found.problems += _check_weight(file, header, entry, owned)
    found.problems += _check_names(file, header, owned)
    found.problems += [Problem(*fault) for fault in table_faults(header.plan, header.table, header.capture.tied)]
    found.problems += _check_digests(file)
    first = {(p.where, p.what.partition(";")[0]): p for p in reversed(found.problems)}  # missing twice is missing once
    found.problems = [p for p in found.problems if first[p.where, p.what.partition(";")[0]] is p]
    return found


def _check_weight(file: TensorFile, header: Header, entry: QuantAnnotation, owned: set[str]) -> Iterator[Problem]:
    """The tensors of one planned weight; adds their names to `owned`."""
    if not entry.lowered:
        yield from _check_float(file, header, entry)
        return
    names = [header.tied.get(name, name) for name in replace(entry, merged=None).storage_names]
    is_symmetric = entry.scheme is not None and entry.scheme.symmetric
    owned.update(names[: 2 if is_symmetric else 3])
    problem = _plan_fault(entry)
    if problem is not None:
        yield Problem(entry.weight, problem)
        return
    wanted = _wanted(entry)
    for kind, (name, (dtype, shape)) in enumerate(zip(names, wanted, strict=False)):
        stored = file.entries.get(name)
        if stored is None:
            yield Problem(name, f"is missing; the plan stores weight {shown(entry.weight)} so")
        elif (stored.dtype, stored.shape) != (dtype, shape):
            yield Problem(name, f"is {_look(stored)} where the plan needs {DTYPE_NAMES[dtype]}{list(shape)}")
        elif kind == 0:
            yield from _check_codes(file, name, entry)
        elif kind == 1:
            yield from check_scale(name, file.tensor(name))
        else:
            yield from _check_zero_point(name, file.tensor(name), entry)


def _plan_fault(entry: QuantAnnotation) -> str | None:
    if entry.scheme is None:
        return "is lowered in the plan, and has no scheme"
    if entry.layout not in LAYOUTS:
        return f"has layout {shown(entry.layout)} in the plan; known are {', '.join(LAYOUTS)}"
    if len(entry.shape) < 2 or any(size < 1 for size in entry.shape) or prod(entry.shape) >= 2**63:
        return f"has shape {shown(list(entry.shape))} in the plan; a matrix of 1 x 1 or more is needed"
    if entry.groups < 1 or prod(entry.shape) % matrix_shape(entry.shape, entry.layout, entry.groups)[0]:
        return f"has {shown(entry.groups)} groups in the plan, which do not divide {list(entry.shape)}"
    if not isinstance(_dtype(entry.dtype), torch.dtype) or not _dtype(entry.dtype).is_floating_point:
        return f"has dtype {shown(entry.dtype)} in the plan; a floating-point type is needed"
    return None


def _dtype(name: str) -> torch.dtype:
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_NAMES}
    return known.get(name)  # type: ignore[return-value]


def _wanted(entry: QuantAnnotation) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Types and shapes of codes, scale and, where there is one, zero point."""
    assert entry.scheme is not None
    rows, columns = matrix_shape(entry.shape, entry.layout, entry.groups)
    groups = num_groups(columns, entry.scheme.group_size)
    is_packed = entry.scheme.bits == 4
    codes = (torch.int32, (rows, -(-columns // 8))) if is_packed else (torch.int8, (rows, columns))
    zero_point = [] if entry.scheme.symmetric else [(torch.int8, (rows, groups))]
    return [codes, (_dtype(entry.dtype), (rows, groups)), *zero_point]


def _check_codes(file: TensorFile, name: str, entry: QuantAnnotation) -> Iterator[Problem]:
    """Every code is in range by construction; what lies behind the last column has to be 0."""
    assert entry.scheme is not None
    unused = -matrix_shape(entry.shape, entry.layout, entry.groups)[1] % 8
    if entry.scheme.bits == 8 or not unused:
        return
    last = file.tensor(name)[:, -1].to(torch.int64) & 0xFFFFFFFF
    count = int((last >> 4 * (8 - unused) != 0).sum())
    if count:
        yield Problem(name, f"has {count} rows whose {unused} unused codes behind the last column are not 0")


def check_scale(name: str, scale: Tensor) -> Iterator[Problem]:
    """A scale is finite, positive, and no subnormal number of its type.

    >>> for problem in check_scale("s", torch.tensor([1.0, float("nan"), -1.0, 1e-42])):
    ...     print(problem)
    's' has 1 scales of 4 that are not finite
    's' has 1 scales of 4 that are not positive
    's' has 1 scales of 4 that are subnormal
    """
    values = scale.double()
    is_finite, is_positive = torch.isfinite(values), values > 0
    least = max(torch.finfo(scale.dtype).tiny, torch.finfo(torch.float32).tiny)  # products are taken in float32
    faults = {
        "not finite": ~is_finite,
        "not positive": is_finite & ~is_positive,
        "subnormal": is_finite & is_positive & (values < least),
    }
    for what, mask in faults.items():
        if count := int(mask.sum()):
            yield Problem(name, f"has {count} scales of {scale.numel()} that are {what}")


def _check_zero_point(name: str, zero_point: Tensor, entry: QuantAnnotation) -> Iterator[Problem]:
    assert entry.scheme is not None
    qmin, qmax = code_range(entry.scheme.bits)
    count = int(((zero_point < qmin) | (zero_point > qmax)).sum())
    if count:
        yield Problem(name, f"has {count} zero points of {zero_point.numel()} outside {qmin}..{qmax}")


def _check_float(file: TensorFile, header: Header, entry: QuantAnnotation) -> Iterator[Problem]:
    """A weight that stayed as it was, or, among the tensors of a module that stayed whole, its largest weight."""
    planned = f"{shown(entry.dtype)[1:-1]}{shown(list(entry.shape))}"
    stored = file.entries.get(header.tied.get(entry.weight, entry.weight))
    if stored is not None:
        if not _is_planned(stored, entry):
            yield Problem(entry.weight, f"is {_look(stored)} where the plan has {planned}")
        return
    own = [name for name in (*file.entries, *header.tied) if name.startswith(f"{entry.weight}.")]
    parts = [file.entries.get(header.tied.get(name, name)) for name in own]
    if not parts:
        yield Problem(entry.weight, "is missing; the plan leaves it as it is")
    elif not any(part is not None and _is_planned(part, entry) for part in parts):
        yield Problem(entry.weight, f"has no tensor that is {planned}, as the plan has it")


def _is_planned(stored: Entry, entry: QuantAnnotation) -> bool:
    return (str(stored.dtype).removeprefix("torch."), stored.shape) == (entry.dtype, entry.shape)


def _check_names(file: TensorFile, header: Header, owned: set[str]) -> Iterator[Problem]:
    """Names that the header mentions exist, and what looks like a stored weight belongs to one."""
    for name, source in header.tied.items():
        if source not in file.entries and source not in header.stacked:
            yield Problem(source, f"is missing; {shown(name)} is tied to it")
    for name, parts in header.stacked.items():
        for part in parts:
            if part not in file.entries:
                yield Problem(part, f"is missing; {shown(name)} is stacked from it")
    planned = {entry.weight for entry in header.plan}
    lowered = {entry.weight for entry in header.plan if entry.lowered}
    for name in sorted(file.entries.keys() - owned - planned):
        base = next((name.removesuffix(end) for end in STORED if name.endswith(end)), None)
        if base is not None and (base in planned or f"{base}_packed" in file.entries):
            yield Problem(name, "is unknown; no weight of the plan is stored so")
    yield from _check_graph(file, header)
    for name in sorted(lowered & file.entries.keys() - owned):
        yield Problem(name, "is unknown; the plan stores this weight as codes, and here is a float tensor besides")


def _check_graph(file: TensorFile, header: Header) -> Iterator[Problem]:
    """A graph in the file lists its tensors, these and no others are there, and load would take what it calls."""
    if header.graph is None:
        return
    records = header.graph.get("tensors") if isinstance(header.graph, dict) else None
    names = list(map(str, records)) if isinstance(records, dict) else []
    read = {own for name in names for own in header.stacked.get(name, [header.tied.get(name, name)])}
    for name in sorted(read - file.entries.keys()):
        yield Problem(name, "is missing; the graph in the file reads it")
    for name in sorted(file.entries.keys() - read - {DIGESTS} if names else ()):
        yield Problem(name, "is unknown; the graph in the file does not read it")
    if read <= file.entries.keys():
        try:
            yield from (Problem(*fault) for fault in graph_faults(header.plan, own_graph(file, header)))
        except (GraphFormatError, FileFormatError) as error:
            yield Problem("graph", f"cannot be loaded: {' '.join(str(error).split())[:400]}")


def _check_digests(file: TensorFile) -> Iterator[Problem]:
    """SHA-256 of every tensor, in the order of the file, against the row that was stored."""
    names = [name for name in file.entries if name != DIGESTS]
    stored = file.entries.get(DIGESTS)
    if stored is None:
        yield Problem(DIGESTS, "is missing; it holds a SHA-256 digest of each tensor")
    elif (stored.dtype, stored.shape) != (torch.uint8, (len(names), 32)):
        yield Problem(DIGESTS, f"is {_look(stored)}; {len(names)} tensors need U8[{len(names)}, 32]")
    else:
        for name, row in zip(names, file.tensor(DIGESTS), strict=True):
            if file.digest(name) != bytes(row.tolist()).hex():
                yield Problem(name, "does not have the SHA-256 digest that was stored with it; its bytes changed")


def _look(entry: Entry) -> str:
    return f"{DTYPE_NAMES[entry.dtype]}{shown(list(entry.shape))}"
