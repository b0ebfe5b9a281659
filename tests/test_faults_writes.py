"""Faults of what writes where: inputs, and operators and functions of the user's."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import mono_quant_fx as mq
from mono_quant_fx.execution.batch import to_batch
from mono_quant_fx.execution.carry import Carry
from mono_quant_fx.execution.lockstep import Lockstep
from mono_quant_fx.execution.run import run_batch
from mono_quant_fx.graph.effects import may_write
from mono_quant_fx.graph.state import written

METHODS = ("symbolic", "export")
pytestmark = pytest.mark.filterwarnings("ignore:capture", "ignore:Few calibration samples")


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))


def quantized(model, *args, **options):
    return mq.quantize(model, *args, **{"group_size": 16, "accuracy_warning": "ignore", **options})


def tensors_of(module):
    return {n: t.detach().clone() for n, t in (*module.named_parameters(), *module.named_buffers())}


def check_untouched(module, before):
    after = tensors_of(module)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


# --- inputs


class Centred(Base):
    def forward(self, x):
        x.sub_(0.5)
        return self.b(self.a(x).relu_())


class First(Base):
    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        return self.b(self.a(self.act(x)))


WRITERS = {
    "sub_": Centred,
    "ReLU": lambda: First(nn.ReLU(inplace=True)),
    "LeakyReLU": lambda: First(nn.LeakyReLU(0.2, inplace=True)),
    "Hardswish": lambda: First(nn.Hardswish(inplace=True)),
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("sub_", {}), ("sub_", {"bias_correction": True}), ("ReLU", {"activations": "int8"}), ("LeakyReLU", {}),
     ("Hardswish", {})],
)  # fmt: skip
def test_data_that_the_model_writes_into_stays_as_it_was(kind, options):
    """quantize changed example and data: refused as frozen control flow, or another dB than is true."""
    model, data = WRITERS[kind]().eval(), [torch.randn(8, 32) for _ in range(3)]
    kept, example = [t.clone() for t in data], torch.randn(4, 32)
    before, kept_example = tensors_of(model), example.clone()
    first = quantized(model, example, calibration_data=data, **options)
    assert all(map(torch.equal, data, kept)) and torch.equal(example, kept_example)
    check_untouched(model, before)
    again = quantized(model, example, calibration_data=data, **options)
    assert first.accuracy == again.accuracy
    assert any("forward writes into its input" in text for text in first.info.warnings)
    x = torch.randn(8, 32)
    assert mq.sqnr_db(model(x.clone()), first.graph_module(x)) > 15


@pytest.mark.parametrize("method", METHODS)
def test_the_table_has_what_the_twin_that_writes_nothing_has(method):
    class Plain(Base):
        def forward(self, x):
            return self.b(self.a(x - 0.5).relu())

    data = [torch.randn(8, 32) for _ in range(2)]
    tables = [quantized(mq.capture(m.eval(), data[0], method=method), calibration_data=data).accuracy
              for m in (Centred(), Plain())]  # fmt: skip
    for row, other in zip(*(table.rows for table in tables), strict=True):
        assert row.input_range == pytest.approx(other.input_range)
        assert row.accumulated_sqnr_db == pytest.approx(other.accumulated_sqnr_db)


def test_runs_of_a_graph_that_writes_take_copies():
    """Of a graph that nobody made functional, walks and runs leave the batches alone too."""
    gm = fx.symbolic_trace(Centred().eval())
    batch = to_batch(torch.randn(4, 32))
    kept = batch.args[0].clone()
    outputs = [run_batch(gm, batch) for _ in range(2)]
    assert torch.equal(*outputs)
    walk = Carry(gm, [batch], lambda _: None)
    Lockstep(gm, gm, set()).run(batch, lambda *_: None)
    with torch.no_grad():
        for node in gm.graph.nodes:
            walk.step(node)
    assert torch.equal(batch.args[0], kept)


def test_copies_for_a_run_keep_what_is_one_tensor_one():
    x, other = torch.randn(2), {"list": [1, 2]}
    batch = to_batch((x, x, other)).private()
    assert batch.args[0] is batch.args[1] and batch.args[0] is not x and torch.equal(batch.args[0], x)
    assert batch.args[2] == other and batch.args[2] is not other


# --- operators and functions that write, unknown to us

LIBRARY = torch.library.Library("mono_quant_fx_tests", "DEF")
LIBRARY.define("double_(Tensor(a!) x) -> ()")
LIBRARY.define("scale(Tensor(a!) x) -> ()")
LIBRARY.define("double_and_give_(Tensor(a!) x) -> Tensor(a!)")
LIBRARY.define("tally(Tensor(a!) count, Tensor x) -> Tensor")


def _tally(count, x):
    count.add_(1)
    return x * count


for _key in ("CPU", "Meta"):
    LIBRARY.impl("double_", lambda x: (x.mul_(2), None)[1], _key)
    LIBRARY.impl("scale", lambda x: (x.mul_(2), None)[1], _key)
    LIBRARY.impl("double_and_give_", lambda x: x.mul_(2), _key)
    LIBRARY.impl("tally", _tally, _key)
ops = torch.ops.mono_quant_fx_tests


def double_all(*values):
    """What tracing keeps as one call."""
    for value in values:
        value.mul_(2)
    return values[0]


def look(x):
    return x.sum()


fx.wrap("double_all")
fx.wrap("look")


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)


CALLS = {
    "overload": lambda h: ops.double_.default(h),
    "packet": lambda h: ops.scale(h),
    "returning": lambda h: ops.double_and_give_(h),
    "wrapped": lambda h: double_all(h),
    "of a view": lambda h: ops.double_(h[:, :8]),
    "wrapped, of pieces": lambda h: double_all(h.chunk(2, -1)[0], h.chunk(2, -1)[1]),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CALLS)
def test_what_an_unknown_call_writes_is_read_as_it_is_afterwards(name, method):
    class Model(Base):
        def forward(self, x):
            h = torch.tanh(x)
            a = self.a(h)
            CALLS[name](h)
            return a + self.b(h), h * 1

    model, x = Model().eval().requires_grad_(False), torch.randn(4, 32)
    gm = mq.capture(model, x, method=method)
    expected = model(x)
    torch.testing.assert_close(gm(x), expected)
    result = quantized(gm, calibration_data=[x], bits=8)
    assert mq.sqnr_db(expected[0], result.graph_module(x)[0]) > 35
    assert {row.scheme for row in result.accuracy.rows} == {"int8 channel"}


def test_what_may_write_is_left_alone_where_nobody_reads_it_later():
    class Model(Base):
        def forward(self, x):
            h = self.a(x)
            return self.b(h) * look(h)

    gm = mq.capture(Model().eval(), torch.randn(4, 32), method="symbolic")
    assert not any(node.op == "call_module" for node in gm.graph.nodes)


@pytest.mark.parametrize("write", [double_all, ops.scale, ops.scale.default], ids=["wrapped", "packet", "overload"])
def test_linears_are_not_merged_across_a_possible_write(write):
    """An operator called without its overload was taken to be torch's own, and pure: 22 -> 0.4 dB."""

    class Model(Base):
        def forward(self, x):
            h = torch.tanh(x)
            a = self.a(h)
            write(h)
            return a + self.b(h)

    model, x = Model().eval(), torch.randn(4, 32)
    traced = fx.symbolic_trace(model)
    assert [n for n in traced.graph.nodes if may_write(n)] != []
    result = quantized(traced, bits=8)
    assert mq.sqnr_db(model(x), result.graph_module(x)) > 35


