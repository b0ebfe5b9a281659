"""export_compressed_tensors: a quantized graph as a folder that compressed-tensors, transformers and vLLM read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from mono_quant_fx import ops
from mono_quant_fx.checks import whole
from mono_quant_fx.errors import CheckpointError, PreconditionError
from mono_quant_fx.files.checkpoint_files import CONFIG, read_json, write_checkpoint
from mono_quant_fx.graph.annotation import QuantAnnotation, WeightUser, annotated, stored_weight
from mono_quant_fx.graph.merging import LinearCall
from mono_quant_fx.graph.own_names import own_name
from mono_quant_fx.graph.tensors import get_attribute, op_name
from mono_quant_fx.graph.weight_ops import matrix_shape
from mono_quant_fx.interop.packing import pack_zero_points
from mono_quant_fx.interop.quantization_config import Layer, quantization_config
from mono_quant_fx.process.surroundings import in_plain_surroundings
from mono_quant_fx.storage.result import QuantizationResult

_REMEDY = "leave the weight out with modules_to_not_convert"


@in_plain_surroundings
def export_compressed_tensors(
    result: QuantizationResult | fx.GraphModule, folder: str | os.PathLike[str], *, shard_bytes: int = 5 * 10**9
) -> None:
    """Writes a quantized model in compressed-tensors' format, under the module and tensor names of the float model.

    Files: model.safetensors (past `shard_bytes`, model-00001-of-0000N.safetensors ... and
    model.safetensors.index.json) and config.json, whose "quantization_config" describes the layers. A config.json that
    is there already keeps its other entries. All files are written into a temporary folder beside `folder` first.

    For a module that is INT4: weight_packed int32 [N, ceil(K/8)], weight_scale [N, G], with zero points
    weight_zero_point int32 [ceil(N/8), G], and weight_shape int64 [2]. INT8: weight int8 [N, K], weight_scale [N, 1],
    with zero points weight_zero_point int8 [N, 1]. INT8 inputs: input_scale [1], and input_zero_point int8 [1] where
    asymmetric. Linears that were merged come out apart. Everything else of the state_dict keeps name and dtype.

    Args:
        result: what quantize returned, or its graph_module.
        folder: is made if it is missing.
        shard_bytes: tensors of at most this many bytes go into one file; a larger tensor has a file of its own.

    Raises:
        PreconditionError: nothing in the graph is quantized.
        CheckpointError: a quantized weight that the format has no form for (a convolution, a weight stored [K, N], one
            that two modules share, no nn.Linear or nn.Embedding), before anything is written; or a failing disk.
        ConfigError: a bad shard_bytes.
    """
    whole("shard_bytes", shard_bytes, 1)
    gm = result.graph_module if isinstance(result, QuantizationResult) else result
    if not isinstance(gm, fx.GraphModule) or not any(a.lowered for _, a in annotated(gm)):
        raise PreconditionError("export_compressed_tensors: a QuantizationResult, or its graph_module, is needed")
    nodes = {n.name: n for n in gm.graph.nodes}
    _check_inputs(gm)
    layers = [_layer(gm, nodes, annotation) for _, annotation in annotated(gm) if annotation.lowered]
    tensors = _tensors(gm, nodes)
    path = Path(folder) / CONFIG
    config = read_json(path) if path.is_file() else {}
    config["quantization_config"] = quantization_config(layers, _ignored(gm))
    write_checkpoint(folder, tensors, config, shard_bytes)


def _layer(gm: fx.GraphModule, nodes: dict[str, fx.Node], annotation: QuantAnnotation) -> Layer:
    """The module of a lowered weight.

    Raises:
        CheckpointError: the format has no form for it.
    """
    weight, scheme = own_name(gm, annotation.weight), annotation.scheme
    module, _, name = weight.rpartition(".")
    assert scheme is not None
    if name != "weight" or not module:
        raise _unfit(weight, "is not the weight of a submodule")
    if len(annotation.shape) != 2:
        raise _unfit(weight, f"has {len(annotation.shape)} dimensions, as a convolution's")
    if annotation.layout != "rows":
        raise _unfit(weight, "is stored [in, out] (as in GPT-2's Conv1D), and nn.Linear's is [out, in]")
    shared = sorted({use.module for use in annotation.users} - {module})
    if shared:
        raise _unfit(weight, f"is used by {', '.join(shared)} as well, and the codes would be stored for one of them")
    kinds = {_module_kind(nodes[use.node]) for use in annotation.users}
    if len(kinds) != 1 or "" in kinds:
        raise _unfit(weight, "belongs to no nn.Linear or nn.Embedding")
    statics = {_input_qparams(nodes, use) for use in annotation.users}
    if len(statics) > 1:
        raise _unfit(weight, "is called on inputs with different INT8 scales")
    (static,) = statics
    return Layer(module, kinds.pop(), scheme, annotation.activations if static else "")


def _check_inputs(gm: fx.GraphModule) -> None:
    """Raises CheckpointError if an op that is not fused reads a rounded input."""
    for node in gm.graph.nodes:
        if node.target is ops.dequantize_activation:
            reader = next(iter(node.users), node)
            raise CheckpointError(
                f"{reader.name} ({op_name(reader)}) reads an INT8 input, and compressed-tensors' format has INT8 "
                "inputs of nn.Linear only; quantize with activations=None, or leave this weight out"
            )


def _unfit(weight: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{weight!r} {why}: compressed-tensors' format stores the weights of nn.Linear and nn.Embedding; {_REMEDY}"
    )


def _module_kind(node: fx.Node) -> str:
    """ "Linear" or "Embedding" by the class of the module that made a node (an exported graph knows its name only)."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    kind = stack[-1][1] if stack else None
    for known in (nn.Linear, nn.Embedding):
        if isinstance(kind, type) and issubclass(kind, known):
            return known.__name__
        if isinstance(kind, str) and kind.rpartition(".")[2].endswith(known.__name__):
            return known.__name__
    return ""


