"""What compile_backend did: one row a weight and graph, printable as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tabulate import tabulate
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from mono_quant_fx import graph
from mono_quant_fx.accuracy import WeightFigures, judged, rows_of
from mono_quant_fx.annotation import QuantAnnotation, annotated
from mono_quant_fx.config import QuantConfig
from mono_quant_fx.rules import Known, unmatched_patterns
from mono_quant_fx.shared_codes import Entry
from mono_quant_fx.table import AccuracyRow, db, kib
from mono_quant_fx.weight_ops import find_weights, hidden_weights

#: Column -> alignment.
COLUMNS = {
    "graph": "right", "weight": "left", "op": "left", "scheme": "left", "reason": "left", "shape": "left",
    "KiB": "right", "KiB after": "right", "weight dB": "right", "status": "left",
}  # fmt: skip


@dataclass(frozen=True)
class CompiledGraph:
    """One graph that Dynamo handed over: its number, from 0 in the order of compilation, and a row a weight and user.

    `weight` in a row is the weight's name, with a number where another weight had that name before.
    """

    number: int
    rows: tuple[AccuracyRow, ...]

    @property
    def is_quantized(self) -> bool:
        """Whether any weight of it is."""
        return any(map(_is_stored, self.rows))


@dataclass(frozen=True)
class CompileReport:
    """All graphs so far; str() is the table, with what is worth knowing below it."""

    graphs: tuple[CompiledGraph, ...]
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[AccuracyRow, ...]:
        """The rows of all graphs."""
        return tuple(row for g in self.graphs for row in g.rows)

    @property
    def quantized(self) -> dict[str, str]:
        """Weight -> scheme, of those that some graph reads as codes."""
        return {row.weight: row.scheme for row in self.rows if _is_stored(row)}

    @property
    def skipped(self) -> dict[str, str]:
        """Weight -> reason, of those that are float in every graph."""
        return {row.weight: row.reason for row in self.rows if row.weight not in self.quantized}

    @property
    def bytes_before(self) -> int:
        """Bytes of all float weights, each counted once."""
        return sum(row.bytes_before for row in self._once().values())

    @property
    def bytes_after(self) -> int:
        """Bytes of the weights as the graphs read them, each counted once."""
        return sum(row.bytes_after for row in self._once().values())

    def _once(self) -> dict[str, AccuracyRow]:
        rows = sorted(filter(lambda row: row.bytes_before, self.rows), key=_is_stored)
        return {row.weight: row for row in rows}

    def __str__(self) -> str:
        if not self.graphs:
            return "nothing was compiled yet: call the compiled model first"
        cells = [_cells(g.number, row) for g in self.graphs for row in g.rows]
        cells.append({"graph": "total", "KiB": kib(self.bytes_before), "KiB after": kib(self.bytes_after)})
        body = [[cell.get(name, "") for name in COLUMNS] for cell in cells]
        table = tabulate(body, tuple(COLUMNS), "simple", colalign=tuple(COLUMNS.values()), disable_numparse=True)
        return "\n".join([table, *self._summary(), *self.notes])

    def _summary(self) -> list[str]:
        lines = [f"{len(self.quantized)} weights quantized, {len(self.skipped)} kept, in {len(self.graphs)} graphs"]
        if not self.quantized:
            reasons = Counter(row.reason for row in self.rows).most_common(8)
            listed = "; ".join(f"{n} x {reason}" for reason, n in reasons) or "no graph holds a weight"
            lines.append(f"NOTHING WAS QUANTIZED: {listed}")
        bare = [str(g.number) for g in self.graphs if not g.rows]
        plain = [str(g.number) for g in self.graphs if g.rows and not g.is_quantized]
        lines += [f"graphs without a weight: {', '.join(bare)}"] if bare else []
        lines += [f"graphs whose weights all stay as they are: {', '.join(plain)}"] if plain else []
        return lines


class Ledger:
    """Collects the rows of a report, and knows each weight by its identity."""

    def __init__(self, config: QuantConfig):
        self._config = config
        self._graphs: list[CompiledGraph] = []
        self._known = Known()
        self._labels: Any = WeakTensorKeyDictionary()
        self._taken: Counter[str] = Counter()
        self._first: dict[str, int] = {}

    def report(self) -> CompileReport:
        """What was added so far."""
        unmatched = unmatched_patterns(self._config, self._known) if self._graphs else ()
        return CompileReport(tuple(self._graphs), tuple(f"so far, {line}" for line in unmatched))

    def add(self, gm: fx.GraphModule, entries: Mapping[str, Entry]) -> tuple[AccuracyRow, ...]:
        """Notes a graph whose weights are annotated; `entries` has the codes by the weight's name in it."""
        number = len(self._graphs)
        self._known |= Known.of(find_weights(gm), hidden_weights(gm))
        rows = []
        for node, annotation in annotated(gm):
            tensor = graph.get_tensor(gm, node)
            if tensor is not None:
                rows += self._rows(tensor, annotation, entries.get(annotation.weight), number)
        self._graphs.append(CompiledGraph(number, tuple(rows)))
        return tuple(rows)

    def _rows(self, tensor: Tensor, annotation: QuantAnnotation, entry: Entry | None, number: int) -> list[AccuracyRow]:
        label, reason = self._label(tensor, annotation.weight), annotation.reason
        figures = WeightFigures(annotation.dtype, tensor.nbytes, tensor.nbytes, None)
        if entry is not None:
            size = sum(t.nbytes for t in entry.stored if t is not None)
            figures = WeightFigures(str(annotation.scheme), tensor.nbytes, size, entry.sqnr_db)
            first = self._first.setdefault(label, number)
            reason = "; ".join(filter(None, (reason, f"codes of graph {first}" if first != number else "")))
        rows = rows_of(replace(annotation, weight=label, reason=reason), figures)
        limits = self._config.sqnr_warning_threshold, self._config.sqnr_error_threshold
        return [judged(row, *limits) for row in rows]

    def _label(self, tensor: Tensor, name: str) -> str:
        if tensor not in self._labels:
            self._taken[name] += 1
            count = self._taken[name]
            self._labels[tensor] = name if count == 1 else f"{name} ({count})"
        return self._labels[tensor]


def _is_stored(row: AccuracyRow) -> bool:
    return row.weight_sqnr_db is not None


def _cells(number: int, row: AccuracyRow) -> dict[str, str]:
    return {
        "graph": str(number),
        "weight": row.weight,
        "op": row.op,
        "scheme": row.scheme,
        "reason": row.reason,
        "shape": "x".join(map(str, row.shape)),
        "KiB": kib(row.bytes_before),
        "KiB after": kib(row.bytes_after),
        "weight dB": db(row.weight_sqnr_db),
        "status": row.status,
    }
