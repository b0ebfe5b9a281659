"""The tables of linears in docs/performance.md, and what they say in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.benchmarks.accuracy_page import number, table
from tests.benchmarks.accuracy_settings import OURS
from tests.benchmarks.linear_peers import BF16, PEERS

Figures = Mapping[str, Any]

COLUMNS = """\
M is the number of rows of x. `ms` is mono_quant_fx; every other column is how many times faster it is than that peer.
aten int4pack, quanto, bnb and torchao get bfloat16 x, which they are fastest with; ONNX Runtime (ORT: MatMulNBits,
accuracy level 0 multiplies in float32, level 4 in INT8) gets float32 x. The weights are {group},
except bnb nf4 (blocks of 64), and rotate, so that none stays in the last-level cache. `best INT4 peer` is the fastest
of the INT4 columns at that M.
"""


def linear_part(figures: Mapping[str, Figures]) -> str:
    """The whole part: what it says, then a table a shape, then float32 x."""
    shapes = _shapes(figures)
    in_float, in_int8 = figures.get("linear float32"), figures.get("linear int8")
    if not shapes and in_float is None:
        return ""
    some: Figures = shapes[0] if shapes else in_float  # type: ignore[assignment]
    text = "## A linear layer\n\n" + COLUMNS.format(group=f"symmetric, in groups of {some['group_size']}")
    text += f"\nKernels: {some['kernels']}.\n" + _missing([*shapes, *([in_float] if in_float else [])])
    for found in shapes:
        text += f"\n### {found['shape']} (N x K), {found['dtype']} x\n\n{linear_text(found)}"
    if in_float is not None:
        text += (
            f"\n### {in_float['shape']}, float32 x\n\nHere mono_quant_fx gets float32 x, which it rounds to bfloat16 "
            f"on a CPU that multiplies bfloat16 (`compute`, see [Kernels](kernels.md)).\n\n{linear_text(in_float)}"
        )
    if in_int8 is not None:
        text += (
            f'\n### {in_int8["shape"]}, `activations="int8_dynamic"`\n\n'
            "In each call mono_quant_fx rounds x to INT8, a scale "
            f"for each row and group, beside peers that round x as well and float.\n\n{linear_text(in_int8)}"
        )
    return text


def _shapes(figures: Mapping[str, Figures]) -> list[Figures]:
    """The tables of the default setting, in order."""
    other = ("linear float32", "linear int8")
    return [f for key, f in figures.items() if key.startswith("linear ") and key not in other]


def linear_text(found: Figures) -> str:
    """One table, and who is ahead of mono_quant_fx in it."""
    rows = found["milliseconds"]
    names = [name for name in PEERS if any(name in taken for taken in rows.values())]
    int4 = [name for name in names if PEERS[name].is_int4]
    lines = []
    for count, taken in rows.items():
        ours = taken[OURS]
        ratios = [number(taken[n] / ours, 2) + "x" if n in taken else "" for n in names]
        best = min((n for n in int4 if n in taken), key=taken.__getitem__, default=None)
        last = [] if not int4 else ["" if best is None else f"{taken[best] / ours:.2f}x ({best})"]
        lines.append([count, number(ours, 3), *ratios, *last])
    head = ["M", "ms", *names, *(["best INT4 peer"] if int4 else [])]
    return f"{table(lines, head)}\n{ahead(found)}\n"


def ahead(found: Figures) -> str:
    """In words: the peers that are faster than mono_quant_fx, at which rows, and by how much.

    >>> ahead({"milliseconds": {"1": {"mono_quant_fx": 1.0, "bf16 F.linear": 2.0}}})
    'mono_quant_fx is ahead of every column at every M.'
    >>> ahead({"milliseconds": {"1": {"mono_quant_fx": 1.0, "bf16 F.linear": 2.0},
    ...                         "64": {"mono_quant_fx": 1.0, "bf16 F.linear": 0.8}}})
    '**Ahead of mono_quant_fx**: bf16 F.linear at M = 64 (1.25 times as fast).'
    """
    faster: dict[str, list[tuple[str, float]]] = {}
    for count, taken in found["milliseconds"].items():
        for name, each in taken.items():
            if each < taken[OURS]:
                faster.setdefault(name, []).append((count, taken[OURS] / each))
    if not faster:
        return "mono_quant_fx is ahead of every column at every M."
    said = [
        f"{name} at M = {', '.join(count for count, _ in at)} ({_span([by for _, by in at])} times as fast)"
        for name, at in faster.items()
    ]
    return f"**Ahead of mono_quant_fx**: {'; '.join(said)}."


def _span(ratios: list[float]) -> str:
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return low if low == high else f"{low} to {high}"


def _missing(tables: list[Figures]) -> str:
    """Which peers have no column, and why, in the package's own words."""
    reasons: dict[str, str] = {}
    for found in tables:
        reasons.update(found["reasons"])
    if not reasons:
        return ""
    lines = [f"- {name} ({PEERS[name].package}): `{reason.replace('`', '')}`" for name, reason in reasons.items()]
    return "\nWhat does not run here, in the package's own words:\n\n" + "\n".join(lines) + "\n"


def linear_summary(figures: Mapping[str, Figures]) -> list[str]:
    """The first shape in a line."""
    found = next(iter(_shapes(figures)), None)
    if found is None:
        return []
    rows = {count: taken[BF16] / taken[OURS] for count, taken in found["milliseconds"].items() if BF16 in taken}
    if not rows:
        return []
    first, last = next(iter(rows)), list(rows)[-1]
    return [
        f"- A linear of {found['shape']} is {rows[first]:.2f}x as fast as bfloat16's at M = {first}, and "
        f"{rows[last]:.2f}x at M = {last}. {ahead(found)}"
    ]
