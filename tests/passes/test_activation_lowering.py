"""INT8 activations from the annotation to the fused op: where the nodes stand, what they hold, what it costs."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx import ops
from mono_quant_fx.graph.annotation import annotated
from tests.harness import check_pass
from tests.models import MLP, ConvNet, Reused, TiedLM

#: Fused and unfused compute the same products; float32 rounding in another order.
FUSED_TOLERANCE = 1e-5
#: dB of the model's output, seeded random models and data: 8 bits everywhere give about 40.
LEAST_W8A8_DB, LEAST_W4A8_DB = 35.0, 18.0

DATA = [torch.randn(6, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
IMAGES = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


DEFAULTS = {"group_size": 32, "skip_param_threshold": 0, "activations": "int8", "algorithm": "rtn"}


def calibrated(model, data=DATA, **fields):
    config = mq.QuantConfig(**DEFAULTS | fields)
    pipeline = mq.default_pipeline(config, data)
    gm = mq.capture(model.eval(), data[0])
    for pass_ in pipeline.passes[:3]:
        gm = pass_(gm).graph_module
    return gm


def lowered(*args, **fields):
    gm = mq.passes.ActivationLowering()(calibrated(*args, **fields))
    return mq.passes.Int4GroupwiseLowering()(gm).graph_module


def targets(gm):
    return [n.target for n in gm.graph.nodes if getattr(n.target, "namespace", "") == "mono_quant_fx"]


def test_codes_and_back_stand_before_each_op():
    check_pass(
        mq.passes.ActivationLowering(),
        calibrated(MLP(bias=False)),
        after="""
            %x = placeholder
            %fc1_weight = get_attr fc1.weight                      # float32[128, 64]  int4 g32 sym
            %fc1_input_scale = get_attr fc1.input_scale            # float32[1]
            %fc1_input_zero_point = get_attr fc1.input_zero_point  # int8[1]
            %x_quantized = mono_quant_fx.quantize_activation(%x, %fc1_input_scale, %fc1_input_zero_point)
            %x_dequantized = mono_quant_fx.dequantize_activation(%x_quantized, %fc1_input_scale, %fc1_input_zero_point)
            %linear = linear(%x_dequantized, %fc1_weight, None)
            %relu = relu(%linear, inplace=False)
            %fc2_weight = get_attr fc2.weight                      # float32[16, 128]  int4 g32 sym
            %fc2_input_scale = get_attr fc2.input_scale            # float32[1]
            %fc2_input_zero_point = get_attr fc2.input_zero_point  # int8[1]
            %relu_quantized = mono_quant_fx.quantize_activation(%relu, %fc2_input_scale, %fc2_input_zero_point)
            %relu_dequantized = mono_quant_fx.dequantize_activation(%relu_quantized, %fc2_input_scale, %fc2_input_zero_point)
            %linear_1 = linear(%relu_dequantized, %fc2_weight, None)
            return %linear_1""",  # noqa: E501
        args=(DATA[0],),
        tolerance=None,
    )


def test_the_qparams_are_those_of_the_observed_range():
    gm = mq.passes.ActivationLowering()(calibrated(MLP())).graph_module
    whole = torch.cat(DATA)
    low, high = whole.min().item(), whole.max().item()
    scale, zero_point = gm.fc1.input_scale, gm.fc1.input_zero_point
    assert scale.item() == pytest.approx((high - low) / 255)
    assert zero_point.item() == round(-128 - low / scale.item())
    reached = ops.dequantize_activation(ops.quantize_activation(whole, scale, zero_point), scale, zero_point)
    torch.testing.assert_close(reached, whole, rtol=0, atol=0.501 * scale.item())


def test_symmetric_codes_have_zero_at_zero():
    gm = mq.passes.ActivationLowering()(calibrated(MLP(), activation_symmetric=True)).graph_module
    largest = torch.cat(DATA).abs().max().item()
    assert gm.fc1.input_zero_point.tolist() == [0]
    assert gm.fc1.input_scale.item() == pytest.approx(largest / 127.5)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        y = torch.tanh(x)
        return self.q(y) * self.k(y) + self.v(y) + y


def test_a_shared_input_is_quantized_once_and_other_readers_stay_float():
    gm = mq.passes.ActivationLowering()(calibrated(Shared())).graph_module
    assert targets(gm) == [ops.quantize_activation, ops.dequantize_activation]
    add = next(n for n in gm.graph.nodes if n.name == "add_1")
    assert add.args[1].name == "tanh"
    assert [n for n in gm.state_dict() if "input" in n] == ["q.input_scale", "q.input_zero_point"]


def test_a_module_that_reads_several_tensors_has_a_scale_for_each():
    gm = mq.passes.ActivationLowering()(calibrated(Reused())).graph_module
    names = [n for n in gm.state_dict() if n.endswith("input_scale") or "input_scale_" in n]
    assert names == ["fc.input_scale", "fc.input_scale_1", "fc.input_scale_2"]
    check_pass(mq.passes.ActivationLowering(), calibrated(Reused()), args=(DATA[0],), tolerance=None)


def test_an_embedding_has_no_activation_and_its_tied_head_has():
    ids = [torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(0))]
    result = mq.quantize(TiedLM().eval(), calibration_data=ids, activations="int8", default_skips=False, group_size=32,
                         skip_param_threshold=0, accuracy_warning="ignore")  # fmt: skip
    assert [(r.op, r.activations) for r in result.accuracy.rows] == [
        ("embedding", ""), ("linear", "int8 asym"), ("linear", "int8 asym"),
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["symbolic", "export"])
@pytest.mark.parametrize("bits", [4, 8])
def test_linears_fuse_to_the_op_for_their_bits(bits, method):
    torch.manual_seed(0)
    model = MLP().eval()
    result = mq.quantize(mq.capture(model, DATA[0], method=method), calibration_data=DATA, bits=bits, group_size=32,
                         activations="int8", accuracy_warning="ignore")  # fmt: skip
    op = ops.w8a8_linear if bits == 8 else ops.w4a8_linear
    assert targets(result.graph_module) == [ops.quantize_activation, op] * 2
    least = LEAST_W8A8_DB if bits == 8 else LEAST_W4A8_DB
    assert mq.sqnr_db(model(DATA[0]), result.graph_module(DATA[0])) > least


@pytest.mark.parametrize("method", ["symbolic", "export"])
def test_int8_convolutions_fuse_and_transposed_ones_keep_their_nodes(method):
    torch.manual_seed(0)
    model = ConvNet().eval()
    gm = lowered(mq.capture(model, IMAGES[0], method=method), IMAGES, bits=8)
    fused = check_pass(mq.passes.DequantFusion(), gm, args=(IMAGES[0],), tolerance=FUSED_TOLERANCE)
    assert Counter(targets(fused)) == {
        ops.quantize_activation: 4, ops.w8a8_conv: 2, ops.w8a8_linear: 1,
        ops.dequantize_activation: 1, ops.dequantize_int8: 1,
    }  # fmt: skip
    assert mq.sqnr_db(model(IMAGES[0]), fused(IMAGES[0])) > LEAST_W8A8_DB


class Forms(nn.Module):
    """A convolution that the fused op does not take, since it has more zeros behind than before, and two it does."""

    def __init__(self):
        super().__init__()
        self.odd, self.same = nn.Conv1d(4, 8, 4, padding="same"), nn.Conv1d(8, 8, 3, padding="same")
        self.plain = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.plain(self.same(self.odd(x)))


def test_a_padding_with_more_zeros_behind_keeps_its_nodes():
    data = [torch.randn(2, 4, 9)]
    gm = lowered(Forms(), data, bits=8)
    fused = check_pass(mq.passes.DequantFusion(), gm, args=(data[0],), tolerance=FUSED_TOLERANCE)
    assert targets(fused).count(ops.w8a8_conv) == 2 and targets(fused).count(ops.dequantize_activation) == 1


def test_the_lowered_graph_is_the_float_graph_on_rounded_weights_and_inputs():
    torch.manual_seed(0)
    model, x = MLP().eval(), DATA[0]
    gm = lowered(model)

    def rounded(t, layer):
        scale, zero_point = layer.input_scale, layer.input_zero_point
        return (torch.round(t / scale) + zero_point).clamp(-128, 127).sub(zero_point) * scale

    weights = {n: ops.dequantize_int4(layer.weight_packed, layer.weight_scale, None, 32, k)
               for n, layer, k in (("fc1", gm.fc1, 64), ("fc2", gm.fc2, 128))}  # fmt: skip
    hidden = F.relu(F.linear(rounded(x, gm.fc1), weights["fc1"], model.fc1.bias))
    assert torch.equal(gm(x), F.linear(rounded(hidden, gm.fc2), weights["fc2"], model.fc2.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models(dtype):
    torch.manual_seed(0)
    model, data = MLP().to(dtype).eval(), [x.to(dtype) for x in DATA]
    result = mq.quantize(model, calibration_data=data, bits=8, activations="int8", accuracy_warning="ignore")
    out = result.graph_module(data[0])
    assert out.dtype is dtype and result.graph_module.fc1.input_scale.dtype is dtype
    assert mq.sqnr_db(model(data[0]), out) > LEAST_W8A8_DB - 5


def test_the_table_says_what_the_inputs_became():
    torch.manual_seed(0)
    text = str(
        mq.quantize(
            MLP().eval(), calibration_data=DATA, activations="int8", algorithm="rtn", accuracy_warning="ignore"
        ).accuracy
    )
    header, _, first = text.splitlines()[:3]
    assert "input " in header and "input range" in header and "observer" in header and "gain dB" not in header
    assert "int8 asym" in first and "minmax" in first
    assert "int8 asym" not in str(mq.quantize(MLP().eval(), calibration_data=DATA, accuracy_warning="ignore").accuracy)


@pytest.mark.filterwarnings("ignore::mono_quant_fx.ExperimentalWarning")
def test_auto_says_why_in_the_table():
    torch.manual_seed(0)
    result = mq.quantize(
        MLP().eval(),
        calibration_data=DATA,
        evaluation_data=DATA,
        activations="int8",
        observer="auto",
        accuracy_warning="ignore",
    )
    row = result.accuracy.rows[0]
    assert row.observer == "minmax"
    assert row.reason.endswith("observer minmax: experimental: 1,152 values say little about the tail; 10,000 would")


def test_static_activations_need_data():
    with pytest.raises(mq.ConfigError, match=r"activations='int8' needs calibration_data, which sets their ranges"):
        mq.quantize(MLP().eval(), DATA[0], activations="int8")


def test_the_stages_are_kept_in_order():
    annotate = mq.passes.SkipAnnotation(mq.QuantConfig(activations="int8", group_size=32))
    gm = annotate(mq.capture(MLP().eval())).graph_module
    with pytest.raises(mq.PreconditionError, match=r"x, an input of 'fc1[.]weight', has no range"):
        mq.passes.ActivationLowering()(gm)
    words = "the input of 'fc1[.]weight' is to be INT8; run calibration and activation-lowering first"
    with pytest.raises(mq.PreconditionError, match=words):
        mq.passes.Int4GroupwiseLowering()(gm)


def test_weight_only_graphs_pass_through():
    gm = calibrated(MLP(), activations=None)
    check_pass(mq.passes.ActivationLowering(), gm, modified=False, args=(DATA[0],))
    assert all(seen.scale is None for _, a in annotated(gm) for seen in a.observed)


@pytest.mark.parametrize("stage", ["lowered", "fused"])
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantize_model_makes_activations_float_again(bits, stage):
    torch.manual_seed(0)
    model = ConvNet().eval()
    gm = lowered(model, IMAGES, bits=bits)
    gm = mq.passes.DequantFusion()(gm).graph_module if stage == "fused" else gm
    restored = mq.dequantize_model(gm)
    assert targets(restored) == []
    assert sorted(restored.state_dict()) == sorted(model.state_dict())
    weights = mq.dequantize_model(lowered(model, IMAGES, bits=bits, activations=None))
    torch.testing.assert_close(restored(IMAGES[0]), weights(IMAGES[0]), rtol=0, atol=FUSED_TOLERANCE)


def test_the_state_dict_loads_into_a_graph_quantized_the_same_way():
    torch.manual_seed(0)
    first = mq.quantize(MLP().eval(), calibration_data=DATA, bits=8, activations="int8", accuracy_warning="ignore")
    second = mq.quantize(MLP().eval(), calibration_data=[3 * x for x in DATA], bits=8, activations="int8",
                         accuracy_warning="ignore")  # fmt: skip
    second.graph_module.load_state_dict(first.graph_module.state_dict())
    assert torch.equal(second.graph_module(DATA[0]), first.graph_module(DATA[0]))
