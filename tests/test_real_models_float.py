"""The real models before anything is done to them: one protocol, the figures they are known for, data kept apart."""

from __future__ import annotations

import pytest
import torch

from tests.real_models import effnet_lite0, g2p_gru, minilm, package_folder, smollm2, stamps

MODELS = [minilm, smollm2, effnet_lite0, g2p_gru]
#: Module -> (the metric, what another machine's rounding may move it by, its standard error).
FLOAT = {
    "minilm": (0.463, 0.01, 0.0158),
    "smollm2": (60.76, 0.05, 4.25),
    "effnet_lite0": (0.820, 0.01, 0.0293),
    "g2p_gru": (0.662, 0.01, 0.0212),
}
ERROR_DRIFT = 0.05  # of the standard error

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=MODELS, ids=lambda module: module.__name__.rpartition(".")[2])
def real(request):
    return request.param


def test_the_float_model_is_as_good_as_it_is_known_to_be(real):
    expected, drift, error = FLOAT[real.__name__.rpartition(".")[2]]
    model = real.load()
    assert not any(module.training for module in model.modules())
    found = real.evaluate(model)
    assert found == (pytest.approx(expected, abs=drift), pytest.approx(error, rel=ERROR_DRIFT))
    assert (real.METRIC != "perplexity") == real.HIGHER_IS_BETTER


def test_calibration_is_the_same_each_time_and_fits_the_model(real):
    first, second = real.calibration(), real.calibration()
    assert sum(batch[0].shape[0] for batch in first) == real.NUM_SAMPLES >= 32
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with torch.no_grad():
        assert len(real.load()(*[t[:1] for t in first[0]])) == 1


def test_words_are_calibrated_or_evaluated():
    for module, rows in ((minilm, minilm.rows()), (g2p_gru, g2p_gru.dictionary())):
        asked, shown = rows[module.EVALUATED], rows[module.CALIBRATED]
        assert (len(asked), len(shown)) == ({minilm: 1000, g2p_gru: 500}[module], module.NUM_SAMPLES)
        assert not {word for word, _ in asked} & {word for word, _ in shown}


def test_texts_are_calibrated_or_evaluated():
    asked, shown = (smollm2.windows(*which) for which in (
        ("nyt_snippets.txt", smollm2.EVALUATED), ("movie_snippets.txt", smollm2.CALIBRATED)))  # fmt: skip
    assert (asked.shape, shown.shape) == ((6, 384), (32, 512))
    assert torch.equal(torch.cat([ids for (ids,) in smollm2.calibration()]), shown)
    assert not {tuple(w.tolist()) for w in asked.unfold(1, 16, 1).flatten(0, 1)} & {
        tuple(w.tolist()) for w in shown.unfold(1, 16, 1).flatten(0, 1)
    }


def test_the_tokenizer_is_the_one_the_prompt_was_spelled_with():
    assert smollm2.tokenizer().encode("The capital of France is").ids == list(smollm2.PROMPT)
    package_folder("tokenizers", smollm2.INSTALL)
    assert smollm2.tokenizer().decode([smollm2.PARIS]).replace("Ġ", " ") == " Paris"


def test_photographs_are_calibrated_or_evaluated():
    shown = stamps.unlabelled()
    assert len(set(shown)) == len(shown) == 150
    assert len(stamps.labels()) == 147
    assert not {name.removesuffix("_mirror") for name in shown} & set(stamps.labels())
    files = {photo: (stamps.folder() / f"{photo}.png").read_bytes() for photo in [*shown, *stamps.labels()]}
    assert len(set(files.values())) == 150 + 147


def test_the_two_backgrounds_differ_around_the_thing_alone():
    white, green = (stamps.picture("food/fruit/orange", colour, 64) for colour in stamps.BACKGROUNDS)
    assert white[:, 0, 0].tolist() == [255] * 3 and green[:, 0, 0].tolist() == [110, 130, 100]
    assert torch.equal(white[:, 32, 32], green[:, 32, 32])
