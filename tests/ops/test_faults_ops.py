"""Arguments that no operator can take: each is refused by the operator itself, and nothing reads what is not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import mono_quant_fx as mq
from mono_quant_fx import ops
from mono_quant_fx.config import QuantScheme
from mono_quant_fx.numerics import affine
from mono_quant_fx.ops import dispatch, native
from tests.ops.test_static_int8 import CONVS, conv_case, linear_case

ROOT = Path(__file__).resolve().parents[2]
COMPILED = native.kernels().available[1:]
PATHS = ["torch", *COMPILED]
paths = pytest.mark.parametrize("path", PATHS)


def int4_case(rows=24, columns=70, group=32, symmetric=False, batch=5):
    stored = affine.quantize_matrix(torch.randn(rows, columns), QuantScheme(4, group, symmetric))
    return torch.randn(batch, columns), *stored, torch.randn(rows), group


def int8_case(rows=24, columns=70, symmetric=False, batch=5):
    stored = affine.quantize_matrix(torch.randn(rows, columns), QuantScheme(8, -1, symmetric))
    return torch.randn(batch, columns), *stored, torch.randn(rows)


# ---- arguments that reach memory which is not theirs


@pytest.mark.parametrize("path", PATHS[-1:])
def test_hostile_arguments_never_end_the_process(path):
    """dequantize_int4(zeros(3, 0), ones(3, 1), None, -1, 0) and w8a8_conv with stride 0 died of SIGFPE."""
    run_hostile(path, 300)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_two_thousand_hostile_arguments_never_end_the_process(path):
    run_hostile(path, 2000, seed=1)


def run_hostile(path, count, seed=0):
    command = [sys.executable, "-m", "tests.ops.hostile_calls", str(seed), str(count)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), native.VARIABLE: path, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]


@paths
def test_a_matrix_without_columns_is_one_of_zeros(path, use):
    """A sum over nothing: each result is the bias, as with F.linear; on old kernels SIGFPE or ZeroDivisionError."""
    use(path)
    packed, scale = torch.zeros(3, 0, dtype=torch.int32), torch.ones(3, 1)
    assert ops.dequantize_int4(packed, scale, None, -1, 0).shape == (3, 0)
    assert ops.dequantize_int4(packed, torch.ones(3, 0), None, 32, 0).shape == (3, 0)
    codes, bias = torch.zeros(3, 0, dtype=torch.int8), torch.randn(3)
    assert ops.dequantize_int8(codes, scale, None).shape == (3, 0)
    for compute in ("auto", "int8"):
        out = ops.int4_linear(torch.zeros(2, 5, 0), packed, scale, None, bias, -1, compute)
        assert torch.equal(out, bias.expand(2, 5, 3))
    assert torch.equal(ops.int8_linear(torch.zeros(4, 0), codes, scale, None, None), torch.zeros(4, 3))
    qparams = torch.ones(1), torch.zeros(1, dtype=torch.int8)
    x = torch.zeros(2, 0, dtype=torch.int8)
    assert torch.equal(ops.w8a8_linear(x, *qparams, codes, scale, None, bias), bias.expand(2, 3))
    assert torch.equal(ops.w4a8_linear(x, *qparams, packed, scale, None, bias, -1), bias.expand(2, 3))


@paths
@pytest.mark.parametrize("batch", [0, 5])
def test_a_matrix_without_rows_gives_a_result_without_columns(path, batch, use):
    use(path)
    packed, scale = torch.zeros(0, 9, dtype=torch.int32), torch.ones(0, 3)
    assert ops.dequantize_int4(packed, scale, None, 32, 70).shape == (0, 70)
    assert ops.int4_linear(torch.randn(batch, 70), packed, scale, None, torch.zeros(0), 32).shape == (batch, 0)
    codes, scale = torch.zeros(0, 70, dtype=torch.int8), torch.ones(0, 1)
    assert ops.int8_linear(torch.randn(batch, 70), codes, scale, None, None).shape == (batch, 0)
    x = torch.zeros(batch, 70, dtype=torch.int8)
    assert ops.w8a8_linear(x, *linear_case()[1:3], codes, scale, None, None).shape == (batch, 0)


@paths
@pytest.mark.parametrize("group", [72, 2**31, 2**62, 2**63 - 8])
def test_a_group_past_the_row_is_the_row(path, group, use):
    """The kernels round sizes up in 64 bits, and round_activations padded to a whole group: both overflowed."""
    use(path)
    x, packed, scale, zero, bias, _ = int4_case(group=-1)
    for compute in ("float32", "int8"):
        whole = ops.int4_linear(x, packed, scale, zero, bias, -1, compute)
        torch.testing.assert_close(ops.int4_linear(x, packed, scale, zero, bias, group, compute), whole)
    whole = ops.dequantize_int4(packed, scale, zero, -1, 70)
    assert torch.equal(ops.dequantize_int4(packed, scale, zero, group, 70), whole)


@paths
@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("zero_point", [-128, -9, 8, 127])
def test_a_zero_point_that_no_code_has_counts_as_it_is(path, rows, zero_point, use):
    """The reference wrapped 127 + 8 in int8, and the bfloat16 kernel looked it up past its table."""
    use(path)
    x, packed, scale, zero, bias, group = int4_case(batch=rows)
    zero[::3, 1] = zero_point
    codes = affine.unpack_int4(packed, 70).double()
    by_column = [t.repeat_interleave(group, 1)[:, :70].double() for t in (scale, zero)]
    weight = (codes - by_column[1]) * by_column[0]
    torch.testing.assert_close(ops.dequantize_int4(packed, scale, zero, group, 70).double(), weight)
    x = x.bfloat16().float()
    for compute in ("auto", "int8"):
        taken = affine.round_activations(x, group) if compute == "int8" else x
        expected = F.linear(taken.double(), weight, bias.double())
        actual = ops.int4_linear(x, packed, scale, zero, bias, group, compute).double()
        size = F.linear(taken.double().abs(), weight.abs()).max()
        torch.testing.assert_close(actual, expected, rtol=0, atol=float(size) * 1e-5)


WINDOWS = {  # what of (kernel_size, stride, padding, dilation, groups) is changed: what is said
    (8, (0, 1)): r"stride=\[0, 1\]: 2 numbers from 1 to 1073741824 needed",
    (8, (-1, 1)): r"stride=\[-1, 1\]",
    (8, (1,)): r"stride=\[1\]: 2 numbers",
    (8, (2**62, 1)): r"stride=\[4611686018427387904, 1\]",
    (9, (-1, 0)): r"padding=\[-1, 0\]: 2 numbers from 0",
    (9, (2**62, 0)): r"padding=",
    (10, (0, 1)): r"dilation=\[0, 1\]: 2 numbers from 1",
    (10, (9, 9)): r"x is \(2, 8, 9, 8\): too small for kernel_size=\[3, 3\]",
    (7, (3, 0)): r"kernel_size=\[3, 0\]",
    (7, (3, -3)): r"kernel_size=\[3, -3\]",
    (7, ()): r"x is \(2, 8, 9, 8\); \[batch, channels\] and 0 sizes needed",
    (11, 0): r"groups=0 must divide 8 channels of x and 12 of the weight",
    (11, -1): r"groups=-1 must divide",
    (11, 3): r"groups=3 must divide",
}


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("change", WINDOWS, ids=str)
def test_a_window_that_is_none_is_refused(change, fake):
    args = list(conv_case(CONVS["plain"]))
    at, value = change
    args[at] = list(value) if isinstance(value, tuple) else value
    if fake:
        args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    with pytest.raises(RuntimeError, match=WINDOWS[change]):
        ops.w8a8_conv(*args)


@pytest.mark.parametrize("shape", [(0, 8, 9, 8), (2, 0, 9, 8), (2, 8, 0, 8)], ids=str)
def test_a_convolution_over_nothing_is_its_bias(shape):
    args = list(conv_case(CONVS["1 x 1"]))
    args[0] = torch.zeros(shape, dtype=torch.int8)
    args[3] = args[3][:, : shape[1]]
    args[9] = [1, 1]
    out = ops.w8a8_conv(*args)
    assert torch.equal(out, args[6].view(1, -1, 1, 1).expand(shape[0], 12, shape[2] + 2, 10))


TYPES = {
    (ops.int4_linear, 2): "weight_scale: float32, float64, bfloat16 or float16 needed, not torch.int32",
    (ops.int4_linear, 3): "weight_zero_point: int8 needed, not torch.int32",
    (ops.int4_linear, 4): "bias: float32, float64, bfloat16 or float16 needed, not torch.int32",
    (ops.int8_linear, 2): "weight_scale: float32",
    (ops.int8_linear, 3): "weight_zero_point: int8 needed",
    (ops.int8_linear, 4): "bias: float32",
}


@paths
@pytest.mark.parametrize("case", TYPES, ids=str)
def test_a_type_that_an_operand_cannot_have_is_refused(case, path, use):
    use(path)
    op, at = case
    args = list(int4_case() if op is ops.int4_linear else int8_case())
    args[at] = args[at].int()
    with pytest.raises(RuntimeError, match=TYPES[case]):
        op(*args)


@paths
@pytest.mark.parametrize("at", range(5))
def test_a_tensor_whose_storage_was_taken_away_is_refused(path, at, use):
    """Sharding does so with weights that are elsewhere: the kernels read from address 0."""
    use(path)
    for op, args in ((ops.int4_linear, list(int4_case())), (ops.int8_linear, list(int8_case()))):
        op(*args)
        args[at].untyped_storage().resize_(0)
        name = op._schema.arguments[at].name
        with pytest.raises(RuntimeError, match=f"{name}: its storage is smaller than its shape needs"):
            op(*args)


@paths
def test_a_weight_that_changes_its_shape_in_place_stays_inside_its_memory(path, use):
    """What a call remembers of a weight went by its address and size: other rows in the same bytes read past x."""
    use(path)
    x, packed, scale, _, _, _ = int4_case(rows=24, columns=64, group=-1)
    zero, half = torch.zeros(24, 1, dtype=torch.int8), x[:, :32].contiguous()
    ops.int4_linear(x, packed, scale, zero, None, -1)
    packed.data = packed.view(48, 4)
    with pytest.raises(RuntimeError, match="weight_packed has 4 words a row"):
        ops.int4_linear(x, packed, scale, zero, None, -1)
    with pytest.raises(RuntimeError, match="weight_scale"):
        ops.int4_linear(half, packed, scale, zero, None, -1)


# ---- tensors without values, and tensors elsewhere


OPERANDS = {
    ops.int4_linear: int4_case,
    ops.int8_linear: int8_case,
    ops.dequantize_int4: lambda: (*int4_case()[1:4], 32, 70),
    ops.dequantize_int8: lambda: int8_case()[1:4],
    ops.quantize_activation: lambda: (torch.randn(3, 4), *linear_case()[1:3]),
    ops.dequantize_activation: lambda: linear_case()[:3],
    ops.w8a8_linear: lambda: linear_case(symmetric=False),
    ops.w4a8_linear: lambda: (*linear_case(symmetric=False, bits=4), 32),
    ops.w8a8_conv: lambda: conv_case(CONVS["plain"], symmetric=False),
}


@pytest.mark.parametrize("op", OPERANDS, ids=str)
def test_a_tensor_on_meta_beside_real_ones_is_refused_by_name(op):
    """A bias on meta: the result held whatever the memory held before, other numbers at each call."""
    args = OPERANDS[op]()
    tensors = [at for at, value in enumerate(args) if isinstance(value, torch.Tensor)]
    assert op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args)).is_meta
    for at in tensors:
        mixed = [a.to("meta") if i == at else a for i, a in enumerate(args)]
        blamed = op._schema.arguments[at if at else tensors[1]].name
        with pytest.raises(RuntimeError, match=rf"{blamed} is on (meta|cpu), but .* on (meta|cpu): all tensors"):
            op(*mixed)


def test_a_graph_that_was_moved_in_part_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)).eval()
    gm = mq.quantize(model, group_size=32, skip_param_threshold=0, accuracy_warning="ignore").graph_module
    gm.get_submodule("2").bias = torch.nn.Parameter(torch.empty(8, device="meta"))
    with pytest.raises(RuntimeError, match="bias is on meta, but x on cpu"):
        gm(torch.randn(2, 64))


class Table(torch.nn.Module):
    """A parameter, a bias, a buffer, and a tensor that is neither."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(64, 64), torch.nn.BatchNorm1d(64)

    def forward(self, x, scale=None):
        x = self.norm(self.linear(x))
        return x if scale is None else x * scale["by"]


