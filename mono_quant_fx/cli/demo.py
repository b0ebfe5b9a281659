"""The demo: a real sentence encoder to INT4, and what that did to its sizes, its accuracy and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import torch
from tabulate import tabulate
from torch import Tensor, nn

from mono_quant_fx.cli.demo_model import Encode, embed, load_minilm
from mono_quant_fx.compiler import quantize
from mono_quant_fx.errors import ConfigError
from mono_quant_fx.storage.result import QuantizationResult

BATCH = 25
#: Sentences that the accuracy is measured on; calibration sees none of them.
JUDGED = 100
SHOWN_QUERIES, SHOWN_ANSWERS = 6, 3


@dataclass(frozen=True)
class Sense:
    """A word and one of its definitions."""

    word: str
    definition: str


def run(samples: int = 150) -> None:
    """Quantizes all-MiniLM-L6-v2, calibrated on `samples` sentences, and prints the report a section at a time.

    Raises:
        MissingExtraError: the packages of the extra [demo] are missing.
        ConfigError: there are not as many calibration sentences.
    """
    texts = [sense.definition for sense in read_senses("calibration")]
    if not 1 <= samples <= len(texts):
        raise ConfigError(f"--samples {samples}: 1 to {len(texts)} sentences come with the demo")
    model, encode = load_minilm()
    print(
        f"Quantizing all-MiniLM-L6-v2 (it turns sentences into vectors) to INT4, calibrated on {samples} definitions "
        f"of WordNet and judged on {JUDGED} others ...\n",
        flush=True,
    )
    others = [sense.definition for sense in read_senses("evaluation")][:JUDGED]
    result = quantize(
        model,
        calibration_data=_batches(encode, texts[:samples]),
        evaluation_data=_batches(encode, others),
        num_calibration_samples=samples,
        accuracy_warning="ignore",
    )
    print(result.accuracy)
    for warning in result.warnings:
        print(f"warning: {warning}")
    print(f"\n{describe_sizes(result)}\n")
    print(f"{describe_answers(model, result.graph_module, encode, read_senses('evaluation'))}\n")
    print(describe_time(result.info.seconds))


def _batches(encode: Encode, texts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    return [encode(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]


def read_senses(use: str) -> list[Sense]:
    """The sentences that come with the package: those of use "calibration" or of use "evaluation", never both."""
    text = (files("mono_quant_fx.cli") / "demo_sentences.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines() if not line.startswith("#"))
    return [Sense(word, definition) for kind, word, definition in rows if kind == use]


def describe_sizes(result: QuantizationResult) -> str:
    """Bytes of the linear weights alone, scales included, and of everything that the model stores."""
    linears = [row for row in result.accuracy.rows if row.op == "linear"]
    before, after = sum(row.bytes_before for row in linears), sum(row.bytes_after for row in linears)
    rows = [
        _size(f"weights of {len(linears)} linear layers", before, after),
        _size("whole model", result.info.original_bytes, result.info.quantized_bytes),
    ]
    return tabulate(rows, ("size", "float", "INT4", "ratio"), colalign=("left", "right", "right", "right"))


def _size(what: str, before: int, after: int) -> list[str]:
    return [what, f"{before / 1e6:.1f} MB", f"{after / 1e6:.1f} MB", f"{before / after:.2f}x"]


def describe_answers(model: nn.Module, quantized: nn.Module, encode: Encode, senses: Sequence[Sense]) -> str:
    """The reverse dictionary: definition -> nearest words, by both models; the first few queries, and acc@1 of all."""
    answers = {"float": nearest(model, encode, senses), "INT4": nearest(quantized, encode, senses)}
    rows = [
        [sense.definition, *(_answer(senses, found[i], i) for found in answers.values())]
        for i, sense in enumerate(senses[:SHOWN_QUERIES])
    ]
    right = torch.arange(len(senses))
    accuracy = ", ".join(f"{name} {(found[:, 0] == right).float().mean():.3f}" for name, found in answers.items())
    return (
        f"{tabulate(rows, ('definition', *(f'nearest words, {name}' for name in answers)))}\n"
        f"reverse dictionary, {len(senses)} definitions and as many words, * marks the right one: acc@1 {accuracy}"
    )


def nearest(model: nn.Module, encode: Encode, senses: Sequence[Sense]) -> Tensor:
    """For each definition the indices [len(senses), SHOWN_ANSWERS] of the nearest words, best first."""
    words = embed(model, encode, [sense.word for sense in senses])
    definitions = embed(model, encode, [sense.definition for sense in senses])
    return (definitions @ words.T).topk(SHOWN_ANSWERS).indices


def _answer(senses: Sequence[Sense], found: Tensor, right: int) -> str:
    return ", ".join(f"{'*' if i == right else ''}{senses[i].word}" for i in found.tolist())


def describe_time(seconds: dict[str, float]) -> str:
    """The stages of quantize with their wall time."""
    rows = [[stage, f"{taken:.2f}"] for stage, taken in [*seconds.items(), ("total", sum(seconds.values()))]]
    return tabulate(rows, ("time", "seconds"), colalign=("left", "right"), disable_numparse=True)
