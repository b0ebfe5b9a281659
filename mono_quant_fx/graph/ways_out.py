"""What to do about a weight that stays float: a way out for each reason, that works."""

from __future__ import annotations

import re
from collections.abc import Container

RECURRENT = re.compile(r"(LSTM|GRU|RNN)(Cell)? hides|aten\.(lstm|gru|rnn)")
HIDES = re.compile(r"not reachable: (\w+) hides its weights")
PARAMETRIZED = re.compile(r"Parametrized\w+ hides")
DEFAULT = re.compile(r"default skip: (\w+)")
POLICY = re.compile(r"skipped by (short_row|indivisible)")
SETTINGS = ("not in layer", "modules_to_not_convert", "skip_layer_names", "skip_layer_types", "override")


def way_out(reason: str, weight: str, names: Container[str] = (), closed: str = "") -> str:
    """How to have such a weight quantized; "" where nothing is to be done.

    Args:
        reason: of its row in the table.
        weight: its name.
        names: of the graph's tensors; they tell a pruned weight from one under spectral norm.
        closed: why modules of torch.nn that hide their weights were not opened, if some were not.

    >>> way_out("mul is no op ...", "conv.parametrizations.weight.original1")
    "torch.nn.utils.parametrize.remove_parametrizations(model.get_submodule('conv'), 'weight') first"
    """
    utility = _utility(reason, weight, names)
    if utility:
        return f"torch.nn.utils.{utility} first"
    if RECURRENT.search(reason):
        return "recurrent layers are not supported yet"
    if HIDES.search(reason):
        return closed or "quantize a model whose forward calls ops instead, or torch.compile with mq.compile_backend()"
    return _by_rule(reason)


def _utility(reason: str, weight: str, names: Container[str]) -> str:
    """The function of torch.nn.utils that turns a computed weight into a stored one; "" for a stored one."""
    module, _, leaf = weight.rpartition(".")
    owner, computed, rest = f".{weight}".partition(".parametrizations.")
    if computed or PARAMETRIZED.search(reason):
        tensor = rest.partition(".")[0] or "weight"
        return f"parametrize.remove_parametrizations(model.get_submodule({owner[1:]!r}), {tensor!r})"
    place = f"model.get_submodule({module!r})"
    if leaf in ("weight_g", "weight_v"):
        return f"remove_weight_norm({place})"
    if leaf == "weight_orig":
        is_pruned = f"{weight.removesuffix('orig')}mask" in names
        return f"prune.remove({place}, 'weight')" if is_pruned else f"remove_spectral_norm({place})"
    return ""


def _by_rule(reason: str) -> str:
    if reason.startswith(SETTINGS):
        return "as the settings ask"
    found = DEFAULT.search(reason)
    if found:
        is_norm = found[1].endswith(("Norm", "Norm1d", "Norm2d", "Norm3d"))
        return (
            "" if is_norm else "skipped_precision='int8' stores it as INT8, default_skips=False or an override as INT4"
        )
    if "skip_param_threshold" in reason:
        return "lower skip_param_threshold"
    found = POLICY.search(reason)
    if found:
        return f"{found[1]}='int8' or 'shrink'"
    if "normalization" in reason or "vectors only" in reason:
        return ""
    if "no rows to group" in reason or "is no op that takes a quantized weight" in reason:
        return "hold it in nn.Linear, nn.Conv or nn.Embedding modules (one for each expert, say) that forward calls"
    return ""
