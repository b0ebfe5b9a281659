"""activation-lowering: INT8 codes and back between an observed input and the ops that read it; a shared input once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from mono_quant_fx import ops
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.annotation import ObservedInput, QuantAnnotation, float_inputs, part_names, pending
from mono_quant_fx.graph.arguments import Arg, set_argument
from mono_quant_fx.graph.free_names import free_names
from mono_quant_fx.graph.rewrite import add_call, add_constant
from mono_quant_fx.pass_base import Pass


@dataclass(frozen=True)
class ActivationLowering(Pass):
    """Obeys: the annotations say which inputs become INT8, and calibration left their scales and zero points there.

    The new constants are `<module>.input_scale` [1], in the weight's dtype, and `<module>.input_zero_point` [1], int8,
    named after the first module that reads the tensor (with a number behind, where a module reads several).
    """

    name: ClassVar[str] = "activation-lowering"

    def requires(self, gm: fx.GraphModule) -> str | None:
        """Calibration has set the ranges."""
        for _, annotation, inputs in _waiting(gm):
            ranges = {seen.source for seen in annotation.observed if seen.scale is not None}
            for source, *_ in inputs:
                if source.name not in ranges:
                    return f"{source.name}, an input of {annotation.weight!r}, has no range; run calibration first"
        return None

    def rewrite(self, gm: fx.GraphModule) -> None:
        """One pair of nodes a distinct input, before its first reader."""
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        readers: dict[fx.Node, list[tuple[fx.Node, Arg]]] = {}
        scales: dict[fx.Node, tuple[ObservedInput, QuantAnnotation, torch.device]] = {}
        for node, annotation, inputs in _waiting(gm):
            weight = tensors.get_tensor(gm, node)
            assert weight is not None
            seen = {s.source: s for s in annotation.observed}
            for source, user, at in inputs:
                readers.setdefault(source, []).append((user, at))
                codes = weight if annotation.stored is None else annotation.stored.weight_packed
                scales.setdefault(source, (seen[source.name], annotation, codes.device))
        reserved = part_names(gm)
        for source, users in readers.items():
            with gm.graph.inserting_before(min((user for user, _ in users), key=order.__getitem__)):
                value = _codes_and_back(gm, source, *scales[source], reserved)
            for user, at in users:
                set_argument(user, at, value)

    def ensures(self, gm: fx.GraphModule) -> str | None:
        """No op reads a float input that is to be INT8."""
        left = [annotation.weight for _, annotation, _ in _waiting(gm)]
        return f"the input of {left[0]!r} is still float" if left else None


def _waiting(gm: fx.GraphModule) -> list[tuple[fx.Node, QuantAnnotation, list[tuple[fx.Node, fx.Node, Arg]]]]:
    """The weights whose ops still read float activations that are to be INT8, with these (see float_inputs)."""
    nodes = {n.name: n for n in gm.graph.nodes}
    found = ((n, a, list(float_inputs(n, a, nodes))) for n, a in pending(gm))
    return [(n, a, inputs) for n, a, inputs in found if inputs]


def _codes_and_back(
    gm: fx.GraphModule,
    source: fx.Node,
    seen: ObservedInput,
    annotation: QuantAnnotation,
    device: torch.device,
    reserved: set[str],
) -> fx.Node:
    assert seen.scale is not None
    dtype: torch.dtype = getattr(torch, annotation.dtype)
    scale = torch.tensor([max(seen.scale, torch.finfo(dtype).tiny)], dtype=dtype, device=device)
    zero_point = torch.tensor([seen.zero_point], dtype=torch.int8, device=device)
    owner = annotation.weight.rpartition(".")[0]
    prefix = f"{owner}.input" if owner else f"{annotation.weight}_input"
    scale_name, zero_point_name = free_names(gm, (f"{prefix}_scale", f"{prefix}_zero_point"), reserved)
    constants = [
        add_constant(gm, name, value, source) for name, value in ((scale_name, scale), (zero_point_name, zero_point))
    ]
    codes = add_call(gm, ops.quantize_activation, (source, *constants), source, f"{source.name}_quantized")
    return add_call(gm, ops.dequantize_activation, (codes, *constants), source, f"{source.name}_dequantized")
