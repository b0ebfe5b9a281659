"""21 Hugging Face architectures through quantize, from an example of one sample, run at another batch and length."""

import copy
import functools
import logging
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.graph.tensors import named_tensors
from tests import hf_models
from tests.harness import Snapshot

#: dB of the output that four bits with groups of 16 keep, even on random weights 32 wide.
LEAST_DB = 10.0
#: The fused op sums tile by tile, and the exported graph may order a sum differently from the eager model.
TOLERANCE = 1e-4
LENGTH = 9
#: Calibration is the same for all; these have kwargs, convolutions, experts and a loop among them.
CALIBRATED = ("bert", "whisper", "mixtral", "mamba")


@dataclass
class Case:
    """A quantized architecture, and what the model was before."""

    model: nn.Module
    before: Snapshot
    result: mq.QuantizationResult


@functools.cache
def case(name: str) -> Case:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = hf_models.build(name)
    before = Snapshot(model)
    example = hf_models.inputs(name, 1, LENGTH)
    data = [hf_models.inputs(name, 2, LENGTH)] if name in CALIBRATED else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "capture: the model fixes")
        warnings.simplefilter("ignore", mq.AccuracyWarning)
        result = mq.quantize(model, example, calibration_data=data, group_size=16, skip_param_threshold=64)
    return Case(model, before, result)


def other_inputs(name: str) -> hf_models.Inputs:
    return hf_models.inputs(name, 3, LENGTH if name in hf_models.FIXED_LENGTH else 6)


def with_rounded_weights(model: nn.Module, result: mq.QuantizationResult) -> nn.Module:
    """The eager model on the weights that the codes stand for."""
    rounded = copy.deepcopy(model)
    parameters = dict(rounded.named_parameters(remove_duplicate=False))
    state = mq.dequantize_model(result.graph_module).state_dict()
    with torch.no_grad():
        for name in parameters.keys() & state.keys():
            parameters[name].copy_(state[name])
    return rounded


@pytest.mark.parametrize("name", hf_models.NAMES)
def test_it_runs_at_another_batch_and_length_as_the_model_does_with_rounded_weights(name):
    model, result = case(name).model, case(name).result
    inputs = other_inputs(name)
    with torch.no_grad():
        actual = hf_models.output(result.graph_module(**inputs))
        rounded = hf_models.output(with_rounded_weights(model, result)(**inputs))
        reference = hf_models.output(model(**inputs))
    assert actual.shape == reference.shape
    assert mq.sqnr_db(reference, actual) > LEAST_DB
    assert not torch.equal(rounded, reference)
    torch.testing.assert_close(actual, rounded, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", hf_models.NAMES)
def test_every_weight_has_a_scheme_or_a_reason(name):
    model, rows = case(name).model, case(name).result.accuracy.rows
    assert [row.node for row in rows if row.scheme == "float32" and not row.reason] == []
    assert [row.node for row in rows if row.scheme.startswith("int4")]
    tensors = dict(named_tensors(model))
    shown = {id(tensors[row.weight]) for row in rows if row.weight in tensors}
    leaves = {row.weight for row in rows if row.weight not in tensors}
    missing = [
        n
        for n, p in model.named_parameters()
        if p.dim() >= 2 and id(p) not in shown and not any(n.startswith(f"{leaf}.") for leaf in leaves)
    ]
    assert missing == []


@pytest.mark.parametrize("name", hf_models.NAMES)
def test_the_model_is_untouched_and_the_result_can_be_copied(name):
    case(name).before.check(case(name).model)
    gm, inputs = case(name).result.graph_module, other_inputs(name)
    with warnings.catch_warnings():  # torch's copy of an exported graph's tree specs
        warnings.simplefilter("ignore", FutureWarning)
        twin = copy.deepcopy(gm)
    assert torch.equal(hf_models.output(twin(**inputs)), hf_models.output(gm(**inputs)))


@pytest.mark.parametrize("name", CALIBRATED)
def test_calibrated_models_have_every_figure(name):
    result = case(name).result
    assert result.info.calibration_samples_used + result.info.evaluation_samples == 2
    assert result.info.sqnr_db > LEAST_DB
    quantized = [row for row in result.accuracy.rows if row.scheme.startswith("int")]
    assert quantized and all(row.local_sqnr_db > LEAST_DB and row.accumulated_sqnr_db > 0 for row in quantized)


def test_mamba_has_no_assertion_among_its_weights_users():
    assert not [row.op for row in case("mamba").result.accuracy.rows if "assert" in row.op]
    gm = case("mamba").result.graph_module
    constants = [n for n in gm.graph.nodes if n.op == "get_attr"]
    assert not [u for n in constants for u in n.users if "_assert_tensor_metadata" in str(u.target)]


def test_a_cache_in_the_output_is_answered_with_use_cache():
    model, example = hf_models.build("llama", use_cache=True), hf_models.inputs("llama", 1, LENGTH)
    with pytest.raises(mq.CaptureError, match=r"(?s)torch\.export stopped at .*modeling_llama.*use_cache = False") as e:
        mq.capture(model, example)
    assert "use_cache=False in example_inputs" in str(e.value)
    model.config.use_cache = False
    assert mq.capture(model, example)(**hf_models.inputs("llama", 2, 5))["logits"].shape == (2, 5, hf_models.VOCAB)


def test_calibration_takes_the_tokenizers_own_type():
    import transformers

    model, batch = case("bert").model, transformers.BatchEncoding(hf_models.inputs("bert", 2, LENGTH))
    result = mq.quantize(model, calibration_data=[batch], group_size=16, skip_param_threshold=64)
    assert result.info.calibration_samples_used + result.info.evaluation_samples == 2
    assert result.info.sqnr_db > LEAST_DB
