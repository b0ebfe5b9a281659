"""The one table: which call consumes a weight, at which argument, and what its rows are multiplied with.

A weight is a constant of the graph. Where it stands decides how it is viewed as a matrix [N, K]:

    rows             [out, in, ...]          linear, conv, embedding, w @ x  -> flatten(1)
    columns          [in, out]               addmm, x @ w                    -> t()
    transposed_conv  [in, out/groups, ...]   conv_transpose                  -> channel axis to the front, flatten

and how the op's input is viewed as the matrix X [samples, K] of y = X @ weight.T:

    last             [..., K]                linear, addmm, x @ w
    second_last      [..., K, samples]       w @ x
    patches          [batch, in, ...]        convolutions: what lies under the kernel, one row a position
    none                                     embedding (no activations), bilinear (a product of two inputs)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from mono_quant_fx.graph.arguments import Arg, argument
from mono_quant_fx.graph.permutations import is_permutation, permuted

aten = torch.ops.aten


@dataclass(frozen=True)
class WeightOp:
    """One way of consuming a weight; layout None means that the op is known and left alone."""

    layer_type: str
    weight: Arg = (1, "weight")
    bias: Arg | None = (2, "bias")
    input: Arg = (0, "input", "self")
    layout: str | None = "rows"
    groups: Arg = (6, "groups")
    inputs: str = "last"

    def contracts(self, dims: int) -> int | None:
        """The axis of the input that a weight of `dims` axes sums over, counted from the end; None for "none"."""
        return {"last": -1, "second_last": -2, "patches": 1 - dims}.get(self.inputs)


def _linears() -> dict[Any, tuple[WeightOp, ...]]:
    linear = WeightOp("Linear")
    addmm = WeightOp("Linear", (2, "mat2"), (0, "input", "self"), (1, "mat1"), "columns")
    right = WeightOp("Linear", (1, "other", "mat2", "tensor2"), None, layout="columns")
    left = WeightOp("Linear", right.input, None, right.weight, inputs="second_last")
    bilinear = WeightOp("Bilinear", (2, "weight"), (3, "bias"), (0, "input1"), inputs="none")
    return {
        **dict.fromkeys((F.linear, aten.linear.default), (linear,)),
        **dict.fromkeys((torch.addmm, "addmm", aten.addmm.default), (addmm,)),
        **dict.fromkeys(MATMULS, (right, left)),
        **dict.fromkeys((F.bilinear, torch.bilinear, aten.bilinear.default), (bilinear,)),
    }


#: Every spelling of a product whose weight may stand on either side.
MATMULS = (
    torch.matmul, torch.linalg.matmul, torch.mm, operator.matmul, "matmul", "mm", "__matmul__",
    aten.matmul.default, aten.mm.default, aten.linalg_matmul.default,
)  # fmt: skip


def _embeddings() -> dict[Any, tuple[WeightOp, ...]]:
    lookup = partial(WeightOp, bias=None, inputs="none")
    reverse = partial(lookup, weight=(0, "weight"), input=(1, "indices", "input"))
    bags = (torch.embedding_bag, aten.embedding_bag.default, aten.embedding_bag.padding_idx)
    return {
        F.embedding: (lookup("Embedding"),),
        F.embedding_bag: (lookup("EmbeddingBag"),),
        **dict.fromkeys((torch.embedding, aten.embedding.default), (reverse("Embedding"),)),
        **dict.fromkeys(bags, (reverse("EmbeddingBag"),)),
    }


def _convolutions() -> dict[Any, tuple[WeightOp, ...]]:
    table: dict[Any, tuple[WeightOp, ...]] = {}
    for n in (1, 2, 3):
        plain, packet = WeightOp(f"Conv{n}d", inputs="patches"), getattr(aten, f"conv{n}d")
        table |= dict.fromkeys((getattr(F, f"conv{n}d"), packet.default, packet.padding), (plain,))
        transposed = replace(plain, layer_type=f"ConvTranspose{n}d", layout="transposed_conv")
        packet = getattr(aten, f"conv_transpose{n}d")
        overload = packet.default if n == 1 else packet.input
        table |= dict.fromkeys((getattr(F, f"conv_transpose{n}d"), overload), (transposed,))
    general = WeightOp("Conv", groups=(8, "groups"), inputs="patches")
    return table | dict.fromkeys(GENERAL_CONVS, (general,))


#: Convolutions of any kind: an argument says whether they are transposed.
GENERAL_CONVS = (torch.convolution, aten.convolution.default)
TRANSPOSED: Arg = (6, "transposed")


def _norms() -> dict[Any, tuple[WeightOp, ...]]:
    listed: list[tuple[str, int, tuple[Any, ...]]] = [
        ("LayerNorm", 2, (F.layer_norm, torch.layer_norm, aten.layer_norm.default)),
        ("RMSNorm", 2, (F.rms_norm, torch.rms_norm, aten.rms_norm.default)),
        ("GroupNorm", 2, (F.group_norm, torch.group_norm, aten.group_norm.default)),
        ("BatchNorm2d", 3, (F.batch_norm,)),
        ("BatchNorm2d", 1, (torch.batch_norm, aten.batch_norm.default)),
        ("InstanceNorm2d", 3, (F.instance_norm,)),
        ("InstanceNorm2d", 1, (torch.instance_norm, aten.instance_norm.default)),
    ]
    return {
        target: (WeightOp(name, (at, "weight"), (at + 1, "bias"), layout=None, inputs="none"),)
        for name, at, targets in listed
        for target in targets
    }


WEIGHT_OPS = {**_linears(), **_embeddings(), **_convolutions(), **_norms()}

#: Ops that do nothing but compute: without a reader, they can go.
PURE = frozenset((*_linears(), *_convolutions())) - {"addmm", "matmul", "mm", "__matmul__"}

#: Module classes whose forward is one call of the table; symbolic capture looks inside them.
WEIGHT_MODULES = (
    nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag,
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def rows_for(call: fx.Node) -> tuple[WeightOp, ...]:
    """The rows of the table for a call; none for an op that it does not know, or in a spelling that it does not."""
    if call.op not in ("call_function", "call_method"):
        return ()
    rows = WEIGHT_OPS.get(call.target, ())
    if any(isinstance(argument(call, row.bias), int | float) for row in rows if row.bias):
        return ()  # addmm(beta, input, alpha, mat1, mat2), as torch once spelled it
    if call.target in GENERAL_CONVS and argument(call, TRANSPOSED):
        return tuple(replace(row, layout="transposed_conv") for row in rows)
    return rows


def consumption(call: fx.Node, weight: fx.Node) -> WeightOp | None:
    """The row by which a call consumes a constant, as it is or with its axes permuted; None where it does not."""
    rows = rows_for(call)
    return next((row for row in rows if unpermuted(argument(call, row.weight)) is weight), None)


def unpermuted(value: Any) -> Any:
    """What a value is without the permutations of its axes."""
    while isinstance(value, fx.Node) and is_permutation(value):
        value = permuted(value)
    return value
