"""The accuracy table: one row a weight-carrying node, printable as text, markdown, csv, json and html."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from dataclasses import dataclass
from typing import Any

from mono_quant_fx.accuracy.outputs import OutputFigure, why_none
from mono_quant_fx.accuracy.row import AccuracyRow, cells_of, columns_of, db, figures_of, kib, tabulated
from mono_quant_fx.web.page import Shown
from mono_quant_fx.web.table import HtmlRow, render

#: What a table was measured on, and what that means.
EVALUATION, HELD_OUT, CALIBRATION = "evaluation data", "held-out data", "calibration data"
MEANING = {
    EVALUATION: "",
    HELD_OUT: ", which calibration did not see",
    CALIBRATION: ", which the weights were fitted to: other data may have less",
}
NEEDS_DATA = "only weights were judged: local dB, acc dB and max err need calibration_data or evaluation_data"


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
        cells = [cells_of(row) for row in self.rows]
        rows = [HtmlRow(c, figures_of(row), row.status) for c, row in zip(cells, self.rows, strict=True)]
        total = self._total()
        return render(columns_of([*cells, total]), rows, HtmlRow(total, {}), self._notes())

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
        return tabulated([*map(cells_of, self.rows), self._total()], style)

    def _total(self) -> dict[str, str]:
        total = {"node": "total", "module": "model output", "acc dB": db(self.output_sqnr_db)}
        return total | {"KiB": kib(self.bytes_before), "KiB after": kib(self.bytes_after)}


def _jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
