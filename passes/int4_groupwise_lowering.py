"""int4-lowering: replaces the constant. Each annotated weight becomes dequantize(codes, scale) before the same op."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx, nn

from mono_quant_fx import ops
from mono_quant_fx.errors import WeightError
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.annotation import QuantAnnotation, annotated, float_inputs, part_names, pending, set_annotation
from mono_quant_fx.graph.codes import codes_of
from mono_quant_fx.graph.free_names import free_names
from mono_quant_fx.graph.rewrite import add_call, add_constant
from mono_quant_fx.graph.weight_ops import from_matrix, matrix_shape
from mono_quant_fx.pass_base import Pass


@dataclass(frozen=True)
class Int4GroupwiseLowering(Pass):
    """Obeys: scheme and, after calibration, codes are on the annotation; without codes it rounds to nearest.

    INT8 schemes are lowered here as well.

    The float weight leaves the graph and the state_dict, and what stays float no longer requires gradients.

    Raises:
        WeightError: a weight holds NaN or infinity; names it.
    """

    name: ClassVar[str] = "int4-lowering"

    def requires(self, gm: fx.GraphModule) -> str | None:
        """Decisions are on the graph, and those about activations are carried out."""
        if not any(annotated(gm)):
            return "no weight is annotated; run skip-annotation first"
        nodes = {n.name: n for n in gm.graph.nodes}
        for node, annotation in pending(gm):
            if any(float_inputs(node, annotation, nodes)):
                return (
                    f"the input of {annotation.weight!r} is to be INT8; run calibration and activation-lowering first"
                )
        return None

    def rewrite(self, gm: fx.GraphModule) -> None:
        """One weight at a time, so that the scratch is one weight's."""
        reserved = part_names(gm)
        for node, annotation in list(pending(gm)):
            _lower(gm, node, _with_free_names(gm, annotation, reserved))
        for name, parameter in list(gm.named_parameters()):
            if parameter.requires_grad:
                tensors.attach(gm, name, nn.Parameter(parameter.detach(), requires_grad=False))

    def ensures(self, gm: fx.GraphModule) -> str | None:
        """No annotated weight is float."""
        left = [a.weight for _, a in pending(gm)]
        return f"{left[0]} is still float" if left else None


def _with_free_names(gm: fx.GraphModule, annotation: QuantAnnotation, reserved: set[str]) -> QuantAnnotation:
    """With names that the model does not use itself. INT8 codes have the weight's own, which becomes free."""
    if annotation.names is not None:  # a file says which
        return annotation
    packed, *others = annotation.storage_names
    own = packed == annotation.weight
    found = free_names(gm, others if own else (packed, *others), reserved)
    names = (packed, *found) if own else found
    return annotation if names == annotation.storage_names else replace(annotation, names=names)  # type: ignore[arg-type]


def _lower(gm: fx.GraphModule, node: fx.Node, annotation: QuantAnnotation) -> None:
    weight, scheme = tensors.get_tensor(gm, node), annotation.scheme
    assert weight is not None and scheme is not None
    if weight.is_meta and annotation.stored is None:
        raise WeightError(
            f"int4-lowering: weight {annotation.weight!r} is on the meta device, without values; load them first"
        )
    columns = matrix_shape(annotation.shape, annotation.layout, annotation.groups)[1]
    stored = codes_of(weight, annotation, "int4-lowering")
    used_by = list(node.users)
    with gm.graph.inserting_before(node):
        packed, scale, zero_point = (
            None if tensor is None else add_constant(gm, name, tensor, node)
            for name, tensor in zip(annotation.storage_names, stored, strict=True)
        )
        assert packed is not None
        is_int4 = scheme.bits == 4
        sizes = (scheme.group_size, columns) if is_int4 else ()
        op = ops.dequantize_int4 if is_int4 else ops.dequantize_int8
        matrix = add_call(gm, op, (packed, scale, zero_point, *sizes), node, f"{node.name}_dequantized")
        value = from_matrix(
            matrix,
            annotation.layout,
            annotation.groups,
            annotation.shape,
            lambda op, *args: add_call(gm, op, args, node),
        )
    for user in used_by:
        user.replace_input_with(node, value)
    gm.graph.erase_node(node)
    algorithm = annotation.algorithm or "rtn"
    set_annotation(packed, replace(annotation, stored=None, algorithm=algorithm, lowered=True))
