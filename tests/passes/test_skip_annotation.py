import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.graph.annotation import annotated
from tests.harness import check_pass
from tests.models import MLP, ConvNet, TiedLM

CONFIG = mq.QuantConfig(group_size=64)


def test_every_weight_gets_a_scheme_and_nothing_else_changes():
    check_pass(
        mq.passes.SkipAnnotation(CONFIG),
        mq.capture(MLP().eval()),
        before="""
            %x = placeholder
            %fc1_weight = get_attr fc1.weight                      # float32[128, 64]
            %fc1_bias = get_attr fc1.bias                          # float32[128]
            %linear = linear(%x, %fc1_weight, %fc1_bias)
            %relu = relu(%linear, inplace=False)
            %fc2_weight = get_attr fc2.weight                      # float32[16, 128]
            %fc2_bias = get_attr fc2.bias                          # float32[16]
            %linear_1 = linear(%relu, %fc2_weight, %fc2_bias)
            return %linear_1""",
        after="""
            %x = placeholder
            %fc1_weight = get_attr fc1.weight                      # float32[128, 64]  int4 g64 sym
            %fc1_bias = get_attr fc1.bias                          # float32[128]
            %linear = linear(%x, %fc1_weight, %fc1_bias)
            %relu = relu(%linear, inplace=False)
            %fc2_weight = get_attr fc2.weight                      # float32[16, 128]  int4 g64 sym
            %fc2_bias = get_attr fc2.bias                          # float32[16]
            %linear_1 = linear(%relu, %fc2_weight, %fc2_bias)
            return %linear_1""",
        args=(torch.randn(2, 64),),
    )


def test_decisions_follow_the_config_and_a_new_config_replaces_them():
    gm = mq.capture(MLP().eval())
    first = mq.passes.SkipAnnotation(CONFIG)(gm)
    second = mq.passes.SkipAnnotation(mq.QuantConfig(group_size=64, skip_layer_names=["fc1"]))(first)
    assert second.modified
    decided = {a.weight: (str(a.scheme), a.reason) for _, a in annotated(second.graph_module)}
    assert decided == {"fc1.weight": ("None", "skip_layer_names: fc1"), "fc2.weight": ("int4 g64 sym", "")}


def test_users_of_a_tied_weight_are_listed_in_order():
    gm = mq.passes.SkipAnnotation(mq.QuantConfig(group_size=32, skip_param_threshold=0))(mq.capture(TiedLM().eval()))
    tied = next(a for _, a in annotated(gm.graph_module) if a.weight == "emb.weight")
    assert [(u.node, u.op, u.module) for u in tied.users] == [
        ("embedding", "embedding", "emb"),
        ("linear_1", "linear", "head"),
    ]
    assert tied.scheme is None
    assert tied.reason == "default skip: Embedding (tied weight: emb decides)"


def test_leaf_modules_and_depthwise_rows_have_reasons():
    gm = mq.passes.SkipAnnotation(mq.QuantConfig(group_size=32, skip_param_threshold=0))(mq.capture(ConvNet().eval()))
    reasons = {a.users[0].module: (str(a.scheme), a.reason) for _, a in annotated(gm.graph_module)}
    assert reasons["bn"] == ("None", "default skip: BatchNorm2d")
    assert reasons["depthwise"] == ("int8 channel", "rows of 9 < group_size 32: int8 by short_row")
    assert reasons["conv"] == ("int8 channel", "rows of 27 < group_size 32: int8 by short_row")
    assert reasons["up"] == ("int4 g32 sym", "")


def test_nothing_to_quantize_is_an_error_that_counts_the_reasons():
    gm = mq.capture(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval())
    with pytest.raises(
        mq.NothingQuantizedError,
        match=r"skip-annotation: none of the 2 weights would be quantized: "
        r"2 x 16 parameters < skip_param_threshold 512 \(lower skip_param_threshold\)",
    ):
        mq.passes.SkipAnnotation()(gm)


def test_a_model_without_weights_is_an_error():
    with pytest.raises(mq.NothingQuantizedError, match="the model has no weights, so there is nothing to quantize"):
        mq.passes.SkipAnnotation()(mq.capture(nn.ReLU().eval()))
