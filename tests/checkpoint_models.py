"""A small model for checkpoints, with all that they may hold, and the same model without values."""

from __future__ import annotations

import torch
from torch import nn


class Model(nn.Module):
    """An embedding, tied to the head,, two linears on one input, and a norm."""

    def __init__(self, dtype=torch.float32, tied=True):
        super().__init__()
        self.embed = nn.Embedding(24, 64)
        self.norm = nn.LayerNorm(64)
        self.up, self.gate = nn.Linear(64, 128), nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)
        self.head = nn.Linear(64, 24, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.linspace(0, 1, 64), persistent=False)
        self.to(dtype).eval()

    def forward(self, ids):
        x = self.norm(self.embed(ids)) + self.shift
        return self.head(self.down(self.up(x) * torch.sigmoid(self.gate(x))))


IDS = torch.arange(12).view(2, 6)


def skeleton(dtype=torch.float32):
    """Parameters without values."""
    model = Model(dtype)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
    model.head.weight = model.embed.weight
    return model
