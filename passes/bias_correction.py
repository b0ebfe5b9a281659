"""bias-correction: folds the mean error of each quantized op's output into its bias. It can be left out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from mono_quant_fx import graph, ops
from mono_quant_fx.annotation import QuantAnnotation, annotated, pending, set_annotation
from mono_quant_fx.carry import Carry
from mono_quant_fx.codes import codes_of, restore
from mono_quant_fx.data import Batch, Prepare, collect
from mono_quant_fx.errors import CalibrationError
from mono_quant_fx.pass_base import Pass
from mono_quant_fx.rewrite import add_constant
from mono_quant_fx.run import Progress
from mono_quant_fx.weight_ops import WEIGHT_OPS, Arg, argument, matrix_shape, peel_transposes


@dataclass(frozen=True)
class BiasCorrection(Pass):
    """Walks the float and the quantized graph side by side over the data; it runs before int4-lowering.

    Rounding shifts an op's output: E[(Wq - W) x] is not zero where E[x] is not. With y the op's output in the float
    graph and yq the one in the quantized graph, per output channel

        bias <- bias + E[y - yq]        (arXiv 1906.04721, sec. 4.2; measured as in its appendix D)

    where the expectation is over samples and positions, and all ops before are corrected already. INT8 activations are
    part of yq when activation-lowering ran before. An op without a bias gets one, `<module>.bias`. A matrix product,
    which has no place for one, and a bias that several ops share stay as they are, and the reason says so.

    Raises:
        CalibrationError: no data, a batch that does not fit, or a NaN or infinite output; names the node and the batch.
    """

    batches: Iterable[Any] = field(repr=False)
    num_calibration_samples: int = 150
    prepare_batch: Prepare | None = field(default=None, repr=False)
    name: ClassVar[str] = "bias-correction"

    def requires(self, gm: fx.GraphModule) -> str | None:
        """Decisions are on the graph."""
        return None if any(annotated(gm)) else "no weight is annotated; run skip-annotation first"

    def rewrite(self, gm: fx.GraphModule) -> None:
        """Measures on a copy, then replaces biases and writes down what that gained."""
        waiting = [(n, a) for n, a in pending(gm) if a.bias_gain_db is None]
        if not waiting:
            return
        batches, samples = collect(self.batches, self.num_calibration_samples, self.prepare_batch)
        twin = graph.isolate(gm)
        assert isinstance(twin, fx.GraphModule)
        places = _places(twin, waiting)
        with Progress("correcting biases", len(places), "ops", is_shown=samples > 50) as progress:
            found = _Walk(twin, batches, places, progress).run()
        nodes = {n.name: n for n in gm.graph.nodes}
        for node, annotation in waiting:
            errors = [found[use.node] for use in annotation.users if use.node in found]
            for use in annotation.users:
                if use.node in found:
                    _fold(gm, nodes[use.node], annotation, found[use.node].shift)
            left = [use.op for use in annotation.users if use.node not in found and "embedding" not in use.op]
            why = f"bias not corrected: {left[0]} has no bias of its own" if left else ""
            reason = "; ".join(filter(None, (annotation.reason, why)))
            gain = max((e.gain_db for e in errors), default=0.0)
            set_annotation(node, replace(annotation, reason=reason, bias_gain_db=gain))


@dataclass(frozen=True)
class _Found:
    """What one op's bias gets (float64 [N]), and by how many dB the error of its output falls."""

    shift: Tensor
    gain_db: float


