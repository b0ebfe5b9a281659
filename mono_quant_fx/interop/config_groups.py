"""What a compressed-tensors quantization_config says about each module: the config group that is its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mono_quant_fx.errors import CheckpointError
from mono_quant_fx.interop.quantization_config import INT, MIXED, PACKED

_FORMATS = (PACKED, INT, MIXED, "naive-quantized")
_STRATEGIES = ("group", "channel", "tensor")


@dataclass(frozen=True)
class Group:
    """A config group; None is what it leaves open.

    `group_size` is -1 for one group of all columns. `act_order` is "group" where columns were permuted across groups.
    """

    name: str
    targets: tuple[str, ...]
    bits: int
    symmetric: bool | None = None
    strategy: str | None = None
    group_size: int | None = None
    act_order: str | None = None
    format: str | None = None
    static_input: bool = False
    symmetric_input: bool | None = None


@dataclass(frozen=True)
class Found:
    """The config groups of a checkpoint, and what is on its ignore list."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()

    @property
    def bits(self) -> frozenset[int]:
        """All that occur."""
        return frozenset(group.bits for group in self.groups)

    @property
    def group_sizes(self) -> frozenset[int]:
        """All that occur."""
        return frozenset(group.group_size for group in self.groups if group.group_size is not None)

    @property
    def static_inputs(self) -> bool:
        """Whether some group has static INT8 inputs, one scale a tensor."""
        return any(group.static_input for group in self.groups)

    def ignores(self, module: str) -> bool:
        """Whether the ignore list has a module by its name."""
        return any(_names(target, module) for target in self.ignore)

    def group_of(self, module: str, kinds: Sequence[str]) -> Group | None:
        """The group of a module: by its name, by a pattern of names, by its class; or the only one that there is."""
        by_name = [g for g in self.groups if module in g.targets]
        by_pattern = [g for g in self.groups if any(_names(t, module) for t in g.targets)]
        by_class = [g for g in self.groups if set(g.targets) & set(kinds)]
        found = by_name or by_pattern or by_class or (self.groups if len(self.groups) == 1 else ())
        return found[0] if found else None


def _names(target: str, module: str) -> bool:
    """As the package has it: a name, or "re:" and a pattern for its beginning."""
    return re.match(target[3:], module) is not None if target.startswith("re:") else target == module


def read_config(config: Mapping[str, Any], where: str) -> Found:
    """Reads a quantization_config.

    Raises:
        CheckpointError: a format, or a number type, that has no counterpart here, or a group that contradicts itself;
            names it and `where`.
    """
    fmt = config.get("format")
    if fmt not in _FORMATS:
        raise CheckpointError(f"{where}: format {fmt!r}: {PACKED}, {INT} or {MIXED} can be read")
    if config.get("transform_config"):
        raise CheckpointError(f"{where}: transform_config: weights that were rotated offline cannot be read")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{where}: config_groups, name -> scheme, is missing")
    read = tuple(_group(name, group, fmt, f"{where}: config_groups[{name!r}]") for name, group in groups.items())
    return Found(read, _targets(config.get("ignore") or (), f"{where}: ignore"))


def _group(name: str, group: Any, fmt: str, at: str) -> Group:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{at}: weights, the scheme of its weights, is missing (a preset's name is not read)")
    bits = weights.get("num_bits")
    if weights.get("type", "int") != "int" or type(bits) is not int or bits not in (4, 8):
        raise CheckpointError(f"{at}: {weights.get('type')} weights of {bits} bits; integers of 4 or 8 can be read")
    strategy, size = _strategy(weights, at)
    own = group.get("format") or (None if fmt == MIXED else fmt)
    if own is not None and own not in _FORMATS:
        raise CheckpointError(f"{at}: format {own!r}: {PACKED}, {INT} or {MIXED} can be read")
    is_static = _is_static(group.get("input_activations"), at)
    return Group(
        name, _targets(group.get("targets") or (), f"{at}: targets"), bits, _switch(weights, at), strategy, size,
        _act_order(weights.get("actorder"), at), None if own == MIXED else own, is_static,
        _switch(group["input_activations"], at) if is_static else None,
    )  # fmt: skip


def _targets(value: Any, at: str) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(t, str) for t in value):
        raise CheckpointError(f"{at}: a list of names, classes and patterns is needed")
    for target in value:
        try:
            re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
        except (re.error, RecursionError, OverflowError) as e:
            raise CheckpointError(f"{at}: {target!r} is no regular expression: {e}") from e
    return tuple(value)


def _switch(arguments: Mapping[str, Any], at: str) -> bool | None:
    symmetric = arguments.get("symmetric")
    if symmetric is not None and type(symmetric) is not bool:
        raise CheckpointError(f"{at}: symmetric {symmetric!r}: true or false is needed")
    return symmetric


def _strategy(weights: Mapping[str, Any], at: str) -> tuple[str | None, int | None]:
    """How scales are shared, and the size of a group; each may be left to the other."""
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy is not None and strategy not in _STRATEGIES:
        raise CheckpointError(f"{at}: strategy {strategy!r}: one of {', '.join(_STRATEGIES)} can be read")
    if size is not None and (type(size) is not int or (size < 1 and size != -1)):
        raise CheckpointError(f"{at}: group_size {size!r}: a whole number above 0 is needed, or null")
    is_one = size in (None, -1)
    if strategy is not None and is_one is (strategy == "group"):
        raise CheckpointError(f"{at}: strategy {strategy!r} and group_size {size!r} contradict each other")
    if strategy in ("channel", "tensor"):
        return strategy, -1
    return ("group" if not is_one else None), size


def _act_order(value: Any, at: str) -> str | None:
    """ "group" (or true) permutes columns across groups; "weight" (or "static") leaves them where they are."""
    if value in (None, False, "weight", "static"):
        return None
    if value in (True, "group", "dynamic"):
        return "group"
    raise CheckpointError(f"{at}: actorder {value!r}: 'group', 'weight' or null can be read")


def _is_static(inputs: Any, at: str) -> bool:
    if not isinstance(inputs, Mapping) or inputs.get("dynamic", False) is not False:
        return False
    if (inputs.get("num_bits"), inputs.get("type", "int"), inputs.get("strategy", "tensor")) != (8, "int", "tensor"):
        raise CheckpointError(f"{at}: input_activations: static INT8 with one scale a tensor can be read, nothing else")
    return True
