"""Where weights are found, how each is viewed as a matrix, and that every form is rounded as its matrix says."""

from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.graph.weight_ops import find_weights, from_matrix, hidden_weights, matrix_shape, to_matrix
from mono_quant_fx.numerics.affine import dequantize_weight

#: The fused op sums tile by tile, the float op at once; everything else is exact.
TOLERANCE = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:capture. the model fixes")
BY_METHOD = pytest.mark.parametrize("method", ["symbolic", "export"])


class Calls(nn.Module):
    """One weight and one call of it."""

    def __init__(self, shape, call, buffer=False):
        super().__init__()
        if buffer:
            self.register_buffer("w", torch.randn(shape))
        else:
            self.w = nn.Parameter(torch.randn(shape))
        self.call = call

    def forward(self, *inputs):
        return self.call(self.w, *inputs)


class OneInput(Calls):
    def forward(self, x):
        return self.call(self.w, x)


class Form(NamedTuple):
    """A model of one weight, its inputs, and what the table of weight ops says of it."""

    model: nn.Module
    inputs: tuple
    layer_type: str
    layout: str = "rows"
    groups: int = 1


def on(shape, call, *size, layer_type="Linear", layout="rows", buffer=False):
    return Form(OneInput(shape, call, buffer), (torch.randn(*size),), layer_type, layout)


def ids(*size):
    return torch.randint(0, 40, size)


def layer(module, *size, layout="rows", groups=1):
    return Form(module, (torch.randn(*size),), type(module).__name__, layout, groups)


FORMS = {
    "linear": lambda: layer(nn.Linear(32, 48), 3, 32),
    "linear of a transpose": lambda: on((32, 48), lambda w, x: F.linear(x, w.t()), 3, 32, layout="columns"),
    "addmm": lambda: on((32, 48), lambda w, x: torch.addmm(torch.ones(48), x, w), 3, 32, layout="columns"),
    "addmm onto a matrix": lambda: on((32, 48), lambda w, x: torch.addmm(x[:, :1], x, w), 3, 32, layout="columns"),
    "addmm of a transpose": lambda: on((48, 32), lambda w, x: torch.addmm(x[:, :1], x, w.transpose(0, 1)), 3, 32),
    "x @ w": lambda: on((32, 48), lambda w, x: x @ w, 2, 3, 32, layout="columns"),
    "x @ w.t()": lambda: on((48, 32), lambda w, x: x @ w.t(), 3, 32),
    "x @ w.T": lambda: on((48, 32), lambda w, x: x @ w.T, 3, 32),
    "x @ w.permute": lambda: on((48, 32), lambda w, x: x @ w.permute(1, 0), 3, 32),
    "transposed twice": lambda: on((32, 48), lambda w, x: x @ w.t().t(), 3, 32, layout="columns"),
    "mm": lambda: on((32, 48), lambda w, x: x.mm(w), 3, 32, layout="columns"),
    "matmul by keyword": lambda: on((32, 48), lambda w, x: torch.matmul(x, other=w), 3, 32, layout="columns"),
    "w @ x": lambda: on((48, 32), lambda w, x: w @ x, 32, 3),
    "w.t() @ x": lambda: on((32, 48), lambda w, x: w.t() @ x, 32, 3, layout="columns"),
    "a buffer": lambda: on((32, 48), lambda w, x: x @ w, 3, 32, layout="columns", buffer=True),
    "conv1d": lambda: layer(nn.Conv1d(16, 32, 4, padding="same"), 2, 16, 9),
    "conv2d": lambda: layer(nn.Conv2d(16, 32, 3, padding=1), 2, 16, 6, 5),
    "conv2d in groups": lambda: layer(nn.Conv2d(32, 32, 4, groups=4, stride=2), 2, 32, 8, 8, groups=1),
    "conv3d": lambda: layer(nn.Conv3d(16, 32, 2), 2, 16, 4, 4, 4),
    "conv_transpose1d": lambda: layer(nn.ConvTranspose1d(16, 32, 4), 2, 16, 5, layout="transposed_conv"),
    "conv_transpose2d": lambda: layer(nn.ConvTranspose2d(16, 32, 2, stride=2), 2, 16, 5, 4, layout="transposed_conv"),
    "conv_transpose2d in groups": lambda: layer(
        nn.ConvTranspose2d(32, 16, 4, groups=4), 2, 32, 5, 4, layout="transposed_conv", groups=4
    ),
    "conv_transpose3d": lambda: layer(nn.ConvTranspose3d(16, 32, 2), 1, 16, 3, 3, 3, layout="transposed_conv"),
    "embedding": lambda: Form(nn.Embedding(40, 32, padding_idx=3), (ids(2, 5),), "Embedding"),
    "embedding_bag": lambda: Form(nn.EmbeddingBag(40, 32, mode="sum"), (ids(3, 5),), "EmbeddingBag"),
    "bilinear": lambda: Form(nn.Bilinear(8, 16, 12), (torch.randn(3, 8), torch.randn(3, 16)), "Bilinear"),
}  # fmt: skip


@BY_METHOD
@pytest.mark.parametrize("name", FORMS)
def test_the_weight_is_found_with_its_matrix_view(name, method):
    form = FORMS[name]()
    gm = mq.capture(form.model.eval(), form.inputs, method=method)
    (weight,) = [w for w in find_weights(gm) if w.tensor.dim() > 1]
    (use,) = weight.uses
    assert (use.layer_type, use.layout, use.groups, use.reason) == (form.layer_type, form.layout, form.groups, "")
    assert weight.name in ("w", "weight")
    assert weight.tensor.data_ptr() == dict(form.model.state_dict())[weight.name].data_ptr()


