"""Modules of torch.nn that stayed leaves of a graph, as a class name and constructor arguments, and back.

The arguments are read from the module's attributes. A module built from them on the meta device has to equal the
original in type, attributes, tensors' names and shapes, or it is not written down.

Left out, because their kernels take offsets and masks on trust: EmbeddingBag, TransformerEncoder and its layer (which
capture opens).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mono_quant_fx.errors import GraphFormatError, NotSelfContainedError
from mono_quant_fx.graph.tensors import named_tensors
from mono_quant_fx.process.this_thread import unheard
from mono_quant_fx.storage.graph_json.checked_calls import LARGEST, bounded
from mono_quant_fx.storage.graph_json.values import fields, need, value_from_json, value_to_json

_POOL = "kernel_size stride padding dilation return_indices ceil_mode"
_CONV = "in_channels out_channels kernel_size stride padding"
_NORM = "num_features eps momentum affine track_running_stats"
_LAYER = "d_model nhead dim_feedforward dropout activation layer_norm_eps batch_first norm_first bias"
_RNN = "input_size hidden_size num_layers bias batch_first dropout bidirectional"
#: Class names (words) -> the constructor's arguments (words).
_ARGUMENTS = {
    "ReLU ReLU6 SiLU Mish Hardswish Hardsigmoid SELU": "inplace",
    "Sigmoid Tanh LogSigmoid Softsign Tanhshrink Identity Softmax2d": "",
    "ELU CELU": "alpha inplace", "GELU": "approximate", "LeakyReLU": "negative_slope inplace", "GLU": "dim",
    "Softmax LogSoftmax Softmin": "dim", "Softplus": "beta threshold", "Softshrink Hardshrink": "lambd",
    "Hardtanh": "min_val max_val inplace", "Threshold": "threshold value inplace", "RReLU": "lower upper inplace",
    "PReLU": "num_parameters",
    "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout": "p inplace",
    "BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d": _NORM,
    "LayerNorm": "normalized_shape eps elementwise_affine bias", "RMSNorm": "normalized_shape eps elementwise_affine",
    "GroupNorm": "num_groups num_channels eps affine", "LocalResponseNorm": "size alpha beta k",
    "MaxPool1d MaxPool2d MaxPool3d": _POOL, "MaxUnpool1d MaxUnpool2d MaxUnpool3d": "kernel_size stride padding",
    "AvgPool1d": "kernel_size stride padding ceil_mode count_include_pad",
    "AvgPool2d AvgPool3d": "kernel_size stride padding ceil_mode count_include_pad divisor_override",
    "LPPool1d LPPool2d LPPool3d": "norm_type kernel_size stride ceil_mode",
    "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d": "output_size",
    "AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d": "output_size return_indices",
    "ConstantPad1d ConstantPad2d ConstantPad3d": "padding value",
    "ZeroPad1d ZeroPad2d ZeroPad3d ReflectionPad1d ReflectionPad2d ReflectionPad3d": "padding",
    "ReplicationPad1d ReplicationPad2d ReplicationPad3d CircularPad1d CircularPad2d CircularPad3d": "padding",
    "Flatten": "start_dim end_dim", "Unflatten": "dim unflattened_size", "PixelShuffle": "upscale_factor",
    "PixelUnshuffle": "downscale_factor", "ChannelShuffle": "groups", "CosineSimilarity": "dim eps",
    "PairwiseDistance": "norm eps keepdim", "Fold": "output_size kernel_size dilation padding stride",
    "Unfold": "kernel_size dilation padding stride",
    "Upsample": "size scale_factor mode align_corners recompute_scale_factor",
    "UpsamplingNearest2d UpsamplingBilinear2d": "size scale_factor",
    "Linear": "in_features out_features bias", "Bilinear": "in1_features in2_features out_features bias",
    "Embedding": "num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq sparse",
    "Conv1d Conv2d Conv3d": f"{_CONV} dilation groups bias padding_mode",
    "ConvTranspose1d ConvTranspose2d ConvTranspose3d": f"{_CONV} output_padding groups bias dilation padding_mode",
    "LSTM": f"{_RNN} proj_size", "GRU": _RNN, "RNN": f"{_RNN} nonlinearity",
    "LSTMCell GRUCell": "input_size hidden_size bias", "RNNCell": "input_size hidden_size bias nonlinearity",
    "MultiheadAttention": "embed_dim num_heads dropout bias add_bias_kv add_zero_attn kdim vdim batch_first",
    "TransformerDecoderLayer": _LAYER, "TransformerDecoder": "num_layers",
}  # fmt: skip
ARGUMENTS = {name: tuple(words.split()) for names, words in _ARGUMENTS.items() for name in names.split()}
CLASSES: dict[str, type[nn.Module]] = {name: getattr(nn, name) for name in ARGUMENTS if hasattr(nn, name)}

#: Arguments that are modules themselves: argument -> how to find it.
_PARTS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "TransformerDecoder": {"decoder_layer": lambda m: m.layers[0], "norm": lambda m: m.norm},
}

_ACTIVATIONS = {F.relu: "relu", F.gelu: "gelu"}
_LAYER_READERS: dict[str, Callable[[Any], Any]] = {
    "d_model": lambda m: m.self_attn.embed_dim,
    "nhead": lambda m: m.self_attn.num_heads,
    "dim_feedforward": lambda m: m.linear1.out_features,
    "dropout": lambda m: m.dropout.p,
    "activation": lambda m: _ACTIVATIONS.get(m.activation, "?"),
    "layer_norm_eps": lambda m: m.norm1.eps,
    "batch_first": lambda m: m.self_attn.batch_first,
    "bias": lambda m: m.linear1.bias is not None,
}
#: Arguments that are no attribute of the same name.
_READERS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "TransformerDecoderLayer": _LAYER_READERS,
    "MultiheadAttention": {
        "bias": lambda m: m.in_proj_bias is not None,
        "add_bias_kv": lambda m: m.bias_k is not None,
    },
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_INTERNAL = {*vars(nn.Module()), "_flat_weights", "_flat_weight_refs"} - {"training"}


def check_hooks(module: nn.Module, what: str) -> None:
    """Raises NotSelfContainedError if a hook hangs on the module or on one inside it."""
    for path, part in module.named_modules():
        if any(getattr(part, hooks, None) for hooks in _HOOKS):
            place = f"{what}.{path}" if path else what
            raise NotSelfContainedError(
                f"a hook hangs on {place}, and a hook is code, which is not stored; remove it (for weight_norm and its "
                "like: torch.nn.utils.remove_weight_norm or parametrize.remove_parametrizations) and capture again"
            )


def leaf_to_json(module: nn.Module) -> dict[str, Any]:
    """A module of torch.nn as {"class", "args"} and, where an argument is a module, "parts".

    Raises:
        NotSelfContainedError: its class is not on the list, or its constructor would not give it back.
    """
    record = _record(module)
    rebuilt = leaf_from_json(record, sum(1 for _ in named_tensors(module)))
    different = _difference(module, rebuilt)
    if different is not None:
        raise NotSelfContainedError(
            f"torch.nn.{type(module).__name__} cannot be rebuilt from its constructor's arguments: {different}; "
            'capture with method="export", which opens the module'
        )
    return record


def _record(module: nn.Module) -> dict[str, Any]:
    name = type(module).__name__
    if CLASSES.get(name) is not type(module):
        raise NotSelfContainedError(
            f"the module class {type(module).__module__}.{type(module).__qualname__} cannot be rebuilt without code; "
            'capture with method="export", which opens modules, or let torch.fx trace into it'
        )
    readers = _READERS.get(name, {})
    values = {a: readers[a](module) if a in readers else _attribute(module, a) for a in ARGUMENTS[name]}
    record: dict[str, Any] = {"class": name, "args": {a: value_to_json(v) for a, v in values.items()}}
    if name in _PARTS:
        parts = {a: read(module) for a, read in _PARTS[name].items()}
        record["parts"] = {a: None if part is None else _record(part) for a, part in parts.items()}
    return record


def _attribute(module: nn.Module, name: str) -> Any:
    value = getattr(module, name)
    return value is not None if name == "bias" and not isinstance(value, bool) else value


def leaf_from_json(data: Any, tensors: int) -> nn.Module:
    """The module on the meta device, in eval mode.

    Args:
        data: what leaf_to_json gave.
        tensors: how many tensors are known to belong to it, which bounds its layers.

    Raises:
        GraphFormatError: an unknown class, other arguments than its own, or arguments that it does not take.
    """
    name = data.get("class") if isinstance(data, dict) else None
    need(
        isinstance(name, str) and name in CLASSES, "a module's class", name, "it is not among those that can be rebuilt"
    )
    assert isinstance(name, str)
    fields(data, name, "class args", "parts")
    given = fields(data["args"], f"{name}'s args", " ".join(ARGUMENTS[name]))
    values = {a: value_from_json(v) for a, v in given.items()}
    need(bounded(values), f"{name}'s args", given, f"no number is above {LARGEST}")
    layers = values.get("num_layers", 1)
    need(
        type(layers) is int and 0 < layers <= max(1, tensors), "num_layers", layers, "each layer has tensors of its own"
    )
    parts = fields(data.get("parts", {}), f"{name}'s parts", " ".join(_PARTS.get(name, {})))
    built = {a: None if part is None else leaf_from_json(part, tensors) for a, part in parts.items()}
    try:
        with unheard(), torch.device("meta"):
            return CLASSES[name](**values, **built).eval()
    except Exception as error:  # whatever torch says to arguments that make no sense
        raise GraphFormatError(f"torch.nn.{name} refuses its arguments: {type(error).__name__}: {error}") from error


def _difference(module: nn.Module, rebuilt: nn.Module) -> str | None:
    """The first thing in which two modules differ, in words."""
    parts, others = (dict(m.named_modules(remove_duplicate=False)) for m in (module, rebuilt))
    if parts.keys() != others.keys():
        return f"its submodules are {sorted(parts)}, not {sorted(others)}"
    for path, part in parts.items():
        place = f"{path}: " if path else ""
        other = others[path]
        if type(part) is not type(other):
            return f"{place}{type(part).__qualname__} is not {type(other).__qualname__}"
        for name, value in vars(other).items():
            if name not in _INTERNAL and not _equal(vars(part).get(name), value):
                return f"{place}{name} is {vars(part).get(name)!r}, not {value!r}"
        shadowed = [n for n in vars(part) if n not in vars(other) and n not in _INTERNAL and hasattr(type(part), n)]
        if shadowed:
            return f"{place}{shadowed[0]} is overridden on the instance"
    shapes, wanted = ({n: tuple(t.shape) for n, t in named_tensors(m)} for m in (module, rebuilt))
    return None if shapes == wanted else f"its tensors are {shapes}, not {wanted}"


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) or isinstance(other, Tensor):
        return False
    return value is other or (type(value) is type(other) and bool(value == other))
