"""compressed-tensors' quantization_config: from quantized layers to JSON, and what of it a reader here minds.

Reference: the package's QuantizationConfig, QuantizationScheme and QuantizationArgs (version 0.20).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mono_quant_fx.config import QuantScheme

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
