"""capture: both ways to a graph, when "auto" takes which, and that the model is untouched."""

import copy
import threading
import types
import warnings

import pytest
import torch
from torch import fx, nn

import mono_quant_fx as mq
from mono_quant_fx.execution.batch import leaves
from tests.capture_models import CASES, Attention, Branches, KeywordOnly, OneLinear, Random, r
from tests.harness import Snapshot
from tests.models import MLP, ConvNet, Reused, TiedLM

#: Export decomposes attention and may order a sum differently.
TOLERANCE = 1e-5
METHODS = pytest.mark.parametrize("method", ["symbolic", "export", "auto"])
pytestmark = pytest.mark.filterwarnings("ignore:capture. the model fixes")


def call(model, inputs):
    """The model on an example as capture takes it: a tensor, a tuple or a dict."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def assert_same(gm, model, inputs):
    with torch.no_grad():
        actual, expected = call(gm, inputs), call(model, inputs)
    assert type(actual) is type(expected)
    torch.testing.assert_close(leaves(actual), leaves(expected), rtol=TOLERANCE, atol=TOLERANCE)


def is_exported(gm):
    return any("aten." in str(n.target) for n in gm.graph.nodes)


RUNS = [(name, method) for name, case in CASES.items() for method in case[2].split()]


@pytest.mark.parametrize(("name", "method"), RUNS)
def test_from_one_sample_to_any_batch_and_length(name, method):
    kind, inputs, _ = CASES[name]
    model, example = kind().eval(), inputs(1, 5)
    before = Snapshot(model)
    gm = mq.capture(model, example, method=method)
    before.check(model)
    for batch, length in ((1, 5), (3, 7), (4, 4)):
        assert_same(gm, model, inputs(batch, length))
    again = mq.capture(gm)
    assert mq.format_graph(again) == mq.format_graph(gm)
    names = [n.target for n in gm.graph.nodes if n.op == "get_attr"]
    assert len(names) == len(set(names))
    assert {gm.get_parameter(n) for n, _ in gm.named_parameters()} <= set(model.parameters())


@pytest.mark.parametrize(("name", "method"), RUNS)
def test_the_data_reaches_calibration_and_the_table(name, method):
    kind, inputs, _ = CASES[name]
    model = kind().eval()
    gm = mq.capture(model, inputs(1, 5), method=method)
    result = mq.quantize(gm, calibration_data=[inputs(2, 5), inputs(3, 7)], group_size=16, skip_param_threshold=0)
    assert (result.info.calibration_samples_used, result.info.evaluation_samples) == (4, 1)
    assert result.info.sqnr_db > 10
    quantized = [row for row in result.accuracy.rows if row.scheme.startswith("int4")]
    assert quantized and all(10 < row.local_sqnr_db < 60 for row in quantized)
    assert_same(result.graph_module, mq.dequantize_model(result.graph_module), inputs(3, 7))


@pytest.mark.parametrize("method", ["symbolic", "auto"])
def test_optional_arguments_that_the_example_leaves_out_keep_their_defaults(method):
    model, x = KeywordOnly().eval(), r(2, 5)
    gm = mq.capture(model, {"x": x, "scale": x}, method=method)
    assert [n.target for n in gm.graph.nodes if n.op == "placeholder"] == ["x", "scale"]
    assert mq.format_graph(mq.capture(model, method=method)) == mq.format_graph(gm), "and so without an example"


@METHODS
def test_keywords_given_in_another_order_keep_the_models_own(method):
    model = KeywordOnly().eval()
    gm = mq.capture(model, {"shift": r(2, 5), "scale": r(2, 5), "x": r(2, 5)}, method=method)
    x, scale, shift = r(3, 4), r(3, 4), r(3, 4)
    assert_same(gm, model, {"scale": scale, "shift": shift, "x": x})
    assert torch.equal(gm(x, scale, shift), gm(x, scale=scale, shift=shift))


def test_auto_prefers_the_symbolic_way_and_takes_export_where_it_must():
    assert not is_exported(mq.capture(MLP().eval(), torch.randn(1, 64)))
    assert is_exported(mq.capture(Branches().eval(), r(1, 5)))
    assert not is_exported(mq.capture(Attention().eval())), "without an example there is no choice"
    opened = mq.capture(Attention().eval(), r(1, 5))
    assert {"attention.in_proj_weight", "attention.out_proj.weight", "fc.weight"} <= set(opened.state_dict())
    assert [n.op for n in opened.graph.nodes].count("call_module") == 1, "only the guards"


@pytest.mark.parametrize("stack", [False, True])
def test_encoder_layers_are_opened(stack):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = (nn.TransformerEncoder(layer, 2) if stack else layer).eval()
    gm = mq.capture(model, r(1, 5))
    assert_same(gm, model, r(3, 7))
    rows = mq.quantize(gm, group_size=16, skip_param_threshold=0).accuracy.rows
    linears = [row.weight.rpartition("layers.")[2] for row in rows if row.scheme.startswith("int4")]
    assert len(linears) == (8 if stack else 4)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_in_the_table_with_the_reason_and_stay_as_they_are(kind):
    class Model(OneLinear):
        def __init__(self):
            super().__init__()
            self.rnn = kind(32, 32, batch_first=True, num_layers=2, bidirectional=False)

        def forward(self, x):
            return self.fc(self.rnn(x)[0])

    model = Model().eval()
    before, flat = Snapshot(model), [id(w) for w in model.rnn._flat_weights]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what was tried and not taken is no news
        gm = mq.capture(model, r(1, 5))
    result = mq.quantize(model, r(1, 5), calibration_data=[r(2, 5)], group_size=16, skip_param_threshold=0)
    before.check(model)
    assert [id(w) for w in model.rnn._flat_weights] == flat
    assert_same(gm, model, r(3, 7))
    row = next(row for row in result.accuracy.rows if row.module == "rnn")
    assert row.reason == f"not reachable: {kind.__name__} hides its weights from the graph"
    exported = mq.quantize(mq.capture(model, r(2, 5), method="export"), group_size=16, skip_param_threshold=0)
    shown = {row.weight: row.reason for row in exported.accuracy.rows if row.weight.startswith("rnn.weight")}
    assert len(shown) == 4
    assert all("is no op that takes a quantized weight" in reason for reason in shown.values())


@METHODS
def test_a_tied_weight_is_one_node_with_every_user(method):
    class Tied(TiedLM):
        def forward(self, ids):
            return super().forward(ids) + self.emb(ids) @ self.emb.weight.t()

    model, ids = Tied().eval(), torch.randint(0, 40, (1, 5))
    gm = mq.capture(model, ids, method=method)
    (node,) = [n for n in gm.graph.nodes if n.target == "emb.weight"]
    assert len(node.users) >= 3
    result = mq.quantize(gm, group_size=16, skip_param_threshold=0, default_skips=False)
    rows = [row for row in result.accuracy.rows if row.weight == "emb.weight"]
    assert {row.scheme for row in rows} == {"int4 g16 sym"}
    assert [name for name in result.graph_module.state_dict() if "packed" in name].count("emb.weight_packed") == 1


def test_an_exported_program_and_its_module_are_taken():
    model, x = ConvNet().eval(), torch.randn(2, 3, 8, 8)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    for given in (program, program.module()):
        gm = mq.capture(given)
        assert_same(gm, model, torch.randn(5, 3, 8, 8))
        assert mq.quantize(gm, group_size=16, skip_param_threshold=0).info.quantized_layers["conv"] == "int8 channel"


def test_a_plain_fx_graph_is_opened_and_its_containers_are_no_training_mode():
    model = nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(32), nn.Linear(32, 8))).eval()
    plain = torch.fx.symbolic_trace(model)
    before = Snapshot(plain)
    gm = mq.capture(plain)
    before.check(plain)
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["1.0", "1.1"]
    x = r(3)
    assert torch.equal(gm(x), model(x))


@METHODS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(method, dtype):
    model, x = Reused().to(dtype).eval(), torch.randn(2, 64).to(dtype)
    gm = mq.capture(model, x, method=method)
    assert gm(x).dtype == dtype
    assert torch.equal(gm(x), model(x))


def test_a_model_on_the_meta_device_can_be_looked_at():
    gm = mq.capture(MLP().to("meta").eval(), torch.randn(1, 64))
    assert [n.target for n in gm.graph.nodes if n.op == "get_attr"] == [
        "fc1.weight",
        "fc1.bias",
        "fc2.weight",
        "fc2.bias",
    ]


def test_random_numbers_are_no_difference_and_the_users_stream_goes_on_as_it_would():
    model, x = Random().eval(), r(1, 5)
    state = torch.get_rng_state()
    assert not is_exported(mq.capture(model, x))
    assert torch.equal(torch.get_rng_state(), state)


@METHODS
def test_a_model_that_cannot_be_copied_is_captured_as_it_is(method):
    model = OneLinear().eval()
    model.fc.lock = threading.Lock()
    with pytest.raises(TypeError, match="lock"):
        copy.deepcopy(model)
    assert_same(mq.capture(model.fc, r(1, 5), method=method), model.fc, r(3, 7))


@METHODS
def test_a_forward_put_on_the_instance_is_the_one_that_counts(method):
    model = MLP().eval()
    model.forward = types.MethodType(lambda self, x: self.fc1(x) * 2, model)
    gm = mq.capture(model, torch.randn(2, 64), method=method)
    assert_same(gm, model, torch.randn(3, 64))
    if method != "export":
        assert mq.format_graph(mq.capture(model)) == mq.format_graph(gm)


def test_sizes_that_the_model_fixes_are_said_once_at_the_users_line():
    class Flat(Branches):
        def forward(self, x):
            return super().forward(x.reshape(-1, 5, 32))

    with pytest.warns(UserWarning, match=r"capture: the model fixes x\.shape\[1\] = 5, .*other sizes") as said:
        mq.capture(Flat().eval(), r(2, 5))
    assert [w.filename for w in said if "capture:" in str(w.message)] == [__file__]


class Positions(nn.Module):
    """Makes a tensor of its own, on the CPU as far as an export knows, inside and outside of a no_grad block."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            steps = torch.arange(x.shape[1], device=x.device) * x.sum((0, 2))
        return self.fc(x) * steps[:, None] + torch.zeros(8, device=x.device)


def frozen_devices(gm):
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    nodes = [n for g in graphs for n in g.nodes]
    return [n for n in nodes if any(isinstance(a, torch.device) for a in (*n.args, *n.kwargs.values()))]


@pytest.mark.parametrize("way", ["module", "program"])
def test_devices_that_an_export_froze_follow_the_input(way):
    model, x = Positions().eval(), torch.randn(2, 5, 8)
    program = torch.export.export(model, (x,))
    assert frozen_devices(program.module())
    gm = mq.capture(model, x, method="export") if way == "module" else mq.capture(program)
    assert not frozen_devices(gm)
    assert torch.equal(gm(x), model(x))
    assert gm.to("meta")(x.to("meta")).is_meta
