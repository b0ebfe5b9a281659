"""What compile_backend did: one row a weight and graph, printable as text."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tabulate import tabulate
from torch import Tensor, fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from mono_quant_fx.accuracy.findings import AccuracyWarning, check_rows
from mono_quant_fx.accuracy.judging import with_statuses
from mono_quant_fx.accuracy.row import AccuracyRow, db, kib
from mono_quant_fx.accuracy.weight_figures import WeightFigures, rows_of
from mono_quant_fx.config import QuantConfig
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.annotation import QuantAnnotation, annotated
from mono_quant_fx.graph.skip_rules import Known, matching_patterns, unmatched_patterns
from mono_quant_fx.graph.weight_ops import find_weights, hidden_weights
from mono_quant_fx.torch_compile.frames import Fallback, current_frame, limits_hit
from mono_quant_fx.torch_compile.shared_codes import Entry

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
    """All graphs so far; str() is the table, with what is worth knowing below it.

    `fallbacks` are the functions that Dynamo left to Python, where weights stay float; `weights_of_model` is how many
    weights of two or more dimensions the model has that compile_backend was given, None without one.
    """

    graphs: tuple[CompiledGraph, ...]
    notes: tuple[str, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    weights_of_model: int | None = None

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
            return "\n".join([self._nothing(), *map(str, self.fallbacks), *self.notes])
        cells = [_cells(g.number, row) for g in self.graphs for row in g.rows]
        cells.append({"graph": "total", "KiB": kib(self.bytes_before), "KiB after": kib(self.bytes_after)})
        body = [[cell.get(name, "") for name in COLUMNS] for cell in cells]
        table = tabulate(body, tuple(COLUMNS), "simple", colalign=tuple(COLUMNS.values()), disable_numparse=True)
        return "\n".join([table, *self._summary(), *map(str, self.fallbacks), *self.notes])

    def headline(self) -> str:
        """How many weights are quantized, and of how many where the model is known."""
        whole = "" if self.weights_of_model is None else f" of {self.weights_of_model}"
        return f"{len(self.quantized)}{whole} weights quantized"

    def _nothing(self) -> str:
        if self.fallbacks:
            return f"NOTHING WAS QUANTIZED: {self.headline()}, Dynamo compiled nothing"
        return (
            "nothing was compiled so far: call the compiled model first; if it was called, Dynamo left all of it to "
            "Python and what it gave is the float model's output"
        )

    def _summary(self) -> list[str]:
        lines = [f"{self.headline()}, {len(self.skipped)} kept, in {len(self.graphs)} graphs"]
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

    def __init__(self, config: QuantConfig, model: nn.Module | None = None):
        self._config = config
        self._model = None if model is None else weakref.ref(model)
        self._graphs: list[list[AccuracyRow]] = []
        self._known = Known()
        self._labels: Any = WeakTensorKeyDictionary()
        self._taken: Counter[str] = Counter()
        self._first: dict[str, int] = {}
        self._fallbacks: dict[Fallback, None] = {}
        self._frames: dict[str, str] = {}

    @property
    def model(self) -> nn.Module | None:
        """The model whose names the weights get, while it lives."""
        return None if self._model is None else self._model()

    def report(self) -> CompileReport:
        """What was added so far."""
        notes = []
        if self._graphs:
            notes = [f"so far, {line}" for line in unmatched_patterns(self._config, self._known)]
        matrices = [(n, t) for n, t in self._model_tensors() if t.dim() > 1]
        unseen = [n for n, t in matrices if t not in self._labels]
        if unseen:
            more = f" and {len(unseen) - 8} more" if len(unseen) > 8 else ""
            notes.append(
                f"not seen so far: {', '.join(unseen[:8])}{more} (in code that Dynamo leaves to Python, or float in a "
                "graph that was compiled for another module)"
            )
        graphs = tuple(CompiledGraph(i, tuple(rows)) for i, rows in enumerate(self._graphs))
        fallbacks = (*self._fallbacks, *(limits_hit(self._frames) if self._frames else ()))
        return CompileReport(graphs, tuple(notes), fallbacks, None if self.model is None else len(matrices))

    def leave(self, fallback: Fallback) -> bool:
        """Notes a function that Dynamo left to Python; False if it was noted before."""
        is_new = fallback not in self._fallbacks
        self._fallbacks[fallback] = None
        return is_new

    def add(self, gm: fx.GraphModule, entries: Mapping[str, Entry]) -> int:
        """Notes a graph whose weights are annotated, and gives it a number.

        Args:
            entries: the codes, by the weight's name in the graph.

        Raises:
            AccuracyError: as check_rows.
        """
        number = len(self._graphs)
        self._graphs.append([])
        self._frames |= [frame] if (frame := current_frame()) else []
        self._known |= Known.of(find_weights(gm), hidden_weights(gm))
        for node, annotation in annotated(gm):
            tensor = tensors.get_tensor(gm, node)
            if tensor is None:  # a module that hides its weights
                self._graphs[number] += rows_of(annotation, WeightFigures.read(gm, gm, node, annotation))
            else:
                entry = entries.get(annotation.weight)
                self._graphs[number] += self._rows(tensor, annotation, entry, number, annotation.weight)
        check_rows(self._graphs[number], self._config)
        return number

    def sight(self, number: int, tensor: Tensor, annotation: QuantAnnotation, entry: Entry) -> None:
        """Notes that graph `number`, compiled for the weight of `annotation`, was called with another one."""
        name = next((n for n, t in self._model_tensors() if t is tensor), annotation.weight)
        if any(row.weight == self._label(tensor, name) for row in self._graphs[number]):
            return
        reason = f"Dynamo runs the graph of {annotation.weight} here"
        ignored = matching_patterns(self._config, name) ^ matching_patterns(self._config, annotation.weight)
        if ignored:
            reason += f", and so does not follow {', '.join(map(repr, sorted(ignored)))}"
            warnings.warn(f"compile_backend: {name}: {reason}", AccuracyWarning, stacklevel=2)
        annotation = replace(annotation, reason="; ".join(filter(None, (annotation.reason, reason))))
        self._graphs[number] += self._rows(tensor, annotation, entry, number, name)

    def _model_tensors(self) -> list[tuple[str, Tensor]]:
        return [] if self.model is None else list(self.model.named_parameters())

    def _rows(
        self, tensor: Tensor, annotation: QuantAnnotation, entry: Entry | None, number: int, name: str
    ) -> list[AccuracyRow]:
        label, reason = self._label(tensor, name), annotation.reason
        figures = WeightFigures(annotation.dtype, tensor.nbytes, tensor.nbytes, None)
        if entry is not None:
            size = sum(t.nbytes for t in entry.stored if t is not None)
            figures = WeightFigures(str(annotation.scheme), tensor.nbytes, size, entry.sqnr_db)
            first = self._first.setdefault(label, number)
            reason = "; ".join(filter(None, (reason, f"codes of graph {first}" if first != number else "")))
        rows = rows_of(replace(annotation, weight=label, reason=reason), figures)
        limits = self._config.sqnr_warning_threshold, self._config.sqnr_error_threshold
        return with_statuses(rows, *limits)

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