@pytest.mark.parametrize("path", ["linear.weight", "linear.bias", "norm.running_mean", "norm.weight"])
@pytest.mark.parametrize("how", ["meta", "fake", "emptied"])
@pytest.mark.parametrize("with_data", [False, True])
def test_quantize_names_every_tensor_without_values(path, how, with_data):
    """A bias on meta went through, and the result then returned uninitialized memory."""
    model, x = Table().eval(), torch.randn(8, 64)
    owner, _, leaf = path.rpartition(".")
    tensor = getattr(model.get_submodule(owner), leaf)
    if how == "emptied":
        tensor.untyped_storage().resize_(0)
    else:
        empty = tensor.detach().to("meta") if how == "meta" else FakeTensorMode().from_tensor(tensor.detach())
        is_buffer = leaf == "running_mean"
        setattr(model.get_submodule(owner), leaf, empty if is_buffer else torch.nn.Parameter(empty))
    with pytest.raises(mq.WeightError, match=rf"'{path}' \((on the meta|a fake|in a storage).*load them first"):
        mq.quantize(model, x, group_size=32, calibration_data=[x] if with_data else None)


def test_quantize_names_an_input_without_values():
    model, x = Table().eval(), torch.randn(8, 64)
    hollow = {"x": x, "scale": {"by": x.to("meta")}}
    with pytest.raises(mq.CalibrationError, match=r"example_inputs\['scale'\]\['by'\] is on the meta device"):
        mq.quantize(model, hollow, group_size=32)
    with pytest.raises(
        mq.CalibrationError, match=r"batch 1.*\['scale'\]\['by'\] is on the meta device, without values"
    ):
        mq.quantize(model, group_size=32, calibration_data=[{"x": x, "scale": {"by": x}}, hollow])


def test_the_way_is_measured_for_shapes_that_have_rows(use):
    """Guards the fast path: what a call remembers holds no entry for what was refused."""
    if not COMPILED:
        pytest.skip("no compiled kernels")
    use(COMPILED[-1])
    x, packed, scale, zero, bias, group = int4_case()
    known = len(dispatch._PLANS)
    with pytest.raises(RuntimeError, match="bias"):
        ops.int4_linear(x, packed, scale, zero, bias[:3], group)
    assert len(dispatch._PLANS) == known
