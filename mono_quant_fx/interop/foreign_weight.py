"""The weights of a checkpoint in any of the formats, as stored codes of ours, and which tensors they are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mono_quant_fx.errors import CheckpointError
from mono_quant_fx.files.checkpoint_files import CONFIG, Checkpoint
from mono_quant_fx.interop.compressed_weight import read_int8, read_packed
from mono_quant_fx.interop.config_groups import Found, read_config
from mono_quant_fx.interop.foreign_tensors import StoredWeight, Tensors, Wanted
from mono_quant_fx.interop.gptq_weight import check_config, compare_configs, read_awq, read_gptq

__all__ = ["Reader", "StoredWeight", "Wanted"]

SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
METHODS = ("compressed-tensors", "gptq", "awq")


@dataclass
class Reader:
    """Reads the quantized weights of a checkpoint.

    Attributes:
        tensors: of the checkpoint, with its quantization_config.
        method: one of METHODS.
        found: compressed-tensors' config, read.
    """

    tensors: Tensors
    method: str
    found: Found | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Reader:
        """Finds out the format.

        Raises:
            CheckpointError: no quantization_config, or one of a format (or a variant) that cannot be read; or two files
                that contradict each other.
        """
        config = checkpoint.json(CONFIG) or {}
        found = config.get("quantization_config") or config.get("compression_config")
        name = CONFIG
        method = found.get("quant_method") if isinstance(found, Mapping) else None
        for file, its_method in SIDE_FILES.items():
            side = checkpoint.json(file)
            if side is None:
                continue
            if not isinstance(found, Mapping):
                found, name, method = side, file, side.get("quant_method", its_method)
            elif method == its_method:
                compare_configs(found, str(checkpoint.folder / name), side, str(checkpoint.folder / file))
        where = str(checkpoint.folder / name)
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{where}: a quantization_config is needed; this checkpoint is not quantized")
        if method not in METHODS:
            raise CheckpointError(f"{where}: quant_method {method!r}: one of {', '.join(METHODS)} can be read")
        return cls(Tensors(checkpoint, found, where), str(method), _checked(str(method), found, where))

    @property
    def used(self) -> set[str]:
        """Every tensor that has been read."""
        return self.tensors.used

    def read(self, want: Wanted) -> StoredWeight | None:
        """The weight, or None where the checkpoint holds it as a plain tensor.

        Raises:
            CheckpointError: a tensor is missing or not of the shape or dtype that the model asks for, the config says
                something else of it, or the weight is stored in a way that has no exact counterpart here.
        """
        tensors = self.tensors
        if self.found is None:
            read: Callable[[Tensors, Wanted], StoredWeight] = read_gptq if self.method == "gptq" else read_awq
            return read(tensors, want) if f"{want.module}qweight" in tensors else None
        if f"{want.name}_packed" in tensors:
            return read_packed(tensors, self.found, want)
        if want.name in tensors and tensors.checkpoint.kind(want.name)[0] == torch.int8:
            return read_int8(tensors, self.found, want)
        return None


def _checked(method: str, config: Mapping[str, Any], where: str) -> Found | None:
    """The config, read; None for GPTQ and AWQ, which have one for all weights."""
    if method == "compressed-tensors":
        return read_config(config, where)
    check_config(method, config, where)
    return None
