"""The laws of the affine map and of the packed layout, for ragged shapes, every float dtype and both symmetries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mono_quant_fx as mq
from mono_quant_fx.config import INT8, QuantScheme
from mono_quant_fx.numerics import affine

#: Slack on |w - dq| <= scale / 2, in units of the dtype's eps times (scale + |w|): the division, the product and the
#: rounding of w / scale before a tie each lose at most one unit in the last place.
HALF_STEP_SLACK = 2.0
#: Second rounding, with fresh qparams, of an asymmetric group that uses both end codes: scales agree to so many eps.
SCALE_EPS = 4.0

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
law = settings(deadline=None, derandomize=True, max_examples=60)
rows, columns, seeds = st.integers(1, 9), st.integers(1, 150), st.integers(0, 2**31)
schemes = st.one_of(
    st.builds(QuantScheme, st.just(4), st.sampled_from([8, 16, 32, 64, 128, -1]), st.booleans()),
    st.builds(QuantScheme, st.just(8), st.just(-1), st.booleans()),
)
dtypes = st.sampled_from(DTYPES)


def matrix(n, k, seed, dtype=torch.float32, spread=True):
    """Normal values, each row at its own magnitude and offset, so that groups differ."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    if spread:
        w = (w + torch.randn(n, 1, generator=generator)) * 10 ** torch.empty(n, 1).uniform_(-3, 2, generator=generator)
    return w.to(dtype)


def per_column(qparams, group_size, k):
    """[N, G] -> [N, K]: each column's own scale or zero point."""
    return qparams.repeat_interleave(k if group_size == -1 else group_size, 1)[:, :k]


def columns_of(stored, scheme, k):
    return stored.weight_packed if scheme.bits == 8 else affine.unpack_int4(stored.weight_packed, k)


