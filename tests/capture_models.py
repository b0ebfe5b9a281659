"""Models whose arguments, outputs or weights are unusual, with inputs for them and the ways that lead to a graph."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass
class Out:
    """A plain output class that torch's pytrees do not know."""

    value: torch.Tensor
    extra: torch.Tensor


class OneLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(32, 32)


class Args(OneLinear):
    def forward(self, *xs):
        return self.fc(xs[0]) + xs[1]


class Keywords(OneLinear):
    def forward(self, **kw):
        return self.fc(kw["a"]) - kw["b"]


class KeywordOnly(OneLinear):
    def forward(self, x, *, scale, shift=None):
        y = self.fc(x) * scale
        return y if shift is None else y + shift


class Nested(OneLinear):
    def forward(self, pair, extra):
        a, b = pair
        return {"y": self.fc(a) + b * extra["k"], "rest": (a, [extra["j"]])}


class Dataclass(OneLinear):
    def forward(self, x):
        return Out(self.fc(x), x * 2)


class Prints(OneLinear):
    def forward(self, x):
        print("forward runs")
        return self.fc(x)


class Random(OneLinear):
    def forward(self, x):
        return self.fc(x) + 0 * torch.randn_like(x)


class Branches(OneLinear):
    """Takes another branch on a Proxy than on a tensor."""

    def forward(self, x):
        y = self.fc(x)
        return y * 2 if isinstance(x, torch.Tensor) else y


class Parameters(nn.Module):
    """Weights in containers, as buffers, as plain tensors, one of them used at many steps."""

    def __init__(self):
        super().__init__()
        self.steps = nn.ParameterList([nn.Parameter(torch.randn(32, 32) / 6) for _ in range(2)])
        self.named = nn.ParameterDict({"k": nn.Parameter(torch.randn(32, 32) / 6)})
        self.register_buffer("kept", torch.randn(32, 32) / 6)
        self.register_buffer("lost", torch.randn(32, 32) / 6, persistent=False)
        self.plain = torch.randn(32, 32) / 6

    def forward(self, x):
        for w in self.steps:
            for _ in range(3):
                x = torch.tanh(x @ w)
        return F.linear(x, self.named["k"]) + F.linear(x, self.kept) + x @ self.lost.t() + x @ self.plain


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.fc = nn.Linear(32, 32)

    def forward(self, x):
        return self.fc(self.attention(x, x, x)[0])


class Masked(OneLinear):
    """One sample of x beside a mask without a batch, and Python control flow, so that export has to do it."""

    def forward(self, x, mask):
        scores = self.fc(x) @ x.transpose(1, 2) + mask
        return scores.softmax(-1) if isinstance(x, torch.Tensor) else scores


def r(*size):
    return torch.randn(*size, 32)


def pair(batch, length):
    return r(batch, length), r(batch, length)


def extra(batch, length):
    return {"k": r(batch, length), "j": r(batch, length)}


#: model, inputs for (batch, length), the ways that lead to a graph
CASES: dict[str, tuple[type[nn.Module], Any, str]] = {
    "args": (Args, lambda b, t: (r(b, t), r(b, t)), "export auto"),
    "kwargs": (Keywords, lambda b, t: {"b": r(b, t), "a": r(b, t)}, "symbolic export auto"),
    "keyword-only": (KeywordOnly, lambda b, t: {"scale": r(b, t), "x": r(b, t)}, "symbolic export auto"),
    "optional": (KeywordOnly, lambda b, t: {"shift": r(b, t), "x": r(b, t), "scale": r(b, t)}, "symbolic export auto"),
    "nested": (Nested, lambda b, t: (pair(b, t), extra(b, t)), "symbolic export auto"),
    "nested keywords": (Nested, lambda b, t: {"extra": extra(b, t), "pair": pair(b, t)}, "symbolic export auto"),
    "dataclass": (Dataclass, r, "symbolic auto"),
    "prints": (Prints, r, "symbolic export auto"),
    "branches": (Branches, r, "export auto"),
    "parameters": (Parameters, r, "symbolic export auto"),
    "attention": (Attention, r, "symbolic export auto"),
    "masked": (Masked, lambda b, t: (r(b, t), torch.zeros(t, t)), "export auto"),
}  # fmt: skip


class TwoLayers(nn.Module):
    """Two linears of 64 with a ReLU between, and a number as second argument."""

    def __init__(self):
        super().__init__()
        self.a, self.act, self.b = nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)

    def forward(self, x, scale: float = 1.0):
        return self.b(self.act(self.a(x))) * scale


def two_layers(kind: type[nn.Module] = TwoLayers) -> tuple[nn.Module, torch.Tensor]:
    """The model in eval mode, and an input for it."""
    torch.manual_seed(0)
    return kind().eval(), torch.randn(8, 64)


def assert_same(gm: nn.Module, model: nn.Module, *args: torch.Tensor) -> None:
    """The graph computes what the model does."""
    with torch.no_grad():
        torch.testing.assert_close(gm(*args), model(*args), rtol=1e-5, atol=1e-5)
