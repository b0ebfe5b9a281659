"""What to quantize and how: QuantScheme for one weight, QuantConfig for a model. Frozen, validated, no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mono_quant_fx.checks import check_pattern, choice, flag, items, patterns, positive, require, type_names, whole
from mono_quant_fx.errors import ConfigError

NORM_TYPES = (
    "LayerNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "GroupNorm",
    "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "RMSNorm",
)  # fmt: skip

#: The defaults that a user's own lists add to; ``default_skips=False`` drops all three.
DEFAULT_INT4_SKIP: Mapping[str, Any] = {
    "skip_layer_types": ("Embedding", "EmbeddingBag", *NORM_TYPES),
    "modules_to_not_convert": ("lm_head",),
    "skip_param_threshold": 512,
}

FALLBACKS = ("int8", "shrink", "skip", "error")
COMPUTE = ("auto", "float32", "bfloat16")
#: What an operator on INT4 codes takes: activations="int8_dynamic" is its "int8".
OPERATOR_COMPUTE = (*COMPUTE, "int8")
ACTIVATIONS = (None, "int8", "int8_dynamic")
OBSERVERS = ("minmax", "moving_average_minmax", "histogram", "percentile", "auto")


@dataclass(frozen=True)
class QuantScheme:
    """How one weight is stored.

    Args:
        bits: 4 or 8.
        group_size: columns of a row that share a scale; -1 is the whole row. INT8 is always per row (-1).
        symmetric: codes around zero (True), or an integer zero point a group (False).

    Raises:
        ConfigError: a field is outside its rule.

    >>> str(QuantScheme()), str(QuantScheme(8, -1)), str(QuantScheme(4, 32, False))
    ('int4 g128 sym', 'int8 channel', 'int4 g32 asym')
    >>> QuantScheme.parse("int4 g64 asym")
    QuantScheme(bits=4, group_size=64, symmetric=False)
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        require(self.bits in (4, 8) and isinstance(self.bits, int), "bits", self.bits, "bits is 4 or 8")
        check_group_size(self.group_size)
        require(isinstance(self.symmetric, bool), "symmetric", self.symmetric, "symmetric is True or False")
        if self.bits == 8 and self.group_size != -1:
            raise ConfigError(
                f"group_size={self.group_size} with bits=8: INT8 is stored per output channel; use QuantScheme(8, -1)"
            )

    def __str__(self) -> str:
        if self.bits == 8:
            return "int8 channel" if self.symmetric else "int8 channel asym"
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"int4 {group} {'sym' if self.symmetric else 'asym'}"

    @classmethod
    def parse(cls, text: str, default: QuantScheme | None = None) -> QuantScheme:
        """The inverse of str(): "int8", "int4", "int4 g64", "int4 channel asym"; gaps come from `default`."""
        base = default if default is not None and default.bits == 4 else cls()
        m = re.fullmatch(r"int(4|8)(?: (channel|g\d+))?(?: (sym|asym))?", text)
        if m is None:
            raise ConfigError(f"scheme {text!r}: a scheme reads like 'int8', 'int4 g64 sym' or 'int4 channel asym'")
        bits, group, symmetry = m.groups()
        if bits == "8" and group in (None, "channel"):
            return cls(8, -1, symmetry != "asym")
        size = base.group_size if group is None else -1 if group == "channel" else int(group[1:])
        return cls(int(bits), size, base.symmetric if symmetry is None else symmetry == "sym")


