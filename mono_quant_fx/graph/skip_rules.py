"""The skip rules: from a weight and a QuantConfig to a scheme or a reason. Pure; the table prints these reasons."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import fx, nn

from mono_quant_fx.config import DEFAULT_INT4_SKIP, INT8, QuantConfig, QuantScheme
from mono_quant_fx.errors import ConfigError, PatternError
from mono_quant_fx.graph.weight_ops import Weight, WeightUse, matrix_shape

LEAST_SHRUNK_GROUP = 16


@dataclass(frozen=True)
class Decision:
    """A scheme (None: the weight stays as it is) and the reason in one line; skipped means that a skip rule fired."""

    scheme: QuantScheme | None
    reason: str
    skipped: bool = False


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a module or weight: exactly, up to a dot, from a dot on, or as a `re:` full match.

    >>> matches("mlp.gate", "layers.0.mlp.gate"), matches("mlp.gate", "layers.0.mlp.gate_proj")
    (True, False)
    >>> matches("layers.0", "layers.0.mlp.gate"), matches(r"re:.*gate.*", "layers.0.mlp.gate_proj")
    (True, True)
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or name.startswith(pattern + ".") or name.endswith("." + pattern)


def decide(weight: Weight, config: QuantConfig) -> Decision:
    """The decision for one weight. Of several users the first that must be skipped decides for all.

    A user that must stay as it is goes before one that skipped_precision stores as INT8.
    """
    decisions = [_decide_use(weight, use, config) for use in weight.uses]
    losers = [i for i, d in enumerate(decisions) if d.skipped or d.scheme is None]
    if not losers:
        return _agree(weight, decisions)
    loser = min(losers, key=lambda i: decisions[i].scheme is not None)
    decision = decisions[loser]
    if any((d.scheme, d.skipped) != (decision.scheme, decision.skipped) for d in decisions):
        use = weight.uses[loser]
        reason = f"{decision.reason} (tied weight: {weight.module_of(use) or use.node.name} decides)"
        decision = replace(decision, reason=reason)
    return decision


def decide_leaf(path: str, kind: str, vectors_only: bool, config: QuantConfig, where: str = "") -> Decision:
    """The reason for a module that stayed a leaf: a rule that names it, else what keeps it out of reach (`where`)."""
    for pattern, value in config.overrides:
        if matches(pattern, path) and value != "skip":
            raise ConfigError(f"overrides: {pattern!r} asks for {value} on {path}, but {kind} hides its weights")
    skip = _listed((path,), {kind}, config)
    if skip is not None:
        return Decision(None, skip, True)
    if vectors_only:
        return Decision(None, f"{kind} holds vectors only, with no rows to group", True)
    return Decision(None, where or f"not reachable: {kind} hides its weights from the graph", True)


@dataclass(frozen=True)
class Known:
    """What a pattern may name: the modules and weights of a graph, and the types of its layers."""

    names: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset()

    @classmethod
    def of(cls, weights: Iterable[Weight], hidden: Iterable[tuple[fx.Node, nn.Module]]) -> Known:
        """Those of a graph's weights, and of the modules that hide theirs."""
        uses = [(weight, use) for weight in weights for use in weight.uses]
        leaves = [(str(node.target), type(module).__name__) for node, module in hidden]
        names = [name for weight, use in uses for name in weight.names_of(use)]
        types = [kind for weight, use in uses for kind in weight.types_of(use)]
        return cls(frozenset(names + [n for n, _ in leaves]), frozenset(types + [t for _, t in leaves]))

    def __or__(self, other: Known) -> Known:
        return Known(self.names | other.names, self.types | other.types)


def check_patterns(config: QuantConfig, known: Known) -> None:
    """Raises PatternError for a pattern of the user's that matches none of the names or types."""
    for complaint in unmatched_patterns(config, known):
        raise PatternError(complaint)


def matching_patterns(config: QuantConfig, weight: str) -> set[str]:
    """The patterns for names, the default ones among them, that a weight's name (or its module's) is an answer to."""
    names = (weight, weight.rpartition(".")[0])
    defaults = DEFAULT_INT4_SKIP["modules_to_not_convert"] if config.default_skips else ()
    found = {p for p in (*config.modules_to_not_convert, *defaults) if any(matches(p, n) for n in names)}
    found |= {p for p in (*(p for p, _ in config.overrides), *config.layer_names) if any(matches(p, n) for n in names)}
    return found | {p for p in config.skip_layer_names if any(_exact(p, n) for n in names)}


def unmatched_patterns(config: QuantConfig, known: Known) -> Iterator[str]:
    """A line for each pattern of the user's that matches none of the names or types, with the nearest ones."""
    names, types = sorted(known.names), sorted(known.types)
    found = {
        "modules_to_not_convert": (config.modules_to_not_convert, names, matches),
        "overrides": (tuple(p for p, _ in config.overrides), names, matches),
        "skip_layer_names": (config.skip_layer_names, names, _exact),
        "skip_layer_types": (config.skip_layer_types, types, _exact),
        "layer_names": (config.layer_names, names, matches),
        "layer_types": (config.layer_types, types, _exact),
    }
    for field, (patterns, there, match) in found.items():
        for pattern in patterns:
            if not any(match(pattern, name) for name in there):
                near = difflib.get_close_matches(pattern.removeprefix("re:"), there, n=5, cutoff=0.3) or there[:5]
                yield f"{field}: {pattern!r} matches nothing in the model; nearest: {', '.join(near)}"