@pytest.mark.parametrize("method", METHODS)
def test_a_product_into_an_out_argument_keeps_it(method):
    """torch.mm(x, w, out=buf) lost its out when it was fused: 0.0 dB."""

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(32, 32) / 6)

        def forward(self, x):
            h = torch.zeros_like(x)
            torch.mm(torch.tanh(x), self.w, out=h)
            return self.b(h)

    model, x = Model().eval().requires_grad_(False), torch.randn(4, 32)
    gm = mq.capture(model, x, method=method)
    result = quantized(gm, x, bits=8)
    assert mq.sqnr_db(model(x), result.graph_module(x)) > 35
    assert [row.scheme for row in result.accuracy.rows] == ["int8 channel"] * 2


def test_a_graph_whose_product_writes_keeps_its_weight_with_a_reason():
    model = Base().eval().requires_grad_(False)
    g = fx.Graph()
    x = g.placeholder("x")
    weight, other = g.get_attr("a.weight"), g.get_attr("b.weight")
    buffer = g.call_function(torch.zeros_like, (x,))
    product = g.call_function(torch.mm, (x, weight), {"out": buffer})
    g.output((g.call_function(F.linear, (buffer, other)), product))
    gm = fx.GraphModule(model, g)
    result = mq.passes.SkipAnnotation(mq.QuantConfig(group_size=16))(gm)
    reasons = {a.weight: a.reason for _, a in mq.graph.annotation.annotated(result.graph_module)}
    assert reasons == {"a.weight": "mm writes in place here", "b.weight": ""}


@pytest.mark.parametrize("method", METHODS)
def test_a_buffer_that_an_operator_writes_is_the_graphs_own(method):
    """The model's own counter went up with every run of quantize."""

    class Model(Base):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            return self.b(ops.tally(self.count, self.a(x))) + self.count

    model, x = Model().eval(), torch.randn(4, 32)
    gm = mq.capture(model, x, method=method)
    result = quantized(gm, calibration_data=[x, x], bits=8)
    assert model.count == 0 and gm.count == 0
    assert [n.target for n in written(gm)] == ["count"]
    for _ in range(2):
        assert mq.sqnr_db(model(x), result.graph_module(x)) > 35
    assert model.count == 2 and gm.count == 0
