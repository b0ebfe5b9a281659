"""The benchmark's llama with a static cache: it is the loader's model, token by token, in float and as INT4."""

import copy

import pytest
import torch

import mono_quant_fx as mq
from tests.benchmarks.cached_llama import CachedLlama, with_cache
from tests.benchmarks.contestants import INT4, int4_llama
from tests.real_models import smollm2

PROMPT, LENGTH = 5, 9


def tiny():
    torch.manual_seed(0)
    return smollm2.SmolLM2(48, 128, 2, 4, 2, 128, 1e-5, 1e4).eval()


def logits(model, ids, prompt):
    """[tokens, vocabulary]: after the prompt, and after each token that follows."""
    with torch.no_grad():
        found = [model(ids[:, :prompt], torch.arange(prompt))]
        found += [model(ids[:, i : i + 1], torch.tensor([i])) for i in range(prompt, ids.shape[1])]
    return torch.cat(found, 1)[0]


@pytest.mark.parametrize("prompt", [1, PROMPT, LENGTH])
def test_every_token_is_that_of_the_whole_sequence(prompt):
    model, ids = tiny(), torch.randint(48, (1, LENGTH))
    with torch.no_grad():
        whole = model(ids)[0, prompt - 1 :]
    torch.testing.assert_close(logits(with_cache(model, LENGTH), ids, prompt), whole, rtol=1e-4, atol=1e-5)


def test_a_new_prompt_forgets_what_came_before():
    model, cached, ids = tiny(), with_cache(tiny(), LENGTH), torch.randint(48, (2, LENGTH))
    logits(cached, ids[:1], PROMPT)
    with torch.no_grad():
        whole = model(ids[1:])[0, PROMPT - 1 :]
    torch.testing.assert_close(logits(cached, ids[1:], PROMPT), whole, rtol=1e-4, atol=1e-5)


def test_int4_has_a_cache_of_its_own_and_an_int8_head():
    cached, ids = with_cache(tiny(), LENGTH), torch.randint(48, (1, LENGTH))
    quantized = int4_llama(cached, INT4)
    restored = copy.deepcopy(mq.dequantize_model(quantized))
    assert not any("keys" in name or "values" in name for name in quantized.state_dict())
    assert sorted({str(n.target) for n in quantized.graph.nodes if "mono_quant_fx" in str(n.target)}) == [
        "mono_quant_fx.int4_linear.default", "mono_quant_fx.int8_linear.default",
    ]  # fmt: skip
    found = logits(quantized, ids, PROMPT)
    assert isinstance(cached, CachedLlama) and all(block.keys.abs().sum() == 0 for block in cached.blk)
    torch.testing.assert_close(found, logits(restored, ids, PROMPT), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_smollm2_says_the_same_with_a_cache():
    model, ids = smollm2.load(), smollm2.windows("nyt_snippets.txt", (1, 40))
    with torch.no_grad():
        whole = model(ids)[0, 31:]
    cached = with_cache(model, 48)
    torch.testing.assert_close(logits(cached, ids, 32), whole, rtol=1e-3, atol=1e-3)
    quantized = logits(int4_llama(cached, INT4), ids, 32)
    restored = logits(copy.deepcopy(mq.dequantize_model(int4_llama(cached, INT4))), ids, 32)
    assert mq.sqnr_db(restored, quantized) > 35  # the kernels may round x to bfloat16


@pytest.mark.slow
def test_it_compiles_whole_and_never_again():
    ids = torch.randint(48, (1, LENGTH))
    quantized = int4_llama(with_cache(tiny(), LENGTH), INT4)
    expected = logits(copy.deepcopy(quantized), ids, PROMPT)
    compiled = torch.compile(quantized, dynamic=False, fullgraph=True)
    logits(compiled, ids[:, : PROMPT + 1], PROMPT)
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(logits(compiled, ids, PROMPT), expected, rtol=2e-2, atol=2e-2)