class _Walk:
    """Both graphs, all batches, in execution order."""

    def __init__(
        self, gm: fx.GraphModule, batches: list[Batch], places: dict[fx.Node, QuantAnnotation], progress: Progress
    ):
        self.gm, self.places, self.progress = gm, places, progress
        self.annotations = dict(pending(gm))
        self.exact = Carry(gm, batches, lambda node: None)
        self.quantized = Carry(gm, batches, self._rounded)
        self.found: dict[str, _Found] = {}

    @torch.no_grad()
    def run(self) -> dict[str, _Found]:
        nodes = list(self.gm.graph.nodes)
        last = max((i for i, n in enumerate(nodes) if n in self.places), default=-1)
        for node in nodes[: last + 1]:
            if node.target in (ops.quantize_activation, ops.dequantize_activation):
                self.exact.put(node, self.exact.values[node.all_input_nodes[0]])
            else:
                self.exact.step(node)
            self.quantized.step(node)
            if node in self.places:
                self._correct(node)
                self.progress.advance(1, node.name)
        return self.found

    def _correct(self, node: fx.Node) -> None:
        if node not in self.exact.values:  # nothing reads it
            return
        pairs = zip(self.exact.values[node], self.quantized.values[node], strict=True)
        shift, energy, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
        for number, (exact, rounded) in enumerate(pairs):
            error = (exact.double() - rounded.double()).movedim(_channel_axis(node, exact), 0).flatten(1)
            if not bool(torch.isfinite(error).all()):
                raise CalibrationError(
                    f"batch {number}: the output of node {node.name!r} holds NaN or infinity; look at this batch, or "
                    "at the ops before this node"
                )
            shift, energy, count = shift + error.sum(1), energy + error.square().sum(), count + error.shape[1]
        shift = shift / max(count, 1)
        left = float(energy - count * shift.square().sum())
        gain = 10 * math.log10(float(energy) / left) if left > 0 else 0.0
        self.found[node.name] = _Found(shift, gain)
        self.quantized.values[node] = [_shifted(y, _channel_axis(node, y), shift) for y in self.quantized.values[node]]

    def _rounded(self, node: fx.Node) -> Tensor | None:
        annotation, weight = self.annotations.get(node), graph.get_tensor(self.gm, node)
        if annotation is None or weight is None:
            return None
        return restore(codes_of(weight, annotation, "bias-correction"), annotation)


def _places(gm: fx.GraphModule, waiting: list[tuple[fx.Node, QuantAnnotation]]) -> dict[fx.Node, QuantAnnotation]:
    """The ops whose bias can take a correction: it is missing, or a constant [N] that nothing else reads."""
    nodes = {n.name: n for n in gm.graph.nodes}
    names = {use.node: annotation for _, annotation in waiting for use in annotation.users}
    return {nodes[name]: annotation for name, annotation in names.items() if _has_place(gm, nodes[name], annotation)}


def _has_place(gm: fx.GraphModule, node: fx.Node, annotation: QuantAnnotation) -> bool:
    at = _bias_at(node)
    if at is None or any(node.kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
        return False
    bias = argument(node, at)
    if bias is None:
        return len(annotation.users) == 1
    value = graph.get_tensor(gm, bias) if isinstance(bias, fx.Node) else None
    rows = matrix_shape(annotation.shape, annotation.layout, annotation.groups)[0]
    return value is not None and tuple(value.shape) == (rows,) and len(bias.users) == 1


def _bias_at(node: fx.Node) -> Arg | None:
    """Where an op has its bias; None for an op that takes none, and for an embedding."""
    for op in WEIGHT_OPS.get(node.target, ()):
        weight = argument(node, op.weight)
        if (
            isinstance(weight, fx.Node)
            and peel_transposes(weight)[0].op == "get_attr"
            and "Embedding" not in op.layer_type
        ):
            return op.bias
    return None


def _fold(gm: fx.GraphModule, node: fx.Node, annotation: QuantAnnotation, shift: Tensor) -> None:
    at = _bias_at(node)
    assert at is not None
    bias, weight = argument(node, at), graph.get_attribute(gm, annotation.weight)
    value = torch.zeros_like(shift) if bias is None else graph.get_attribute(gm, str(bias.target)).detach().double()
    corrected = nn.Parameter((value + shift.to(value.device)).to(weight.dtype), requires_grad=False)
    if bias is not None:
        graph.attach(gm, str(bias.target), corrected)
        return
    with gm.graph.inserting_before(node):
        bias = add_constant(gm, _free_name(gm, annotation.weight), corrected.to(weight.device), node)
    _set_argument(node, at, bias)


def _set_argument(node: fx.Node, at: Arg, value: fx.Node) -> None:
    if at[0] < len(node.args):
        node.update_arg(at[0], value)
    else:
        node.update_kwarg(at[1], value)


def _free_name(gm: fx.GraphModule, weight: str) -> str:
    """a.weight -> a.bias; another name where that is taken."""
    owner = weight.rpartition(".")[0]
    taken = {name for name, _ in graph.named_tensors(gm)}
    name = f"{owner}.bias" if owner else f"{weight}_bias"
    return f"{weight}_correction" if name in taken else name


def _channel_axis(node: fx.Node, y: Tensor) -> int:
    """Of an op's output: the last for a linear; the one before the sizes for a convolution."""
    dims = re.search(r"conv(?:_transpose)?(\d)d", graph.op_name(node))
    if graph.op_name(node).startswith("aten.convolution"):
        return 1
    return -1 - int(dims.group(1)) if dims else -1


def _shifted(y: Tensor, axis: int, shift: Tensor) -> Tensor:
    return (y.movedim(axis, -1).double() + shift).to(y.dtype).movedim(-1, axis)