def _exact(pattern: str, name: str) -> bool:
    return matches(pattern, name) if pattern.startswith("re:") else pattern == name


def _decide_use(weight: Weight, use: WeightUse, config: QuantConfig) -> Decision:
    names, types = weight.names_of(use), weight.types_of(use)
    for pattern, value in config.overrides:
        if any(matches(pattern, n) for n in names):
            return _override(weight, use, config, pattern, value)
    skip = _skip_reason(weight, names, types, config)
    if use.layout is None:
        return Decision(None, skip if skip and use.reason.endswith("normalization") else use.reason, True)
    if skip is None:
        return _fit(weight, use, config.scheme, config)
    if config.skipped_precision == "int8":
        return Decision(INT8, f"{skip}: int8 by skipped_precision", True)
    return Decision(None, skip, True)


def _override(weight: Weight, use: WeightUse, config: QuantConfig, pattern: str, value: QuantScheme | str) -> Decision:
    because = f"override {pattern!r}"
    if value == "skip":
        return Decision(None, f"{because}: skip", True)
    if use.layout is None:
        raise ConfigError(f"overrides: {pattern!r} asks for {value} on {weight.name}, but {use.reason}")
    scheme = value if isinstance(value, QuantScheme) else QuantScheme.parse(value, config.scheme)
    fitted = _fit(weight, use, scheme, config)
    return replace(fitted, reason=f"{because}: {fitted.reason}" if fitted.reason else because)


def _skip_reason(weight: Weight, names: tuple[str, ...], types: set[str], config: QuantConfig) -> str | None:
    listed = _listed(names, types, config)
    if listed is None and weight.tensor.numel() < config.least_parameters and not _wanted(names, types, config):
        return f"{weight.tensor.numel()} parameters < skip_param_threshold {config.least_parameters}"
    return listed


def _wanted(names: tuple[str, ...], types: set[str], config: QuantConfig) -> bool:
    """Whether a positive list holds a layer."""
    by_name = any(matches(pattern, name) for pattern in config.layer_names for name in names)
    return by_name or any(_exact(pattern, kind) for pattern in config.layer_types for kind in types)


def _listed(names: tuple[str, ...], types: set[str], config: QuantConfig) -> str | None:
    wanted = _wanted(names, types, config)
    defaults = DEFAULT_INT4_SKIP if config.default_skips and not wanted else {}
    lists = (
        ("modules_to_not_convert", config.modules_to_not_convert, names, matches),
        ("skip_layer_names", config.skip_layer_names, names, _exact),
        ("skip_layer_types", config.skip_layer_types, types, _exact),
        ("default skip", defaults.get("modules_to_not_convert", ()), names, matches),
        ("default skip", defaults.get("skip_layer_types", ()), types, _exact),
    )
    for rule, patterns, known, match in lists:
        for pattern in patterns:
            if any(match(pattern, name) for name in known):
                return f"{rule}: {pattern}"
    if wanted or not (config.layer_names or config.layer_types):
        return None
    given = [field for field in ("layer_types", "layer_names") if getattr(config, field)]
    return f"not in {' or '.join(given)}"


def _fit(weight: Weight, use: WeightUse, scheme: QuantScheme, config: QuantConfig) -> Decision:
    """The scheme as it fits the rows of this weight: short_row and indivisible decide where it does not."""
    assert use.layout is not None
    _, columns = matrix_shape(tuple(weight.tensor.shape), use.layout, use.groups)
    size = scheme.group_size
    if scheme.bits == 8 or size == -1 or columns % size == 0:
        return Decision(scheme, "")
    small = columns < size
    rule, policy = ("short_row", config.short_row) if small else ("indivisible", config.indivisible)
    what = f"rows of {columns} < group_size {size}" if small else f"group_size {size} does not divide rows of {columns}"
    if policy == "error":
        raise ConfigError(
            f"{weight.name}: {what}, and {rule}='error'; use another group_size, {rule}='int8', 'shrink' or 'skip', "
            "or an override for this layer"
        )
    if policy == "skip":
        return Decision(None, f"{what}: skipped by {rule}", True)
    shrunk = _shrink(columns, size) if policy == "shrink" else None
    if shrunk is None:
        note = f" (no power of two >= {LEAST_SHRUNK_GROUP} divides it)" if policy == "shrink" else ""
        return Decision(INT8, f"{what}: int8 by {rule}{note}")
    return Decision(replace(scheme, group_size=shrunk), f"{what}: shrunk to {shrunk}")


def _shrink(columns: int, below: int) -> int | None:
    size = columns & -columns  # the largest power of two that divides it
    while size >= below:
        size //= 2
    return size if size >= LEAST_SHRUNK_GROUP else None


def _agree(weight: Weight, decisions: list[Decision]) -> Decision:
    views = {(use.layout, use.groups) for use in weight.uses}
    if len(views) > 1:
        return Decision(None, f"its users view it differently: {', '.join(sorted(str(v[0]) for v in views))}", True)
    schemes = {d.scheme for d in decisions}
    if len(schemes) > 1:
        wanted = ", ".join(sorted(str(s) for s in schemes))
        return Decision(None, f"its users want different schemes: {wanted}", True)
    return decisions[0]
