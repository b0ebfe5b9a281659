"""What a pass must read from the graph and from nothing else: which argument, which axis, which use, which batch.

Each section is a kind of fault; its docstrings tell what went wrong.
"""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import fx, nn

import mono_quant_fx as mq
from mono_quant_fx import ops
from mono_quant_fx.graph.annotation import annotated
from mono_quant_fx.graph.permutations import composed, permutation
from mono_quant_fx.graph.weight_ops import find_weights

pytestmark = pytest.mark.filterwarnings("ignore:capture. the model fixes")
FEW = settings(max_examples=25, derandomize=True, deadline=None)
#: Everything is quantized, at any size.
ALL = {"group_size": 16, "skip_param_threshold": 0, "default_skips": False, "accuracy_warning": "ignore"}
#: dB that 8 bits reach on random weights (about 45), and what a wrong axis leaves far behind.
LEAST_INT8_DB = 35.0
#: The same sums in another order, in dB.
SAME_DB = 0.02


class Uses(nn.Module):
    """A weight, and one call that reads it."""

    def __init__(self, call, *shape):
        super().__init__()
        self.w, self.call = nn.Parameter(torch.randn(shape) / 8), call

    def forward(self, *inputs):
        return self.call(self.w, *inputs)


class Use(Uses):
    def forward(self, x):
        return self.call(self.w, x)


def quantized(model, *inputs, method="symbolic", **fields):
    gm = mq.capture(model.eval(), inputs, method=method)
    return mq.quantize(gm, **{**ALL, **fields})


# --- a permutation is what its arguments say, in every spelling -------------------------------------------------------

SPELLINGS = {
    "F.linear of permute(0, 1)": lambda w, x: F.linear(x, w.permute(0, 1)),
    "F.linear of permute(1, 0)": lambda w, x: F.linear(x, w.permute(1, 0)),
    "permute of a tuple": lambda w, x: F.linear(x, w.permute((1, 0))),
    "permute of a list": lambda w, x: F.linear(x, torch.permute(w, [0, -1])),
    "permute by keyword": lambda w, x: F.linear(x, torch.permute(w, dims=(0, 1))),
    "permute all by keyword": lambda w, x: F.linear(x, torch.permute(input=w, dims=(1, 0))),
    "method by keyword": lambda w, x: F.linear(x, w.permute(dims=(-1, -2))),
    "transpose(0, 0)": lambda w, x: F.linear(x, w.transpose(0, 0)),
    "transpose(0, -2)": lambda w, x: F.linear(x, w.transpose(0, -2)),
    "transpose(-1, 0)": lambda w, x: F.linear(x, w.transpose(-1, 0)),
    "transpose by keyword": lambda w, x: F.linear(x, torch.transpose(w, dim0=1, dim1=-1)),
    "transpose half by keyword": lambda w, x: F.linear(x, w.transpose(0, dim1=1)),
    "swapaxes": lambda w, x: F.linear(x, w.swapaxes(axis0=0, axis1=1)),
    "swapdims": lambda w, x: F.linear(x, torch.swapdims(w, 1, 1)),
    "movedim": lambda w, x: F.linear(x, w.movedim(0, 1)),
    "movedim of tuples": lambda w, x: F.linear(x, torch.movedim(w, (0, 1), (0, 1))),
    "moveaxis": lambda w, x: F.linear(x, torch.moveaxis(w, source=0, destination=-1)),
    "adjoint": lambda w, x: F.linear(x, w.adjoint()),
    "T, mT, t and H": lambda w, x: F.linear(x, w.T.mT.t().H),
    "mH": lambda w, x: F.linear(x, w.mH),
    "aten": lambda w, x: F.linear(x, torch.ops.aten.permute.default(w, [0, 1])),
    "aten by keyword": lambda w, x: torch.ops.aten.linear.default(x, torch.ops.aten.transpose.int(w, dim0=0, dim1=0)),
    "linear by keyword": lambda w, x: F.linear(weight=w.t(), input=x),
    "mm by keyword": lambda w, x: torch.mm(x, mat2=w.permute(0, 1)),
    "mm all by keyword": lambda w, x: torch.mm(mat2=w, input=x),
    "matmul by keyword": lambda w, x: torch.matmul(other=w.transpose(1, 1), input=x),
    "method mm": lambda w, x: x.mm(mat2=w.mT),
    "linalg.matmul": lambda w, x: torch.linalg.matmul(x, w.mT),
    "addmm by keyword": lambda w, x: torch.addmm(input=x[0], mat2=w.permute(1, 0), mat1=x),
    "method addmm": lambda w, x: x[0].addmm(x, mat2=w.permute(0, 1)),
    "aten.mm by keyword": lambda w, x: torch.ops.aten.mm.default(self=x, mat2=w),
}  # fmt: skip


