"""Transforms of torch.func, forward-mode AD and vmap: what the float linear gives, or an error by name, and never 0."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils import _pytree as pytree

import mono_quant_fx as mq
from mono_quant_fx import ops
from mono_quant_fx.config import QuantScheme
from mono_quant_fx.numerics import affine
from tests.ops.test_static_int8 import CONVS, conv_case, linear_case

K, N, GROUP = 24, 5, 8
X, T, BIAS, TB = (
    torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate([(3, K)] * 2 + [N] * 2)
)


def pair(bits):
    """(x, bias) -> the op's result, and the float linear's on the dequantized weight."""
    draw = torch.Generator().manual_seed(9)
    scheme = QuantScheme(4, GROUP, False) if bits == 4 else QuantScheme(8, -1, False)
    stored = affine.quantize_matrix(torch.randn(N, K, generator=draw), scheme)
    weight = affine.dequantize_weight(stored, scheme.group_size, K)
    op = ops.int4_linear if bits == 4 else ops.int8_linear
    rest = (GROUP,) if bits == 4 else ()
    return lambda x, b=BIAS: op(x, *stored, b, *rest), lambda x, b=BIAS: F.linear(x, weight, b)


def dual(f):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(X, T), forward_ad.make_dual(BIAS, TB))).tangent


def outer_gradient(f):
    """Autograd around torch.func: the tangent, and x, depend on what it differentiates by."""
    x = X.clone().requires_grad_()
    return torch.autograd.grad(jvp(f, (x,), (T * x.sum(),))[1].square().sum() + f(x).sum(), x)


def squared(f):
    return lambda x: f(x).square().sum()


TRANSFORMS = {
    "jvp": lambda f: jvp(f, (X, BIAS), (T, TB)),
    "jvp of x": lambda f: jvp(f, (X,), (T,)),
    "jvp of the bias": lambda f: jvp(lambda b: f(X, b), (BIAS,), (TB,)),
    "dual numbers": dual,
    "vjp": lambda f: vjp(f, X, BIAS)[1](torch.ones(3, N)),
    "grad": lambda f: grad(lambda x, b: f(x, b).square().sum(), (0, 1))(X, BIAS),
    "jacrev": lambda f: jacrev(f, (0, 1))(X, BIAS),
    "jacfwd": lambda f: jacfwd(f, (0, 1))(X, BIAS),
    "hessian": lambda f: hessian(squared(f))(X),
    "forward over forward": lambda f: jacfwd(jacfwd(squared(f)))(X),
    "reverse over reverse": lambda f: jacrev(jacrev(squared(f)))(X),
    "linearize": lambda f: linearize(f, X)[1](T),
    "vmap": lambda f: vmap(f)(torch.stack([X, T])),
    "vmap of vectors": lambda f: vmap(f)(X),
    "vmap along another axis": lambda f: vmap(f, in_dims=1, out_dims=2)(torch.stack([X, T], 1)),
    "vmap of biases": lambda f: vmap(f, in_dims=(None, 0))(X, torch.stack([BIAS, TB])),
    "vmap of both": lambda f: vmap(f)(torch.stack([X, T]), torch.stack([BIAS, TB])),
    "vmap of nothing": lambda f: vmap(f)(torch.zeros(0, 3, K)),
    "vmap of vmap": lambda f: vmap(vmap(f, in_dims=(None, 0)), in_dims=(0, None))(X, torch.stack([BIAS, TB])),
    "gradients by sample": lambda f: vmap(grad(squared(f)))(X),
    "vmap of jvp": lambda f: vmap(lambda x, t: jvp(f, (x,), (t,))[1])(X, T),
    "autograd around": outer_gradient,
    "autograd.functional": lambda f: torch.autograd.functional.jacobian(f, (X, BIAS), strategy="reverse-mode"),
    "forward-mode Jacobian": lambda f: torch.autograd.functional.jacobian(
        f, X, strategy="forward-mode", vectorize=True
    ),
}


def assert_equal(actual, expected):
    actual, expected = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch's linearize
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_linear_on_codes_transforms_as_a_linear(name, bits):
    """jvp's tangent was 0, vjp and all that build on it raised about a setup_context staticmethod."""
    ours, plain = pair(bits)
    assert_equal(TRANSFORMS[name](ours), TRANSFORMS[name](plain))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_tangents_have_the_dtype_of_x(dtype):
    ours, _ = pair(4)
    out, tangent = jvp(ours, (X.to(dtype), BIAS.to(dtype)), (T.to(dtype), TB.to(dtype)))
    assert out.dtype == tangent.dtype == dtype


