"""The operators under torch.compile, torch.export and AOTInductor: one op stays one call, and any batch runs."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext, is_concrete_int

import mono_quant_fx as mq
from mono_quant_fx import ops
from mono_quant_fx.config import INT8, QuantScheme
from mono_quant_fx.numerics import affine

#: A backend that orders sums in its own way; where the very same operators run, the bits are the same.
ATOL = 1e-5

ROOT = Path(__file__).resolve().parents[2]
BATCHES = (4, 7, 12, 33)


class Op(nn.Module):
    """One operator on its stored weight; `quantized` puts the input's INT8 codes in front of it."""

    def __init__(self, op, stored, *rest, quantized=False, shape=(3, 64)):
        super().__init__()
        self.op, self.rest, self.shape, self.quantized = op, rest, shape, quantized
        for name, tensor in zip(("codes", "scale", "zero_point"), stored, strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("bias", torch.randn(24))
        self.register_buffer("input_scale", torch.tensor([0.03]))
        self.register_buffer("input_zero_point", torch.tensor([-9], dtype=torch.int8))

    def forward(self, x):
        qparams = (self.input_scale, self.input_zero_point) if self.quantized else ()
        x = ops.quantize_activation(x, *qparams) if self.quantized else x
        return self.op(x, *qparams, self.codes, self.scale, self.zero_point, self.bias, *self.rest)


class Dequantized(nn.Module):
    """The lowered, unfused form: both dequantize ops in front of plain linears, and an INT8 input that turns back."""

    shape = (3, 64)

    def __init__(self):
        super().__init__()
        self.four = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in stored(4, 64, symmetric=False))
        self.eight = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in stored(8, 64)[:2])
        self.register_buffer("scale", torch.tensor([0.03]))
        self.register_buffer("zero_point", torch.tensor([-9], dtype=torch.int8))

    def forward(self, x):
        x = ops.dequantize_activation(
            ops.quantize_activation(x, self.scale, self.zero_point), self.scale, self.zero_point
        )
        four = nn.functional.linear(x, ops.dequantize_int4(*self.four, 32, 64))
        return four + nn.functional.linear(x, ops.dequantize_int8(*self.eight, None))


def stored(bits, columns, symmetric=True):
    scheme = QuantScheme(4, 32, symmetric) if bits == 4 else INT8
    return affine.quantize_matrix(torch.randn(24, columns), scheme)


MAKERS = {
    "int4 sym": lambda: Op(ops.int4_linear, stored(4, 64), 32),
    "int4 asym": lambda: Op(ops.int4_linear, stored(4, 64, symmetric=False), 32, "float32"),
    "int8": lambda: Op(ops.int8_linear, stored(8, 64)),
    "w4a8": lambda: Op(ops.w4a8_linear, stored(4, 64), 32, quantized=True),
    "w8a8": lambda: Op(ops.w8a8_linear, stored(8, 64), quantized=True),
    "w8a8 conv": lambda: Op(
        ops.w8a8_conv, stored(8, 15), [5], [1], [2], [1], 1, quantized=True, shape=(3, 10)
    ),
    "dequantize": Dequantized,
}  # fmt: skip
#: What F.linear on three dimensions and a sum become.
AROUND_LINEARS = {
    "aten.t.default", "aten.view.default", "aten.mm.default", "aten.add.Tensor", "aten._unsafe_view.default",
    "aten.sym_size.int", "<built-in function mul>",
}  # fmt: skip
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
with_gradients = pytest.mark.parametrize("make", [MAKERS[n] for n in ("int4 sym", "int4 asym", "int8")])


def batch_of(model, size):
    return torch.randn(size, *model.shape)


def ours(gm):
    return [node.target for node in gm.graph.nodes if ops.is_ours(node.target)]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@makers
def test_compile_fullgraph_takes_any_batch_with_one_recompile(make):
    model, counter = make().eval(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for size in BATCHES:
        x = batch_of(model, size)
        assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 2  # the first batch is compiled for its size, the second for any size
    x = batch_of(model, 1)  # to Dynamo one is a size of its own
    assert torch.equal(compiled(x), model(x))
    assert counter.frame_count <= 3


@makers
@pytest.mark.parametrize("dynamic", [True, "marked"])
def test_a_dynamic_batch_compiles_once(make, dynamic):
    model, counter = make().eval(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True if dynamic is True else None)
    for size in BATCHES:
        x = batch_of(model, size)
        if dynamic == "marked":
            torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1


@makers
def test_what_is_compiled_holds_the_ops_and_nothing_of_their_inside(make):
    model, graphs = make().eval(), []
    compiler = aot_autograd(fw_compiler=lambda gm, inputs: graphs.append(gm) or gm.forward)
    x = batch_of(model, 4)
    with torch.no_grad():
        torch.compile(model, backend=compiler, fullgraph=True, dynamic=True)(x)
    assert ours(graphs[0]) == ours(torch.export.export(model, (x,)).graph_module)
    around = {str(n.target) for n in graphs[0].graph.nodes if n.op == "call_function" and not ops.is_ours(n.target)}
    assert around <= (AROUND_LINEARS if make is Dequantized else set())


@makers
def test_fake_implementations_leave_the_batch_a_symbol(make):
    model, env = make().eval(), ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    dims = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * len(model.shape)
    x = mode.from_tensor(batch_of(model, 5), symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims))
    with mode:
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
            path, _, leaf = name.rpartition(".")
            fake = mode.from_tensor(tensor, static_shapes=True)
            owner = model.get_submodule(path)
            (owner._buffers if leaf in owner._buffers else owner._parameters)[leaf] = fake
        out = model(x)
    assert not is_concrete_int(out.shape[0]) and str(out.shape[0]) == str(x.shape[0])
    assert all(map(is_concrete_int, out.shape[1:]))
    assert not env.guards


