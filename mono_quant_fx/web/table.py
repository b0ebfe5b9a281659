"""The accuracy table for a notebook: sorted by a click on a column's head, coloured by status, with bars for dB."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mono_quant_fx.web.page import escape, frame

#: The SQNR that fills a bar.
FULL_BAR_DB = 60.0
#: Longer texts are broken into lines.
LONG = 36
STATUSES = ("critical", "warning", "ok", "good", "float")


@dataclass(frozen=True)
class HtmlRow:
    """One row: what each column shows, the figures behind those that hold one, and the row's status."""

    cells: Mapping[str, str]
    figures: Mapping[str, float | None]
    status: str = ""


def render(columns: Mapping[str, str], rows: Sequence[HtmlRow], total: HtmlRow, notes: Sequence[str]) -> str:
    """The table with its style and script.

    Args:
        columns: name -> alignment, "left" or "right".
        total: the last row, which stays below however the others are sorted.
        notes: lines below the table.
    """
    head = "".join(
        f'<th class="{align}" role="button" tabindex="0" aria-sort="none">{escape(name)}</th>'
        for name, align in columns.items()
    )
    body = "".join(_row(columns, row) for row in rows)
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    table = (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
        f"<tfoot>{_row(columns, total)}</tfoot></table></div>"
    )
    return frame(f"{table}{below}", "table.js")


def _row(columns: Mapping[str, str], row: HtmlRow) -> str:
    cells = "".join(_cell(name, align, row) for name, align in columns.items())
    return f'<tr class="{row.status}">{cells}</tr>' if row.status in STATUSES else f"<tr>{cells}</tr>"


def _cell(name: str, align: str, row: HtmlRow) -> str:
    text, value = row.cells.get(name, ""), row.figures.get(name)
    classes, extra = [align], ""
    if len(text) > LONG:
        classes.append("long")
    if value is not None and math.isnan(value):
        extra = ' data-v=""'  # sorts with the empty cells
    elif value is not None:
        extra = f' data-v="{_javascript(value)}"'
        if name.endswith(" dB") and value > 0:
            classes.append("bar")
            extra += f' style="--w:{100 * min(value / FULL_BAR_DB, 1):.0f}%"'
    if name == "status" and text:
        return f'<td class="{align}"><span class="status">{escape(text)}</span></td>'
    return f'<td class="{" ".join(classes)}"{extra}>{escape(text)}</td>'


def _javascript(value: float) -> str:
    """A number as JavaScript's Number() reads it."""
    return str(value) if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"
