"""bias-correction: folds the mean error of each quantized op's output into its bias. It can be left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from mono_quant_fx import ops
from mono_quant_fx.execution.batch import Batch, Prepare
from mono_quant_fx.execution.carry import Carry
from mono_quant_fx.execution.collection import collect
from mono_quant_fx.execution.noise import alike
from mono_quant_fx.execution.run import Progress, check_finite
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.annotation import QuantAnnotation, WeightUser, annotated, part_names, pending, set_annotation
from mono_quant_fx.graph.arguments import argument
from mono_quant_fx.graph.biases import add_bias, bias_at, bias_name
from mono_quant_fx.graph.codes import codes_of, restore
from mono_quant_fx.graph.weight_ops import is_assertion, matrix_shape
from mono_quant_fx.pass_base import Pass


@dataclass(frozen=True)
class BiasCorrection(Pass):
    """Walks the float and the quantized graph side by side over the data; it runs before int4-lowering.

    Rounding shifts an op's output: E[(Wq - W) x] is not zero where E[x] is not. With y the op's output in the float
    graph and yq the one in the quantized graph, per output channel

        bias <- bias + E[y - yq]        (arXiv 1906.04721, sec. 4.2; measured as in its appendix D)

    where the expectation is over samples and positions, and all ops before are corrected already. INT8 activations are
    part of yq when activation-lowering ran before. An op without a bias gets one, `<module>.bias`. What takes none (a
    matrix product), and a bias that several ops share, stays as it is, and the reason says so: errors that differ from
    call to call have no mean that one bias could take away.

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
        batches, samples = collect(self.batches, self.num_calibration_samples, self.prepare_batch, gm)
        twin = tensors.isolate(gm)
        assert isinstance(twin, fx.GraphModule)
        obstacles = _obstacles(twin, waiting)
        places = {
            use.node: _channel_axis(annotation, use)
            for _, annotation in waiting
            for use in annotation.users
            if obstacles.get(use.node) == ""
        }
        with Progress("correcting biases", len(places), "ops", is_shown=samples > 50) as progress:
            found = _Walk(twin, batches, places, progress).run()
        nodes, reserved = {n.name: n for n in gm.graph.nodes}, part_names(gm)
        for node, annotation in waiting:
            uses = [use for use in annotation.users if use.node in found]
            added = {
                use.node: _fold(gm, nodes[use.node], node, use, annotation.weight, found[use.node].shift, reserved)
                for use in uses
            }
            users = tuple(replace(use, bias=added.get(use.node)) for use in annotation.users)
            empty = [NO_DATA for use in annotation.users if use.node in places and use.node not in found]
            left = [obstacle for use in annotation.users if (obstacle := obstacles.get(use.node))] or empty
            why = f"bias not corrected: {left[0]}" if left else ""
            reason = "; ".join(filter(None, (annotation.reason, why)))
            gain = max((found[use.node].gain_db for use in uses), default=0.0)
            set_annotation(node, replace(annotation, users=users, reason=reason, bias_gain_db=gain))


@dataclass(frozen=True)
class _Found:
    """What one op's bias gets (float64 [N]), and by how many dB the error of its output falls."""

    shift: Tensor
    gain_db: float


class _Walk:
    """Both graphs, all batches, in execution order; `places`: ops that take a correction, and their channel axes."""

    def __init__(self, gm: fx.GraphModule, batches: list[Batch], places: dict[str, int], progress: Progress):
        self.gm, self.places, self.progress = gm, places, progress
        self.annotations = dict(pending(gm))
        self.exact = Carry(gm, batches, self._unrounded)
        self.quantized = Carry(gm, batches, self._rounded)
        self.found: dict[str, _Found] = {}

    @torch.no_grad()
    def run(self) -> dict[str, _Found]:
        nodes = list(self.gm.graph.nodes)
        last = max((i for i, n in enumerate(nodes) if n.name in self.places), default=-1)
        for node in nodes[: last + 1]:
            if node.target in _ROUND_TRIP and not self.exact.constant[node]:
                self.exact.put(node, self.exact.values[node.all_input_nodes[0]])
                self.quantized.step(node)
            else:
                alike(partial(self.exact.step, node), partial(self.quantized.step, node))
            if node.name in self.places:
                self._correct(node)
                self.progress.advance(1, node.name)
        return self.found

    def _correct(self, node: fx.Node) -> None:
        if node not in self.exact.values:  # nothing reads it
            return
        axis = self.places[node.name]
        values = zip(self.exact.batches, self.exact.values[node], self.quantized.values[node], strict=True)
        shift, energy, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
        for batch, exact, rounded in values:
            error = (_wide(exact) - _wide(rounded)).movedim(axis, 0)
            error = error.reshape(len(error), -1)
            if not bool(torch.isfinite(error).all()):
                for value in (exact, rounded, error):
                    check_finite(value, f"the output of node {node.name!r}", batch)
            shift, count = shift + error.sum(1, dtype=torch.float64), count + error.shape[1]
            energy = energy + torch.linalg.vector_norm(error, dtype=torch.float64).square()
        if not count:  # nothing reached it
            return
        shift = shift / count
        self.found[node.name] = _Found(shift, _gain_db(float(energy), float(count * shift.square().sum())))
        self.quantized.values[node] = [_shifted(y, axis, shift) for y in self.quantized.values[node]]

    def _rounded(self, node: fx.Node) -> Tensor | None:
        annotation, weight = self.annotations.get(node), tensors.get_tensor(self.gm, node)
        if annotation is None or weight is None:
            return None
        return restore(codes_of(weight, annotation, "bias-correction"), annotation)

    def _unrounded(self, node: fx.Node) -> Tensor | None:
        """A constant that activation-lowering rounds is itself in the float graph."""
        if node.target not in _ROUND_TRIP:
            return None
        value: Tensor = self.exact.constant_value(node.all_input_nodes[0])
        return value


