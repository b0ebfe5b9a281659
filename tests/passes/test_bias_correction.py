"""bias-correction: the mean error of each op's output goes into its bias, and nothing else changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.execution.batch import to_batch
from mono_quant_fx.execution.run import run_batch
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.annotation import annotated
from tests.harness import Snapshot, check_pass
from tests.models import MLP, ConvNet, Reused, TiedLM

#: What is left of a mean error after its correction, as a share of the output's largest value: float32 rounding of the
#: bias and of the sums.
MEAN_TOLERANCE = 1e-5

CONFIG = {"group_size": 32, "skip_param_threshold": 0, "algorithm": "rtn"}


def data(*shape, n=3):
    """Positive, as after a ReLU: their mean is what shifts a rounded layer's output."""
    return [torch.rand(shape, generator=torch.Generator().manual_seed(i)) for i in range(n)]


def stage(model, batches, *, method="auto", **fields):
    """The graph right before bias-correction."""
    config = mq.QuantConfig(**CONFIG | fields)
    gm = mq.capture(model.eval(), batches[0], method=method)
    for pass_ in mq.default_pipeline(config, batches).passes:
        if isinstance(pass_, mq.passes.Int4GroupwiseLowering):
            break
        gm = pass_(gm).graph_module
    return gm


def lower(gm):
    return mq.passes.Int4GroupwiseLowering()(gm).graph_module


def mean_errors(model, gm, batches, modules):
    """Per module of `model`: mean over batches and positions of (float - quantized) output, by hooks and by name."""
    quantized = lower(gm)
    outputs = {}

    def keep(name):
        return model.get_submodule(name).register_forward_hook(lambda m, x, y: outputs.setdefault(name, []).append(y))

    handles = [keep(name) for name in modules]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    found = {}
    rows = {use.module: use.node for _, a in annotated(quantized) for use in a.users}
    for name in modules:
        probe = tensors.clone(quantized)
        node = next(n for n in probe.graph.nodes if n.name == rows[name])
        output = next(n for n in probe.graph.nodes if n.op == "output")
        output.args = (node,)
        probe.recompile()
        ys = [run_batch(probe, to_batch(b)) for b in batches]
        error = torch.cat(outputs[name]).double() - torch.cat(ys).double()
        axis = 1 if error.dim() == 4 else error.dim() - 1
        found[name] = error.movedim(axis, 0).flatten(1).mean(1) / torch.cat(outputs[name]).abs().max()
    return found


class Conv1D(nn.Module):
    """A linear whose weight is stored as [in, out], as GPT-2 has it."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(64, 32)), nn.Parameter(torch.randn(32))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Tied(nn.Module):
    """Two linears of one weight: with a bias each, or without any."""

    def __init__(self, bias):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64, bias), nn.Linear(64, 64, bias)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


CASES = {
    "addmm": (lambda: nn.Sequential(Conv1D(), nn.ReLU(), nn.Linear(32, 8)), (16, 64), ["0", "2"]),
    "a tied weight": (lambda: Tied(bias=True), (16, 64), ["a", "b"]),
    "a tied weight without biases": (lambda: Tied(bias=False), (16, 64), ["a", "b"]),
    "linear": (MLP, (16, 64), ["fc1", "fc2"]),
    "linear without bias": (lambda: MLP(bias=False), (16, 64), ["fc1", "fc2"]),
    "convolutions": (ConvNet, (4, 3, 8, 8), ["conv", "depthwise", "up", "fc"]),
}


@pytest.mark.parametrize("method", ["symbolic", "export"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fields", [{}, {"algorithm": "gptq"}, {"activations": "int8", "bits": 8}], ids=str)
def test_no_mean_error_is_left(case, method, fields):
    torch.manual_seed(0)
    make, shape, modules = CASES[case]
    model, batches = make().eval(), data(*shape)
    before = stage(model, batches, method=method, **fields)
    corrected = check_pass(mq.passes.BiasCorrection(batches), before, args=(batches[0],), tolerance=None)
    wrong = mean_errors(model, before, batches, modules)
    right = mean_errors(model, corrected, batches, modules)
    for name in modules:
        assert right[name].abs().max() <= MEAN_TOLERANCE < wrong[name].abs().max()


def test_the_bias_is_the_old_one_plus_the_mean_error():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(64, 8)).eval(), data(16, 64)
    corrected = mq.passes.BiasCorrection(batches)(stage(model, batches)).graph_module
    weight = mq.dequantize_model(lower(corrected)).get_parameter("0.weight")
    x = torch.cat(batches)
    expected = model[0].bias + (model(x) - F.linear(x, weight, model[0].bias)).mean(0)
    torch.testing.assert_close(corrected.get_parameter("0.bias"), expected, rtol=0, atol=MEAN_TOLERANCE)


def test_later_layers_see_the_corrected_ones():
    """With the first layer's shift gone, what the second has left to correct is its own."""
    torch.manual_seed(0)
    model, batches = MLP().eval(), data(16, 64)
    corrected = lower(mq.passes.BiasCorrection(batches)(stage(model, batches)).graph_module)
    x = torch.cat(batches)
    hidden = F.relu(F.linear(x, mq.dequantize_model(corrected).get_parameter("fc1.weight"), corrected.fc1.bias))
    out = F.linear(hidden, mq.dequantize_model(corrected).get_parameter("fc2.weight"), model.fc2.bias)
    expected = model.fc2.bias + (model(x) - out).mean(0)
    torch.testing.assert_close(corrected.fc2.bias, expected, rtol=0, atol=MEAN_TOLERANCE)


