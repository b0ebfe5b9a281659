"""The float graph to compare with, from whatever a user has in hand: a graph, a result, or the model itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from mono_quant_fx.errors import CaptureError
from mono_quant_fx.execution.batch import Prepare, to_batch
from mono_quant_fx.frontend.capture import captured
from mono_quant_fx.frontend.record import get_record
from mono_quant_fx.graph.tensors import need_graph


def both_graphs(
    reference: Any, quantized: Any, batches: Any, prepare_batch: Prepare | None, caller: str
) -> tuple[fx.GraphModule, fx.GraphModule, Any]:
    """The two graphs, and the data unspent; a plain module as `reference` is captured as the quantized graph was.

    Raises:
        PreconditionError: one is neither graph, result nor (the reference) module. CaptureError: it has no graph.
    """
    quantized = need_graph(getattr(quantized, "graph_module", quantized), caller)
    exported = isinstance(reference, torch.export.ExportedProgram)
    reference = reference if exported else getattr(reference, "graph_module", reference)
    if isinstance(reference, fx.GraphModule) or not (exported or isinstance(reference, nn.Module)):
        return need_graph(reference, caller), quantized, batches
    example, batches = _first(batches)
    method = get_record(quantized).method if batches is not None else "auto"
    try:
        batch = None if example is None else to_batch(example, prepare_batch, 0)
        gm, _ = captured(reference, batch, method=method if method in ("symbolic", "export") else "auto")
    except CaptureError as e:
        raise CaptureError(
            f"{caller} needs the float graph, mq.capture(model, example_inputs), and capturing this "
            f"{type(reference).__name__} here failed: {e}"
        ) from e
    return gm, quantized, batches


def _first(batches: Any) -> tuple[Any, Iterable[Any] | None]:
    """The first batch, and all of them; what is no iterable of batches is left to be refused where it is read."""
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        return None, batches
    rest = iter(batches)
    first = list(itertools.islice(rest, 1))
    return (first[0] if first else None), itertools.chain(first, rest)
