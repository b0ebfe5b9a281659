"""merge and unmerge on their own: the one undoes the other, to the name and the bit."""

import torch
from torch import nn

import mono_quant_fx as mq
from mono_quant_fx.graph import tensors
from mono_quant_fx.graph.annotation import annotated, stored_weight
from mono_quant_fx.graph.merging import LinearCall, merge, unmerge
from tests.benchmarks import merging as benchmark


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 8), nn.Linear(64, 24)

    def forward(self, x):
        return self.a(x).sum(-1) * self.b(x).sum(-1)


def quantized():
    return mq.quantize(Branches().eval(), group_size=32, symmetric=False, merge_linears=False).graph_module


def test_unmerge_undoes_merge():
    before = quantized()
    gm = tensors.clone(before)
    merge(gm, [n for n in gm.graph.nodes if LinearCall.read(n)], own_memory=False)
    tensors.drop_dead_code(gm)
    tensors.drop_unused(gm)
    assert sorted(gm.state_dict()) == [
        "a_b.bias", "a_b.weight_packed", "a_b.weight_scale", "a_b.weight_zero_point"
    ]  # fmt: skip
    for _, annotation in annotated(gm):
        rows = annotation.merged
        assert stored_weight(gm, annotation).weight_packed.data_ptr() == gm.a_b.weight_packed[rows.start].data_ptr()
    unmerge(gm)
    tensors.drop_dead_code(gm)
    tensors.drop_unused(gm)
    assert [(n.op, str(n.target)) for n in gm.graph.nodes] == [(n.op, str(n.target)) for n in before.graph.nodes]
    assert [a for _, a in annotated(gm)] == [a for _, a in annotated(before)]
    state = gm.state_dict()
    assert list(state) == list(before.state_dict())
    for name, tensor in before.state_dict().items():
        assert torch.equal(state[name], tensor)
        assert state[name].untyped_storage().nbytes() == tensor.nbytes, "memory of its own"
    assert {type(gm.a.bias), type(gm.b.bias)} == {nn.Parameter}


def test_the_benchmark_compares_the_same_products(monkeypatch):
    monkeypatch.setattr(benchmark, "ROTATED", 1)
    found = benchmark.runs(3, 64, (8, 24), 32, torch.float32)
    results = {name: run(1) for name, run in found.items()}
    assert tuple(results) == benchmark.NAMES
    for result in results.values():
        torch.testing.assert_close(result, results["apart"], rtol=1e-5, atol=1e-5)
    assert benchmark.line(3, {"apart": 2.0, "views": 1.0, "copies": 4.0}) == ["3", "2.000", "2.00x", "0.50x"]
