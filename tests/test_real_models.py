"""Weights that people use, through mq.quantize: what was done to them, and whether the model still does its job."""

from __future__ import annotations

import copy

import pytest
import torch

import mono_quant_fx as mq
from tests.real_models import g2p_gru, minilm, smollm2

pytestmark = pytest.mark.slow

LEAST_INT4_ACCURACY = 0.43  # rounded to nearest; float .463
MOST_STORAGE = 0.15  # of the float32 linear weights: 4 bits and a 32-bit scale every 128
LEAST_HALF_SQNR_DB = 8.0  # the model output in bfloat16 or float16 against the float model of that dtype
TILE_TOLERANCE = 1e-4  # logits near 10; tiles and whole matrices sum in another order


@pytest.fixture(scope="module")
def sentence_model():
    return minilm.load()


@pytest.fixture(scope="module")
def quantized(sentence_model):
    return mq.quantize(sentence_model, calibration_data=minilm.calibration(), accuracy_warning="ignore")


def linear_rows(result):
    return [row for row in result.accuracy.rows if row.op == "linear"]


def test_minilm_gets_int4_in_every_linear_and_a_reason_everywhere_else(quantized):
    rows = quantized.accuracy.rows
    linears = linear_rows(quantized)
    assert [row.scheme for row in linears] == ["int4 g128 sym"] * 36
    assert {row.reason for row in linears} == {""}
    others = [(row.op, row.scheme, row.reason) for row in rows if row.op != "linear"]
    assert others.count(("embedding", "float32", "default skip: Embedding")) == 3
    assert others.count(("LayerNorm", "float32", "default skip: LayerNorm")) == 13
    assert len(rows) == 36 + 3 + 13
    assert len(quantized.info.quantized_layers) == 36 and len(quantized.info.skipped_layers) == 16
    assert (quantized.info.calibration_samples_used, quantized.accuracy.samples) == (125, 25)  # a fifth is held out


def test_minilm_stores_its_linear_weights_in_15_percent(quantized):
    linears = linear_rows(quantized)
    before, after = sum(row.bytes_before for row in linears), sum(row.bytes_after for row in linears)
    state = quantized.graph_module.state_dict()
    stored = sum(t.nbytes for name, t in state.items() if name.endswith(("weight_packed", "weight_scale")))
    assert after == stored
    assert after <= MOST_STORAGE * before
    assert not [name for name in state if name.endswith("weight") and name.split(".")[0] == "layers"
                and "norm" not in name]  # fmt: skip


def test_minilm_is_the_same_to_the_bit_in_a_second_run(sentence_model, quantized):
    again = mq.quantize(sentence_model, calibration_data=minilm.calibration(), accuracy_warning="ignore")
    first, second = quantized.graph_module.state_dict(), again.graph_module.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.accuracy.to_json() == quantized.accuracy.to_json()
    assert again.warnings == quantized.warnings


def test_minilm_still_finds_definitions(quantized):
    assert minilm.evaluate(quantized.graph_module)[0] >= LEAST_INT4_ACCURACY


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_minilm_in_half_precision(sentence_model, dtype):
    half = copy.deepcopy(sentence_model).to(dtype)
    result = mq.quantize(half, calibration_data=minilm.calibration()[:1], accuracy_warning="ignore")
    assert [row.scheme for row in linear_rows(result)] == ["int4 g128 sym"] * 36
    state = result.graph_module.state_dict()
    assert {t.dtype for name, t in state.items() if name.endswith("weight_scale")} == {dtype}
    sentences = minilm.encoder()([definition for _, definition in minilm.rows()[:40]])
    with torch.no_grad():
        actual, expected = result.graph_module(*sentences), half(*sentences)
    assert actual.dtype is dtype and actual.shape == (40, 384)
    assert mq.sqnr_db(expected, actual) >= LEAST_HALF_SQNR_DB