def test_it_helps_where_inputs_have_a_mean():
    torch.manual_seed(0)
    model, batches = MLP().eval(), data(32, 64)
    plain, corrected = (
        mq.quantize(model, calibration_data=batches, bias_correction=on, accuracy_warning="ignore", **CONFIG)
        for on in (False, True)
    )
    assert corrected.info.sqnr_db > plain.info.sqnr_db + 1
    row = corrected.accuracy.rows[0]
    assert row.bias_gain_db > 1 and "bias dB" in str(corrected.accuracy)
    assert plain.accuracy.rows[0].bias_gain_db is None and "bias dB" not in str(plain.accuracy)


def test_a_bias_that_is_added_has_the_modules_name_and_fuses():
    model, batches = MLP(bias=False).eval(), data(16, 64)
    result = mq.quantize(model, calibration_data=batches, bias_correction=True, accuracy_warning="ignore", **CONFIG)
    assert {"fc1.bias", "fc2.bias"} <= set(result.graph_module.state_dict())
    assert mq.format_graph(result.graph_module).count("int4_linear(") == 2


class Odd(nn.Module):
    """Every way not to have a bias that a correction could go into."""

    def __init__(self):
        super().__init__()
        for name in ("matmul", "scaled", "computed", "wide", "constant"):
            setattr(self, name, nn.Parameter(torch.randn(64, 16 if name == "scaled" else 64)[:, :16]))
        self.called, self.b = nn.Linear(64, 64, bias=False), nn.Parameter(torch.randn(16))
        self.rows, self.c = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(4))
        self.register_buffer("x", torch.rand(8, 64))

    def forward(self, x):
        x = self.called(self.called(x))
        y = x @ self.matmul + torch.addmm(self.b, x, self.scaled, beta=0.5)
        y = y + torch.addmm(self.c.repeat(4), x, self.computed) + torch.addmm(self.rows, x, self.wide)
        return y + F.linear(self.x * 2, self.constant.t())


ODD = {
    "matmul": "matmul takes none", "scaled": "addmm scales it", "computed": "it is computed",
    "wide": "its shape is [8, 16], not [16]", "constant": "the input of linear is constant",
    "called.weight": "linear has none, and is called 2 times",
}  # fmt: skip


@pytest.mark.parametrize("fields", [{}, {"algorithm": "gptq"}, {"activations": "int8"}], ids=str)
@pytest.mark.parametrize(
    ("model", "reasons"), [(Odd, ODD), (Reused, {"fc.weight": "3 ops share it"})], ids=["odd", "shared"]
)
def test_what_cannot_be_corrected_says_so(model, reasons, fields):
    torch.manual_seed(0)
    before = stage(model().eval(), data(8, 64), **fields)
    after = mq.passes.BiasCorrection(data(8, 64))(before).graph_module
    said = {a.weight: a.reason.rpartition("bias not corrected: ")[2] for _, a in annotated(after) if a.scheme}
    assert said == reasons
    assert all(a.bias_gain_db == 0 for _, a in annotated(after) if a.scheme)
    assert torch.equal(before(data(8, 64)[0]), after(data(8, 64)[0]))