def test_forward_mode_agrees_with_differences():
    stored = affine.quantize_matrix(torch.randn(N, K, dtype=torch.float64), QuantScheme(4, GROUP, False))
    x, bias = X.double().requires_grad_(), BIAS.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, b: ops.int4_linear(x, *stored, b, GROUP), (x, bias), check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True,
    )  # fmt: skip
    assert torch.autograd.gradgradcheck(lambda x, b: ops.int4_linear(x, *stored, b, GROUP).square(), (x, bias))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.a, self.b = nn.Conv1d(4, 8, 3), nn.Linear(32, 16), nn.Linear(16, 16)

    def forward(self, x):
        h = self.a(torch.tanh(self.conv(x)).flatten(1))
        return self.b(torch.sigmoid(h)) + h


@pytest.fixture(scope="module")
def graphs():
    model = Net().eval()
    gm = mq.quantize(model, torch.randn(2, 4, 6), group_size=8, skip_param_threshold=0, overrides={"b": "int8"},
                     accuracy_warning="ignore").graph_module  # fmt: skip
    return gm, mq.dequantize_model(gm)


@pytest.mark.parametrize("name", ["jvp", "jacrev", "jacfwd", "hessian", "vmap", "parameters"])
def test_a_whole_graph_transforms_as_its_float_graph(name, graphs):
    x, t = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    transform = {
        "jvp": lambda f: jvp(f, (x,), (t,)),
        "jacrev": lambda f: jacrev(f)(x),
        "jacfwd": lambda f: jacfwd(f)(x),
        "hessian": lambda f: hessian(lambda x: f(x).sum())(x[:1]),
        "vmap": lambda f: vmap(lambda row: f(row[None])[0])(x),
        "parameters": lambda f: vjp(lambda p: functional_call(f, p, (x,)), {"b.bias": f.b.bias})[1](torch.ones(2, 16)),
    }[name]
    gm, plain = graphs
    assert_equal(transform(gm), transform(plain))


# ---- what has no derivative says so


def without_derivative():
    packed, scale, zero = affine.quantize_matrix(torch.randn(N, K), QuantScheme(4, GROUP, False))
    eight = affine.quantize_matrix(torch.randn(N, K), QuantScheme(8, -1, False))
    four, linear, conv = linear_case(bits=4), linear_case(), conv_case(CONVS["plain"])
    s, z = torch.tensor([0.1]), torch.zeros(1, dtype=torch.int8)
    return {
        "dequantize_int4 weight_scale": (lambda s: ops.dequantize_int4(packed, s, zero, GROUP, K), scale),
        "dequantize_int8 weight_scale": (lambda s: ops.dequantize_int8(eight[0], s, eight[2]), eight[1]),
        "int4_linear weight_scale": (lambda s: ops.int4_linear(X, packed, s, zero, BIAS, GROUP), scale),
        "int8_linear weight_scale": (lambda s: ops.int8_linear(X, eight[0], s, eight[2], BIAS), eight[1]),
        "quantize_activation x": (lambda x: ops.quantize_activation(x, s, z).float(), X),
        "quantize_activation input_scale": (lambda s: ops.quantize_activation(X, s, z).float(), s),
        "dequantize_activation input_scale": (lambda s: ops.dequantize_activation(linear[0], s, z), s),
        "w8a8_linear input_scale": (lambda s: ops.w8a8_linear(linear[0], s, *linear[2:]), s),
        "w4a8_linear weight_scale": (lambda s: ops.w4a8_linear(*four[:4], s, *four[5:], 32), four[4]),
        "w8a8_conv weight_scale": (lambda s: ops.w8a8_conv(*conv[:4], s, *conv[5:]), conv[4]),
    }


def pulled(f, at):
    out, pull = vjp(f, at)
    return pull(torch.ones_like(out))


def with_tangent(f, at):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(at, torch.ones_like(at)))


DIRECTIONS = {
    "jvp": lambda f, at: jvp(f, (at,), (torch.ones_like(at),)),
    "vjp": pulled,
    "dual": with_tangent,
    "backward": lambda f, at: f(at.clone().requires_grad_()).sum().backward(),
}


