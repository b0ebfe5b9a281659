"""Calls whose kernels trust what they are given, with a look at it first; a graph read from data calls these instead.

graph_ops gives such a call and torch's own one name, so that a graph is stored again under that of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from mono_quant_fx.errors import GraphFormatError

#: Sizes of windows beyond it overflow where kernels reckon with them.
LARGEST = 2**31 - 1


def bounded(values: Any) -> bool:
    """Whether every integer in nested containers is one that a window can have."""
    return all(abs(v) <= LARGEST for v in pytree.tree_leaves(values) if isinstance(v, int))


def _looked_at(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not bounded((args, kwargs)):
            raise GraphFormatError(f"{function}: sizes of windows are at most {LARGEST}")
        return function(*args, **kwargs)

    call.__name__ = call.__qualname__ = name  # torch.fx writes it down as a member of this module
    return call


aten_max_pool1d = _looked_at("aten_max_pool1d", torch.ops.aten.max_pool1d.default)
torch_max_pool1d = _looked_at("torch_max_pool1d", torch.max_pool1d)
functional_max_pool1d = _looked_at("functional_max_pool1d", F.max_pool1d)
functional_lp_pool1d = _looked_at("functional_lp_pool1d", F.lp_pool1d)
functional_fold = _looked_at("functional_fold", F.fold)
aten_col2im = _looked_at("aten_col2im", torch.ops.aten.col2im.default)


def aten_lstm(
    x: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """aten.lstm.input; its kernel compares neither the states nor the weights with the input.

    Raises:
        GraphFormatError: their number, shapes, types or devices do not fit.
    """
    if len(hx) != 2 or x.dim() != 3 or hx[0].dim() != 3 or hx[1].dim() != 3:
        raise GraphFormatError("aten.lstm: x and two states are needed, each of three dimensions")
    sides, projected, hidden = 1 + bool(bidirectional), hx[0].shape[2], hx[1].shape[2]
    states = (num_layers * sides, x.shape[0 if batch_first else 1])
    wanted: list[tuple[int, ...]] = [(*states, projected), (*states, hidden)]
    for layer in range(min(num_layers, len(params))):
        columns = projected * sides if layer else x.shape[2]
        one: list[tuple[int, ...]] = [(4 * hidden, columns), (4 * hidden, projected)]
        one += [(4 * hidden,)] * 2 * bool(has_biases) + [(projected, hidden)] * (projected != hidden)
        wanted += one * sides
    given = [*hx, *params]
    if num_layers < 1 or [tuple(t.shape) for t in given] != wanted:
        raise GraphFormatError(f"aten.lstm: its states and weights are {[tuple(t.shape) for t in given]}, not {wanted}")
    if any(t.dtype != x.dtype or t.device != x.device for t in given):
        raise GraphFormatError(f"aten.lstm: its states and weights have another dtype or device than x ({x.dtype})")
    return torch.ops.aten.lstm.input(x, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)


#: Under the names of the calls in whose place they stand.
CHECKED: dict[str, Callable[..., Any]] = {
    "aten.max_pool1d.default": aten_max_pool1d,
    "torch.max_pool1d": torch_max_pool1d,
    "torch.nn.functional.max_pool1d": functional_max_pool1d,
    "torch.nn.functional.lp_pool1d": functional_lp_pool1d,
    "torch.nn.functional.fold": functional_fold,
    "aten.col2im.default": aten_col2im,
    "aten.lstm.input": aten_lstm,
}
