"""Faults of graphs inside calls, of buffers that share memory or are rebound, of parameters that forward writes."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._higher_order_ops import while_loop
from torch._higher_order_ops.map import map as map_over

import mono_quant_fx as mq
from mono_quant_fx.frontend.recapture import capture_again
from mono_quant_fx.frontend.record import get_record
from tests.test_faults_writes import METHODS, Base, check_untouched, quantized, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore:capture", "ignore:Few calibration samples")


# --- graphs inside calls


class Branches(Base):
    def forward(self, x):
        h = self.c(x)
        return torch.cond(x.sum() > 0, lambda h: self.a(h), lambda h: self.b(h).relu(), (h,)) + self.a(h)


class Loop(Base):
    def forward(self, x):
        start = torch.tensor(0), self.c(x)
        return while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, torch.tanh(self.a(h))), start)[1]


class Rows(Base):
    def forward(self, x):
        return map_over(lambda row, w: F.linear(row, w), self.c(x), self.a.weight)


class Blocks(Base):
    def forward(self, x):
        with torch.no_grad():
            h = self.c(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            g = self.b(h)
        return self.a(h) + g


INSIDE = {
    Branches: ("inside a branch of torch.cond, left as it is", {"a.weight", "b.weight"}),
    Loop: ("inside the body of a while_loop, left as it is", {"a.weight"}),
    Rows: ("inside the body of a map, left as it is", {"a.weight"}),
}


@pytest.mark.parametrize(("kind", "options"), [*((kind, {}) for kind in INSIDE), (Branches, {"activations": "int8"})])
def test_weights_of_graphs_inside_a_call_stay_and_have_a_row(kind, options):
    model, x = kind().eval(), torch.randn(8, 32)
    reason, names = INSIDE[kind]
    data = {"calibration_data": [x, -x]} if options else {}
    result = quantized(model, x, **data, **options)
    rows = {row.weight: row for row in result.accuracy.rows if row.weight.endswith("weight")}
    assert names < rows.keys()
    for name in names:
        assert rows[name].scheme == "float32" and reason in rows[name].reason
    assert rows["c.weight"].scheme != "float32"
    for inputs in (x, -x):
        assert mq.sqnr_db(model(inputs), result.graph_module(inputs)) > 15


def test_an_autocast_block_says_why_its_weights_stay():
    model, x = Blocks().eval(), torch.randn(8, 32)
    result = quantized(mq.capture(model, x, method="export"))
    reasons = {row.weight: row.reason for row in result.accuracy.rows}
    assert reasons["b.weight"] == "inside an autocast block, left as it is"
    assert mq.sqnr_db(model(x), result.graph_module(x)) > 15


def test_weights_that_only_the_inner_graph_reads_have_a_row():
    """A graph made by hand may keep weights in its branches instead of handing them in."""

    def branch():
        g = fx.Graph()
        x = g.placeholder("x")
        g.output((g.call_function(F.linear, (x, g.get_attr("w"))),))
        root = nn.Module()
        root.w = nn.Parameter(torch.randn(32, 32), requires_grad=False)
        return fx.GraphModule(root, g)

    root = Base().requires_grad_(False)
    root.yes, root.no = branch(), branch()
    g = fx.Graph()
    x = g.placeholder("x")
    h = g.call_module("c", (x,))
    is_positive = g.call_function(torch.gt, (g.call_method("sum", (x,)), 0))
    call = g.call_function(torch.ops.higher_order.cond, (is_positive, g.get_attr("yes"), g.get_attr("no"), (h,)))
    g.output(g.call_function(operator.getitem, (call, 0)))
    gm, x = fx.GraphModule(root, g).eval(), torch.randn(4, 32)
    result = quantized(gm)
    reasons = {row.node: row.reason for row in result.accuracy.rows}
    assert reasons["yes"] == reasons["no"] == "inside a branch of torch.cond, left as it is"
    with torch.no_grad():
        assert mq.sqnr_db(gm(x), result.graph_module(x)) > 15


def test_a_branch_that_writes_outside_is_refused():
    inner = fx.Graph()
    inner.output((inner.call_function(torch.ops.aten.relu_.default, (inner.placeholder("x"),)),))
    root = Base()
    root.yes, root.no = fx.GraphModule(nn.Module(), inner), fx.GraphModule(nn.Module(), copy.deepcopy(inner))
    g = fx.Graph()
    x = g.placeholder("x")
    h = g.call_module("a", (x,))
    call = g.call_function(torch.ops.higher_order.cond, (True, g.get_attr("yes"), g.get_attr("no"), (h,)))
    g.output((call, h))
    with pytest.raises(mq.CaptureError, match="a branch writes into x, which comes from outside"):
        mq.capture(fx.GraphModule(root, g).eval())


# --- buffers that share memory, and such as are rebound


class Shared(Base):
    """k is a row of cache, or a strided part of it."""

    def __init__(self, part):
        super().__init__()
        self.register_buffer("cache", torch.zeros(4, 32))
        self.register_buffer("k", part(self.cache))

    def forward(self, x):
        self.cache[:2].copy_(x[:2])
        return self.a(x) + self.k.sum()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", [lambda c: c[0], lambda c: c[1:3], lambda c: c[:, ::2], lambda c: c.t()])
def test_buffers_that_share_memory_stay_together(part, method):
    """k = cache[0], one written and the other read, came apart: 0.0 where the model gives 3.5."""
    model, x = Shared(part).eval(), torch.randn(4, 32)
    gm = mq.capture(model, method=method) if method == "symbolic" else mq.capture(model, x, method=method)
    result = quantized(gm, calibration_data=[x, x], bits=8)
    twin = copy.deepcopy(result.graph_module)
    assert model.cache.abs().sum() == 0 and gm.cache.abs().sum() == 0
    expected = model(x)
    torch.testing.assert_close(gm(x), expected)
    for graph in (result.graph_module, twin):
        assert mq.sqnr_db(expected, graph(x)) > 35


def test_buffers_of_which_none_holds_the_others_are_refused():
    class Overlapping(Base):
        def __init__(self):
            super().__init__()
            memory = torch.zeros(6, 32)
            self.register_buffer("low", memory[:4])
            self.register_buffer("high", memory[2:])

        def forward(self, x):
            self.low.copy_(x)
            return self.a(x) + self.high.sum()

    with pytest.raises(mq.CaptureError, match="high and low share memory that forward writes"):
        mq.capture(Overlapping().eval())


class Rebinding(Base):
    def __init__(self, kind, reads):
        super().__init__()
        if kind == "buffer":
            self.register_buffer("s", torch.zeros(32))
        else:
            self.s = torch.zeros(32)
        self.reads = reads

    def forward(self, x):
        h = self.a(x) + (self.s if self.reads else 0)
        self.s = h.mean(0)
        return h * self.s


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
@pytest.mark.parametrize("reads", [True, False])
def test_a_tensor_that_forward_rebinds_leaves_no_proxy(kind, reads):
    """self.s = h.mean(0): the graph and its result held a Proxy, or a state that never moved."""
    model, x = Rebinding(kind, reads).eval(), torch.randn(4, 32)
    before = model.s
    is_state = kind == "buffer" or reads
    for example in (None, x):
        if is_state and (example is None or kind == "attribute"):
            with pytest.raises(mq.CaptureError, match=r"forward rebinds .*\bs\b"):
                mq.capture(model, example)
            assert model.s is before
            continue
        gm = mq.capture(model, example)
        assert model.s is before
        assert not any(isinstance(v, fx.Proxy) for m in gm.modules() for v in (*vars(m).values(), *m._buffers.values()))
        twin = copy.deepcopy(model)
        for _ in range(2):
            torch.testing.assert_close(gm(x), twin(x))


# --- parameters that forward writes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["embedding", "bag", "tied"])
def test_an_embedding_with_max_norm_leaves_the_models_weight_alone(kind, method):
    """Each run shortens the rows that it looks up: quantize changed the model's weight."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            if kind == "bag":
                self.e = nn.EmbeddingBag(64, 32, max_norm=1.0, mode="sum")
            else:
                self.e = nn.Embedding(64, 32, max_norm=1.0, padding_idx=3)
            self.a = nn.Linear(32, 32)

        def forward(self, ids):
            h = self.a(self.e(ids))
            return F.linear(h, self.e.weight) if kind == "tied" else h

    model, ids = Model().eval(), torch.randint(0, 64, (4, 6))
    before = tensors_of(model)
    gm = mq.capture(model, ids, method=method)
    fields = {"default_skips": False} if kind == "embedding" else {}
    result = quantized(gm, calibration_data=[ids, ids], bits=8, **fields)
    check_untouched(model, before)
    twin = copy.deepcopy(model)
    for inputs in (ids, torch.randint(0, 64, (3, 6))):
        with torch.no_grad():
            expected = twin(inputs)
            torch.testing.assert_close(gm(inputs), expected)
            assert mq.sqnr_db(expected, result.graph_module(inputs)) > 30
    rows = {row.weight: row for row in result.accuracy.rows}
    assert rows["e.weight"].scheme == ("int8 channel" if kind == "embedding" else "float32")


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_that_forward_writes_is_the_graphs_own(method):
    class Model(Base):
        def forward(self, x):
            with torch.no_grad():
                self.a.weight.mul_(0.5)
            return self.b(self.a(x))

    model, x = Model().eval(), torch.randn(4, 32)
    before = tensors_of(model)
    gm = mq.capture(model, x, method=method)
    result = quantized(gm, calibration_data=[x], bits=8)
    check_untouched(model, before)
    assert not any(torch.equal(gm.get_parameter("a.weight"), t * 0.5) for t in (before["a.weight"],))
    rows = {row.weight: row for row in result.accuracy.rows}
    assert rows["a.weight"].scheme == "float32" and rows["b.weight"].scheme == "int8 channel"
    twin = copy.deepcopy(model)
    for _ in range(2):
        assert mq.sqnr_db(twin(x), result.graph_module(x)) > 30


