"""g2p-en's GRU: spelling to phonemes. Each of its weights serves every step of an unrolled loop.

The package is read for its .npz alone, so its dependencies are not needed: pip install --no-deps g2p-en==2.1.0
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tests.real_models import package_folder

INSTALL = "pip install --no-deps g2p-en==2.1.0"
LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW"
CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH"
SOUNDS = [vowel + stress for vowel in VOWELS.split() for stress in "012"] + CONSONANTS.split()
PHONEMES = ["<pad>", "<unk>", "<s>", "</s>", *sorted([*SOUNDS, "UW"])]
START, END = 2, 3
#: Letters of a word with its end sign, and phonemes said: the encoder runs 13 steps, the decoder 12.
LETTER_STEPS, PHONEME_STEPS = 13, 12


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


def pronounce(model: nn.Module, words: Sequence[str]) -> list[str]:
    """The likeliest phonemes, one after the other, each word's up to its end sign."""
    letters, mask = letters_of(words)
    before = torch.full((len(words), PHONEME_STEPS), START)
    with torch.no_grad():
        for t in range(PHONEME_STEPS):
            best = model(letters, mask, before).argmax(-1)
            before[:, t + 1 :] = best[:, t : t + 1]
    spoken = []
    for row in best.tolist():
        until = row.index(END) if END in row else len(row)
        spoken.append(" ".join(PHONEMES[i] for i in row[:until]))
    return spoken
