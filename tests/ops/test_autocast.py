"""Under autocast linears on codes give what linears give, and no op is changed from inside."""

import pytest
import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx import ops
from mono_quant_fx.config import INT8
from mono_quant_fx.numerics import affine
from tests.ops.test_static_int8 import CONVS, conv_case, linear_case


def int4(linear):
    packed = mq.QuantizedLinearInt4.from_float(linear, 32)
    return lambda x, dtype: ops.int4_linear(
        x, packed.weight_packed, packed.weight_scale, None, packed.bias.to(dtype), 32
    )


def int8(linear):
    stored = affine.quantize_matrix(linear.weight.detach(), INT8)
    return lambda x, dtype: ops.int8_linear(x, *stored, linear.bias.detach().to(dtype))


@pytest.mark.parametrize("make", [int4, int8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_linear_casts_its_input_and_bias(make, dtype):
    linear, x = nn.Linear(64, 24), torch.randn(3, 64, requires_grad=True)
    op = make(linear)
    expected = op(x.to(dtype), dtype)
    with torch.autocast("cpu", dtype):
        actual = op(x, torch.float32)
        assert actual.dtype == linear(x).dtype == dtype
    assert torch.equal(actual, expected)
    (gradient,) = torch.autograd.grad(actual.float().sum(), x)
    assert gradient.dtype == torch.float32 and gradient.abs().max() > 0


def test_float64_stays_float64():
    linear = nn.Linear(64, 24).double()
    packed = mq.QuantizedLinearInt4.from_float(linear, 32)
    x = torch.randn(3, 64, dtype=torch.float64)
    expected = packed(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.float64
        assert torch.equal(packed(x), expected)


@pytest.mark.filterwarnings("ignore:INT8 activations run through float")
@pytest.mark.parametrize("kind", ["w4a8", "w8a8", "conv"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ops_on_int8_inputs_give_autocasts_type_rounded_once(kind, symmetric, dtype):
    """They gave float32 where the float op gives autocast's type."""
    if kind == "conv":
        args, op = conv_case(CONVS["plain"], symmetric=symmetric), ops.w8a8_conv
    else:
        args = linear_case(bits=int(kind[1]), symmetric=symmetric)
        args, op = (*args, 32) if kind == "w4a8" else args, getattr(ops, f"{kind}_linear")
    expected = op(*args)
    with torch.autocast("cpu", dtype):
        actual = op(*args)
    assert expected.dtype == torch.float32 and actual.dtype == dtype
    assert torch.equal(actual, expected.to(dtype))
    double = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    with torch.autocast("cpu", dtype):
        assert op(*double).dtype == torch.float64


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv1d(8, 16, 3), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.b(self.a(self.conv(x).mT).relu())


@pytest.fixture(scope="module", params=["w4", "w8", "w4a8", "w8a8"])
def graph_and_model(request):
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(60, 8, 12)
    activations = "int8" if "a8" in request.param else None
    gm = mq.quantize(
        model, calibration_data=[x], group_size=8, skip_param_threshold=0, accuracy_warning="ignore",
        algorithm="rtn", bits=int(request.param[1]), activations=activations,
    ).graph_module  # fmt: skip
    return gm, model, x


MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.filterwarnings("ignore:INT8 activations run through float")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_a_graph_has_the_type_of_the_models(graph_and_model, mode, dtype):
    gm, model, x = graph_and_model
    with MODES[mode](), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        expected, actual = model(x), gm(x)
    assert actual.dtype == expected.dtype == (dtype or torch.float32)
    assert mq.sqnr_db(expected.float(), actual.float()) > 15
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        again = gm(x)
    assert actual.is_inference() == (mode == "inference") and torch.equal(actual, again)


def test_deterministic_mode_gives_the_same_types_and_bits_each_time(graph_and_model):
    gm, _, x = graph_and_model
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            first, second = gm(x), gm(x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert first.dtype == torch.bfloat16 and torch.equal(first, second)


@pytest.mark.parametrize("transform", ["jvp", "vjp", "vmap"])
@pytest.mark.parametrize("make", [int4, int8])
def test_transforms_under_autocast_give_what_a_linear_gives(transform, make):
    linear, x, t = nn.Linear(64, 24).requires_grad_(False), torch.randn(3, 64), torch.randn(3, 64)
    op = make(linear)
    with torch.autocast("cpu", torch.bfloat16):
        found = [
            {
                "jvp": lambda f=f: torch.func.jvp(f, (x,), (t,)),
                "vjp": lambda f=f: torch.func.vjp(f, x)[1](torch.ones(3, 24, dtype=torch.bfloat16)),
                "vmap": lambda f=f: (torch.func.vmap(f)(torch.stack([x, t])),),
            }[transform]()
            for f in (lambda x: op(x, torch.float32), linear)
        ]
    for actual, expected in zip(*found, strict=True):
        # torch's own linear forgets autocast under vmap; ours has the type that both have without vmap
        assert actual.dtype == (torch.bfloat16 if transform == "vmap" else expected.dtype)
        assert actual.shape == expected.shape
        assert mq.sqnr_db(expected.float(), actual.float()) > 15
