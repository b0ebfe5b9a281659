"""The difference of two files' accuracy tables, node by node, the largest loss first."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mono_quant_fx.accuracy.row import AccuracyRow, db, kib
from mono_quant_fx.accuracy.table import AccuracyTable
from mono_quant_fx.cli.rendering import CommandError, Grid, Report, printable
from mono_quant_fx.files.reader import TensorFile
from mono_quant_fx.storage.loading import read_header


@dataclass(frozen=True)
class Difference:
    """One node in two tables; None where a table does not have it."""

    a: AccuracyRow | None
    b: AccuracyRow | None

    @property
    def figures(self) -> tuple[str, float | None, float | None]:
        """Which dB is compared, and both: the local output's where both files measured it, else the weight's."""
        a, b = self.a, self.b
        if a is not None and b is not None and a.local_sqnr_db is not None and b.local_sqnr_db is not None:
            return "local", a.local_sqnr_db, b.local_sqnr_db
        return "weight", a.weight_sqnr_db if a else None, b.weight_sqnr_db if b else None

    @property
    def change_db(self) -> float | None:
        """B's dB less A's; negative is a loss. None where one is not known."""
        _, a, b = self.figures
        return change(a, b)

    @property
    def row(self) -> AccuracyRow:
        """Whichever there is, A's first."""
        row = self.a or self.b
        assert row is not None
        return row

    @property
    def note(self) -> str:
        """What else differs, in words."""
        if self.a is None or self.b is None:
            return "only in A" if self.b is None else "only in B"
        return "scheme changed" if self.a.scheme != self.b.scheme else ""


def change(a: float | None, b: float | None) -> float | None:
    """b - a, and 0 where they are equal, infinities included."""
    if a is None or b is None:
        return None
    return 0.0 if a == b else b - a


def differences(a: AccuracyTable, b: AccuracyTable) -> list[Difference]:
    """Nodes paired by weight and module, in their order; sorted by the largest loss, those without figures last."""
    pairs = list(_pairs(a, b))

    def loss(pair: Difference) -> float:
        value = pair.change_db
        return math.inf if value is None else -math.inf if math.isnan(value) else value

    return sorted(pairs, key=loss)


def _pairs(a: AccuracyTable, b: AccuracyTable) -> Iterator[Difference]:
    waiting: dict[tuple[str, str], list[AccuracyRow]] = defaultdict(list)
    for row in b.rows:
        waiting[row.weight, row.module].append(row)
    for row in a.rows:
        others = waiting[row.weight, row.module]
        yield Difference(row, others.pop(0) if others else None)
    for others in waiting.values():
        yield from (Difference(None, row) for row in others)


def read_table(path: Path) -> AccuracyTable:
    """A file's table, from its header."""
    with TensorFile(path) as file:
        return read_header(file).table


def compare_report(paths: tuple[Path, Path], a: AccuracyTable, b: AccuracyTable) -> Report:
    """A table of every node, and the totals."""
    found = differences(a, b)
    body = [_cells(pair) for pair in found]
    columns = ("module", "node", "A", "B", "dB of", ">A dB", ">B dB", ">change", ">A KiB", ">B KiB", "note")
    output = change(a.output_sqnr_db, b.output_sqnr_db)
    total = (
        f"weights: {kib(a.bytes_after) or 0} KiB -> {kib(b.bytes_after) or 0} KiB; model output SQNR: "
        f"{_figure(a.output_sqnr_db)} -> {_figure(b.output_sqnr_db)}" + ("" if output is None else f" ({output:+.1f})")
    )
    if a.samples and b.samples and a.measured_on != b.measured_on:
        total += f"; A is measured on {printable(_origin(a))}, B on {printable(_origin(b))}"
    data: dict[str, Any] = {
        "a": {"file": str(paths[0]), **_total(a)},
        "b": {"file": str(paths[1]), **_total(b)},
        "output_change_db": output,
        "rows": [_data(pair) for pair in found],
    }
    return Report(Grid("", columns, body), data, (f"A: {paths[0]}\nB: {paths[1]}",), (total,))


def _origin(table: AccuracyTable) -> str:
    return table.measured_on or "data that the file does not name"


def loss_verdict(a: AccuracyTable, b: AccuracyTable, most: float | None) -> str | None:
    """Why B lost too much: the model output or a node's, more than `most` dB; None where nothing did.

    Where one of the files has no output's figure, the weights are judged.

    Raises:
        CommandError: there is nothing to compare.
    """
    if most is None:
        return None
    output = change(a.output_sqnr_db, b.output_sqnr_db)
    if output is not None and not output >= -most:
        return f"the model output lost {-output:.2f} dB, more than {most:g} dB"
    known = [(pair, value) for pair in differences(a, b) if (value := pair.change_db) is not None]
    if not known and output is None:
        raise CommandError("--fail-loss-db: the two files have no figure in common")
    for pair, value in known:
        if (output is None or pair.figures[0] == "local") and not value >= -most:
            where = printable(pair.row.module or pair.row.node)
            return f"{where} lost {-value:.2f} dB ({pair.figures[0]}), more than {most:g} dB"
    return None


def _cells(pair: Difference) -> list[str]:
    kind, before, after = pair.figures
    value = pair.change_db
    known = before is not None or after is not None
    return [
        pair.row.module, pair.row.node, pair.a.scheme if pair.a else "", pair.b.scheme if pair.b else "",
        kind if known else "", db(before), db(after), "" if value is None else f"{value:+.1f}",
        kib(pair.a.bytes_after) if pair.a else "", kib(pair.b.bytes_after) if pair.b else "", pair.note,
    ]  # fmt: skip


def _data(pair: Difference) -> dict[str, Any]:
    kind, before, after = pair.figures
    sides = {
        name: None if row is None else {"scheme": row.scheme, "reason": row.reason, "bytes_after": row.bytes_after}
        for name, row in (("a", pair.a), ("b", pair.b))
    }
    own = {"module": pair.row.module, "node": pair.row.node, "weight": pair.row.weight, "note": pair.note}
    return {**own, **sides, "figure": kind, "a_db": before, "b_db": after, "change_db": pair.change_db}


def _total(table: AccuracyTable) -> dict[str, Any]:
    return {
        "bytes_after": table.bytes_after,
        "output_sqnr_db": table.output_sqnr_db,
        "samples": table.samples,
        "measured_on": table.measured_on,
    }


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f} dB"
