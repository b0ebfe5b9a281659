"""What the accuracy benchmark runs: the models, and one Setting a line of their tables."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

OURS = "mono_quant_fx"
SEED = 0
GROUP_SIZES = (32, 128)
ALGORITHMS = ("rtn", "clip", "gptq")
OBSERVERS = ("minmax", "moving_average_minmax", "histogram", "percentile", "auto")

#: Key -> where its names stand (see Workload).
MODELS = {name: f"tests.real_models.{name}" for name in ("minilm", "smollm2", "effnet_lite0", "g2p_gru")}
TINY_MODELS = {name: f"tests.benchmarks.tiny_models:{name.upper()}" for name in ("tiny_mlp", "tiny_conv")}


class Workload(Protocol):
    """What a model's module (or object) holds; tests/real_models/__init__.py says what the names mean."""

    NAME: str
    METRIC: str
    HIGHER_IS_BETTER: bool
    NUM_SAMPLES: int

    def load(self) -> nn.Module: ...
    def calibration(self) -> list[tuple[Tensor, ...]]: ...
    def unseen(self) -> list[tuple[Tensor, ...]]: ...
    def evaluate(self, model: nn.Module) -> tuple[float, float | None]: ...


def workload(key: str) -> Workload:
    """The model of that key."""
    found: Workload = pkgutil.resolve_name({**MODELS, **TINY_MODELS}[key])
    return found


@dataclass(frozen=True)
class Setting:
    """One line of a model's table.

    Attributes:
        name: unique among all settings; the command's --settings matches it.
        package: the distribution that quantizes: mono_quant_fx, a peer's, or torch for the float model.
        options: keywords of mq.quantize, or of the peer's function in peers.py.
        kind: "float", "weights" (activations stay float) or "activations" (these are INT8 as well).
    """

    name: str
    package: str = OURS
    options: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "weights"

    @property
    def is_ours(self) -> bool:
        """Whether mono_quant_fx quantizes."""
        return self.package == OURS

    @property
    def is_peer(self) -> bool:
        """Whether another package quantizes."""
        return not self.is_ours and self.kind != "float"


def weight_setting(algorithm: str, symmetric: bool, group_size: int) -> str:
    """The name of mono_quant_fx's weight-only setting."""
    return f"{algorithm} {'sym' if symmetric else 'asym'} g{group_size}"


def activation_setting(algorithm: str, group_size: int) -> str:
    """The name of mono_quant_fx's W4A8 setting."""
    return f"w4a8 {algorithm} g{group_size}"


FLOAT = Setting("float", "torch", kind="float")

WEIGHT_ONLY = tuple(
    Setting(weight_setting(a, s, g), options={"algorithm": a, "symmetric": s, "group_size": g})
    for g in GROUP_SIZES
    for s in (True, False)
    for a in ALGORITHMS
)

W8A8 = tuple(
    Setting(f"w8a8 {o}", options={"bits": 8, "activations": "int8", "observer": o}, kind="activations")
    for o in OBSERVERS
)

W4A8 = tuple(
    Setting(
        activation_setting(a, g),
        options={"algorithm": a, "group_size": g, "activations": "int8", "observer": "minmax"},
        kind="activations",
    )
    for g in GROUP_SIZES
    for a in ("rtn", "gptq")
)

PEERS = (
    *(Setting(f"quanto qint4 g{g}", "optimum-quanto", {"group_size": g, "symmetric": False}) for g in GROUP_SIZES),
    *(Setting(f"HQQ g{g}", "hqq", {"group_size": g, "symmetric": False}) for g in GROUP_SIZES),
    *(
        Setting(
            f"torchao intx {'sym' if s else 'asym'} g{g}",
            "torchao",
            {"method": "intx", "group_size": g, "symmetric": s},
        )
        for g in GROUP_SIZES
        for s in (True, False)
    ),
    *(
        Setting(
            f"torchao 8da4w g{g}", "torchao", {"method": "8da4w", "group_size": g, "symmetric": True}, "activations"
        )
        for g in GROUP_SIZES
    ),
    *(
        Setting(f"torchao int4 {f}", "torchao", {"method": "int4", "group_size": 128, "symmetric": False, "packing": f})
        for f in ("plain", "plain_int32", "tile_packed_to_4d")
    ),
)

SETTINGS = (FLOAT, *WEIGHT_ONLY, *W8A8, *W4A8, *PEERS)
BY_NAME = {setting.name: setting for setting in SETTINGS}
