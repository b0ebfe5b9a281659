"""The accuracy table: one row a weight-carrying node, printable as text, markdown, csv, json and html."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from mono_quant_fx import table_html
from mono_quant_fx.html import Shown
from mono_quant_fx.outputs import OutputFigure, why_none

#: What a table was measured on, and what that means.
EVALUATION, HELD_OUT, CALIBRATION = "evaluation data", "held-out data", "calibration data"
MEANING = {
    EVALUATION: "",
    HELD_OUT: ", which calibration did not see",
    CALIBRATION: ", which the weights were fitted to: other data may have less",
}
NEEDS_DATA = "only weights were judged: local dB, acc dB and max err need calibration_data or evaluation_data"


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
        status: "critical", "warning", "ok", "good", or "float".
        activations: what the node's input became: "int8 asym", "int8 sym", or "" where it stays float.
        observer, input_range: what watched the node's input during calibration, and the [min, max] it saw.
        algorithm: what rounded the weight.
        gain_db: on the calibration inputs, how many dB less output error than rounding to nearest gives.
        int8_gain_db: how many dB less still INT8 per channel would give.
        bias_gain_db: how many dB less output error the corrected bias gives.
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

    @property
    def judged_db(self) -> float | None:
        """The figure that the status judges: the local output's SQNR, and without data the weight's."""
        return self.local_sqnr_db if self.local_sqnr_db is not None else self.weight_sqnr_db


@dataclass(frozen=True)
class AccuracyTable(Shown):
    """Rows in execution order, and the SQNR of the model's output.

    str() is the table for a terminal; `_repr_html_` the one for a notebook.

    Attributes:
        output_sqnr_db: of the worst output that depends on a quantized weight; None without data, and where no
            floating-point output does.
        samples: how many were measured.
        measured_on: "held-out data", "evaluation data" or "calibration data" in a table of quantize; None where the
            caller chose the data, or an older version wrote the table.
        outputs: one figure an output, by name.
    """

    rows: tuple[AccuracyRow, ...]
    output_sqnr_db: float | None = None
    samples: int = 0
    measured_on: str | None = None
    outputs: tuple[OutputFigure, ...] = ()

    @property
    def bytes_before(self) -> int:
        """Bytes of all weights in the table before."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        """Bytes of all weights in the table after."""
        return sum(row.bytes_after for row in self.rows)

    def __str__(self) -> str:
        return "\n".join([self._render("simple"), *self._notes()])

    def to_markdown(self) -> str:
        """A GitHub-flavoured table, with the notes below."""
        return "\n\n".join([self._render("github"), *self._notes()])

    def to_html(self) -> str:
        """An HTML table that a click on a column's head sorts; every text from the model is escaped.

        The few lines of script and style that it needs are part of it; without scripts it is a plain table.
        """
        cells = [_cells(row) for row in self.rows]
        rows = [table_html.HtmlRow(c, _figures(row), row.status) for c, row in zip(cells, self.rows, strict=True)]
        total = self._total()
        return table_html.render(_columns([*cells, total]), rows, table_html.HtmlRow(total, {}), self._notes())

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_csv(self) -> str:
        """All fields of all rows and what they were measured on, unrounded; None is empty."""
        out = io.StringIO()
        fields = [f.name for f in dataclasses.fields(AccuracyRow)]
        writer = csv.DictWriter(out, [*fields, "measured_on"], lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            shape = "x".join(map(str, row.shape))
            writer.writerow({**dataclasses.asdict(row), "shape": shape, "measured_on": self.measured_on})
        return out.getvalue()

    def to_json(self) -> str:
        """All fields of all rows and the totals, unrounded; an infinite dB is the string "inf"."""
        rows = [{k: _jsonable(v) for k, v in dataclasses.asdict(row).items()} for row in self.rows]
        totals = {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "output_sqnr_db": _jsonable(self.output_sqnr_db),
            "samples": self.samples,
            "measured_on": self.measured_on,
            "outputs": [{k: _jsonable(v) for k, v in dataclasses.asdict(f).items()} for f in self.outputs],
        }
        return json.dumps({"rows": rows, "total": totals}, indent=2)

    @property
    def output_note(self) -> str:
        """Why measured outputs have no SQNR; "" where they have one, or nothing was measured."""
        return why_none(self.outputs) if self.samples and self.output_sqnr_db is None and self.outputs else ""

    @property
    def origin(self) -> str:
        """What the figures were measured on; "" where nobody knows."""
        if not self.samples or self.measured_on is None:
            return ""
        return f"measured on {self.measured_on}: {self.samples:,} samples{MEANING.get(self.measured_on, '')}"

    def _notes(self) -> list[str]:
        if not self.samples:
            return [NEEDS_DATA]
        told = [f"output {figure}" for figure in self.outputs] if len(self.outputs) > 1 else []
        note = self.output_note
        return [*told, *([f"no output dB: {note}"] if note else []), *([self.origin] if self.origin else [])]

    def _render(self, style: str) -> str:
        return _tabulate([*map(_cells, self.rows), self._total()], style)

    def _total(self) -> dict[str, str]:
        total = {"node": "total", "module": "model output", "acc dB": db(self.output_sqnr_db)}
        return total | {"KiB": kib(self.bytes_before), "KiB after": kib(self.bytes_after)}


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
    return _tabulate([_cells(row) for row in rows], "simple")


def _columns(cells: list[dict[str, str]]) -> dict[str, str]:
    decided = any(c.get("gain dB") or c.get("input") or c.get("bias dB") for c in cells)
    return COLUMNS | {k: v for k, v in CALIBRATED.items() if decided and any(c.get(k) for c in cells)}


def _tabulate(cells: list[dict[str, str]], style: str) -> str:
    columns = _columns(cells)
    body = [[c.get(name, "") for name in columns] for c in cells]
    return tabulate(body, tuple(columns), tablefmt=style, colalign=tuple(columns.values()), disable_numparse=True)


def _cells(row: AccuracyRow) -> dict[str, str]:
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


def _figures(row: AccuracyRow) -> dict[str, float | None]:
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


def _jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
