"""A llama with a static key-value cache, as one writes it for speed: the model of the benchmark `decode`.

One forward serves the prompt and each token after it. The cache is buffers that forward writes in place, and where it
writes is a tensor, so that neither capture nor torch.compile sees a number that changes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.real_models.smollm2 import SmolLM2


def halves(rows: Tensor, heads: int) -> Tensor:
    """A projection's rows [heads * width, K] from GGUF's order (neighbours are one plane) to that of `rotate`."""
    width = rows.shape[0] // heads
    return rows.unflatten(0, (heads, width // 2, 2)).transpose(1, 2).reshape(rows.shape)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of x [1, heads, T, width]: columns i and i + width / 2 are one plane; sin carries the sign."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Block(nn.Module):
    """Attention over the cache, then the gated MLP; x is [1, T, width]."""

    def __init__(self, width: int, heads: int, kv_heads: int, inner: int, eps: float, length: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, width // heads
        self.attn_norm = nn.RMSNorm(width, eps)
        self.attn_q = nn.Linear(width, width, bias=False)
        self.attn_k = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.attn_v = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.attn_output = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, eps)
        self.ffn_gate = nn.Linear(width, inner, bias=False)
        self.ffn_up = nn.Linear(width, inner, bias=False)
        self.ffn_down = nn.Linear(inner, width, bias=False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, kv_heads, length, self.head_width), persistent=False)

    def forward(self, x: Tensor, position: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        y = self.attn_norm(x)
        q = rotate(self.split(self.attn_q(y), self.heads), cos, sin)
        self.keys.index_copy_(2, position, rotate(self.split(self.attn_k(y), self.kv_heads), cos, sin))
        self.values.index_copy_(2, position, self.split(self.attn_v(y), self.kv_heads))
        grouped = q.reshape(1, self.kv_heads, -1, self.head_width)  # heads of one key are its rows: T, then T, ...
        attended = F.scaled_dot_product_attention(grouped, self.keys, self.values, mask).view(q.shape)
        x = x + self.attn_output(attended.transpose(1, 2).flatten(2))
        y = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(y)) * self.ffn_up(y))

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.head_width)).transpose(1, 2)


class CachedLlama(nn.Module):
    """Token ids [1, T] and their positions [T] -> logits [1, 1, vocabulary] after the last of them.

    Args:
        frequency: radians a position, of each plane that is rotated, [width / heads / 2].
        length: positions that the cache holds.
    """

    def __init__(self, vocabulary: int, width: int, blocks: int, heads: int, kv_heads: int, inner: int, eps: float,
                 frequency: Tensor, length: int):  # fmt: skip
        super().__init__()
        self.token_embd = nn.Embedding(vocabulary, width)
        self.blk = nn.ModuleList(Block(width, heads, kv_heads, inner, eps, length) for _ in range(blocks))
        self.queries = heads // kv_heads
        self.output_norm = nn.RMSNorm(width, eps)
        self.output = nn.Linear(width, vocabulary, bias=False)
        angle = torch.arange(length).unsqueeze(1) * frequency
        future = torch.ones(length, length).triu(1) * -1e9
        tables = {"cos": torch.cat((angle.cos(), angle.cos()), 1), "sin": torch.cat((-angle.sin(), angle.sin()), 1),
                  "masks": future}  # fmt: skip
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        cos, sin, mask = self.cos[position], self.sin[position], self.masks[position].repeat(self.queries, 1)
        x = self.token_embd(ids)
        for block in self.blk:
            x = block(x, position, cos, sin, mask)
        return self.output(self.output_norm(x[:, -1:]))


def with_cache(model: SmolLM2, length: int, tied: bool = False) -> CachedLlama:
    """The loader's model with a cache; untied, the head has a copy of the embedding's weight to itself."""
    block = model.blk[0]
    cached = CachedLlama(
        *model.token_embd.weight.shape, len(model.blk), block.heads, block.kv_heads, block.ffn_up.out_features,
        block.attn_norm.eps, model.frequency, length,
    )  # fmt: skip
    state = model.state_dict()
    for i in range(len(model.blk)):
        for name, heads in ((f"blk.{i}.attn_q.weight", block.heads), (f"blk.{i}.attn_k.weight", block.kv_heads)):
            state[name] = halves(state[name], heads)
    cached.load_state_dict(state)
    if tied:
        cached.output.weight = cached.token_embd.weight
    return cached.eval()