NO_DATA = "no calibration data reached it"
_ROUND_TRIP = (ops.quantize_activation, ops.dequantize_activation)


def _gain_db(energy: float, mean: float) -> float:
    """How far the error's energy falls without its mean's; inf where only the sums' rounding is left."""
    if energy == 0:
        return 0.0
    left = 1 - mean / energy
    return -10 * math.log10(left) if left > 1e-12 else math.inf


def _obstacles(gm: fx.GraphModule, waiting: list[tuple[fx.Node, QuantAnnotation]]) -> dict[str, str]:
    """Node name -> why its bias cannot take a correction, "" where it can; without embeddings, which have no bias."""
    nodes, constant = {n.name: n for n in gm.graph.nodes}, tensors.constant_nodes(gm)
    found = {}
    for _, annotation in waiting:
        uses = [use for use in annotation.users if "embedding" not in use.op and use.node in nodes]
        calls = Counter(use.module for use in uses)
        for use in uses:
            node = nodes[use.node]
            why = f"the input of {use.op} is constant" if constant[node] else ""
            found[use.node] = why or _obstacle(gm, node, annotation, use, calls[use.module])
    return found


def _obstacle(gm: fx.GraphModule, node: fx.Node, annotation: QuantAnnotation, use: WeightUser, calls: int) -> str:
    at = bias_at(node)
    if at is None:
        return f"{use.op} takes none"
    if node.kwargs.get("beta", 1) != 1:
        return f"{use.op} scales it"
    bias = argument(node, at)
    if bias is None:
        return f"{use.op} has none, and is called {calls} times" if calls > 1 else ""
    value = tensors.get_tensor(gm, bias) if isinstance(bias, fx.Node) else None
    if value is None:
        return "it is computed"
    readers = sum(not is_assertion(user) for user in bias.users)
    if readers > 1:
        return f"{readers} ops share it"
    rows = matrix_shape(annotation.shape, annotation.layout, annotation.groups)[0]
    return "" if tuple(value.shape) == (rows,) else f"its shape is {list(value.shape)}, not [{rows}]"


def _fold(
    gm: fx.GraphModule,
    node: fx.Node,
    source: fx.Node,
    use: WeightUser,
    weight: str,
    shift: Tensor,
    reserved: set[str],
) -> str | None:
    """Adds to an op's bias; where it has none, gives it one and returns its name."""
    at = bias_at(node)
    assert at is not None
    bias = argument(node, at)
    if bias is None:
        name, like = bias_name(gm, weight, use.module, reserved), tensors.get_attribute(gm, weight)
        add_bias(gm, node, source, at, name, nn.Parameter(shift.to(like.device, like.dtype), requires_grad=False))
        return name
    name, old = str(bias.target), tensors.get_attribute(gm, str(bias.target))
    value = (old.detach().double() + shift.to(old.device)).to(old.dtype)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, old.requires_grad)
    tensors.attach(gm, name, value, tensors.is_persistent(gm, name))
    return None


def _channel_axis(annotation: QuantAnnotation, use: WeightUser) -> int:
    """Of an op's output: the last for a linear; the one before the sizes for a convolution."""
    return 1 - len(annotation.shape) if "conv" in use.op else -1


def _shifted(y: Tensor, axis: int, shift: Tensor) -> Tensor:
    wide = _wide(y).movedim(axis, -1)
    return (wide + shift.to(wide.dtype)).to(y.dtype).movedim(-1, axis)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least, where the difference of two half-precision outputs keeps its mean."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
