import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.numerics import affine
from tests.harness import check_pass
from tests.models import MLP, ConvNet, Reused, TiedLM

CONFIG = mq.QuantConfig(group_size=32, skip_param_threshold=0)


def annotate(model, config=CONFIG):
    return mq.passes.SkipAnnotation(config)(mq.capture(model.eval())).graph_module


def float_graph_with_rounded_weights(gm, lowered):
    """The oracle: the float graph, its weights replaced by fake_quantize(weight), straight from the numerics."""
    from mono_quant_fx.graph.annotation import annotated
    from mono_quant_fx.graph.weight_ops import from_matrix, to_matrix

    oracle = mq.graph.tensors.clone(gm)
    for _, a in annotated(lowered):
        if a.lowered:
            matrix = to_matrix(mq.graph.tensors.get_attribute(gm, a.weight).detach(), a.layout, a.groups)
            rounded = affine.fake_quantize(matrix.contiguous(), a.scheme)
            value = from_matrix(rounded, a.layout, a.groups, a.shape, lambda op, *args: op(*args))
            mq.graph.tensors.attach(oracle, a.weight, torch.nn.Parameter(value.contiguous(), requires_grad=False))
    return oracle


def test_the_constant_is_replaced_in_front_of_the_same_op():
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.ReLU())
    check_pass(
        mq.passes.Int4GroupwiseLowering(),
        annotate(model),
        after="""
            %input_1 = placeholder
            %_0_weight_packed = get_attr 0.weight_packed           # int32[32, 8]  int4 g32 sym
            %_0_weight_scale = get_attr 0.weight_scale             # float32[32, 2]
            %_0_weight_dequantized = mono_quant_fx.dequantize_int4(%_0_weight_packed, %_0_weight_scale, None, 32, 64)
            %linear = linear(%input_1, %_0_weight_dequantized, None)
            %_1 = ReLU[1](%linear)
            return %_1""",
        args=(torch.randn(2, 64),),
        tolerance=None,
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model", [MLP, ConvNet, Reused])
def test_the_lowered_graph_equals_the_float_graph_on_rounded_weights_bit_for_bit(model, dtype, symmetric):
    config = mq.QuantConfig(group_size=32, skip_param_threshold=0, symmetric=symmetric)
    gm = annotate(model().to(dtype), config)
    lowered = mq.passes.Int4GroupwiseLowering()(gm).graph_module
    x = torch.randn(2, 3, 8, 8) if model is ConvNet else torch.randn(2, 64)
    assert torch.equal(lowered(x.to(dtype)), float_graph_with_rounded_weights(gm, lowered)(x.to(dtype)))


def test_embeddings_are_lowered_when_they_are_not_skipped_and_tied_weights_once():
    gm = annotate(TiedLM(), mq.QuantConfig(group_size=32, skip_param_threshold=0, default_skips=False))
    lowered = check_pass(mq.passes.Int4GroupwiseLowering(), gm)
    assert sorted(lowered.state_dict()) == [
        "emb.weight_packed", "emb.weight_scale", "fc.bias", "fc.weight_packed", "fc.weight_scale"
    ]  # fmt: skip
    ids = torch.arange(6).view(2, 3)
    assert torch.equal(lowered(ids), float_graph_with_rounded_weights(gm, lowered)(ids))


def test_no_float_copy_is_left_and_nothing_requires_grad():
    gm = annotate(MLP())
    lowered = mq.passes.Int4GroupwiseLowering()(gm).graph_module
    assert "fc1.weight" not in lowered.state_dict()
    assert not hasattr(lowered.fc1, "weight")
    assert all(p.requires_grad for p in gm.parameters())
    assert not any(p.requires_grad for p in lowered.parameters())
    assert lowered.fc1.bias.data_ptr() == gm.fc1.bias.data_ptr()


def test_int8_keeps_the_name_of_the_weight():
    lowered = mq.passes.Int4GroupwiseLowering()(annotate(MLP(), mq.QuantConfig(bits=8))).graph_module
    state = lowered.state_dict()
    assert state["fc1.weight"].dtype == torch.int8
    assert state["fc1.weight"].shape == (128, 64)
    assert state["fc1.weight_scale"].shape == (128, 1)


def test_asymmetric_adds_an_integer_zero_point():
    gm = annotate(MLP(), mq.QuantConfig(group_size=32, symmetric=False))
    zero_point = mq.passes.Int4GroupwiseLowering()(gm).graph_module.state_dict()["fc1.weight_zero_point"]
    assert zero_point.dtype == torch.int8
    assert zero_point.shape == (128, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_errors_that_name_the_weight(value):
    model = MLP()
    with torch.no_grad():
        model.fc2.weight[3, 7] = value
    with pytest.raises(mq.WeightError, match=r"int4-lowering: weight 'fc2.weight' cannot be quantized: it holds NaN"):
        mq.passes.Int4GroupwiseLowering()(annotate(model))


def test_it_does_not_fire_without_annotations():
    with pytest.raises(mq.PreconditionError, match="int4-lowering: no weight is annotated; run skip-annotation first"):
        mq.passes.Int4GroupwiseLowering()(mq.capture(MLP().eval()))


def test_codes_that_are_there_need_no_float_weight():
    from dataclasses import replace

    from mono_quant_fx.graph.annotation import annotated, set_annotation

    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    stored = affine.quantize_matrix(model[0].weight.detach(), CONFIG.scheme)
    expected = mq.passes.Int4GroupwiseLowering()(annotate(model)).graph_module
    gm = annotate(model.to("meta"))
    ((node, annotation),) = annotated(gm)
    set_annotation(node, replace(annotation, stored=stored))
    actual = mq.passes.Int4GroupwiseLowering()(gm).graph_module
    x = torch.randn(2, 64)
    assert mq.format_graph(actual) == mq.format_graph(expected) and torch.equal(actual(x), expected(x))
