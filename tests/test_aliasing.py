"""What the tables say of single nodes; tests/passes/test_linear_merging.py has what follows from it."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from mono_quant_fx.graph.aliasing import owners, takes_split_rows
from mono_quant_fx.graph.effects import may_write

aten = torch.ops.aten


def node_of(target, *rest, op="call_function", module=None, **kwargs):
    """A call on the placeholder x."""
    g = fx.Graph()
    x = g.placeholder("x")
    node = g.create_node(op, target, (x, *rest), kwargs)
    g.output(node)
    fx.GraphModule({"m": module} if module else {}, g)
    return x, node


class Custom(nn.Module):
    def forward(self, x):
        return x


def custom(x):
    return x


WRITERS = [
    node_of("add_", 1, op="call_method"),
    node_of(aten.relu_.default),
    node_of(F.relu, True),
    node_of(F.silu, inplace=True),
    node_of(torch.relu_),
    node_of(operator.iadd, 1),
    node_of(operator.setitem, 0, 1),
    node_of(custom),
    node_of("m", op="call_module", module=nn.ReLU(inplace=True)),
    node_of("m", op="call_module", module=Custom()),
]
READERS = [
    node_of("add", 1, op="call_method"),
    node_of(aten.relu.default),
    node_of(F.relu),
    node_of(F.softmax, 1),
    node_of(operator.add, 1),
    node_of(getattr, "shape"),
    node_of(torch.fft.rfft),
    node_of("m", op="call_module", module=nn.ReLU()),
]


@pytest.mark.parametrize(("x", "node"), WRITERS)
def test_what_may_write(x, node):
    assert may_write(node) == [x]
    assert not takes_split_rows(x, 8)


@pytest.mark.parametrize(("x", "node"), READERS)
def test_what_writes_nothing(x, node):
    assert may_write(node) == []


def test_an_out_argument_is_written():
    g = fx.Graph()
    x, y = g.placeholder("x"), g.placeholder("y")
    assert may_write(g.call_function(torch.add, (x, x), {"out": y})) == [y]


def test_memory_is_shared_through_views_and_unknown_calls_only():
    g = fx.Graph()
    x = g.placeholder("x")
    fresh = g.call_function(torch.tanh, (x,))
    view = g.call_method("view", (fresh, -1))
    unknown = g.call_function(custom, (view,))
    assert owners([x]) == {None}
    assert owners([fresh]) == {fresh}
    assert owners([unknown]) == {fresh, view, unknown}
    assert owners([view, x]) == {None, fresh, view}


@pytest.mark.parametrize(
    ("sizes", "keeps"),
    [((2, 3, 4, 8), True), ((6, 32), True), ((2, 3, -1, 8), False), ((-1,), False), ((3, 64), False), ((-1, 32), True)],
)
def test_a_view_keeps_rows_where_its_sizes_show_it(sizes, keeps):
    """Of x [2, 3, 32]."""
    for form in (sizes, (list(sizes),)):
        g = fx.Graph()
        x = g.placeholder("x")
        g.output(g.call_function(torch.tanh, (g.call_method("view", (x, *form)),)))
        assert takes_split_rows(x, 32) is keeps
