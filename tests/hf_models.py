"""Hugging Face architectures from tiny configs with random weights, and inputs for them of any batch and length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCAB = 64
#: The only models whose length is not free, because their forward loops over it.
FIXED_LENGTH = ("mamba",)

Inputs = dict[str, Tensor]
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64, **_TOKENS,
}  # fmt: skip
_GROUPED = {**_TEXT, "num_key_value_heads": 1}
_VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_DISTILBERT = {
    "vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64,
}  # fmt: skip
_WAV2VEC2 = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
_WHISPER = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_source_positions": 20,
    "max_target_positions": 32, "num_mel_bins": 8, "decoder_start_token_id": 1, **_TOKENS,
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": VOCAB, **_TOKENS}
_RESNET = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
_CONVNEXT = {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}
_MAMBA = {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
_OPT = {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32}
_T5 = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length))


def _text(batch: int, length: int) -> Inputs:
    return {"input_ids": _ids(batch, length), "attention_mask": torch.ones(batch, length, dtype=torch.long)}


def _pixels(batch: int, length: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


def _wave(batch: int, length: int) -> Inputs:
    return {"input_values": torch.randn(batch, 400 + 10 * length)}


def _speech(batch: int, length: int) -> Inputs:
    return {"input_features": torch.randn(batch, 8, 40), "decoder_input_ids": _ids(batch, length)}


def _pair(batch: int, length: int) -> Inputs:
    return {"input_ids": _ids(batch, length + 2), "decoder_input_ids": _ids(batch, length)}


_MODELS: dict[str, tuple[Any, Any, dict[str, Any], Callable[[int, int], Inputs]]] = {
    "bert": (hf.BertModel, hf.BertConfig, _TEXT, _text),
    "roberta": (hf.RobertaModel, hf.RobertaConfig, _TEXT, _text),
    "distilbert": (hf.DistilBertModel, hf.DistilBertConfig, _DISTILBERT, _text),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, _GPT2, _text),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, _GROUPED, _text),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, _GROUPED, _text),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {**_GROUPED, "head_dim": 16}, _text),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, {**_GROUPED, "head_dim": 16}, _text),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, _GROUPED, _text),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config, _GROUPED, _text),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, {**_GROUPED, "num_local_experts": 4}, _text),
    "gpt_neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, _TEXT, _text),
    "opt": (hf.OPTForCausalLM, hf.OPTConfig, _OPT, _text),
    "vit": (hf.ViTModel, hf.ViTConfig, _VISION, _pixels),
    "clip_vision": (hf.CLIPVisionModel, hf.CLIPVisionConfig, _VISION, _pixels),
    "resnet": (hf.ResNetModel, hf.ResNetConfig, _RESNET, _pixels),
    "convnext": (hf.ConvNextModel, hf.ConvNextConfig, _CONVNEXT, _pixels),
    "mamba": (hf.MambaForCausalLM, hf.MambaConfig, _MAMBA, _text),
    "wav2vec2": (hf.Wav2Vec2Model, hf.Wav2Vec2Config, _WAV2VEC2, _wave),
    "whisper": (hf.WhisperForConditionalGeneration, hf.WhisperConfig, _WHISPER, _speech),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, _T5, _pair),
}  # fmt: skip

NAMES = tuple(_MODELS)


def build(name: str, *, use_cache: bool = False) -> nn.Module:
    """The architecture `name` in eval mode."""
    model, config, fields, _ = _MODELS[name]
    torch.manual_seed(0)
    made = config(**fields)
    made.use_cache = use_cache
    return model(made).eval()


def inputs(name: str, batch: int, length: int) -> Inputs:
    """Random inputs of `name`; vision models have no length, and the others' inputs grow with it."""
    values = _MODELS[name][3](batch, length)
    return {"input_ids": values["input_ids"]} if name in FIXED_LENGTH else values


def output(value: Any) -> Tensor:
    """The tensor that matters of a Hugging Face output."""
    return value["last_hidden_state"] if "last_hidden_state" in value else value["logits"]