@law
@given(n=rows, k=columns, seed=seeds)
def test_unpack_is_the_inverse_of_pack(n, k, seed):
    codes = torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = affine.pack_int4(codes)
    assert packed.shape == (n, -(-k // 8)) and packed.dtype == torch.int32
    assert torch.equal(affine.unpack_int4(packed, k), codes)
    assert torch.equal(affine.unpack_int4(packed.t().contiguous().t(), k), codes)  # any strides
    assert bool((affine.unpack_int4(packed, packed.shape[1] * 8)[:, k:] == -8).all())  # unused nibbles are 0


@law
@given(n=rows, k=columns, seed=seeds, scheme=schemes, dtype=st.sampled_from(DTYPES[:3]))
def test_the_equations_of_the_module_in_float32_group_by_group(n, k, seed, scheme, dtype):
    w = matrix(n, k, seed, dtype)
    scale, zero_point = affine.choose_qparams(w, scheme)
    codes = affine.quantize(w, scale, zero_point, scheme)
    size, (qmin, qmax) = (k if scheme.group_size == -1 else scheme.group_size), affine.code_range(scheme.bits)
    assert scale.shape == (n, -(-k // size))
    for g, (group, code) in enumerate(zip(w.float().split(size, 1), codes.split(size, 1), strict=True)):
        low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
        wide = (
            group.abs().amax(1) / ((qmax - qmin) / 2)
            if scheme.symmetric
            else high / (qmax - qmin) - low / (qmax - qmin)
        )
        assert torch.equal(scale[:, g], wide.clamp(min=torch.finfo(dtype).tiny).to(dtype))
        step = scale[:, g].float()
        zero = torch.zeros(n) if zero_point is None else (qmin - torch.round(low / step)).clamp(qmin, qmax)
        assert zero_point is None or torch.equal(zero_point[:, g], zero.to(torch.int8))
        assert torch.equal(code, (torch.round(group / step[:, None]) + zero[:, None]).clamp(qmin, qmax).to(torch.int8))


@law
@given(n=rows, k=columns, seed=seeds, scheme=schemes, dtype=dtypes)
def test_inside_the_range_the_error_is_half_a_step(n, k, seed, scheme, dtype):
    w = matrix(n, k, seed, dtype)
    scale, zero_point = affine.choose_qparams(w, scheme)
    wide, back = w.double(), affine.fake_quantize(w, scheme).double()
    step = per_column(scale, scheme.group_size, k).double()
    zero = 0 if zero_point is None else per_column(zero_point, scheme.group_size, k).double()
    qmin, qmax = affine.code_range(scheme.bits)
    inside = (wide / step >= qmin - 0.5 - zero) & (wide / step <= qmax + 0.5 - zero)
    slack = HALF_STEP_SLACK * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) * (step + wide.abs())
    error = (wide - back).abs()
    assert bool((error <= step / 2 + slack)[inside].all())
    assert bool((error <= step * (0.5 + (scale.dtype.itemsize == 2)) + slack).all())  # a 16-bit scale may cut the ends


@law
@given(n=st.integers(2, 9), k=columns, seed=seeds, scheme=schemes)
def test_permuting_rows_permutes_codes_and_scales(n, k, seed, scheme):
    w, order = matrix(n, k, seed), torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    plain, permuted = affine.quantize_matrix(w, scheme), affine.quantize_matrix(w[order], scheme)
    for a, b in zip(plain, permuted, strict=True):
        assert (a is None and b is None) or torch.equal(a[order], b)


@law
@given(n=rows, k=columns, seed=seeds, scheme=schemes, dtype=dtypes)
def test_packed_storage_stands_for_exactly_the_fake_quantized_weight(n, k, seed, scheme, dtype):
    w = matrix(n, k, seed, dtype)
    stored = affine.quantize_matrix(w, scheme)
    back = affine.dequantize_weight(stored, scheme.group_size, k)
    assert back.dtype == dtype and stored.weight_scale.dtype == dtype and back.is_contiguous()
    assert torch.equal(back, affine.fake_quantize(w, scheme))
    assert torch.equal(columns_of(stored, scheme, k), affine.quantize(w, *stored[1:], scheme))


@law
@given(n=rows, k=columns, seed=seeds, scheme=schemes, dtype=dtypes)
def test_rounding_twice_with_the_same_scales_changes_nothing(n, k, seed, scheme, dtype):
    w = matrix(n, k, seed, dtype)
    stored = affine.quantize_matrix(w, scheme)
    back = affine.dequantize_weight(stored, scheme.group_size, k)
    again = affine.quantize(back, *stored[1:], scheme)
    assert torch.equal(again, columns_of(stored, scheme, k))


@law
@given(n=rows, seed=seeds, group=st.sampled_from([8, 32, -1]))
def test_fresh_qparams_find_an_asymmetric_grid_again_where_both_end_codes_are_used(n, seed, group):
    generator = torch.Generator().manual_seed(seed)
    scheme = QuantScheme(4, group, False)
    codes = torch.randint(-8, 8, (n, 64), generator=generator, dtype=torch.int8)
    codes[:, 0::8], codes[:, 1::8] = -8, 7
    scale = torch.rand(n, affine.num_groups(64, group), generator=generator) + 0.5
    zero_point = torch.randint(-8, 8, scale.shape, generator=generator, dtype=torch.int8)
    found = affine.choose_qparams(affine.dequantize(codes, scale, zero_point, group), scheme)
    torch.testing.assert_close(found[0], scale, rtol=SCALE_EPS * torch.finfo(torch.float32).eps, atol=0)
    assert torch.equal(found[1], zero_point)


def test_fresh_symmetric_qparams_move_the_grid():
    # max|w| lies at 7.5 steps, which is no code: so a second rounding with its own scale is another rounding
    scheme = QuantScheme(4, -1)
    once = affine.fake_quantize(torch.tensor([[-7.5, 1.0, 3.0]]), scheme)
    assert once.tolist() == [[-8.0, 1.0, 3.0]]
    assert affine.choose_qparams(once, scheme)[0].item() == pytest.approx(8 / 7.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "scheme", [QuantScheme(4, 8), QuantScheme(4, 8, False), INT8, QuantScheme(8, -1, False)], ids=str
)
def test_groups_of_zeros_of_a_constant_and_of_tiny_values(scheme, dtype):
    info = torch.finfo(dtype)
    least = max(info.tiny, torch.finfo(torch.float32).tiny)
    tiny = affine.choose_qparams(torch.full((1, 8), info.smallest_normal / 4, dtype=dtype), scheme)[0]
    assert bool((tiny == least).all())  # a smaller scale would be subnormal
    zeros = affine.quantize_matrix(torch.zeros(2, 16, dtype=dtype), scheme)
    assert bool((zeros.weight_scale == least).all())
    assert torch.equal(affine.dequantize_weight(zeros, scheme.group_size, 16), torch.zeros(2, 16, dtype=dtype))
    for value in (0.7, -0.7):
        back = affine.fake_quantize(torch.full((2, 16), value, dtype=dtype), scheme)
        step = 0.7 / ((1 << scheme.bits) - 1) * (2 if scheme.symmetric else 0)  # asymmetric: an end code hits it
        assert bool(((back.double() - value).abs() <= step / 2 + 0.7 * 3 * max(info.eps, 2**-23)).all())


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_near_the_largest_of_the_dtype_stay_finite(dtype, symmetric):
    w = torch.tensor([[0.9, -0.9, 0.1, 0.0]], dtype=torch.float64).mul(torch.finfo(dtype).max).to(dtype)
    assert bool(torch.isfinite(affine.fake_quantize(w, QuantScheme(4, -1, symmetric))).all())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_are_refused_wherever_they_sit(bad, symmetric, dtype):
    words = (
        r"^it holds NaN or infinity \(or exceeds float32\), which no code can stand for; repair it or skip this layer$"
    )
    for at in ((0, 0), (3, 17), (2, 20)):  # the last is in the ragged group
        w = torch.ones(4, 21, dtype=dtype)
        w[at] = bad
        with pytest.raises(mq.WeightError, match=words):
            mq.quantize_weight_int4(w, 8, symmetric=symmetric)


@pytest.mark.parametrize("scheme", [QuantScheme(4, -1), QuantScheme(4, -1, False), INT8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_number_of_a_dtype_stays_finite(dtype, sign, scheme):
    w = torch.full((1, 8), sign * torch.finfo(dtype).max, dtype=dtype)
    ratio = affine.fake_quantize(w, scheme).double() / w.double()
    assert 0.85 < ratio.min() <= ratio.max() <= 1


@pytest.mark.parametrize("scheme", [QuantScheme(4, 16), QuantScheme(4, -1, False), INT8], ids=str)
def test_the_tile_size_never_shows(scheme, monkeypatch):
    w = matrix(13, 45, 1)
    whole = affine.quantize_matrix(w, scheme)
    back = affine.dequantize_weight(whole, scheme.group_size, 45)
    for tile in (1, 45, 100, 13 * 45 - 1, 13 * 45):
        monkeypatch.setattr(affine, "TILE", tile)
        tiled = affine.quantize_matrix(w, scheme)
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(whole, tiled, strict=True))
        assert torch.equal(affine.dequantize_weight(whole, scheme.group_size, 45), back)


def test_quantize_weight_int4_takes_any_shape_along_any_axis():
    w = torch.randn(6, 4, 3, 5)
    for axis in (0, 1, 3, -1):
        expected = affine.quantize_matrix(w.movedim(axis, 0).flatten(1), QuantScheme(4, 32))
        assert all(
            torch.equal(a, b) for a, b in zip(mq.quantize_weight_int4(w, 32, axis)[:2], expected[:2], strict=True)
        )
    stored = mq.quantize_weight_int4(torch.randn(5, 70), 32, symmetric=False)
    assert stored.weight_packed.shape == (5, 9) and stored.weight_zero_point.dtype == torch.int8
    assert stored.weight_scale.shape == stored.weight_zero_point.shape == (5, 3)
    parameter = torch.nn.Parameter(torch.randn(4, 16))
    assert not any(t.requires_grad for t in mq.quantize_weight_int4(parameter, 8)[:2])


@pytest.mark.parametrize(
    ("weight", "options", "error", "words"),
    [
        (
            torch.ones(8),
            {},
            mq.WeightError,
            r"axis=0 of a weight of shape \(8,\): an axis of at least \[out, in\] is needed",
        ),
        (torch.ones(8, 8), {"axis": 2}, mq.WeightError, r"axis=2 of a weight of shape \(8, 8\)"),
        (torch.ones(0, 8), {}, mq.WeightError, r"a non-empty float matrix is needed, not \(0, 8\) of torch.float32"),
        (
            torch.ones(8, 8).int(),
            {},
            mq.WeightError,
            r"a non-empty float matrix is needed, not \(8, 8\) of torch.int32",
        ),
        (torch.ones(8, 8), {"group_size": 12}, mq.ConfigError, r"group_size=12: a group is a positive multiple of 8"),
        (torch.ones(8, 8), {"symmetric": 1}, mq.ConfigError, r"symmetric=1: symmetric is True or False"),
    ],
)
def test_what_cannot_be_quantized_is_said(weight, options, error, words):
    with pytest.raises(error, match=f"^{words}"):
        mq.quantize_weight_int4(weight, **options)
