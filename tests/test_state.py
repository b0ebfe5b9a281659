"""Tensors that a graph writes in place: they survive every pass, stay apart, and each batch of data has its own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.execution.carry import Carry
from mono_quant_fx.execution.collection import collect
from mono_quant_fx.execution.run import run_batch
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.state import written
from tests.harness import Snapshot

METHODS = ("symbolic", "export")


class Cached(nn.Module):
    """One head of attention over a static cache of keys, which are the values as well."""

    def __init__(self, write="index_copy"):
        super().__init__()
        self.q, self.k, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.register_buffer("keys", torch.zeros(8, 64), persistent=False)
        self.write = write

    def forward(self, x, position):
        if self.write == "index_copy":
            self.keys.index_copy_(0, position, self.k(x))
        elif self.write == "item":
            self.keys[position] = self.k(x)
        else:
            self.keys.unsqueeze(0)[:, :2].copy_(self.k(x))
        return self.out(F.softmax(self.q(x) @ self.keys.t(), -1) @ self.keys)


def data(first=0):
    return torch.randn(2, 64), torch.arange(first, first + 2)


WAYS = [("index_copy", "symbolic"), ("index_copy", "export"), ("item", "export"), ("view", "symbolic")]


@pytest.mark.parametrize(("write", "method"), WAYS)
def test_a_cache_works_as_in_the_model_and_neither_sees_the_others(write, method):
    model = Cached(write).eval()
    gm = mq.capture(model, data(), method=method)
    assert [node.target for node in written(gm)] == ["keys"]
    assert gm.keys is not model.keys and gm.get_buffer("keys").abs().sum() == 0
    out = mq.quantize(gm, data(), group_size=32, accuracy_warning="ignore").graph_module
    restored = copy.deepcopy(mq.dequantize_model(out))
    for step in range(3):
        x, position = data(2 * step)
        torch.testing.assert_close(gm(x, position), model(x, position))
        torch.testing.assert_close(out(x, position), restored(x, position))
    assert not torch.equal(out.keys, model.keys) and "keys" not in out.state_dict()


@pytest.mark.parametrize("options", [{}, {"bias_correction": True}, {"algorithm": "rtn"}])
def test_calibration_and_the_table_leave_no_trace(options):
    model = Cached().eval()
    gm = mq.capture(model, data())
    snapshot = Snapshot(gm)
    batches = [data(first) for first in (0, 4, 2)]
    result = mq.quantize(gm, calibration_data=batches, group_size=32, accuracy_warning="ignore", **options)
    snapshot.check(gm)
    assert result.graph_module.keys.abs().sum() == 0
    assert {r.scheme for r in result.accuracy.rows if r.op == "linear"} == {"int4 g32 sym"}


@pytest.mark.parametrize("method", METHODS)
def test_a_walk_of_all_batches_equals_each_batch_alone(method):
    gm = mq.capture(Cached().eval(), data(), method=method)
    batches, _ = collect([data(first) for first in (0, 4, 2)], 6, None)
    walk = Carry(gm, batches, lambda _: None)
    last = next(n for n in gm.graph.nodes if n.op == "output").all_input_nodes[0]
    with torch.no_grad():
        for node in gm.graph.nodes:
            walk.step(node)
            if node is last:
                break
    assert gm.keys.abs().sum() == 0
    for batch, found in zip(batches, walk.values[last], strict=True):
        expected = run_batch(tensors.isolate(gm), batch)
        torch.testing.assert_close(found, expected[0] if isinstance(expected, tuple) else expected)


def test_what_is_only_read_is_no_state_and_stays_shared():
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(inplace=True)).eval()
    for method in METHODS:
        gm = mq.capture(model, torch.randn(4, 64), method=method)
        assert written(gm) == []
        assert gm.get_parameter("0.weight") is model[0].weight