def test_gru_stores_a_weight_of_13_steps_once():
    result = mq.quantize(g2p_gru.load(), accuracy_warning="ignore")
    packed = [name for name in result.graph_module.state_dict() if name.endswith("weight_packed")]
    assert sorted(packed) == [f"{name}.weight_packed" for name in ("dec.hh", "dec.ih", "enc.hh", "enc.ih", "fc")]
    targets = [str(n.target) for n in result.graph_module.graph.nodes if n.op == "get_attr"]
    assert len(targets) == len(set(targets))
    first, *rest = [row for row in result.accuracy.rows if row.weight == "enc.ih.weight"]
    assert first.bytes_after == 768 * 256 // 2 + 768 * 2 * 4
    assert len(rest) == g2p_gru.LETTER_STEPS - 1
    assert {(row.reason, row.bytes_after) for row in rest} == {(f"shares the weight of {first.node}", 0)}


def test_gru_computes_what_the_float_model_does_with_the_rounded_weights():
    model = g2p_gru.load()
    result = mq.quantize(model, compute="float32", accuracy_warning="ignore")
    rounded = g2p_gru.load()
    with torch.no_grad():
        for name in ("enc.ih", "enc.hh", "dec.ih", "dec.hh", "fc"):
            weight = rounded.get_submodule(name).weight
            weight.copy_(round_trip(weight, 128))
    letters, mask = g2p_gru.letters_of(["activate", "phoneme", "elephant"])
    before = torch.full((3, g2p_gru.PHONEME_STEPS), g2p_gru.START)
    with torch.no_grad():
        actual, expected = result.graph_module(letters, mask, before), rounded(letters, mask, before)
        assert not torch.allclose(actual, model(letters, mask, before), atol=100 * TILE_TOLERANCE)
    torch.testing.assert_close(actual, expected, rtol=TILE_TOLERANCE, atol=TILE_TOLERANCE)


def round_trip(weight, group_size):
    """Rounds to the nearest of 15 steps a group, written out: scale = max|w| / 7.5, codes -8..7."""
    groups = weight.unflatten(1, (-1, group_size))
    scale = groups.abs().amax(-1, keepdim=True) / 7.5
    return (torch.round(groups / scale).clamp(-8, 7) * scale).flatten(1)


def test_gru_still_spells_out_words():
    quantized = mq.quantize(g2p_gru.load(), accuracy_warning="ignore").graph_module
    spoken = dict(zip(WORDS, g2p_gru.pronounce(quantized, list(WORDS)), strict=True))
    assert spoken == WORDS


WORDS = {
    "activate": "AE1 K T AH0 V EY2 T",
    "phoneme": "F OW1 N IY0 M",
    "banana": "B AH0 N AA1 N AH0",
    "elephant": "EH1 L AH0 F AH0 N T",
}


@pytest.fixture(scope="module")
def language_model():
    return smollm2.load()


def test_smollm2_quantizes_all_linears_and_stores_its_tied_head_once(language_model):
    result = mq.quantize(language_model, accuracy_warning="ignore")
    linears = [row for row in linear_rows(result) if row.module != "output"]
    shrunk = "group_size 128 does not divide rows of 576: shrunk to 64"
    assert len(linears) == 7 * 30
    assert {(row.shape[1], row.scheme, row.reason) for row in linears} == {
        (576, "int4 g64 sym", shrunk),
        (1536, "int4 g128 sym", ""),
    }
    embedding, head = [row for row in result.accuracy.rows if row.weight == "token_embd.weight"]
    assert (embedding.op, head.module, head.scheme, head.bytes_after) == ("embedding", "output", "float32", 0)
    assert "shares the weight of embedding" in head.reason
    state = result.graph_module.state_dict()
    assert "token_embd.weight" in state and "output.weight" not in state
    with torch.no_grad():
        assert int(result.graph_module(torch.tensor([smollm2.PROMPT]))[0, -1].argmax()) == smollm2.PARIS


def test_smollm2_rounds_a_tied_weight_once_when_it_may(language_model):
    result = mq.quantize(language_model, overrides=[("token_embd", "int4"), ("output", "int4")],
                         accuracy_warning="ignore")  # fmt: skip
    state = result.graph_module.state_dict()
    assert [name for name in state if name.startswith(("token_embd", "output."))] == [
        "token_embd.weight_packed",
        "token_embd.weight_scale",
    ]
    with torch.no_grad():
        assert int(result.graph_module(torch.tensor([smollm2.PROMPT]))[0, -1].argmax()) == smollm2.PARIS