@BY_METHOD
@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("name", FORMS)
def test_the_quantized_op_is_the_float_op_on_the_rounded_weight(name, group_size, method):
    form = FORMS[name]()
    model = form.model.eval()
    gm = mq.capture(model, form.inputs, method=method)
    result = mq.quantize(gm, group_size=group_size, skip_param_threshold=0, default_skips=False)
    (row,) = [r for r in result.accuracy.rows if len(r.shape) > 1]
    assert row.scheme == ("int4 channel sym" if group_size == -1 else "int4 g16 sym"), row.reason
    rounded = mq.dequantize_model(result.graph_module).state_dict()[row.weight]
    parameter = dict(model.state_dict(keep_vars=True))[row.weight]
    matrix = to_matrix(parameter.detach(), form.layout, form.groups)
    stored = mq.quantize_weight_int4(matrix, group_size)
    with torch.no_grad():
        reference = model(*form.inputs)
        on_grid = dequantize_weight(stored, group_size, matrix.shape[1])
        assert torch.equal(to_matrix(rounded, form.layout, form.groups), on_grid)
        parameter.copy_(rounded)
        expected = model(*form.inputs)
        actual = result.graph_module(*form.inputs)
    assert not torch.equal(expected, reference)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


@st.composite
def views(draw):
    layout = draw(st.sampled_from(["rows", "columns", "transposed_conv"]))
    size = st.integers(1, 5)
    if layout == "columns":
        return layout, 1, (draw(size), draw(size))
    if layout == "rows":
        return layout, 1, (draw(size), draw(size), *draw(st.lists(size, max_size=3)))
    groups = draw(st.integers(1, 3))
    return layout, groups, (groups * draw(size), draw(size), *draw(st.lists(size, min_size=1, max_size=3)))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(view=views())
def test_from_matrix_is_the_inverse_of_to_matrix(view):
    layout, groups, shape = view
    weight = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    matrix = to_matrix(weight, layout, groups)
    assert tuple(matrix.shape) == matrix_shape(shape, layout, groups)
    back = from_matrix(matrix.contiguous(), layout, groups, shape, lambda op, *args: op(*args))
    assert torch.equal(back, weight)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(groups=st.integers(1, 3), ins=st.integers(1, 3), outs=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_row_of_a_transposed_convolution_is_one_output_channel(groups, ins, outs, seed):
    torch.manual_seed(seed)
    conv = nn.ConvTranspose1d(groups * ins, groups * outs, 2, groups=groups, bias=False)
    x = torch.randn(1, groups * ins, 4)
    for channel in range(groups * outs):
        with torch.no_grad():
            matrix = torch.zeros(groups * outs, ins * 2)
            matrix[channel] = 1
            conv.weight.copy_(
                from_matrix(matrix, "transposed_conv", groups, tuple(conv.weight.shape), lambda op, *a: op(*a))
            )
            y = conv(x)[0]
        others = [c for c in range(groups * outs) if c != channel]
        assert y[channel].abs().max() > 0
        assert y[others].abs().sum() == 0


class Mixed(nn.Module):
    """Uses that are no weight's place, and a module that hides its weights."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(32, 32))
        self.w = nn.Parameter(torch.randn(4, 32, 32))
        self.vector = nn.Parameter(torch.randn(32))
        self.unused = nn.Parameter(torch.randn(32, 32))
        self.register_buffer("table", torch.randn(5, 32))
        self.norm = nn.LayerNorm(32)
        self.rnn = nn.GRU(32, 32)

    def forward(self, x):
        x = self.norm(x * self.scale) @ self.w + self.vector + self.table[:1]
        return self.rnn(x)[0]


def test_what_cannot_be_lowered_is_found_with_a_reason():
    gm = mq.capture(Mixed().eval(), method="symbolic")
    found = {w.name: [use.reason for use in w.uses] for w in find_weights(gm)}
    assert found == {
        "scale": ["mul is no op that takes a quantized weight"],
        "w": ["a 3-D constant in matmul has no rows to group"],
        "vector": ["a 1-D constant in add has no rows to group"],
    }
    assert [str(node.target) for node, _ in hidden_weights(gm)] == ["norm", "rnn"]


@BY_METHOD
def test_a_bias_is_no_weight(method):
    model = nn.Sequential(nn.Linear(32, 32), nn.Conv1d(3, 3, 1)).eval()
    gm = mq.capture(model, torch.randn(2, 3, 32), method=method)
    assert [w.name for w in find_weights(gm)] == ["0.weight", "1.weight"]


def test_an_assertion_about_a_weight_is_no_use_of_it():
    gm = mq.capture(nn.Linear(32, 32).eval(), torch.randn(2, 32), method="export")
    (weight,) = find_weights(gm)
    with gm.graph.inserting_after(weight.node):
        check = torch.ops.aten._assert_tensor_metadata.default
        gm.graph.call_function(check, (weight.node, None, None, torch.float32))
    gm.recompile()
    assert [use.op for use in find_weights(gm)[0].uses] == ["aten.linear"]
    assert not [n for n in mq.capture(gm).graph.nodes if n.target is check], "capture takes it out"
