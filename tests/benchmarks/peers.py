"""Other packages that quantize weights to INT4, each behind one function: (model, plan, options) -> converted paths.

The plan names the weights that mono_quant_fx would quantize and the scheme of each, so that every package quantizes the
same weights at the same group sizes (8 bits where the plan says so) and leaves the same ones float. What a package has
no form for stays float, and is missing from the paths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import mono_quant_fx as mq
from mono_quant_fx.graph.annotation import annotated

Plan = dict[str, mq.QuantScheme]


def weight_plan(model: nn.Module, example: tuple[Tensor, ...], group_size: int) -> Plan:
    """Path of each linear or convolution -> the scheme that mono_quant_fx gives its weight at this group size."""
    decided = mq.passes.SkipAnnotation(mq.QuantConfig(group_size=group_size))(mq.capture(model, example))
    return {
        annotation.weight.removesuffix(".weight"): annotation.scheme
        for _, annotation in annotated(decided.graph_module)
        if annotation.scheme is not None
    }


def quanto(model: nn.Module, plan: Plan, _: Mapping[str, Any]) -> list[str]:
    """optimum-quanto: qint4 (an asymmetric grid, float scale and shift a group) and qint8; frozen."""
    from optimum.quanto import freeze, qint4, qint8, quantize

    paths = _of_type(model, plan, nn.Linear, nn.Conv2d)
    for bits, kind in ((4, qint4), (8, qint8)):
        chosen = [path for path in paths if plan[path].bits == bits]
        if chosen:  # an empty list would mean all of them
            quantize(model, weights=kind, include=chosen)
    for path in paths:
        if plan[path].bits == 4:
            model.get_submodule(path).weight_group_size = plan[path].group_size  # type: ignore[assignment]
    freeze(model)
    return paths


def hqq(model: nn.Module, plan: Plan, _: Mapping[str, Any]) -> list[str]:
    """HQQ: axis 1, its PyTorch backend, float32 scale and zero a group, and its own optimizer of the zeros."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    paths = _of_type(model, plan, nn.Linear)
    for path in paths:
        scheme = plan[path]
        group_size = scheme.group_size if scheme.bits == 4 else None
        config = BaseQuantizeConfig(nbits=scheme.bits, group_size=group_size, axis=1)
        linear = model.get_submodule(path)
        model.set_submodule(path, HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu"))
    return paths


def torchao(model: nn.Module, plan: Plan, options: Mapping[str, Any]) -> list[str]:
    """torchao: intx (weight only), 8da4w (and INT8 activations, a scale a token at run time) or int4 (packed)."""
    from torchao import quantization as ao
    from torchao.quantization.granularity import PerGroup

    def config(scheme: mq.QuantScheme) -> Any:
        if scheme.bits == 8:
            return ao.Int8WeightOnlyConfig()
        if options["method"] == "int4":
            return ao.Int4WeightOnlyConfig(group_size=scheme.group_size, int4_packing_format=options["packing"])
        mapping = ao.MappingType.SYMMETRIC if options["symmetric"] else ao.MappingType.ASYMMETRIC
        group = PerGroup(scheme.group_size)
        if options["method"] == "intx":
            return ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group, mapping_type=mapping)
        return ao.Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=group, weight_mapping_type=mapping
        )

    paths = _of_type(model, plan, nn.Linear)
    for scheme in dict.fromkeys(plan[path] for path in paths):
        chosen = {path for path in paths if plan[path] == scheme}
        ao.quantize_(model, config(scheme), filter_fn=lambda _, path, chosen=chosen: path in chosen)
    return paths


CONVERT: dict[str, Callable[[nn.Module, Plan, Mapping[str, Any]], list[str]]] = {
    "optimum-quanto": quanto,
    "hqq": hqq,
    "torchao": torchao,
}


def _of_type(model: nn.Module, plan: Plan, *kinds: type[nn.Module]) -> list[str]:
    """The plan's paths whose module is exactly of one of the types: a subclass may compute something else."""
    modules = dict(model.named_modules())
    return [path for path in plan if type(modules.get(path)) in kinds]


def stored_bytes(module: nn.Module) -> int:
    """What a module stores for its weight: codes, scales, zero points; as the tensors are, not as they could be."""
    packed = getattr(module, "W_q", None)  # HQQ keeps codes here and the rest in a dict
    held = [module.weight] if packed is None else [packed, module.meta["scale"], module.meta["zero"]]  # type: ignore[index]
    return sum(map(_tensor_bytes, held))  # type: ignore[arg-type]


def _tensor_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor, or of the tensors that a tensor subclass is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_tensor_bytes(getattr(tensor, name)) for name in names)
