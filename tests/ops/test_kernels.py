"""The compiled kernels: every path that this machine can run, and every way of each, against plain arithmetic."""

import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mono_quant_fx as mq
from mono_quant_fx import ops
from mono_quant_fx.config import OPERATOR_COMPUTE, QuantScheme
from mono_quant_fx.numerics import affine
from mono_quant_fx.ops import dispatch, native

#: KERNEL_TOLERANCE of docs/kernels.md: |kernel - exact| over sum |x| |w| + |bias|. In float32 each of K products and
#: sums is rounded; x that is rounded to bfloat16 is, by at most 2^-8; torch's matmul gets a rounded weight as well.
KERNEL_TOLERANCE = {"float32": 2e-6, "rounded x": 2.0**-8, "bfloat16": 2.0**-7}
#: What the result's own type rounds away, of the result.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TINY = 1e-7  # float16 has subnormal results, which are rounded absolutely

COMPILED = native.kernels().available[1:]
WAYS = [(4, path, way) for path in COMPILED for way in ("few", "many", "matmul")]
WAYS += [(4, dispatch.INT8, "many")] if COMPILED and native.has_int8(COMPILED[-1]) else []
WAYS += [(8, path, way) for path in COMPILED if path != "avx512_bf16" for way in ("many", "matmul")]
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
law = settings(deadline=None, derandomize=True, max_examples=150)
cases = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 12) | st.sampled_from([17, 33, 70]),
        "columns": st.integers(1, 300) | st.sampled_from([512, 576, 1024, 2100]),
        "outputs": st.integers(1, 40) | st.sampled_from([100, 129]),
        "group": st.sampled_from([8, 16, 24, 32, 40, 64, 128, 256, -1]),
        "symmetric": st.booleans(),
        "dtype": dtypes,
        "bias": st.booleans(),
        "gap": st.integers(0, 9),
        "seed": st.integers(0, 999),
    }
)