@pytest.mark.parametrize("method", METHODS)
def test_captured_again_a_graph_is_functional_too(method):
    class Model(Base):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            h = self.a(x)
            h[:, :8].relu_()
            h += x
            self.count.add_(1)
            return self.b(h) + self.count

    model, x = Model().eval(), torch.randn(4, 32)
    gm = mq.capture(model, x, method=method)
    again = capture_again(Model().eval(), get_record(gm))
    assert mq.format_graph(again) == mq.format_graph(gm)


@pytest.mark.parametrize("method", METHODS)
def test_a_functional_graph_can_be_stored(method, tmp_path):
    class Model(Base):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache", torch.zeros(4, 32))
            self.register_buffer("k", self.cache[0])
            self.e = nn.Embedding(8, 32, max_norm=0.5)

        def forward(self, x):
            h = self.a(x)
            h[:, :8].relu_()
            h.split(16, 1)[0].mul_(2)
            h.unbind(0)[1].zero_()
            h.diagonal().add_(1)
            h += x
            self.cache.copy_(h)
            return self.b(h) + self.k.sum() + self.e(torch.zeros(1, dtype=torch.long))

    model, x = Model().eval().requires_grad_(False), torch.randn(4, 32)
    with torch.no_grad():
        gm = mq.capture(model, x, method=method)
        mq.save(quantized(gm), tmp_path / "model.safetensors", graph=True)
        loaded = mq.load(tmp_path / "model.safetensors").graph_module
        torch.testing.assert_close(loaded(x), quantized(gm).graph_module(x))