@pytest.mark.parametrize("method", ["symbolic", "export"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_a_transpose_means_what_torch_means(name, method):
    """F.linear(x, w.permute(0, 1)) was taken for a transposition: -2.6 dB with a square weight, and nothing said."""
    model, x = Use(SPELLINGS[name], 32, 32).eval(), torch.randn(8, 32)
    result = quantized(model, x, method=method, bits=8)
    (row,) = [row for row in result.accuracy.rows if row.weight == "w"]
    assert row.scheme == "int8 channel", row.reason
    assert mq.sqnr_db(model(x), result.graph_module(x)) > LEAST_INT8_DB
    fused = ops.int8_linear in {n.target for n in result.graph_module.graph.nodes}
    assert fused != ("addmm" in name), "it fuses in every spelling, but not with a bias that is computed"


@FEW
@given(st.data())
def test_permutations_read_from_a_graph_are_those_that_torch_makes(data):
    """The law: for any number of axes and any chain, the axes that are read off are those of the value."""
    dims = data.draw(st.integers(1, 4))
    axis = st.integers(-dims, dims - 1)
    order = st.permutations(range(dims)).map(lambda p: [a - dims * (i % 2) for i, a in enumerate(p)])
    steps = data.draw(st.lists(st.one_of(
        st.tuples(st.sampled_from(["permute", "permute*", "permute="]), order),
        st.tuples(st.sampled_from(["transpose", "swapaxes", "swapdims", "movedim", "moveaxis"]), st.tuples(axis, axis)),
    ), min_size=1, max_size=3))  # fmt: skip
    graph, source = fx.Graph(), torch.randn(tuple(range(2, 2 + dims)))
    node, value = graph.placeholder("x"), source
    found = tuple(range(dims))
    for name, numbers in steps:
        spelling = name.strip("*=")
        value = getattr(value, spelling)(*([numbers] if spelling == "permute" else numbers))
        args, kwargs = ((node, *numbers), {}) if name[-1] != "=" else ((node,), {"dims": list(numbers)})
        node = graph.call_method(spelling, args, kwargs)
        found = composed(found, permutation(node, dims))
    assert tuple(source.shape[a] for a in found) == tuple(value.shape)
    assert torch.equal(source.permute(found), value)


def test_a_convolution_of_permuted_kernels_says_so():
    """More axes than two: what moves nothing is looked through, what moves something has a reason."""
    same = Use(lambda w, x: F.conv1d(x, w.permute(0, -2, 2)), 16, 8, 3)
    moved = Use(lambda w, x: F.conv1d(x, w.permute(2, 1, 0)), 3, 8, 16)
    x = torch.randn(2, 8, 9)
    assert mq.sqnr_db(same.eval()(x), quantized(same, x, bits=8).graph_module(x)) > LEAST_INT8_DB
    ((use,),) = [w.uses for w in find_weights(mq.capture(moved.eval(), x, method="symbolic"))]
    assert use.reason == "conv1d reads it with its axes in the order [2, 1, 0]"


# --- only the activation's argument becomes INT8 ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["symbolic", "export"])
@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_the_residual_of_addmm_stays_float(method, algorithm):
    """addmm(x, x, w) adds x itself: INT8 activations rounded the residual along with the factor."""
    model, x = Use(lambda w, x: torch.addmm(x, x, w / 1), 32, 32).eval(), torch.randn(64, 32)
    model = Use(lambda w, x: torch.addmm(x, x, w), 32, 32).eval()
    with torch.no_grad():
        model.w.mul_(1e-3)  # the residual is nearly all of the output
    gm = mq.capture(model, x, method=method)
    result = mq.quantize(gm, calibration_data=[x], evaluation_data=[x], activations="int8", algorithm=algorithm, **ALL)
    assert mq.sqnr_db(model(x), result.graph_module(x)) > 60
    (call,) = [n for n in result.graph_module.graph.nodes if "addmm" in str(n.target)]
    residual, factor, _ = call.args
    assert residual.op == "placeholder" and factor.target is ops.dequantize_activation


def test_a_bias_that_is_the_input_stays_float():
    """The same of a linear whose bias is the vector it multiplies."""
    model, x = Use(lambda w, x: F.linear(x, w, x), 32, 32).eval(), torch.randn(32)
    result = mq.quantize(
        mq.capture(model, x), calibration_data=[x], evaluation_data=[x], activations="int8", algorithm="rtn", **ALL
    )
    (call,) = [n for n in result.graph_module.graph.nodes if n.target is ops.w4a8_linear]
    assert call.args[6].op == "placeholder"


def test_a_weight_that_its_op_reads_twice_is_left_alone_with_a_reason():
    model = Use(lambda w, x: torch.addmm(w, x, w), 32, 32)
    ((use,),) = [w.uses for w in find_weights(mq.capture(model.eval(), torch.randn(32, 32)))]
    assert use.layout is None and use.reason.endswith("reads it as another argument too")


# --- the gain that GPTQ claims is the gain there is -------------------------------------------------------------------


def measured_gain(model, x, method="symbolic", **fields):
    """(claimed, measured) dB by which GPTQ's output error is below rounding's, on the calibration input itself."""
    gm = mq.capture(model.eval(), x, method=method)
    fields = {**ALL, **fields}
    with torch.no_grad():
        exact = gm(x).double()
        data = {"calibration_data": [x], "evaluation_data": [x]}
        results = [mq.quantize(gm, **data, algorithm=a, **fields) for a in ("gptq", "rtn")]
        errors = [(r.graph_module(x).double() - exact).square().sum() for r in results]
    (row,) = [row for row in results[0].accuracy.rows if row.scheme.startswith("int4")]
    assert row.algorithm == "gptq", row.reason
    return row.gain_db, float(10 * torch.log10(errors[1] / errors[0]))


LEFT = {
    "w @ x": (lambda w, x: w @ x, (64, 64), (64, 20)),
    "w @ batches": (lambda w, x: w @ x, (32, 48), (5, 48, 7)),
    "w @ vector": (lambda w, x: w @ x, (32, 48), (48,)),
    "w.t() @ x": (lambda w, x: w.t() @ x, (48, 32), (3, 48, 9)),
    "mm(w, x)": (lambda w, x: torch.mm(w, mat2=x), (32, 48), (48, 30)),
    "matmul by keyword": (lambda w, x: torch.matmul(input=w, other=x), (32, 48), (48, 30)),
    "x @ w": (lambda w, x: x @ w, (48, 32), (4, 5, 48)),
    "vector @ w": (lambda w, x: x @ w, (48, 32), (48,)),
    "x.mT @ w": (lambda w, x: x.mT @ w, (48, 32), (4, 48, 5)),
}  # fmt: skip


@pytest.mark.parametrize("method", ["symbolic", "export"])
@pytest.mark.parametrize("name", LEFT)
def test_a_weight_on_the_left_sums_over_the_second_last_axis(name, method):
    """w @ x had the Hessian of the last axis: 20.0 dB where rounding has 20.6, and a claimed gain of 1.2 dB."""
    call, shape, size = LEFT[name]
    claimed, measured = measured_gain(Use(call, *shape), torch.randn(size) * torch.rand(size), method)
    assert claimed == pytest.approx(measured, abs=SAME_DB) and measured > 1


@pytest.mark.parametrize(("axis", "call"), [(-2, lambda w, x: w @ x), (-1, lambda w, x: x @ w.t())])
def test_an_energy_observer_looks_along_the_axis_that_the_weight_sums_over(axis, call):
    x = torch.randn(3, 16, 16) * torch.rand(16, 16)
    gm = mq.passes.SkipAnnotation(mq.QuantConfig(**ALL))(mq.capture(Use(call, 32, 16).eval(), x))
    seen = mq.passes.CalibrationExecution([x])(mq.passes.ObserverInsertion("energy")(gm)).graph_module
    ((_, annotation),) = annotated(seen)
    expected = x.square().movedim(axis, 0).flatten(1).mean(1)
    assert torch.allclose(torch.tensor(annotation.observed[0].statistics["energy"]), expected)


windows = st.fixed_dictionaries({
    "dims": st.integers(1, 3), "kernel": st.integers(1, 3), "stride": st.integers(1, 3),
    "padding": st.sampled_from([0, 1, 2, "same", "valid"]), "dilation": st.integers(1, 2),
    "groups": st.sampled_from([1, 2]), "transposed": st.booleans(), "batch": st.booleans(),
    "mode": st.sampled_from(["zeros", "circular", "reflect"]),
    "method": st.sampled_from(["symbolic", "symbolic", "export"]),
})  # fmt: skip


@settings(max_examples=20, derandomize=True, deadline=None)
@given(windows)
def test_the_gain_of_a_convolution_is_what_one_measures(window):
    """Paddings in words, inputs without a batch: rounded plainly in silence, or IndexError. Any window is computed."""
    dims, transposed = window["dims"], window["transposed"]
    options = {"stride": window["stride"], "padding": window["padding"], "dilation": window["dilation"],
               "groups": window["groups"]}  # fmt: skip
    if transposed:
        options["padding"] = options["padding"] if isinstance(options["padding"], int) else 0
        options["output_padding"] = int(options["stride"] > 1)
    else:
        options["padding_mode"] = window["mode"]
        options["stride"] = 1 if options["padding"] == "same" else options["stride"]
    name = f"Conv{'Transpose' if transposed else ''}{dims}d"
    torch.manual_seed(0)
    channels = 16 * window["groups"]
    model = getattr(nn, name)(channels, 8, min(window["kernel"], 4 - dims), **options)
    x = torch.randn(*([2] if window["batch"] else []), channels, *(9, 8, 7)[:dims])
    claimed, measured = measured_gain(model, x, window["method"])
    assert claimed == pytest.approx(measured, abs=SAME_DB)


def test_a_weight_that_is_a_bias_as_well_is_left_alone_with_a_reason():
    """A bias that another op multiplies: the op that adds it got the rounded one."""
    model = Use(lambda w, x: torch.addmm(w, x, x.t()) + F.linear(x, w), 32, 32)
    ((*uses,),) = [w.uses for w in find_weights(mq.capture(model.eval(), torch.randn(32, 32)))]
    assert [use.reason.endswith("addmm reads it as its bias") for use in uses] == [True, False]
    with pytest.raises(mq.NothingQuantizedError, match="reads it as its bias"):
        quantized(model, torch.randn(32, 32))
