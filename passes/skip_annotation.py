"""skip-annotation: decides. After it each weight carries a scheme, or a reason why it has none."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx, nn

from mono_quant_fx.config import QuantConfig
from mono_quant_fx.errors import NothingQuantizedError
from mono_quant_fx.frontend.record import closed_because
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.annotation import QuantAnnotation, WeightUser, annotated, set_annotation, users_of
from mono_quant_fx.graph.calls import inside
from mono_quant_fx.graph.skip_rules import Known, check_patterns, decide, decide_leaf
from mono_quant_fx.graph.ways_out import way_out
from mono_quant_fx.graph.weight_ops import Weight, find_weights, hidden_weights
from mono_quant_fx.pass_base import Pass


@dataclass(frozen=True)
class SkipAnnotation(Pass):
    """Puts a QuantAnnotation on every weight of the graph, by the rules of `config` (see QuantConfig).

    Args:
        whole: the graph is the whole model. A part of one (whole=False) may lack what a pattern names, and may have
            nothing to quantize.

    Raises:
        PatternError: a pattern matches nothing. NothingQuantizedError: no weight is left to quantize.
        ConfigError: a policy of "error" fired.
    """

    config: QuantConfig = field(default_factory=QuantConfig)
    whole: bool = True
    name: ClassVar[str] = "skip-annotation"

    def rewrite(self, gm: fx.GraphModule) -> None:
        """Annotates; weights that are lowered already keep what they have. A use that is dead decides nothing."""
        tensors.drop_dead_code(gm)
        weights, hidden = find_weights(gm), hidden_weights(gm)
        lowered = [a for _, a in annotated(gm) if a.lowered]
        if self.whole and not lowered and (weights or hidden):
            check_patterns(self.config, Known.of(weights, hidden))
        for weight in weights:
            set_annotation(weight.node, _annotate(weight, self.config))
        for node, module in hidden:
            set_annotation(node, _annotate_leaf(node, module, self.config))
        found = [a for _, a in annotated(gm)]
        if self.whole and not any(a.scheme for a in found):
            raise NothingQuantizedError(f"{self.name}: {_nothing(gm, found)}")


def _annotate(weight: Weight, config: QuantConfig) -> QuantAnnotation:
    decision = decide(weight, config)
    first = weight.uses[0]
    return QuantAnnotation(
        weight=weight.name,
        scheme=decision.scheme,
        reason=decision.reason,
        shape=tuple(weight.tensor.shape),
        dtype=str(weight.tensor.dtype).removeprefix("torch."),
        layout=first.layout or "rows",
        groups=first.groups,
        users=users_of(weight),
        activations=f"int8 {'sym' if config.activation_symmetric else 'asym'}"
        if config.activations == "int8" and decision.scheme
        else "",
    )


def _annotate_leaf(node: fx.Node, module: nn.Module, config: QuantConfig) -> QuantAnnotation:
    path, kind, parameters = str(node.target), type(module).__name__, list(module.parameters())
    largest = max(parameters, key=lambda p: p.numel())
    where = next((place for user in node.users if node.op == "get_attr" and (place := inside(user))), "")
    decision = decide_leaf(path, kind, all(p.dim() < 2 for p in parameters), config, where)
    user = WeightUser(node.name, tensors.op_name(node), path)
    dtype = str(largest.dtype).removeprefix("torch.")
    return QuantAnnotation(path, None, decision.reason, tuple(largest.shape), dtype, users=(user,))


def _nothing(gm: fx.GraphModule, found: list[QuantAnnotation]) -> str:
    names = {name for name, _ in tensors.named_tensors(gm)}
    if not found:
        unread = f"; no op takes one of its {len(names)} tensors as a weight" if names else ""
        return f"the model has no weights, so there is nothing to quantize{unread}"
    first = {annotation.reason: annotation for annotation in reversed(found)}
    told = []
    for reason, count in Counter(a.reason for a in found).most_common(8):
        advice = way_out(reason, first[reason].weight, names, closed_because(gm))
        told.append(f"{count} x {reason}" + (f" ({advice})" if advice else ""))
    return f"none of the {len(found)} weights would be quantized: {'; '.join(told)}"