@dataclass(frozen=True)
class QuantConfig:
    """Everything that decides which weight gets which scheme; each field is also a keyword of `quantize`.

    Patterns in `modules_to_not_convert` and `overrides` match a module (or weight) name exactly, as a prefix that
    ends at a dot, or as a suffix that begins at one: ``mlp.gate`` never matches ``mlp.gate_proj``. Patterns in
    `skip_layer_names` are exact names. Everywhere ``re:...`` is a regular expression for the full name.

    Args:
        bits: 4 or 8 for the weights that no rule singles out.
        group_size: columns of a row that share a scale in INT4; -1 is the whole row. INT8 is per output channel.
        axis: 0, the output channels (the only one).
        symmetric: codes around zero, or with an integer zero point a group.
        modules_to_not_convert: names to leave alone, Hugging Face style; adds to ("lm_head",).
        skip_layer_types: classes or class names to leave alone; adds to embeddings and norms.
        skip_layer_names: exact names, or ``re:`` patterns, to leave alone.
        skip_param_threshold: weights with fewer elements than this are left alone; None is 512, and 0 with
            ``default_skips=False``.
        layer_types: quantize layers of these classes or class names only, and those that `layer_names` lists; what is
            listed in either is quantized against the default skips, and not against your own.
        layer_names: likewise names, as in `modules_to_not_convert`.
        overrides: pattern -> QuantScheme, a scheme's text ("int8", "int4 g32 asym") or "skip". Read before every
            other rule; the first match wins.
        default_skips: False drops DEFAULT_INT4_SKIP: its types, its names and its threshold.
        skipped_precision: None keeps a skipped weight as it is; "int8" stores it as per-channel INT8.
        short_row: what to do when a row is shorter than group_size: "int8", "shrink", "skip" or "error".
        indivisible: what to do when group_size does not divide a row: the same four. "shrink" takes the largest
            power of two >= 16 that divides the row, and INT8 when there is none.
        num_calibration_samples: how many samples (along dim 0) of the calibration data are used.
        algorithm: how weights are rounded: "rtn" (to nearest), "clip" (scales searched for the least energy-weighted
            error) or "gptq" (arXiv 2210.17323); the latter two need calibration data. "auto" is "gptq" with data and
            "rtn" without (docs/numerics.md says why).
        damping: of GPTQ's Hessian, as a fraction of its mean diagonal.
        desc_act: GPTQ rounds the columns of largest input energy first.
        activations: None leaves them float; "int8" quantizes the inputs of ops with quantized weights, one static
            scale a tensor, from the ranges that calibration observes. "int8_dynamic" rounds the inputs of INT4 linears
            in each call, one scale for each row and group, without data (docs/kernels.md has the costs).
        activation_symmetric: activation codes around zero, instead of with a zero point.
        observer: what measures those ranges: a name that create_observer knows (see docs/observers.md), or "auto".
        bias_correction: folds the mean output error that rounding leaves into the biases (arXiv 1906.04721).
        compute: how INT4 linears multiply float32 and float16 inputs. "bfloat16" rounds the inputs first, "float32"
            does not, and "auto" does where the CPU multiplies bfloat16 faster.
        merge_linears: linears that read one input run as one op on stacked rows, with rows of their own in the table.
        accuracy_warning: "warn", "error" (raise AccuracyError on a critical finding) or "ignore".
        sqnr_warning_threshold: dB below which a node is reported.
        sqnr_error_threshold: dB below which a node is critical.

    Raises:
        ConfigError: a value breaks its rule; the message names the value, the rule and the way out.

    >>> QuantConfig(group_size=64).scheme
    QuantScheme(bits=4, group_size=64, symmetric=True)
    >>> QuantConfig(bits=3)
    Traceback (most recent call last):
    mono_quant_fx.errors.ConfigError: bits=3: bits is 4 or 8
    """

    bits: int = 4
    group_size: int = 128
    axis: int = 0
    symmetric: bool = True
    modules_to_not_convert: tuple[str, ...] = ()
    skip_layer_types: tuple[str, ...] = ()
    skip_layer_names: tuple[str, ...] = ()
    skip_param_threshold: int | None = None
    layer_types: tuple[str, ...] = ()
    layer_names: tuple[str, ...] = ()
    overrides: tuple[tuple[str, QuantScheme | str], ...] = ()
    default_skips: bool = True
    skipped_precision: str | None = None
    short_row: str = "int8"
    indivisible: str = "shrink"
    num_calibration_samples: int = 150
    algorithm: str = "auto"
    damping: float = 0.01
    desc_act: bool = True
    activations: str | None = None
    activation_symmetric: bool = False
    observer: str = "minmax"
    bias_correction: bool = False
    compute: str = "auto"
    merge_linears: bool = True
    accuracy_warning: str = "warn"
    sqnr_warning_threshold: float = 20.0
    sqnr_error_threshold: float = 10.0

    def __post_init__(self) -> None:
        for name in ("modules_to_not_convert", "skip_layer_names", "layer_names"):
            object.__setattr__(self, name, patterns(name, getattr(self, name)))
        for name in ("skip_layer_types", "layer_types"):
            object.__setattr__(self, name, type_names(name, getattr(self, name)))
        object.__setattr__(self, "overrides", _overrides(self.overrides))
        QuantScheme(self.bits, self.group_size if self.bits == 4 else -1, self.symmetric)
        check_group_size(self.group_size)
        channels = self.axis == 0 and type(self.axis) is int
        require(channels, "axis", self.axis, "only axis 0, the output channels, can carry scales")
        for name in ("default_skips", "desc_act", "activation_symmetric", "bias_correction", "merge_linears"):
            flag(name, getattr(self, name))
        for name in ("short_row", "indivisible"):
            choice(name, getattr(self, name), FALLBACKS)
        choice("skipped_precision", self.skipped_precision, (None, "int8"))
        choice("algorithm", self.algorithm, ("auto", "rtn", "clip", "gptq"))
        positive("damping", self.damping)
        choice("activations", self.activations, ACTIVATIONS)
        choice("observer", self.observer, OBSERVERS)
        choice("compute", self.compute, COMPUTE)
        choice("accuracy_warning", self.accuracy_warning, ("warn", "error", "ignore"))
        if self.skip_param_threshold is not None:
            whole("skip_param_threshold", self.skip_param_threshold, 0)
        whole("num_calibration_samples", self.num_calibration_samples, 1)
        check_thresholds(self.sqnr_warning_threshold, self.sqnr_error_threshold)
        for pattern, value in self.overrides:
            if isinstance(value, str) and value != "skip":
                try:
                    QuantScheme.parse(value, self.scheme)
                except ConfigError as e:
                    raise ConfigError(f"overrides: {pattern!r}: {e}, or 'skip'") from e

    @property
    def least_parameters(self) -> int:
        """What `skip_param_threshold` comes to."""
        if self.skip_param_threshold is not None:
            return self.skip_param_threshold
        return DEFAULT_INT4_SKIP["skip_param_threshold"] if self.default_skips else 0

    @property
    def scheme(self) -> QuantScheme:
        """The scheme of a weight that no rule singles out."""
        return QuantScheme(4, self.group_size, self.symmetric) if self.bits == 4 else QuantScheme(8, -1, self.symmetric)

    @classmethod
    def build(cls, config: QuantConfig | None, fields: Mapping[str, Any]) -> QuantConfig:
        """`config` with `fields` laid over it; an unknown field is an error that names the nearest ones."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
                raise ConfigError(f"{name}={fields[name]!r}: no such setting; did you mean {', '.join(near)}?")
        if config is not None and not isinstance(config, cls):
            raise ConfigError(f"config={config!r}: a QuantConfig is needed, not {type(config).__name__}")
        return dataclasses.replace(config or cls(), **fields)


def check_group_size(group_size: int) -> None:
    """Raises ConfigError unless `group_size` is -1 or a positive multiple of 8 (the codes in one packed word)."""
    whole = isinstance(group_size, int) and not isinstance(group_size, bool)
    if not whole or not (group_size == -1 or (group_size > 0 and group_size % 8 == 0)):
        raise ConfigError(
            f"group_size={group_size!r}: a group is a positive multiple of 8 columns (32, 64 and 128 are usual), "
            "or -1 for the whole row"
        )


def check_thresholds(warning_db: float, error_db: float) -> None:
    """Raises ConfigError unless both are finite and `warning_db` is not below `error_db`."""
    for name, value in (("sqnr_warning_threshold", warning_db), ("sqnr_error_threshold", error_db)):
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        require(ok, name, value, "a finite number of dB is needed")
    if warning_db < error_db:
        raise ConfigError(
            f"sqnr_warning_threshold={warning_db} is below sqnr_error_threshold={error_db}: a node would be critical"
            " without being worth a warning; swap them"
        )


def _overrides(value: Any) -> tuple[tuple[str, QuantScheme | str], ...]:
    pairs = tuple(value.items()) if isinstance(value, Mapping) else items("overrides", value)
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], str | QuantScheme)):
            raise ConfigError(f"overrides: {pair!r}: pattern -> QuantScheme, 'int8', 'int4 g64 asym' or 'skip'")
        check_pattern("overrides", pair[0])
    return pairs


INT8 = QuantScheme(8, -1, True)
