"""The operators under torch.compile and torch.export: no break, no recompile for a new batch size, the same numbers."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import mono_quant_fx as mq
from mono_quant_fx import numerics, ops
from mono_quant_fx.config import INT8

#: The same operators run either way; only the matrix products' split may differ.
ATOL = 1e-5

BATCHES = (4, 7, 12, 33)


class Int8Linear(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.stored, self.bias = numerics.quantize_matrix(linear.weight.detach(), INT8), linear.bias.detach()

    def forward(self, x):
        return ops.int8_linear(x, *self.stored, self.bias)


class Dequantized(nn.Module):
    """The lowered, unfused form: both dequantize ops in front of plain linears."""

    def __init__(self, linear):
        super().__init__()
        self.four = mq.quantize_weight_int4(linear.weight.detach(), 32, symmetric=False)
        self.eight = numerics.quantize_matrix(linear.weight.detach(), INT8)

    def forward(self, x):
        four = ops.dequantize_int4(*self.four, 32, 64)
        return nn.functional.linear(x, four) + nn.functional.linear(x, ops.dequantize_int8(*self.eight))


MAKERS = {
    "int4 sym": lambda linear: mq.QuantizedLinearInt4.from_float(linear, 32),
    "int4 asym": lambda linear: mq.QuantizedLinearInt4.from_float(linear, 32, symmetric=False),
    "int8": Int8Linear,
    "dequantize": Dequantized,
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def layer(make):
    return make(nn.Linear(64, 24)).eval()


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@makers
def test_compile_fullgraph_takes_any_batch_with_one_recompile(make):
    model, counter = layer(make), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in BATCHES:
        x = torch.randn(batch, 3, 64)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=ATOL)
    assert counter.frame_count == 2  # the first batch is compiled for its size, the second for any size
    x = torch.randn(1, 3, 64)  # to Dynamo one is a size of its own
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=ATOL)
    assert counter.frame_count <= 3


@makers
def test_a_batch_marked_dynamic_compiles_once(make):
    model, counter = layer(make), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in BATCHES:
        x = torch.randn(batch, 64)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=ATOL)
    assert counter.frame_count == 1


@makers
def test_compiled_gradients_are_eager_gradients(make):
    model = layer(make)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (actual,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL * 24)  # a sum over 24 outputs


@makers
def test_export_with_a_dynamic_batch_runs_at_any(make):
    model = layer(make)
    exported = torch.export.export(model, (torch.randn(4, 64),), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert any(ops.is_ours(target) for target in targets)
    module = exported.module()
    for batch in (*BATCHES, 1):
        x = torch.randn(batch, 64)
        assert torch.equal(module(x), model(x))


def test_the_result_of_quantize_compiles_and_exports():
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    gm = mq.quantize(model, torch.randn(2, 128), indivisible="int8").graph_module
    used = {node.target for node in gm.graph.nodes if ops.is_ours(node.target)}
    assert used == {ops.int4_linear, ops.int8_linear}
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(gm, (torch.randn(4, 128),), dynamic_shapes=({0: batch},)).module()
    for size in (2, 9):
        x = torch.randn(size, 128)
        torch.testing.assert_close(compiled(x), gm(x), rtol=0, atol=ATOL)
        assert torch.equal(exported(x), gm(x))


@pytest.mark.slow
@makers
def test_inductor_gives_the_same_numbers(make):
    model = layer(make)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (4, 9):
        x = torch.randn(batch, 64)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=ATOL)
