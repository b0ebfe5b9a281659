import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from tests.harness import check_pass
from tests.models import MLP, ConvNet, TiedLM

#: The fused op multiplies tile by tile, so sums may be taken in another order than the one big matmul's.
FUSED_TOLERANCE = 1e-5
CONFIG = mq.QuantConfig(group_size=32, skip_param_threshold=0)


def lower(model, config=CONFIG, **capture):
    gm = mq.passes.SkipAnnotation(config)(mq.capture(model.eval(), **capture))
    return mq.passes.Int4GroupwiseLowering()(gm).graph_module


def test_dequantize_and_linear_become_one_op_under_the_linears_name():
    check_pass(
        mq.passes.DequantFusion(),
        lower(MLP(bias=False)),
        after="""
            %x = placeholder
            %fc1_weight_packed = get_attr fc1.weight_packed        # int32[128, 8]  int4 g32 sym
            %fc1_weight_scale = get_attr fc1.weight_scale          # float32[128, 2]
            %linear = mono_quant_fx.int4_linear(%x, %fc1_weight_packed, %fc1_weight_scale, None, None, 32)
            %relu = relu(%linear, inplace=False)
            %fc2_weight_packed = get_attr fc2.weight_packed        # int32[16, 16]  int4 g32 sym
            %fc2_weight_scale = get_attr fc2.weight_scale          # float32[16, 4]
            %linear_1 = mono_quant_fx.int4_linear(%relu, %fc2_weight_packed, %fc2_weight_scale, None, None, 32)
            return %linear_1""",
        args=(torch.randn(2, 64),),
        tolerance=FUSED_TOLERANCE,
    )


class Forms(nn.Module):
    """Every way of writing a linear: addmm, matmul, @, a transposed constant."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 32))
        self.v = nn.Parameter(torch.randn(32, 64))
        self.b = nn.Parameter(torch.randn(32))

    def forward(self, x):
        a = torch.addmm(self.b, x, self.w)
        b = torch.matmul(x, self.w)
        return a + b + x @ self.v.t() + x.matmul(self.v.transpose(0, 1))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["symbolic", "export"])
def test_every_form_of_a_linear_fuses(method, bits):
    x = torch.randn(3, 64)
    gm = lower(Forms(), mq.QuantConfig(bits=bits, group_size=32), method=method, example_inputs=x)
    fused = check_pass(mq.passes.DequantFusion(), gm, args=(x,), tolerance=FUSED_TOLERANCE)
    ours = [n.target.name() for n in fused.graph.nodes if getattr(n.target, "namespace", "") == "mono_quant_fx"]
    assert ours == [f"mono_quant_fx::int{bits}_linear"] * 4
    assert "t(" not in mq.format_graph(fused)


def test_addmm_with_factors_is_left_as_it_is():
    class Scaled(Forms):
        def forward(self, x):
            return torch.addmm(self.b, x, self.w, beta=0.5)

    check_pass(mq.passes.DequantFusion(), lower(Scaled()), modified=False, args=(torch.randn(3, 64),))


def test_convolutions_and_embeddings_keep_dequantize():
    check_pass(mq.passes.DequantFusion(), lower(ConvNet(), mq.QuantConfig(group_size=32, skip_layer_names=["fc"])),
               modified=False, args=(torch.randn(1, 3, 4, 4),))  # fmt: skip
    config = mq.QuantConfig(group_size=32, skip_param_threshold=0, default_skips=False)
    fused = check_pass(mq.passes.DequantFusion(), lower(TiedLM(), config), args=(torch.arange(4)[None],),
                       tolerance=FUSED_TOLERANCE)  # fmt: skip
    assert "mono_quant_fx.dequantize_int4" in mq.format_graph(fused), "the embedding still needs the float rows"
    assert sum(n.op == "get_attr" and "packed" in str(n.target) for n in fused.graph.nodes) == 2


def test_it_does_not_fire_on_a_float_graph():
    check_pass(mq.passes.DequantFusion(), mq.capture(MLP().eval()), modified=False, args=(torch.randn(1, 64),))