def operands(rows, columns, outputs, group, symmetric, dtype, bias, gap, seed, bits=4):
    """(x with `gap` elements between its rows, the stored weight, the bias)."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, columns, generator=draw).to(dtype)
    stored = affine.quantize_matrix(weight, QuantScheme(bits, group if bits == 4 else -1, symmetric))
    x = torch.randn(rows, columns + gap, generator=draw).to(dtype)[:, :columns]
    return x, stored, torch.randn(outputs, generator=draw).to(dtype) if bias else None


def assert_close(actual, x, stored, bias, group, compute):
    is_int8 = stored.weight_packed.dtype == torch.int8
    codes = stored.weight_packed if is_int8 else affine.unpack_int4(stored.weight_packed, x.shape[-1])
    scale, zero_point = stored.weight_scale.double(), stored.weight_zero_point
    weight = affine.dequantize(codes, scale, zero_point, -1 if is_int8 else group)
    bias = torch.zeros(len(weight)).double() if bias is None else bias.double()
    exact, size = x.double() @ weight.t() + bias, x.double().abs() @ weight.abs().t() + bias.abs()
    allowed = KERNEL_TOLERANCE[compute] * size + ROUNDING[actual.dtype] * exact.abs() + TINY
    assert ((actual.double() - exact).abs() <= allowed).all()


def check_product(bits, path, way, case):
    x, stored, bias = operands(**case, bits=bits)
    out = x.new_full((len(x), len(stored.weight_packed)), float("nan"))
    group = case["group"] if bits == 4 else -1
    product = native.Linear(f"int{bits}_{path}", stored, bias, group, x.shape[-1])
    dispatch.run(way, dispatch.Call(path, bits, product, x, stored, bias, group, out))
    if path == dispatch.INT8:
        x = affine.round_activations(x, case["group"])
    exact = case["dtype"] == torch.bfloat16
    compute = "rounded x" if path == "avx512_bf16" and not exact else "float32"
    assert_close(out, x, stored, bias, case["group"], "bfloat16" if way == "matmul" and exact else compute)


@pytest.mark.parametrize(("bits", "path", "way"), WAYS)
@law
@given(case=cases)
def test_every_way_of_every_path_computes_the_product(bits, path, way, case):
    check_product(bits, path, way, case)


@pytest.mark.parametrize("path", COMPILED)
@pytest.mark.parametrize("rows", [65, 150])
def test_an_input_that_is_read_in_several_parts(path, rows):
    case = {"group": 128, "symmetric": False, "dtype": torch.bfloat16, "bias": True, "gap": 0, "seed": 1}
    check_product(4, path, "many", {"rows": rows, "columns": 16400, "outputs": 51, **case})


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "path", "way"), WAYS)
@settings(law, max_examples=2000)
@given(case=cases)
def test_every_way_of_every_path_computes_two_thousand_products(bits, path, way, case):
    check_product(bits, path, way, case)


@law
@given(case=cases, bits=st.sampled_from([4, 8]), out=dtypes, first=st.integers(0, 5))
def test_dequantized_bits_equal_the_references(case, bits, out, first):
    if not COMPILED:
        pytest.skip("no compiled kernels")
    group = case["group"] if bits == 4 else -1
    weight = torch.randn(
        case["outputs"] + first, case["columns"], generator=torch.Generator().manual_seed(case["seed"])
    )
    scheme = QuantScheme(bits, group, case["symmetric"])
    packed, scale, zero_point = affine.quantize_matrix(weight.to(case["dtype"]), scheme)
    expected = affine.dequantize_weight(
        affine.QuantizedWeight(packed, scale.float(), zero_point), group, case["columns"]
    )
    actual = torch.full((case["outputs"], case["columns"]), float("nan"), dtype=out)
    native.dequantize(bits, (packed, scale, zero_point), group, actual, first)
    assert torch.equal(actual, expected[first:].to(out))


@pytest.mark.parametrize("path", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_dequantize_ops_give_the_same_bits_on_every_path(path, dtype, use):
    def all_of_them():
        weight = torch.randn(9, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
        int4 = affine.quantize_matrix(weight, QuantScheme(4, 32, False))
        int8 = affine.quantize_matrix(weight, QuantScheme(8, -1, False))
        strided = int8._replace(weight_packed=int8.weight_packed.t().contiguous().t())
        return [ops.dequantize_int4(*int4, 32, 100), ops.dequantize_int8(*int8), ops.dequantize_int8(*strided)]

    use("torch")
    expected = all_of_them()
    use(path)
    assert all(a.dtype == dtype and torch.equal(a, b) for a, b in zip(all_of_them(), expected, strict=True))


@pytest.mark.parametrize("path", COMPILED)
@pytest.mark.parametrize("compute", OPERATOR_COMPUTE)
@pytest.mark.parametrize("shape", [(256,), (3, 256), (2, 4, 256), (0, 256), (2, 0, 256), (40, 256)], ids=str)
def test_the_op_takes_any_leading_shape(path, compute, shape, use):
    use(path)
    _, stored, bias = operands(1, 256, 24, 64, False, torch.float32, True, 0, 0)
    x = torch.randn(shape)
    actual = ops.int4_linear(x, *stored, bias, 64, compute)
    assert actual.shape == (*shape[:-1], 24) and actual.dtype == x.dtype
    if compute == "int8":
        x = affine.round_activations(x, 64)
    rounded = compute == "bfloat16" or (compute == "auto" and path == "avx512_bf16")
    assert_close(actual.view(-1, 24), x.view(-1, 256), stored, bias, 64, "bfloat16" if rounded else "float32")


@pytest.mark.parametrize("path", COMPILED)
def test_what_the_kernels_do_not_read_runs_in_torch(path, use):
    use(path)
    x, stored, bias = operands(5, 96, 24, 32, False, torch.float32, True, 0, 0)
    scale = stored.weight_scale.t().contiguous().t()
    strided = ops.int4_linear(x, stored.weight_packed, scale, stored.weight_zero_point, bias, 32)
    assert_close(strided, x, stored, bias, 32, "float32")
    double = ops.int4_linear(x.double(), *stored, bias.double(), 32)
    assert double.dtype == torch.float64
    assert_close(double.float(), x, stored, bias, 32, "float32")
    assert torch.equal(
        ops.int4_linear(x.t().contiguous().t(), *stored, bias, 32), ops.int4_linear(x, *stored, bias, 32)
    )


@pytest.mark.parametrize("path", COMPILED)
def test_the_same_input_gives_the_same_bits_from_many_threads(path, use):
    use(path)
    x, stored, bias = operands(7, 1024, 129, 128, True, torch.float32, True, 0, 1)
    expected, wrong = ops.int4_linear(x, *stored, bias, 128), []

    def call():
        for _ in range(13):
            if not torch.equal(ops.int4_linear(x, *stored, bias, 128), expected):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("path", COMPILED)
def test_int8_inputs_are_exact_whatever_the_kernel_computes_in(path, use):
    use(path)
    x, stored, bias = operands(2, 96, 24, 32, False, torch.float32, True, 0, 0)
    scale, zero_point = torch.tensor([0.02]), torch.tensor([-128], dtype=torch.int8)
    codes = ops.quantize_activation(x, scale, zero_point)
    actual = ops.w4a8_linear(codes, scale, zero_point, *stored, bias, 32)
    assert_close(actual, ops.dequantize_activation(codes, scale, zero_point), stored, bias, 32, "float32")


@pytest.mark.parametrize("path", ["torch", *COMPILED])
def test_compute_bfloat16_rounds_x_everywhere_and_a_wrong_word_is_refused(path, use):
    use(path)
    x, stored, bias = operands(5, 96, 24, 32, False, torch.float32, True, 0, 0)
    rounded = ops.int4_linear(x, *stored, bias, 32, "bfloat16")
    assert torch.equal(rounded, ops.int4_linear(x.bfloat16().float(), *stored, bias, 32, "bfloat16"))
    assert not torch.equal(rounded, ops.int4_linear(x, *stored, bias, 32, "float32"))
    with pytest.raises(RuntimeError, match="compute='int3': one of auto, float32, bfloat16, int8 needed"):
        ops.int4_linear(x, *stored, bias, 32, "int3")


@pytest.mark.parametrize("path", ["torch", *COMPILED])
def test_compute_int8_gives_each_row_and_group_its_own_scale(path, use):
    use(path)
    x, stored, _ = operands(3, 96, 24, 32, False, torch.float32, False, 0, 0)
    x[0, :32] *= 1e6  # an outlier costs its own group, and no other
    x[1] = 0
    x[2, 5] = float("nan")
    actual = ops.int4_linear(x, *stored, None, 32, "int8")
    assert_close(actual[:1], affine.round_activations(x[:1], 32), stored, None, 32, "float32")
    assert torch.equal(actual[1], torch.zeros(24)) and actual[2].isnan().all()
    alone = ops.int4_linear(x[:, 32:].contiguous(), *_columns(stored, 32), None, 32, "int8")
    both = ops.int4_linear(x.clone().index_fill_(1, torch.arange(32), 0.0), *stored, None, 32, "int8")
    assert torch.allclose(alone[:2], both[:2], rtol=1e-5, atol=1e-6)


def _columns(stored, first):
    """The stored weight from column `first` on, in groups of 32."""
    packed, scale, zero_point = stored
    return (t.contiguous() for t in (packed[:, first // 8 :], scale[:, first // 32 :], zero_point[:, first // 32 :]))


def test_kernels_names_the_path_and_the_reason(use):
    for path in native.kernels().available:
        use(path)
        assert mq.kernels().active == native.path() == path
        assert str(mq.kernels()).startswith(f"{path}: {native.VARIABLE}={path} (available: torch")


@pytest.mark.parametrize(("asked", "words"), [("sse", "no path"), ("", "no path")])
def test_a_path_that_is_none_is_refused(asked, words, use):
    use(asked)
    with pytest.raises(mq.ConfigError, match=rf"^{native.VARIABLE}={asked}: {words}; available: auto, torch"):
        mq.kernels()


def test_without_the_library_torch_runs_and_says_so_once(use, monkeypatch):
    x, stored, bias = operands(2, 64, 8, 32, True, torch.float32, True, 0, 0)
    with monkeypatch.context() as patch:
        patch.setattr(native, "_library", lambda: (None, "no library here"))
        for cache in (native._choose, native.say_slow):
            cache.cache_clear()
        use("auto")
        assert str(mq.kernels()) == "torch: no library here (available: torch)"
        with pytest.warns(mq.PerformanceWarning, match=r"^INT4 and INT8 operators run in torch.*: no library here$"):
            ops.int4_linear(x, *stored, bias, 32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.int4_linear(x, *stored, bias, 32)
        use("avx2")
        with pytest.raises(mq.ConfigError, match=r"a path that this machine cannot run.*no library here"):
            mq.kernels()
    for cache in (native._choose, native.say_slow):
        cache.cache_clear()


def test_a_weight_that_changes_is_seen(use):
    """What a call remembers of a weight holds while its tensors are the same objects in the same memory."""
    if not COMPILED:
        pytest.skip("no compiled kernels")
    use(COMPILED[-1])
    x = torch.randn(2, 64)
    first, second = (mq.quantize_weight_int4(torch.randn(32, 64), 32) for _ in range(2))
    held = affine.QuantizedWeight(*(None if t is None else t.clone() for t in first))

    def product(of=held):
        return ops.int4_linear(x, *of, None, 32)

    expected = ops.int4_linear(x, *second, None, 32)
    assert torch.equal(product(), ops.int4_linear(x, *first, None, 32))
    held.weight_packed.copy_(second.weight_packed)  # in place
    held.weight_scale.data = second.weight_scale.clone()  # in other memory
    assert torch.equal(product(), expected)
    held.weight_scale.data = second.weight_scale.double()
    torch.testing.assert_close(product(), expected, rtol=0, atol=0.05)
    held.weight_scale.data = second.weight_scale[:16]
    with pytest.raises(RuntimeError, match="weight_scale"):
        product()
    with pytest.raises(RuntimeError, match="group_size"):
        ops.int4_linear(x, *second, None, 64)
    assert torch.equal(ops.int4_linear(x, *second, torch.ones(32), 32), expected + 1)
    known = len(dispatch._PLANS)
    del held, first, second, product
    assert len(dispatch._PLANS) < known  # nothing is kept of a weight that is gone
