"""compressed-tensors' quantization_config: from quantized layers to JSON, and what of it a reader here minds.

Reference: the package's QuantizationConfig, QuantizationScheme and QuantizationArgs (version 0.20).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mono_quant_fx.config import QuantScheme
from mono_quant_fx.errors import CheckpointError

PACKED, INT, MIXED = "pack-quantized", "int-quantized", "mixed-precision"


@dataclass(frozen=True)
class Layer:
    """A quantized module: its name, "Linear" or "Embedding", its weight's scheme, and its INT8 input if it has one.

    `activations` is "", "int8 sym" or "int8 asym".
    """

    module: str
    kind: str
    scheme: QuantScheme
    activations: str = ""

    @property
    def format(self) -> str:
        """How the package calls the storage of the codes."""
        return PACKED if self.scheme.bits == 4 else INT


def quantization_config(layers: Sequence[Layer], ignore: Sequence[str]) -> dict[str, Any]:
    """The value of config.json's "quantization_config".

    One group a scheme. Its targets are the modules' names; where one group holds Linear modules alone, its target is
    that class, and `ignore` names the Linear modules that stay as they are.

    >>> layers = [Layer("a", "Linear", QuantScheme(4, 32)), Layer("b", "Linear", QuantScheme(8, -1))]
    >>> config = quantization_config(layers, ["lm_head"])
    >>> config["format"], [group["targets"] for group in config["config_groups"].values()]
    ('mixed-precision', [['a'], ['b']])
    >>> quantization_config(layers[:1], [])["config_groups"]["group_0"]["targets"]
    ['Linear']
    """
    groups: dict[tuple[QuantScheme, str], list[Layer]] = {}
    for layer in layers:
        groups.setdefault((layer.scheme, layer.activations), []).append(layer)
    by_class = len(groups) == 1 and all(layer.kind == "Linear" for layer in layers)
    formats = {layer.format for layer in layers}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": _group(members, ["Linear"] if by_class else [layer.module for layer in members])
            for i, members in enumerate(groups.values())
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _group(members: Sequence[Layer], targets: list[str]) -> dict[str, Any]:
    first = members[0]
    scheme = first.scheme
    size = None if scheme.group_size == -1 else scheme.group_size
    strategy = "channel" if size is None else "group"
    inputs = _arguments(8, first.activations == "int8 sym", "tensor", None) if first.activations else None
    return {
        "targets": targets,
        "weights": _arguments(scheme.bits, scheme.symmetric, strategy, size),
        "input_activations": inputs,
        "output_activations": None,
        "format": first.format,
    }


def _arguments(bits: int, symmetric: bool, strategy: str, group_size: int | None) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
    }


@dataclass(frozen=True)
class Found:
    """What the config groups of a checkpoint leave open for a weight: the bits, and the group sizes, that occur.

    `static_inputs` says whether some group has static INT8 inputs, one scale a tensor.
    """

    bits: frozenset[int]
    group_sizes: frozenset[int]
    static_inputs: bool


def read_config(config: Mapping[str, Any], where: str) -> Found:
    """Reads a quantization_config.

    Raises:
        CheckpointError: a format, or a number type, that has no counterpart here; names it and `where`.
    """
    fmt = config.get("format")
    if fmt not in (PACKED, INT, MIXED, "naive-quantized"):
        raise CheckpointError(f"{where}: format {fmt!r}: {PACKED}, {INT} or {MIXED} can be read")
    if config.get("transform_config"):
        raise CheckpointError(f"{where}: transform_config: weights that were rotated offline cannot be read")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{where}: config_groups, name -> scheme, is missing")
    bits, sizes, static = set(), set(), False
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        at = f"{where}: config_groups[{name!r}]"
        if not isinstance(weights, Mapping):
            raise CheckpointError(f"{at}: weights, the scheme of its weights, is missing (a preset's name is not read)")
        if weights.get("type", "int") != "int" or weights.get("num_bits") not in (4, 8):
            raise CheckpointError(
                f"{at}: {weights.get('type')} weights of {weights.get('num_bits')} bits; integers of 4 or 8 can be read"
            )
        bits.add(weights["num_bits"])
        size = weights.get("group_size")
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            sizes.add(size)
        static = static or _is_static(group.get("input_activations"), at)
    return Found(frozenset(bits), frozenset(sizes), static)


def _is_static(inputs: Any, at: str) -> bool:
    if not isinstance(inputs, Mapping) or inputs.get("dynamic", False) is not False:
        return False
    if (inputs.get("num_bits"), inputs.get("type", "int"), inputs.get("strategy", "tensor")) != (8, "int", "tensor"):
        raise CheckpointError(f"{at}: input_activations: static INT8 with one scale a tensor can be read, nothing else")
    return True