def test_an_embedding_has_no_bias_and_the_head_that_shares_its_weight_gets_one():
    torch.manual_seed(0)
    ids = [torch.arange(12).view(2, 6)]
    result = mq.quantize(
        TiedLM().eval(), calibration_data=ids, bias_correction=True, default_skips=False, accuracy_warning="ignore",
        **CONFIG,
    )  # fmt: skip
    assert {row.reason for row in result.accuracy.rows} <= {"", "shares the weight of embedding"}
    assert result.graph_module.get_parameter("head.bias").shape == (40,)


def test_a_buffer_stays_a_buffer_and_a_name_that_is_taken_is_left_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.w_bias = nn.Parameter(torch.rand(32, 64)), nn.Parameter(torch.rand(32))
            self.v = nn.Parameter(torch.rand(32, 64))
            self.register_buffer("c", torch.zeros(32))

        def forward(self, x):
            return F.linear(x, self.w) * self.w_bias + F.linear(x, self.v, self.c)

    model, batches = Model().eval(), data(16, 64)
    before = stage(model, batches)
    after = mq.passes.BiasCorrection(batches)(before).graph_module
    assert set(after.state_dict()) == {"w", "v", "w_bias", "w_bias_1", "c"}
    assert set(dict(after.named_buffers())) == {"c"}
    assert after.w_bias is model.w_bias
    assert not torch.equal(after.c, before.c)


def test_an_error_that_is_all_mean_is_taken_away():
    """On one sample. Where nothing is wrong, nothing is gained."""
    torch.manual_seed(0)
    one = data(1, 64, n=1)
    (row,) = mq.quantize(
        nn.Sequential(nn.Linear(64, 8)).eval(), calibration_data=one, evaluation_data=one,
        bias_correction=True, accuracy_warning="ignore",
        **CONFIG,
    ).accuracy.rows  # fmt: skip
    assert row.bias_gain_db == float("inf")
    exact = nn.Sequential(nn.Linear(64, 8)).eval()
    nn.init.zeros_(exact[0].weight)
    ((_, annotation),) = annotated(mq.passes.BiasCorrection(one)(stage(exact, one)).graph_module)
    assert annotation.bias_gain_db == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models(dtype):
    torch.manual_seed(0)
    model, batches = MLP().to(dtype).eval(), [x.to(dtype) for x in data(32, 64)]
    corrected = check_pass(mq.passes.BiasCorrection(batches), stage(model, batches), args=(batches[0],), tolerance=None)
    assert corrected.fc1.bias.dtype is dtype
    assert not torch.equal(corrected.fc1.bias, model.fc1.bias)


def test_the_model_stays_as_it_is_and_two_runs_agree():
    model, batches = MLP().eval(), data(16, 64)
    before = Snapshot(model)
    first, second = (mq.passes.BiasCorrection(batches)(stage(model, batches)).graph_module for _ in range(2))
    before.check(model)
    assert torch.equal(first.fc2.bias, second.fc2.bias)


def test_nan_names_node_and_batch():
    batches = data(16, 64)
    gm = stage(MLP().eval(), batches)
    bad = [batches[0], torch.full((16, 64), float("nan"))]
    with pytest.raises(mq.CalibrationError, match="batch 1: the output of node 'linear' holds NaN or infinity"):
        mq.passes.BiasCorrection(bad)(gm)


def test_it_needs_annotations_and_data():
    with pytest.raises(mq.PreconditionError, match="no weight is annotated; run skip-annotation first"):
        mq.passes.BiasCorrection(data(4, 64))(mq.capture(MLP().eval()))
    with pytest.raises(mq.ConfigError, match="bias_correction=True needs calibration_data"):
        mq.quantize(MLP().eval(), bias_correction=True)
