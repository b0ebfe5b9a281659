"""Every mistake a user can make gets a typed error whose words tell the way out, and leaves the model as it was."""

import math

import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from tests.harness import Snapshot
from tests.models import MLP, ConvNet


def annotated(model):
    return mq.passes.SkipAnnotation(mq.QuantConfig(group_size=32))(mq.capture(model)).graph_module


def nan_weights():
    model = MLP().eval()
    model.fc2.weight.data[3, 5] = math.nan
    return model


def refused(model, run, error, words):
    """`run(model)` raises `error` with `words`, one of the family, and the model is as it was."""
    before = Snapshot(model)
    with pytest.raises(error, match=words) as e:
        run(model)
    assert isinstance(e.value, mq.MonoQuantError)
    before.check(model)


OK = torch.zeros(2, 64)
DATA = {
    "none": ([], mq.CalibrationError, "calibration_data is empty"),
    "shape": (
        [OK, torch.zeros(3, 63)],
        mq.CalibrationError,
        r"batch 1 fails at node 'linear' \(linear of \(3, 63\), \(128, 64\), \(128,\)\): RuntimeError: ",
    ),
    "dtype": (
        [OK, OK.double()],
        mq.CalibrationError,
        "batch 1 fails at node 'linear' .*shape and dtype of the example",
    ),
    "arity": (
        [OK, (OK, 1)],
        mq.CalibrationError,
        r"batch 1 \(float32\[2, 64\], int\) does not fit forward\(x\): too many positional .*prepare_batch=",
    ),
    "first shape": ([torch.zeros(3, 63)], mq.CaptureError, r"MLP itself fails on batch 0 \(float32\[3, 63\]\)"),
    "first dtype": ([OK.long()], mq.CaptureError, r"MLP itself fails on batch 0 \(int64\[2, 64\]\)"),
}


@pytest.mark.parametrize("name", DATA)
def test_data_that_does_not_fit(name):
    data, error, words = DATA[name]
    refused(MLP().eval(), lambda m: mq.quantize(m, calibration_data=data, group_size=32), error, words)


FIELDS = {
    "pattern": (
        {"modules_to_not_convert": ["fc3"]},
        mq.PatternError,
        "'fc3' matches nothing in the model; nearest: fc",
    ),
    "type": (
        {"skip_layer_types": ["Lineer"]},
        mq.PatternError,
        "'Lineer' matches nothing in the model; nearest: Linear",
    ),
    "field": ({"groupsize": 32}, mq.ConfigError, "groupsize=32: no such setting; did you mean group_size"),
    "config": ({"config": {"bits": 4}}, mq.ConfigError, "a QuantConfig is needed, not dict"),
    "nothing": (
        {"skip_param_threshold": 10**6},
        mq.NothingQuantizedError,
        r"none of the 2 weights would be quantized: 1 x 8192 parameters < skip_param_threshold 1000000 \(lower skip_",
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_settings_that_do_not_fit(name):
    fields, error, words = FIELDS[name]
    refused(MLP().eval(), lambda m: mq.quantize(m, **fields), error, words)


MODELS = {
    "train mode": (lambda: MLP(), mq.CaptureError, r"MLP: it is in training mode; .*model\.eval\(\)"),
    "no weights": (lambda: nn.ReLU().eval(), mq.NothingQuantizedError, "the model has no weights, so there is nothing"),
    "unreachable": (lambda: nn.Sequential(nn.GRU(32, 32)).eval(), mq.NothingQuantizedError, "not reachable: GRU hides"),
    "NaN": (nan_weights, mq.WeightError, "int4-lowering: weight 'fc2.weight' cannot be quantized: .*NaN"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_quantized(name):
    make, error, words = MODELS[name]
    refused(make(), lambda m: mq.quantize(m, group_size=32), error, words)


def test_weights_on_the_meta_device_have_no_values():
    with pytest.raises(mq.WeightError, match=r"'fc1\.weight' \(on the meta device\).* load them first"):
        mq.quantize(MLP().to("meta").eval(), group_size=32)


PASSES = {
    "lowering": (lambda m: mq.passes.Int4GroupwiseLowering()(mq.capture(m)), "int4-lowering: .*run skip-annotation"),
    "observers": (lambda m: mq.passes.ObserverInsertion()(mq.capture(m)), "observer-insertion: .*run skip-annotation"),
    "calibration": (
        lambda m: mq.passes.CalibrationExecution([OK])(annotated(m)),
        "calibration: the graph has no observers; run observer-insertion first",
    ),
    "a module": (lambda m: mq.passes.DequantFusion()(m), r"not MLP; mq\.capture\(model\) makes one"),
    "a float table": (lambda m: mq.measure_accuracy(*[mq.capture(m)] * 2), "no node is annotated; run skip-annotation"),
    "another model": (
        lambda m: mq.measure_accuracy(mq.capture(ConvNet().eval()), mq.quantize(m, group_size=32).graph_module),
        "the float graph has no weight 'fc1.weight'",
    ),
    "a float graph": (lambda m: mq.dequantize_model(mq.capture(m)), "the graph holds no quantized weight; give the"),
    "a float module": (mq.dequantize_model, "dequantize_model: a GraphModule is needed, not MLP"),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_graph_in_the_wrong_stage_is_answered_with_the_pass_to_run(name):
    run, words = PASSES[name]
    refused(MLP().eval(), run, mq.PreconditionError, words)


def test_a_pipeline_takes_passes_only():
    with pytest.raises(mq.ConfigError, match=r"DequantFusion.* is no pass; pass instances such as DequantFusion\(\)"):
        mq.Pipeline((mq.passes.SkipAnnotation(), mq.passes.DequantFusion))


@pytest.mark.parametrize("batches", [[torch.zeros(3, 63)], [(OK, 1)], [], [OK.double()]])
def test_a_graph_that_fails_on_data_is_as_it_was(batches):
    gm = mq.passes.ObserverInsertion()(annotated(MLP().eval())).graph_module
    before = Snapshot(gm)
    with pytest.raises(mq.CalibrationError):
        mq.passes.CalibrationExecution(batches)(gm)
    before.check(gm)


def test_an_error_in_the_middle_of_a_pipeline_leaves_the_graph_that_went_in():
    gm = mq.capture(nan_weights())
    before = Snapshot(gm)
    with pytest.raises(mq.WeightError, match=r"fc2\.weight"):
        mq.default_pipeline(mq.QuantConfig(group_size=32), [OK])(gm)
    before.check(gm)