@pytest.mark.parametrize("name", without_derivative())
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_derivative_that_is_not_there_is_refused_by_name(name, direction):
    """Tangents were dropped, which reads as a derivative of 0; gradients came back as None after a warning."""
    f, at = without_derivative()[name]
    op, argument = name.split()
    if direction == "backward" and op == "quantize_activation":
        pytest.skip("codes are whole numbers: autograd ends there, as at .to(int8)")
    with pytest.raises(NotImplementedError, match=rf"{op} has no derivative with respect to {argument} "):
        DIRECTIONS[direction](f, at)


STATIC = {
    "w8a8_linear": lambda: linear_case(),
    "w4a8_linear": lambda: (*linear_case(bits=4), 32),
    "w8a8_conv": lambda: conv_case(CONVS["plain"]),
    "w8a8_conv of one": lambda: conv_case(CONVS["1-D"], batch=()),
}


@pytest.mark.filterwarnings("ignore:INT8 activations run through float")
@pytest.mark.parametrize("name", STATIC)
def test_an_op_on_int8_inputs_has_the_derivative_of_its_bias(name):
    args, op = list(STATIC[name]()), getattr(ops, name.split()[0])
    bias, tangent = args[6], torch.randn_like(args[6])

    def f(b):
        return op(*args[:6], b, *args[7:])

    out, moved = jvp(f, (bias,), (tangent,))
    channel = (-1, *[1] * (len(args[7]) if "conv" in name else 0))
    torch.testing.assert_close(moved, tangent.view(channel).expand(out.shape))
    seed = torch.randn_like(out)
    (pulled,) = vjp(f, bias)[1](seed)
    torch.testing.assert_close((pulled * tangent).sum(), (seed * moved).sum(), rtol=1e-4, atol=1e-3)
    with_bias = [a.clone().requires_grad_() if i == 6 else a for i, a in enumerate(args)]
    torch.library.opcheck(op, with_bias)
    mapped = vmap(f)(torch.stack([bias, tangent]))
    torch.testing.assert_close(mapped, torch.stack([f(bias), f(tangent)]), rtol=1e-5, atol=1e-4)
    codes = torch.stack([args[0], args[0].flip(0)])
    both = vmap(lambda x: op(x, *args[1:]))(codes)
    torch.testing.assert_close(both, torch.stack([op(x, *args[1:]) for x in codes]))


@pytest.mark.parametrize("op", ["dequantize_int4", "int4_linear"])
def test_vmap_over_weights_is_one_call_after_the_other(op):
    stored = [affine.quantize_matrix(torch.randn(N, K), QuantScheme(4, GROUP, False)) for _ in range(3)]
    both = [torch.stack(parts) for parts in zip(*stored, strict=True)]
    call = {
        "dequantize_int4": lambda *w: ops.dequantize_int4(*w, GROUP, K),
        "int4_linear": lambda *w: ops.int4_linear(X, *w, BIAS, GROUP),
    }[op]
    assert torch.equal(vmap(call)(*both), torch.stack([call(*w) for w in stored]))


def test_int8_activations_in_a_graph_refuse_a_tangent_and_run_under_vmap():
    model, x = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)).eval(), torch.randn(60, 32)
    gm = mq.quantize(model, calibration_data=[x], bits=8, activations="int8", skip_param_threshold=0,
                     accuracy_warning="ignore").graph_module  # fmt: skip
    with pytest.raises(NotImplementedError, match="quantize_activation has no derivative with respect to x"):
        jvp(gm, (x,), (x,))
    torch.testing.assert_close(vmap(gm)(x.view(6, 10, 32)), gm(x).view(6, 10, 8))
    assert torch.isfinite(gm(x.requires_grad_())).all()  # what needs no derivative runs


def test_a_graph_whose_biases_want_gradients_compiles():
    """The joint graph is traced at once, so nothing that is not wanted may be refused there."""
    model, x = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)).eval(), torch.randn(60, 32)
    gm = mq.quantize(model, calibration_data=[x], bits=8, activations="int8", skip_param_threshold=0,
                     accuracy_warning="ignore").graph_module  # fmt: skip
    gm = copy.deepcopy(gm)
    for bias in (gm.get_submodule("0").bias, gm.get_submodule("2").bias):
        bias.requires_grad_()
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), gm(x))
