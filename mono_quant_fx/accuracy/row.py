"""A row of the accuracy table, and what its cells show."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tabulate import tabulate


@dataclass(frozen=True)
class AccuracyRow:
    """What happened to one node. A figure that was not measured is None.

    Attributes:
        node, op, module: the graph node, its operation, and the module whose forward made it.
        weight: the weight's fully qualified name.
        scheme: "int4 g128 sym", "int8 channel", or the float dtype.
        reason: why it was skipped, shrunk or fell back; empty when no rule singled it out.
        shape: of the float weight.
        bytes_before, bytes_after: storage of the weight; 0 in the rows of its further users.
        weight_sqnr_db: of the stored weight against the float one.
        local_sqnr_db: of the node's output with this node alone quantized, on float inputs.
        accumulated_sqnr_db, max_abs_error: of the node's output in the quantized graph.
        status: "critical", "warning", "ok", "good", or "float" (see judging.py).
        activations: what the node's input became: "int8 asym", "int8 sym", or "" where it stays float.
        observer, input_range: what watched the node's input during calibration, and the [min, max] it saw.
        algorithm: what rounded the weight.
        gain_db: on the calibration inputs, how many dB less output error than rounding to nearest gives.
        int8_gain_db: how many dB less still INT8 per channel would give.
        bias_gain_db: how many dB less output error the corrected bias gives.
        normal_sqnr_db: what weight_sqnr_db would be of normally distributed weights, at the same scheme.
    """

    node: str
    op: str
    module: str
    weight: str
    scheme: str
    reason: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    weight_sqnr_db: float | None = None
    local_sqnr_db: float | None = None
    accumulated_sqnr_db: float | None = None
    max_abs_error: float | None = None
    status: str = "float"
    activations: str = ""
    observer: str = ""
    input_range: tuple[float, float] | None = None
    algorithm: str = ""
    gain_db: float | None = None
    int8_gain_db: float | None = None
    bias_gain_db: float | None = None
    normal_sqnr_db: float | None = None

    @property
    def judged_db(self) -> float | None:
        """The local output's SQNR, and without data the weight's."""
        return self.local_sqnr_db if self.local_sqnr_db is not None else self.weight_sqnr_db


#: Column -> alignment. Of CALIBRATED the columns that say something are shown, when calibration has decided anything.
COLUMNS = {
    "node": "left", "op": "left", "module": "left", "scheme": "left", "reason": "left", "weight": "left",
    "KiB": "right", "KiB after": "right", "weight dB": "right", "local dB": "right", "acc dB": "right",
    "max err": "right", "status": "left",
}  # fmt: skip
CALIBRATED = {
    "input": "left", "input range": "left", "observer": "left",
    "algorithm": "left", "gain dB": "right", "int8 dB": "right", "bias dB": "right",
}  # fmt: skip


def format_rows(rows: Iterable[AccuracyRow]) -> str:
    """Some rows of a table, without totals."""
    return tabulated([cells_of(row) for row in rows], "simple")


def columns_of(cells: list[dict[str, str]]) -> dict[str, str]:
    """The columns that these rows need."""
    decided = any(c.get("gain dB") or c.get("input") or c.get("bias dB") for c in cells)
    return COLUMNS | {k: v for k, v in CALIBRATED.items() if decided and any(c.get(k) for c in cells)}


def tabulated(cells: list[dict[str, str]], style: str) -> str:
    """The rows as text, in a style of tabulate's."""
    columns = columns_of(cells)
    body = [[c.get(name, "") for name in columns] for c in cells]
    return tabulate(body, tuple(columns), tablefmt=style, colalign=tuple(columns.values()), disable_numparse=True)


def cells_of(row: AccuracyRow) -> dict[str, str]:
    """Column -> text."""
    low, high = row.input_range or (0.0, 0.0)
    return {
        "node": row.node,
        "op": row.op,
        "module": row.module,
        "scheme": row.scheme,
        "reason": row.reason,
        "weight": "x".join(map(str, row.shape)),
        "KiB": kib(row.bytes_before),
        "KiB after": kib(row.bytes_after),
        "weight dB": db(row.weight_sqnr_db),
        "local dB": db(row.local_sqnr_db),
        "acc dB": db(row.accumulated_sqnr_db),
        "max err": "" if row.max_abs_error is None else f"{row.max_abs_error:.2g}",
        "status": row.status,
        "input": row.activations,
        "input range": f"{low:.3g} .. {high:.3g}" if row.input_range else "",
        "observer": row.observer,
        "algorithm": row.algorithm if row.observer else "",
        "gain dB": db(row.gain_db),
        "int8 dB": db(row.int8_gain_db),
        "bias dB": db(row.bias_gain_db),
    }


def figures_of(row: AccuracyRow) -> dict[str, float | None]:
    """The unrounded figures behind the cells, by which a column is sorted."""
    return {
        "weight": float(math.prod(row.shape)),
        "KiB": row.bytes_before or None,
        "KiB after": row.bytes_after or None,
        "weight dB": row.weight_sqnr_db,
        "local dB": row.local_sqnr_db,
        "acc dB": row.accumulated_sqnr_db,
        "max err": row.max_abs_error,
        "input range": row.input_range[1] - row.input_range[0] if row.input_range else None,
        "gain dB": row.gain_db,
        "int8 dB": row.int8_gain_db,
        "bias dB": row.bias_gain_db,
    }


def kib(count: int) -> str:
    """Bytes as KiB; nothing for none."""
    return f"{count / 1024:.1f}" if count else ""


def db(value: float | None) -> str:
    """A figure in dB; nothing where none was measured."""
    return "" if value is None else f"{value:.1f}"
