"""How much of a model is quantized at all: the share of its weights' bytes, what is left float, and what to do."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor, fx, nn

from mono_quant_fx.accuracy.row import AccuracyRow
from mono_quant_fx.accuracy.table import AccuracyTable
from mono_quant_fx.frontend.record import closed_because
from mono_quant_fx.graph.storage_bytes import stored_bytes
from mono_quant_fx.graph.tensors import named_tensors
from mono_quant_fx.graph.ways_out import way_out

#: The share below which a result says so, how many causes it names, and the share below which a cause is none.
LEAST, SHOWN, SMALL = 0.5, 3, 0.01
UNUSED = "forward uses them in no op"
VECTORS = "biases and what else no op takes as a weight"


@dataclass(frozen=True)
class Cause:
    """Weights that stay float for one reason: their bytes, a name among them, and the way out ("": there is none)."""

    reason: str
    nbytes: int
    name: str
    way_out: str = ""

    def __str__(self) -> str:
        remark = "; ".join(filter(None, (self.name, self.way_out)))
        return f"{_size(self.nbytes)} {self.reason}" + (f" ({remark})" if remark else "")


def coverage_notes(gm: fx.GraphModule, table: AccuracyTable, model: nn.Module) -> list[str]:
    """A line where less than half of the weights' bytes are quantized; nothing elsewhere.

    Args:
        gm: the float graph.
        model: what was captured; parameters that its graph lost count too.
    """
    tensors: dict[int, Tensor] = {id(t): t for t in (*model.parameters(), *gm.parameters())}
    known = {row.weight for row in table.rows}
    tensors |= {id(t): t for name, t in named_tensors(gm) if name in known}
    total = stored_bytes(tensors.values())
    quantized = sum(row.bytes_before for row in table.rows if row.weight_sqnr_db is not None)
    if not total or quantized >= LEAST * total:
        return []
    causes = _causes(gm, table, model)
    rest = total - quantized - sum(cause.nbytes for cause in causes)
    causes += [Cause(VECTORS, rest, "")] if rest > 0 else []
    largest = sorted((c for c in causes if c.nbytes >= SMALL * total), key=lambda cause: -cause.nbytes)[:SHOWN]
    return [
        f"Only {100 * quantized / total:.0f}% of the weights' bytes are quantized ({_size(quantized)} of "
        f"{_size(total)}). What stays float: {', '.join(map(str, largest))}"
    ]


def _causes(gm: fx.GraphModule, table: AccuracyTable, model: nn.Module) -> list[Cause]:
    left = [row for row in table.rows if row.weight_sqnr_db is None and row.bytes_before]
    nbytes: Counter[str] = Counter()
    first: dict[str, AccuracyRow] = {}
    for row in left:
        nbytes[row.reason] += row.bytes_before
        first.setdefault(row.reason, row)
    names = {name for name, _ in named_tensors(gm)}
    causes = [
        Cause(reason, count, first[reason].weight, way_out(reason, first[reason].weight, names, closed_because(gm)))
        for reason, count in nbytes.items()
    ]
    here = {_identity(t) for _, t in named_tensors(gm)}
    lost = {name: t for name, t in model.named_parameters() if _identity(t) not in here}
    if lost:
        causes.append(Cause(UNUSED, stored_bytes(lost.values()), next(iter(lost))))
    return causes


def _identity(tensor: Tensor) -> tuple[object, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