def _input_qparams(nodes: dict[str, fx.Node], use: WeightUser) -> tuple[fx.Node, fx.Node] | None:
    """The nodes of the scale and zero point of an op's INT8 input; None where it is float."""
    node: Any = nodes[use.node]
    call = LinearCall.read(node) or LinearCall.read(_whole(node))
    return call.input[1:] if call is not None and len(call.input) == 3 else None  # type: ignore[return-value]


def _whole(node: fx.Node) -> Any:
    """The op that computes a merged weight's rows, for the node that holds its piece; any other node itself."""
    pieces = node.all_input_nodes
    whole = pieces[0].all_input_nodes if pieces else []
    return whole[0] if whole else node


def _tensors(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> dict[str, Tensor]:
    """Everything that goes into the files, by name, without a copy."""
    replaced = set(_replaced(gm))
    found = {n: t for n, t in gm.state_dict().items() if n not in replaced}
    for node, annotation in annotated(gm):
        if annotation.lowered:
            ours = _weight_tensors(gm, annotation) | _merged_bias(gm, node, annotation)
            ours |= _input_tensors(gm, nodes, annotation)
            for name in ours.keys() & found.keys():
                raise CheckpointError(
                    f"the model has a tensor {name!r} of its own, and compressed-tensors' format stores something else "
                    f"of {annotation.weight!r} under this name; rename the model's, or {_REMEDY}"
                )
            found |= ours
    once: dict[tuple[Any, ...], str] = {}
    for name, tensor in found.items():  # what several names share is stored under the first, as Hugging Face does
        once.setdefault(_memory(tensor) or (name,), name)
    return dict(sorted((own_name(gm, name), found[name]) for name in once.values()))


def _memory(tensor: Tensor) -> tuple[Any, ...] | None:
    """Equal for two names of one tensor; None for a tensor without memory."""
    if not tensor.nbytes:
        return None
    return tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _replaced(gm: fx.GraphModule) -> Iterator[str]:
    """The names in the graph that the files do not have: codes, scales, merged biases, the qparams of inputs."""
    for node, annotation in annotated(gm):
        if annotation.lowered:
            yield from annotation.storage_names
            if annotation.merged is not None:
                call = LinearCall.read(_whole(node))
                if call is not None and call.bias is not None:
                    yield str(call.bias.target)
    for node in gm.graph.nodes:
        if node.target is ops.quantize_activation:
            yield from (str(n.target) for n in node.args[1:])


def _weight_tensors(gm: fx.GraphModule, annotation: QuantAnnotation) -> dict[str, Tensor]:
    name, stored, scheme = annotation.weight, stored_weight(gm, annotation), annotation.scheme
    assert scheme is not None
    zero_point = stored.weight_zero_point
    if scheme.bits == 8:
        tensors = {name: stored.weight_packed, f"{name}_scale": stored.weight_scale}
        return tensors if zero_point is None else {**tensors, f"{name}_zero_point": zero_point}
    shape = matrix_shape(annotation.shape, annotation.layout, annotation.groups)
    tensors = {
        f"{name}_packed": stored.weight_packed,
        f"{name}_scale": stored.weight_scale,
        f"{name}_shape": torch.tensor(shape),
    }
    return tensors if zero_point is None else {**tensors, f"{name}_zero_point": pack_zero_points(zero_point)}


def _merged_bias(gm: fx.GraphModule, node: fx.Node, annotation: QuantAnnotation) -> dict[str, Tensor]:
    rows = annotation.merged
    call = LinearCall.read(_whole(node)) if rows is not None else None
    if rows is None or rows.bias is None or call is None or call.bias is None:
        return {}
    bias: Tensor = get_attribute(gm, str(call.bias.target))
    return {rows.bias: bias.detach()[rows.start : rows.stop]}


def _input_tensors(gm: fx.GraphModule, nodes: dict[str, fx.Node], annotation: QuantAnnotation) -> dict[str, Tensor]:
    """The qparams of a module's INT8 input: a tensor that several modules read has them once in the graph."""
    found = _input_qparams(nodes, annotation.users[0])
    if found is None:
        return {}
    module = annotation.weight.rpartition(".")[0]
    scale, zero_point = (get_attribute(gm, str(n.target)) for n in found)
    tensors = {f"{module}.input_scale": scale.clone()}
    if annotation.activations == "int8 asym":
        tensors[f"{module}.input_zero_point"] = zero_point.clone()
    return tensors


def _ignored(gm: fx.GraphModule) -> list[str]:
    """The modules whose matrices stay float, in the order of the graph."""
    kept = (a for _, a in annotated(gm) if not a.lowered and len(a.shape) == 2)
    return list(dict.fromkeys(use.module for a in kept for use in a.users if use.module))
