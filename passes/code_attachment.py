"""code-attachment: gives weights codes that were made elsewhere: by another tool, at another call, or later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import fx

from mono_quant_fx.errors import CheckpointError
from mono_quant_fx.graph.annotation import ObservedInput, QuantAnnotation, annotated, plain_inputs, set_annotation
from mono_quant_fx.numerics.affine import QuantizedWeight
from mono_quant_fx.pass_base import Pass


@dataclass(frozen=True)
class GivenCodes:
    """What becomes of one weight.

    Attributes:
        stored: its codes, on the meta device where their values come later; None leaves it float.
        reason: goes into the table; "" keeps what is there.
        algorithm: that made the codes; "" keeps what is there.
        input: (scale, zero point) of its INT8 input, which is the same in every call; None for a float input.
    """

    stored: QuantizedWeight | None
    reason: str = ""
    algorithm: str = ""
    input: tuple[float, int] | None = None


@dataclass(frozen=True)
class CodeAttachment(Pass):
    """Takes the place of calibration where codes exist; weights that `codes` does not name keep what they have.

    Raises:
        CheckpointError: two weights read one tensor with different input scales.
    """

    codes: Mapping[str, GivenCodes] = field(repr=False, compare=False)
    name: ClassVar[str] = "code-attachment"

    def requires(self, gm: fx.GraphModule) -> str | None:
        """Decisions are on the graph."""
        return None if any(annotated(gm)) or not self.codes else "no weight is annotated; run skip-annotation first"

    def rewrite(self, gm: fx.GraphModule) -> None:
        """One tensor has one scale, which all that read it share."""
        nodes = {n.name: n for n in gm.graph.nodes}
        ranges: dict[str, tuple[str, tuple[float, int]]] = {}
        for node, annotation in list(annotated(gm)):
            found = self.codes.get(annotation.weight)
            if found is None or annotation.lowered:
                continue
            own = replace(annotation, reason=found.reason or annotation.reason)
            if found.stored is None:
                set_annotation(node, replace(own, scheme=None))
                continue
            own = replace(own, stored=found.stored, algorithm=found.algorithm or annotation.algorithm)
            set_annotation(node, own if found.input is None else _with_input(node, own, found.input, nodes, ranges))


def _with_input(
    weight: fx.Node,
    annotation: QuantAnnotation,
    qparams: tuple[float, int],
    nodes: dict[str, fx.Node],
    ranges: dict[str, tuple[str, tuple[float, int]]],
) -> QuantAnnotation:
    seen = []
    for source in dict.fromkeys(source.name for source, *_ in plain_inputs(weight, annotation, nodes)):
        other, known = ranges.setdefault(source, (annotation.weight, qparams))
        if known != qparams:
            raise CheckpointError(
                f"{annotation.weight!r} and {other!r} read one tensor with different input scales ({qparams} and "
                f"{known}), and here a tensor has one"
            )
        seen.append(ObservedInput(source, "checkpoint", scale=qparams[0], zero_point=qparams[1]))
    if not seen:
        return annotation
    kind = "int8 asym" if qparams[1] else "int8 sym"
    return replace(annotation, activations=kind, observed=tuple(seen))
