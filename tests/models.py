"""Small models that several tests share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Two linears around a relu, wide enough for INT4: 64 -> 128 -> 16."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.fc1 = nn.Linear(64, 128, bias)
        self.fc2 = nn.Linear(128, 16, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


class TiedLM(nn.Module):
    """Embedding, a linear, and a head that shares the embedding's weight."""

    def __init__(self, vocab: int = 40, width: int = 32):
        super().__init__()
        self.emb = nn.Embedding(vocab, width)
        self.fc = nn.Linear(width, width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fc(self.emb(ids))))


class ConvNet(nn.Module):
    """Conv, batch norm, depthwise conv, transposed conv, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.bn = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return self.fc(self.up(self.depthwise(x)).mean((2, 3)))


class Reused(nn.Module):
    """One linear applied three times, with a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.fc(x))
        return self.fc(torch.tanh(self.fc(y))) + y


@torch.no_grad()
def hopeless_(model: nn.Module) -> None:
    """Weights that no group-wise INT4 can hold: one outlier in 32, and all else just too small for a code."""
    for weight in (p for p in model.parameters() if p.dim() > 1):
        weight.fill_(0.065)
        weight.flatten(1)[:, ::32] = 1.0