@with_gradients
def test_compiled_gradients_are_eager_gradients(make):
    model = make().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = batch_of(model, 5).requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (actual,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL * 24)  # a sum over 24 outputs


@makers
def test_export_with_a_dynamic_batch_runs_at_any(make):
    model = make().eval()
    exported = torch.export.export(model, (batch_of(model, 4),), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    assert ours(exported.graph_module)
    module = exported.module()
    for size in (*BATCHES, 1):
        x = batch_of(model, size)
        assert torch.equal(module(x), model(x))


def test_the_result_of_quantize_compiles_and_exports():
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    gm = mq.quantize(model, torch.randn(2, 128), indivisible="int8").graph_module
    assert set(ours(gm)) == {ops.int4_linear, ops.int8_linear}
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True)
    batch = torch.export.Dim("batch")
    exported = torch.export.export(gm, (torch.randn(4, 128),), dynamic_shapes=({0: batch},)).module()
    for size in (2, 9):
        x = torch.randn(size, 128)
        assert torch.equal(compiled(x), gm(x))
        assert torch.equal(exported(x), gm(x))


class Everything(nn.Module):
    """What becomes of it holds every operator: convolutions and linears, INT8 inputs where `quantized` says so."""

    def __init__(self):
        super().__init__()
        self.conv, self.conv4 = nn.Conv1d(16, 32, 4), nn.Conv1d(32, 32, 4)
        self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.b(self.a(self.conv4(self.conv(x)).mT).relu())


def everything(**fields):
    """A quantized GraphModule, its program with any batch, and an input that is not the example."""
    model, x = Everything().eval(), torch.randn(4, 16, 20)
    gm = mq.quantize(
        model, calibration_data=[x], algorithm="rtn", group_size=32, skip_param_threshold=0, accuracy_warning="ignore",
        **fields,
    ).graph_module  # fmt: skip
    program = torch.export.export(gm, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},))
    return gm, program, torch.randn(9, 16, 20)


STATIC = {"activations": "int8", "overrides": {"conv": "int8", "b": "int8"}}
FLOAT = {"symmetric": False, "compute": "float32", "overrides": {"b": "int8"}}
FRESH = """
import sys, torch
import mono_quant_fx.ops
program, x, out = sys.argv[1:]
if program.endswith("aoti.pt2"):
    run = torch._inductor.aoti_load_package(program)
else:
    run = torch.export.load(program).module()
torch.save(run(torch.load(x)), out)
"""


def in_a_fresh_process(program, x, folder):
    """What a program of that file gives for x in a Python that has imported mono_quant_fx.ops and nothing else."""
    torch.save(x, folder / "x.pt")
    subprocess.run(
        [sys.executable, "-c", FRESH, str(program), str(folder / "x.pt"), str(folder / "out.pt")],
        check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=folder,
    )  # fmt: skip
    return torch.load(folder / "out.pt")


def test_a_saved_program_is_loaded_and_runs():
    gm, program, x = everything(**STATIC)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    assert set(ours(loaded.graph_module)) == set(ours(gm))
    assert torch.equal(loaded.module()(x), gm(x))


@pytest.mark.slow
def test_a_saved_program_runs_in_a_fresh_process(tmp_path):
    gm, program, x = everything(**STATIC)
    torch.export.save(program, tmp_path / "program.pt2")
    assert torch.equal(in_a_fresh_process(tmp_path / "program.pt2", x, tmp_path), gm(x))


@pytest.mark.slow
@pytest.mark.parametrize("fields", [STATIC, FLOAT], ids=["static", "float"])
def test_a_package_of_aot_inductor_runs_here_and_in_a_fresh_process(fields, tmp_path):
    gm, program, x = everything(**fields)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "aoti.pt2"))
    run = torch._inductor.aoti_load_package(package)
    for size in (1, 4, 9):
        torch.testing.assert_close(run(x[:size]), gm(x[:size]), rtol=0, atol=ATOL)
    torch.testing.assert_close(in_a_fresh_process(package, x, tmp_path), gm(x), rtol=0, atol=ATOL)


@pytest.mark.slow
@makers
def test_inductor_gives_the_same_numbers_and_calls_each_op_once(make):
    model = make().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    _, (code,) = torch._inductor.utils.run_and_get_code(compiled, batch_of(model, 4))
    expected = ours(torch.export.export(model, (batch_of(model, 4),)).graph_module)
    for op in set(expected):
        assert code.count(f"torch.ops.{op}(".replace("::", ".")) == expected.count(op), code
    for size in (4, 9):
        x = batch_of(model, size)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=ATOL)
